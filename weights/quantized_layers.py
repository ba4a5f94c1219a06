"""Which layers of a model hold 8 or 4 bits, and how they get them: what `--quantize` means.

    model on meta ── quantized_layers ─► linear layers replaced ── fill, tensor by tensor ─► weights

`int8` rounds all projections of the decoder and the head, `int4` those projections to 4 bits and the head to
8. Norms, gates, the embedding, the projector and the vision tower stay as they are; `int8+tower` and
`int4+tower` round the tower's linear layers to 8 bits. A layer whose size 4 bits do not allow has 8 bits, and
one that the kernels cannot take at all stays as it is. One tensor is read, rounded and dropped at a time.
"""
import re

import torch
from torch import nn

from model.llama_vision import LlamaVision
from weights.messages import quoted
from weights.quantized_linear import Int4Linear, Int8Linear, QuantizedLinear
from weights.stored import Stored

KINDS = {"int8": Int8Linear, "int4": Int4Linear}
WAYS = *KINDS, *(f"{kind}+tower" for kind in KINDS)
PROJECTIONS = re.compile(r"language_model\.layers\.\d+\..*_proj")
HEAD = re.compile("lm_head")
TOWER = re.compile(r"vision_model\.(global_)?transformer\.layers\..*")


def check_quantize(way: str | None, device: torch.device, dtype: torch.dtype | None = None):
    """Raise ValueError with one line for an unknown way, or where its kernels do not run."""
    if way is None:
        return
    if way not in WAYS:
        raise ValueError(f"unknown quantize {quoted(way)}: use one of {', '.join(WAYS)}")
    check_kernels(KINDS[way[:4]], device, dtype)


def check_kernels(layer: type[QuantizedLinear], device: torch.device, dtype: torch.dtype | None):
    """Raise ValueError with one line where no kernel computes such layers on a device, in a dtype."""
    if dtype == torch.float64:
        raise ValueError(f"{layer.kind} weights are not for fp64: choose the dtype bf16, fp16 or fp32")
    if layer is Int4Linear and device.type == "mps":
        raise ValueError("int4 weights run on cpu and cuda, not on mps: quantise to int8")
    if layer is Int4Linear and device.type == "cuda" and dtype not in (None, torch.bfloat16):
        raise ValueError(f"int4 weights on a GPU compute in bf16, not in {dtype}: choose the dtype bf16, or "
                         "quantise to int8")


def quantized_layers(model: LlamaVision, found: dict[str, Stored], way: str | None, device: torch.device,
                     dtype: torch.dtype) -> dict[str, QuantizedLinear]:
    """Replace the linear layers of a model on meta that hold 8 or 4 bits: those that are stored so, and those
    that `way` chooses. Returns them, still empty, by the names of their weights.

    Raises ValueError where what is stored has been rounded in another way, or where no kernel for it computes
    on this device in this dtype.
    """
    layers = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        weight = f"{name}.weight"
        chosen = None if way is None else choice(name, list(module.weight.shape), way)
        stored = None if weight not in found else found[weight].layer
        if way is not None and stored not in (None, chosen):
            kinds = sorted({each.layer.kind for each in found.values() if each.layer})
            raise ValueError(f"the checkpoint has {' and '.join(kinds)} weights, which cannot become {way}: "
                             "leave quantize out, or take the bf16 checkpoint")
        chosen = stored or chosen
        if chosen is not None:
            check_kernels(chosen, device, dtype)
            layers[weight] = chosen(module)
            model.set_submodule(name, layers[weight])
    return layers


def choice(name: str, shape: list[int], way: str) -> type[QuantizedLinear] | None:
    """What becomes of a linear layer of this name and shape [N, K]; None: nothing."""
    kind, _, tower = way.partition("+")
    eight = HEAD.fullmatch(name) or tower and TOWER.fullmatch(name)
    if len(shape) != 2 or not eight and not PROJECTIONS.fullmatch(name):        # the tower's norms
        return None
    wanted = [Int8Linear] if eight else [KINDS[kind], Int8Linear]
    return next((layer for layer in wanted if layer.fits(shape)), None)


def weights_words(model: LlamaVision) -> str | None:
    """For people: what a quantised model's weights are, and their bytes; None for any other model."""
    kinds = sorted({module.kind for module in model.modules() if isinstance(module, QuantizedLinear)})
    if not kinds:
        return None
    return f"{' and '.join(kinds)} weights; all weights together take {bytes_of(model) / 1e6:,.1f} MB"


def bytes_of(model: LlamaVision) -> int:
    """Of all weights; those of quantised layers are no parameters."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def fill(layer: QuantizedLinear, stored: Stored, works_on: torch.device, kept_on: torch.device,
         dtype: torch.dtype):
    """Give a layer its weight: what is stored, or else the numbers that are stored, rounded on the device
    that it works on. It may be kept on another one, for copies."""
    parts = stored.codes()
    if parts is not None:
        layer.fill(parts, works_on, dtype)
    else:
        layer.fill(layer.rounded(stored.read().to(works_on), dtype), works_on, dtype)
    stored.forget()                                     # of codes that are held as mapped, none was read yet
    layer.weight, layer.scale = layer.weight.to(kept_on), layer.scale.to(kept_on)
