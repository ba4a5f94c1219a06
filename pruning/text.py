"""The text's own cache: what a method needs that makes it smaller beside the image's.

`EachLayerAndText` scores text tokens in every self-attention layer while the prompt is read, from queries and
keys, and cuts these layers too when it has been. Batch rows that see no image keep all their text. To what
chooses, takes or merges image tokens, a row's text is one image. Room for text is taken once for the whole
answer (model/cache.py): what goes is not seen any more, but neither memory nor time is saved here.
B batch, H query heads, G key/value heads, K = 1 or G sets, T text tokens, N tokens of either kind.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.cache import TextKV
from model.image_tokens import ImageKV, ImageTokens, compact
from pruning.attention import logits, rows_at_once
from pruning.pruner import Prompts, SelectPerLayer, top_k_mask


@dataclass
class SelectPerLayerAndText(SelectPerLayer):
    """A pruner that cuts every cross-attention layer and, where `text_keep` is below 1, the others too."""
    text_keep: float = 1.0                      # share of the prompt's text that is held for decoding

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.text_keep <= 1:
            raise ValueError(f"{self.name}: text_keep is {self.text_keep}, but must be above 0 and at most 1")

    @property
    def keeps_all(self) -> bool:
        return super().keeps_all and self.text_keep == 1

    def text_score(self, q: Tensor, key: Tensor, sees: Tensor) -> Tensor:
        """[B, K, T] fp32 of one self-attention layer: q and key as `Pruner.text_layer` has them, and which
        rows see which tokens, [B, T, T]; padding neither sees nor is seen."""
        raise NotImplementedError

    def text_protected(self, lengths: Tensor, slots: Tensor) -> Tensor:
        """[B, T] True for text that is kept whatever its score; `slots` are 0 to T - 1."""
        raise NotImplementedError

    def encoded(self, image: ImageTokens, prompts: Prompts) -> ImageTokens:
        real = image.coords.new_ones(image.coords.shape[:2]) if image.mask is None else image.mask
        self.tokens = real.sum(1)                                           # [B] of the images of each row
        return image

    def text_layer(self, i: int, q: Tensor, key: Tensor, lengths: Tensor):
        if self.text_keep < 1:
            slots = torch.arange(q.shape[2], device=q.device)
            sees = (slots <= slots[:, None]) & (slots[:, None] < lengths[:, None, None])
            self.text_scores = [] if i == 0 else self.text_scores
            self.text_scores.append(self.text_score(q, key, sees))

    def text_cache(self, step: int, texts: list[TextKV]) -> list[TextKV]:
        if step >= 0 or self.text_keep == 1:
            return texts
        slots, held = torch.arange(self.text_scores[0].shape[2], device=self.tokens.device), []
        protected = self.text_protected(texts[0].lengths, slots)[:, None]
        for text, score in zip(texts, self.text_scores, strict=True):
            kv = as_image(text, slots)
            kept = top_k_mask(score.masked_fill(protected, math.inf), self.text_keep, kv) | protected
            kept = kv.mask & (kept | (self.tokens == 0)[:, None, None])
            kv = self.cut(kv, kept)
            held.append(TextKV(kv.key, kv.value, kept[:, 0].sum(-1)))
        return held


def as_image(text: TextKV, slots: Tensor) -> ImageKV:
    """The first T slots of a cache of text, as if each row's text were one image."""
    coords = slots.new_zeros(len(text.lengths), 1, len(slots), 4)
    return ImageKV(text.key[:, :, slots], text.value[:, :, slots], coords,
                   (slots < text.lengths[:, None])[:, None])


def take_text(text: TextKV, kept: Tensor) -> TextKV:
    """The entries where `kept` [B, capacity] is True, in their order."""
    order = compact(kept)[0][:, None, :, None]
    return TextKV(text.key.take_along_dim(order, 2), text.value.take_along_dim(order, 2), kept.sum(-1))


def mass_seen(q: Tensor, key: Tensor, sees: Tensor, weigh: Callable[[Tensor], Tensor]) -> Tensor:
    """How much attention each token gets, summed over text rows, by query head: [B, H, N] fp32.

    q [B, H, T, d] and key [B, G, N, d]; only rows that see anything, `sees` [B, T, N], are asked. `weigh`
    makes weights of scores [H, t, N], where -inf is what a row does not see.
    """
    mass = q.new_zeros(*q.shape[:2], key.shape[2], dtype=torch.float32)
    for row, inside in enumerate(sees):
        keys = key[row].float()
        for rows in inside.any(-1).nonzero()[:, 0].split(rows_at_once(*mass.shape[1:])):
            scores = logits(q[row][:, rows], keys).masked_fill_(~inside[rows], -math.inf)
            mass[row] += weigh(scores).sum(1)
            del scores                      # before the next chunk is made
    return mass
