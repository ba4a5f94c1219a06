"""Pruner: what a method may do about the image tokens, and when. Nothing here is about any one method.

    images ─(0 images)─► Tiles ─► ImageTokens ─(1 encoded)─► prefill, at cross-attention layer i (2 layer)
        ─► ImageKV of every layer ─(3 prefilled)─► decode a token ─(4 stepped)─► logits ─(5 logits)─► sample

A method is one class that overrides some of these hooks; the rest do nothing. Three more are for the few
that read the text too: `text_layer` in prefill, `text_cache` after 3 and 4, and `answered` after 1, by a
smaller model. What a method needs to know comes through the arguments: queries and keys, never attention
weights (`pruning.attention` computes those that are asked for); what costs something to have is named in
`needs`. Its options are the fields of its dataclass. `generate` and prefill call the hooks; a prompt without
an image calls none. Rounding, ties and budgets are ours, and the same for all methods. B batch, T text
tokens, N image tokens, H query heads, G key/value heads, K = 1 or G sets of kept tokens, d head width.
"""
import math
import types
import typing
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor

from model.cache import TextKV
from model.image_tokens import ImageKV, ImageTokens, Queries, Tiles, each_image
from weights.images import ImageProcessor

HOOKS = ("preprocess", "encoded", "answered", "text_layer", "layer", "prefilled", "stepped", "text_cache",
           "logits")


@dataclass
class Prompts:
    """What is asked about the images, for hook 1."""
    ids: list[list[int]]                        # of each batch row
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    question: Tensor | None = None              # [B, D] `LlamaVision.question` of them, where needed


@dataclass
class Pruner:
    """Keeps everything. `keep` is the fraction kept of each image's tokens, or a whole number of them."""
    keep: float | int = 1.0

    name: ClassVar[str] = "none"
    paper: ClassVar[str] = ""
    unit: ClassVar[str] = ""                    # what `keep` is a share of, if not of the image
    needs: ClassVar[tuple[str, ...]] = ()       # "vision": ImageTokens.vision; "question": Prompts.question
    merges: ClassVar[bool] = False              # whether what is kept is made of several tokens
    whole: ClassVar[list[ImageKV]] = []         # what it holds beside the caches, to choose from anew

    def __init_subclass__(cls):
        cls.name = vars(cls).get("name", cls.__name__.lower())

    def preprocess(self, images: list[Image.Image], processor: ImageProcessor) -> Tiles:
        """0, before the encoder: fewer or smaller tiles."""
        return processor(images)

    def encoded(self, image: ImageTokens, prompts: Prompts) -> ImageTokens:
        """1, before the decoder: drop or merge tokens. Or add branches: for a batch of n · B rows, every
        prompt is read n times over, and `logits` has to merge what comes of it."""
        return image

    def answered(self) -> dict[int, list[int]]:
        """After 1: batch rows that need not be read, and the tokens of their answers, without a stop token.
        The hooks after this one see the other rows alone, in their order."""
        return {}

    def text_layer(self, i: int, q: Tensor, key: Tensor, lengths: Tensor):
        """In prefill, at self-attention layer i: q [B, H, T, d] and key [B, G, T, d] are rotated, q is not
        yet scaled by d ** -0.5; rows have `lengths` [B] tokens, and padding on their right."""

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        """2, in prefill, at cross-attention layer i (0 is the first): a smaller `kv` is what this layer
        attends to and keeps, a smaller `image` what later layers make their keys and values of."""
        return image, kv

    def prefilled(self, kvs: list[ImageKV]) -> list[ImageKV]:
        """3, between prefill and decode: drop, merge or replace, in any layer, any key/value head. What the
        last prompt token does not see is masked already, and is let go afterwards."""
        return kvs

    def stepped(self, step: int, queries: list[Tensor], kvs: list[ImageKV]) -> list[ImageKV]:
        """4, after a decoded token: what the next one sees; `queries` [B, H, 1, d] of every layer."""
        return kvs

    def text_cache(self, step: int, texts: list[TextKV]) -> list[TextKV]:
        """After 3 (step -1) and after 4: what is held of the text, of every self-attention layer; fewer
        entries, as many in all layers, each row's from slot 0 on."""
        return texts

    def logits(self, logits: Tensor) -> Tensor:
        """5, before sampling: [n · B, V] of all branches -> [B, V]."""
        return logits

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            if not fits(value, hint):
                raise ValueError(f"{self.name}: {field.name} is {value!r}, but must be {words(hint)}")
        if self.keep is not None:
            self.check_share("keep")

    def check_share(self, option: str):
        """Raise ValueError where a option is neither a share of the image tokens nor a number of them."""
        value = getattr(self, option)
        if not (0 < value <= 1 if isinstance(value, float) else value >= 1):
            raise ValueError(f"{self.name}: {option} is {value}, but must be a fraction above 0 and at most "
                             "1.0, or a whole number of image tokens, at least 1")

    @property
    def keeps_all(self) -> bool:
        """Whether there is nothing to do; then no hook is called."""
        return isinstance(self.keep, float) and self.keep == 1

    def __str__(self) -> str:
        """For people: the method, its keep ratio, and the options that are not at their default."""
        others = [f"{option} {value}" for option, value in self.options_set().items()]
        keep = [] if self.keep is None else [f"keep {self.keep} {self.unit}".strip()]
        return ", ".join([self.name, *keep, *others])

    def options_set(self) -> dict[str, object]:
        """The options, other than keep, that are not at their default."""
        return {field.name: value for field in fields(self)
                if field.name != "keep" and (value := getattr(self, field.name)) != field.default}


@dataclass
class SelectOnce(Pruner):
    """A pruner that chooses once, at cross-attention layer `full_layers` - 1: this layer and those before it
    read the whole image in prefill, later ones make their keys and values of what is kept alone. With 0 the
    first layer chooses, and already reads what is kept alone."""
    keep: float | int = 0.5
    full_layers: int = 1                                    # that read the whole image in prefill
    early_caches: Literal["trim", "full"] = "trim"          # what the first layers hold for decoding
    when: Literal["prefill", "boundary"] = "prefill"        # boundary: all of them read it in prefill

    def choose(self, queries: Queries, image: ImageTokens, kv: ImageKV) -> Tensor:
        """What is kept, [B, N] bool."""
        raise NotImplementedError

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        if i == max(self.full_layers - 1, 0):
            self.kept = self.choose(queries, image, kv)
            if self.when == "prefill":
                kv = kv if self.full_layers else kv.take(self.kept)
                image = image.take(self.kept)
        return image, kv

    def prefilled(self, kvs: list[ImageKV]) -> list[ImageKV]:
        if not 0 <= self.full_layers <= len(kvs):
            raise ValueError(f"{self.name}: full_layers is {self.full_layers}, but must be 0 to {len(kvs)}, "
                             "the number of cross-attention layers")
        early, late = kvs[:self.full_layers], kvs[self.full_layers:]
        if self.early_caches == "trim":
            early = [kv.take(self.kept) for kv in early]
        if self.when != "prefill":
            late = [kv.take(self.kept) for kv in late]
        return early + late

    def __str__(self) -> str:
        whole = {0: "", 1: "layer 0 keeps"}.get(self.full_layers, f"the first {self.full_layers} layers keep")
        whole = whole if self.when == "prefill" else "every layer keeps"
        return super().__str__() + (whole and f"; {whole} all in prefill")


@dataclass
class SelectPerLayer(Pruner):
    """A pruner that scores the tokens in every cross-attention layer while the prompt is read, each layer for
    itself, and cuts all layers when it has been."""
    keep: float | int = 0.5

    def score(self, i: int, queries: Queries, kv: ImageKV) -> Tensor:
        """Of layer i: [B, N], or [B, G, N] for sets of its own in every key/value head."""
        raise NotImplementedError

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        if i == 0:
            self.scores = []
        self.scores.append(self.score(i, queries, kv))
        return image, kv

    def chosen(self, kvs: list[ImageKV]) -> list[Tensor]:
        """What each layer keeps, bool, shaped like its scores."""
        return [top_k_mask(score, self.keep, kv) for score, kv in zip(self.scores, kvs, strict=True)]

    def cut(self, kv: ImageKV, kept: Tensor) -> ImageKV:
        """What is left of a layer where so much of it is kept, [B, N] or [B, K, N]."""
        return kv.take(kept)

    def prefilled(self, kvs: list[ImageKV]) -> list[ImageKV]:
        return [self.cut(kv, kept) for kv, kept in zip(kvs, self.chosen(kvs), strict=True)]


def chance(seed: int, prompts: Prompts, image: ImageTokens) -> Tensor:
    """A random number for each token, [B, N]: others for every prompt and `seed`, the same ones alone and
    in a batch."""
    draws = [torch.Generator().manual_seed(hash((seed, *ids))) for ids in prompts.ids]
    numbers = [torch.rand(image.coords.shape[1], generator=draw) for draw in draws]
    return torch.stack(numbers).to(image.coords.device)


def top_k_mask(scores: Tensor, keep: float | int, tokens: ImageTokens | ImageKV) -> Tensor:
    """The highest scores of every image, as many as `keep` says: [B, N] or [B, K, N] -> the same, bool.

    Of equal scores the first win. Padding is never among them.
    """
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for there in each_image(tokens):
        if there.ndim != scores.ndim:               # sets that the heads share have no dimension for them
            there = there[:, None] if there.ndim < scores.ndim else there[:, 0]
        n = num_kept(keep, there.sum(-1, keepdim=True))
        ours = scores.masked_fill(~there, -math.inf)
        least = ours.topk(int(n.max()), dim=-1).values.take_along_dim(n - 1, -1)        # the n-th highest
        above, equal = ours > least, ours == least
        room = n - above.sum(-1, keepdim=True)
        kept |= there & (above | (equal & (equal.cumsum(-1) <= room)))
    return kept


def num_kept(keep: float | int, tokens: Tensor) -> Tensor:
    """How many of `tokens` (int64) to keep: a fraction rounded half up, or a number, but at least one."""
    if isinstance(keep, float):
        return (keep * tokens.double()).mul(1e6).round().div(1e6).add(0.5).floor().long().clamp(min=1)
    return tokens.clamp(1, keep)


# ----- options


def hooks(method: type[Pruner]) -> list[str]:
    """The hooks at which a method acts: those that it, or a class between it and Pruner, overrides."""
    classes = method.__mro__[:method.__mro__.index(Pruner)]
    return [hook for hook in HOOKS if any(hook in vars(c) for c in classes)]


def options(method: type[Pruner]) -> dict[str, str]:
    """Each option of a method, and in words what it may be."""
    hints = typing.get_type_hints(method)
    return {field.name: f"{words(hints[field.name])} (default {field.default})" for field in fields(method)}


def fits(value: object, hint: type) -> bool:
    """Whether a option of this type may have this value."""
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in typing.get_args(hint))
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint


def words(hint: type) -> str:
    if typing.get_args(hint):
        parts = typing.get_args(hint)
        literal = typing.get_origin(hint) is Literal
        return " or ".join(str(part) if literal else words(part) for part in parts)
    return {float: "a number", int: "a whole number", bool: "true or false", str: "text",
            type(None): "none"}.get(hint, str(hint))
