"""FastV against its definition (arXiv 2403.06764 and its code), in loops over captured queries and keys.

Which query positions rank, how many layers keep everything, what the caches hold and what is counted; what
every method promises, that dropping is masking above all, is in test_pruners.py.
"""
import pytest
import torch
from helpers import (
    CROSS,
    SHARES,
    I,
    attention_of,
    batch_of,
    close,
    dropped_is_nan,
    kept,
    random_image,
    refused,
    small_network,
)
from loops import best, received_by_hand, watched
from reference import forced, masked
from torch import Tensor

from pruning import load
from pruning.methods.fastv import FastV

PROMPT = [5, 6, I, 7, 8, 9]
SEES = range(2, 6)                      # the positions of PROMPT that see the image
SEEDS = range(3)


def ranked(q: Tensor, k: Tensor, positions: range, n: int) -> list[int]:
    """The n tokens that get most attention from some positions of q [H, T, d], a mean over heads."""
    received, = received_by_hand(q, k, dict.fromkeys(positions, range(k.shape[1])))
    return best(received, n)


def choose(weights: Tensor, **settings) -> list[int]:
    """What is kept of an image that is attended to with these weights [H, T, N]."""
    queries, image, kv = attention_of(weights)
    return load("fastv", **settings).layer(0, queries, image, kv)[0].features[0, :, 0].int().tolist()


# ----- the choice


@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_definition(positions, layers, seed):
    """The tokens that plain loops choose, in every later layer, and the logits of the masked network."""
    network, image = small_network(seed, SHARES[seed], CROSS[seed]), random_image(14, seed=seed)
    pruner = FastV(0.3, positions=positions, full_layers=layers)
    run, q, k = watched(network, lambda: forced(network, [PROMPT], image, pruner, steps=3))
    asked = SEES[-1:] if positions == "last" else SEES
    expected = ranked(q[layers - 1][0], k[layers - 1][0], asked, 4)
    sets = [list(range(14))] * layers + [expected] * (CROSS[seed] - layers)
    assert [kept(kv, image) for kv in run.read] == sets
    assert all([kept(kv, image) for kv in kvs] == sets for kvs in run.held)
    close(run.logits, masked(network, run, [PROMPT], image))


def test_the_mean_over_heads():
    last = torch.tensor([[0.4, 0.1, 0.1, 0.2, 0.1, 0.1], [0.0, 0.5, 0.1, 0.2, 0.1, 0.1]])[:, None]
    assert choose(last, keep=3) == choose(last, keep=0.5) == [0, 1, 3]
    adversarial = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.4, 0.6]).expand(2, 4, 6)
    weights = torch.cat((adversarial, last), dim=1)
    assert choose(weights, keep=3) == [0, 1, 3]
    assert choose(weights, keep=3, positions="all") == [1, 4, 5]


def test_ties_go_to_the_first():
    assert choose(torch.full((2, 3, 5), 0.2), keep=0.5) == [0, 1, 2]            # 2.5: half up


@pytest.mark.parametrize("seed", SEEDS)
def test_each_image_is_ranked_by_the_last_position_that_sees_it(seed):
    """Two images apart: the first by the position before the second, though the last one does not see it."""
    network, image = small_network(seed, SHARES[seed]), random_image(8, 10, seed=seed)
    prompt = [I, 5, 6, I, 7, 8]
    run, q, k = watched(network, lambda: forced(network, [prompt], image, FastV(0.4)))
    first = ranked(q[0][0], k[0][0][:, :8], range(2, 3), 3)
    second = [8 + i for i in ranked(q[0][0], k[0][0][:, 8:], range(5, 6), 4)]
    assert kept(run.read[1], image) == first + second
    assert kept(run.held[0][1], image) == second
    assert run.answer.kept == [[10.0, 4.0]] and run.answer.seen == [10]


# ----- what is pruned, and what is not


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("settings, read, held", [
    ({}, [14, 4, 4, 4], [14, 4, 4, 4]), ({"early_caches": "trim"}, [14, 4, 4, 4], [4] * 4),
    ({"full_layers": 2}, [14, 14, 4, 4], [14, 14, 4, 4]), ({"full_layers": 4}, [14] * 4, [14] * 4),
    ({"full_layers": 0}, [4] * 4, [4] * 4), ({"when": "boundary"}, [14] * 4, [14, 4, 4, 4]),
    ({"full_layers": 0, "when": "boundary"}, [14] * 4, [4] * 4),
    ({"when": "boundary", "early_caches": "trim"}, [14] * 4, [4] * 4)], ids=str)
def test_cache_lengths(seed, settings, read, held):
    """In prefill and after it; one set in all layers, and the same in every step."""
    network, image = small_network(seed, SHARES[seed], 4), random_image(14, seed=seed)
    run = forced(network, [PROMPT], image, FastV(0.3, **settings), steps=4)
    assert [kv.key.shape[2] for kv in run.read] == read
    assert all([kv.key.shape[2] for kv in kvs] == held for kvs in run.held)
    assert run.answer.kept == [held]
    sets = {tuple(kept(kv, image)) for kvs in [run.read, *run.held] for kv in kvs if kv.key.shape[2] == 4}
    assert len(sets) == (4 in held)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_set_for_decoding_alone(seed):
    network, image = small_network(seed, SHARES[seed], 3), random_image(14, seed=seed)
    now, later, plain = (forced(network, [PROMPT], image, p)
                         for p in (FastV(0.3), FastV(0.3, when="boundary"), None))
    assert torch.equal(later.logits[:, 0], plain.logits[:, 0])
    assert [kept(kv, image) for kv in later.held[0]] == [kept(kv, image) for kv in now.held[0]]
    assert (later.logits[:, 1] - plain.logits[:, 1]).abs().max() > 1e-4


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_keys_and_values_of_dropped_tokens_are_never_made(layers, seed):
    """NaN in their features after the choice changes nothing."""
    network, image = small_network(seed, SHARES[seed], 3), random_image(14, seed=seed)
    expected = forced(network, [PROMPT], image, FastV(0.3, full_layers=layers))
    with dropped_is_nan(FastV) as dropped:
        run = forced(network, [PROMPT], image, FastV(0.3, full_layers=layers))
    assert dropped == [10] and image.features.isnan().any() and torch.equal(run.logits, expected.logits)


def test_no_full_layers_means_random_tokens():
    """By the seed and the prompt, not by what anybody attends to; already in the first layer."""
    network, image = small_network(1, 2, 3), random_image(30)
    sets = []
    for pruner in FastV(0.3, full_layers=0), FastV(0.3, full_layers=0, seed=1), FastV(0.3):
        runs = [forced(network, [prompt], image, pruner) for prompt in (PROMPT, PROMPT, [*PROMPT, 10])]
        first, again, other = (tuple(kept(run.read[-1], image)) for run in runs)
        assert first == again and (first != other or pruner.full_layers)
        sets.append(first)
    assert len(set(sets)) == 3 and {len(chosen) for chosen in sets} == {9}
    plain = load("random", keep=0.3)
    assert kept(forced(network, [PROMPT], image, plain).read[-1], image) == list(sets[0])


# ----- choosing anew after every token


@pytest.mark.parametrize("early", ["full", "trim"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_choosing_anew_in_every_step(early, layers, seed):
    """By the token just decoded, from the whole image; the logits are those of the masked network."""
    network, image = small_network(seed, SHARES[seed], 3), random_image(14, seed=seed)
    pruner = FastV(0.3, when="step", full_layers=layers, early_caches=early)
    run, q, k = watched(network, lambda: forced(network, [PROMPT], image, pruner, steps=6))
    q, (k,) = q[layers - 1], k[layers - 1]
    expected = [ranked(asked, k, range(asked.shape[1])[-1:], 4) for asked in q]
    assert len(expected) == 6 and len(set(map(tuple, expected))) > 1
    for kvs, chosen in zip(run.held, expected, strict=True):
        first = list(range(14)) if early == "full" else chosen
        assert [kept(kv, image) for kv in kvs] == [first] * layers + [chosen] * (3 - layers)
    close(run.logits, masked(network, run, [PROMPT], image))


def test_choosing_anew_in_a_mixed_batch():
    """Text alone, one image, another: each sequence chooses for itself."""
    network = small_network(2, 2, 3)
    image = batch_of(random_image(14, seed=0), None, random_image(9, seed=2))
    prompts = [PROMPT, [5, 6, 7], [I, 8]]
    run = forced(network, prompts, image, FastV(0.3, when="step"), steps=5)
    close(run.logits, masked(network, run, prompts, image))
    text = forced(network, [prompts[1]], None, steps=5)
    close(run.logits[1], text.logits[0])
    assert run.answer.kept == [[14.0, 4.0, 4.0], [0.0] * 3, [9.0, 3.0, 3.0]]


# ----- what is counted


def test_the_realised_keep_ratio():
    """1601 tokens, keep 0.5, one full layer of eight: 801 tokens in seven layers."""
    run = forced(small_network(1, 2, 8), [[5, I, 6]], random_image(1601), FastV(0.5))
    assert run.answer.kept == [[1601.0] + [801.0] * 7] and run.answer.seen == [1601]
    assert round(sum(run.answer.kept[0]) / (8 * 1601), 4) == 0.5628
    assert run.answer.image_kv_bytes == (1601 + 7 * 801) * 2 * 2 * 8 * 4


@pytest.mark.parametrize("layers, words", [(-1, "at least 0"), (3, "0 to 2")])
def test_full_layers_that_the_network_lacks(layers, words):
    with refused(f"full_layers is {layers}, but must be {words}"):
        forced(small_network(1), [PROMPT], random_image(10), FastV(full_layers=layers))


def test_what_it_says_of_itself():
    assert str(FastV(0.3)).startswith("fastv, keep 0.3")
    assert "positions all" in str(FastV(positions="all"))
