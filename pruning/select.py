"""How a number of image tokens is shared out over sets of unlike size: over layers, or key/value heads.

For methods that keep more in some layers than in others; and what they may go by. Numbers are rounded once,
over all sets together, so that their sum is exact; `pruning.pruner` has the rule for sets of equal size.
B batch, N image tokens, C layers.
"""
import math

import torch
from torch import Tensor

from pruning.pruner import num_kept

FAINTEST = 1e-6         # of the greatest weight: even a weight of 0 gets something once all others are full
HALVINGS = 200          # enough to fix a double
FLAT = 1e-6             # of their mean: scores that differ by less are equal but for rounding


def budget(keep: float | int, tokens: Tensor, sets: int) -> Tensor:
    """How many tokens all sets may keep together, each out of `tokens` (int64): a fraction of them all,
    rounded half up once, or a whole number a set on average; at least one a set."""
    total = num_kept(keep, sets * tokens) if isinstance(keep, float) else sets * num_kept(keep, tokens)
    return total.clamp(min=sets).minimum(sets * tokens)


def allocate(weights: list[float], total: int, cap: int) -> list[int]:
    """Share `total` out in proportion to `weights`, from 1 to `cap` to each; the parts add up to it.

    What a full part cannot take goes to the others, still in proportion. Of what rounding down leaves, one
    goes to each of the largest remainders; of equal ones the first win. A total below 1 or above `cap` for
    each counts as that; equal weights where all are 0.
    """
    parts, greatest = len(weights), max(weights)
    total = min(max(total, parts), cap * parts)
    shares = [max(weight / greatest, FAINTEST) for weight in weights] if greatest > 0 else [1.0] * parts

    def quotas(level: float) -> list[float]:
        return [min(max(level * share, 1.0), float(cap)) for share in shares]

    low, high = 0.0, cap / min(shares)                          # at which every part is full
    for _ in range(HALVINGS):
        level = (low + high) / 2
        low, high = (level, high) if sum(quotas(level)) < total else (low, level)
    exact = [round(quota, 6) for quota in quotas(high)]         # equal remainders are to be found equal
    floors = [math.floor(quota) for quota in exact]
    remainders = sorted(range(parts), key=lambda part: round(floors[part] - exact[part], 6))
    for part in remainders[:total - sum(floors)]:
        floors[part] += 1
    return floors


def allocated(weights: Tensor, keep: float | int, tokens: Tensor) -> Tensor:
    """How many of its `tokens` [B] each layer keeps, by the `weights` of the layers [B, C]: [B, C]."""
    totals = budget(keep, tokens, weights.shape[1])
    rows = zip(weights.tolist(), totals.tolist(), tokens.tolist(), strict=True)
    return torch.tensor([allocate(*row) for row in rows], device=tokens.device)


def highest(scores: Tensor, n: Tensor | int, there: Tensor) -> Tensor:
    """The `n` [..., 1] highest `scores` [..., N] of those that are `there`, bool; of equal ones the first."""
    order = scores.masked_fill(~there, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return there & (order.argsort(dim=-1) < n)


# ----- what they go by


def normalised(statistic: Tensor) -> Tensor:
    """[B, C] divided by its mean over the layers; 1 where that is 0."""
    mean = statistic.mean(1, keepdim=True)
    return torch.where(mean > 0, statistic / mean, 1.0)


def skewness(scores: Tensor, there: Tensor) -> Tensor:
    """How far a few stand out of the scores that are `there` [B, N], by the adjusted Fisher-Pearson formula:
    [B] fp64; 0 for fewer than three or equal ones."""
    n = there.sum(1, keepdim=True).double()
    values = scores.double().masked_fill(~there, 0)
    mean = values.sum(1, keepdim=True) / n.clamp(min=1)
    off = (values - mean).masked_fill(~there, 0)
    deviation = (off.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
    skew = (off / deviation).pow(3).sum(1, keepdim=True) * n / ((n - 1) * (n - 2))
    return skew.masked_fill((n < 3) | (deviation <= FLAT * mean.abs()), 0)[:, 0]


def missing(mass: Tensor) -> Tensor:
    """The share of all mass [..., N] that its p highest lack, for p = 0 ... N - 1, in fp64.

    Summed from the smallest on: a thin tail does not drown in rounding.
    """
    rest = mass.double().sort(dim=-1).values.cumsum(-1).flip(-1)
    return rest / rest[..., :1].clamp(min=torch.finfo(rest.dtype).tiny)
