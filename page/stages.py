"""What becomes of an image on its way to an answer, stage by stage, and what each stage costs.

    pixels ─► patches ─► vision encoder ─► projector ─► K/V of every cross-attention layer ─► image KV cache
                                                            question ─► prefill ─► a decoded token

Bytes and operations are computed from the shapes of a model, by its own functions: `VisionEncoder.flops`,
`LlamaVision.flops`, `decoder_flops`, `kv_bytes` and `weights.memory.weight_bytes`. Nothing is measured here.
C cross-attention layers, N real image tokens, t tiles that the encoder computes, P tokens of a tile, D model
width, G key/value heads, d head width, S side of a tile in pixels.
"""
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from model.cache import Cache
from model.config import Config
from model.decoder import CrossAttention, Decoder
from model.image_tokens import Grid, Tiles
from model.llama_vision import LlamaVision
from model.vision import VisionEncoder
from weights.images import ImageProcessor
from weights.memory import weight_bytes
from weights.skeleton import without_weights

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Reads:
    """How many image tokens each cross-attention layer reads, and from what grid of tiles they come."""
    grid: Grid                                  # that the encoder read
    projected: tuple[int, ...]                  # that a layer makes keys and values of
    attended: tuple[int, ...]                   # that it attends to in prefill
    cached: tuple[float, ...]                   # that it keeps for decoding: a mean over key/value heads

    @property
    def layers(self) -> int:
        return len(self.cached)


@dataclass(frozen=True)
class Cost:
    count: str                                  # tiles, vectors or tokens that the stage makes
    shape: str                                  # of them
    bytes: int                                  # as `Stage.bytes_are` says: of what it makes, or reads
    flops: int                                  # operations; a multiply-add counts as two


@dataclass(frozen=True)
class Place:
    """Where a function stands: its file, from the root of the project, the line and the source."""
    name: str
    path: str
    line: int
    source: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True)
class Stage:
    """One stage: its costs for each model, without pruning and with it, and the code of both."""
    name: str
    does: str
    bytes_are: str
    full: dict[str, Cost]
    pruned: dict[str, Cost] | None              # None where nothing was pruned
    code: Place
    counted_by: Place


# Name, what it does, what its bytes are, its code, and the function that says what it costs.
STAGES = (
    ("pixels", "The image is resized into its canvas, padded with black, normalised and cut into tiles. "
     "Slots without a tile hold zeros. Operations of this stage are not counted.", "all slots",
     ImageProcessor.__call__, Tiles),
    ("patches", "A convolution turns each patch into one vector. A class token comes first, and embeddings "
     "say where a patch is. One padding tile is computed for all.", "the vectors", VisionEncoder._embed,
     VisionEncoder.flops),
    ("vision encoder", "All tiles are one sequence: patches attend to each other across tiles, in local and "
     "then in gated global layers. The output joins the final state with those tapped on the way.",
     "final state and taps of real tiles", VisionEncoder.forward, VisionEncoder.flops),
    ("projector", "One linear layer makes image tokens as wide as the decoder. Padding is gone.",
     "the image tokens", LlamaVision._encode_images, LlamaVision.flops),
    ("K/V of the cross-attention layers", "Each of these layers projects the image tokens to keys and values "
     "of its own, layer by layer in prefill: what was dropped before is not projected.",
     "keys and values as they are made", CrossAttention.keys_values, Decoder.flops),
    ("image KV cache", "What decoding keeps of them. It never grows, and is read for every new token.",
     "keys and values that are kept", Cache.image_kv.fset, LlamaVision.kv_bytes),
    ("prefill", "The question passes through all layers at once, and looks at the image in those with "
     "cross-attention. It leaves the text KV cache and the first token.", "text KV of the question",
     LlamaVision.prefill, LlamaVision.decoder_flops),
    ("a decoded token", "One new token passes through all layers. It reads every weight of the decoder and "
     "both caches once, which is what takes its time.", "weights and caches that are read", Decoder.step,
     weight_bytes))


def stages(configs: dict[str, Config], grid: Grid, prompt_tokens: int, reads: Reads | None = None,
           dtype: torch.dtype = torch.bfloat16) -> list[Stage]:
    """The stages of an image of `grid` tiles and a question of so many tokens, for each model by its name.

    `reads` is what a pruner left of the image in the first of the models. Other models are shown with the
    same shares: see `like`. All tensors are counted in `dtype`. Raises ValueError if a model has no such
    grid.
    """
    models = {name: shape_of(config, dtype) for name, config in configs.items()}
    full = {name: costs(model, prompt_tokens, everything(model, grid)) for name, model in models.items()}
    pruned = None
    if reads is not None:
        whole = everything(next(iter(models.values())), grid)
        pruned = {name: costs(model, prompt_tokens, like(reads, whole, everything(model, grid)))
                  for name, model in models.items()}
    made = []
    for i, (name, does, bytes_are, code, counted_by) in enumerate(STAGES):
        made.append(Stage(name, does, bytes_are, {model: each[i] for model, each in full.items()},
                          pruned and {model: each[i] for model, each in pruned.items()},
                          place(code), place(counted_by)))
    return made


@cache
def shape_of(config: Config, dtype: torch.dtype) -> LlamaVision:
    """A model without weights: what it costs is in its shapes."""
    return without_weights(config).to(dtype)


def everything(model: LlamaVision, grid: Grid) -> Reads:
    """Every layer reads all image tokens. Raises ValueError if the model has no such grid."""
    model.config.vision.ratio_id(*grid)
    tokens = (model.image_tokens([grid]),) * len(model.config.text.cross_attention_layers)
    return Reads(grid, tokens, tokens, tokens)


def like(reads: Reads, whole: Reads, other: Reads) -> Reads:
    """The reads of another model, where `whole` and `other` are everything that each has.

    Its first layer reads the share that the first layer reads here, and every other layer the mean share of
    the other layers here. The layers of one model are what they are.
    """
    if whole == other:
        return reads

    def spread(counts: tuple[float, ...]) -> tuple[int, ...]:
        first, *rest = (count / all_of_it for count, all_of_it in zip(counts, whole.cached, strict=True))
        later = sum(rest) / len(rest) if rest else first
        shares = [first] + [later] * (other.layers - 1)
        return tuple(max(1, round(share * n)) for share, n in zip(shares, other.cached, strict=True))
    return Reads(reads.grid, spread(reads.projected), spread(reads.attended), spread(reads.cached))


def costs(model: LlamaVision, prompt_tokens: int, reads: Reads) -> list[Cost]:
    """What each of STAGES costs in one model."""
    vision, text = model.config.vision, model.config.text
    size = model.dtype.itemsize
    encoder = model.vision_model
    rows, columns = reads.grid
    N = model.image_tokens([reads.grid])
    tiles = min(rows * columns + 1, vision.max_num_tiles)           # one padding tile stands for all of them
    pixels = vision.max_num_tiles, vision.num_channels, vision.image_size, vision.image_size
    patches = tiles, vision.tokens_per_tile, vision.hidden_size
    kernel = encoder.patch_embedding.weight.numel()
    patch_flops = 2 * tiles * vision.patches_per_side ** 2 * kernel
    encoder_flops = encoder.flops(reads.grid)
    projector_flops = model.flops(prompt_tokens, [reads.grid])["encode"] - encoder_flops
    each = model.kv_bytes(0, [(1, 1)])["image"] // vision.tokens_per_tile // reads.layers   # a token, a layer
    kv_shape = f"{reads.layers} x 2 x [{text.num_key_value_heads}, N, {text.head_dim}]"
    read = weight_bytes(model, None, model.dtype).read
    cached = [round(count) for count in reads.cached]
    image_kv = round(each * sum(reads.cached))
    text_kv = model.kv_bytes(prompt_tokens, [])["text"]
    next_kv = model.kv_bytes(prompt_tokens + 1, [])["text"]
    return [
        Cost(f"{rows * columns} of {vision.max_num_tiles} tiles", shown(pixels), math.prod(pixels) * size, 0),
        Cost(f"{tiles * vision.tokens_per_tile} vectors", shown(patches), math.prod(patches) * size,
             patch_flops),
        Cost(f"{N} tokens", shown((N, vision.output_dim)), N * vision.output_dim * size,
             encoder_flops - patch_flops),
        Cost(f"{N} tokens", shown((N, text.hidden_size)), N * text.hidden_size * size, projector_flops),
        Cost(f"{spans(reads.projected)} tokens", kv_shape, each * sum(reads.projected),
             model.language_model.flops(0, 0, [], list(reads.projected))),
        Cost(f"{spans(reads.cached)} tokens", kv_shape, image_kv, 0),
        Cost(f"{prompt_tokens} tokens", shown((prompt_tokens, text.hidden_size)), text_kv,
             model.decoder_flops(prompt_tokens, 0, list(reads.attended), [])),
        Cost("1 token", shown((1, text.hidden_size)), read + next_kv + image_kv,
             model.decoder_flops(1, prompt_tokens, cached, []))]


def shown(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def spans(counts: tuple[float, ...]) -> str:
    """Counts of layers: one number, or the least and the most where they differ."""
    least, most = (f"{round(count, 1):g}" for count in (min(counts), max(counts)))
    return least if least == most else f"{least} to {most}"


@cache
def place(function: Callable) -> Place:
    """Where a function of this project stands, as its file is now."""
    function = inspect.unwrap(function)
    lines, line = inspect.getsourcelines(function)
    path = Path(inspect.getsourcefile(function)).resolve().relative_to(ROOT).as_posix()
    return Place(function.__qualname__, path, line, "".join(lines))
