"""What several test files share: random weights that hide no path of the network, and random images.

For the pruners: small networks, a run of `generate.generate` that is watched, and the reference that it is
held against, which masks what they drop. B batch, T text tokens, N image tokens, H query heads, G key/value
heads, K = 1 or G sets of kept tokens.
"""
import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from generate import generate, no_one
from model.answer import Answer
from model.config import VisionConfig
from model.decoder import Cache, CrossAttentionLayer, SelfAttentionLayer
from model.image_tokens import Grid, ImageKV, ImageTokens, Queries, Tiles, visible_images
from model.layers import rotary_angles, rotary_frequencies
from model.llama_vision import LlamaVision
from pruning import METHODS, Pruner, load
from pruning.methods import sgl
from pruning.methods.sgl import load_guide
from weights import config_from_dict
from weights.images import ImageProcessor


@pytest.fixture(scope="session")
def randomise() -> Callable[..., nn.Module]:
    """Fills a network, ours or transformers', with random weights; no gate is near 0: that hides its path.

    `unused_tiles` scales what the tables say of tiles that a ratio does not have; official ones hold zeros.
    """
    def fill(network: nn.Module, vision: VisionConfig, seed: int, unused_tiles: float = 0.0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.numel() == 1:                              # the gates
                noise = noise.sign() * (0.4 + noise.abs())
            elif "norm" in name:
                noise = ("bias" not in name) + 0.2 * noise
            elif "patch" in name or "embed" not in name:                 # biases stay as they are
                noise = noise / parameter[0].numel() ** 0.5
            elif "tile_" in name and "embedding.weight" in name:    # a row for each aspect ratio, 0 has none
                rows = noise.unflatten(1, (vision.max_num_tiles, -1))
                rows[0] = 0
                for ratio, (height, width) in enumerate(vision.supported_aspect_ratios, start=1):
                    rows[ratio, height * width:] *= unused_tiles
            parameter.data.copy_(noise)
        return network.eval()
    return fill


@pytest.fixture(scope="session")
def draw() -> Callable[..., Tiles]:
    """Tiles of images with these grids and random pixels, zeros in the slots without a tile."""
    def tiles(grids: list[Grid], vision: VisionConfig, seed: int = 0) -> Tiles:
        side, generator = vision.image_size, torch.Generator().manual_seed(seed)
        pixels = torch.randn(len(grids), vision.max_num_tiles, 3, side, side, generator=generator)
        for image, (rows, columns) in zip(pixels, grids, strict=True):
            image[rows * columns:] = 0
        return Tiles(pixels, torch.tensor(grids).view(-1, 2))
    return tiles


# ----- pruners: small networks to try them on, a run that is watched, and a slow reference


def pytest_addoption(parser: pytest.Parser):
    parser.addoption("--pruner", action="append", default=[], metavar="FILE.py:CLASS",
                     help="hold this method too against the tests that every pruner must pass; repeatable")


def pytest_generate_tests(metafunc: pytest.Metafunc):
    """`make` is each registered or given method with some of its options, as a function of further options."""
    if "make" in metafunc.fixturenames:
        methods, given = [*METHODS, *metafunc.config.getoption("pruner")], metafunc.module
        always = getattr(given, "ALWAYS", {})
        cases = [(method, {**always.get(method, {}), **option}) for method in methods for option in
                 (given.KEEPS[:1] + given.OPTIONS[method] if method in given.OPTIONS else given.KEEPS)]
        if "keeping_all" in metafunc.function.__name__:                 # whatever it was, keep becomes 1.0
            unlike = {str((method, {**option, "keep": 1.0})): (method, option) for method, option in cases}
            cases = list(unlike.values())
        metafunc.parametrize("make", [partial(load, method, **option) for method, option in cases],
                             ids=[" ".join([method, *map(str, option.values())]) for method, option in cases])


IMAGE = 60
torch.set_num_threads(1)            # the networks of these tests are too small to share


@pytest.fixture(scope="session")
def small(randomise) -> Callable[..., LlamaVision]:
    """A random network with 4 query heads, `share` of them to a key/value head, that looks `cross` times."""
    layers = {2: (5, [1, 3]), 3: (6, [1, 3, 5]), 4: (7, [0, 2, 4, 5]), 8: (9, list(range(1, 9))),
              20: (21, list(range(20)))}

    @cache
    def make(seed: int, share: int = 2, cross: int = 2) -> LlamaVision:
        depth, looking = layers[cross]
        config = config_from_dict({
            "model_type": "mllama", "image_token_index": IMAGE,
            "text_config": {"vocab_size": 60, "hidden_size": 32,
                            "intermediate_size": 48, "num_hidden_layers": depth, "num_attention_heads": 4,
                            "num_key_value_heads": 4 // share, "cross_attention_layers": looking},
            "vision_config": {"hidden_size": 16, "intermediate_size": 32, "attention_heads": 2,
                              "image_size": 28, "num_hidden_layers": 3, "num_global_layers": 1,
                              "intermediate_layers_indices": [1, 2]}})
        return randomise(LlamaVision(config), config.vision, seed).requires_grad_(False)
    return make


@pytest.fixture(scope="session")
def see() -> Callable[..., ImageTokens | None]:
    """Encodes random images of these grids, for each batch row; a pruner may shrink them first."""
    def encode(network: LlamaVision, rows: list[list[Grid]], seed: int = 0,
               pruner: Pruner | None = None) -> ImageTokens | None:
        side, generator = network.config.vision.image_size, torch.Generator().manual_seed(seed)
        processor, tiles = ImageProcessor(side), []
        for grids in rows:
            noise = [torch.randint(256, (h * side, w * side, 3), generator=generator) for h, w in grids]
            images = [Image.frombytes("RGB", (p.shape[1], p.shape[0]), bytes(p.flatten().tolist()))
                        for p in noise]
            tiles.append((processor if pruner is None else partial(pruner.preprocess, processor=processor))
                         (images))
        return network.encode(tiles, pruner is not None and pruner.keep_states)
    return encode


@dataclass
class Run:
    """What `generate.generate` did, step by step."""
    answer: Answer
    logits: Tensor                      # [B, steps, V]
    fed: list[int]                      # the tokens of the steps, the same for every row
    read: list[ImageKV]                 # what each cross-attention layer attended to in prefill
    held: list[list[ImageKV]]           # what each of them decodes with, after prefill and every step


@pytest.fixture(scope="session")
def ask() -> Callable[..., Run]:
    """Runs `generate.generate` with new tokens that are given, and watches it."""
    def run(network: LlamaVision, prompts: list[list[int]], image: ImageTokens | None,
            pruner: Pruner | None = None, steps: int = 2) -> Run:
        logits, caches, read, held, fed = [], [], [], [], [7, 30, 11, 52, 9, 41][:steps]

        def prefill(*arguments) -> tuple[Tensor, Cache]:
            first, cache = type(network).prefill(network, *arguments)
            caches.append(cache)
            return first, cache

        def layer(i: int, *arguments) -> tuple[ImageTokens, ImageKV]:
            later, kv = type(pruner).layer(pruner, i, *arguments)
            read.append(kv)
            return later, kv

        def sampler(new: Tensor) -> Tensor:
            logits.append(new)
            held.append(list(caches[0].image_kv))
            return torch.full((len(new),), fed[len(logits) - 1])

        watched = nullcontext() if pruner is None else patch.object(pruner, "layer", layer)
        guided = nullcontext()
        if sgl.load_guide is load_guide:                # the bundled guide fits none of these networks
            guide = copy.deepcopy(network)              # and what this one reads is not watched
            guided = patch.object(sgl, "load_guide", lambda source, device, dtype: guide)
        around = generate if pruner is None else pruner.around(generate)
        with patch.object(network, "prefill", prefill), watched, guided:
            answer = around(network, prompts, image, steps, (), sampler, no_one, pruner, None)
        return Run(answer, torch.stack(logits, dim=1), fed, read, held)
    return run


def columns(kv: ImageKV, row: int, coords: Tensor) -> Tensor:
    """Which of the tokens with these places [N, 4] are in `kv`: [G, N] bool."""
    same = (kv.coords[row][:, :, None] == coords).all(-1)                                         # [K, n, N]
    same = same if kv.mask is None else same & kv.mask[row][:, :, None]
    return same.any(1).expand(kv.key.shape[1], -1)


def offered(layer: CrossAttentionLayer, features: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values by hand: features [N, D] -> two of [G, N, d]."""
    own = layer.cross_attn
    k = own.k_norm(own.k_proj(features).unflatten(-1, (own.kv_heads, -1)))
    return k.transpose(0, 1), own.v_proj(features).unflatten(-1, (own.kv_heads, -1)).transpose(0, 1)


def look(layer: CrossAttentionLayer, x: Tensor, k: Tensor, v: Tensor, inside: Tensor,
         bias: Tensor | None = None) -> Tensor:
    """A cross-attention layer by hand: x [T, D] looks at keys and values [G, N, d] where `inside` [K, T, N]
    says so; `bias` [K, N] is added to the scores."""
    own, normed = layer.cross_attn, layer.input_layernorm(x)
    q = own.q_norm(own.q_proj(normed).unflatten(-1, (own.heads, -1)))                           # [T, H, d]
    k, v = (t.repeat_interleave(own.heads // own.kv_heads, 0) for t in (k, v))                  # [H, N, d]
    scores = torch.einsum("thd,hnd->htn", q, k) / q.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias.repeat_interleave(own.heads // len(bias), 0)[:, None]
    hidden = ~inside.repeat_interleave(own.heads // len(inside), 0)
    h = torch.einsum("htn,hnd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).flatten(1)
    y = x + layer.cross_attn_attn_gate.tanh() * own.o_proj(h)
    y = y + layer.cross_attn_mlp_gate.tanh() * layer.mlp(layer.post_attention_layernorm(y))
    return torch.where(inside.any(-1).all(0)[:, None], y, x)


def left(kv: ImageKV, row: int, seen: Tensor) -> tuple[Tensor, Tensor | None]:
    """Which tokens of `kv` text rows see that see these images [T, 2]: [K, T, N]; and their bias [K, N]."""
    which = kv.coords[row][..., 0][:, None]                                                      # [K, 1, N]
    inside = (which >= seen[:, :1]) & (which < seen[:, 1:])
    return (inside if kv.mask is None else inside & kv.mask[row][:, None],
            None if kv.bias is None else kv.bias[row])


@pytest.fixture(scope="session")
def masked() -> Callable[..., Tensor]:
    """The logits [B, steps, V] of a Run, from the whole image with -inf where its pruner dropped a token; or,
    where it makes one of several, from the keys and values that it left.

    One pass over each row's prompt and new tokens, and over each of its branches: no batch, no cache, and
    nothing is ever dropped.
    """
    @torch.inference_mode()
    def row_logits(network: LlamaVision, run: Run, prompt: list[int], image: ImageTokens | None, row: int,
                   branch: int, merges: bool):
        ids, decoder, depth = torch.tensor(prompt + run.fed[:-1]), network.language_model, 0
        x, frequencies = decoder.embed_tokens(ids), rotary_frequencies(decoder.config, ids.device)
        angles = rotary_angles(torch.arange(len(ids))[None], frequencies)
        real = slice(None) if image is None or image.mask is None else image.mask[row]
        for layer in decoder.layers:
            if isinstance(layer, SelfAttentionLayer):
                x = layer(x[None], angles)[0][0]
            elif image is not None:
                kept = [run.read[depth]] * len(prompt) + [kvs[depth] for kvs in run.held[:-1]]
                seen = visible_images(ids[None], IMAGE)[0]
                if merges:
                    x = torch.cat([look(layer, x[t:t + 1], kv.key[branch], kv.value[branch],
                                        *left(kv, branch, seen[t:t + 1])) for t, kv in enumerate(kept)])
                else:
                    coords = image.coords[row][real]
                    kept = torch.stack([columns(kv, branch, coords) for kv in kept], dim=1)     # [G, T, N]
                    inside = (coords[:, 0] >= seen[:, :1]) & (coords[:, 0] < seen[:, 1:])
                    x = look(layer, x, *offered(layer, image.features[row][real]), kept & inside)
                depth += 1
        return network.lm_head(decoder.norm(x))[len(prompt) - 1:]

    def logits(network: LlamaVision, run: Run, prompts: list[list[int]], image: ImageTokens | None,
               pruner: Pruner = Pruner()) -> Tensor:                        # noqa: B008  it has no state
        branches = len(run.read[0].key) // len(prompts)
        rows = [row_logits(network, run, prompt, image, row, row + branch * len(prompts), pruner.merges)
                for branch in range(branches) for row, prompt in enumerate(prompts)]
        steps = torch.stack(rows).unbind(1)
        return torch.stack([pruner.logits(step)[:len(prompts)] for step in steps], dim=1)
    return logits


@pytest.fixture(scope="session")
def attention_of() -> Callable[..., tuple[Queries, ImageTokens, ImageKV]]:
    """Queries, tokens and keys of one image, and of text that sees all of it, with these attention weights.

    `weights` [H, T, N], a 0 as nearly as a softmax can; `kv_heads` share their keys.
    """
    def make(weights: Tensor, kv_heads: int = 1) -> tuple[Queries, ImageTokens, ImageKV]:
        heads, rows, n = weights.shape
        q = weights.clamp(min=1e-30).log() * n ** 0.5           # keys are unit vectors, and d = N
        coords = torch.tensor([[[0, 0, 0, i] for i in range(n)]])
        key = torch.eye(n).expand(1, kv_heads, n, n)
        image, seen = ImageTokens(torch.arange(n).float().view(1, n, 1), coords), torch.tensor([0, 1])
        return Queries(q[None], seen.expand(1, rows, 2)), image, ImageKV(key, key, coords[:, None])
    return make
