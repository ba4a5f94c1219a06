"""Elastic Cache: merge keys and values around anchors, where others drop them.

In every layer the tokens with the most attention are anchors; every other token joins the anchor that is
nearest in the sequence, and a bucket's mean key and mean value take the anchor's place.

Zuyan Liu, Benlin Liu, Jiahui Wang, Yuhao Dong, Guangyi Chen, Yongming Rao, Ranjay Krishna, Jiwen Lu:
"Efficient Inference of Vision Instruction-Following Models with Elastic Cache", ECCV 2024, arXiv 2407.18121.

    I[n] = mean over heads of the sum over rows m of A[m, n]        anchors: the keep · N highest of a layer
    K'[k], V'[k] = means over the bucket B[k], anchor included      of two anchors as near, the lower

The paper's: these formulas; a set for each layer that its heads share; the prompt is read with everything,
and merged afterwards. We follow the paper where its released code (liuzuyan/ElasticCache) differs: that code
takes the output of one argsort for ranks, so that its anchors agree with the highest scores no more than by
chance, and merges tokens one place beside those meant; its published figures may come of that. The code's
`ratio` is the share removed.

Does not carry over: one sequence that is merged while reading and cut at a fixed point while generating.
Image caches do not grow here, so they are merged and that is all. Text rows all see an image at once: a sum
over rows ranks as a mean does. `text_keep` below 1 does both to the text's own caches: causal sums, the first
and the last token protected, merged after prefill, rotary phases and all; then, whenever one entry too many
is held, the one 25 before the end of the merged prompt goes (never the first), or what has moved up to there.

Ours: buckets end at the borders of tiles, where distance in the sequence says nothing, and a tile without an
anchor joins the nearest one of its image; `bucket_scope="sequence"` is nearer to the paper, but images stay
apart there too. `protect_cls` ranks class tokens first, within `keep`. A bucket counts once in a softmax, as
in the paper; `mass_bias` adds ln of its size to its score, of image tokens. `drop` keeps anchors as they are
and lets the others go: the paper's comparison with eviction. Its other comparisons (clusters, sets for each
head, other points to cut at) are not built. Not verified: no figures for this architecture are published.
"""
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from model.image_tokens import ImageKV, Queries
from pruning.attention import attention_received
from pruning.pruner import SelectPerLayer


@dataclass
class ElasticCache(SelectPerLayer):
    """Keeps what a layer's heads attend to most, each token merged with those around it."""
    keep: float | int = 0.5
    protect_cls: bool = False
    bucket_scope: Literal["tile", "sequence"] = "tile"
    mass_bias: bool = False
    drop: bool = False

    name, paper = "elastic_cache", "Liu et al. 2024, arXiv 2407.18121"

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
        size = bucket_sums(torch.ones_like(kv.key[:, :1, :, :1]), owner, real).clamp(min=1)
        key = (bucket_sums(kv.key, owner, real) / size).to(kv.key.dtype)
        value = (bucket_sums(kv.value, owner, real) / size).to(kv.value.dtype)
        bias = size[..., 0].log() if self.mass_bias else None
        return replace(kv, key=key, value=value, bias=bias).take(kept)


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


def bucket_sums(t: Tensor, owner: Tensor, real: Tensor) -> Tensor:
    """The sums of what is t [B, G, N, d] at the real tokens [B, 1, N] of each owner [B, N], where that is; in
    fp32."""
    each = t.float().masked_fill(~real[..., None], 0)               # not times 0: it may hold NaN
    return torch.zeros_like(each).scatter_add_(2, owner[:, None, :, None].expand_as(each), each)
