"""AirCache against its formulas (arXiv 2503.23956, as notes on it give them), written out in plain loops.

The reference runs the network layer by layer and makes every attention weight by hand, in float64: which
text positions judge, what they attend to, how much a layer adds, how skewed that is. How tokens are shared
out over the layers is in test_select.py; what every method promises is in test_pruners.py.
"""
import math
from functools import partial

import pytest
import torch
from helpers import CROSS, SHARES, I, close, kept, random_image, refused, small_network
from loops import skewness_by_hand, softmax
from reference import forced

from model.decoder import CrossAttentionLayer, SelfAttentionLayer
from model.image_tokens import ImageKV, ImageTokens, Queries, attention_mask, visible_images
from model.layers import rotary_angles, rotary_frequencies
from model.llama_vision import LlamaVision
from pruning.methods.aircache import AirCache, attention_of_the_last, elite_positions
from pruning.select import allocate

PROMPT = [5, 6, I, 7, 8, 9, 10, 11]
strong_image = partial(random_image, scale=3)


# ----- the formulas


def length(x: list[float]) -> float:
    return math.sqrt(sum(v * v for v in x))


def judges_by_hand(seen: list[list[int]], text: list[float] | None, alpha: float) -> list[int]:
    """The positions that see all that the last one sees, and that the last one attends to most."""
    judges = [t for t, (first, stop) in enumerate(seen) if first < stop == seen[-1][1]]
    if text is None:
        return judges
    return [t for t in judges if text[t] >= alpha * max(text[t] for t in judges)]


def by_hand(network: LlamaVision, prompt: list[int], image: ImageTokens, alpha: float
            ) -> tuple[list[list[int]], list[list[float]], list[float]]:
    """Of each cross-attention layer: its judges, the importance of every image token, and its strength."""
    decoder, ids = network.language_model, torch.tensor([prompt])
    angles = rotary_angles(torch.arange(len(prompt))[None], rotary_frequencies(decoder.config, ids.device))
    x, seen, text = decoder.embed_tokens(ids), visible_images(ids, I), None
    sees_image = seen[..., :1] < seen[..., 1:]
    elites, importances, strengths = [], [], []
    for layer in decoder.layers:
        if isinstance(layer, SelfAttentionLayer):
            q, k, _ = layer.self_attn.project(layer.input_layernorm(x), angles)
            text = attention_by_hand(q[0, :, -1].double().tolist(), k[0].double().tolist())
            x = layer(x, angles)[0]
            continue
        judges = judges_by_hand(seen[0].tolist(), text, alpha)
        text = None
        q, kv = layer.queries(x), layer.cross_attn.keys_values(image)
        importance, strength = [0.0] * image.coords.shape[1], 0.0
        for t in judges:
            offered = [j for j, i in enumerate(image.coords[0, :, 0].tolist()) if i in range(*seen[0, t])]
            weights, added = read_by_hand(layer, q[0, :, t].double().tolist(), kv, offered)
            for j, weight in zip(offered, weights, strict=True):
                importance[j] += weight / len(judges)
            strength += length(added) / length(x[0, t].tolist()) / len(judges)
        elites.append(judges)
        importances.append(importance)
        strengths.append(strength)
        x = layer(x, q, kv, sees_image, attention_mask(seen, kv))
    return elites, importances, strengths


def attention_by_hand(q: list[list[float]], k: list[list[list[float]]]) -> list[float]:
    """One position q [H, d] on all keys [G, N, d], a mean over heads."""
    weights = [softmax(own, k[h * len(k) // len(q)]) for h, own in enumerate(q)]
    return [sum(column) / len(q) for column in zip(*weights, strict=True)]


def read_by_hand(layer: CrossAttentionLayer, q: list[list[float]], kv: ImageKV,
                 tokens: list[int]) -> tuple[list[float], list[float]]:
    """How a position q [H, d] attends to some tokens, a mean over heads; what the layer adds to it, [D]."""
    keys, values = kv.key[0, :, tokens].double().tolist(), kv.value[0, :, tokens].double().tolist()
    read: list[float] = []
    for h, own in enumerate(q):
        weights = softmax(own, keys[h * len(keys) // len(q)])
        for column in zip(*values[h * len(keys) // len(q)], strict=True):
            read.append(sum(weight * value for weight, value in zip(weights, column, strict=True)))
    gate = math.tanh(float(layer.cross_attn_attn_gate))
    added = [gate * sum(w * v for w, v in zip(line, read, strict=True))
             for line in layer.cross_attn.o_proj.weight.tolist()]
    return attention_by_hand(q, keys), added


def share(statistic: list[float]) -> list[float]:
    mean = sum(statistic) / len(statistic)
    return [s / mean if mean > 0 else 1.0 for s in statistic]


def expected(importances: list[list[float]], strengths: list[float] | None, keep: float | int,
             images: list[list[int]]) -> list[list[int]]:
    """What each layer keeps of the images, each a list of its tokens."""
    result = [[] for _ in importances]
    for tokens in images:
        skew = share([max(skewness_by_hand([each[j] for j in tokens]), 0.0) for each in importances])
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
def test_the_formulas(seed, alpha, strength):
    """The same judges, scores and tokens, on networks whose first layer is, or is not, a text layer."""
    network, image = small_network(seed, SHARES[seed], CROSS[seed]), strong_image(17, seed=seed)
    keep = [0.3, 5, 0.5][seed]
    pruner = AirCache(keep, alpha, strength)
    run = forced(network, [PROMPT], image, pruner, steps=3)
    elites, importances, strengths = by_hand(network, PROMPT, image, alpha)
    assert all(elite == [2, 3, 4, 5, 6, 7] for elite in elites) == (alpha == 0)
    close(torch.cat(pruner.scores), torch.tensor(importances))
    if strength == "gated_output":
        torch.testing.assert_close(torch.cat(pruner.strengths), torch.tensor(strengths), atol=1e-5, rtol=1e-4)
    chosen = expected(importances, None if strength == "none" else strengths, keep, [list(range(17))])
    assert [kept(kv, image) for kv in run.read] == [list(range(17))] * CROSS[seed]
    assert all([kept(kv, image) for kv in kvs] == chosen for kvs in run.held)
    assert len({len(each) for each in chosen}) > 1 or seed < 2


@pytest.mark.parametrize("prompt, held", [([5, I, I, 6, 7, 8], [0, 1]), ([I, 5, 6, I, 7, 8, 9], [1])])
@pytest.mark.parametrize("seed", range(3))
def test_several_images(prompt, held, seed):
    """Each that the last position sees has a budget of its own; the judges see all of them."""
    network, image = small_network(seed, SHARES[seed], CROSS[seed]), strong_image(9, 14, seed=seed)
    run = forced(network, [prompt], image, AirCache(0.4, 0.5))
    elites, importances, strengths = by_hand(network, prompt, image, 0.5)
    assert all(t >= (2 if len(held) == 2 else 3) for elite in elites for t in elite)
    images = [[list(range(9)), list(range(9, 23))][i] for i in held]
    chosen = expected(importances, strengths, 0.4, images)
    assert [kept(kv, image) for kv in run.held[0]] == chosen
    counts = [sum(sum(j in tokens for j in layer) for layer in chosen) for tokens in images]
    assert counts == [math.floor(0.4 * CROSS[seed] * len(tokens) + 0.5) for tokens in images]


def test_prefill_is_that_of_the_whole_image():
    network, image = small_network(1, 2, 3), strong_image(17)
    pruned, plain = forced(network, [PROMPT], image, AirCache(0.2)), forced(network, [PROMPT], image)
    assert torch.equal(pruned.logits[:, 0], plain.logits[:, 0])
    assert (pruned.logits[:, 1] - plain.logits[:, 1]).abs().max() > 1e-4


# ----- who judges


def asking(text: list[list[float]], seen: list[list[list[int]]]) -> Queries:
    """Of several sequences: how their last position attends to their text, and the images that each sees."""
    B, T, d = len(text), len(seen[0]), 16
    q, key = torch.randn(B, 4, T, d), torch.full((B, 2, T, d), math.nan)
    for b, weights in enumerate(text):
        key[b, :, :len(weights)] = torch.eye(len(weights), d)
        q[b, :, len(weights) - 1, :len(weights)] = torch.tensor(weights).log() * d ** 0.5
    return Queries(torch.zeros(B, 4, T, d), torch.tensor(seen), text_q=q, text_k=key)


def elite(alpha: float, text: list[float], seen: list[list[int]]) -> list[int]:
    """The judges where the last position attends to the text like that."""
    queries = asking([text], [seen])
    close(attention_of_the_last(queries)[0, :len(text)], torch.tensor(text), 1e-6)
    return elite_positions(queries, alpha)[0].nonzero()[:, 0].tolist()


def test_the_elite_is_close_to_the_best_of_those_that_see_the_image():
    text, seen = [0.50, 0.20, 0.19, 0.11], [[0, 0], [0, 1], [0, 1], [0, 1]]
    assert elite(0.9, text, seen) == [1, 2]             # the threshold is 0.18, whatever the first token has
    assert elite(1, text, seen) == [1]
    assert elite(0, text, seen) == [1, 2, 3]


def test_judges_see_all_that_the_last_position_sees():
    text = [0.40, 0.25, 0.24, 0.11]
    assert elite(0.9, text, [[0, 1], [0, 2], [0, 2], [0, 2]]) == [1, 2]         # side by side
    assert elite(0.9, text, [[0, 1], [0, 1], [1, 2], [1, 2]]) == [2]            # apart
    assert elite(0.9, [0.40, 0.35, 0.25], [[0, 1], [0, 1], [0, 1], [0, 0]]) == [0]      # the last is padding


def test_in_a_batch_each_sequence_has_its_own_judges():
    """A shorter one, whose padding holds NaN; and one without an image, which has none."""
    queries = asking([[0.50, 0.20, 0.19, 0.11], [0.5, 0.5], [0.25] * 4],
                     [[[0, 0], [0, 1], [0, 1], [0, 1]], [[0, 1], [0, 1], [0, 0], [0, 0]], [[0, 0]] * 4])
    expected = torch.tensor([[0.50, 0.20, 0.19, 0.11], [0.5, 0.5, 0, 0]])
    close(attention_of_the_last(queries)[:2], expected, 1e-6)
    assert elite_positions(queries, 0.9).tolist() == [[False, True, True, False], [True, True, False, False],
                                                      [False] * 4]


def test_what_an_unfinished_answer_left_is_forgotten():
    """In this network a cross-attention layer comes before any text layer: every position judges."""
    network, image, pruner = small_network(3, 4, 4), strong_image(17), AirCache(0.3)
    fresh = forced(network, [PROMPT], image, AirCache(0.3))
    kv = network.language_model.cross_layers[0].keys_values(image)
    text, seen = torch.randn(1, 4, 8, 8), torch.tensor([0, 1]).expand(1, 8, 2)
    pruner.begin(network)
    pruner.layer(0, Queries(text, seen, torch.randn(1, 8, 32), text, text[:, :1]), image, kv)
    again = forced(network, [PROMPT], image, pruner)
    assert torch.equal(again.logits, fresh.logits) and again.answer.kept == fresh.answer.kept


# ----- what a layer is worth


def chosen(scores: list[list[float]], strengths: list[float], **options) -> list[list[int]]:
    """What is kept of one image with these scores in each layer."""
    pruner, n = AirCache(**options), len(scores[0])
    pruner.scores = list(torch.tensor(scores)[:, None])
    pruner.strengths = list(torch.tensor(strengths)[:, None])
    kv = ImageKV(torch.zeros(1, 1, n, 2), torch.zeros(1, 1, n, 2), torch.zeros(1, 1, n, 4, dtype=torch.long))
    return [layer[0].nonzero()[:, 0].tolist() for layer in pruner.choose([kv] * len(scores))]


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


@pytest.mark.parametrize("keep", [0.1, 0.37, 3, 1])
def test_the_sum_is_exact(keep):
    """In a batch, for every sequence, over layers of any share."""
    network, image = small_network(3, 4, 4), strong_image(23)
    run = forced(network, [PROMPT, [I, 7, 8]], image.expand(2), AirCache(keep, 0.5))
    total = 4 * keep if isinstance(keep, int) else math.floor(keep * 4 * 23 + 0.5)
    assert [sum(row) for row in run.answer.kept] == [total, total]


@pytest.mark.parametrize("options", [{"alpha": -0.1}, {"alpha": 1.1}, {"alpha": math.nan}, {"alpha": "high"},
                                   {"strength": "gate"}, {"keep": 0}, {"keep": None}], ids=str)
def test_bad_options_get_one_line(options):
    with refused(f"aircache: {min(options)} is"):
        AirCache(**options)
