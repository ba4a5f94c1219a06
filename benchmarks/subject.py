"""What is measured: a real model or a random one of any shape, whole or a slice, images and prompts for it.

A slice of N layers keeps the first N decoder layers as they are, cross-attention where the shape has it, and
at most two local and two global vision layers, every local one tapped. So `--layers 5` of 11b
is 4 self- and 1 cross-attention layer and 2 vision layers of each kind. Embedding, head and projector stay.
Random weights have the scale that keeps activations finite through any depth, all gates open.
B batch, T text tokens, N image tokens, D model width.
"""
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.measure import timed
from model.cache import Cache
from model.config import Config, RopeScaling, TextConfig, VisionConfig
from model.image_tokens import Grid, ImageKV, ImageTokens, Queries, Tiles
from model.llama_vision import LlamaVision
from pruning import Pruner, Wrapper
from weights import find_checkpoint, read_config
from weights.images import ImageProcessor

ELEVEN = Config(VisionConfig(image_size=560), TextConfig(rope_scaling=RopeScaling()))
NINETY = replace(ELEVEN, text=replace(
    ELEVEN.text, hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_hidden_layers=100,
    cross_attention_layers=tuple(range(3, 100, 5))))
SHAPES: dict[str, Callable[[], Config]] = {
    "11b": lambda: ELEVEN, "90b": lambda: NINETY,
    "11b-base": lambda: replace(ELEVEN, vision=VisionConfig()),         # base models: tiles of 448 pixels
    "90b-base": lambda: replace(NINETY, vision=VisionConfig()),
    "tiny": lambda: read_config(find_checkpoint("tiny"))}
VISION_LAYERS = 2                               # of each kind, in a slice
BEFORE_IMAGE = 5                                # prompt tokens before the image, as chat templates have it
NOISE = 1_000_003                               # a prime: rows of weights that repeat it are never alike


def cut(config: Config, layers: int) -> Config:
    """A slice of `layers` decoder layers. Raises ValueError where no layer of it looks at the image."""
    text, vision = config.text, config.vision
    if layers > text.num_hidden_layers:
        raise ValueError(f"--layers {layers}: the whole decoder has {text.num_hidden_layers}")
    if layers == text.num_hidden_layers:
        return config
    if layers <= (first := text.cross_attention_layers[0]):
        raise ValueError(f"--layers {layers}: no layer of it looks at the image; give at least {first + 1}")
    local = min(VISION_LAYERS, vision.num_hidden_layers)
    return replace(
        config, text=replace(text, num_hidden_layers=layers, cross_attention_layers=tuple(
            i for i in text.cross_attention_layers if i < layers)),
        vision=replace(vision, num_hidden_layers=local, intermediate_layers_indices=tuple(range(local)),
                       num_global_layers=min(VISION_LAYERS, vision.num_global_layers)))


def random_model(config: Config, device: torch.device, dtype: torch.dtype, seed: int = 0) -> LlamaVision:
    """A LlamaVision with random weights, made on the device, without a second copy of any."""
    with torch.device("meta"):
        model = LlamaVision(config)
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.randn(NOISE, generator=generator, device=device).to(dtype)
    state = {name: torch.empty(like.shape, dtype=dtype, device=device)
             for name, like in model.state_dict().items()}
    for name, weight in state.items():
        fill(name, weight, noise)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def fill(name: str, weight: Tensor, noise: Tensor):
    """Noise of the scale that keeps a layer's output like its input; norms are 1, gates open, biases 0, and
    so are the tables of tile positions: official ones hold zeros for unused tiles."""
    if weight.numel() == 1:
        weight.fill_(0.5)
    elif "norm" in name or "bias" in name or "tile_" in name:
        weight.fill_(1.0 if "norm" in name and "bias" not in name else 0.0)
    else:
        scaled = noise * (weight[0].numel() if weight.ndim > 1 else weight.numel()) ** -0.5
        for part in weight.view(-1).split(len(noise)):
            part.copy_(scaled[:len(part)])


@dataclass
class Subject:
    """A model to measure, and what to ask it."""
    model: LlamaVision
    shape: str                                  # for people: 11b, tiny, or the name of a checkpoint
    whole: Config                               # of which the model may be a slice

    @property
    def config(self) -> Config:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.lm_head.weight.dtype

    def compiled(self) -> Callable[[Tensor, Cache], Tensor]:
        """Our decode step, compiled anew; imported here, for a compiler takes seconds to import."""
        from model.compiled import Compiled
        return Compiled(self.model.decode, self.device)

    def tiles(self, count: int, pruner: Pruner) -> Tiles:
        """A random image that fills `count` tiles, on the device, as the pruner's `preprocess` leaves it."""
        vision, (rows, columns) = self.config.vision, grid_of(self.config.vision, count)
        side, generator = vision.image_size, torch.Generator().manual_seed(count)
        shape = rows * side, columns * side, 3
        noise = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        image = Image.frombytes("RGB", (shape[1], shape[0]), bytes(noise.flatten().tolist()))
        tiles = pruner.preprocess([image], ImageProcessor(
            side, max_tiles=vision.max_num_tiles, canvases=vision.supported_aspect_ratios))
        return Tiles(tiles.pixels.to(self.device, self.dtype), tiles.grid)

    def prompt(self, batch: int, tokens: int, image: bool = True) -> Tensor:
        """Token ids [B, T]: random text with the image's token where a chat has it, or without one."""
        text, generator = self.config.text, torch.Generator().manual_seed(tokens)
        ids = torch.randint(text.vocab_size, (batch, tokens), generator=generator)
        ids[ids == self.config.image_token_index] = 0
        if image:
            ids[:, min(BEFORE_IMAGE, tokens - 1)] = self.config.image_token_index
        return ids.to(self.device)

    def project(self, image: ImageTokens) -> Callable[[], None]:
        """A job: the projector, and keys and values of every cross-attention layer."""
        states = self.model.multi_modal_projector.weight.new_ones(
            *image.features.shape[:2], self.config.vision.output_dim)

        def job():
            tokens = ImageTokens(self.model.multi_modal_projector(states), image.coords, image.mask)
            for layer in self.model.language_model.cross_layers:
                layer.cross_attn.keys_values(tokens)
        return job

    def project_flops(self, tokens: int) -> int:
        """Of `project`, for N image tokens: two for a multiply-add."""
        text = self.config.text
        keys_values = 2 * len(text.cross_attention_layers) * text.num_key_value_heads * text.head_dim
        return 2 * tokens * text.hidden_size * (self.config.vision.output_dim + keys_values)

    def linears(self) -> list[nn.Linear]:
        """The linear layers that a decoded token goes through: not those that read the image in prefill."""
        decoder = self.model.language_model
        return [module for name, module in decoder.named_modules() if isinstance(module, nn.Linear)
                and not re.search(r"cross_attn\.(k|v)_proj$", name)] + [self.model.lm_head]

    def linears_alone(self, batch: int, times: int) -> tuple[Callable[[], None], int]:
        """A job: each of `linears` on one row of input for each batch row, so many times over; and the bytes
        of their weights."""
        work = [(module, module.weight.new_ones(batch, 1, module.in_features)) for module in self.linears()]

        def job():
            for module, x in work * times:
                module(x)
        return job, sum(module.weight.nbytes for module, _ in work)

    def whole_prefill(self, image_ms: float, text_ms: float, head_ms: float) -> float:
        """Milliseconds of the whole decoder's prefill, from those of a slice with and without the image and
        of the head alone: what the image adds is the cross-attention layers', the rest the others'."""
        (all_cross, all_own), (cross, own) = (depths(config) for config in (self.whole, self.config))
        return head_ms + (text_ms - head_ms) * all_own / own + (image_ms - text_ms) * all_cross / cross

    def read(self, ids: Tensor, image: ImageTokens, room: int, pruner: Pruner) -> tuple[Tensor, Cache]:
        """Prefill of prompts [B, T] about one image, with the pruner's hooks 1 to 3: logits and cache."""
        pruner.begin(self.model)
        image = pruner.encoded(image.expand(len(ids)), ids.tolist())
        logits, cache = self.model.prefill(ids, [ids.shape[1]] * len(ids), image, room, pruner)
        cache.image_kv = pruner.prefilled(cache.image_kv)
        return logits, cache


def depths(config: Config) -> tuple[int, int]:
    """How many cross-attention layers a decoder has, and how many others."""
    cross = len(config.text.cross_attention_layers)
    return cross, config.text.num_hidden_layers - cross


class Greedy:
    """Decoding, `each` tokens a call, the likeliest each time; `decode` is ours, compiled or not, or a
    peer's. Branches that a pruner added run along."""

    def __init__(self, decode: Callable, logits: Tensor, cache, each: int, pruner: Pruner | None = None):
        self.decode, self.cache, self.each = decode, cache, each
        self.pruner, self.step = pruner, 0
        self.tokens = self._pick(logits)

    def __call__(self):
        for _ in range(self.each):
            logits = self.decode(self.tokens, self.cache)
            if self.pruner is not None:
                image_kv = self.pruner.stepped(self.step, self.cache.queries, self.cache.image_kv)
                self.cache.image_kv = image_kv
            self.tokens = self._pick(logits)        # at once: a CUDA graph writes over its logits
            self.step += 1

    def _pick(self, logits: Tensor) -> Tensor:
        merged = logits if self.pruner is None else self.pruner.logits(logits)
        return merged.argmax(-1).repeat(len(logits) // len(merged))


def grid_of(vision: VisionConfig, count: int) -> Grid:
    """The squarest grid of so many tiles. Raises ValueError where the model has none."""
    grids = [grid for grid in vision.supported_aspect_ratios if grid[0] * grid[1] == count]
    if not grids:
        able = sorted({rows * columns for rows, columns in vision.supported_aspect_ratios})
        raise ValueError(f"--tiles {count}: this model has images of {', '.join(map(str, able))} tiles")
    return min(grids, key=lambda grid: (max(grid), grid))


class Timed(Wrapper):
    """Does what the pruner inside does, and adds up the milliseconds of its hooks in `ms`."""

    def __init__(self, inner: Pruner, device: torch.device):
        super().__init__(inner)
        self.device = device
        self.ms = 0.0

    def encoded(self, image: ImageTokens, prompts: list[list[int]]) -> ImageTokens:
        return self._add(lambda: self.inner.encoded(image, prompts))

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        return self._add(lambda: self.inner.layer(i, queries, image, kv))

    def prefilled(self, image_kv: list[ImageKV]) -> list[ImageKV]:
        return self._add(lambda: self.inner.prefilled(image_kv))

    def stepped(self, step: int, queries: list[Tensor], image_kv: list[ImageKV]) -> list[ImageKV]:
        return self._add(lambda: self.inner.stepped(step, queries, image_kv))

    def logits(self, logits: Tensor) -> Tensor:
        return self._add(lambda: self.inner.logits(logits))

    def _add(self, hook: Callable):
        result = []
        self.ms += timed(lambda: result.append(hook()), self.device)
        return result[0]
