"""DivPrune: keep the image tokens that are farthest from each other, whatever the question is.

    first = the token i with the greatest min over j != i of d(i, j)         d(i, j) = 1 - cos(f_i, f_j)
    next  = the token i with the greatest min over kept j of d(i, j)         until keep · N are kept

Alvar et al., "DivPrune", CVPR 2025, arXiv 2503.02175, read in its code. f are the projector's features.
Ours: distances in fp32, and where the choice acts.
See docs/PAPERS.md.
"""
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model.image_tokens import ImageKV, ImageTokens, Queries
from pruning.attention import CHUNK_BYTES
from pruning.pruner import SelectOnce
from pruning.select import each_budget, refuse_nan


@dataclass
class DivPrune(SelectOnce):
    """Keeps the tokens that are most unlike each other."""
    full_layers: int = 0
    paper = "Alvar et al. 2025, arXiv 2503.02175"

    def choose(self, queries: Queries, image: ImageTokens, kv: ImageKV) -> Tensor:
        kept = torch.zeros_like(image.coords[..., 0], dtype=torch.bool)
        for b, tokens, n in each_budget(image, self.keep):
            kept[b, tokens] = farthest_apart(image.features[b, tokens], n)
        return kept


def farthest_apart(features: Tensor, n: int) -> Tensor:
    """Which n tokens the greedy rule takes, [N] bool, from features [N, D]."""
    unit = F.normalize(features.float(), dim=-1)                                        # [N, D]
    nearest = nearest_other(unit)                                                       # [N]
    refuse_nan(nearest)
    kept = torch.zeros_like(nearest, dtype=torch.bool)
    for step in range(n):
        new = nearest.masked_fill(kept, -torch.inf).argmax(keepdim=True)                # [1]
        kept[new] = True
        distance = 1 - unit @ unit[new][0]                                              # [N]
        nearest = nearest.minimum(distance) if step else distance
    return kept


def nearest_other(unit: Tensor) -> Tensor:
    """How far each token's nearest other one is, [N], from features [N, D] of length 1. Only a few rows of
    the distances [N, N] are made at a time."""
    N = len(unit)
    nearest = []
    for rows in torch.arange(N, device=unit.device).split(max(1, CHUNK_BYTES // (4 * N))):
        distance = 1 - unit[rows] @ unit.T                                              # [r, N]
        distance[torch.arange(len(rows)), rows] = torch.inf
        nearest.append(distance.amin(-1))
    return torch.cat(nearest)
