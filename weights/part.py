"""What one rank reads of a parameter when several hold a model together: see weights/parallel.py."""
from dataclasses import dataclass

import torch
from torch import Tensor

from weights.quantized_linear import QuantizedLinear
from weights.ranks import Ranks
from weights.stored import Stored


@dataclass
class Part:
    """A rank's share of a Stored: of its rows (dim 0), or of its columns."""
    whole: Stored
    ranks: Ranks
    dim: int

    @property
    def shape(self) -> list[int]:
        return list(self.ranks.part(torch.empty(self.whole.shape, device="meta"), self.dim).shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    @property
    def layer(self) -> type[QuantizedLinear] | None:
        return self.whole.layer

    @property
    def maps(self) -> bool:
        return self.dim == 0 and self.whole.maps

    def read(self) -> Tensor:
        """Rows are a view of the mapped file; all else is a copy: columns, as their numbers do not lie
        together, and what was made in memory, or its other rows would stay there."""
        part = self.ranks.part(self.whole.read(), self.dim)
        if self.maps:
            return part
        copy = part.clone(memory_format=torch.contiguous_format)
        self.whole.forget()                             # pages of the file have other ranks' columns too
        return copy

    def codes(self) -> dict[str, Tensor] | None:
        """Of a weight in 8 or 4 bits: its codes, and the scales that belong to them; of others None. Raises
        ValueError where they do not divide."""
        whole = self.whole.codes()
        if whole is None:
            return None
        codes, scale = whole.values()
        grouped = scale.ndim == 3                                               # [G, N, 2], else [N]
        if grouped or self.dim == 0:
            scale = self.ranks.part(scale, 1 - self.dim if grouped else 0)
        codes = self.ranks.part(codes, self.dim)
        fits = self.layer.fits(self.shape) and self.layer.belong(list(codes.shape), list(scale.shape))
        if not fits:
            raise ValueError(f"{self.layer.kind} weights of this checkpoint do not divide over "
                             f"{self.ranks.count} processes: start fewer, or take the bf16 checkpoint")
        return {"weight": codes.contiguous(), "scale": scale.contiguous()}

    def forget(self):
        self.whole.forget()
