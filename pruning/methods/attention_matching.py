"""Attention matching: keep a few keys, and fit their biases and values to how the image is read with all.

    sum over kept j of w_j exp(q·k_j)               ~ sum over all j of exp(q·k_j), the mass    bias: ln w_j
    softmax over kept j of (q·k_j + ln w_j) · u_j   ~ softmax over all j of q·k_j · v_j         value: u_j

for queries q of the prompt and random ones: least squares, first w > 0, then u, per layer and KV head. Which
keys are kept: one after the other, those that the mass which is still missing needs most (matching pursuit).
Zweiger et al., "Fast KV Compaction via Attention Matching", arXiv 2602.16284. Ours: which queries, the ridge.
See docs/PAPERS.md.
"""
import math
from dataclasses import dataclass, replace

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
    random: int = 32
    ridge: float = 1e-3

    name = "attention_matching"
    paper = "Zweiger et al. 2026, arXiv 2602.16284"
    merges = True

    def __post_init__(self):
        super().__post_init__()
        check_least(self, random=0, ridge=1e-6)

    def begin(self, model: LlamaVision):
        self.norms = [layer.cross_attn.q_norm for layer in model.language_model.cross_layers]

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        B, H, _, d = queries.q.shape
        drawn = torch.randn(H, self.random, d, generator=torch.Generator().manual_seed(0)).to(queries.q)
        q = torch.cat((queries.q, self.norms[i](drawn).expand(B, -1, -1, -1)), 2)       # [B, H, t, d]
        last = queries.seen.take_along_dim(queries.seen[..., 1:].argmax(1, keepdim=True), 1)    # [B, 1, 2]
        seen = torch.cat((queries.seen, last.expand(-1, self.random, -1)), 1)           # [B, t, 2]
        self.queries = [*(self.queries if i else []), Queries(q, seen)]
        return image, kv

    def prefilled(self, image_kv: list[ImageKV]) -> list[ImageKV]:
        return [self.match(queries, kv) for queries, kv in zip(self.queries, image_kv, strict=True)]

    def match(self, queries: Queries, kv: ImageKV) -> ImageKV:
        """What remains of a layer; the object itself if that is all of it."""
        real = torch.ones_like(kv.coords[..., 0], dtype=torch.bool) if kv.mask is None else kv.mask
        kept = torch.zeros_like(kv.key[..., 0], dtype=torch.bool)                       # [B, G, N]
        bias = kept.float() if kv.bias is None else kv.bias.expand_as(kept).clone()
        value = kv.value.clone()
        asked = visible_tokens(queries.seen, kv).any(-1)[:, 0]                          # [B, t]
        for b in asked.any(1).nonzero()[:, 0].tolist():
            a = torch.cat([each for _, each in attention_weights(queries, kv, b, asked[b])], 1)
            a = a.double().unflatten(0, (kept.shape[1], -1)).flatten(1, 2)              # [G, t, N]
            which, w = self.choose(a / a.amax(2, keepdim=True), [there[b, 0] for there in each_image(kv)])
            kept[b].scatter_(1, which, True)
            if which.shape[1] < real[b].sum():
                small = a.take_along_dim(which[:, None], 2) * w.mT                      # [G, t, n]
                output = a @ kv.value[b].double().masked_fill(~real[b][..., None], 0)   # [G, t, d]
                u = least_squares(small / small.sum(2, keepdim=True), output, self.ridge)
                bias[b].scatter_add_(1, which, w[..., 0].log().float())
                value[b].scatter_(1, which[..., None].expand_as(u), u.to(value.dtype))
        whole = torch.equal(kept, real.expand_as(kept))
        return kv if whole else replace(kv, value=value, bias=bias).take(kept)

    def choose(self, power: Tensor, images: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The keys that each KV head keeps [G, n], and their weights [G, n, 1]: power [G, t, N] is exp of the
        scores over the greatest of each query; images are [N]."""
        budgets = [int(num_kept(self.keep, there.sum())) for there in images]
        kept = torch.zeros_like(power[:, 0], dtype=torch.bool)
        mass = missing = power.sum(2, keepdim=True)                                     # [G, t, 1]
        for n in range(max(budgets)):
            needed = (power * missing).sum(1)                                           # [G, N]
            for there, budget in zip(images, budgets, strict=True):
                kept |= highest(needed, int(n < budget), there & ~kept)
            which = kept.nonzero()[:, 1].view(len(kept), -1)
            some = power.take_along_dim(which[:, None], 2)                              # [G, t, n]
            w = least_squares(some, mass, self.ridge).clamp(LEAST, MOST)
            missing = mass - some @ w
        return which, w


def least_squares(a: Tensor, b: Tensor, ridge: float) -> Tensor:
    """The x [G, n, d] of least |a x - b|² + ridge |a|² |x|², a [G, t, n] and b [G, t, d]."""
    gram = a.mT @ a                                                                     # [G, n, n]
    gram.diagonal(dim1=1, dim2=2).add_(ridge * a.square().sum((1, 2))[:, None])
    return torch.linalg.solve(gram, a.mT @ b)
