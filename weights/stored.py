"""A parameter as a file holds it: shape, dtype and how to read it, before any weight is touched."""
from dataclasses import dataclass

import torch
from torch import Tensor

from weights.safetensors_file import STORED, Shard


@dataclass
class Stored:
    """A parameter that is one tensor of a file."""
    shard: Shard
    name: str                                   # in the file
    maps = True                                 # whether `read` gives the mapped file, and no copy
    layer = None                                # what a weight in 8 or 4 bits is for: a QuantizedLinear class

    @property
    def shape(self) -> list[int]:
        """From the file's header."""
        return self.shard.entries[self.name]["shape"]

    @property
    def dtype(self) -> torch.dtype | None:
        """Of what `read` gives; None where it has no numbers that a parameter could have."""
        return STORED.get(self.shard.entries[self.name]["dtype"])

    def same_as(self, other: "Stored") -> bool:
        """Whether both hold the same numbers."""
        return self.shape == other.shape and self.read().equal(other.read())

    def read(self) -> Tensor:
        """The parameter on the CPU: a view of the mapped file, or a copy where kernels need its alignment."""
        tensor = self.shard.view(self.name)
        return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor

    def codes(self) -> dict[str, Tensor] | None:
        """What a QuantizedLinear holds, where that is stored; else None."""
        return None

    def forget(self):
        """The pages of the file that were read are no longer needed."""
        self.shard.forget(self.name)
