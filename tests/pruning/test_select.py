"""Which tokens are kept and how many: the highest scores, budgets, and the statistics that share them out."""
import math
import random

import pytest
import torch
from helpers import random_image, refused
from loops import skewness_by_hand

from model.image_tokens import ImageKV, ImageTokens
from pruning.select import (
    allocate,
    allocated,
    budget,
    each_budget,
    highest,
    missing,
    normalised,
    num_kept,
    random_scores,
    skewness,
    top_k_mask,
)

# ----- the highest, and how many


def image_of(which: list[int]) -> ImageTokens:
    which = torch.tensor([which])
    return ImageTokens(which[..., None].float(), which[..., None].expand(-1, -1, 4), which >= 0)


@pytest.mark.parametrize("scores, keep, which, kept", [
    ([0.3, 0.5, 0.3, 0.3], 2, [0, 0, 0, 0], [0, 1]),                        # ties: the first
    ([0.0] * 5, 3, [0] * 5, [0, 1, 2]),
    ([0.1, 0.2, 0.3, 0.4], 0.5, [0] * 4, [2, 3]),
    ([0.1, 0.2, 0.3, 0.4], 0.625, [0] * 4, [1, 2, 3]),                      # 2.5: half up
    ([0.1, 0.2, 0.3, 0.4], 0.01, [0] * 4, [3]),                             # at least one
    ([0.1, 0.2, 0.3, 0.4], 99, [0] * 4, [0, 1, 2, 3]),
    ([9.0, 8.0, 0.1, 0.2], 1, [0, 0, 1, 1], [0, 3]),                        # of every image
    ([9.0, 8.0, 7.0, 0.1, 0.2], 0.5, [0, 0, 0, 1, 1], [0, 1, 4]),
    ([0.1, 0.2, 9.0, 9.0], 2, [0, 0, -1, -1], [0, 1]),                      # never padding
    ([0.1, 0.2, 0.3, 9.0], 0.5, [0, 0, 0, -1], [1, 2])])
def test_top_k_mask(scores, keep, which, kept):
    """The same for scores [B, N] and [B, K, N], for ImageTokens and for an ImageKV."""
    image, scores = image_of(which), torch.tensor([scores])
    nothing = torch.zeros(1, 2, len(which), 1)
    kv = ImageKV(nothing, nothing, image.coords[:, None], image.mask[:, None])
    for tokens in image, kv:
        assert top_k_mask(scores, keep, tokens)[0].nonzero()[:, 0].tolist() == kept
        for head in top_k_mask(scores[:, None].expand(-1, 3, -1), keep, tokens)[0]:
            assert head.nonzero()[:, 0].tolist() == kept


@pytest.mark.parametrize("keep, tokens, expected", [
    (0.5, 1601, 801), (0.1, 1601, 160), (0.01, 1601, 16), (0.25, 1601, 400), (0.2, 1601, 320),
    (0.15, 1601, 240), (0.05, 1601, 80), (0.25, 6404, 1601), (0.2, 6404, 1281), (0.15, 6404, 961),
    (0.1, 6404, 640), (0.05, 6404, 320), (1.0, 1601, 1601), (1e-9, 1601, 1), (0.15, 10, 2), (0.35, 10, 4),
    (0.29, 50, 15), (0.07, 50, 4), (0.145, 100, 15), (300, 1601, 300), (1601, 1601, 1601), (9999, 1601, 1601),
    (1, 1601, 1)])
def test_num_kept(keep, tokens, expected):
    """Half up, also where the fraction in floating point lies a little below."""
    assert num_kept(keep, torch.tensor([tokens, tokens])).tolist() == [expected] * 2


def test_each_budget():
    """Images 0 and 1 with padding between them, no image, and one image: each that is there has its own."""
    parts = [image_of([1, 0, 0, -1, 1, 0]), image_of([-1] * 6), image_of([1, 1, -1, -1, -1, -1])]
    image = ImageTokens(*(torch.cat([getattr(part, name) for part in parts])
                          for name in ("features", "coords", "mask")))
    found = [(b, tokens.tolist(), n) for b, tokens, n in each_budget(image, 0.5)]
    assert found == [(0, [1, 2, 5], 2), (0, [0, 4], 1), (2, [0, 1], 1)]
    assert [n for _, _, n in each_budget(image, 2)] == [2, 2, 2]


def test_scores_that_are_not_numbers_are_refused():
    """By every ranking; not where they are padding."""
    scores, image = torch.tensor([[0.1, math.nan, 0.3, 0.2]]), image_of([0, 0, 0, -1])
    for ranking in (lambda: top_k_mask(scores, 2, image), lambda: highest(scores, 2, image.mask)):
        with refused("scores of the image tokens are not finite"):
            ranking()
    padded = torch.tensor([[0.1, 0.4, 0.3, math.nan]])
    assert top_k_mask(padded, 2, image).tolist() == [[False, True, True, False]]
    assert highest(padded, 2, image.mask).tolist() == [[False, True, True, False]]


def test_random_scores():
    """By the seed and the prompt, the same alone and in a batch."""
    image = random_image(30)
    both = random_scores(3, [[5, 6], [5, 7]], image.expand(2))
    assert both.shape == (2, 30) and not torch.equal(both[0], both[1])
    assert torch.equal(random_scores(3, [[5, 7]], image)[0], both[1])
    assert not torch.equal(random_scores(4, [[5, 6]], image)[0], both[0])


# ----- budgets that are shared out


def test_examples_of_shares():
    strength, skew = normalised(torch.tensor([[1.0, 3.0]])), normalised(torch.tensor([[2.0, 2.0]]))
    weights = (strength + skew) / 2
    assert weights.mul(0.1).tolist()[0] == pytest.approx([0.075, 0.125])
    for keep, tokens, counts in (0.1, 1601, [120, 200]), (0.9, 10, [8, 10]), (1.0, 10, [10, 10]):
        assert allocated(weights, keep, torch.tensor([tokens])).tolist() == [counts]
    assert allocate([2.6, 2.7, 2.7], 8, 9) == [2, 3, 3] and allocate([2.5, 2.5, 3.0], 8, 9) == [3, 2, 3]
    assert allocate([0.0, 0.0], 5, 9) == [3, 2] and allocate([1.0, 0.0, 0.0], 12, 6) == [6, 3, 3]
    assert allocate([100.0, 1.0], 9, 10) == [8, 1] and allocate([1.0, 2.0], 1, 10) == [1, 1]
    assert allocate([1.0, 2.0], 30, 10) == [10, 10] and allocate([1.0, 2.0], 4, 0) == [0, 0]


@pytest.mark.parametrize("seed", range(40))
def test_water_filling(seed):
    """One level says what every layer gets, to within the rounding; and the sum is exact."""
    chance = random.Random(seed)
    layers, cap = chance.randint(1, 9), chance.choice([1, 3, 20, 1601])
    weights = [chance.random() ** 4 + 1e-3 for _ in range(layers)]
    total = chance.randint(layers, layers * cap)
    counts = allocate(weights, total, cap)
    assert sum(counts) == total and all(1 <= n <= cap for n in counts)
    least = [(n - 1) / w for n, w in zip(counts, weights, strict=True) if n > 1]
    most = [(n + 1) / w for n, w in zip(counts, weights, strict=True) if n < cap]
    assert max(least, default=0) < min(most, default=math.inf)
    ranked = sorted(zip(weights, counts, strict=True))
    assert [n for _, n in ranked] == sorted(counts)                 # never fewer for a greater weight


def test_budgets():
    tokens = torch.tensor([10, 1, 0, 1601])
    assert budget(0.25, tokens, 3).tolist() == [8, 3, 0, 1201]      # 7.5, 1200.75; one for each
    assert budget(4, tokens, 3).tolist() == [12, 3, 0, 12]
    scores, there = torch.tensor([[0.3, 0.5, 0.3, 0.3, 0.9]]), torch.tensor([[True] * 4 + [False]])
    assert highest(scores, torch.tensor([[2]]), there).tolist() == [[True, True, False, False, False]]
    assert not highest(scores, 0, there).any() and highest(scores, 9, there).equal(there)


# ----- statistics


def test_skewness():
    everywhere = torch.ones(4, dtype=torch.bool)
    for values, skew in ([0.1, 0.1, 0.1, 0.7], 2.0), ([0.1, 0.2, 0.3, 0.4], 0.0), ([0.25] * 4, 0.0):
        assert skewness(torch.tensor([values]), everywhere[None]).item() == pytest.approx(skew, abs=1e-6)
    few = torch.tensor([[True, True, False, False]])
    assert skewness(torch.tensor([[0.1, 0.9, 0.5, 0.5]]), few).item() == 0
    chance, scores = random.Random(0), torch.full((20, 30), math.nan)
    there = torch.zeros(20, 30, dtype=torch.bool)
    for b in range(20):
        there[b, chance.sample(range(30), chance.randint(3, 30))] = True
        scores[b, there[b]] = torch.rand(int(there[b].sum()))
    slow = [skewness_by_hand(own[real].tolist()) for own, real in zip(scores.double(), there, strict=True)]
    torch.testing.assert_close(skewness(scores, there), torch.tensor(slow, dtype=torch.double))


def test_what_the_highest_lack():
    """Of a mass of 10: 4, 3, 2, 1."""
    lacking = missing(torch.tensor([[1.0, 4.0, 2.0, 3.0], [0.0] * 4]))
    assert lacking.dtype == torch.double
    torch.testing.assert_close(lacking[0], torch.tensor([1.0, 0.6, 0.3, 0.1]).double())
    assert lacking[1].tolist() == [0.0] * 4
