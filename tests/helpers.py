"""What several test files share: checks, small random networks, random images, and what is kept of them.

B batch, T text tokens, N image tokens, H query heads, G key/value heads, d head width, K = 1 or G sets of
kept tokens (one for all heads, or one for each key/value head).
"""
import copy
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from generate import generate
from model.config import VisionConfig
from model.image_tokens import Grid, ImageKV, ImageTokens, Queries, Tiles
from model.llama_vision import LlamaVision
from pruning import Pruner, hooks
from weights import config_from_dict
from weights.images import ImageProcessor

I = 60                                  # noqa: E741  the image token of the small networks, as prompts show it
SHARES = 1, 2, 4                        # query heads to a key/value head, by seed
CROSS = 2, 3, 4                         # cross-attention layers, by seed
WIDTH = 32                              # D of the small networks
LAYERS = {2: (5, [1, 3]), 3: (6, [1, 3, 5]), 4: (7, [0, 2, 4, 5]), 8: (9, list(range(1, 9))),
          20: (21, list(range(20)))}    # cross-attention layers: all layers, and which look at the image

# ----- checks


def close(a: Tensor, b: Tensor, atol: float = 1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@contextmanager
def refused(match: str = "", parts: Iterable[str] = (), longest: int = 400) -> Iterator[None]:
    """The body raises ValueError with one line of bounded length, where `match` is found, and all `parts`."""
    with pytest.raises(ValueError) as error:
        yield
    message = str(error.value)
    assert message.isprintable() and 0 < len(message) < longest, message
    assert re.search(match, message), message
    for part in parts:
        assert part in message, (part, message)


# ----- random networks


def randomise(network: nn.Module, vision: VisionConfig, seed: int, unused_tiles: float = 0.0) -> nn.Module:
    """Fill a network, ours or transformers', with random weights; no gate is near 0: that would hide a path.

    `unused_tiles` scales what the tables say of tiles that a ratio does not have; official ones hold zeros.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.numel() == 1:                              # the gates
            drawn = drawn.sign() * (0.4 + drawn.abs())
        elif "norm" in name:
            drawn = ("bias" not in name) + 0.2 * drawn
        elif "patch" in name or "embed" not in name:            # biases stay as they are
            drawn = drawn / parameter[0].numel() ** 0.5
        elif "tile_" in name and "embedding.weight" in name:    # a row for each aspect ratio, 0 has none
            rows = drawn.unflatten(1, (vision.max_num_tiles, -1))
            rows[0] = 0
            for ratio, (height, width) in enumerate(vision.supported_aspect_ratios, start=1):
                rows[ratio, height * width:] *= unused_tiles
        parameter.data.copy_(drawn)
    return network.eval()


@cache
def small_network(seed: int, share: int = 2, cross: int = 2) -> LlamaVision:
    """A random network with 4 query heads, `share` of them to a key/value head, and `cross` layers that look
    at the image."""
    depth, looking = LAYERS[cross]
    config = config_from_dict({
        "model_type": "mllama", "image_token_index": I,
        "text_config": {"vocab_size": 60, "hidden_size": WIDTH, "intermediate_size": 48,
                        "num_hidden_layers": depth, "num_attention_heads": 4,
                        "num_key_value_heads": 4 // share, "cross_attention_layers": looking},
        "vision_config": {"hidden_size": 16, "intermediate_size": 32, "attention_heads": 2, "image_size": 28,
                          "num_hidden_layers": 3, "num_global_layers": 1,
                          "intermediate_layers_indices": [1, 2]}})
    return randomise(LlamaVision(config), config.vision, seed).requires_grad_(False)


@cache
def in_bfloat16(network: LlamaVision) -> LlamaVision:
    return copy.deepcopy(network).bfloat16()


# ----- random images


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_tiles(grids: list[Grid], vision: VisionConfig, seed: int = 0) -> Tiles:
    """Tiles of images with these grids and random pixels, zeros in the slots without a tile."""
    side = vision.image_size
    pixels = noise(len(grids), vision.max_num_tiles, 3, side, side, seed=seed)
    for image, (rows, columns) in zip(pixels, grids, strict=True):
        image[rows * columns:] = 0
    return Tiles(pixels, torch.tensor(grids).view(-1, 2))


@cache
def drawn_images(sequences: tuple[tuple[Grid, ...], ...], side: int, seed: int) -> list[list[Image.Image]]:
    """Random images that the image processor cuts into these grids, for each sequence."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for grids in sequences:
        images.append([])
        for rows, columns in grids:
            pixels = torch.randint(256, (rows * side, columns * side, 3), generator=generator)
            images[-1].append(Image.frombytes("RGB", (columns * side, rows * side),
                                              bytes(pixels.flatten().tolist())))
    return images


def encode(network: LlamaVision, sequences: list[list[Grid]], seed: int = 0,
           pruner: Pruner | None = None) -> ImageTokens | None:
    """Random images of these grids, encoded, for each sequence; a pruner may make them smaller first."""
    sequences = tuple(map(tuple, sequences))
    keep_states = pruner is not None and pruner.keep_states
    if pruner is None or "preprocess" not in hooks(type(pruner)):
        return copy.deepcopy(encoded_once(network, sequences, seed, keep_states))
    side = network.config.vision.image_size
    tiles = [pruner.preprocess(own, ImageProcessor(side)) for own in drawn_images(sequences, side, seed)]
    return network.encode(tiles, keep_states)


@cache
def encoded_once(network: LlamaVision, sequences: tuple[tuple[Grid, ...], ...], seed: int,
                 keep_states: bool) -> ImageTokens | None:
    processor = ImageProcessor(network.config.vision.image_size)
    images = drawn_images(sequences, processor.tile_size, seed)
    return network.encode([processor(own) for own in images], keep_states)


def random_image(*tokens: int, seed: int = 0, scale: float = 1.0, batch: int = 1) -> ImageTokens:
    """Images of random features, with this many tokens each, in every sequence."""
    coords = [[image, i // 5, -1 + i % 5, 0] for image, n in enumerate(tokens) for i in range(n)]
    features = scale * noise(batch, len(coords), WIDTH, seed=seed)
    return ImageTokens(features, torch.tensor([coords]).expand(batch, -1, -1))


def tile_coords(tiles: int, side: int, image: int = 0) -> list[list[int]]:
    """The coords of an image's tokens in the encoder's order: each tile's class token, then its patches."""
    where = [(-1, -1)] + [(row, column) for row in range(side) for column in range(side)]
    return [[image, tile, *place] for tile in range(tiles) for place in where]


def batch_of(*images: ImageTokens | None) -> ImageTokens:
    """The images of single sequences side by side, padded; None for a sequence without an image."""
    longest = max(image.coords.shape[1] for image in images if image is not None)
    features = torch.zeros(len(images), longest, WIDTH)
    coords = torch.full((len(images), longest, 4), -1)
    mask = torch.zeros(len(images), longest, dtype=torch.bool)
    for b, image in enumerate(images):
        if image is not None:
            n = image.coords.shape[1]
            features[b, :n] = image.features[0]
            coords[b, :n] = image.coords[0]
            mask[b, :n] = True
    return ImageTokens(features, coords, mask)


STATES = "features", "entering", "attended"         # of EncoderStates


def greedy(network: LlamaVision, prompts: list[list[int]], image: ImageTokens | None,
           steps: int) -> tuple[list[list[int]], Tensor]:
    """The likeliest new tokens of each prompt, and the logits [B, steps, V] that they were chosen from."""
    seen = []

    def sample(logits: Tensor) -> Tensor:
        seen.append(logits)
        return logits.argmax(-1)
    answer = generate(network, prompts, image, steps, (), sample)
    return answer.tokens, torch.stack(seen, dim=1)


def alone(image: ImageTokens, b: int) -> ImageTokens | None:
    """The images of one sequence of a batch, as they are without the others: no padding."""
    one = image.select([b])
    if one is None:
        return None
    real = slice(None) if image.mask is None else image.mask[b]
    coords = one.coords[:, real]
    states = one.states
    if states is not None:
        states = replace(states, **{name: getattr(states, name)[:, real] for name in STATES})
    return ImageTokens(one.features[:, real], coords, None, states)


def attention_of(weights: Tensor, kv_heads: int = 1) -> tuple[Queries, ImageTokens, ImageKV]:
    """Queries, tokens and keys of one image, and of text that sees all of it, with these attention weights.

    `weights` [H, T, N], a 0 as nearly as a softmax can; `kv_heads` share their keys. The only feature of a
    token is its number.
    """
    _, T, N = weights.shape
    q = weights.clamp(min=1e-30).log() * N ** 0.5               # keys are unit vectors, and d = N
    coords = torch.tensor([[[0, 0, 0, i] for i in range(N)]])
    key = torch.eye(N).expand(1, kv_heads, N, N)
    image = ImageTokens(torch.arange(N).float().view(1, N, 1), coords)
    seen = torch.tensor([0, 1]).expand(1, T, 2)
    return Queries(q[None], seen), image, ImageKV(key, key, coords[:, None])


# ----- what is kept


def keeping_all(make) -> Pruner:
    """With every token kept. A budget or a threshold beside it would still do something: left out."""
    return make(keep=1.0, **{option: None for option in ("budget", "threshold") if option in make.keywords})


def kept_sets(kv: ImageKV, image: ImageTokens, b: int = 0) -> list[list[int]]:
    """Which tokens of the images of sequence b each set of `kv` holds, as their numbers: K lists."""
    coords = image.coords[b] if image.mask is None else image.coords[b][image.mask[b]]
    number = {tuple(place): i for i, place in enumerate(coords.tolist())}
    mask = torch.ones(kv.coords.shape[:3], dtype=torch.bool) if kv.mask is None else kv.mask
    mask = mask.expand(-1, kv.coords.shape[1], -1)
    return [[number[tuple(place)] for place in places[real].tolist()]
            for places, real in zip(kv.coords[b], mask[b], strict=True)]


def kept(kv: ImageKV, image: ImageTokens, b: int = 0) -> list[int]:
    """The same where all heads have one set."""
    only, = kept_sets(kv, image, b)
    return only


@contextmanager
def dropped_is_nan(method: type[Pruner], choice: str = "choose") -> Iterator[list[int]]:
    """Features of tokens that a method did not choose become NaN at once, and nothing may depend on them.

    `choice` is the name of its method(something, ImageTokens, ...) -> kept. Yields how many there were.
    """
    honest, dropped = getattr(method, choice), []

    def choose(self: Pruner, first: object, image: ImageTokens, *rest: object) -> Tensor:
        kept = honest(self, first, image, *rest)
        image.features[~kept] = math.nan
        dropped.append(int((~kept).sum()))
        return kept
    with patch.object(method, choice, choose):
        yield dropped
