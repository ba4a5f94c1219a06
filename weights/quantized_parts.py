"""A weight that somebody else's program has quantized: several tensors of the files make up one parameter.

    names ─► parts of a weight ─► Quantized: shape, dtype and `read`, which dequantizes it in plain torch

This is what the formats share; each has a file of its own, and prequantized.py knows them all. Files come
from strangers: shapes and dtypes of all parts are checked from the headers before a weight is read, and small
parts that say more than numbers by their values. N rows, K columns, G groups of columns.
"""
import math

import torch
from torch import Tensor

from weights.files import again
from weights.messages import named, quoted
from weights.safetensors_file import PACKED, STORED
from weights.stored import Stored

HALVES = torch.bfloat16, torch.float16
FLOATS = "BF16", "F16", "F32"
EIGHT_BITS = "F8_E4M3", "F8_E5M2", "I8"


class Quantized(Stored):
    """A parameter under the name that it has unquantized. Raises ValueError where its parts do not fit.

    `default` is the dtype that most of the checkpoint's other tensors have: that of the result, if the format
    does not name one. A kind has its `method`, its parts, `layout`, which checks them, and `rows`.
    """
    maps = False
    method: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    numbers_at_once = 2 ** 22               # dequantized in one piece: this needs memory beside the result

    def __init__(self, name: str, parts: dict[str, Stored], default: torch.dtype):
        super().__init__(next(iter(parts.values())).shard, name)
        self.parts = parts
        missing = [part for part in self.required if part not in parts]
        unknown = [part for part in parts if part not in self.required + self.optional]
        if missing:
            raise self.damaged(f"lacks its {quoted(missing[0])}")
        if unknown:
            raise self.not_read(f"has a part {quoted(unknown[0])}")
        self._shape, self._dtype = self.layout(default)

    @property
    def shape(self) -> list[int]:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def layout(self, default: torch.dtype) -> tuple[list[int], torch.dtype]:
        """The parameter's shape [N, K] and dtype, once all parts are checked."""
        raise NotImplementedError

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the parameter in fp32, [stop - start, K]."""
        raise NotImplementedError

    def read(self) -> Tensor:
        """The dequantized parameter on the CPU, in its dtype."""
        rows, columns = self.shape
        result = torch.empty(rows, columns, dtype=self.dtype)
        step = max(1, self.numbers_at_once // columns)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            result[start:stop] = self.rows(start, stop)
        return result

    def forget(self):
        for part in self.parts.values():
            part.forget()

    # ---- checked parts

    def header(self, part: str, kinds: tuple[str, ...]) -> list[int]:
        """The shape of a part that has one of these dtypes; no weight is touched."""
        stored = self.parts[part]
        kind = stored.shard.entries[stored.name]["dtype"]
        if kind not in kinds:
            raise self.damaged(f"has the dtype {quoted(kind, 20)} in its {quoted(part)}, "
                               f"not {' or '.join(kinds)}")
        return stored.shape

    def matrix(self, part: str, kinds: tuple[str, ...]) -> list[int]:
        """The shape [N, K] of a part that is a matrix of one of these dtypes."""
        shape = self.header(part, kinds)
        if len(shape) != 2 or not all(shape):
            raise self.damaged(f"has the shape {quoted(shape)}, which is not that of a matrix")
        return shape

    def item_size(self, part: str) -> int:
        """Bytes of an element of a part."""
        stored = self.parts[part]
        return (STORED | PACKED)[stored.shard.entries[stored.name]["dtype"]].itemsize

    def sized(self, part: str, kinds: tuple[str, ...], count: int):
        """Checks that a part has one of these dtypes and so many elements."""
        shape = self.header(part, kinds)
        if math.prod(shape) != count:
            raise self.damaged(f"has the shape {quoted(shape)} in its {quoted(part)}, not {count} elements")

    def view(self, part: str) -> Tensor:
        """A part as it lies in the file, or a copy where kernels need its alignment."""
        return self.parts[part].read()

    def damaged(self, what: str, remedy: str | None = None) -> ValueError:
        return ValueError(f"{named(self.shard.path)}: tensor {quoted(self.name)}, quantized by "
                          f"{self.method}, {what}; {remedy or again(self.shard.path.parent)}")

    def not_read(self, what: str) -> ValueError:
        return self.damaged(what, "this is not read here: use the bf16 checkpoint")

    # ---- scales

    def scale_groups(self, part: str, rows: int, columns: int) -> int:
        """How many groups of columns have a scale of their own in each row: G of [N, G].

        1 also stands for a scale for each row, [N] or [N, 1], and for a single one.
        """
        shape = self.header(part, FLOATS)
        if math.prod(shape) == 1 or shape in ([rows], [rows, 1]):
            return 1
        if len(shape) != 2 or shape[0] != rows or not shape[1] or columns % shape[1]:
            raise self.not_read(f"has the shape {quoted(shape)} in its {quoted(part)}, not a number for each "
                                f"row or group of columns of [{rows}, {columns}]")
        return shape[1]

    def result_dtype(self, part: str, default: torch.dtype) -> torch.dtype:
        """That of the scales, if it has 16 bits; else that of the other tensors; else bf16."""
        stored = self.parts[part]
        own = (STORED | PACKED)[stored.shard.entries[stored.name]["dtype"]]
        return next((dtype for dtype in (own, default) if dtype in HALVES), torch.bfloat16)


class OfEightBits(Quantized):
    """A float of 8 bits or a whole number for each weight [N, K], with a scale for all, each row or each
    group of columns, and perhaps zero points alike."""
    number_part: str                        # the names of these parts
    scale_part: str
    zero_part: str

    def layout(self, default: torch.dtype) -> tuple[list[int], torch.dtype]:
        shape = self.matrix(self.number_part, EIGHT_BITS)
        self.scale_groups(self.scale_part, *shape)
        if self.zero_part in self.parts:
            self.sized(self.zero_part, EIGHT_BITS + FLOATS, math.prod(self.parts[self.scale_part].shape))
        return shape, self.result_dtype(self.scale_part, default)

    def rows(self, start: int, stop: int) -> Tensor:
        zero = None
        if self.zero_part in self.parts:
            zero = of_rows(self.view(self.zero_part), start, stop)
        scale = of_rows(self.view(self.scale_part), start, stop)
        return scaled(self.view(self.number_part)[start:stop].float(), scale, zero)


def of_rows(scale: Tensor, start: int, stop: int) -> Tensor:
    """Of a tensor with a value for each group or row, or for all: fp32 [n, G], [n, 1] or [1, 1]."""
    if scale.numel() == 1:
        return scale.reshape(1, 1).float()
    return scale.reshape(len(scale), -1)[start:stop].float()


def scaled(numbers: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """(numbers - zero) * scale for numbers [n, K]; the others [n, G] or [1, 1], zero None for 0."""
    grouped = numbers.unflatten(1, (scale.shape[1], -1))                    # [n, G, K / G]
    if zero is not None:
        grouped = grouped - zero[..., None]
    return (grouped * scale[..., None]).flatten(1)


def unpacked(data: Tensor, bits: int) -> Tensor:
    """Whole numbers of 1, 2, 4 or 8 bits out of bytes [n, b], lowest bits first: [n, b * 8 / bits]."""
    if bits == 8:
        return data
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return ((data[..., None] >> shifts) & (2 ** bits - 1)).flatten(1)
