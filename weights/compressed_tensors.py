"""Weights quantized by compressed-tensors, the format of llm-compressor (models of RedHatAI, neuralmagic).

What the tensors are, their dtypes and shapes say: nothing is taken from config.json. Scales for activations
are ignored, since activations are not quantized here. Read as compressed-tensors 0.10 to 0.20 decompresses.
"""
import torch
from torch import Tensor

from weights.quantized_parts import OfEightBits, Quantized, of_rows, scaled, unpacked

WIDTHS = 1, 2, 4, 8             # bits; others would straddle bytes
ACTIVATIONS = "input_scale", "input_zero_point", "output_scale", "output_zero_point"


class Plain(OfEightBits):
    """`weight`, `weight_scale` and `weight_zero_point` (float-quantized, int-quantized)."""
    method = "compressed-tensors"
    number_part, scale_part, zero_part = "weight", "weight_scale", "weight_zero_point"
    required = number_part, scale_part
    optional = zero_part, *ACTIVATIONS


class Packed(Quantized):
    """Whole numbers of 4 or 8 bits in words of 32, the first in the lowest bits (pack-quantized).

    `weight_packed` [N, words], `weight_shape` (N, K), `weight_scale` [N, G]. Half the range is added to what
    is packed. Zero points are packed likewise, along the rows: [words, G]. `weight_g_idx` [K] tells each
    column's group, where they were ordered by activation; all -1 says that they were not.
    """
    method = "compressed-tensors"
    required = "weight_packed", "weight_scale", "weight_shape"
    optional = "weight_zero_point", "weight_g_idx", *ACTIVATIONS

    def layout(self, default: torch.dtype) -> tuple[list[int], torch.dtype]:
        packed = self.header("weight_packed", ("I32",))
        self.sized("weight_shape", ("I64", "I32"), 2)
        shape = self.view("weight_shape").flatten().tolist()
        rows, columns = shape
        if len(packed) != 2 or packed[0] != rows or not 0 < columns <= 32 * packed[1]:
            raise self.damaged(f"has the weight_shape {shape}, but {packed} words")
        widths = [bits for bits in WIDTHS if -(-columns * bits // 32) == packed[1]]
        if len(widths) != 1:
            raise self.not_read(f"has {packed} words for {shape}: the bits of a weight are none of {WIDTHS}")
        self.bits = widths[0]
        self.groups = self.scale_groups("weight_scale", rows, columns)
        self.zero = self.order = None
        if "weight_zero_point" in self.parts:
            self.zero = self._zero_points(rows)
        if "weight_g_idx" in self.parts:
            self.order = self._order(columns)
        return shape, self.result_dtype("weight_scale", default)

    def _zero_points(self, rows: int) -> Tensor:
        """[N, G] in int16."""
        words = -(-rows * self.bits // 32)
        self.sized("weight_zero_point", ("I32",), words * self.groups)
        packed = self.view("weight_zero_point").reshape(words, self.groups).t().contiguous()
        return self._whole(packed, rows).t().contiguous()

    def _order(self, columns: int) -> Tensor | None:
        """Each column's group [K]; None where the groups follow each other."""
        self.sized("weight_g_idx", ("I32", "I64"), columns)
        order = self.view("weight_g_idx").flatten()
        if bool((order == -1).all()):
            return None
        if int(order.min()) < 0 or int(order.max()) >= self.groups:
            raise self.damaged(f"has a weight_g_idx beyond its {self.groups} groups")
        return order

    def _whole(self, packed: Tensor, count: int) -> Tensor:
        """The first numbers of each row of words [n, words], signed: [n, count] in int16."""
        numbers = unpacked(packed.view(torch.uint8), self.bits)[:, :count]
        return numbers.to(torch.int16) - 2 ** (self.bits - 1)

    def rows(self, start: int, stop: int) -> Tensor:
        numbers = self._whole(self.view("weight_packed")[start:stop].contiguous(), self.shape[1]).float()
        scale = of_rows(self.view("weight_scale"), start, stop)
        zero = None if self.zero is None else of_rows(self.zero, start, stop)
        if self.order is not None and self.groups > 1:      # a group of its own for each column
            scale = scale[:, self.order]
            zero = None if zero is None else zero[:, self.order]
        return scaled(numbers, scale, zero)


def compressed(name: str, parts: dict, default: torch.dtype) -> Quantized:
    """One of the two layouts, by the names of the parts."""
    packed = "weight_packed" in parts or "weight_shape" in parts
    return (Packed if packed else Plain)(name, parts, default)
