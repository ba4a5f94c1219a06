"""Checkpoints that were quantized by other programs: their tensors become parameters like all others.

    every tensor of the files ─► dequantized ─► a Stored for each parameter; `read` gives its numbers

Which names belong to which format, names.py says. Tensors that are not quantized pass as they are.
"""
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from weights.bitsandbytes import EightBits, FourBits
from weights.compressed_tensors import compressed
from weights.files import again
from weights.hqq import Hqq
from weights.messages import named, quoted
from weights.names import quantization_method, quantized_part
from weights.quantization_config import quantized
from weights.stored import Stored
from weights.torchao import TorchAo

KINDS = {
    "bitsandbytes 4-bit": FourBits,
    "bitsandbytes int8": EightBits,
    "compressed-tensors": compressed,
    "torchao": TorchAo,
    "HQQ": Hqq,
}


@dataclass
class Group:
    """The parts of one quantized weight, found so far."""
    method: str
    parts: dict[str, Stored] = field(default_factory=dict)


def dequantized(tensors: Iterable[Stored]) -> Iterator[Stored]:
    """A Stored for each parameter, under the name that it has unquantized.

    Raises ValueError with one line where the format is not read, or the parts of a weight are damaged.
    """
    plain, groups = [], {}
    for stored in tensors:
        method = quantization_method(stored.name)
        if method is not None:
            raise ValueError(f"{named(stored.shard.path)}: tensor {quoted(stored.name)} shows that "
                             f"{quantized(method)}")
        found = quantized_part(stored.name)
        if found is None:
            plain.append(stored)
        else:
            method, weight, part = found
            _add(groups.setdefault(weight, Group(method)), method, part, stored)
    default = _most_common(plain)
    for stored in plain:
        if stored.name in groups:
            group = groups[stored.name]
            _add(group, group.method, "weight", stored)
        else:
            yield stored
    for weight, group in groups.items():
        yield KINDS[group.method](weight, group.parts, default)


def _add(group: Group, method: str, part: str, stored: Stored):
    where = f"{named(stored.shard.path)}: tensor {quoted(stored.name)}"
    if method != group.method:
        raise ValueError(f"{where} belongs to {method}, but others of the same weight to {group.method}; "
                         f"{again(stored.shard.path.parent)}")
    if part in group.parts:
        raise ValueError(f"{where} occurs twice; {again(stored.shard.path.parent)}")
    group.parts[part] = stored


def _most_common(tensors: list[Stored]) -> torch.dtype:
    """The dtype that most of the unquantized tensors have."""
    count = Counter(stored.dtype for stored in tensors if stored.dtype is not None)
    return count.most_common(1)[0][0] if count else torch.bfloat16

