"""Weights quantized by HQQ (half-quadratic quantization, Badri and Shaji 2023), as HQQLinear stores them.

X.weight is X.W_q with scales and zero points that are no whole numbers. Settings are tensors too: numbers,
and texts with a byte for each letter. Read as hqq 0.2.8 dequantizes: it computes in the dtype of the scales.
"""
import math

import torch
from torch import Tensor

from weights.messages import quoted
from weights.quantized_parts import FLOATS, Quantized

PACKINGS = {                    # the shift of each part of the rows, and what they are packed in
    "8bit_u8": ((0,), torch.uint8), "4bit_u8": ((4, 0), torch.uint8),
    "3bit_32": ((27, 24, 21, 18, 15, 12, 9, 6, 3, 0), torch.int32),
    "2bit_u8": ((6, 4, 2, 0), torch.uint8), "1bit_u8": ((7, 6, 5, 4, 3, 2, 1, 0), torch.uint8)}
SETTINGS = ("compute_dtype", "channel_wise", "encoded_state_dict", "offload_meta", "optimize", "quant_scale",
            "quant_zero", "round_zero", "stores_quant_config", "unpack_view_dtype", "view_as_float")
MOST_LETTERS = 20


class Hqq(Quantized):
    """The weight in reading order is a matrix [H, W] of groups: its rows with axis 1, else its columns.

    The rows of that matrix are packed part upon part: with 4 bits the first half in the high bits and the
    second in the low ones; with 3 bits ten parts in 32 bits, the last of them filled up.
    """
    method = "HQQ"
    required = "W_q", "scale", "zero", "shape", "nbits", "group_size", "axis", "packing"
    optional = SETTINGS

    def layout(self, default: torch.dtype) -> tuple[list[int], torch.dtype]:
        self.sized("shape", ("I64", "I32"), 2)
        shape = self.view("shape").flatten().tolist()
        group, self.axis, bits = (self._number(part) for part in ("group_size", "axis", "nbits"))
        count = math.prod(shape)
        if min(shape) < 1 or max(shape) >= 2 ** 31 or group < 1 or count % group or self.axis not in (0, 1):
            raise self.damaged(f"has groups of {group} along axis {self.axis} in the shape {shape}")
        if any(self._number(part) for part in ("quant_scale", "quant_zero") if part in self.parts):
            raise self.not_read("has quantized scales")
        packing = self._text("packing")
        if packing not in PACKINGS or not packing.startswith(f"{bits}bit_"):
            raise self.damaged(f"has {bits} bits packed as {quoted(packing)}")
        shifts, packed_as = PACKINGS[packing]
        self.height, self.width = (count // group, group) if self.axis == 1 else (group, count // group)
        self.packed_rows = -(-self.height // len(shifts))
        size = self.packed_rows * self.width * packed_as.itemsize
        self.sized("W_q", ("U8", "I32", *FLOATS), size // self.item_size("W_q"))
        if size % self.item_size("W_q"):
            raise self.damaged("has the wrong size")
        self.shifts, self.packed_as, self.mask = shifts, packed_as, 2 ** bits - 1
        scales = [self.height, 1] if self.axis == 1 else [1, self.width]
        for part in "scale", "zero":
            if self.header(part, FLOATS) not in (scales, [1, 1], [1], []):
                raise self.damaged(f"has the shape {quoted(self.parts[part].shape)} in its {quoted(part)}")
        return shape, self.result_dtype("scale", default)

    def _number(self, part: str) -> int:
        self.sized(part, ("I32", "I64", "U8"), 1)
        return int(self.view(part).item())

    def _text(self, part: str) -> str:
        if math.prod(self.header(part, ("U8",))) > MOST_LETTERS:
            raise self.damaged(f"has a long text in its {quoted(part)}")
        return bytes(self.view(part).flatten().tolist()).decode("latin-1")

    def read(self) -> Tensor:
        data = self.view("W_q").flatten().view(self.packed_as).view(self.packed_rows, self.width)
        result = torch.empty(self.height, self.width, dtype=self.dtype)
        piece = max(1, self.numbers_at_once // self.width)
        for part, shift in enumerate(self.shifts):
            first = part * self.packed_rows
            for start in range(0, min(self.packed_rows, self.height - first), piece):
                stop = min(start + piece, self.packed_rows, self.height - first)
                numbers = (data[start:stop] >> shift) & self.mask
                scale = self._of_rows("scale", first + start, first + stop)
                zero = self._of_rows("zero", first + start, first + stop)
                result[first + start:first + stop] = (numbers.to(scale.dtype) - zero) * scale
        return result.view(self.shape)

    def _of_rows(self, part: str, start: int, stop: int) -> Tensor:
        """The scales or zero points of rows of the matrix, [n, 1], [1, W] or [1, 1]."""
        tensor = self.view(part)
        if tensor.numel() == 1:
            return tensor.reshape(1, 1)
        return tensor[start:stop] if self.axis == 1 else tensor
