"""Elastic Cache: merge keys and values around anchors instead of dropping them.

    I[j]   = mean over heads of the sum over query positions t of A[h, t, j]    anchors: the top keep · N by I
    K', V' = means over the bucket of an anchor, which has the tokens nearest to it

Liu et al., "Efficient Inference of Vision Instruction-Following Models with Elastic Cache", ECCV 2024, arXiv
2407.18121. Ours: buckets end at the borders of tiles, `protect_cls`, `mass_bias`. Image caches do not grow,
so cutting them while text is generated cannot carry over.
See docs/PAPERS.md.
"""
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.image_tokens import ImageKV, Queries
from pruning.attention import attention_received
from pruning.merge import merge_kv
from pruning.pruner import SelectPerLayer


@dataclass
class ElasticCache(SelectPerLayer):
    """Keeps what a layer's heads attend to most, each token merged with those around it."""
    keep: float | int = 0.5
    protect_cls: bool = False
    bucket_scope: Literal["tile", "sequence"] = "tile"
    mass_bias: bool = False
    drop: bool = False

    name = "elastic_cache"
    paper = "Liu et al. 2024, arXiv 2407.18121"

    @property
    def merges(self) -> bool:
        return not self.drop

    def score(self, queries: Queries, kv: ImageKV) -> Tensor:
        received = attention_received(queries, kv, per="layer")[:, None]                # [B, 1, N]
        return received.masked_fill(kv.coords[..., 2] == -1, torch.inf) if self.protect_cls else received

    def cut(self, kv: ImageKV, kept: Tensor) -> ImageKV:
        real = torch.ones_like(kept) if kv.mask is None else kv.mask                    # [B, 1, N]
        if self.drop or torch.equal(kept, real):                    # then not even a bit changes
            return kv.take(kept)
        owner = nearest(kept[:, 0], kv.coords[:, 0, :, :2 if self.bucket_scope == "tile" else 1])
        return merge_kv(kv, owner, bias=self.mass_bias)


def nearest(anchors: Tensor, coords: Tensor) -> Tensor:
    """The anchor nearest to each token, the lower of two [B, N]: of its own coords [B, N, p] if there is one
    there, else of the largest part that it shares. Tokens of one coords stand side by side."""
    N = anchors.shape[1]
    at = torch.arange(N, device=anchors.device).expand_as(anchors)
    before = torch.where(anchors, at, 0).cummax(1).values
    behind = torch.where(anchors, at, N - 1).flip(1).cummin(1).values.flip(1)
    far = [(coords != coords.take_along_dim(side[..., None], 1)).cumsum(-1).sum(-1) * N + (at - side).abs()
           + 9 * N * ~anchors.gather(1, side) for side in (before, behind)]
    return torch.where(far[0] <= far[1], before, behind)
