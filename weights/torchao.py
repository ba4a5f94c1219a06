"""Weights quantized by torchao, as transformers' save_pretrained writes them to safetensors.

Each weight X.weight is X._weight_qdata and its scales. Read are the layouts that are the same on every
device: Int8Tensor, Float8Tensor and IntxUnpackedToInt8Tensor (torchao 0.18). Those of int4 are packed for one
kernel each.
"""
import math

import torch
from torch import Tensor

from weights.quantized_parts import EIGHT_BITS, FLOATS, Quantized, of_rows, scaled


class TorchAo(Quantized):
    """`qdata` [N, K] of 8 bits each, `scale` [N, G], and zero points alike."""
    method = "torchao"
    required = "qdata", "scale"
    optional = ("zero_point",)

    def layout(self, default: torch.dtype) -> tuple[list[int], torch.dtype]:
        shape = self.matrix("qdata", EIGHT_BITS)
        self.scale_groups("scale", *shape)
        if "zero_point" in self.parts:
            self.sized("zero_point", EIGHT_BITS + FLOATS, math.prod(self.parts["scale"].shape))
        return shape, self.result_dtype("scale", default)

    def rows(self, start: int, stop: int) -> Tensor:
        zero = of_rows(self.view("zero_point"), start, stop) if "zero_point" in self.parts else None
        return scaled(self.view("qdata")[start:stop].float(), of_rows(self.view("scale"), start, stop), zero)
