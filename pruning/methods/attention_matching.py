"""Attention matching: keep a few keys, and fit their biases and values to how the image is read with all.

    sum over kept j of w_j exp(q·k_j)               ~ sum over all j of exp(q·k_j), the mass    bias: ln w_j
    softmax over kept j of (q·k_j + ln w_j) · u_j   ~ softmax over all j of q·k_j · v_j         value: u_j

for queries q of the prompt and random ones: least squares, first w >= 0, then u, per layer and KV head.
Which keys are kept: one after the other, what the mass that is still missing needs most (matching pursuit).
Zweiger et al., "Fast KV Compaction via Attention Matching", arXiv 2602.16284. Ours: which queries, the ridge.
See docs/PAPERS.md.
"""
import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from model.image_tokens import ImageKV, ImageTokens, Queries, each_image, visible_tokens
from model.llama_vision import LlamaVision
from pruning.attention import attention_weights
from pruning.options import check_least
from pruning.pruner import Pruner
from pruning.select import highest, num_kept

LEAST, MOST = 1e-12, math.exp(7)            # of a weight w


@dataclass
class AttentionMatching(Pruner):
    """Keeps the keys that the attention mass needs most, with biases and values fitted to queries: those of
    the prompt, and `random` ones in each head."""
    keep: float | int = 0.1
    select: Literal["omp", "attention"] = "omp"
    at_once: int = 1                                        # keys that omp takes before it fits again
    random: int = 64
    ridge: float = 1e-3

    name = "attention_matching"
    paper = "Zweiger et al. 2026, arXiv 2602.16284"
    merges: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        check_least(self, at_once=1, random=0, ridge=1e-6)

    def begin(self, model: LlamaVision):
        self.norms = [layer.cross_attn.q_norm for layer in model.language_model.cross_layers]

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        B, H, _, d = queries.q.shape
        drawn = torch.randn(H, self.random, d, generator=torch.Generator().manual_seed(0)).to(queries.q)
        q = torch.cat((queries.q, self.norms[i](drawn).expand(B, -1, -1, -1)), 2)      # [B, H, t, d]
        latest = queries.seen.take_along_dim(queries.seen[..., 1:].argmax(1, keepdim=True), 1)  # [B, 1, 2]
        seen = torch.cat((queries.seen, latest.expand(-1, self.random, -1)), 1)
        self.queries = [*(self.queries if i else []), Queries(q, seen)]
        return image, kv

    def prefilled(self, image_kv: list[ImageKV]) -> list[ImageKV]:
        return [self.match(queries, kv) for queries, kv in zip(self.queries, image_kv, strict=True)]

    def match(self, queries: Queries, kv: ImageKV) -> ImageKV:
        """What remains of a layer; the object itself if that is all of it."""
        real = torch.ones_like(kv.coords[..., 0], dtype=torch.bool) if kv.mask is None else kv.mask
        kept = torch.zeros_like(kv.key[..., 0], dtype=torch.bool)                       # [B, G, N]
        bias = torch.zeros_like(kv.key[..., 0], dtype=torch.float32)
        value = kv.value.clone()
        asked = visible_tokens(queries.seen, kv).any(-1)[:, 0]                          # [B, T]
        for b in asked.any(1).nonzero()[:, 0].tolist():
            power = torch.cat([each for _, each in attention_weights(queries, kv, b, asked[b], powers)], 1)
            power = power.double().unflatten(0, (kept.shape[1], -1)).flatten(1, 2)      # [G, t, N]
            kept[b] = self.choose(power, [there[b, 0] for there in each_image(kv)])
            if torch.equal(kept[b], real[b].expand_as(kept[b])):
                continue
            which = kept[b].nonzero()[:, 1].view(len(power), -1)                        # [G, n]
            w, u = self.fit(power, which, kv.value[b].double().masked_fill(~real[b][..., None], 0))
            bias[b].scatter_(1, which, w.log().float())
            value[b].scatter_(1, which[..., None].expand_as(u), u.to(value.dtype))
        if torch.equal(kept, real.expand_as(kept)):
            return kv
        return replace(kv, value=value, bias=bias if kv.bias is None else bias + kv.bias).take(kept)

    def choose(self, power: Tensor, images: list[Tensor]) -> Tensor:
        """Which keys each KV head keeps, [G, N] bool: power [G, t, N], and where each image is [N]."""
        budgets = [int(num_kept(self.keep, there.sum())) * bool(there.any()) for there in images]
        kept = torch.zeros_like(power[:, 0], dtype=torch.bool)
        mass = missing = power.sum(2, keepdim=True)                                     # [G, t, 1]
        score = (power / mass).square().sum(1)
        step = self.at_once if self.select == "omp" else max(budgets)
        for done in range(0, max(budgets), step):
            if self.select == "omp":
                score = (power * missing).sum(1)
            for there, budget in zip(images, budgets, strict=True):
                kept |= highest(score, min(step, budget - done), there & ~kept)
            some = power.take_along_dim(kept.nonzero()[:, 1].view(len(kept), 1, -1), 2)
            missing = mass - some @ least_squares(some, mass, self.ridge).clamp(LEAST, MOST)
        return kept

    def fit(self, power: Tensor, which: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [G, n] and values [G, n, d] of the keys `which` [G, n]: value [G, N, d]."""
        mass = power.sum(2, keepdim=True)                                               # [G, t, 1]
        some = power.take_along_dim(which[:, None], 2)                                  # [G, t, n]
        w = least_squares(some, mass, self.ridge).clamp(LEAST, MOST)                    # [G, n, 1]
        attention = some * w.mT / (some @ w)
        return w[..., 0], least_squares(attention, power / mass @ value, self.ridge)


def powers(scores: Tensor) -> Tensor:
    """exp of scores [..., N], over the greatest: this factor is in the mass of the same query too."""
    return (scores - scores.amax(-1, keepdim=True)).exp()


def least_squares(a: Tensor, b: Tensor, ridge: float) -> Tensor:
    """The x [G, n, d] of least |a x - b|² + ridge |a|² |x|², a [G, t, n] and b [G, t, d]."""
    gram = a.mT @ a                                                                     # [G, n, n]
    gram.diagonal(dim1=1, dim2=2).add_(ridge * a.square().sum((1, 2))[:, None])
    return torch.linalg.solve(gram, a.mT @ b)
