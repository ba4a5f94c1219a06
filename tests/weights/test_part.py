"""What a rank reads of a parameter: its rows or its columns, also of a weight in 8 or 4 bits."""
from dataclasses import dataclass

import pytest
import torch
from helpers import noise, refused
from torch import Tensor

from weights.part import Part
from weights.quantized_linear import Int4Linear, Int8Linear, QuantizedLinear
from weights.ranks import Ranks


@dataclass
class InMemory:
    """A Stored of these numbers, in 8 or 4 bits if it has a layer."""
    numbers: Tensor
    layer: type[QuantizedLinear] | None = None
    maps = True

    @property
    def shape(self) -> list[int]:
        return list(self.numbers.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.numbers.dtype

    def read(self) -> Tensor:
        return self.numbers

    def forget(self):
        """Nothing of a file was read."""

    def codes(self) -> dict[str, Tensor]:
        return self.layer.rounded(self.numbers, self.dtype)


def parts_of(stored: InMemory, dim: int, count: int) -> list[Part]:
    return [Part(stored, Ranks(rank, count), dim) for rank in range(count)]


@pytest.mark.parametrize("dim", [0, 1])
def test_parts_make_up_the_whole(dim):
    stored = InMemory(noise(6, 7))
    for count in 2, 3, 4:
        parts = parts_of(stored, dim, count)
        assert torch.equal(torch.cat([part.read() for part in parts], dim), stored.numbers)
        assert all(part.shape == list(part.read().shape) and part.read().is_contiguous() for part in parts)


def test_rows_are_a_view_and_columns_a_copy():
    stored = InMemory(noise(6, 8))
    rows, columns = Part(stored, Ranks(1, 2), 0), Part(stored, Ranks(1, 2), 1)
    assert rows.maps and rows.read().data_ptr() == stored.numbers[3:].data_ptr()
    stored.numbers[:] = 0
    assert not columns.maps and not columns.read().any()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("layer", [Int8Linear, Int4Linear])
def test_codes_and_scales_go_together(layer, dim):
    stored = InMemory(noise(64, 128), layer)
    whole = layer.numbers(stored.codes())
    parts = parts_of(stored, dim, 2)
    assert torch.equal(torch.cat([layer.numbers(part.codes()) for part in parts], dim), whole)
    assert all(part.layer is layer for part in parts)


def test_codes_that_do_not_divide():
    """Three groups of 32 inputs; 24 inputs of 8 bits, and 24 outputs of 4 bits, which kernels do not take."""
    for layer, shape, dim in (Int4Linear, (32, 96), 1), (Int8Linear, (32, 48), 1), (Int4Linear, (48, 64), 0):
        part = Part(InMemory(noise(*shape), layer), Ranks(0, 2), dim)
        with refused("do not divide over 2 processes", parts=[layer.kind]):
            part.codes()
