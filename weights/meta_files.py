"""Meta's own files, as from_meta.py reads them: consolidated.*.pth, one for each rank, and params.json."""
from pathlib import Path
from pickle import UnpicklingError
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from weights.files import again, exists, read_json
from weights.messages import named, one_line, quoted
from weights.safetensors_file import STORED, mapped

SINGLE, RANK, PARAMS = "consolidated.pth", "consolidated.{:02d}.pth", "params.json"
SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "vision_chunk_size",
         "vision_max_num_chunks", "vision_num_cross_attention_layers")
MOST_LAYERS, MOST_TILES = 500, 16
BROKEN = (RuntimeError, UnpicklingError, OSError, EOFError, ValueError, LookupError, TypeError,
          AttributeError, MemoryError, AssertionError, BadZipFile)      # of a damaged archive or pickle
Rank = dict[str, Tensor]


def open_ranks(folder: Path) -> list[Rank]:
    """The tensors of every rank by Meta's names, memory-mapped. Raises ValueError with one line."""
    paths = [folder / SINGLE]
    if not exists(paths[0]):
        count = len(list(folder.glob("consolidated.[0-9]*.pth")))
        paths = [folder / RANK.format(rank) for rank in range(max(1, count))]
    for path in paths:
        if not exists(path):
            raise ValueError(f"{named(folder)}: {path.name} is missing; all of Meta's files belong "
                             "into one folder")
    ranks = [_open(path) for path in paths]
    for path, rank in zip(paths, ranks, strict=True):
        different = rank.keys() ^ ranks[0].keys()
        if different:
            raise ValueError(f"{named(path)}: tensor {quoted(min(different))} is either here or in "
                             f"{paths[0].name}; files of two checkpoints seem to be mixed")
    return ranks


def _open(path: Path) -> Rank:
    """The tensors of a file, as views of its mapping.

    torch.load reads the pickle alone, which tells names, shapes and places: with FakeTensorMode it leaves the
    numbers where they are. weights_only lets nothing but tensors and plain containers be made, so no code
    in the file is run. torch's own mapping (`mmap=True`) would reserve memory for the whole file.
    """
    try:
        with ZipFile(path) as archive:                          # torch.save compresses nothing
            if any(entry.compress_type != ZIP_STORED for entry in archive.infolist()):
                raise BadZipFile("its entries are compressed")
        with FakeTensorMode():
            rank = torch.load(path, map_location="cpu", weights_only=True)
        _, storage = mapped(path, path.stat().st_size)
        if not isinstance(rank, dict):
            raise TypeError(f"it holds a {type(rank).__name__}")
        return {_checked(name, tensor): _real(tensor, storage) for name, tensor in rank.items()}
    except BROKEN as error:
        raise ValueError(f"{named(path)}: not a file of tensors by name that torch.save has written "
                         f"({one_line(error, 160)}); {again(path)}") from None


def _checked(name: object, tensor: object) -> str:
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise TypeError(f"{quoted(name)} is not the name of a tensor")
    if tensor.dtype not in STORED.values() or tensor.layout != torch.strided:
        raise TypeError(f"tensor {quoted(name)} is of {tensor.dtype}, not one of {', '.join(STORED)}")
    return name


def _real(fake: Tensor, storage: torch.UntypedStorage) -> Tensor:
    """A tensor of the mapped file, where the fake one says that it lies."""
    start = fake.untyped_storage()._checkpoint_offset           # documented with FakeTensorMode
    stop = start + fake.untyped_storage().nbytes()
    if stop > len(storage):
        raise EOFError("it is truncated")
    view = torch.empty(0, dtype=fake.dtype)
    if start % view.element_size():                             # no kernel reads such an address
        return view.set_(storage[start:stop].clone(), fake.storage_offset(), fake.shape, fake.stride())
    return view.set_(storage[start:stop], fake.storage_offset(), fake.shape, fake.stride())


def read_params(folder: Path) -> dict:
    """params.json with all sizes that a model needs. Raises ValueError with one line."""
    path = folder / PARAMS
    if not exists(path):
        raise ValueError(f"{named(folder)}: no {PARAMS} there; needed is a folder of {SINGLE} or "
                         f"{RANK.format(0)}, ..., and {PARAMS}, as Meta gives them out")
    params = read_json(path)
    params = params.get("model", params) if isinstance(params, dict) else params
    if not isinstance(params, dict):
        raise ValueError(f"{named(path)}: not the settings of a model; {again(path)}")
    if params.get("vision_num_cross_attention_layers") in (None, -1):
        raise ValueError(f"{named(path)}: no vision_num_cross_attention_layers: this model sees no images, "
                         "so it is none of Llama-3.2-Vision")
    params = {"n_kv_heads": params.get("n_heads"), "vision_max_num_chunks": 4} | params
    for key in SIZES:
        value = params.get(key)
        if type(value) is not int or not 0 < value < 2 ** 31:
            raise ValueError(f"{named(path)}: {key} is {quoted(value)}, not a whole number above 0")
    if params["n_layers"] > MOST_LAYERS or params["vision_max_num_chunks"] > MOST_TILES:
        raise ValueError(f"{named(path)}: it has more layers or tiles than any model")
    if params["vision_num_cross_attention_layers"] > params["n_layers"]:
        raise ValueError(f"{named(path)}: it has more cross-attention layers than self-attention layers")
    return params
