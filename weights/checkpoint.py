"""What a checkpoint holds: each parameter by its name in the model, before any weight is touched.

    folder ─► shards (memory-mapped) ─► their headers ─► Stored: shape, dtype and how to read it

Formats that store a parameter otherwise than as one tensor of floating-point numbers make a Stored of their
own, whose `read` gives the numbers. Everything after this file sees parameters only.
"""
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from weights.files import again, exists, read_json
from weights.hub import WANTED, foreign_format
from weights.messages import named, quoted, some
from weights.names import is_parameter, is_unmerged, model_name
from weights.prequantized import dequantized
from weights.rounded import is_scale, rounded
from weights.safetensors_file import INDEX, QUANTIZED, SINGLE, Shard
from weights.stored import Stored

SAMPLES, NUMBERS = 16, 64               # for a fingerprint: parameters, and numbers of each
PLAIN_NAME = re.compile(r"[^/\\]+\.safetensors")


def open_checkpoint(folder: Path) -> dict[str, Stored]:
    """Every parameter by its name in LlamaVision. Raises ValueError with one line where files are missing,
    damaged, of another format, or name a parameter twice."""
    found = {}
    for stored in dequantized(_tensors(folder)):
        if not is_parameter(stored.name):
            continue
        name = model_name(stored.name)
        if name in found:
            other = found[name]
            raise ValueError(f"{named(stored.shard.path)}: tensor {quoted(stored.name)} occurs twice, also "
                             f"as {quoted(other.name)} in {named(other.shard.path.name)}; "
                             f"{again(stored.shard.path.parent)}")
        found[name] = stored
    return found


def _tensors(folder: Path) -> Iterator[Stored]:
    """Every tensor of the files."""
    for shard in _open_shards(folder):
        for name in shard.entries:
            if is_unmerged(name):
                raise ValueError(f"{named(shard.path)}: tensor {quoted(name)} is of a PEFT model that was "
                                 "saved before its adapter was merged: save it after merge_and_unload(), or "
                                 "save the adapter alone and give it with --adapter")
            if not is_scale(shard, name):
                yield rounded(shard, name) or Stored(shard, name)


def _open_shards(folder: Path) -> list[Shard]:
    """Every file of the checkpoint, memory-mapped; headers and sizes are valid, and the index agrees."""
    for single in SINGLE, QUANTIZED:
        if exists(folder / single):
            return [Shard(folder / single)]
    if not exists(folder / INDEX):
        foreign = foreign_format(folder)
        remedy = again(folder) if foreign is None else f"it holds {foreign}; {WANTED}"
        raise ValueError(f"{named(folder)}: no {SINGLE} and no {INDEX}; {remedy}")
    weight_map = _read_index(folder / INDEX)
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not exists(folder / file)]
    if missing:
        raise ValueError(f"{named(folder)}: missing files ({len(missing)}) of those that {INDEX} names: "
                         f"{some(missing)}; {again(folder)}")
    shards = {file: Shard(folder / file) for file in files}
    for name, file in weight_map.items():
        if name not in shards[file].entries:
            raise ValueError(f"{named(folder / INDEX)}: it says that {quoted(name)} is in {quoted(file)}, "
                             "which does not hold it; files of two checkpoints seem to be mixed")
    return list(shards.values())


def _read_index(path: Path) -> dict[str, str]:
    """The index's map from tensor to file; every file is a plain name: no index leads out of its folder."""
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise ValueError(f"{named(path)}: not an index: it needs a weight_map from tensors to files; "
                         f"{again(path)}")
    for file in weight_map.values():
        if not isinstance(file, str) or not PLAIN_NAME.fullmatch(file):
            raise ValueError(f"{named(path)}: it names {quoted(file)}, which is not a safetensors file in "
                             f"the same folder; {again(path)}")
    return weight_map


def fingerprint(found: dict[str, Stored]) -> int:
    """A number that other checkpoints hardly share: of all names, and of some numbers of some parameters."""
    names = sorted(found)
    value = zlib.crc32(str([(name, found[name].shape, found[name].dtype) for name in names]).encode())
    for name in names[::-(-len(names) // SAMPLES)]:
        value = zlib.crc32(str(found[name].read().flatten()[:NUMBERS].tolist()).encode(), value)
    return value
