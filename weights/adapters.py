"""Merges LoRA adapters into a checkpoint, tensor by tensor, while it is read.

    name -> Stored ── with_adapters ─► name -> Stored or Merged ── read ─► base + scale * B A in fp32, cast

Nothing is written, and nothing is computed before a parameter is read. All adapters are merged in their
order. A DoRA adapter scales each row to its magnitude, divided by the length that base and its own change
have without other adapters, as PEFT does it (arXiv 2402.09353).
"""
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from model.config import Config
from weights.adapter_file import NONE, WEIGHTS, Adapter, LowRank, open_adapter
from weights.config_file import read_config
from weights.hub import ADAPTER, find_checkpoint
from weights.lora_config import MERGE
from weights.messages import named, quoted
from weights.names import EMBEDDING, HEAD
from weights.quantized_linear import QuantizedLinear
from weights.skeleton import empty_model
from weights.stored import Stored

CHUNK = 2 ** 24                 # numbers that are merged at once: 64 MB in fp32


@dataclass
class Merged(Stored):
    """A parameter that adapters change; `shard` and `name` are those of the base's."""
    base: Stored                                # of the same name, or what an adapter puts in its place
    kind: torch.dtype | None                    # the parameter's dtype in the checkpoint
    asked: torch.dtype | None                   # what the model will have, None for `kind`
    changes: list[LowRank]
    is_bias: bool = False                       # what is added are the biases of the changes
    maps = False

    @property
    def shape(self) -> list[int]:
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype | None:
        return self.kind

    @property
    def layer(self) -> type[QuantizedLinear] | None:
        """That of the base: the merged numbers are rounded as its were."""
        return self.base.layer

    def forget(self):
        self.base.forget()

    def read(self) -> Tensor:
        base = self.base.read()
        merged = torch.empty(self.shape, dtype=self.asked or self.kind)
        rows = max(1, CHUNK * len(base) // base.numel())
        for start in range(0, len(base), rows):
            part = slice(start, start + rows)
            original = base[part].float().reshape(len(base[part]), -1)
            result = original.clone()
            for change in self.changes:
                result = self.changed(result, original, change, part)
            merged[part] = result.view(merged[part].shape)
        return merged

    def changed(self, result: Tensor, original: Tensor, change: LowRank, part: slice) -> Tensor:
        """Some rows [n, columns] with one more change; `original` are those rows of the base."""
        if self.is_bias:
            return result + change.scale * change.parts["bias"].read().float()[part, None]
        left, right = low_rank(change, part)
        if "magnitude_vector" not in change.parts:
            return result.addmm_(left, right, alpha=change.scale)
        delta = change.scale * (left @ right)
        magnitude = change.parts["magnitude_vector"].read().float().flatten()[part]
        length = (original + delta).norm(dim=1)
        return (magnitude / length)[:, None] * (result + delta)


@dataclass
class FirstRows(Stored):
    """A tied head: the first rows of the embedding as they are in the base."""
    base: Stored
    rows: int

    @property
    def shape(self) -> list[int]:
        return [self.rows, *self.base.shape[1:]]

    @property
    def dtype(self) -> torch.dtype | None:
        return self.base.dtype

    def read(self) -> Tensor:
        return self.base.read()[:self.rows]


def low_rank(change: LowRank, part: slice) -> tuple[Tensor, Tensor]:
    """Two matrices [n, rank] and [rank, columns] in fp32, whose product is what some rows gain."""
    if change.of_embedding:                                     # A [rank, rows], B [columns, rank]
        left = change.parts["embedding_A"].read().float().T
        right = change.parts["embedding_B"].read().float().T
    else:                                                       # A [rank, columns], B [rows, rank]
        left = change.parts["B"].read().float().flatten(1)      # a convolution's have more axes
        right = change.parts["A"].read().float().flatten(1)
    return left[part], right


@dataclass
class Promised(Stored):
    """A parameter of a checkpoint that is not there yet, of which only the shape is known."""
    size: list[int]
    dtype = None

    @property
    def shape(self) -> list[int]:
        return self.size


def with_adapters(found: dict[str, Stored], adapters: list[Adapter], config: Config,
                  dtype: torch.dtype | None) -> dict[str, Stored]:
    """The parameters with all adapters merged; `dtype` is what the model will have, None for its own.

    Raises ValueError with one line where an adapter, or a part of it, does not belong to this model.
    """
    found = dict(found)
    if config.text.tie_word_embeddings and HEAD not in found and EMBEDDING in found:
        _untie(found, adapters, config.text.vocab_size)
    for adapter in adapters:
        _check_names(adapter, found)
    replaced = {}
    for adapter in adapters:
        for name, stored in adapter.full.items():
            _check_replaced(adapter, name, stored, found[name], replaced.get(name))
            replaced[name] = stored
    for name, stored in replaced.items():
        found[name] = _merged(found[name], dtype, stored)
    for adapter in adapters:
        for name, change in adapter.low_rank.items():
            _check_change(adapter, change, found[name].shape)
            found[name] = _merged(found[name], dtype)
            found[name].changes.append(change)
            if "bias" in change.parts:
                bias = name.removesuffix("weight") + "bias"
                if bias not in found or found[bias].shape != change.parts["bias"].shape:
                    raise _misfit(adapter, change.module, "adds a bias, but the model has none of this size")
                found[bias] = _merged(found[bias], dtype, is_bias=True)
                found[bias].changes.append(change)
    return found


def find_base(source: str | Path, revision: str | None, adapters: list[str | Path]) -> Path:
    """`find_checkpoint`; adapters that cannot fit it are refused before its weights are downloaded."""
    def check(folder: Path):
        config = read_config(folder)
        opened = [open_adapter(adapter) for adapter in adapters if adapter != NONE]
        if opened:
            check_fit(opened, config, folder)
    return find_checkpoint(source, revision, adapters, check)


def check_fit(adapters: list[Adapter], config: Config, folder: Path):
    """Raise ValueError with one line where adapters do not fit what config.json says.

    How many tokens there are, only the weights tell: changes of embedding and head are not checked.
    """
    shapes = empty_model(config, folder).state_dict()
    wanted = {name: Promised(None, name, list(tensor.shape)) for name, tensor in shapes.items()}
    for adapter in adapters:
        kept = {name: change for name, change in adapter.low_rank.items() if name not in (EMBEDDING, HEAD)}
        with_adapters(wanted, [replace(adapter, low_rank=kept)], config, None)


def _merged(stored: Stored, dtype: torch.dtype | None, instead: Stored | None = None,
            is_bias: bool = False) -> Merged:
    """A parameter to which changes can be added; `instead` is what an adapter puts in its place."""
    if isinstance(stored, Merged):
        stored.is_bias |= is_bias
        return stored
    return Merged(stored.shard, stored.name, instead or stored, stored.dtype, dtype, [], is_bias)


def _untie(found: dict[str, Stored], adapters: list[Adapter], rows: int):
    """Give the model a head of its own where an adapter changes head or embedding: training changed one."""
    touching = [adapter for adapter in adapters if {EMBEDDING, HEAD} & {*adapter.full, *adapter.low_rank}]
    if not touching:
        return
    for adapter in touching:
        if adapter.config.ties_weights:
            raise ValueError(f"{named(adapter.folder / ADAPTER)}: ensure_weight_tying is not supported where "
                             f"the head is the embedding: {MERGE}")
    embedding = found[EMBEDDING]
    found[HEAD] = FirstRows(embedding.shard, embedding.name, embedding, rows)


def _check_names(adapter: Adapter, found: dict[str, Stored]):
    strange = [stored.name for name, stored in adapter.full.items() if name not in found]
    strange += [part.name for name, change in adapter.low_rank.items() if name not in found
                for part in change.parts.values()]
    if not strange:
        return
    count = len(adapter.full) + sum(len(change.parts) for change in adapter.low_rank.values())
    how_many = "none" if len(strange) == count else f"only {count - len(strange)}"
    raise ValueError(f"{named(adapter.folder / WEIGHTS)}: {how_many} of its {count} tensors belong to this "
                     f"model, {quoted(strange[0])} does not: {_made_for(adapter)}")


def _check_replaced(adapter: Adapter, name: str, stored: Stored, base: Stored, earlier: Stored | None):
    """Raise ValueError where a parameter cannot take the base's place."""
    resized = name in (EMBEDDING, HEAD) and stored.shape[1:] == base.shape[1:] and len(stored.shape) == 2
    if stored.shape != base.shape and not resized:
        raise _misfit(adapter, stored.name, f"has the shape {quoted(stored.shape)}, not {base.shape}")
    if earlier is not None and not earlier.same_as(stored):
        raise _misfit(adapter, stored.name, "replaces what another adapter replaces, too: only one can")


def _check_change(adapter: Adapter, change: LowRank, shape: list[int]):
    """Raise ValueError where the product of two matrices does not have the parameter's shape."""
    shapes = {part: stored.shape for part, stored in change.parts.items()}
    if change.of_embedding:
        fits = len(shape) == 2 and shapes["embedding_A"] == [change.rank, shape[0]] \
            and shapes["embedding_B"] == [shape[1], change.rank]
    else:
        fits = len(shape) > 1 and shapes["A"] == [change.rank, *shape[1:]] \
            and shapes["B"] == [shape[0], change.rank] + [1] * (len(shape) - 2)
    if "magnitude_vector" in shapes:
        fits = fits and torch.Size(shapes["magnitude_vector"]).numel() == shape[0]
    if not fits:
        sizes = " and ".join(str(size) for part, size in shapes.items() if part != "bias")
        raise _misfit(adapter, change.module, f"is changed by {quoted(sizes)}, which do not fit its {shape}")


def _misfit(adapter: Adapter, name: str, words: str) -> ValueError:
    return ValueError(f"{named(adapter.folder / WEIGHTS)}: {quoted(name)} {words}; {_made_for(adapter)}")


def _made_for(adapter: Adapter) -> str:
    base = adapter.config.base
    return "it was made for another model" + ("" if base is None else f", by its own words for {base}")
