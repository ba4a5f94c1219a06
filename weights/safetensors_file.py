"""One safetensors file: read by mapping it into memory, and written tensor by tensor.

The format is 8 bytes of length, a JSON header (name -> dtype, shape, place), then the data without gaps.
Reading checks the header and the size of the file before any weight is touched. A file may be larger than
memory: its pages are read when they are used, all processes that map it share them, and the system may drop
them again. A file must not be cut or overwritten in place while tensors are mapped from it; replacing or
deleting it is harmless.
"""
import ctypes
import json
import mmap
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from weights.files import again, open_regular, regular_file, replacing, unreadable
from weights.messages import named, one_line, quoted, reason

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
QUANTIZED = "quantized.safetensors"     # by another name, or transformers would take int8 codes for weights
STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
PACKED = {"U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}          # of quantized weights
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
        "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
        "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64}    # of a number
ALIGNMENT = 64                      # bytes, at which kernels want a tensor to begin
MAX_HEADER = 10_000_000             # bytes; that of the 90B, in one file, would have 200 kB
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)     # of Linux; Python knows its name since 3.13


class Shard:
    """A mapped file: `entries` are its tensors' names with dtype, shape and place; `view` gives one.

    Raises ValueError with one line where the file is damaged or cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self.entries, self.start, size = _header(path)
        try:
            self.pages, self.storage = mapped(path, size)
        except (OSError, ValueError) as error:          # an address space with a limit; a file that shrinks
            why = reason(error) if isinstance(error, OSError) else one_line(error)
            raise ValueError(f"{named(path)}: cannot be mapped into memory ({why}); let the process have "
                             f"{size / 1e9:.1f} GB of addresses (ulimit -v), and let no program write to the "
                             "file") from None

    def view(self, name: str) -> Tensor:
        """A tensor that is the mapped file."""
        entry = self.entries[name]
        start, stop = (self.start + offset for offset in entry["data_offsets"])
        dtype = (STORED | PACKED)[entry["dtype"]]
        flat = torch.empty(0, dtype=dtype, device="cpu").set_(self.storage[start:stop])
        return flat.view(entry["shape"])

    def forget(self, name: str):
        """Let the system have back the pages of a tensor that was read; the next use reads them again. What
        was written to these pages is lost."""
        start, stop = (self.start + offset for offset in self.entries[name]["data_offsets"])
        start -= start % mmap.PAGESIZE
        if hasattr(self.pages, "madvise") and stop > start:             # Windows has none
            self.pages.madvise(mmap.MADV_DONTNEED, start, stop - start)


# ----- reading

# The library's `safe_open` checks a header, too, but it maps the file in its own way: it reserves the memory.


def mapped(path: Path, size: int) -> tuple[mmap.mmap, torch.UntypedStorage]:
    """The bytes of a file, twice the same; whoever writes to them writes to a private copy of a page, never
    to the file.

    Such a mapping counts as memory that may be written whole, and Linux refuses one that is larger than what
    is free. NO_RESERVE says that it will not be. Raises OSError or ValueError as `mmap` does.
    """
    with regular_file(path) as file:
        if sys.platform == "linux":
            pages = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE | NO_RESERVE)
        else:
            pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)     # reserves nothing
    return pages, torch.frombuffer(pages, dtype=torch.uint8).untyped_storage()


def _header(path: Path) -> tuple[dict[str, dict], int, int]:
    """What a file says it holds, where its data start, and its size in bytes; ValueError where damaged."""
    with open_regular(path) as file:
        try:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            text = file.read(min(length, MAX_HEADER))
            size = file.seek(0, os.SEEK_END)
        except OSError as error:
            raise unreadable(path, error) from None
    if size == 0:
        raise ValueError(f"{named(path)}: the file is empty; {again(path)}")
    if prefix == b"version ":
        raise ValueError(f"{named(path)}: a git-lfs pointer instead of the weights; `git lfs pull` "
                         "fetches them")
    if len(text) < length <= MAX_HEADER:
        raise ValueError(f"{named(path)}: truncated within its header; {again(path)}")
    entries, end = _parse_header(text)
    if entries is None or length > MAX_HEADER:
        raise ValueError(f"{named(path)}: not a safetensors file, or its header is damaged; {again(path)}")
    needed = 8 + length + end
    if size < needed:
        raise ValueError(f"{named(path)}: truncated: {size:,} of {needed:,} bytes are there; {again(path)}")
    fault = _fault(entries, size - 8 - length)
    if fault is not None:
        raise ValueError(f"{named(path)}: not a good safetensors file ({fault}); {again(path)}")
    return entries, 8 + length, size


def _parse_header(text: bytes) -> tuple[dict[str, dict] | None, int]:
    """The entries of the tensors, None where they are damaged, and where the last tensor ends."""
    try:
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        fields = [(entry["dtype"], *entry["data_offsets"], *entry["shape"]) for entry in entries.values()]
        ends = [entry["data_offsets"][1] for entry in entries.values()]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, MemoryError):
        return None, 0
    for dtype, *numbers in fields:
        if not isinstance(dtype, str) or any(type(n) is not int or not 0 <= n < 2 ** 62 for n in numbers):
            return None, 0
    return entries, max(ends, default=0)


def _fault(entries: dict[str, dict], size: int) -> str | None:
    """What is wrong with the tensors' places; None where they fill `size` bytes without gaps."""
    place = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        bits = BITS.get(entry["dtype"])
        if bits is None:
            return f"tensor {quoted(name)} has the unknown dtype {quoted(entry['dtype'], 20)}"
        for length in entry["shape"]:
            bits *= length
            if bits >= 2 ** 66:
                return f"tensor {quoted(name)} has a shape beyond 64 bits"
        end = place + -(-bits // 8)
        if entry["data_offsets"] != [place, end]:
            return f"tensor {quoted(name)} should lie at bytes {place:,} to {end:,} of the data"
        place = end
    return None if place == size else f"its {size:,} bytes of data are not fully covered by tensors"


def read_tensors(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """All tensors of a small file, as copies in fp32. Raises ValueError with one line.

    That is where the file is damaged or cannot be read, or where a tensor has no floating-point numbers.
    """
    shard = Shard(Path(path))
    tensors = {}
    for name, entry in shard.entries.items():
        if entry["dtype"] not in STORED:
            raise ValueError(f"{named(path)}: tensor {quoted(name)} has the dtype "
                             f"{one_line(entry['dtype'], 20)}, not one of {', '.join(STORED)}")
        try:
            tensors[name] = shard.view(name).to(device, torch.float32, copy=True)
        except (RuntimeError, TypeError, MemoryError) as error:     # sizes over 63 bits; too little memory
            raise ValueError(f"{named(path)}: tensor {quoted(name)} cannot be read "
                             f"({one_line(error)})") from None
    return tensors


def write_tensors(path: str | Path, tensors: dict[str, Tensor]):
    """A safetensors file, written tensor by tensor; safetensors' own save_file would need numpy.

    Raises ValueError where a tensor has no values (on the meta device) or a dtype that is not a float, and
    OSError where the file cannot be written; the old file then stays as it was.
    """
    codes = list(STORED.values())
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"tensor {quoted(name)} is on the meta device: it has no values to write")
        if tensor.dtype not in codes:
            raise ValueError(f"tensor {quoted(name)} has the dtype {tensor.dtype}, not one of {list(STORED)}")
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))   # so they are aligned
    write_in_turn(path, tensors, tensors.values())


def write_in_turn(path: str | Path, like: dict[str, Tensor], tensors: Iterable[Tensor]):
    """A safetensors file of `tensors`, each written before the next one is made.

    `like` says in the same order what they are: their names, shapes and dtypes, on the meta device perhaps.
    """
    codes = {dtype: code for code, dtype in (STORED | PACKED).items()}
    header = {"__metadata__": {"format": "pt"}}                     # transformers asks for the metadata
    end = 0
    for name, tensor in like.items():
        start = end
        end += tensor.nbytes
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            tensor = tensor.cpu().contiguous()
            file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
