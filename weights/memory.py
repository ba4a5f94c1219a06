"""What a model takes: bytes of its weights in each format and of an answer, and what speed they allow.

    python -m weights.memory --shape 11b,90b        tables, from the shapes alone: nothing is downloaded
    python -m weights.memory --processes            what each of several processes holds

The formulas. Every weight is read once for each token, so a device that reads B bytes a second makes at most
B / (bytes read a token) tokens a second. Encoding and prefill are products of many positions, so a device of
F operations a second takes at least (operations) / F seconds to the first token. Figures are computed and not
measured; benchmark.py measures, and says how far from these ceilings it is.
"""
import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from model.cache import rounded_up
from model.config import Config
from model.image_tokens import Grid
from model.llama_vision import LlamaVision
from weights.messages import quoted
from weights.parallel import narrow
from weights.quantized_layers import choice
from weights.ranks import Ranks
from weights.shapes import OFFICIAL
from weights.skeleton import without_weights

FORMATS = {"bf16": None, "int8": "int8", "int4": "int4"}        # and the `quantize` of each
# Of a token that is decoded: neither looked up, nor about the image, whose keys and values are in the cache.
NOT_READ = re.compile(r"vision_model|multi_modal_projector|embed_tokens|cross_attn\.(k|v)_(proj|norm)")
PROMPT, ANSWER, TILES = 128, 256, 4             # tokens, and tiles of the image, of the answer in the table
CARDS = 8, 12, 16, 24, 32, 48, 80, 96, 141      # GB of memory that GPUs are sold with
CARD_RESERVE = 10 ** 9                          # bytes of a GPU that CUDA itself and a screen take
# Bytes and bf16 operations a second: two channels of DDR5-5600 with a CPU of 8 cores; RTX 4090; H100 SXM. The
# data sheets' ceilings, which no program reaches.
PROCESSES = 2, 4, 8
MACHINES = {"desktop CPU": (90e9, 1e12), "RTX 4090": (1008e9, 165e12), "H100": (3350e9, 989e12)}


@dataclass
class Weights:
    total: int
    read: int                                   # of them for each token that is decoded


def weight_bytes(model: LlamaVision, way: str | None, dtype: torch.dtype = torch.bfloat16) -> Weights:
    """Bytes of a model's weights in `dtype`, or as `quantize` makes them; shapes suffice."""
    weights = Weights(0, 0)
    for name, tensor in model.state_dict().items():
        kind = None if way is None else choice(name.removesuffix(".weight"), list(tensor.shape), way)
        if kind is None or not name.endswith(".weight"):
            size = tensor.numel() * dtype.itemsize
        else:
            size = sum(part.nbytes for part in kind.empty(tensor.shape, dtype).values())
        weights.total += size
        weights.read += 0 if NOT_READ.search(name) else size
    return weights


def answer_bytes(model: LlamaVision, grids: list[Grid], prompt: int = PROMPT, answer: int = ANSWER,
                 batch: int = 1) -> dict[str, int]:
    """Bytes that answers about images of these grids need beside the weights: caches, and activations at
    their peak, those of the encoder or of prefill."""
    item = model.dtype.itemsize
    caches = model.kv_bytes(rounded_up(prompt + answer), grids)
    c, text = model.config.vision, model.config.text
    encoding = 0
    for rows, columns in grids:
        tiles = rows * columns
        S = min(tiles + 1, c.max_num_tiles) * (c.tokens_per_tile + 1)           # positions of the encoder
        keys = c.max_num_tiles * (c.tokens_per_tile + c.pad_tokens)
        mlp = S * (7 * c.hidden_size + 2 * c.intermediate_size)
        attention = (8 * S + 2 * keys) * c.hidden_size
        taps = len(c.intermediate_layers_indices) * S * c.hidden_size
        output = 3 * tiles * c.tokens_per_tile * c.output_dim
        encoding += taps + max(mlp, attention, output)
    positions = batch * prompt
    copies = batch if batch > 1 else 2                  # of the image's features, for each sequence
    prefill = (positions * (8 * text.hidden_size + 3 * text.intermediate_size)
               + copies * model.image_tokens(grids) * text.hidden_size)
    return {"text cache": batch * caches["text"], "image cache": batch * caches["image"],
            "activations": max(encoding, prefill) * item + 2 * batch * text.vocab_size * 4}


# ----- the table


def card_for(needed: int) -> str:
    """The smallest GPU that holds so many bytes, or how many of 80 GB."""
    for size in CARDS:
        if needed + CARD_RESERVE <= size * 2 ** 30:
            return f"{size} GB"
    return f"{-(-needed // (80 * 2 ** 30 - CARD_RESERVE))} x 80 GB"


def table(shapes: dict[str, Config]) -> Iterator[str]:
    """Lines of two tables in Markdown: memory and tokens a second, and the time to the first token."""
    speeds = " | ".join(f"tokens/s, {name}" for name in MACHINES)
    yield f"| checkpoint | format | weights | with 4 tiles | GPU | read a token | {speeds} |"
    yield "|" + "---|" * (6 + len(MACHINES))
    grid = [(2, 2)]
    models = {name: without_weights(config).bfloat16() for name, config in shapes.items()}
    for name, model in models.items():
        extra = sum(answer_bytes(model, grid).values())
        caches = sum(model.kv_bytes(PROMPT + ANSWER, grid).values())
        for form, way in FORMATS.items():
            weights = weight_bytes(model, way)
            needed, read = weights.total + extra, weights.read + caches
            cells = [name, form, gb(weights.total), gb(needed), card_for(needed), gb(read),
                     *(f"{bandwidth / read:.3g}" for bandwidth, _ in MACHINES.values())]
            yield f"| {' | '.join(cells)} |"
    yield ""
    times = " | ".join(f"first token, {name}" for name in MACHINES)
    yield f"| checkpoint | operations to encode 4 tiles | to read {PROMPT} tokens | {times} |"
    yield "|" + "---|" * (3 + len(MACHINES))
    for name, model in models.items():
        flops = model.flops(PROMPT, grid)
        encode, prefill = flops["encode"], flops["prefill"]
        cells = [name, f"{encode / 1e12:.1f}e12", f"{prefill / 1e12:.1f}e12",
                 *(f"{(encode + prefill) / speed:.2g} s" for _, speed in MACHINES.values())]
        yield f"| {' | '.join(cells)} |"


def shares(shapes: dict[str, Config]) -> Iterator[str]:
    """Lines of a table in Markdown: weights in each of the processes that hold a model together."""
    yield f"| checkpoint | format | {' | '.join(f'{count} processes' for count in PROCESSES)} |"
    yield "|" + "---|" * (2 + len(PROCESSES))
    for name, config in shapes.items():
        models = [without_weights(config) for _ in PROCESSES]
        for model, count in zip(models, PROCESSES, strict=True):
            narrow(model, Ranks(0, count))
        for form, way in FORMATS.items():
            yield f"| {' | '.join([name, form, *(gb(weight_bytes(model, way).total) for model in models)])} |"


def gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def main():
    parser = argparse.ArgumentParser("python -m weights.memory", description="What the official models need.")
    parser.add_argument("--shape", default="11b,90b", help=f"one or several of {', '.join(OFFICIAL)}")
    parser.add_argument("--processes", action="store_true", help="weights in each of several processes")
    args = parser.parse_args()
    names = args.shape.split(",")
    for name in names:
        if name not in OFFICIAL:
            parser.error(f"unknown shape {quoted(name)}: use one of {', '.join(OFFICIAL)}")
    lines = (shares if args.processes else table)({name: OFFICIAL[name] for name in names})
    sys.stdout.write("".join(line + "\n" for line in lines))


if __name__ == "__main__":
    main()
