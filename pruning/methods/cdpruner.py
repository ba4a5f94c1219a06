"""CDPruner: keep image tokens that matter to the question and are unlike each other.

    L[i, j] = w_i · cos(f_i, f_j) · w_j            kept: keep · N tokens S, greedily for the greatest det L[S]
    w_i     = exp(theta / (2 - 2 theta) · r_i)     r_i: mean over prompt positions t of cos(f_i, x_t), 0 to 1

Zhang et al., NeurIPS 2025, arXiv 2506.10967, read in its code; greedy as in Chen et al., arXiv 1709.05135.
f are the projector's features. Ours: x, the states that enter the layer, for there is no text tower of CLIP.
See docs/PAPERS.md.
"""
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from model.image_tokens import ImageKV, ImageTokens, Queries
from pruning.attention import attention_received
from pruning.pruner import SelectOnce
from pruning.select import each_budget, refuse_nan

LEAST = 1e-6        # of a relevance, and of a squared length: what is less is rounding


@dataclass
class CDPruner(SelectOnce):
    """Keeps tokens that are relevant and unlike each other.

    `relevance` says what makes a token relevant, and `theta`, below 1, how much that counts: with 0 nothing,
    with none w_i is r_i, as in the paper.
    """
    full_layers: int = 0
    relevance: Literal["similarity", "attention"] = "similarity"
    theta: float | None = 0.5
    paper = "Zhang et al. 2025, arXiv 2506.10967"

    def __post_init__(self):
        super().__post_init__()
        if self.theta is not None and not 0 <= self.theta < 1:
            raise ValueError(f"{self.name}: theta is {self.theta}, but must be 0 to below 1, or none")

    def choose(self, queries: Queries, image: ImageTokens, kv: ImageKV) -> Tensor:
        kept = torch.zeros_like(image.coords[..., 0], dtype=torch.bool)
        if self.relevance == "attention":
            received = attention_received(queries, kv, per="layer")                     # [B, N]
        for b, tokens, n in each_budget(image, self.keep):
            unit = F.normalize(image.features[b, tokens].float(), dim=-1)               # [tokens, D]
            if self.relevance == "attention":
                relevance = received[b, tokens]                                         # [tokens]
            else:
                relevance = unit @ direction(queries, b, image.coords[b, tokens[:1], 0])
            kept[b, tokens] = most_volume(unit, weights(relevance, self.theta), n)
        return kept


def direction(queries: Queries, b: int, image: Tensor) -> Tensor:
    """The sum [D] of the states, each of length 1, of the positions of sequence b that see this image [1]."""
    first, stop = queries.seen[b].unbind(-1)                                            # [T]
    sees = (first <= image) & (image < stop)
    return F.normalize(queries.x[b, sees].float(), dim=-1).sum(0)


def weights(relevance: Tensor, theta: float | None) -> Tensor:
    """w [N], up to a factor, of the relevance [N], which is stretched to 0 to 1; all 1 if it is equal."""
    refuse_nan(relevance)
    above = relevance - relevance.min()
    stretched = above / above.max() if above.any() else torch.ones_like(above)
    return stretched + LEAST if theta is None else (theta / (2 - 2 * theta) * (stretched - 1)).exp()


def most_volume(unit: Tensor, weight: Tensor, n: int) -> Tensor:
    """Which n tokens the greedy rule takes, [N] bool, from features [N, D] of length 1.

    A token makes the determinant weight² · left times as large, where `left` is the squared distance of its
    feature from the span of those kept: 1 less the squares of its column in the rows of a Cholesky factor.
    Where nothing is left, the weight [N] decides alone.
    """
    left = torch.ones_like(weight)                                                      # [N]
    rows = unit.new_zeros(n, len(unit))
    kept = torch.zeros_like(weight, dtype=torch.bool)
    for step in range(n):
        gain = weight.square() * left.clamp(min=LEAST)
        new = gain.masked_fill(kept, -torch.inf).argmax(keepdim=True)                   # [1]
        kept[new] = True
        explained = rows[:step, new][:, 0] @ rows[:step]                                # [N]
        rows[step] = (unit @ unit[new][0] - explained) / left[new].clamp(min=LEAST).sqrt()
        left = left - rows[step].square()
    return kept
