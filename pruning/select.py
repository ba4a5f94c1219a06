"""Which tokens to keep, and how many: one rule of rounding, ties and budgets for all methods.

`top_k_mask` keeps the same share of every image in every set. For methods that keep more in some layers or
key/value heads than in others, the second half shares a number of tokens out over sets of unlike size: it is
rounded once, over all sets together, so that the sum is exact.
B batch, N image tokens, K = 1 or G sets of tokens, C layers.
"""
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from model.image_tokens import ImageKV, ImageTokens, each_image

FAINTEST = 1e-6         # of the greatest weight: even a weight of 0 gets something once all others are full
HALVINGS = 200          # enough to fix a double
FLAT = 1e-6             # of their mean: scores that differ by less are equal but for rounding


def num_kept(keep: float | int, tokens: Tensor) -> Tensor:
    """How many of `tokens` (int64) to keep: a fraction rounded half up, or a number, but at least one."""
    if isinstance(keep, float):
        exact = (keep * tokens.double()).mul(1e6).round().div(1e6)      # 0.1 * 15 is 1.5, not a little more
        return exact.add(0.5).floor().long().clamp(min=1)
    return tokens.clamp(1, keep)


def top_k_mask(scores: Tensor, keep: float | int, tokens: ImageTokens | ImageKV) -> Tensor:
    """The highest scores of every image, as many as `keep` says: [B, N] or [B, K, N] -> the same, bool.

    Of equal scores the first win. Padding is never among them. Raises ValueError if a score is NaN.
    """
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for there in each_image(tokens):
        if there.ndim < scores.ndim:
            there = there[:, None]
        elif there.ndim > scores.ndim:
            there = there[:, 0]
        n = num_kept(keep, there.sum(-1, keepdim=True))                                 # [B, 1] or [B, K, 1]
        ours = scores.masked_fill(~there, -math.inf)
        refuse_nan(ours)
        least = ours.topk(int(n.max()), dim=-1).values.take_along_dim(n - 1, -1)        # the n-th highest
        above = ours > least
        equal = ours == least
        room = n - above.sum(-1, keepdim=True)
        kept |= there & (above | (equal & (equal.cumsum(-1) <= room)))
    return kept


def single_images(tokens: ImageTokens | ImageKV) -> Iterator[tuple[int, Tensor]]:
    """For one image of one sequence after the other: the sequence, and the indices of the image's tokens [n];
    of several sets those in the first."""
    for there in each_image(tokens):
        there = there if there.ndim == 2 else there[:, 0]                               # [B, N]
        for b in there.any(-1).nonzero()[:, 0].tolist():
            yield b, there[b].nonzero()[:, 0]


def each_budget(image: ImageTokens, keep: float | int) -> Iterator[tuple[int, Tensor, int]]:
    """The same, and how many of the tokens to keep."""
    for b, tokens in single_images(image):
        yield b, tokens, int(num_kept(keep, torch.tensor(len(tokens))))


def evenly_spaced(rank: Tensor, n: Tensor | int, tokens: Tensor | int) -> Tensor:
    """Whether the tokens of these ranks, from 0, are among the n of `tokens` that are spaced most evenly."""
    return rank * n % tokens < n


def refuse_nan(scores: Tensor):
    """Raise ValueError if a score is NaN, as when attention overflows: no ranking would mean anything."""
    if scores.isnan().any():
        raise ValueError("the scores of the image tokens are not finite: fp16 overflows where bf16 and fp32 "
                         "do not (choose another dtype), or the weights hold NaN or infinity")


def random_scores(seed: int, prompts: list[list[int]], image: ImageTokens) -> Tensor:
    """A random number for each token, [B, N]: others for every prompt and `seed`, the same ones alone and
    in a batch."""
    generators = [torch.Generator().manual_seed(hash((seed, *ids))) for ids in prompts]
    numbers = [torch.rand(image.coords.shape[1], generator=generator) for generator in generators]
    return torch.stack(numbers).to(image.coords.device)


# ----- budgets that are shared out


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
    parts = len(weights)
    greatest = max(weights)
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
    sequences = zip(weights.tolist(), totals.tolist(), tokens.tolist(), strict=True)
    return torch.tensor([allocate(*each) for each in sequences], device=tokens.device)


def highest(scores: Tensor, n: Tensor | int, there: Tensor) -> Tensor:
    """The `n` [..., 1] highest `scores` [..., N] of those that are `there`, bool; of equal ones the first.

    Raises ValueError if a score is NaN.
    """
    ours = scores.masked_fill(~there, -torch.inf)
    refuse_nan(ours)
    order = ours.argsort(dim=-1, descending=True, stable=True)
    return there & (order.argsort(dim=-1) < n)


# ----- statistics that budgets are shared out by


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
