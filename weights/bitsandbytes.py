"""Weights quantized by bitsandbytes: 4 bits (nf4, fp4: arXiv 2305.14314) and 8 bits (LLM.int8: 2208.07339).

The layouts are those that transformers' save_pretrained writes; read here as bitsandbytes 0.50 dequantizes.
"""
import json
import math

import torch
from torch import Tensor

from weights.device import DTYPES
from weights.messages import one_line
from weights.quantized_parts import Quantized, of_rows
from weights.safetensors_file import PACKED, STORED

STATES = "quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4"
MOST_STATE = 10_000             # bytes of JSON
MOST = 2 ** 31                  # no side of a matrix is longer


class FourBits(Quantized):
    """Two weights a byte, the first in the high bits; each is a place in a table of 16 values.

    Every `block` weights in reading order share a scale, the absmax. With double quantization these scales
    are bytes too: places in a table of 256, times a scale for every `nested_block`, plus an offset.
    """
    method = "bitsandbytes (4 bits)"
    required = "weight", "absmax", "quant_map"
    optional = "nested_absmax", "nested_quant_map", *STATES

    def layout(self, default: torch.dtype) -> tuple[list[int], torch.dtype]:
        state = self._state()
        shape = state.get("shape")
        if not isinstance(shape, list) or len(shape) != 2 or not all(map(_size, shape)):
            raise self.damaged("has a quant_state without the shape of a matrix")
        self.block = self._block(state, "blocksize")
        count = math.prod(shape)
        self.header("weight", tuple(STORED | PACKED))           # of any dtype: bnb_4bit_quant_storage
        item = self.item_size("weight")
        self.sized("weight", tuple(STORED | PACKED), (count + 1) // (2 * item))
        if count > 2 * item * ((count + 1) // (2 * item)):
            raise self.damaged(f"has the shape {shape}, which does not fill whole elements")
        self.sized("quant_map", ("F32",), 16)
        blocks = -(-count // self.block)
        self.nested = "nested_absmax" in self.parts
        self.sized("absmax", ("U8",) if self.nested else ("F32",), blocks)
        if self.nested:
            self._check_nested(state, blocks)
        name = state.get("dtype")
        dtype = DTYPES.get(name) if isinstance(name, str) else None
        return shape, default if dtype is None else dtype

    def _state(self) -> dict:
        """What the quantizer noted, as JSON in a tensor of bytes."""
        states = [part for part in STATES if part in self.parts]
        if len(states) != 1:
            raise self.damaged("needs one quant_state")
        if math.prod(self.header(states[0], ("U8",))) > MOST_STATE:
            raise self.damaged(f"has a quant_state of over {MOST_STATE} bytes")
        try:
            state = json.loads(bytes(self.view(states[0]).flatten().tolist()))
        except (ValueError, RecursionError) as error:
            raise self.damaged(f"has a quant_state that is not JSON ({one_line(error, 80)})") from None
        if not isinstance(state, dict):
            raise self.damaged("has a quant_state that is not a JSON object")
        return state

    def _block(self, state: dict, key: str) -> int:
        block = state.get(key)
        if not _size(block) or block % 2:
            raise self.damaged(f"has a quant_state without an even {key}")
        return block

    def _check_nested(self, state: dict, blocks: int):
        if "nested_quant_map" not in self.parts:
            raise self.damaged("lacks its 'nested_quant_map'")
        self.nested_block = self._block(state, "nested_blocksize")
        self.sized("nested_absmax", ("F32",), -(-blocks // self.nested_block))
        self.sized("nested_quant_map", ("F32",), 256)
        self.offset = state.get("nested_offset")
        if type(self.offset) not in (int, float) or not abs(self.offset) < 1e30:
            raise self.damaged("has a quant_state without a nested_offset")

    def read(self) -> Tensor:
        count = math.prod(self.shape)
        result = torch.empty(count, dtype=self.dtype)
        data = self.view("weight").flatten().view(torch.uint8)
        table = self.view("quant_map").flatten()
        pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), 1)         # [256, 2]
        absmax = self._absmax()
        step = max(1, self.numbers_at_once // self.block) * self.block
        for start in range(0, count, step):
            stop = min(start + step, count)
            numbers = pairs.index_select(0, data[start // 2:(stop + 1) // 2].int()).flatten()[:stop - start]
            scale = absmax[start // self.block:-(-stop // self.block)]
            result[start:stop] = numbers * scale.repeat_interleave(self.block)[:stop - start]
        return result.view(self.shape)

    def _absmax(self) -> Tensor:
        absmax = self.view("absmax").flatten()
        if not self.nested:
            return absmax
        numbers = self.view("nested_quant_map").flatten().index_select(0, absmax.int())
        scale = self.view("nested_absmax").flatten().repeat_interleave(self.nested_block)[:len(numbers)]
        return numbers * scale + self.offset


class EightBits(Quantized):
    """Whole numbers with the absmax of each row, `SCB`: 127 stands for it."""
    method = "bitsandbytes (8 bits)"
    required = "weight", "SCB"
    optional = ("weight_format",)

    def layout(self, default: torch.dtype) -> tuple[list[int], torch.dtype]:
        shape = self.matrix("weight", ("I8",))
        self.sized("SCB", ("F32", "F16", "BF16"), shape[0])
        if "weight_format" in self.parts:
            self.sized("weight_format", ("U8",), 1)
            if self.view("weight_format").item() != 0:
                raise self.not_read("is laid out for one kind of GPU, as old versions did")
        return shape, self.result_dtype("SCB", default)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.view("weight")[start:stop].float() * (of_rows(self.view("SCB"), start, stop) / 127)


def _size(value: object) -> bool:
    return type(value) is int and 0 < value < MOST
