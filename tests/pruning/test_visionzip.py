"""VisionZip against its definition (arXiv 2412.04467 and its code), in plain loops over tokens.

Also what it shares with PruMerge: what class tokens attend to. What every method promises is in
test_pruners.py.
"""
import math

import pytest
import torch
from encoder_by_hand import (
    GRIDS,
    NETWORK,
    PROMPTS,
    check_layers,
    check_padding,
    cosine,
    last_layer,
    one_image,
    projected,
    random_images,
    received_by_hand,
    token_lists,
)
from helpers import close, random_tiles, refused, small_network
from loops import best, half_up

from model.image_tokens import ImageTokens
from model.llama_vision import LlamaVision
from pruning.encoder_attention import class_attention
from pruning.methods.visionzip import VisionZip
from pruning.select import single_images


def zipped(image: ImageTokens, **options) -> tuple[ImageTokens, list[int]]:
    """What is left of the images, and which token stands for each."""
    pruner = VisionZip(**options)
    pruner.begin(small_network(NETWORK))
    return pruner.encoded(image, PROMPTS), pruner.owners[0][0].tolist()


# ----- the attention of class tokens


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("grids", GRIDS)
def test_the_attention_of_class_tokens(grids, heads):
    layer, image = last_layer(small_network(NETWORK)), random_images(*grids)
    for i, (b, own) in enumerate(single_images(image)):
        tokens, class_tokens = token_lists(image, i)
        assert b == 0 and own.tolist() == tokens and len(class_tokens) == math.prod(grids[i])
        states = image.states.entering[0, own]
        received, key = class_attention(layer, states, image.coords[0, own, 2] < 0, heads)
        queries, keys = projected(layer, states)
        close(received, torch.tensor(received_by_hand(queries, keys, class_tokens, heads)))
        close(key.transpose(0, 1).flatten(1), torch.tensor(keys))
        close(received.sum(), torch.tensor(float(len(class_tokens))))


def test_it_is_what_the_encoder_computes():
    """The queries and keys of its last layer, as its modules made them; padding tokens come behind them."""
    network, seen = small_network(NETWORK), []
    layer = last_layer(network)
    handles = [part.register_forward_hook(lambda module, x, out: seen.append(out[0]))
               for part in (layer.self_attn.q_proj, layer.self_attn.k_proj)]
    image = network.encode([random_tiles([(2, 1)], network.config.vision)], keep_states=True)
    for handle in handles:
        handle.remove()
    for by_hand, own in zip(projected(layer, image.states.entering[0]), seen, strict=True):
        close(torch.tensor(by_hand), own[:10])
    assert len(seen[0]) == 10 < len(seen[1])


# ----- the definition


def by_hand(network: LlamaVision, states, class_tokens: list[int], keep, contextual) -> dict[int, list[int]]:
    """The tokens of one image that stay, and for each contextual one those that are merged with it."""
    layer = last_layer(network)
    heads, n = layer.self_attn.heads, len(states)
    queries, keys = projected(layer, states)
    received = received_by_hand(queries, keys, class_tokens, heads)
    left = half_up(keep, n)
    targets = half_up(contextual, left)
    ranked = [math.inf if t in class_tokens else received[t] for t in range(n)]
    dominant = best(ranked, left - targets)
    others = [t for t in range(n) if t not in dominant]
    step = len(others) // targets
    contextual = [others[k * step] for k in range(targets)]
    d = len(keys[0]) // heads
    means = [[sum(key[h * d + c] for h in range(heads)) / heads for c in range(d)] for key in keys]
    groups = {t: [] for t in dominant + contextual}
    for t in others:
        if t not in contextual:
            groups[max(contextual, key=lambda target, t=t: cosine(means[t], means[target]))].append(t)
    return groups


VARIANTS = [{}, {"contextual": 0.5}, {"contextual": 4}, {"contextual": 1.0}]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("grids", GRIDS)
def test_the_definition(grids, options):
    for seed, keep in enumerate((0.05, 0.25, 0.5, 0.9, 1, 7)):
        image = random_images(*grids, seed=seed)
        left, owner = zipped(image, keep=keep, **options)
        features, expected = image.features[0].double(), {}
        for i in range(len(grids)):
            tokens, class_tokens = token_lists(image, i)
            groups = by_hand(small_network(NETWORK), image.states.entering[0, tokens], class_tokens, keep,
                             **{"contextual": 0.15625} | options)
            assert len(groups) == half_up(keep, len(tokens))
            for t, merged in groups.items():
                own, others = features[tokens[t]], [features[tokens[j]] for j in merged]
                expected[tokens[t]] = (own + sum(others) / len(others)) / 2 if others else own
                assert all(owner[tokens[j]] == tokens[t] for j in [t, *merged])
        assert left.coords[0].tolist() == [image.coords[0, t].tolist() for t in sorted(expected)]
        close(left.features[0].double(), torch.stack([expected[t] for t in sorted(expected)]))
        assert left.bias is None and left.states is None


def test_class_tokens_come_first():
    """All of them, as long as there is room for as many; then those of the first tiles."""
    image = random_images((2, 2), side=4)
    for keep, expected in (20, 4), (5, 4), (4, 3), (2, 1):
        left, _ = zipped(image, keep=keep)
        tiles = left.coords[0][left.coords[0, :, 2] < 0][:, 1].tolist()
        assert tiles[:expected] == list(range(expected))


def test_bias():
    """ln of how many tokens each one stands for; the tokens are the same."""
    image = random_images((2, 2), (1, 2))
    plain, _ = zipped(image, keep=0.3)
    left, owner = zipped(image, keep=0.3, bias=True)
    assert torch.equal(left.features, plain.features) and torch.equal(left.coords, plain.coords)
    sizes = [owner.count(t) for t in range(len(owner)) if owner[t] == t]
    close(left.bias[0], torch.tensor(sizes).log())
    assert max(sizes) > 2 and sum(sizes) == len(owner)


# ----- several images, padding


def test_each_image_is_zipped_by_itself():
    image = random_images((1, 2), (2, 2), (1, 1))
    left, _ = zipped(image, keep=0.4)
    for i in range(3):
        single, _ = zipped(one_image(image, i), keep=0.4)
        close(left.features[0, left.coords[0, :, 0] == i], single.features[0])


def test_padding_is_ignored():
    check_padding(VisionZip(0.4))


def test_nothing_changes_where_all_are_kept():
    image = random_images((2, 2), (1, 3))
    assert VisionZip(1.0).keeps_all
    assert zipped(image, keep=1.0)[0] is image and zipped(image, keep=1000)[0] is image


def test_every_layer_reads_what_is_left():
    check_layers(VisionZip(0.3))


@pytest.mark.parametrize("value", [0.0, 1.5, 0, -3])
def test_bad_options(value):
    with refused("^visionzip: contextual is .*, but must be a fraction above 0 and at most 1.0, or a whole"):
        VisionZip(contextual=value)
