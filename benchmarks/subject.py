"""What is measured: a model with real or random weights, complete or a slice, and what it is asked.

A slice of N layers keeps the first N decoder layers as they are, cross-attention layers included, and at most
two local and two global vision layers, every local one tapped. So `--layers 5` of 11b is 4 self-attention
layers, 1 cross-attention layer, and 2 vision layers of each kind. Embedding, head and projector stay.
Random weights have a scale that keeps activations finite at any depth; all gates are open.
B batch, T text tokens, N image tokens, D model width.
"""
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.peer import Peer, PeerImage
from model.answer import Answer
from model.cache import Cache
from model.config import Config, VisionConfig
from model.image_tokens import Grid, ImageTokens, Tiles
from model.llama_vision import LlamaVision
from model.sampling import GREEDY
from pruning import Pruner
from weights import find_checkpoint, read_config
from weights.images import ImageProcessor
from weights.quantized_linear import QuantizedLinear
from weights.shapes import OFFICIAL
from weights.skeleton import without_weights
from weights.wide import is_slow, widen

SHAPES: dict[str, Callable[[], Config]] = {
    **{name: partial(OFFICIAL.get, name) for name in OFFICIAL},
    "tiny": lambda: read_config(find_checkpoint("tiny"))}
VISION_LAYERS = 2                               # of each kind, in a slice
BEFORE_IMAGE = 5                                # prompt tokens before the image, as chat templates have it
NOISE = 1_000_003                               # a prime, so that no two rows of weights repeat each other

Decode = Callable[[Tensor, Cache], Tensor]


def cut(config: Config, layers: int) -> Config:
    """A slice of `layers` decoder layers. Raises ValueError if none of them is a cross-attention layer."""
    text = config.text
    vision = config.vision
    if layers > text.num_hidden_layers:
        raise ValueError(f"--layers {layers}: the whole decoder has {text.num_hidden_layers}")
    if layers == text.num_hidden_layers:
        return config
    if layers <= (first := text.cross_attention_layers[0]):
        raise ValueError(f"--layers {layers}: none of them attends to the image; give at least {first + 1}")
    local = min(VISION_LAYERS, vision.num_hidden_layers)
    return replace(
        config, text=replace(text, num_hidden_layers=layers, cross_attention_layers=tuple(
            i for i in text.cross_attention_layers if i < layers)),
        vision=replace(vision, num_hidden_layers=local, intermediate_layers_indices=tuple(range(local)),
                       num_global_layers=min(VISION_LAYERS, vision.num_global_layers)))


def random_model(config: Config, device: torch.device, dtype: torch.dtype, seed: int = 0) -> LlamaVision:
    """A LlamaVision with random weights, which are made on the device, without a second copy."""
    model = without_weights(config)
    if is_slow(dtype, device):                  # as in a model that is loaded
        widen(model)
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.randn(NOISE, generator=generator, device=device).to(dtype)
    state = {name: torch.empty(like.shape, dtype=dtype, device=device)
             for name, like in model.state_dict().items()}
    for name, weight in state.items():
        fill(name, weight, noise)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def fill(name: str, weight: Tensor, noise: Tensor):
    """Fill a weight with noise, at the scale that keeps a layer's output as large as its input.

    Norms are 1 and gates open. Biases are 0, and so are the tables of tile positions: official ones hold
    zeros for unused tiles.
    """
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
    generate: Callable[..., Answer]             # `generate.generate`, the one decode loop
    shape: str                                  # for people: 11b, tiny, or the name of a checkpoint
    complete: Config                            # of the model that `model` may be a slice of

    @property
    def config(self) -> Config:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def answer(self, ids: Tensor, image: ImageTokens | None, new_tokens: int, pruner: Pruner | None = None,
               decode: Decode | None = None, sample: Callable[[Tensor], Tensor] = GREEDY) -> Answer:
        """Answers to prompts [B, T] about one image, or about none; greedy unless `sample` is given.

        `new_tokens` are decoded for each, after the first token, which comes from prefill; 0: prefill alone.
        """
        image = None if image is None else image.expand(len(ids))
        pruner = Pruner() if pruner is None else pruner
        return pruner.around(self.generate)(self.model, ids.tolist(), image, new_tokens + 1, (), sample,
                                            ignore, pruner, decode)

    def peer_answer(self, peer: Peer, ids: Tensor, image: PeerImage, new_tokens: int) -> Answer:
        """The same of transformers, decoded by the same loop."""
        return self.generate(peer, ids.tolist(), image, new_tokens + 1, ())

    def compiled(self) -> Decode:
        """Our decode step, compiled anew. Imported here: a compiler takes seconds to import."""
        from model.compiled import Compiled
        return Compiled(self.model.decode, self.device)

    def tiles(self, count: int, pruner: Pruner) -> Tiles:
        """A random image that fills `count` tiles, on the device, as the pruner's `preprocess` leaves it."""
        vision = self.config.vision
        rows, columns = grid_of(vision, count)
        side = vision.image_size
        generator = torch.Generator().manual_seed(count)
        noise = torch.randint(256, (rows * side, columns * side, 3), dtype=torch.uint8, generator=generator)
        image = Image.frombytes("RGB", (columns * side, rows * side), bytes(noise.flatten().tolist()))
        processor = ImageProcessor(side, max_tiles=vision.max_num_tiles,
                                   canvases=vision.supported_aspect_ratios)
        tiles = pruner.preprocess([image], processor)
        return Tiles(tiles.pixels.to(self.device, self.dtype), tiles.grid)

    def prompt(self, batch: int, tokens: int, image: bool = True) -> Tensor:
        """Token ids [B, T]: random text, with the `<|image|>` token where a chat has it, or without one."""
        generator = torch.Generator().manual_seed(tokens)
        ids = torch.randint(self.config.text.vocab_size, (batch, tokens), generator=generator)
        ids[ids == self.config.image_token_index] = 0
        if image:
            ids[:, min(BEFORE_IMAGE, tokens - 1)] = self.config.image_token_index
        return ids.to(self.device)

    def project(self, image: ImageTokens) -> Callable[[], None]:
        """A job: the projector, and the keys and values of every cross-attention layer."""
        states = torch.ones(*image.features.shape[:2], self.config.vision.output_dim,
                            dtype=self.dtype, device=self.device)                       # [B, N, features]

        def job():
            tokens = ImageTokens(self.model.multi_modal_projector(states), image.coords, image.mask)
            for layer in self.model.language_model.cross_layers:
                layer.cross_attn.keys_values(tokens)
        return job

    def project_flops(self, tokens: int) -> int:
        """Operations of `project` for so many image tokens; a multiply-add counts as two."""
        text = self.config.text
        keys_values = 2 * len(text.cross_attention_layers) * text.num_key_value_heads * text.head_dim
        return 2 * tokens * text.hidden_size * (self.config.vision.output_dim + keys_values)

    def linears(self) -> list[nn.Linear | QuantizedLinear]:
        """The linear layers that a decoded token passes through: not those that project the image."""
        decoder = self.model.language_model
        linears = [module for name, module in decoder.named_modules()
                   if isinstance(module, (nn.Linear, QuantizedLinear))
                   and not re.search(r"cross_attn\.(k|v)_proj$", name)]
        return [*linears, self.model.lm_head]

    def linears_alone(self, batch: int, times: int) -> tuple[Callable[[], None], int]:
        """A job: each of `linears` on one token of each sequence, `times` times; and their weights' bytes."""
        widths = {module.in_features for module in self.linears()}
        ones = {width: torch.ones(batch, 1, width, dtype=self.dtype, device=self.device) for width in widths}
        work = [(module, ones[module.in_features]) for module in self.linears()]

        def job():
            for module, x in work * times:
                module(x)
        return job, sum(tensor.nbytes for module, _ in work
                        for tensor in (*module.parameters(), *module.buffers()))

    def complete_prefill(self, image_ms: float, text_ms: float, head_ms: float) -> float:
        """Milliseconds of the complete decoder's prefill, from three of a slice: prefill with the image,
        prefill without it, and the head alone. The image's share belongs to the cross-attention layers."""
        all_cross, all_own = depths(self.complete)
        cross, own = depths(self.config)
        return head_ms + (text_ms - head_ms) * all_own / own + (image_ms - text_ms) * all_cross / cross


def ignore(sequence: int, token: int):
    """An `emit` that does nothing."""


def depths(config: Config) -> tuple[int, int]:
    """How many cross-attention layers a decoder has, and how many others."""
    cross = len(config.text.cross_attention_layers)
    return cross, config.text.num_hidden_layers - cross


def grid_of(vision: VisionConfig, count: int) -> Grid:
    """The squarest grid of so many tiles. Raises ValueError if the model has none."""
    grids = [grid for grid in vision.supported_aspect_ratios if grid[0] * grid[1] == count]
    if not grids:
        able = sorted({rows * columns for rows, columns in vision.supported_aspect_ratios})
        raise ValueError(f"--tiles {count}: this model has images of {', '.join(map(str, able))} tiles")
    return min(grids, key=lambda grid: (max(grid), grid))
