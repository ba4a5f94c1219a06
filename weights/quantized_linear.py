"""Linear layers whose weights take 8 or 4 bits: half or a quarter of the memory, and of what a token reads.

    int8  W[n, k] = code[n, k] · scale[n]                           one scale for each output
    int4  W[n, k] = (code[n, k] - 8) · scale[g, n] + middle[g, n]   for each group g of inputs

Only weights are rounded: activations keep their dtype, and products are summed in fp32. `rounded` makes the
tensors that a file stores, the same for every device; `fill` makes of them what the kernel of a device takes.
These are buffers, not parameters: nothing here can be trained. N outputs, K inputs, G groups of inputs.
"""
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weights.wide import is_slow

AT_ONCE = 2 ** 16                   # weights that a CPU rounds at a time: larger parts leave holes in memory
GROUPS = 128, 64, 32                # inputs that share a scale of int4, as kernels know them
WIDE = 1024                         # inputs from which on int4 has groups of 128; layers of fewer have 32
PART = 2 ** 20                      # weights that a CPU turns into numbers at a time
CPU_BLOCKS = 64, 32                 # rows that kernels for CPUs keep together, with AVX512 and without

Tensors = dict[str, Tensor]


class QuantizedLinear(nn.Module):
    """In place of a linear layer, which may be on the meta device: the buffers `weight` and `scale`."""

    def __init__(self, like: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        self.register_parameter("bias", like.bias)
        for name, tensor in self.empty(like.weight.shape, like.weight.dtype).items():
            self.register_buffer(name, tensor)          # its size, before `fill`

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]. Raises ValueError where gradients are asked for."""
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("a quantised layer has no gradients: compute in torch.inference_mode(), or load "
                             "the model without quantize to train it")
        rows = x.reshape(-1, self.in_features).contiguous()
        many = x.device.type == "cpu" and not torch.compiler.is_compiling() and len(rows) >= self.many
        y = self.product_of_many(rows) if many else self.product(rows)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


    def product_of_many(self, x: Tensor) -> Tensor:
        """The product on a CPU with many positions. torch's kernels turn codes into numbers for every few of
        them; here it happens once, a part of the weight at a time, and the product is an ordinary one."""
        dtype = torch.float32 if is_slow(x.dtype, x.device) else x.dtype
        x_wide = x.to(dtype)
        rows = max(1, PART // self.in_features // CPU_BLOCKS[0]) * CPU_BLOCKS[0]
        parts = zip(self.weight.split(rows), self.scale.split(rows, self.scale.ndim // 2), strict=True)
        outputs = [F.linear(x_wide, self.numbers_on_cpu(*part, dtype)) for part in parts]
        return torch.cat(outputs, dim=1).to(x.dtype)


class Int8Linear(QuantizedLinear):
    """`weight` [N, K] int8 and `scale` [N]."""
    kind = "int8"
    many = 32                           # positions from which on `product_of_many` is faster

    @staticmethod
    def fits(shape: list[int]) -> bool:
        return shape[1] % 16 == 0                   # kernels for CPUs read 16 weights at a time

    @staticmethod
    def empty(shape: Sequence[int], dtype: torch.dtype, device: str | torch.device = "meta") -> Tensors:
        """What is stored of a weight of a shape [N, K], without its values."""
        return {"weight": torch.empty(*shape, dtype=torch.int8, device=device),
                "scale": torch.empty(shape[0], dtype=dtype, device=device)}

    @staticmethod
    def belong(codes: list[int], scale: list[int]) -> bool:
        """Whether stored tensors of these shapes make a weight."""
        return scale == codes[:1] and Int8Linear.fits(codes)

    @staticmethod
    def rounded(weight: Tensor, dtype: torch.dtype) -> Tensors:
        """What is stored of a weight [N, K]: rounded to nearest, symmetric, with scales in `dtype`."""
        stored = Int8Linear.empty(weight.shape, dtype, weight.device)
        for w, code, s in in_parts(weight, *stored.values()):
            s.copy_(w.abs().amax(1) / 127)
            code.copy_((w / nonzero(s)[:, None]).round_().clamp_(-127, 127))
        return stored

    @staticmethod
    def numbers(stored: Tensors) -> Tensor:
        """The weight [N, K] that is stored."""
        return stored["weight"].to(stored["scale"].dtype).mul_(stored["scale"][:, None])

    def fill(self, stored: Tensors, device: torch.device, dtype: torch.dtype):
        """Hold the stored tensors, for a device and the dtype of activations."""
        self.weight = stored["weight"].to(device)
        self.scale = stored["scale"].to(device, dtype)

    @staticmethod
    def numbers_on_cpu(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the weight, from the same rows of the buffers."""
        return codes.to(dtype).mul_(scale[:, None])

    def product(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            return torch._weight_int8pack_mm(x, self.weight, self.scale)
        if torch.compiler.is_compiling() and len(x) == 1:       # one loop, which reads codes
            return (self.weight.float() * x.float()).sum(-1)[None].to(x.dtype) * self.scale
        return F.linear(x, self.weight.to(x.dtype)) * self.scale


class Int4Linear(QuantizedLinear):
    """`weight` as the device's kernel packs it, and `scale` [G, N, 2]: scale and middle of every group."""
    kind = "int4"
    many = 128

    @staticmethod
    def fits(shape: list[int]) -> bool:
        return shape[0] % 16 == 0 and shape[1] % 32 == 0

    @staticmethod
    def empty(shape: Sequence[int], dtype: torch.dtype, device: str | torch.device = "meta") -> Tensors:
        """What is stored of a weight of a shape [N, K], without its values."""
        outputs, inputs = shape
        group = GROUPS[0] if inputs >= WIDE and inputs % GROUPS[0] == 0 else GROUPS[-1]
        return {"weight": torch.empty(outputs, inputs // 2, dtype=torch.uint8, device=device),
                "scale": torch.empty(inputs // group, outputs, 2, dtype=dtype, device=device)}

    @staticmethod
    def belong(codes: list[int], scale: list[int]) -> bool:
        """Whether stored tensors of these shapes make a weight."""
        outputs, inputs = codes[0], 2 * codes[1]
        return scale in ([inputs // group, outputs, 2] for group in GROUPS if inputs % group == 0)

    @staticmethod
    def rounded(weight: Tensor, dtype: torch.dtype) -> Tensors:
        """What is stored of a weight [N, K]: codes [N, K/2], of two inputs in a byte, the first in its high
        bits; and `scale` in `dtype`. A group reaches from its least to its largest weight."""
        stored = Int4Linear.empty(weight.shape, dtype, weight.device)
        for w, code, s in in_parts(weight, stored["weight"], stored["scale"].transpose(0, 1)):
            w = w.unflatten(1, (s.shape[1], -1))
            low, high = w.amin(2), w.amax(2)
            s[..., 0] = (high - low) / 15
            s[..., 1] = low + 8 * s[..., 0].float()
            step, middle = s.float()[:, :, None].unbind(-1)
            q = ((w - middle) / nonzero(step) + 8).round_().clamp_(0, 15).flatten(1).byte()
            code.copy_(q[:, ::2] << 4 | q[:, 1::2])
        return stored

    @staticmethod
    def numbers(stored: Tensors) -> Tensor:
        """The weight [N, K] that is stored."""
        step, middle = stored["scale"].transpose(0, 1)[:, :, None].unbind(-1)               # [N, G, 1] each
        codes = unpacked(stored["weight"]).to(step.dtype).unflatten(1, (step.shape[1], -1))
        return codes.sub_(8).mul_(step).add_(middle).flatten(1)

    def fill(self, stored: Tensors, device: torch.device, dtype: torch.dtype):
        """Hold the stored tensors, packed for a device, and for the dtype of activations."""
        codes = stored["weight"].to(device)
        tiles = next(tiles for tiles in (8, 4, 2) if self.in_features % (16 * tiles) == 0)
        cuda = device.type == "cuda"
        self.weight = torch._convert_weight_to_int4pack(codes, tiles) if cuda else packed_for_cpu(codes)
        self.scale = stored["scale"].to(device, dtype)

    def product_of_many(self, x: Tensor) -> Tensor:
        block = cpu_block()
        if block is None or self.out_features % block:      # not packed in a way that is known here
            return self.product(x)
        return super().product_of_many(x)

    @staticmethod
    def numbers_on_cpu(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the weight, from the same rows of the buffers."""
        packed = codes.view(-1, 2 * codes.shape[1], cpu_block() // 2)                   # [blocks, K, block/2]
        inputs = torch.cat((packed & 15, packed >> 4), dim=2).mT.reshape(len(codes), -1)            # [N, K]
        step, middle = scale.transpose(0, 1).to(dtype)[:, :, None].unbind(-1)                   # [N, G, 1]
        return inputs.to(dtype).unflatten(1, (len(scale), -1)).sub_(8).mul_(step).add_(middle).flatten(1)

    def product(self, x: Tensor) -> Tensor:
        group = self.in_features // len(self.scale)
        if x.is_cuda:
            return torch._weight_int4pack_mm(x, self.weight, group, self.scale)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.weight, group, self.scale)


def in_parts(weight: Tensor, *made: Tensor):
    """The rows of a weight in fp32, a part at a time, with the same rows of what is made of them."""
    at_once = AT_ONCE if weight.device.type == "cpu" else 256 * AT_ONCE
    rows = max(1, at_once // weight.shape[1])
    for w, *others in zip(*(tensor.split(rows) for tensor in (weight, *made)), strict=True):
        yield w.float(), *others


def nonzero(scale: Tensor) -> Tensor:
    """To divide by: where a scale is 0, all weights are the same, and any code will do."""
    return torch.where(scale == 0, 1, scale).float()


def unpacked(codes: Tensor) -> Tensor:
    """[N, K/2] of two codes in a byte -> [N, K]."""
    return torch.stack((codes >> 4, codes & 15), dim=2).flatten(1)


def packed_for_cpu(codes: Tensor) -> Tensor:
    """[N, K/2] as stored -> as the kernel of this CPU takes it, also [N, K/2] bytes."""
    block = cpu_block()
    whole = 0 if block is None else len(codes) // block * block
    packed = torch.empty_like(codes)
    if whole:
        packed[:whole] = in_blocks(codes[:whole], block)
    if whole < len(codes):
        packed[whole:] = by_torch(codes[whole:])
    return packed


def in_blocks(codes: Tensor, block: int) -> Tensor:
    """Blocks of rows, in each input by input: a byte has the codes of row n and, in its high bits, of row
    n + block / 2."""
    low, high = codes.unflatten(0, (-1, block)).mT.contiguous().chunk(2, dim=2)    # [.., K/2, block/2]
    return torch.stack((low >> 4 | high & 240, low & 15 | high << 4), dim=2).view(codes.shape)


def by_torch(codes: Tensor) -> Tensor:
    """torch's own packing, which takes a minute for 11B on two cores."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpacked(codes).int(), 1)


@lru_cache
def cpu_block() -> int | None:
    """The rows of a block on this CPU, found by trying; None where torch packs otherwise than `in_blocks`."""
    codes = torch.arange(64 * 32).mul(37).remainder(251).byte().view(64, 32)
    expected = by_torch(codes)
    return next((block for block in CPU_BLOCKS if torch.equal(in_blocks(codes, block), expected)), None)
