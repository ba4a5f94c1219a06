"""FastV against its definition (arXiv 2403.06764 and its code), in loops over captured queries and keys.

Which rows rank, how many layers stay whole, what the caches hold and what is counted; what every method
promises, that dropping is masking above all, is in test_pruners.py.
"""
import math
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from model.image_tokens import ImageKV, ImageTokens
from model.llama_vision import LlamaVision
from pruning import load
from pruning.methods.fastv import FastV

I = 60          # noqa: E741  the image token
SHARES, CROSS = (1, 2, 4), (2, 3, 4)
PROMPT = [5, 6, I, 7, 8, 9]
SEEDS = range(3)


def close(a: Tensor, b: Tensor, atol: float = 1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def random_image(*tokens: int, seed: int = 0) -> ImageTokens:
    """Encoded images of random features, with so many tokens each."""
    features = torch.randn(1, sum(tokens), 32, generator=torch.Generator().manual_seed(seed))
    coords = [[image, i // 5, -1 + i % 5, 0] for image, n in enumerate(tokens) for i in range(n)]
    return ImageTokens(features, torch.tensor([coords]))


def kept(kv: ImageKV, image: ImageTokens) -> list[int]:
    """Which tokens of an image a cache holds, as their numbers."""
    order = {tuple(coords): i for i, coords in enumerate(image.coords[0].tolist())}
    return [order[tuple(coords)] for coords in kv.coords[0, 0].tolist()]


def watched(network: LlamaVision, ordinal: int, run) -> tuple[object, list[Tensor], list[Tensor]]:
    """A run, and the queries and keys that a cross-attention layer made in it, [H, T, d] and [G, N, d]."""
    own, q, k = network.language_model.cross_layers[ordinal].cross_attn, [], []
    hooks = [part.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output[0]))
             for part, seen in ((own.q_norm, q), (own.k_norm, k))]
    result = run()
    for hook in hooks:
        hook.remove()
    return result, q, k


def ranked(q: Tensor, k: Tensor, n: int) -> list[int]:
    """The n tokens with the highest attention from rows q [H, T, d]: summed over them, a mean over heads."""
    score, heads = [0.0] * k.shape[1], len(q)
    for h in range(heads):
        for row in q[h].double():
            powers = [math.exp(float(row @ key) / math.sqrt(len(key)))
                      for key in k[h * len(k) // heads].double()]
            score = [s + power / sum(powers) / heads for s, power in zip(score, powers, strict=True)]
    return sorted(sorted(range(len(score)), key=lambda i: (-score[i], i))[:n])


def choose(attention_of, weights: Tensor, **settings) -> list[int]:
    """What is kept of an image that is looked at with these weights [H, T, N]."""
    queries, image, kv = attention_of(weights)
    return load("fastv", **settings).layer(0, queries, image, kv)[0].features[0, :, 0].int().tolist()


# ----- the choice


@pytest.mark.parametrize("rows", ["last", "all"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_definition(rows, layers, seed, small, ask, masked):
    """The tokens that plain loops choose, in every later layer, and the logits of the masked network."""
    network, image = small(seed, SHARES[seed], CROSS[seed]), random_image(14, seed=seed)
    pruner = FastV(0.3, rows=rows, full_layers=layers)
    run, q, k = watched(network, layers - 1, lambda: ask(network, [PROMPT], image, pruner, steps=3))
    expected = ranked(q[0][:, -1:] if rows == "last" else q[0], k[0], 4)        # queries from the image on
    whole, later = [list(range(14))] * layers, [expected] * (CROSS[seed] - layers)
    assert q[0].shape[1] == 4 and [kept(kv, image) for kv in run.read] == whole + later
    assert all([kept(kv, image) for kv in kvs] == whole + later for kvs in run.held)
    close(run.logits, masked(network, run, [PROMPT], image))


def test_the_mean_over_heads(attention_of):
    last = torch.tensor([[0.4, 0.1, 0.1, 0.2, 0.1, 0.1], [0.0, 0.5, 0.1, 0.2, 0.1, 0.1]])[:, None]
    assert choose(attention_of, last, keep=3) == choose(attention_of, last, keep=0.5) == [0, 1, 3]
    adversarial = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.4, 0.6]).expand(2, 4, 6)
    rows = torch.cat((adversarial, last), dim=1)
    assert choose(attention_of, rows, keep=3) == [0, 1, 3]
    assert choose(attention_of, rows, keep=3, rows="all") == [1, 4, 5]


def test_ties_go_to_the_first(attention_of):
    assert choose(attention_of, torch.full((2, 3, 5), 0.2), keep=0.5) == [0, 1, 2]      # 2.5: half up


@pytest.mark.parametrize("seed", SEEDS)
def test_each_image_is_ranked_by_the_last_row_that_sees_it(seed, small, ask):
    """Two images apart: the first by the row before the second, though the last row does not see it."""
    network, image, prompt = small(seed, SHARES[seed]), random_image(8, 10, seed=seed), [I, 5, 6, I, 7, 8]
    run, q, k = watched(network, 0, lambda: ask(network, [prompt], image, FastV(0.4)))
    first, second = ranked(q[0][:, 2:3], k[0][:, :8], 3), ranked(q[0][:, 5:6], k[0][:, 8:], 4)
    assert kept(run.read[1], image) == first + [8 + i for i in second]
    assert kept(run.held[0][1], image) == [8 + i for i in second]
    assert run.answer.kept == [[10.0, 4.0]] and run.answer.seen == [10]


# ----- what is pruned, and what is not


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("settings, read, held", [
    ({}, [14, 4, 4, 4], [14, 4, 4, 4]), ({"early_caches": "trim"}, [14, 4, 4, 4], [4] * 4),
    ({"full_layers": 2}, [14, 14, 4, 4], [14, 14, 4, 4]), ({"full_layers": 4}, [14] * 4, [14] * 4),
    ({"full_layers": 0}, [4] * 4, [4] * 4), ({"when": "boundary"}, [14] * 4, [14, 4, 4, 4]),
    ({"full_layers": 0, "when": "boundary"}, [14] * 4, [4] * 4),
    ({"when": "boundary", "early_caches": "trim"}, [14] * 4, [4] * 4)], ids=str)
def test_cache_lengths(seed, settings, read, held, small, ask):
    """In prefill and after it; one set in all, and the same in every step."""
    network, image = small(seed, SHARES[seed], 4), random_image(14, seed=seed)
    run = ask(network, [PROMPT], image, FastV(0.3, **settings), steps=4)
    assert [kv.key.shape[2] for kv in run.read] == read
    assert all([kv.key.shape[2] for kv in kvs] == held for kvs in run.held)
    assert run.answer.kept == [held]
    sets = {tuple(kept(kv, image)) for kvs in [run.read, *run.held] for kv in kvs if kv.key.shape[2] == 4}
    assert len(sets) == (4 in held)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_set_for_decoding_alone(seed, small, ask):
    network, image = small(seed, SHARES[seed], 3), random_image(14, seed=seed)
    now, later, whole = (ask(network, [PROMPT], image, p)
                         for p in (FastV(0.3), FastV(0.3, when="boundary"), None))
    assert torch.equal(later.logits[:, 0], whole.logits[:, 0])
    assert [kept(kv, image) for kv in later.held[0]] == [kept(kv, image) for kv in now.held[0]]
    assert (later.logits[:, 1] - whole.logits[:, 1]).abs().max() > 1e-4


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_keys_and_values_of_dropped_tokens_are_never_made(layers, seed, small, ask):
    """NaN in their features after the choice changes nothing."""
    network, image = small(seed, SHARES[seed], 3), random_image(14, seed=seed)
    expected = ask(network, [PROMPT], image, FastV(0.3, full_layers=layers))
    choice = FastV.choose

    def poison(self, queries, tokens, kv):
        result = choice(self, queries, tokens, kv)
        tokens.features[~result] = math.nan
        return result
    with patch.object(FastV, "choose", poison):
        run = ask(network, [PROMPT], image, FastV(0.3, full_layers=layers))
    assert image.features.isnan().any() and torch.equal(run.logits, expected.logits)


def test_no_full_layers_means_random_tokens(small, ask):
    """By the seed and the prompt, not by what anybody looks at; already in the first layer."""
    network, image = small(1, 2, 3), random_image(30)
    sets = []
    for pruner in FastV(0.3, full_layers=0), FastV(0.3, full_layers=0, seed=1), FastV(0.3):
        runs = [ask(network, [prompt], image, pruner) for prompt in (PROMPT, PROMPT, [*PROMPT, 10])]
        first, again, other = (tuple(kept(run.read[-1], image)) for run in runs)
        assert first == again and (first != other or pruner.full_layers)
        sets.append(first)
    assert len(set(sets)) == 3 and {len(chosen) for chosen in sets} == {9}
    plain = load("random", keep=0.3)
    assert kept(ask(network, [PROMPT], image, plain).read[-1], image) == list(sets[0])


# ----- choosing anew after every token


@pytest.mark.parametrize("early", ["full", "trim"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_choosing_anew_in_every_step(early, layers, seed, small, ask, masked):
    """By the token just decoded, from the whole image; the logits are those of the masked network."""
    network, image = small(seed, SHARES[seed], 3), random_image(14, seed=seed)
    pruner = FastV(0.3, when="step", full_layers=layers, early_caches=early)
    run, q, k = watched(network, layers - 1, lambda: ask(network, [PROMPT], image, pruner, steps=6))
    expected = [ranked(q[step][:, -1:], k[0], 4) for step in range(6)]
    for kvs, chosen in zip(run.held, expected, strict=True):
        first = list(range(14)) if early == "full" else chosen
        assert [kept(kv, image) for kv in kvs] == [first] * layers + [chosen] * (3 - layers)
    assert len(set(map(tuple, expected))) > 1 and len(k) == 1
    close(run.logits, masked(network, run, [PROMPT], image))


def test_choosing_anew_in_a_mixed_batch(small, ask, masked):
    """Text alone, one image, another: each row chooses for itself."""
    network = small(2, 2, 3)
    features = torch.cat([random_image(14, seed=s).features for s in range(3)])
    coords, mask = random_image(14).coords.repeat(3, 1, 1), torch.tensor([[True] * 14, [False] * 14, [True] * 14])
    coords[1], mask[2, 9:], coords[2, 9:] = -1, False, -1
    image, prompts = ImageTokens(features * mask[..., None], coords, mask), [PROMPT, [5, 6, 7], [I, 8]]
    run = ask(network, prompts, image, FastV(0.3, when="step"), steps=5)
    close(run.logits, masked(network, run, prompts, image))
    text = ask(network, [prompts[1]], None, steps=5)
    close(run.logits[1], text.logits[0])
    assert run.answer.kept == [[14.0, 4.0, 4.0], [0.0] * 3, [9.0, 3.0, 3.0]]


# ----- what is counted


def test_the_realised_keep_ratio(small, ask):
    """1601 tokens, keep 0.5, one full layer of eight: 801 tokens in seven layers."""
    run = ask(small(1, 2, 8), [[5, I, 6]], random_image(1601), FastV(0.5))
    assert run.answer.kept == [[1601.0] + [801.0] * 7] and run.answer.seen == [1601]
    assert round(sum(run.answer.kept[0]) / (8 * 1601), 4) == 0.5628
    assert run.answer.image_kv_bytes == (1601 + 7 * 801) * 2 * 2 * 8 * 4


@pytest.mark.parametrize("layers", [-1, 3])
def test_full_layers_that_the_network_lacks(layers, small, ask):
    with pytest.raises(ValueError, match=f"full_layers is {layers}, but must be 0 to 2") as error:
        ask(small(1), [PROMPT], random_image(10), FastV(full_layers=layers))
    assert "\n" not in str(error.value)


def test_what_it_says_of_itself():
    assert str(FastV(0.3)).startswith("fastv, keep 0.3") and "rows all" in str(FastV(rows="all"))
