"""A weight in 8 or 4 bits, as `python -m weights.quantize` writes it: two tensors of a file.

    x.weight and x.scale ─► Rounded: a Stored like others, whose parts a QuantizedLinear can hold as they are
"""
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from weights.messages import named, quoted
from weights.quantized_linear import Int4Linear, Int8Linear, QuantizedLinear
from weights.safetensors_file import ALIGNMENT, STORED, Shard
from weights.stored import Stored


@dataclass
class Rounded(Stored):
    """The weight of a linear layer in 8 or 4 bits, as `python -m weights.quantize` writes it: codes and, in
    another tensor, scales."""
    scale: str                                  # its name in the file
    layer: type[QuantizedLinear]

    @property
    def shape(self) -> list[int]:
        outputs, width = self.shard.entries[self.name]["shape"]
        return [outputs, width if self.layer is Int8Linear else 2 * width]

    @property
    def dtype(self) -> torch.dtype:
        return STORED[self.shard.entries[self.scale]["dtype"]]

    def codes(self) -> dict[str, Tensor]:
        """What the file holds, for `layer.fill`: views of it, or copies where kernels need an alignment."""
        codes = self.shard.view(self.name)
        return {"weight": codes.clone() if codes.data_ptr() % ALIGNMENT else codes,
                "scale": Stored(self.shard, self.scale).read()}

    def read(self) -> Tensor:
        """The numbers that codes and scales stand for."""
        return self.layer.numbers(self.codes())


def rounded(shard: Shard, name: str) -> Rounded | None:
    """The weight of this name if it has 8 or 4 bits. Raises ValueError where its parts do not fit."""
    scale = re.sub(r"\.weight$", ".scale", name)
    layer = {"I8": Int8Linear, "U8": Int4Linear}.get(shard.entries[name]["dtype"])
    if layer is None or scale == name or scale not in shard.entries:
        return None
    stored = Rounded(shard, name, scale, layer)
    if not (len(shard.entries[name]["shape"]) == 2 and shard.entries[scale]["dtype"] in STORED
            and layer.belong(*(shard.entries[part]["shape"] for part in (name, scale)))):
        raise ValueError(f"{named(shard.path)}: tensor {quoted(name)} and its scales do not belong together; "
                         "write the folder again")
    return stored


def is_scale(shard: Shard, name: str) -> bool:
    """Whether a tensor is part of a weight in 8 or 4 bits."""
    weight = re.sub(r"\.scale$", ".weight", name)
    return weight != name and weight in shard.entries and rounded(shard, weight) is not None
