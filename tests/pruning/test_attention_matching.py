"""Attention matching against its formulas (arXiv 2602.16284 and its code), in loops and float64.

Which keys are kept, and that masses and outputs are those of the whole image. What every method promises is
in test_pruners.py.
"""
import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from helpers import SHARES, I, close, encode, kept_sets, noise, refused, small_network
from loops import best, half_up, watched
from reference import forced
from torch import Tensor

from model.image_tokens import ImageKV, Queries, visible_images
from model.llama_vision import LlamaVision
from pruning.methods.attention_matching import AttentionMatching, least_squares

PROMPTS = [[5, 6, I, 7, 8, 9, 10, 11], [I, 5, 15, I, 16, 17], [9, 8, I, I, 18, 7]]
GRIDS = [[(2, 2)], [(1, 1), (1, 3)], [(1, 2), (2, 1)]]
Rows = list[list[float]]


# ----- the formulas, slowly


def ridge_by_hand(a: Rows, b: Rows, ridge: float) -> Rows:
    """Least squares with a row more for each unknown: sqrt(ridge) times the norm of a, which is to give 0."""
    norm = math.sqrt(sum(x * x for row in a for x in row))
    n = len(a[0])
    more = [[math.sqrt(ridge) * norm * (i == j) for j in range(n)] for i in range(n)]
    none = [[0.0] * len(b[0])] * n
    left, right = (torch.tensor(rows, dtype=torch.float64) for rows in (a + more, b + none))
    return torch.linalg.lstsq(left, right).solution.tolist()


def powers_by_hand(q: Rows, keys: Rows, sees: list[list[int]]) -> Rows:
    """exp of the scores of each query, over its greatest; 0 where it does not see the key."""
    rows = []
    for query, tokens in zip(q, sees, strict=True):
        scores = {j: sum(x * y for x, y in zip(query, keys[j], strict=True)) / math.sqrt(len(query))
                  for j in tokens}
        rows.append([math.exp(scores[j] - max(scores.values())) if j in scores else 0.0
                     for j in range(len(keys))])
    return rows


def weights_by_hand(power: Rows, chosen: list[int], ridge: float) -> list[float]:
    found = ridge_by_hand([[row[j] for j in chosen] for row in power], [[sum(row)] for row in power], ridge)
    return [min(max(w, 1e-12), math.exp(7)) for w, in found]


def pursuit(power: Rows, images: list[list[int]], options: AttentionMatching) -> list[int]:
    """The keys that are kept, a share of each image."""
    room = {i: half_up(options.keep, len(tokens)) for i, tokens in enumerate(images)}
    chosen, missing = [], [sum(row) for row in power]
    while any(room.values()):
        gain = [sum(row[j] * lack for row, lack in zip(power, missing, strict=True))
                for j in range(len(power[0]))]
        for image, tokens in enumerate(images):
            free = [j for j in tokens if j not in chosen]
            if room[image]:
                chosen += [free[i] for i in best([gain[j] for j in free], 1)]
                room[image] -= 1
        w = weights_by_hand(power, chosen, options.ridge)
        missing = [sum(row) - sum(row[j] * x for j, x in zip(chosen, w, strict=True)) for row in power]
    return sorted(chosen)


def fitted(power: Rows, chosen: list[int], values: Rows, ridge: float) -> tuple[list[float], Rows]:
    w = weights_by_hand(power, chosen, ridge)
    attention = [[row[j] * x for j, x in zip(chosen, w, strict=True)] for row in power]
    attention = [[x / sum(row) for x in row] for row in attention]
    output = [[sum(p * v[c] for p, v in zip(row, values, strict=True)) / sum(row)
               for c in range(len(values[0]))] for row in power]
    return w, ridge_by_hand(attention, output, ridge)


def random_queries(network: LlamaVision, layer: int, number: int) -> Tensor:
    own = network.language_model.cross_layers[layer].cross_attn
    return own.q_norm(noise(own.heads, number, 8))


@pytest.mark.parametrize("options", [{"random": 0}, {"random": 7}, {"keep": 3, "ridge": 0.01}], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_definition(seed, options):
    """Each layer and KV head: which keys, biases and values, of queries that see the image, of all the query
    heads that share the KV head."""
    network = small_network(seed, SHARES[seed], 2)
    prompt, image = PROMPTS[seed], encode(network, [GRIDS[seed]], seed)
    pruner = AttentionMatching(**{"keep": 0.3, **options})
    run, q, k = watched(network, lambda: forced(network, [prompt], image, pruner))
    of_image = image.coords[0, :, 0].tolist()
    seen = visible_images(torch.tensor([prompt]), I)[0].tolist()
    last = range(*seen[-1])
    images = [[j for j, i in enumerate(of_image) if i == own] for own in last]
    visible = [[j for j, i in enumerate(of_image) if i in range(*own) and i in last] for own in seen]
    asked = [t for t, tokens in enumerate(visible) if tokens]
    for i, (read, kv) in enumerate(zip(run.read, run.held[0], strict=True)):
        queries = torch.cat((q[i][0][:, asked], random_queries(network, i, pruner.random)), 1).double()
        sees = [visible[t] for t in asked] + [visible[-1]] * pruner.random
        sets = kept_sets(kv, image)
        share = len(queries) // len(sets)
        for g, tokens in enumerate(sets):
            own = queries[g * share:(g + 1) * share].flatten(0, 1).tolist()
            power = powers_by_hand(own, k[i][0][g].double().tolist(), sees * share)
            assert tokens == pursuit(power, images, pruner)
            w, u = fitted(power, tokens, read.value[0, g].double().tolist(), pruner.ridge)
            close(kv.bias[0, g].exp(), torch.tensor(w), 1e-4)
            close(kv.value[0, g], torch.tensor(u), 1e-4)
            assert torch.equal(kv.key[0, g], read.key[0, g, tokens])


def test_least_squares():
    a, b = noise(2, 9, 4).double(), noise(2, 9, 3, seed=1).double()
    for ridge in 1e-6, 1e-3, 0.1:
        x = least_squares(a, b, ridge)
        for g in range(2):
            close(x[g].float(), torch.tensor(ridge_by_hand(a[g].tolist(), b[g].tolist(), ridge)))


# ----- what it is for


def attention(q: Tensor, kv: ImageKV) -> tuple[Tensor, Tensor]:
    """Masses [T] and outputs [T, d] of queries [T, d], of the first KV head of the first sequence."""
    scores = q @ kv.key[0, 0].T * q.shape[1] ** -0.5
    scores = scores if kv.bias is None else scores + kv.bias[0, 0]
    return scores.exp().sum(1), scores.softmax(1) @ kv.value[0, 0]


def one_image(N: int, seed: int = 0) -> ImageKV:
    coords = torch.tensor([[[0, 0, 0, j] for j in range(N)]])
    return ImageKV(noise(1, 1, N, 8, seed=seed), noise(1, 1, N, 8, seed=seed + 50), coords[:, None])


def matched(kv: ImageKV, q: Tensor, **options) -> ImageKV:
    """What is left of an image that queries [T, d] read."""
    seen = torch.tensor([0, 1]).expand(1, len(q), 2)
    return AttentionMatching(**options).match(Queries(q[None, None], seen), kv)


@pytest.mark.parametrize("seed", range(6))
def test_masses_and_outputs_are_nearer_than_without_a_fit(seed):
    """For the queries that were asked; and, as these are many, for others of their kind."""
    kv, q = one_image(40, seed), noise(200, 8, seed=seed + 9)
    small = matched(kv, q, keep=16)
    plain = replace(small, value=kv.value[:, :, small.coords[0, 0, :, 3]], bias=None)
    for asked in q, noise(200, 8, seed=seed + 20):
        mass, output = attention(asked, kv)
        errors = []
        for each in small, plain:
            own_mass, own_output = attention(asked, each)
            errors.append(((own_mass / mass - 1).square().mean().sqrt(), (own_output - output).norm()))
        assert errors[0][0] * 2 < errors[1][0] and errors[0][1] * 2 < errors[1][1]


def test_pursuit_leaves_less_of_the_mass_than_the_keys_of_most_attention():
    kv, q = one_image(60, 3), noise(100, 8, seed=4)
    power = powers_by_hand(q.tolist(), kv.key[0, 0].tolist(), [list(range(60))] * 100)
    most = best([sum((row[j] / sum(row)) ** 2 for row in power) for j in range(60)], 8)
    errors = []
    for chosen in most, matched(kv, q, keep=8).coords[0, 0, :, 3].tolist():
        w = weights_by_hand(power, chosen, 1e-3)
        given = [sum(row[j] * x for j, x in zip(chosen, w, strict=True)) for row in power]
        errors.append(sum((sum(row) - mass) ** 2 for row, mass in zip(power, given, strict=True)))
    assert errors[1] < errors[0]


def test_copies_are_counted():
    """Of three keys that stand there 5, 2 and 1 times one each is kept: the biases are ln 5, ln 2 and 0, the
    values are as they were, and so is what any query reads."""
    of = torch.tensor([0, 1, 0, 2, 0, 0, 1, 0])
    kv = one_image(8)
    kv = replace(kv, key=kv.key[:, :, of], value=kv.value[:, :, of])
    small = matched(kv, noise(50, 8, seed=1), keep=3, ridge=1e-6)
    assert small.coords[0, 0, :, 3].tolist() == [0, 1, 3]               # of equal ones the first
    close(small.bias[0, 0].exp(), torch.tensor([5.0, 2.0, 1.0]), 2e-3)
    close(small.value, kv.value[:, :, [0, 1, 3]], 2e-3)
    close(attention(q := noise(9, 8, seed=2), small)[1], attention(q, kv)[1], 2e-3)


# ----- what must not matter


def test_keeping_all_returns_the_object_itself():
    kv = one_image(9)
    assert all(matched(kv, noise(30, 8), keep=keep) is kv for keep in (1.0, 9, 100))


def test_a_short_image_keeps_all_beside_a_longer_one():
    """Then nothing of it is fitted; and padding may hold NaN."""
    N, kv, q = 9, one_image(9), noise(2, 1, 5, 8, seed=3)
    mask = torch.tensor([[True] * 4 + [False] * 5, [True] * 9])[:, None]
    key, value = kv.key.repeat(2, 1, 1, 1), kv.value.repeat(2, 1, 1, 1)
    key[0, :, 4:] = value[0, :, 4:] = math.nan
    seen = torch.tensor([0, 1]).expand(2, 5, 2)
    for keep in 4, 2:
        pruner = AttentionMatching(keep)
        both = pruner.match(Queries(q, seen), ImageKV(key, value, kv.coords.repeat(2, 1, 1, 1), mask))
        assert both.key.isfinite().all() and both.value.isfinite().all() and both.mask is None
        short = ImageKV(*(t[:, :, :4] for t in (kv.key, kv.value, kv.coords)))
        for b, alone in enumerate((short, kv)):
            alone = pruner.match(Queries(q[b:b + 1], seen[:1]), alone)
            bias = torch.zeros(1, 1, 4) if alone.bias is None else alone.bias
            assert alone.bias is None or keep < 4 or b == 1
            for ours, theirs in (both.value, alone.value), (both.bias, bias), (both.key, alone.key):
                close(ours[b:b + 1], theirs, 1e-6)
    assert len(kv.key[0, 0]) == N


def test_only_queries_that_see_what_is_left_are_asked():
    """The first image and the text behind it are over when the second group begins."""
    network, prompt = small_network(1), PROMPTS[1]
    image = encode(network, [GRIDS[1]], 1)
    honest = AttentionMatching.layer
    held = []
    for noisy in [], [0, 1, 2], [4]:
        def layer(self, i, queries, *rest, noisy=noisy):
            q = queries.q.clone()
            q[:, :, noisy] = 100.0
            return honest(self, i, replace(queries, q=q), *rest)
        with patch.object(AttentionMatching, "layer", layer):
            held.append(forced(network, [prompt], image, AttentionMatching(0.4, random=2)).held[0])
    for same, first, other in zip(held[1], held[0], held[2], strict=True):
        assert torch.equal(same.value, first.value) and torch.equal(same.bias, first.bias)
        assert not torch.equal(other.bias, first.bias)


def test_a_bias_from_before_counts():
    """One for all of them changes nothing, and stays; ln 4 is four copies."""
    kv, q = one_image(12), noise(60, 8, seed=5)
    plain = matched(kv, q, keep=5)
    shifted = matched(replace(kv, bias=torch.full((1, 1, 12), 0.7)), q, keep=5)
    assert torch.equal(shifted.coords, plain.coords)
    close(shifted.bias, plain.bias + 0.7)
    close(shifted.value, plain.value)
    bias = torch.zeros(1, 1, 12)
    bias[..., 2] = math.log(4)
    of = torch.tensor([0, 1, 2, 2, 2, 2, *range(3, 12)])
    copies = ImageKV(kv.key[:, :, of], kv.value[:, :, of], kv.coords[:, :, of])
    wanted, output = attention(q, copies)
    for mass, out in attention(q, replace(kv, bias=bias)), attention(q, matched(
            replace(kv, bias=bias), q, keep=11, ridge=1e-6)):
        close(mass / wanted, torch.ones(60), 0.05)
        close(out, output, 0.1)


def test_half_precision_is_fitted_in_double_and_cast_once():
    kv, q = one_image(20), noise(40, 8, seed=6).bfloat16()
    half = replace(kv, key=kv.key.bfloat16(), value=kv.value.bfloat16())
    exact = matched(replace(half, key=half.key.float(), value=half.value.float()), q.float(), keep=6)
    small = matched(half, q, keep=6)
    assert small.value.dtype == torch.bfloat16 and small.bias.dtype == torch.float32
    assert torch.equal(small.value, exact.value.bfloat16()) and torch.equal(small.bias, exact.bias)


def test_weights_have_bounds():
    """Keys that the mass would subtract get next to no weight, and a bias that is finite."""
    kv, q = one_image(30), noise(2, 8, seed=7)
    w = matched(kv, q, keep=20, ridge=1e-6).bias.double().exp()
    assert w.min() > 0.9e-12 and w.max() < 1.01 * math.exp(7) and w.log().isfinite().all()


# ----- options


@pytest.mark.parametrize("options", [{"keep": 0}, {"random": -1}, {"random": 0.5}, {"ridge": 0.0}], ids=str)
def test_a_bad_option_gets_one_line(options):
    with refused(f"attention_matching: {next(iter(options))} is"):
        AttentionMatching(**options)


def test_what_it_says_of_itself():
    assert str(AttentionMatching(0.2, random=8)) == "attention_matching, keep 0.2, random 8"
    assert AttentionMatching.merges and AttentionMatching(1.0).keeps_all
