"""One safetensors file: read by mapping it into memory, and written tensor by tensor.

The format is 8 bytes of length, a JSON header (name -> dtype, shape, place), then the data without gaps.
Reading checks the header and the size of the file before any weight is touched. A file must not be cut or
overwritten in place while tensors are mapped from it; replacing or deleting it is harmless.
"""
import ctypes
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weights.files import replacing
from weights.messages import named, one_line, reason

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
MAX_HEADER = 100_000_000                                # bytes; the format's own limit


class Shard:
    """A mapped file: `entries` are its tensors' names with dtype, shape and place; `view` gives one.

    Raises ValueError with one line where the file is damaged or cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self.entries, self.start = _header(path)
        try:
            safe_open(path, "pt")                       # checks the rest: offsets, sizes, dtypes, no gaps
            self.storage = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ValueError(f"{named(path)}: cannot be read ({one_line(error)}); "
                             "download the file again") from None

    def view(self, name: str) -> Tensor:
        """A tensor that is the mapped file. (safe_open's reads a byte of each: gigabytes, with readahead.)"""
        entry = self.entries[name]
        start, stop = (self.start + offset for offset in entry["data_offsets"])
        flat = torch.empty(0, dtype=STORED[entry["dtype"]], device="cpu").set_(self.storage[start:stop])
        return flat.view(entry["shape"])


def _header(path: Path) -> tuple[dict[str, dict], int]:
    """What a safetensors file says it holds, and where its data start; ValueError where it is damaged."""
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            text = file.read(min(length, MAX_HEADER))
            size = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise ValueError(f"{named(path)}: cannot be read ({reason(error)})") from None
    try:
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        needed = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        damage = size < needed and f"truncated: {size:,} of {needed:,} bytes are there"
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        cut = size < 8 + length < MAX_HEADER
        damage = "truncated within its header" if cut else "not a safetensors file, or its header is damaged"
    if size == 0:
        damage = "the file is empty"
    if prefix == b"version ":
        damage = "a git-lfs pointer instead of the weights (`git lfs pull` fetches them)"
    if damage:
        raise ValueError(f"{named(path)}: {damage}; download the file again")
    return entries, 8 + length


def write_tensors(path: str | Path, tensors: dict[str, Tensor]):
    """A safetensors file, written tensor by tensor; safetensors' own save_file would need numpy."""
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))   # so they are aligned
    codes = {dtype: code for code, dtype in STORED.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0             # transformers asks for the metadata
    for name, tensor in tensors.items():
        place = [end, end + tensor.nbytes]
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        end = place[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            tensor = tensor.cpu().contiguous()
            file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
