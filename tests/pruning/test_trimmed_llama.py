"""Trimmed Llama against the formulas of its paper (arXiv 2504.00557), written out in plain loops.

The reference computes its own queries and keys from the weights of the first cross-attention layer, in
float64, and takes the tokens that it chose from the whole image with a mask. What the paper leaves open and
we decided is here too. What is pruned and what that saves is in test_trimmed_llama_savings.py; what every
method promises is in test_pruners.py.
"""
import math
import random
from dataclasses import replace

import pytest
import torch
from helpers import CROSS, SHARES, I, attention_of, close, kept, random_image, refused, small_network
from loops import half_up
from reference import forced, masked
from torch import Tensor

from model.decoder import SelfAttentionLayer
from model.image_tokens import ImageKV
from model.layers import rotary_angles, rotary_frequencies
from model.llama_vision import LlamaVision
from pruning import load
from pruning.methods.trimmed_llama import TrimmedLlama
from pruning.select import num_kept

# ----- the paper's formulas


def norm(x: list[float], weight: list[float], eps: float) -> list[float]:
    scale = 1 / math.sqrt(sum(v * v for v in x) / len(x) + eps)
    return [v * scale * w for v, w in zip(x, weight, strict=True)]


def times(weight: list[list[float]], x: list[float]) -> list[float]:
    return [sum(w * v for w, v in zip(line, x, strict=True)) for line in weight]


def attention(network: LlamaVision, prompt: list[int], features: Tensor) -> list[list[list[float]]]:
    """Weights [H][positions from the image on][N] of the first cross-attention layer, in float64."""
    decoder = network.language_model
    ids = torch.tensor([prompt])
    x = decoder.embed_tokens(ids)
    angles = rotary_angles(torch.arange(len(prompt))[None], rotary_frequencies(decoder.config, ids.device))
    first = decoder.cross_layers[0]
    for layer in decoder.layers:
        if not isinstance(layer, SelfAttentionLayer):
            break
        x = layer(x, angles)[0]
    own, eps, d = first.cross_attn, decoder.config.rms_norm_eps, decoder.config.head_dim
    wq, wk = own.q_proj.weight.tolist(), own.k_proj.weight.tolist()
    states = [norm(state, first.input_layernorm.weight.tolist(), eps)
              for state in x[0, prompt.index(I):].tolist()]
    asked = [times(wq, state) for state in states]
    offered = [times(wk, f) for f in features.tolist()]
    result = []
    for h in range(own.heads):
        g = h // (own.heads // own.kv_heads)
        queries = [norm(q[h * d:h * d + d], own.q_norm.weight.tolist(), eps) for q in asked]
        keys = [norm(k[g * d:g * d + d], own.k_norm.weight.tolist(), eps) for k in offered]
        result.append([])
        for q in queries:
            powers = [math.exp(sum(a * b for a, b in zip(q, k, strict=True)) / math.sqrt(d)) for k in keys]
            result[-1].append([power / sum(powers) for power in powers])
    return result


def selected(weights: list[list[list[float]]], ratio: float) -> list[int]:
    """The union over the heads of each one's top k, of the plain sum over query positions."""
    union = set()
    for head in weights:
        importance = [sum(weights[i] for weights in head) for i in range(len(head[0]))]
        k = max(1, math.floor(ratio * len(importance) + 0.5))
        union |= set(sorted(range(len(importance)), key=lambda i: (-importance[i], i))[:k])
    return sorted(union)


@pytest.mark.parametrize("seed", range(50))
def test_the_papers_formulas(seed):
    """50 random networks, prompts and images: the same tokens, and the logits of the masked network."""
    chance = random.Random(seed)
    network = small_network(seed, SHARES[seed % 3], CROSS[seed // 3 % 3])
    prompt = [chance.randrange(60) for _ in range(chance.randint(1, 6))]
    prompt.insert(chance.randrange(len(prompt) + 1), I)
    image = random_image(chance.randint(6, 16), seed=seed)
    ratio = chance.choice([0.05, 0.1, 0.15, 0.2, 0.25, 0.4])
    run = forced(network, [prompt], image, TrimmedLlama(ratio), steps=3)
    expected = selected(attention(network, prompt, image.features[0]), ratio)
    everything = list(range(image.features.shape[1]))
    assert [kept(kv, image) for kv in run.read] == [everything] + [expected] * (len(run.read) - 1)
    assert all(kept(kv, image) == expected for kvs in run.held for kv in kvs)
    assert run.answer.kept == [[float(len(expected))] * len(run.read)]
    nothing = torch.zeros(1, 4 // SHARES[seed % 3], len(expected), 8)
    chosen = ImageKV(nothing, nothing, image.coords[:, expected][:, None])
    ours = replace(run, read=run.read[:1] + [chosen] * (len(run.read) - 1),
                   held=[[chosen] * len(run.read)] * len(run.held))
    close(run.logits, masked(network, ours, [prompt], image))


def choose(weights: Tensor, kv_heads: int = 1, **settings) -> list[int]:
    """What is kept of an image that is attended to with these weights [H, T, N]."""
    queries, image, kv = attention_of(weights, kv_heads)
    return load("trimmed_llama", **settings).layer(0, queries, image, kv)[0].features[0, :, 0].int().tolist()


def votes(*heads: list[int], tokens: int) -> Tensor:
    """Weights [H, 1, N] of heads that each attend to these tokens, most to the first of them."""
    weights = torch.full((len(heads), 1, tokens), 0.001)
    for head, tokens_of in enumerate(heads):
        weights[head, 0, tokens_of] = torch.arange(len(tokens_of) + 1, 1, -1.0)
    return weights / weights.sum(-1, keepdim=True)


def test_the_toy_example_of_the_appendix():
    """32 image tokens, K_ratio 0.25: 8 a head, kept if any head selects it."""
    heads = [[0, 1, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7, 8, 9, 10, 11], [31, 30, 29, 28, 3, 2, 1, 0],
             [0, 9, 16, 17, 18, 28, 30, 31]]
    union = choose(votes(*heads, tokens=32), keep=0.25)
    assert union == sorted(set().union(*heads))
    assert len(union) == 32 - sum(not any(i in head for head in heads) for i in range(32)) == 19
    assert choose(votes(*heads[:1] * 4, tokens=32), keep=0.25) == heads[0]                # R = k / N


def test_it_is_the_sum_over_positions_not_the_highest():
    weights = torch.tensor([[[0.6, 0.3, 0.1], [0.0, 0.45, 0.55]]])
    assert choose(weights, keep=1) == [1]


def test_it_is_the_union_over_heads():
    weights = votes([0, 3], [3, 5], tokens=8)
    assert choose(weights, keep=0.25) == [0, 3, 5]
    assert choose(votes([7], [7], tokens=8), keep=1) == [7]


def test_ties_go_to_the_first():
    assert choose(torch.full((4, 3, 8), 1 / 8), keep=0.25) == [0, 1]


@pytest.mark.parametrize("seed", range(4))
def test_bounds_and_nesting(seed):
    """K_ratio <= R <= H K_ratio; a higher ratio keeps what a lower one kept, and more."""
    network, image = small_network(seed, SHARES[seed % 3]), random_image(40, seed=seed)
    before: list[int] = []
    for ratio in 0.05, 0.1, 0.15, 0.2, 0.25, 0.5, 0.99:
        run = forced(network, [[5, I, 6, 7, 8]], image, TrimmedLlama(ratio))
        union, k = kept(run.read[-1], image), half_up(ratio, 40)
        assert k <= len(union) <= min(40, 4 * k) and set(before) <= set(union)
        before = union
    assert run.answer.kept == [[40, 40]]


def test_votes_on_real_sizes():
    for tokens, expected in (1601, [400, 320, 240, 160, 80]), (6404, [1601, 1281, 961, 640, 320]):
        sizes = [int(num_kept(ratio, torch.tensor(tokens))) for ratio in (0.25, 0.2, 0.15, 0.1, 0.05)]
        assert sizes == expected


# ----- ours


def test_a_vote_for_each_key_value_head():
    """The mean over the query heads of a key/value head: one of two strong votes loses to two weak ones."""
    weights = torch.tensor([[0.60, 0.40, 0.00, 0.00], [0.00, 0.40, 0.60, 0.00],
                            [0.55, 0.05, 0.00, 0.40], [0.05, 0.55, 0.00, 0.40]])[:, None]
    assert choose(weights, 2, keep=1) == [0, 1, 2]
    assert choose(weights, 2, keep=1, per="kv_head") == [1, 3]


def test_a_budget_keeps_the_best_of_the_union():
    """By the highest vote of any head; never more than the union."""
    weights = votes([0, 3], [3, 5], [6, 7], tokens=8)
    assert choose(weights, keep=0.25) == [0, 3, 5, 6, 7]
    for budget, best in (3, [0, 3, 6]), (0.375, [0, 3, 6]), (1, [0]), (4, [0, 3, 5, 6]), (8, [0, 3, 5, 6, 7]):
        assert choose(weights, keep=0.25, budget=budget) == best


@pytest.mark.parametrize("keep", [1.0, 20], ids=["all", "all 20"])
def test_a_budget_counts_also_where_every_head_may_vote_for_all(keep):
    pruner = TrimmedLlama(keep, budget=0.5)
    run = forced(small_network(2), [[I, 5, 6]], random_image(20, seed=2), pruner)
    assert run.answer.kept == [[10.0, 10.0]]


@pytest.mark.parametrize("budget", [0, 0.0, -1, 1.5, True, "half", math.nan], ids=str)
def test_a_bad_budget_gets_one_line(budget):
    with refused("budget"):
        TrimmedLlama(budget=budget)


@pytest.mark.parametrize("seed", range(3))
def test_the_same_set_for_decoding_alone(seed):
    """`when="boundary"`: the prompt is read with everything, and every cache is cut afterwards."""
    network, image, prompt = small_network(seed, SHARES[seed], 3), random_image(20, seed=seed), [5, I, 6, 7]
    now, later, plain = (forced(network, [prompt], image, p) for p in
                         (TrimmedLlama(0.1), TrimmedLlama(0.1, when="boundary"), None))
    assert torch.equal(later.logits[:, 0], plain.logits[:, 0])
    assert all(kv.key.shape[2] == 20 for kv in later.read)
    assert [kept(kv, image) for kv in later.held[0]] == [kept(kv, image) for kv in now.held[0]]
    assert (later.logits[:, 1] - plain.logits[:, 1]).abs().max() > 1e-4


def test_no_full_layer_reads_what_is_kept_alone():
    """The same choice, but the first layer too attends to nothing else, in prefill already."""
    network, image, prompt = small_network(1), random_image(20, seed=1), [I, 5, 6]
    usual, strict = (forced(network, [prompt], image, TrimmedLlama(0.1, full_layers=n)) for n in (1, 0))
    assert [kept(kv, image) for kv in strict.held[0]] == [kept(kv, image) for kv in usual.held[0]]
    assert usual.read[0].key.shape[2] == 20 > strict.read[0].key.shape[2]
    assert (usual.logits[:, 0] - strict.logits[:, 0]).abs().max() > 1e-4


@pytest.mark.parametrize("layers, words", [(-1, "at least 0"), (3, "0 to 2")])
def test_full_layers_that_the_network_lacks(layers, words):
    with refused(f"full_layers is {layers}, but must be {words}"):
        forced(small_network(1), [[I, 5]], random_image(20, seed=1), TrimmedLlama(full_layers=layers))


def test_what_it_says_of_itself():
    assert str(TrimmedLlama(0.2)).startswith("trimmed_llama, keep 0.2 per head")
    assert "per kv_head" in str(TrimmedLlama(per="kv_head")) and "budget 9" in str(TrimmedLlama(budget=9))
