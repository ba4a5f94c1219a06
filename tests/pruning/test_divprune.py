"""DivPrune against its rule (arXiv 2503.02175 and its code), in plain loops and float64.

What every method promises, that dropping is masking above all, is in test_pruners.py.
"""
import math
from unittest.mock import patch

import pytest
import torch
from helpers import CROSS, SHARES, WIDTH, I, batch_of, close, kept, noise, random_image, small_network
from loops import half_up, projected_tokens
from reference import forced, masked
from torch import Tensor

from pruning.methods import divprune
from pruning.methods.divprune import DivPrune, farthest_apart, nearest_other

PROMPT = [5, 6, I, 7, 8, 9]
SEEDS = range(3)


def distance(a: list[float], b: list[float]) -> float:
    return 1 - sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def by_hand(features: Tensor, n: int) -> list[int]:
    """First the token whose nearest other is farthest, then whichever is farthest from all before."""
    tokens = features.double().tolist()
    apart = [[distance(a, b) for b in tokens] for a in tokens]
    chosen = []
    while len(chosen) < n:
        others = [i for i in range(len(tokens)) if i not in chosen]
        nearest = {i: min(apart[i][j] for j in chosen or others if j != i) for i in others}
        chosen.append(max(others, key=lambda i: (nearest[i], -i)))
    return sorted(chosen)


def take(features: Tensor, n: int) -> list[int]:
    return farthest_apart(features, n).nonzero()[:, 0].tolist()


# ----- the rule


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tokens", [3, 9, 30])
def test_the_rule(seed, tokens):
    features = noise(tokens, 6, seed=seed)
    for n in {1, 2, tokens // 2, tokens - 1, tokens}:
        assert take(features, n) == by_hand(features, n)


def test_a_circle():
    """Directions in degrees. 100 has nobody near, 0 is farthest from it, then 20; 10 lies between."""
    angles = torch.tensor([10.0, 20.0, 0.0, 100.0]).deg2rad()
    features = torch.stack((angles.cos(), angles.sin()), dim=-1)
    assert [take(features, n) for n in (1, 2, 3, 4)] == [[3], [2, 3], [1, 2, 3], [0, 1, 2, 3]]


def test_lengths_do_not_count():
    features = noise(20, 5, seed=1)
    scaled = features * 2.0 ** torch.arange(-10, 10)[:, None]
    assert take(scaled, 8) == take(features, 8)


def test_of_equal_tokens_the_first_win():
    """Directions 0 0 1 1 2: the last has no double, so it comes first; doubles come when nothing is left."""
    features = torch.eye(3)[[0, 0, 1, 1, 2]]
    assert [take(features, n) for n in (1, 2, 3, 4)] == [[4], [0, 4], [0, 2, 4], [0, 1, 2, 4]]
    assert take(torch.ones(4, 1), 2) == [0, 1] and take(torch.ones(1, 3), 1) == [0]


@pytest.mark.parametrize("rows", [1, 3, 7, 50])
def test_distances_are_made_a_few_rows_at_a_time(rows):
    unit = torch.nn.functional.normalize(noise(11, 4), dim=-1)
    expected = torch.tensor([min(distance(a, b) for b in unit.tolist() if b != a) for a in unit.tolist()])
    with patch.object(divprune, "CHUNK_BYTES", rows * 11 * 4):
        close(nearest_other(unit), expected)


# ----- in the model


@pytest.mark.parametrize("seed", SEEDS)
def test_every_layer_reads_what_is_kept(seed):
    """By default in prefill too: only the first layer makes keys of all tokens, to choose from."""
    network, image = small_network(seed, SHARES[seed], CROSS[seed]), random_image(14, seed=seed)
    pruner = DivPrune(0.3)
    run, sizes = projected_tokens(network, lambda: forced(network, [PROMPT], image, pruner, steps=3))
    expected = by_hand(image.features[0], 4)
    assert all(kept(kv, image) == expected for kvs in (run.read, *run.held) for kv in kvs)
    assert sizes == [14, 14] + [4, 4] * (CROSS[seed] - 1)
    close(run.logits, masked(network, run, [PROMPT], image))


@pytest.mark.parametrize("options", [{"full_layers": 1}, {"when": "boundary"},
                                     {"full_layers": 1, "when": "boundary", "early_caches": "full"}], ids=str)
def test_the_same_tokens_wherever_it_acts(options):
    network, image = small_network(1), random_image(14, seed=5)
    run = forced(network, [PROMPT], image, DivPrune(0.5, **options))
    expected = by_hand(image.features[0], 7)
    first = list(range(14)) if "early_caches" in options else expected
    assert [kept(kv, image) for kv in run.held[-1]] == [first, expected]
    whole = 2 if "when" in options else 1
    assert [len(kept(kv, image)) for kv in run.read] == [14] * whole + [7] * (2 - whole)


def test_each_image_of_each_sequence_for_itself():
    """Images of other sizes side by side, padding between: each keeps what it keeps alone."""
    network = small_network(0)
    parts = random_image(8, 11, seed=2), None, random_image(17, seed=3)
    prompts = [[5, I, 6, I, 7], [5, 6, 7], [I, 8, 9]]
    run = forced(network, prompts, batch_of(*parts), DivPrune(0.4))
    for b, sizes in (0, (8, 11)), (2, (17,)):
        expected, start = [], 0
        for size in sizes:
            own = parts[b].features[0, start:start + size]
            expected += [start + i for i in by_hand(own, half_up(0.4, size))]
            start += size
        assert kept(run.read[0], batch_of(*parts), b) == expected


@pytest.mark.parametrize("prompt", [[I, 5], [9, I, 30, 31, 32, 33]])
def test_the_question_has_no_say(prompt):
    network, image = small_network(2), random_image(20, seed=7)
    first, other = (forced(network, [ids], image, DivPrune(0.25)) for ids in (PROMPT, prompt))
    assert kept(first.read[0], image) == kept(other.read[0], image)
    assert image.features.shape == (1, 20, WIDTH)
