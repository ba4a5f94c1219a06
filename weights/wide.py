"""bf16 and fp16 on a CPU without instructions for them: weights stay narrow, products are made in fp32.

There torch multiplies narrow matrices about as slowly as plain loops do: 3 to 10 times slower than fp32. So
linear layers and the convolution of the patches widen their weights for each product, a part at a time, and
round what comes out. The numbers are at least as exact. With few positions the product waits for memory and
not for arithmetic: there, and in compiled decode steps, weights are read narrow as everywhere else. So they
are in training, where each widened weight would have to be kept for the gradients.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = 8                             # positions from which on widening is faster
AT_ONCE = 2 ** 24                   # weights that are widened at a time: 64 MB in fp32


class WideLinear(nn.Linear):
    """In place of a linear layer, whose parameters it takes over."""

    def __init__(self, like: nn.Linear):
        super().__init__(like.in_features, like.out_features, like.bias is not None, device="meta")
        self.weight, self.bias = like.weight, like.bias

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.numel() < FEW * self.in_features:
            return super().forward(x)
        wide = x.float()
        parts = self.weight.split(max(1, AT_ONCE // self.in_features))
        biases = [None] * len(parts) if self.bias is None else self.bias.float().split(len(parts[0]))
        outputs = [F.linear(wide, weight.float(), bias).to(x.dtype)
                   for weight, bias in zip(parts, biases, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


class WideConv2d(nn.Conv2d):
    """In place of a convolution, whose parameters it takes over."""

    def __init__(self, like: nn.Conv2d):
        super().__init__(like.in_channels, like.out_channels, like.kernel_size, like.stride,
                         bias=like.bias is not None, device="meta")
        self.weight, self.bias = like.weight, like.bias

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        return self._conv_forward(x.float(), self.weight.float(), bias).to(x.dtype)


WIDE = {nn.Linear: WideLinear, nn.Conv2d: WideConv2d}


def widen(model: nn.Module):
    """Replace the plain linear layers and convolutions of a model, which may be on the meta device."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if type(module) in WIDE:
                setattr(parent, name, WIDE[type(module)](module))


def is_slow(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of many positions are slower in this dtype than in fp32."""
    narrow = device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)
    return narrow and not (has_kernels(dtype) and has_instructions(dtype))


def has_kernels(dtype: torch.dtype) -> bool:
    """Whether oneDNN, the library that multiplies narrow matrices for torch on a CPU, does so here."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def has_instructions(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies this dtype itself. oneDNN says yes to bf16 on all CPUs with AVX512, but
    where it has to make it up it takes 3 times as long as fp32."""
    is_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    if not is_x86 or dtype is torch.float16:            # there oneDNN's word is enough
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def wide_words(model: nn.Module) -> str | None:
    """For people: that a model computes in this way; None if it does not."""
    wide = next((module for module in model.modules() if isinstance(module, WideLinear)), None)
    if wide is None:
        return None
    name = str(wide.weight.dtype).removeprefix("torch.")
    return f"this CPU has no fast {name}: products of {FEW} or more positions are made in float32"
