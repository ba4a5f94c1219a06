"""CDPruner against its rule (arXiv 2506.10967 and its code): determinants in plain loops and float64.

What every method promises, that dropping is masking above all, is in test_pruners.py.
"""
import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from helpers import (
    CROSS,
    SHARES,
    I,
    attention_of,
    batch_of,
    close,
    kept,
    noise,
    random_image,
    refused,
    small_network,
)
from loops import best, half_up, received_by_hand, watched
from reference import Run, forced, masked
from torch import Tensor

from model.image_tokens import ImageTokens, Queries
from model.llama_vision import LlamaVision
from pruning import Pruner
from pruning.methods.cdpruner import CDPruner, most_volume, weights

PROMPT = [5, 6, I, 7, 8, 9]
SEES = range(2, 6)                      # the positions of PROMPT that see the image
SEEDS = range(3)


def by_hand(features: Tensor, weight: list[float], n: int) -> list[int]:
    """Each token is the one that makes the determinant of the kernel of those taken the greatest."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    w = torch.tensor(weight, dtype=torch.float64)
    kernel = w[:, None] * (unit @ unit.T).fill_diagonal_(1) * w
    chosen = []
    while len(chosen) < n:
        volume = {}
        for i in range(len(w)):
            if i not in chosen:
                which = torch.tensor([*chosen, i])
                volume[i] = float(torch.linalg.det(kernel[which][:, which]))
        chosen.append(max(volume, key=lambda i: (volume[i], -i)))
    return sorted(chosen)


def weights_by_hand(values: list[float], theta: float | None = 0.5) -> list[float]:
    low, high = min(values), max(values)
    stretched = [(value - low) / (high - low) for value in values]
    if theta is None:
        return [r + 1e-6 for r in stretched]
    return [math.exp(theta / (2 * (1 - theta)) * r) for r in stretched]


def take(features: Tensor, relevance: Tensor, n: int) -> list[int]:
    unit = torch.nn.functional.normalize(features, dim=-1)
    return most_volume(unit, relevance, n).nonzero()[:, 0].tolist()


# ----- the rule


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tokens", [2, 9, 24])
def test_the_rule(seed, tokens):
    features, relevance = noise(tokens, 26, seed=seed), noise(tokens, seed=seed + 50).abs()
    for n in {1, 2, tokens // 2, tokens - 1}:
        assert take(features, relevance, n) == by_hand(features, relevance.tolist(), n)
    assert take(features, relevance, tokens) == list(range(tokens))


def test_unlike_tokens_go_by_relevance_alone():
    relevance = noise(12, seed=3).abs()
    assert take(torch.eye(12), relevance, 5) == best(relevance.tolist(), 5)


def test_a_double_of_a_kept_token_comes_last():
    """Directions 0 0 1 2: the second is the most relevant but one, and adds nothing to the first."""
    features, relevance = torch.eye(3)[[0, 0, 1, 2]], torch.tensor([1.0, 0.9, 0.2, 0.1])
    assert [take(features, relevance, n) for n in (1, 2, 3)] == [[0], [0, 2], [0, 2, 3]]


@pytest.mark.parametrize("seed", SEEDS)
def test_where_nothing_is_left_to_add_relevance_decides(seed):
    """Two dimensions hold two tokens; every determinant of three is 0."""
    features, relevance = noise(9, 2, seed=seed), torch.linspace(1, 0.2, 9)[torch.randperm(9)]
    two = take(features, relevance, 2)
    rest = [i for i in range(9) if i not in two]
    for n in range(3, 10):
        more = best([relevance[i] for i in rest], n - 2)
        assert take(features, relevance, n) == sorted(two + [rest[i] for i in more])


def test_of_equal_tokens_the_first_win():
    assert take(torch.ones(5, 1), torch.ones(5), 3) == [0, 1, 2]
    assert take(torch.eye(4), torch.ones(4), 2) == [0, 1]


def test_lengths_do_not_count():
    features, relevance = noise(20, 25, seed=1), noise(20, seed=2).abs()
    scaled = features * 2.0 ** torch.arange(-10, 10)[:, None]
    assert take(scaled, relevance, 8) == take(features, relevance, 8)


@pytest.mark.parametrize("theta", [None, 0, 0.5, 0.8, 0.999])
def test_relevance_is_stretched(theta):
    values = torch.tensor([2.0, 4.0, 3.0, -1.0])
    expected = torch.tensor(weights_by_hand(values.tolist(), theta), dtype=torch.float64)
    close(weights(values, theta), (expected / expected.max()).float(), atol=2e-6)
    equal = weights(torch.full((3,), 0.7), theta)
    assert equal[0] > 0 and torch.equal(equal, weights(torch.tensor([5.0]), theta).expand(3))
    with refused("not finite"):
        weights(torch.tensor([1.0, math.nan]), theta)


@pytest.mark.parametrize("theta", [-0.1, 1.0, 2])
def test_what_theta_may_be(theta):
    with refused(f"cdpruner: theta is {theta}, but must be 0 to below 1, or none"):
        CDPruner(theta=theta)


# ----- in the model


def similarity_by_hand(features: Tensor, states: Tensor) -> list[float]:
    """The mean cosine of each feature [N, D] with the states [T, D]."""
    return [sum(float(torch.cosine_similarity(f, x, dim=0)) for x in states.double()) / len(states)
            for f in features.double()]


def states_of(network: LlamaVision, pruner: Pruner, prompts: list[list[int]], image: ImageTokens,
              steps: int = 2) -> tuple[Run, Tensor]:
    """A run, and the states [B, T, D] that entered the first cross-attention layer in prefill."""
    seen, honest = [], type(pruner).choose

    def choose(self: Pruner, queries: Queries, *rest: object) -> Tensor:
        seen.append(queries.x)
        return honest(self, queries, *rest)
    with patch.object(type(pruner), "choose", choose):
        run = forced(network, prompts, image, pruner, steps)
    return run, seen[0]


@pytest.mark.parametrize("full_layers", [0, 1])
@pytest.mark.parametrize("relevance", ["similarity", "attention"])
@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_relevant(seed, relevance, full_layers):
    """To the positions that see the image; the tokens that loops choose are read and held, and the logits are
    those of the masked network."""
    network, image = small_network(seed, SHARES[seed], CROSS[seed]), random_image(14, seed=seed)
    theta = [None, 0.5, 0.8][seed]
    pruner = CDPruner(0.3, full_layers=full_layers, relevance=relevance, theta=theta)
    (run, x), q, k = watched(network, lambda: states_of(network, pruner, [PROMPT], image, 3))
    if relevance == "attention":
        values, = received_by_hand(q[0][0], k[0][0], dict.fromkeys(SEES, range(14)))
    else:
        values = similarity_by_hand(image.features[0], x[0, SEES.start:])
    expected = by_hand(image.features[0], weights_by_hand(values, theta), 4)
    whole = [list(range(14))] * full_layers
    assert [kept(kv, image) for kv in run.read] == whole + [expected] * (CROSS[seed] - full_layers)
    assert all(kept(kv, image) == expected for kvs in run.held for kv in kvs)
    close(run.logits, masked(network, run, [PROMPT], image))


def test_each_image_of_each_sequence_for_itself():
    """In a ragged batch, by the positions that see it: two images apart, text alone, and one image."""
    network, parts = small_network(0), (random_image(8, 11, seed=2), None, random_image(17, seed=3))
    prompts, image = [[5, I, 6, I, 7, 8], [5, 6, 7], [I, 8, 9, 10]], batch_of(*parts)
    run, x = states_of(network, CDPruner(0.4), prompts, image)
    first, second = image.features[0, :8], image.features[0, 8:]
    sets = [by_hand(own, weights_by_hand(similarity_by_hand(own, states)), half_up(0.4, len(own)))
            for own, states in ((first, x[0, 1:3]), (second, x[0, 3:]), (parts[2].features[0], x[2, :4]))]
    assert kept(run.read[0], image, 0) == sets[0] + [8 + i for i in sets[1]]
    assert kept(run.read[0], image, 2) == sets[2]


def test_an_image_that_nobody_asks_about_goes_by_likeness_alone():
    queries, image, kv = attention_of(torch.full((1, 2, 6), 1 / 6))
    image.features = noise(1, 6, 8, seed=4)
    blind = replace(queries, seen=torch.zeros(1, 2, 2, dtype=torch.long), x=noise(1, 2, 8))
    for relevance in "similarity", "attention":
        chosen = CDPruner(0.5, relevance=relevance).choose(blind, image, kv)[0].nonzero()[:, 0].tolist()
        assert chosen == by_hand(image.features[0], [1.0] * 6, 3)


@pytest.mark.parametrize("relevance", ["similarity", "attention"])
def test_the_question_has_a_say(relevance):
    network, image = small_network(2), random_image(20, seed=7)
    sets = {tuple(kept(forced(network, [ids], image, CDPruner(0.25, relevance=relevance)).read[0], image))
            for ids in (PROMPT, [I, 5], [9, I, 30, 31, 32, 33])}
    assert len(sets) > 1 and {len(tokens) for tokens in sets} == {5}
