"""A checkpoint whose weights have 8 or 4 bits, in a folder that loads in seconds.

    python -m weights.quantize MODEL OUT --int4             OUT is then a --model like any other

MODEL is what --model takes. OUT, written whole or not at all, holds the rounded weights, the same for every
device, and MODEL's small files. One tensor is read, rounded and written at a time.
"""
import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from weights.adapter_file import find_adapters, text_folder
from weights.adapters import FirstRows, find_base
from weights.device import parse_dtype
from weights.files import MOST_BYTES, check_room, exists, new_folder, read_json
from weights.load import open_model
from weights.messages import named, written
from weights.names import EMBEDDING, HEAD, official_name
from weights.quantization_config import OWN_METHOD
from weights.quantized_layers import check_quantize, quantized_layers
from weights.quantized_linear import QuantizedLinear
from weights.safetensors_file import ALIGNMENT, QUANTIZED, write_in_turn
from weights.stored import Stored

CPU = torch.device("cpu")
SMALL_FILES = "*.json", "*.jinja", "*.txt", "*.md", "LICENSE*"
UNTRUE = "config.json", "*.index.json", "adapter_config.json", "README.md", "accuracy.json"     # of OUT


def write_quantized(source: str | Path, out: str | Path, way: str, dtype: str | torch.dtype | None = None,
                    revision: str | None = None, adapters: Sequence[str | Path] = ()) -> Path:
    """Write OUT from a checkpoint, quantised in one of `quantized_layers.WAYS`; scales and what stays in full
    have the `dtype`, None for the checkpoint's own. Raises ValueError with one line where that cannot be."""
    out = Path(out)
    dtype = parse_dtype(dtype)
    check_quantize(way, CPU, dtype)
    if exists(out):
        raise ValueError(f"{named(out)} is there already: name a folder that is not")
    adapters = find_adapters(adapters)
    folder = find_base(source, revision, adapters)
    model, found, dtype = open_model(folder, adapters, dtype)
    layers = quantized_layers(model, found, way, CPU, dtype)
    if any(stored.layer for stored in found.values()):
        raise ValueError(f"{named(folder)}: its weights have 8 or 4 bits already; take the bf16 checkpoint")
    if HEAD in layers and HEAD not in found:            # tied: the embedding stays in full
        rows = found[EMBEDDING]
        found[HEAD] = FirstRows(rows.shard, rows.name, rows, model.config.text.vocab_size)
    like = {name: parts_of(name, stored, layers.get(name), dtype) for name, stored in found.items()}
    order = sorted(found, key=lambda name: any(part.nbytes % ALIGNMENT for part in like[name].values()))
    with new_folder(out) as partial:
        check_room(partial, sum(part.nbytes for parts in like.values() for part in parts.values()))
        write_settings(folder, text_folder(adapters), partial, way)
        tensors = (tensor for name in order for tensor in made(found[name], layers.get(name), dtype))
        in_order = {part: tensor for name in order for part, tensor in like[name].items()}
        write_in_turn(partial / QUANTIZED, in_order, tensors)
    return out


def parts_of(name: str, stored: Stored, layer: QuantizedLinear | None,
             dtype: torch.dtype) -> dict[str, Tensor]:
    """What is written of a parameter: names and tensors without values."""
    if layer is None:
        return {official_name(name): torch.empty(stored.shape, dtype=dtype, device="meta")}
    prefix = official_name(name).removesuffix("weight")
    return {prefix + part: tensor for part, tensor in layer.empty(stored.shape, dtype).items()}


def made(stored: Stored, layer: QuantizedLinear | None, dtype: torch.dtype) -> Iterator[Tensor]:
    """The same with their values."""
    if layer is None:
        yield stored.read().to(dtype)
    else:
        yield from layer.rounded(stored.read(), dtype).values()
    stored.forget()


def write_settings(folder: Path, text: Path | None, out: Path, way: str):
    """Everything but weights: the small files of a checkpoint, its tokenizer perhaps of an adapter."""
    for source in [folder, *([] if text is None else [text])]:
        for path in sorted(path for pattern in SMALL_FILES for path in source.glob(pattern)):
            if path.is_file() and path.stat().st_size <= MOST_BYTES and not any(map(path.match, UNTRUE)):
                shutil.copyfile(path, out / path.name)
    settings = read_json(folder / "config.json")
    for section in settings, settings.get("text_config") or {}:
        section.pop("quantization_config", None)        # of a checkpoint that others had quantized
        section.pop("compression_config", None)
    settings["quantization_config"] = {"quant_method": OWN_METHOD, "weights": way}
    (out / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def main(words: list[str] | None = None):
    parser = argparse.ArgumentParser(prog="python -m weights.quantize", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="'tiny', a folder, or a hub id")
    parser.add_argument("out", metavar="OUT", help="a new folder")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--int8", dest="kind", action="store_const", const="int8", help="8 bits a weight")
    kind.add_argument("--int4", dest="kind", action="store_const", const="int4", help="4 bits, the head 8")
    parser.add_argument("--tower", action="store_true", help="the vision tower, too: 8 bits")
    parser.add_argument("--dtype", metavar="T", help="of all else; default: the checkpoint's own")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub id")
    parser.add_argument("--adapter", action="append", default=[], metavar="A", help="merge it first")
    args = parser.parse_args(words)
    way = args.kind + "+tower" * args.tower
    print(written(parser, args.out, lambda: write_quantized(args.model, args.out, way, args.dtype,
                                                            args.revision, args.adapter)))


if __name__ == "__main__":
    main()
