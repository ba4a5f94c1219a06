"""AirCache against its formulas (arXiv 2503.23956, as notes on it give them), written out in plain loops.

The reference runs the network layer by layer and makes every attention weight by hand, in float64: who
judges, what they look at, how much a layer adds, how skewed that is. How tokens are shared out over the
layers has tests of its own; what every method promises is in test_pruners.py.
"""
import math
import random

import pytest
import torch
from torch import Tensor

from model.decoder import SelfAttentionLayer
from model.image_tokens import ImageKV, ImageTokens, Queries, sight, visible_images
from model.layers import rotary_angles, rotary_frequencies
from model.llama_vision import LlamaVision
from pruning.methods.aircache import AirCache
from pruning.select import allocate, allocated, budget, highest, normalised, skewness

I = 60          # noqa: E741  the image token
SHARES, CROSS = (1, 2, 4), (2, 3, 4)
PROMPT = [5, 6, I, 7, 8, 9, 10, 11]


def random_image(*tokens: int, seed: int = 0) -> ImageTokens:
    """Encoded images of random features, with so many tokens each."""
    features = 3 * torch.randn(1, sum(tokens), 32, generator=torch.Generator().manual_seed(seed))
    coords = [[image, i // 5, -1 + i % 5, 0] for image, n in enumerate(tokens) for i in range(n)]
    return ImageTokens(features, torch.tensor([coords]))


def kept(kv: ImageKV, image: ImageTokens) -> list[int]:
    """Which tokens of an image a cache holds, as their numbers."""
    order = {tuple(coords): i for i, coords in enumerate(image.coords[0].tolist())}
    return [order[tuple(coords)] for coords in kv.coords[0, 0].tolist()]


# ----- the formulas


def softmax(scores: list[float]) -> list[float]:
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / sum(powers) for power in powers]


def weights_of(q: Tensor, k: Tensor, h: int, heads: int) -> list[float]:
    """Attention of one row of query head h, q [d], on keys k [G, N, d]."""
    return softmax([float(q @ key) / math.sqrt(len(q)) for key in k[h * len(k) // heads].double()])


def length(x: list[float]) -> float:
    return math.sqrt(sum(v * v for v in x))


def skewed(values: list[float]) -> float:
    n, mean = len(values), sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return n / ((n - 1) * (n - 2)) * sum(((v - mean) / deviation) ** 3 for v in values)


def by_hand(network: LlamaVision, prompt: list[int], image: ImageTokens, alpha: float
            ) -> tuple[list[list[int]], list[list[float]], list[float]]:
    """Of each cross-attention layer: its judges, the importance of every image token, and its strength."""
    decoder, ids = network.language_model, torch.tensor([prompt])
    frequencies = rotary_frequencies(decoder.config, ids.device)
    angles = rotary_angles(torch.arange(len(prompt))[None], frequencies)
    x, seen, text = decoder.embed_tokens(ids), visible_images(ids, I), None
    elites, importances, strengths = [], [], []
    heads, seeing, which = decoder.config.num_attention_heads, sight(seen), image.coords[0, :, 0].tolist()
    for layer in decoder.layers:
        if isinstance(layer, SelfAttentionLayer):
            q, k, _ = layer.self_attn.project(layer.input_layernorm(x), angles)
            rows = [weights_of(q[0, h, -1].double(), k[0], h, heads) for h in range(heads)]
            text = [sum(row[i] for row in rows) / heads for i in range(len(prompt))]
            x = layer(x, angles)[0]
            continue
        ranges = seen[0].tolist()
        judges = [t for t, (first, stop) in enumerate(ranges) if first < stop == ranges[-1][1]]
        if text is not None:
            judges = [t for t in judges if text[t] >= alpha * max(text[t] for t in judges)]
        text = None
        q, kv = layer.queries(x), layer.cross_attn.keys_values(image)
        importance, strength = [0.0] * len(which), 0.0
        for t in judges:
            offered = [j for j, random_image in enumerate(which) if ranges[t][0] <= random_image < ranges[t][1]]
            read: list[float] = []
            for h in range(heads):
                weights = weights_of(q[0, h, t].double(), kv.key[0][:, offered], h, heads)
                values = kv.value[0, h * kv.value.shape[1] // heads, offered].double()
                read += sum(w * v for w, v in zip(weights, values, strict=True)).tolist()
                for j, weight in zip(offered, weights, strict=True):
                    importance[j] += weight / heads / len(judges)
            gate = math.tanh(float(layer.cross_attn_attn_gate))
            update = [gate * sum(w * v for w, v in zip(row, read, strict=True))
                      for row in layer.cross_attn.o_proj.weight.tolist()]
            strength += length(update) / length(x[0, t].tolist()) / len(judges)
        elites.append(judges)
        importances.append(importance)
        strengths.append(strength)
        blind, rest = x[:, :seeing.start], x[:, seeing.start:]
        x = torch.cat((blind, layer(rest, q[:, :, seeing.start:], kv, seeing.rows, seeing.mask(image))), 1)
    return elites, importances, strengths


def share(statistic: list[float]) -> list[float]:
    mean = sum(statistic) / len(statistic)
    return [s / mean if mean > 0 else 1.0 for s in statistic]


def expected(importances: list[list[float]], strengths: list[float] | None, keep: float | int,
             images: list[list[int]]) -> list[list[int]]:
    """What each layer keeps of the images, each a list of its tokens."""
    result = [[] for _ in importances]
    for tokens in images:
        skew = share([max(skewed([each[j] for j in tokens]), 0.0) for each in importances])
        weights = skew if strengths is None else [(a + b) / 2 for a, b in zip(share(strengths), skew,
                                                                              strict=True)]
        sets, n = len(importances), len(tokens)
        total = sets * min(keep, n) if isinstance(keep, int) else math.floor(keep * sets * n + 0.5)
        for layer, count in enumerate(allocate(weights, total, n)):
            ranked = sorted(tokens, key=lambda j: (-importances[layer][j], j))
            result[layer] += sorted(ranked[:count])
    return result


@pytest.mark.parametrize("strength", ["gated_output", "none"])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_formulas(seed, alpha, strength, small, ask):
    """The same judges, scores and tokens, on networks with and without a text layer before the first look."""
    network, image, keep = small(seed, SHARES[seed], CROSS[seed]), random_image(17, seed=seed), [0.3, 5, 0.5][seed]
    pruner = AirCache(keep, alpha, strength)
    run = ask(network, [PROMPT], image, pruner, steps=3)
    elites, importances, strengths = by_hand(network, PROMPT, image, alpha)
    assert all(elite == [2, 3, 4, 5, 6, 7] for elite in elites) == (alpha == 0)
    torch.testing.assert_close(torch.cat(pruner.scores), torch.tensor(importances), atol=1e-5, rtol=0)
    if strength == "gated_output":
        torch.testing.assert_close(torch.cat(pruner.strengths), torch.tensor(strengths), atol=1e-5, rtol=1e-4)
    chosen = expected(importances, None if strength == "none" else strengths, keep, [list(range(17))])
    assert [kept(kv, image) for kv in run.read] == [list(range(17))] * CROSS[seed]
    assert all([kept(kv, image) for kv in kvs] == chosen for kvs in run.held)
    assert len({len(each) for each in chosen}) > 1 or seed < 2


@pytest.mark.parametrize("prompt, held", [([5, I, I, 6, 7, 8], [0, 1]), ([I, 5, 6, I, 7, 8, 9], [1])])
@pytest.mark.parametrize("seed", range(3))
def test_several_images(prompt, held, seed, small, ask):
    """Each that the last row sees has a budget of its own; the judges see all of them."""
    network, image = small(seed, SHARES[seed], CROSS[seed]), random_image(9, 14, seed=seed)
    run = ask(network, [prompt], image, AirCache(0.4, 0.5))
    elites, importances, strengths = by_hand(network, prompt, image, 0.5)
    assert all(t >= (2 if len(held) == 2 else 3) for elite in elites for t in elite)
    images = [[list(range(9)), list(range(9, 23))][i] for i in held]
    chosen = expected(importances, strengths, 0.4, images)
    assert [kept(kv, image) for kv in run.held[0]] == chosen
    counts = [sum(sum(j in tokens for j in layer) for layer in chosen) for tokens in images]
    assert counts == [math.floor(0.4 * CROSS[seed] * len(tokens) + 0.5) for tokens in images]


def test_prefill_is_that_of_the_whole_image(small, ask):
    network, image = small(1, 2, 3), random_image(17)
    pruned, whole = ask(network, [PROMPT], image, AirCache(0.2)), ask(network, [PROMPT], image)
    assert torch.equal(pruned.logits[:, 0], whole.logits[:, 0])
    assert (pruned.logits[:, 1] - whole.logits[:, 1]).abs().max() > 1e-4


# ----- who judges


def asked(pruner: AirCache, text: list[float], seen: list[list[int]]) -> list[int]:
    """The judges where the last text token looks at the text like that; a shorter row stands beside it."""
    n, d = len(text), 16
    q, key = torch.randn(2, 4, n, d), torch.full((2, 2, n, d), math.nan)
    key[0], key[1, :, :2] = torch.eye(n, d), 1.0
    q[0, :, -1, :n] = torch.tensor(text).log() * d ** 0.5
    pruner.text_layer(0, q, key, torch.tensor([n, 2]))
    assert pruner.text[1, :2].tolist() == [0.5, 0.5] and not pruner.text[1, 2:].any()      # no padding counts
    torch.testing.assert_close(pruner.text[0], torch.tensor(text))
    ranges = torch.tensor([seen, [[0, 0]] * len(seen)])
    elite = pruner.elite(Queries(torch.zeros(2, 4, len(seen), d), ranges))
    assert not elite[1].any()
    return elite[0].nonzero()[:, 0].tolist()


def test_the_elite_is_close_to_the_best_of_those_that_see_the_image():
    text, seen = [0.50, 0.20, 0.19, 0.11], [[0, 0], [0, 1], [0, 1], [0, 1]]
    assert asked(AirCache(alpha=0.9), text, seen) == [1, 2]         # the threshold is 0.18, whatever BOS has
    assert asked(AirCache(alpha=1), text, seen) == [1]
    assert asked(AirCache(alpha=0), text, seen) == [1, 2, 3]
    assert asked(AirCache(alpha=0.9), text, seen[1:]) == [0, 1]     # the rows before the image are cut off


def test_judges_see_all_that_the_last_row_sees():
    text = [0.40, 0.25, 0.24, 0.11]
    assert asked(AirCache(), text, [[0, 1], [0, 2], [0, 2], [0, 2]]) == [1, 2]      # side by side
    assert asked(AirCache(), text, [[0, 1], [0, 1], [1, 2], [1, 2]]) == [2]         # apart
    assert asked(AirCache(), text, [[0, 1], [0, 1], [0, 1], [0, 0]]) == [0]         # the last one is padding


def test_what_an_answer_left_unfinished_is_forgotten(small, ask):
    """The first layer of this network looks at the image before any text layer: every row judges."""
    network, image, pruner = small(3, 4, 4), random_image(17), AirCache(0.3)
    fresh = ask(network, [PROMPT], image, AirCache(0.3))
    pruner.text_layer(0, torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([8]))
    again = ask(network, [PROMPT], image, pruner)
    assert torch.equal(again.logits, fresh.logits) and again.answer.kept == fresh.answer.kept


# ----- what a layer is worth


def test_skewness():
    everywhere = torch.ones(4, dtype=torch.bool)
    for values, skew in ([0.1, 0.1, 0.1, 0.7], 2.0), ([0.1, 0.2, 0.3, 0.4], 0.0), ([0.25] * 4, 0.0):
        assert skewness(torch.tensor([values]), everywhere[None]).item() == pytest.approx(skew, abs=1e-6)
    few = torch.tensor([[True, True, False, False]])
    assert skewness(torch.tensor([[0.1, 0.9, 0.5, 0.5]]), few).item() == 0
    chance, scores = random.Random(0), torch.full((20, 30), math.nan)
    there = torch.zeros(20, 30, dtype=torch.bool)
    for row in range(20):
        there[row, chance.sample(range(30), chance.randint(3, 30))] = True
        scores[row, there[row]] = torch.rand(int(there[row].sum()))
    slow = [skewed(row[real].tolist()) for row, real in zip(scores.double(), there, strict=True)]
    torch.testing.assert_close(skewness(scores, there), torch.tensor(slow, dtype=torch.double))


def chosen(scores: list[list[float]], strengths: list[float], **options) -> list[list[int]]:
    """What is kept of one image with these scores in each layer."""
    pruner, n = AirCache(**options), len(scores[0])
    pruner.scores = list(torch.tensor(scores)[:, None])
    pruner.strengths = list(torch.tensor(strengths)[:, None])
    kv = ImageKV(torch.zeros(1, 1, n, 2), torch.zeros(1, 1, n, 2), torch.zeros(1, 1, n, 4, dtype=torch.long))
    return [layer[0].nonzero()[:, 0].tolist() for layer in pruner.chosen([kv] * len(scores))]


def test_more_for_the_layer_that_is_more_skewed_or_stronger():
    even, steep = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.9]
    assert chosen([even, steep], [1.0, 1.0], keep=0.5) == [[6, 7], [0, 1, 2, 3, 6, 7]]   # 1/4, 3/4
    assert chosen([even, steep], [1.0, 1.0], keep=0.5, strength="none") == [[7], [0, 1, 2, 3, 4, 6, 7]]
    assert chosen([steep, steep], [1.0, 3.0], keep=0.5) == [[0, 6, 7], [0, 1, 2, 6, 7]]     # 3/8, 5/8


def test_all_flat_layers_are_equal():
    flat = [0.125] * 8
    assert chosen([flat, flat], [0.0, 0.0], keep=0.25) == [[0, 1]] * 2                      # ties: the first
    assert chosen([flat, flat], [1.0, 2.0], keep=0.25, strength="none") == [[0, 1]] * 2
    assert chosen([flat, flat], [0.5, 0.5], keep=1.0) == [list(range(8))] * 2


# ----- shared out over the layers


def test_the_examples():
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


@pytest.mark.parametrize("keep", [0.1, 0.37, 3, 1])
def test_the_sum_is_exact(keep, small, ask):
    """In a batch, for every row, over layers of any share."""
    network, image = small(3, 4, 4), random_image(23)
    run = ask(network, [PROMPT, [I, 7, 8]], image.expand(2), AirCache(keep, 0.5))
    total = 4 * keep if isinstance(keep, int) else math.floor(keep * 4 * 23 + 0.5)
    assert [sum(row) for row in run.answer.kept] == [total, total]


@pytest.mark.parametrize("options", [{"alpha": -0.1}, {"alpha": 1.1}, {"alpha": math.nan}, {"alpha": "high"},
                                   {"strength": "gate"}, {"keep": 0}, {"keep": None}], ids=str)
def test_bad_knobs_get_one_line(options):
    with pytest.raises(ValueError, match=f"aircache: {min(options)} is") as error:
        AirCache(**options)
    assert "\n" not in str(error.value)
