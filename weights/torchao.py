"""Weights quantized by torchao, as transformers' save_pretrained writes them to safetensors.

Each weight X.weight is X._weight_qdata and its scales. Read are the layouts that are the same on every
device: Int8Tensor, Float8Tensor and IntxUnpackedToInt8Tensor (torchao 0.18). Those of int4 are packed for one
kernel each.
"""
from weights.quantized_parts import OfEightBits


class TorchAo(OfEightBits):
    """`qdata`, `scale` and `zero_point`."""
    method = "torchao"
    number_part, scale_part, zero_part = "qdata", "scale", "zero_point"
    required = number_part, scale_part
    optional = (zero_part,)
