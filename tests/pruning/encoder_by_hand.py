"""What methods read of the encoder's last global layer, in plain loops and float64; images to try them on,
and checks of what those that merge before the decoder have in common.

n tokens of one image, E width of the encoder, H heads, d head width.
"""
import math
from dataclasses import replace

import torch
from helpers import STATES, I, encode, kept, noise, small_network, tile_coords
from loops import softmax
from reference import forced
from torch import Tensor

from model.image_tokens import EncoderStates, ImageTokens, Tiles
from model.llama_vision import LlamaVision
from model.vision import VisionLayer
from pruning import Pruner

NETWORK = 1                                         # seed
GRIDS = [(1, 1), (2, 2)], [(1, 3)], [(2, 1), (1, 1), (1, 2)]
PROMPTS = [[I]]


def random_images(*grids: tuple[int, int], side: int = 3, seed: int = 0) -> ImageTokens:
    """Encoded images of these grids in one sequence, with random features and states."""
    coords = torch.tensor([place for image, grid in enumerate(grids)
                           for place in tile_coords(math.prod(grid), side, image)])[None]
    features, entering = noise(2, 1, coords.shape[1], 16, seed=seed)    # as wide as the encoder of helpers.py
    tiles = Tiles(torch.zeros(len(grids), 4, 3, 1, 1), torch.tensor(grids))
    return ImageTokens(features, coords, None, EncoderStates([tiles], features, entering, entering))


def last_layer(network: LlamaVision) -> VisionLayer:
    return network.vision_model.global_transformer.layers[-1]


def projected(layer: VisionLayer, states: Tensor) -> tuple[list[list[float]], list[list[float]]]:
    """Queries and keys of states [n, E], all heads side by side: two lists of n lists of E numbers."""
    norm = layer.input_layernorm
    normed = []
    for state in states.double():
        off = state - state.mean()
        normed.append(off / (off.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias)
    parts = layer.self_attn.q_proj, layer.self_attn.k_proj
    return tuple([(part.weight.double() @ x).tolist() for x in normed] for part in parts)


def received_by_hand(queries, keys, class_tokens: list[int], heads: int) -> list[float]:
    """The attention that each token gets: a sum over class tokens, a mean over heads."""
    received, d = [0.0] * len(keys), len(keys[0]) // heads
    for t in class_tokens:
        for h in range(heads):
            own = slice(h * d, (h + 1) * d)
            for j, weight in enumerate(softmax(queries[t][own], [key[own] for key in keys])):
                received[j] += weight / heads
    return received


def cosine(a: list[float], b: list[float]) -> float:
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths


def token_lists(image: ImageTokens, i: int) -> tuple[list[int], list[int]]:
    """The tokens of image i of the only sequence; and which of these, counted from 0, are class tokens."""
    own = [t for t, place in enumerate(image.coords[0].tolist()) if place[0] == i]
    return own, [k for k, t in enumerate(own) if image.coords[0, t, 2] < 0]


def one_image(image: ImageTokens, i: int) -> ImageTokens:
    """Image i of the only sequence, as if it were the only one."""
    own, _ = token_lists(image, i)
    states = replace(image.states, **{name: getattr(image.states, name)[:, own] for name in STATES})
    coords = image.coords[:, own] * torch.tensor([0, 1, 1, 1])
    return ImageTokens(image.features[:, own], coords, None, states)


def spoiled(image: ImageTokens) -> ImageTokens:
    """The same with NaN where a sequence has no token."""
    gone = ~image.mask[..., None]
    states = {name: getattr(image.states, name).masked_fill(gone, math.nan) for name in STATES}
    return replace(image, features=image.features.masked_fill(gone, math.nan),
                   states=replace(image.states, **states))


# ----- checks of a method


def check_padding(pruner: Pruner):
    """It is ignored, with NaN where a sequence has no token."""
    network = small_network(NETWORK)
    image = encode(network, [[(1, 2)], [], [(2, 2), (1, 1)]], pruner=pruner)
    pruner.begin(network)
    clean, left = (pruner.encoded(each, PROMPTS) for each in (image, spoiled(image)))
    assert torch.equal(clean.mask, left.mask) and not left.mask[1].any()
    assert torch.equal(clean.features[left.mask], left.features[left.mask])


def check_layers(pruner: Pruner):
    """Every layer reads what is left, in prefill and in decoding; `keep` is 0.3."""
    network, prompt = small_network(NETWORK), [5, 6, I, 7, 8]
    image = encode(network, [[(2, 2)]], pruner=pruner)
    run = forced(network, [prompt], image, pruner)
    left = pruner.encoded(image, PROMPTS)
    number = {tuple(place): t for t, place in enumerate(image.coords[0].tolist())}
    expected = [number[tuple(place)] for place in left.coords[0].tolist()]
    assert all(kept(kv, image) == expected for kv in run.read + run.held[-1])
    assert run.answer.kept == [[6.0] * len(run.read)]
    assert pruner.keep_states and pruner.merges
