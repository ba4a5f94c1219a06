"""Pruner: what a method may do about the image tokens, and when. Nothing here is about any one method.

    images ─(0 preprocess)─► Tiles ─► ImageTokens ─(1 encoded)─► prefill: each cross-attention layer (2 layer)
        ─► image KV of every layer ─(3 prefilled)─► decode a token ─(4 stepped)─► logits ─(5 logits)─► sample

A method is one class that overrides some of these hooks; the others do nothing. Most methods derive from
SelectOnce or SelectPerLayer and write one function, `score`. The options of a method are the fields of its
dataclass. Queries and keys come as arguments, attention weights never do: `pruning.attention` computes those
that a method asks for. A method that needs more keeps the model when `begin` is called.
B batch, T text tokens, N image tokens, H query heads, G key/value heads, K = 1 or G sets of kept tokens.
"""
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import torch
from PIL import Image
from torch import Tensor

from model.image_tokens import ImageKV, ImageTokens, Queries, Tiles
from model.llama_vision import LlamaVision
from pruning.options import Options, check_least, check_share
from pruning.select import top_k_mask
from weights.images import ImageProcessor
from weights.messages import quoted

Reduced = TypeVar("Reduced", ImageTokens, ImageKV)


@dataclass
class Pruner(Options):
    """Keeps everything. `keep` is the fraction kept of each image's tokens, or a whole number of them."""
    keep: float | int = 1.0

    name: ClassVar[str] = "none"
    paper: ClassVar[str] = ""
    unit: ClassVar[str] = ""                    # what `keep` is a share of, if not of the image
    keep_states: ClassVar[bool] = False         # whether it needs ImageTokens.states
    merges: ClassVar[bool] = False              # whether a kept token may be made of several tokens
    stored: ClassVar[list[ImageKV]] = []        # image KV beside the cache, to choose from again
    owners: ClassVar[list[Tensor]] = []         # of each layer or of all, [B, N] or [B, K, N]: see prefilled

    def begin(self, model: LlamaVision):
        """Before everything else, for each call of `generate`: keep of the model what the method needs."""

    def preprocess(self, images: list[Image.Image], processor: ImageProcessor) -> Tiles:
        """Hook 0, before the encoder: fewer or smaller tiles."""
        return processor(images)

    def encoded(self, image: ImageTokens, prompts: list[list[int]]) -> ImageTokens:
        """Hook 1, before the decoder: drop or merge tokens; `prompts` are token ids."""
        return image

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        """Hook 2, in prefill, at cross-attention layer i: a smaller `kv` is what this layer attends to and
        caches; a smaller `image` is what later layers make their keys and values of."""
        return image, kv

    def prefilled(self, image_kv: list[ImageKV]) -> list[ImageKV]:
        """Hook 3, between prefill and decode: drop, merge or replace, in any layer, in any key/value head.
        Tokens that the last prompt token does not see are masked here, and dropped afterwards. A method that
        merges says from here on in `owners` which of the encoded tokens (before hook 1) stands for each."""
        return image_kv

    def stepped(self, step: int, queries: list[Tensor], image_kv: list[ImageKV]) -> list[ImageKV]:
        """Hook 4, after a decoded token: what the next one sees; `queries` [B, H, 1, d] of every layer."""
        return image_kv

    def logits(self, logits: Tensor) -> Tensor:
        """Hook 5, before sampling: [B, V] -> the same."""
        return logits

    def around(self, generate: Callable) -> Callable:
        """For methods that read a prompt more than once, or with a second model: a function that is called
        like `generate.generate`, and calls it. `max_new_tokens` may have a number for each prompt."""
        return generate

    def __post_init__(self):
        super().__post_init__()
        if self.keep is not None:
            check_share(self, "keep")

    @property
    def keeps_all(self) -> bool:
        """Whether there is nothing to do; then no hook is called."""
        return isinstance(self.keep, float) and self.keep == 1

    def __str__(self) -> str:
        """For people: the method, its keep ratio, and the options that are not at their default."""
        others = [f"{option} {value}" for option, value in self.options_set().items()]
        keep = [] if self.keep is None else [f"keep {self.keep} {self.unit}".strip()]
        return ", ".join([self.name, *keep, *others])


def check_pruner(pruner: Pruner | None, image: ImageTokens | None):
    """Raise ValueError for what is no pruner, or for one that cannot work on this image."""
    if pruner is None:
        return
    if not isinstance(pruner, Pruner):
        raise ValueError(f"pruner is {quoted(pruner)}, not an instance of a Pruner: make one, as in "
                         "load('fastv', keep=0.25)")
    if pruner.keep_states and not pruner.keeps_all and image is not None and image.states is None:
        raise ValueError(f"{pruner.name} needs states of the encoder: encode with keep_states=True")


# The methods above, in the order in which they are called.
HOOKS = [name for name, value in vars(Pruner).items() if inspect.isfunction(value) and name[0] != "_"]


def hooks(method: type[Pruner]) -> list[str]:
    """The hooks that a method overrides."""
    return [hook for hook in HOOKS if vars(Pruner)[hook] is not getattr(method, hook)]


class Wrapper(Pruner):
    """A pruner around another one, which does what that one does. Override the hooks that you watch."""

    def __init__(self, inner: Pruner):
        self.inner = inner
        self.keep = inner.keep

    @property
    def keeps_all(self) -> bool:
        """False: its hooks are always called."""
        return False

    @property
    def keep_states(self) -> bool:
        return self.inner.keep_states

    @property
    def merges(self) -> bool:
        return self.inner.merges

    @property
    def stored(self) -> list[ImageKV]:
        return self.inner.stored

    @property
    def owners(self) -> list[Tensor]:
        return self.inner.owners

    def __str__(self) -> str:
        return str(self.inner)

    def begin(self, model: LlamaVision):
        self.inner.begin(model)

    def preprocess(self, images: list[Image.Image], processor: ImageProcessor) -> Tiles:
        return self.inner.preprocess(images, processor)

    def encoded(self, image: ImageTokens, prompts: list[list[int]]) -> ImageTokens:
        return self.inner.encoded(image, prompts)

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        return self.inner.layer(i, queries, image, kv)

    def prefilled(self, image_kv: list[ImageKV]) -> list[ImageKV]:
        return self.inner.prefilled(image_kv)

    def stepped(self, step: int, queries: list[Tensor], image_kv: list[ImageKV]) -> list[ImageKV]:
        return self.inner.stepped(step, queries, image_kv)

    def logits(self, logits: Tensor) -> Tensor:
        return self.inner.logits(logits)

    def around(self, generate: Callable) -> Callable:
        return self.inner.around(generate)


@dataclass
class SelectOnce(Pruner):
    """Chooses once, in prefill, at cross-attention layer `full_layers` - 1: this layer and those before it
    attend to all tokens, later ones make keys and values of the kept tokens only. With 0 the first layer
    chooses, and already attends to the kept tokens only."""
    keep: float | int = 0.5
    full_layers: int = 1                                    # that attend to all tokens in prefill
    early_caches: Literal["trim", "full"] = "trim"          # what these layers keep for decoding
    when: Literal["prefill", "boundary"] = "prefill"        # boundary: every layer attends to all in prefill

    def __post_init__(self):
        super().__post_init__()
        check_least(self, full_layers=0)

    def score(self, queries: Queries, kv: ImageKV) -> Tensor:
        """How much each token is worth, [B, N]: the highest are kept."""
        raise NotImplementedError(f"{type(self).__name__} needs a method score(self, queries, kv)")

    def choose(self, queries: Queries, image: ImageTokens, kv: ImageKV) -> Tensor:
        """Which tokens are kept, [B, N] bool. Override it only for a choice that no single score makes."""
        return top_k_mask(self.score(queries, kv), self.keep, image)

    def reduce(self, tokens: Reduced) -> Reduced:
        """What remains of tokens, or of keys and values. Override it only for a method that merges: then
        `choose` returns the index of the token that stands for each, [B, N] int64."""
        return tokens.take(self.kept)

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        if i == max(self.full_layers - 1, 0):
            self.kept = self.choose(queries, image, kv)
            if self.when == "prefill":
                kv = kv if self.full_layers else self.reduce(kv)
                image = self.reduce(image)
        return image, kv

    def prefilled(self, image_kv: list[ImageKV]) -> list[ImageKV]:
        if not 0 <= self.full_layers <= len(image_kv):
            raise ValueError(f"{self.name}: full_layers is {self.full_layers}, but must be 0 to "
                             f"{len(image_kv)}, the number of cross-attention layers")
        early = image_kv[:self.full_layers]
        late = image_kv[self.full_layers:]
        if self.early_caches == "trim":
            early = [self.reduce(kv) for kv in early]
        if self.when != "prefill":
            late = [self.reduce(kv) for kv in late]
        if self.merges:
            full = len(early) if self.early_caches == "full" else 0
            themselves = torch.arange(self.kept.shape[1], device=self.kept.device).expand_as(self.kept)
            self.owners = [themselves] * full + [self.kept] * (len(image_kv) - full)
        return early + late

    def __str__(self) -> str:
        if self.when != "prefill":
            full = "every layer attends to all tokens in prefill"
        elif self.full_layers == 1:
            full = "layer 0 attends to all tokens in prefill"
        elif self.full_layers:
            full = f"the first {self.full_layers} layers attend to all tokens in prefill"
        else:
            return super().__str__()
        return f"{super().__str__()}; {full}"


@dataclass
class SelectPerLayer(Pruner):
    """Scores the tokens in every cross-attention layer while the prompt is read, each layer for itself, and
    cuts all layers between prefill and decode."""
    keep: float | int = 0.5

    def score(self, queries: Queries, kv: ImageKV) -> Tensor:
        """How much each token is worth in one layer: [B, N], or [B, G, N] for a set of its own in every
        key/value head."""
        raise NotImplementedError(f"{type(self).__name__} needs a method score(self, queries, kv)")

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        if i == 0:
            self.scores = []
        self.scores.append(self.score(queries, kv))
        return image, kv

    def choose(self, image_kv: list[ImageKV]) -> list[Tensor]:
        """Which tokens each layer keeps, bool, shaped like its scores."""
        return [top_k_mask(score, self.keep, kv) for score, kv in zip(self.scores, image_kv, strict=True)]

    def cut(self, kv: ImageKV, kept: Tensor) -> ImageKV:
        """What remains of a layer when `kept` [B, N] or [B, K, N] of its tokens are kept."""
        return kv.take(kept)

    def prefilled(self, image_kv: list[ImageKV]) -> list[ImageKV]:
        return [self.cut(kv, kept) for kv, kept in zip(image_kv, self.choose(image_kv), strict=True)]
