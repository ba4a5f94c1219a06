"""What makes the rows of the table of bad input: command lines, images and damaged checkpoints.

A row of the table begins with a function that prepares the case on a `Bench` and returns the command line.
"""
import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from huggingface_hub import errors
from PIL import Image
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

import generate

TINY = Path(__file__).parents[2] / "weights" / "tiny"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM = "language_model.model.norm.weight"
QUESTION = "--prompt", "What is a star?"


class Bench:
    """Where a row is prepared: a folder for its files, the standard input, and what is imitated."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self.folder, self.patch = folder, patch
        self.stdin, self.terminal = b"", False      # None: closed
        self.program = generate

    def path(self, name: str, content: bytes | None = None) -> str:
        """Where the file `name` is, which is written first if it has a content."""
        if content is not None:
            (self.folder / name).write_bytes(content)
        return str(self.folder / name)

    def checkpoint(self, *files: tuple[str, bytes | None | Callable[[bytes], bytes]]) -> str:
        """The bundled checkpoint with some files written, removed (None) or changed (a function)."""
        folder = self.folder / "checkpoint"
        folder.mkdir()
        for file in TINY.iterdir():
            (folder / file.name).symlink_to(file)
        for name, change in files:
            path = folder / name
            content = change(path.read_bytes()) if callable(change) else change
            path.unlink(missing_ok=True)            # the link, never what it points to
            if content is not None:
                path.write_bytes(content)
        return str(folder)


Prepare = Callable[[Bench], list[str]]


def flags(*args: str) -> Prepare:
    """A good question with these flags."""
    return lambda bench: [*args, *QUESTION]


def bare(*args: str) -> Prepare:
    """These arguments and no more."""
    return lambda bench: [*args]


def of(program: ModuleType, *args: str) -> Prepare:
    """These arguments of another program."""
    def prepare(bench: Bench) -> list[str]:
        bench.program = program
        return [*args]
    return prepare


def in_folder(*args: str, name: str = "", content: bytes | None = None,
              program: ModuleType = generate) -> Prepare:
    """Arguments in which HERE is the row's folder, and IMAGE an image in it; `name` is one more file."""
    def prepare(bench: Bench) -> list[str]:
        bench.program = program
        image = bench.path("good.png", drawn("PNG"))
        if content is not None:
            bench.path(name, content)
        return [arg.replace("IMAGE", image).replace("HERE", str(bench.folder)) for arg in args]
    return prepare


def with_pipe(name: str, prepare: Prepare) -> Prepare:
    """With a named pipe in the row's folder."""
    def prepared(bench: Bench) -> list[str]:
        os.mkfifo(bench.path(name))
        return prepare(bench)
    return prepared


def without_permission(prepare: Prepare) -> Prepare:
    """Where nothing can be written; root, who may everything, is told so too."""
    def prepared(bench: Bench) -> list[str]:
        args = prepare(bench)
        bench.patch.setattr(os, "access", lambda path, mode, **named: False)
        return args
    return prepared


def image(name: str, content: bytes | None = None) -> Prepare:
    """A question about the image file `name`, which is written first if it has a content."""
    return lambda bench: ["--image", bench.path(name, content), *QUESTION]


def piped(content: bytes | None, image: bool = False) -> Prepare:
    def prepare(bench: Bench) -> list[str]:
        bench.stdin = content
        return ["--image", bench.path("good.png", drawn("PNG"))] if image else []
    return prepare


def typed(*args: str) -> Prepare:
    def prepare(bench: Bench) -> list[str]:
        bench.terminal = True
        return [*args]
    return prepare


def model(*files: tuple, also: tuple[str, ...] = QUESTION) -> Prepare:
    """A question to a damaged checkpoint; see `Bench.checkpoint`."""
    return lambda bench: ["--model", bench.checkpoint(*files), *also]


def config(entry: str, value: object) -> Prepare:
    return model(("config.json", entry_of_json(entry, value)))


def preprocessor(entry: str, value: object) -> Prepare:
    return model(("preprocessor_config.json", entry_of_json(entry, value)))


def weights(change: bytes | None | Callable[[bytes], bytes], *files: tuple[str, bytes]) -> Prepare:
    return model((WEIGHTS, change), *files)


def folder_of(*files: str) -> Prepare:
    """A question to a folder with nothing but these empty files in it."""
    def prepare(bench: Bench) -> list[str]:
        Path(bench.path("folder")).mkdir()
        for name in files:
            bench.path(f"folder/{name}", b"")
        return ["--model", bench.path("folder"), *QUESTION]
    return prepare


def hub(*args: str, error: Callable[[], Exception] | None = None) -> Prepare:
    """A question to a hub id; the hub answers with an error, or is not asked at all."""
    def prepare(bench: Bench) -> list[str]:
        def download(repo, revision, allow_patterns, ignore_patterns):
            raise error()

        if error is not None:
            bench.patch.setattr("weights.hub.snapshot_download", download)
        return ["--model", "owner/name", *args, *QUESTION]
    return prepare


def no_revision() -> Exception:
    reply = SimpleNamespace(status_code=404, headers={}, request=None)
    return errors.RevisionNotFoundError("404 Client Error.\n\nRevision Not Found", response=reply)


def drawn(form: str, mode: str = "RGB", colour: str | float = "red") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (60, 40), colour).save(file, form)
    return file.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds almost nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in (b"IHDR", header), (b"IDAT", zlib.compress(b"0")), (b"IEND", b""):
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data


def entry_of_json(entry: str, value: object) -> Callable[[bytes], bytes]:
    """Sets one entry of a JSON file, "a.b" being entry b of object a."""
    def change(data: bytes) -> bytes:
        inside = content = json.loads(data)
        *outer, last = entry.split(".")
        for key in outer:
            inside = inside[key]
        inside[last] = value
        return json.dumps(content).encode()
    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[bytes], bytes]:
    """Changes the tensors of a safetensors file."""
    def changed(data: bytes) -> bytes:
        state = load_tensors(data)
        change(state)
        return save_tensors(state)
    return changed


def tensor(name: str, value: torch.Tensor) -> Prepare:
    return weights(tensors(lambda state: state.update({name: value})))


def index(*files: str) -> tuple[str, bytes]:
    return INDEX, json.dumps({"weight_map": {f"tensor{i}": file for i, file in enumerate(files)}}).encode()
