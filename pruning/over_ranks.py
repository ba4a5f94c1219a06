"""OverRanks: a pruner around another one, for a model of which every rank has a share of the heads.

On every rank the method is asked about queries, keys and values of all heads; of what it keeps, each rank
takes the part of its own heads. What it decided on rank 0 counts: sums on a GPU are not the same each time,
and with one token more on one of the ranks their shares would no longer fit together.
G key/value heads, K = 1 or G sets of kept tokens.
"""
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from model.answer import Answer
from model.image_tokens import ImageKV, ImageTokens, Queries
from model.llama_vision import LlamaVision
from pruning.pruner import Pruner, Wrapper, hooks
from weights.ranks import Ranks


def over_ranks(pruner: Pruner | None, ranks: Ranks) -> Pruner | None:
    """A pruner as several ranks need it; itself, if there is one rank or nothing to do."""
    if ranks.count == 1 or not isinstance(pruner, Pruner) or pruner.keeps_all:
        return pruner
    return OverRanks(pruner, ranks)


class OverRanks(Wrapper):
    def __init__(self, inner: Pruner, ranks: Ranks):
        super().__init__(inner)
        self.name = inner.name
        self.ranks = ranks
        self.asks = hooks(type(inner))
        self.own_sets: dict[int, bool] = {}         # of layers: whether every KV head has tokens of its own

    def around(self, generate: Callable) -> Callable:
        def run(*args) -> Answer:
            answer = run_inner(*args)
            each = zip(*self.ranks.each(answer.kept), strict=True)          # means over the heads of a rank
            answer.kept = [[sum(layer) / len(layer) for layer in zip(*of_ranks, strict=True)]
                           for of_ranks in each]
            return answer
        run_inner = self.inner.around(generate)
        return run

    def begin(self, model: LlamaVision):
        self.own_sets = {}
        super().begin(model)

    def encoded(self, image: ImageTokens, prompts: list[list[int]]) -> ImageTokens:
        after = self.inner.encoded(image, prompts)
        return self.tokens_of_first(image, after) if "encoded" in self.asks else after

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        if "layer" not in self.asks:
            return image, kv
        whole = self.whole([kv], i)
        asked = replace(queries, **{name: self.all_heads(getattr(queries, name))
                                    for name in ("q", "text_q", "text_k")})
        fewer, after = self.inner.layer(i, asked, image, whole[0])
        return self.tokens_of_first(image, fewer), self.own([kv], whole, [after], i)[0]

    def prefilled(self, image_kv: list[ImageKV]) -> list[ImageKV]:
        if "prefilled" not in self.asks:
            return image_kv
        whole = self.whole(image_kv)
        return self.own(image_kv, whole, self.inner.prefilled(list(whole)))

    def stepped(self, step: int, queries: list[Tensor], image_kv: list[ImageKV]) -> list[ImageKV]:
        if "stepped" not in self.asks:
            return image_kv
        whole = self.whole(image_kv)
        after = self.inner.stepped(step, [self.all_heads(q) for q in queries], whole)
        return image_kv if after is whole else self.own(image_kv, whole, after)

    # ----- from the shares of all ranks to all heads, and back

    def all_heads(self, tensor: Tensor | None) -> Tensor | None:
        """[B, own heads, ...] of every rank -> [B, all heads, ...]."""
        return None if tensor is None else self.ranks.gather(tensor, 1)

    def whole(self, image_kv: list[ImageKV], layer: int = 0) -> list[ImageKV]:
        """Keys and values of all heads, in layers from this one on."""
        apart = [self.own_sets.get(layer + i, False) for i in range(len(image_kv))]
        lengths = [kv.key.shape[2] for kv in image_kv]
        if any(apart):                                      # what heads of their own keep differs in number
            lengths = [max(each) for each in zip(*self.ranks.each(lengths), strict=True)]
        return [self.with_own_sets(kv, length) if own else self.with_one_set(kv)
                for kv, own, length in zip(image_kv, apart, lengths, strict=True)]

    def with_one_set(self, kv: ImageKV) -> ImageKV:
        """Where the tokens are those of all heads. (A compiled step repeats the mask for each head.)"""
        mask, bias = (None if each is None else each[:, :1] for each in (kv.mask, kv.bias))
        return ImageKV(self.all_heads(kv.key), self.all_heads(kv.value), kv.coords, mask, bias)

    def with_own_sets(self, kv: ImageKV, length: int) -> ImageKV:
        """Where every KV head has its own tokens: padded to the longest of all ranks."""
        sets = kv.key.shape[:3]                                                         # B, own G, N
        lack = length - sets[2]
        mask = kv.coords.new_ones(sets, dtype=torch.bool) if kv.mask is None else kv.mask.expand(sets)
        mask = self.all_heads(F.pad(mask, (0, lack)))
        bias = None if kv.bias is None else self.all_heads(F.pad(kv.bias.expand(sets), (0, lack)))
        coords = F.pad(kv.coords.expand(*sets, 4), (0, 0, 0, lack), value=-1)
        key, value = (self.all_heads(F.pad(each, (0, 0, 0, lack))) for each in (kv.key, kv.value))
        return ImageKV(key, value, self.all_heads(coords), None if mask.all() else mask, bias)

    def own(self, own: list[ImageKV], before: list[ImageKV], after: list[ImageKV],
            layer: int = 0) -> list[ImageKV]:
        """This rank's heads of what the method made of all heads on rank 0; `own` where it left a layer as it
        was."""
        kept = self.ranks.first(lambda: [b is a for b, a in zip(before, after, strict=True)])
        shares = []
        for i, same in enumerate(kept):
            if same:
                shares.append(own[i])
                continue
            made = after[i]
            parts = self.ranks.from_first([made.key, made.value, made.coords, made.mask, made.bias])
            self.own_sets[layer + i] = parts[2].shape[1] > 1
            shares.append(ImageKV(*(self.own_heads(part) for part in parts)))
        return shares

    def own_heads(self, tensor: Tensor | None) -> Tensor | None:
        """[B, all heads, ...] -> a copy of [B, own heads, ...]; what all heads share stays."""
        if tensor is None or tensor.shape[1] == 1:
            return tensor
        return self.ranks.part(tensor, 1).clone(memory_format=torch.contiguous_format)

    def tokens_of_first(self, before: ImageTokens, after: ImageTokens) -> ImageTokens:
        """The image tokens that the method left on rank 0."""
        if self.ranks.first(lambda: after is before):
            return before
        names = "features", "coords", "mask", "bias"
        tensors = self.ranks.from_first([getattr(after, name) for name in names])
        return replace(after, **dict(zip(names, tensors, strict=True)))
