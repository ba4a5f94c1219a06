"""SCOPE against the formulas of its paper (arXiv 2510.24214) and its authors' code, in plain loops.

The reference computes every gain anew in every round, in float64, and takes what the class tokens attend to
from the encoder's modules. What every method promises is in test_pruners.py.
"""
import math
from dataclasses import replace

import pytest
import torch
from helpers import STATES, I, close, encode, noise, random_tiles, refused, small_network
from loops import half_up, softmax
from reference import forced, masked
from torch import Tensor

from model.image_tokens import ImageKV, ImageTokens
from model.llama_vision import LlamaVision
from pruning import hooks
from pruning.methods.scope import Scope, cover

PROMPT = [5, 6, I, 7, 8]
GRIDS = [(1, 1), (1, 3), (2, 2)]


# ----- the reference


def covering(features: list[list[float]], saliency: list[float], n: int) -> list[int]:
    """The n tokens that are kept, in the order in which they are chosen."""
    def cos(x, y):
        xy, xx, yy = (sum(p * q for p, q in zip(*pair, strict=True)) for pair in ((x, y), (x, x), (y, y)))
        return xy / math.sqrt(xx * yy)
    tokens = range(len(features))
    alike = [[cos(features[i], features[j]) for j in tokens] for i in tokens]
    chosen = []
    while len(chosen) < n:
        cover = [max([0.0, *(alike[k][j] for k in chosen)]) for j in tokens]
        scores = {i: saliency[i] * sum(max(0.0, alike[i][j] - cover[j]) for j in tokens)
                  for i in tokens if i not in chosen}
        chosen.append(max(scores, key=scores.get))
    return chosen


def saliency_by_hand(network: LlamaVision, entering: Tensor, is_class: Tensor) -> list[float]:
    """What the class tokens of an image give to each of its tokens, states [n, E], summed over heads."""
    last = network.vision_model.global_transformer.layers[-1]
    heads = last.self_attn.heads
    x = last.input_layernorm(entering)
    q, k = (project(x).unflatten(-1, (heads, -1)).double() for project in
            (last.self_attn.q_proj, last.self_attn.k_proj))                             # [n, H, d]
    received = [0.0] * len(x)
    for h in range(heads):
        for c in is_class.nonzero()[:, 0]:
            weights = softmax(q[c, h].tolist(), k[:, h].tolist())
            received = [total + weight for total, weight in zip(received, weights, strict=True)]
    return received


def reference(network: LlamaVision, image: ImageTokens, own: Tensor, options: Scope) -> list[int]:
    """Which tokens of one image of sequence 0 are kept, as their numbers in the sequence."""
    is_class = image.coords[0, own, 2] < 0
    saliency = saliency_by_hand(network, image.states.entering[0, own], is_class)
    patches = (~is_class).nonzero()[:, 0].tolist()
    features = image.states.features[0, own][patches].double().tolist()
    n = half_up(options.keep, len(own))
    weights = [saliency[i] ** options.alpha for i in patches]
    chosen = [patches[i] for i in covering(features, weights, min(n, len(patches)))]
    chosen += is_class.nonzero()[:, 0].tolist()[:n - len(chosen)]
    return sorted(own[chosen].tolist())


def chosen_of(network: LlamaVision, image: ImageTokens, pruner: Scope) -> Tensor:
    """Which tokens the method keeps, [B, N] bool."""
    pruner.begin(network)
    kv = ImageKV(image.features[:, None], image.features[:, None], image.coords[:, None])
    return pruner.choose(None, image, kv)


# ----- the definition


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 3])
@pytest.mark.parametrize("alpha", [1.0, 0.2, 2.5])
def test_the_definition(keep, alpha):
    network, pruner = small_network(1), Scope(keep, alpha=alpha)
    image = encode(network, [GRIDS], 3, pruner)
    expected = []
    for i in range(len(GRIDS)):
        expected += reference(network, image, (image.coords[0, :, 0] == i).nonzero()[:, 0], pruner)
    assert chosen_of(network, image, pruner)[0].nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize("n", [1, 5, 20, 40])
def test_gains_that_are_kept_up_to_date_are_those_computed_anew(n):
    """Also where many tokens are alike, and where saliency differs by orders of magnitude.

    With equal saliency two tokens that cover nothing but each other would be a tie, which rounding breaks.
    """
    for seed in range(1, 5):
        features = noise(5, 6, seed=seed).repeat(8, 1) + 0.3 * noise(40, 6, seed=seed + 9)
        saliency = noise(40, seed=seed + 5).mul(seed).exp()
        expected = covering(features.double().tolist(), saliency.double().tolist(), n)
        assert cover(features, saliency, n).tolist() == expected


def test_five_tokens_by_hand():
    """Two directions: the larger group comes first, then the other one. What points away is not covered."""
    features = torch.tensor([[1.0, 0], [2, 0], [3, 0], [0, 1], [0, 5]])
    assert cover(features, torch.ones(5), 3).tolist()[:2] == [0, 3]
    assert cover(features, torch.tensor([1, 2, 1, 1, 1.5]), 2).tolist() == [1, 4]
    assert cover(features, torch.tensor([1, 1, 1, 1, 9.0]), 2).tolist() == [4, 0]
    assert cover(-features, torch.ones(5), 2).tolist() == [0, 3]
    opposite = torch.tensor([[1.0, 0], [-1, 0], [-1, 0]])
    assert cover(opposite, torch.ones(3), 2).tolist() == [1, 0]


def test_saliency_is_what_the_class_tokens_attend_to():
    """A patch whose key is that of the queries is chosen first; without saliency another one is."""
    network = small_network(1)
    image = encode(network, [[(1, 1)]], 3, Scope(1))
    first = {int(chosen_of(network, image, Scope(1, alpha=alpha))[0].nonzero()) for alpha in (0.0, 30.0)}
    saliency = saliency_by_hand(network, image.states.entering[0], image.coords[0, :, 2] < 0)
    assert len(first) == 2 and max(range(1, 5), key=saliency.__getitem__) in first


# ----- class tokens


def test_class_tokens_only_fill_up():
    """They are not chosen while there are patches, and none is covered: the first tiles' come first."""
    network = small_network(1)
    image = encode(network, [[(2, 2)]], 4, Scope(1))
    first = image.coords[0, :, 2] < 0
    for keep in range(1, 21):
        kept = chosen_of(network, image, Scope(keep))[0]
        assert int(kept.sum()) == keep and int((kept & first).sum()) == max(0, keep - 16)
    assert chosen_of(network, image, Scope(18))[0, first].tolist() == [True, True, False, False]


# ----- in the network


@pytest.mark.parametrize("full_layers, when", [(0, "prefill"), (1, "prefill"), (0, "boundary")])
def test_inside_the_network(full_layers, when):
    """The tokens that the loops choose; the logits are those of the others masked."""
    network, pruner = small_network(1), Scope(0.4, full_layers=full_layers, when=when)
    image = network.encode([random_tiles([(1, 3)], network.config.vision, seed=3)], keep_states=True)
    pruner.begin(network)
    expected = reference(network, image, torch.arange(image.coords.shape[1]), pruner)
    run = forced(network, [PROMPT], image, pruner, steps=3)
    whole = len(run.read) if when == "boundary" else full_layers
    for kv in run.read[whole:] + [kv for kvs in run.held for kv in kvs]:
        assert kv.coords[0, 0].tolist() == image.coords[0, expected].tolist()
    assert all(kv.coords.shape[2] == image.coords.shape[1] for kv in run.read[:whole])
    close(run.logits, masked(network, run, [PROMPT], image))


def test_padding_is_ignored():
    """Text alone, one image and two; NaN where a sequence has no token. Images choose for themselves."""
    network, pruner = small_network(2), Scope(0.4)
    image = encode(network, [[(1, 2)], [], [(2, 2), (1, 1)]], 1, pruner)
    gone = ~image.mask[..., None]
    assert gone.any()
    states = {name: getattr(image.states, name).masked_fill(gone, math.nan) for name in STATES}
    kept = chosen_of(network, replace(image, states=replace(image.states, **states)), pruner)
    assert not kept[1].any() and not (kept & ~image.mask).any()
    for b, i in (0, 0), (2, 0), (2, 1):
        own = image.coords[b, :, 0] == i
        single = replace(image.states, **{name: value[b:b + 1, own] for name, value in states.items()})
        alone = ImageTokens(image.features[b:b + 1, own], image.coords[b:b + 1, own], None, single)
        assert kept[b, own].tolist() == chosen_of(network, alone, pruner)[0].tolist()


def test_half_precision_is_compared_in_fp32():
    features = noise(30, 8).bfloat16()
    assert torch.equal(cover(features, torch.ones(30), 9), cover(features.float(), torch.ones(30), 9))


def test_the_prompt_is_ignored():
    network, prompts = small_network(1), [[5, I, 6], [I, 30, 31, 32, 33], [9, 9, I]]
    image = encode(network, [[(2, 2)]], 2, Scope(0.5)).expand(3)
    run = forced(network, prompts, image, Scope(0.5))
    assert all(torch.equal(kv.coords[0], kv.coords[b]) for kv in run.read for b in range(3))
    assert run.answer.kept == [[10.0] * 2] * 3
    assert hooks(Scope) == ["begin", "layer", "prefilled"] and Scope.keep_states and not Scope.merges


@pytest.mark.parametrize("options, message", [
    ({"alpha": -0.5}, "alpha is -0.5, but must be at least 0"),
    ({"alpha": math.nan}, "alpha is nan, but must be a number"),
    ({"full_layers": -1}, "full_layers is -1, but must be at least 0")])
def test_bad_options(options, message):
    with refused(f"^scope: {message}$"):
        Scope(**options)
