"""Opens a LoRA adapter: which parameters it replaces, and to which it adds a product of two small matrices.

    'folder' or 'owner/name' ── find_adapter ─► folder ── open_adapter ─► Adapter ── (adapters.py) ─► merged

The layout is PEFT's: adapter_config.json, and adapter_model.safetensors with `lora_A`, `lora_B` and so on
after the names of modules, or whole parameters (`modules_to_save`, biases, a resized embedding). Only the
adapter's own files are downloaded, and everything that can be checked without the base model is checked here.
"""
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from weights.files import exists
from weights.hub import ADAPTER, HUB_ID, download, local_folder
from weights.lora_config import MERGE, LoraConfig, read_lora_config
from weights.messages import named, quoted, some
from weights.names import EMBEDDING, is_parameter, model_name, unwrapped
from weights.safetensors_file import STORED, Shard
from weights.stored import Stored

NONE = "none"           # said of weights beside which an adapter lies that they have merged already
WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
TEXT_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.*"]      # for an embedding of its own
NAME = r"(?:\.(?!(?:weight|bias)$)[^.]+)?"      # the adapter's, which peft leaves out when it saves
PART = re.compile(rf"(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector){NAME}(?:\.(weight|bias))?")
SAVED = re.compile(r"\.modules_to_save(?:\.default)?(?=\.)|\.base_layer(?=\.)")
FROZEN = re.compile(r"\.original_module(?:\.default)?(?=\.)")


@dataclass
class LowRank:
    """A change scale * B A of one module's weight; it may have a bias and, in DoRA, a magnitude."""
    module: str                                 # its name in the file
    parts: dict[str, Stored] = field(default_factory=dict)
    rank: int = 0
    scale: float = 0.0

    @property
    def of_embedding(self) -> bool:
        return "embedding_A" in self.parts


@dataclass
class Adapter:
    """An adapter before it is merged. Names are those of parameters in LlamaVision."""
    folder: Path
    config: LoraConfig
    full: dict[str, Stored]                     # replaces the base's parameter
    low_rank: dict[str, LowRank]                # is added to it

    @property
    def brings_tokenizer(self) -> bool:
        """It has an embedding of its own, and the tokenizer that goes with it."""
        return EMBEDDING in self.full and exists(self.folder / "tokenizer.json")


def find_adapter(source: str | Path) -> Path:
    """The folder of an adapter: a folder, or a hub id 'owner/name', of which only its files are downloaded.

    Raises ValueError with one line where there is no such thing, or it cannot be merged into any model.
    """
    text = str(source)
    folder = local_folder(text, f"pass the folder that holds {ADAPTER} and it")
    if folder is not None:
        _check_files(folder, text)
        open_adapter(folder)
        return folder
    if isinstance(source, Path) or not HUB_ID.fullmatch(text):
        raise ValueError(f"adapter {quoted(text)} is neither a folder here nor a hub id like owner/name")
    folder = download(text, None, [ADAPTER, WEIGHTS])
    _check_files(folder, text)
    if EMBEDDING in open_adapter(folder).full:
        folder = download(text, None, [ADAPTER, WEIGHTS, *TEXT_FILES])
    return folder


def _check_files(folder: Path, source: str):
    if not exists(folder / ADAPTER):
        raise ValueError(f"adapter {named(source)}: no {ADAPTER} there; an adapter is a folder of {ADAPTER} "
                         f"and {WEIGHTS}, as peft's save_pretrained writes it")
    read_lora_config(folder)
    if not exists(folder / WEIGHTS):
        raise ValueError(f"adapter {named(source)}: no {WEIGHTS} there; {PICKLE} is not read, because a "
                         "pickle can run code: save the adapter again with peft, which writes safetensors")


def open_adapter(folder: Path) -> Adapter:
    """Read an adapter's header. Raises ValueError with one line where it is damaged or contradicts itself."""
    adapter = Adapter(folder, read_lora_config(folder), {}, {})
    shard = Shard(folder / WEIGHTS)
    names = [name for name in shard.entries if is_parameter(name)]
    if not names:
        raise ValueError(f"{named(shard.path)}: it holds no tensors, so it changes nothing")
    for name in names:
        stored = Stored(shard, name)
        if stored.dtype is None:
            raise ValueError(f"{named(shard.path)}: tensor {quoted(name)} has the dtype "
                             f"{shard.entries[name]['dtype']}, not one of {', '.join(STORED)}")
        match = PART.fullmatch(unwrapped(name))
        if match is None:
            _add_full(adapter, stored)
        else:
            _add_part(adapter, stored, *match.groups())
    for change in adapter.low_rank.values():
        _check_parts(adapter, change)
    return adapter


def _add_full(adapter: Adapter, stored: Stored):
    """A parameter that was trained whole. Next to it, PEFT may store the base's own, which is not needed."""
    name = unwrapped(stored.name)
    if FROZEN.search(name):
        return
    name = model_name(SAVED.sub("", name))
    other = adapter.full.setdefault(name, stored)
    if other is not stored and not other.same_as(stored):
        raise ValueError(f"{named(stored.shard.path)}: tensors {quoted(other.name)} and "
                         f"{quoted(stored.name)} are of the same parameter, but differ")


def _add_part(adapter: Adapter, stored: Stored, module: str, part: str, kind: str | None):
    change = adapter.low_rank.setdefault(model_name(f"{module}.weight"), LowRank(module))
    part = "bias" if kind == "bias" else part
    if change.parts.setdefault(part, stored) is not stored:
        raise ValueError(f"{named(stored.shard.path)}: tensor {quoted(stored.name)} occurs twice, also as "
                         f"{quoted(change.parts[part].name)}: an adapter file holds one adapter")


def _check_parts(adapter: Adapter, change: LowRank):
    """Raise ValueError where a change lacks a part, or has another rank than the configuration says."""
    path = named(adapter.folder / WEIGHTS)
    a, b = ("embedding_A", "embedding_B") if change.of_embedding else ("A", "B")
    wanted = {a, b} | ({"magnitude_vector"} if adapter.config.dora else set())
    missing = sorted(wanted - change.parts.keys())
    surplus = sorted(change.parts.keys() - wanted - {"bias"})
    for words, parts in ("lacks", missing), ("has, against its configuration,", surplus):
        if parts:
            names = some([f"lora_{part}" for part in parts])
            raise ValueError(f"{path}: {quoted(change.module)} {words} {names}: the adapter is incomplete, "
                             "or its files do not belong together")
    if change.of_embedding and adapter.config.dora:
        raise ValueError(f"{path}: {quoted(change.module)} is an embedding changed by DoRA, which is not "
                         f"supported: {MERGE}")
    ranks = change.parts[a].shape[:1], change.parts[b].shape[1:2]
    change.rank = adapter.config.rank_of(change.module)
    change.scale = adapter.config.scale_of(change.module)
    if ranks != ([change.rank], [change.rank]):
        shapes = f"{change.parts[a].shape} and {change.parts[b].shape}"
        raise ValueError(f"{path}: {quoted(change.module)} has matrices of the shapes {quoted(shapes)}, but "
                         f"{ADAPTER} says rank {change.rank}")


def said_bases(adapters: list[str | Path]) -> list[str | None]:
    """What each adapter says that it was trained on."""
    return [None if adapter == NONE else read_lora_config(Path(adapter)).base for adapter in adapters]


def text_folder(adapters: list[str | Path]) -> Path | None:
    """Where the tokenizer is that goes with the embedding of the last adapter that has one of its own."""
    folders = [Path(adapter) for adapter in adapters if adapter != NONE]
    return next((folder for folder in reversed(folders) if open_adapter(folder).brings_tokenizer), None)


def find_adapters(sources: Sequence[str | Path]) -> list[str | Path]:
    """The folders of several adapters; 'none', which stands alone, stays. Raises ValueError with one line."""
    if not isinstance(sources, (list, tuple)) or not all(isinstance(each, (str, Path)) for each in sources):
        raise ValueError(f"adapters is {quoted(sources)}, but must be a list of folders and hub ids")
    if NONE in sources and len(sources) > 1:
        raise ValueError("adapter 'none' means that no adapter is merged: leave it out beside others")
    return [source if source == NONE else find_adapter(source) for source in sources]
