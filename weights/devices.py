"""A model that one card cannot hold: its layers over several devices, or its weights in the CPU's memory.

    --device cuda:0,cuda:1      the decoder's layers in order over the devices; all else is on the first one,
                                where prompts go in and logits come out
    --offload                   the linear layers that do not fit stay in the CPU's memory, and each is
                                copied to the GPU for its products, while the one before it works

Plain and slow: devices wait for each other, and copies run at the speed of the bus. Both act on single
modules of the decoder, so the network and the loop are the same code.
"""
import re
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from model.decoder import CrossAttentionLayer, SelfAttentionLayer
from model.image_tokens import ImageKV, ImageTokens
from model.layers import RMSNorm
from model.llama_vision import LlamaVision
from weights.device import parse_device
from weights.messages import quoted

LAYER = "language_model.layers."
LINEAR = re.compile(r"_proj\.\w+$")
RESERVE = 3 * 10 ** 9                   # bytes of a GPU that offloading leaves for activations and caches


def parse_devices(devices: str | torch.device) -> list[torch.device]:
    """The devices of a list "cuda:0,cuda:1", each of which is there. Raises ValueError with one line."""
    parts = devices.split(",") if isinstance(devices, str) else [devices]
    found = [parse_device(part.strip() if isinstance(part, str) else part) for part in parts]
    if len({device.type for device in found}) > 1:
        raise ValueError(f"devices {quoted(devices)}: name devices of one kind, as in cuda:0,cuda:1; "
                         "--offload leaves weights in the CPU's memory")
    return found


class Placement:
    """Where each part of a model is. It is planned on the meta device, before weights are read."""

    def __init__(self, model: LlamaVision, devices: list[torch.device], dtype: torch.dtype, offload: bool):
        layers = len(model.language_model.layers)
        if offload and len(devices) > 1:
            raise ValueError("--offload leaves weights in the CPU's memory for one GPU: name one device")
        self.devices = devices
        self.layers = [devices[0]] * layers if len(devices) == 1 else spread(model, devices, dtype)
        self.resident = fitting(model, devices[0], dtype) if offload else layers

    def device_of(self, name: str) -> torch.device:
        """Where a parameter or buffer is stored."""
        if not name.startswith(LAYER):
            return self.devices[0]
        layer = int(name[len(LAYER):].partition(".")[0])
        if layer >= self.resident and LINEAR.search(name):
            return torch.device("cpu")
        return self.layers[layer]

    def works_on(self, name: str) -> torch.device:
        """Where the product with a weight is computed, for which some kernels pack it."""
        device = self.device_of(name)
        return device if device.type == self.devices[0].type else self.devices[0]

    def connect(self, model: LlamaVision):
        """Let a model whose weights have been read work where they are; inference only, if they are in
        several places."""
        if len(self.devices) > 1:
            move_between(model, self.layers)
        if self.resident < len(self.layers):
            lend(model, self.devices[0], self.resident)
        if len(self.devices) > 1 or self.resident < len(self.layers):
            model.requires_grad_(False)


# ----- several devices


def spread(model: LlamaVision, devices: list[torch.device], dtype: torch.dtype) -> list[torch.device]:
    """The device of each layer of the decoder, so that every device has its share of the bytes.

    GPUs share in proportion to their free memory. The first device also holds all that is no such layer.
    """
    room = [torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 for device in devices]
    layers = [bytes_of(layer, dtype) for layer in model.language_model.layers]
    total = bytes_of(model, dtype)
    used = total - sum(layers)                          # on the devices so far, this one included
    places = []
    i = 0
    for size in layers:
        while i + 1 < len(devices) and used + size / 2 > total * sum(room[:i + 1]) / sum(room):
            i += 1
        places.append(devices[i])
        used += size
    return places


def bytes_of(module: nn.Module, dtype: torch.dtype) -> int:
    """Of a module whose floating-point numbers will have this type."""
    return sum(tensor.numel() * (dtype.itemsize if tensor.is_floating_point() else tensor.itemsize)
               for tensor in module.state_dict().values())


def move_between(model: LlamaVision, places: list[torch.device]):
    """Let layers that are on several devices work as one model."""
    decoder = model.language_model
    for i, (layer, device) in enumerate(zip(decoder.layers, places, strict=True)):
        kind = OwnDeviceSelf if isinstance(layer, SelfAttentionLayer) else OwnDeviceCross
        decoder.layers[i] = kind(layer, device)
    decoder.norm = OwnDeviceNorm(decoder.norm)


class OwnDeviceSelf(SelfAttentionLayer):
    """A self-attention layer that takes its inputs from other devices."""

    def __init__(self, layer: SelfAttentionLayer, device: torch.device):
        adopt(self, layer)
        self.device = device

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return super().forward(*moved((x, angles), self.device))

    def step(self, x: Tensor, angles: tuple[Tensor, Tensor], keys: Tensor, values: Tensor,
             slots: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        return super().step(*moved((x, angles, keys, values, slots, mask), self.device))


class OwnDeviceCross(CrossAttentionLayer):
    """A cross-attention layer that takes its inputs from other devices."""

    def __init__(self, layer: CrossAttentionLayer, device: torch.device):
        adopt(self, layer)
        self.device = device
        for name in "o_proj", "q_norm":
            setattr(self.cross_attn, name, Visited(self.cross_attn.get_submodule(name), device))

    def queries(self, x: Tensor) -> Tensor:
        return super().queries(moved(x, self.device))

    def keys_values(self, image: ImageTokens) -> ImageKV:
        return super().keys_values(moved(replace(image, states=None), self.device))

    def forward(self, x: Tensor, q: Tensor, kv: ImageKV, sees_image: Tensor | None,
                mask: Tensor | None) -> Tensor:
        return super().forward(*moved((x, q, kv, sees_image, mask), self.device))


class Visited(nn.Module):
    """A part of a cross-attention layer that pruners use, from another device too."""

    def __init__(self, part: nn.Module, device: torch.device):
        super().__init__()
        self.part = part
        self.device = device

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x.to(self.device)).to(x.device)


class OwnDeviceNorm(RMSNorm):
    """The norm after the last layer: brings the hidden states back to the first device."""

    def __init__(self, norm: RMSNorm):
        adopt(self, norm)
        self.eps = norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(moved(x, self.weight.device))


def adopt(module: nn.Module, other: nn.Module):
    """Begin a module that has the parts of another one under the same names."""
    nn.Module.__init__(module)
    for name, part in [*other.named_children(), *other.named_parameters(recurse=False)]:
        setattr(module, name, part)


def moved(value, device: torch.device):
    """The same on another device: a tensor, keys and values, image tokens, a tuple of these, or None."""
    if value is None:
        return None
    if isinstance(value, tuple):
        return tuple(moved(each, device) for each in value)
    if isinstance(value, (ImageKV, ImageTokens)):
        parts = {name: moved(part, device) for name, part in vars(value).items() if isinstance(part, Tensor)}
        return replace(value, **parts)
    return value.to(device)


# ----- weights in the CPU's memory


def fitting(model: LlamaVision, device: torch.device, dtype: torch.dtype) -> int:
    """How many layers of the decoder fit on a GPU with all that is no such layer; on a CPU none."""
    if device.type != "cuda":
        return 0
    layers = [bytes_of(layer, dtype) for layer in model.language_model.layers]
    left = torch.cuda.mem_get_info(device)[0] - RESERVE - (bytes_of(model, dtype) - sum(layers))
    count = 0
    while count < len(layers) and left >= layers[count]:
        left -= layers[count]
        count += 1
    return count


def lend(model: LlamaVision, device: torch.device, first: int):
    """Let the linear layers from the decoder's layer `first` on work on `device` with weights elsewhere."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    lent = []
    for layer in model.language_model.layers[first:]:
        for part in layer.modules():
            for name, linear in part.named_children():
                if name.endswith("_proj"):
                    lent.append((part, name, Lent(linear, device, stream)))
    for i, (part, name, linear) in enumerate(lent):
        linear.following = (lent[(i + 1) % len(lent)][2],)
        setattr(part, name, linear)


class Lent(nn.Module):
    """A linear layer whose weights stay where they are, and are copied to a device for each use.

    It starts the copy for the linear layer that follows, so that it runs beside this one's product.
    """

    def __init__(self, linear: nn.Module, device: torch.device, stream: "torch.cuda.Stream | None"):
        super().__init__()
        self.linear = linear
        self.device = device
        self.stream = stream
        self.following: tuple[Lent, ...] = ()       # a tuple hides it from the tree of modules
        self.arriving: dict[str, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        weights = self.arrived()
        for following in self.following:
            following.start()
        return functional_call(self.linear, weights, x)

    def start(self):
        """Begin to copy, if that has not begun."""
        if self.arriving is not None:
            return
        if self.stream is None:
            self.arriving = self.copies()
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.arriving = self.copies()

    def copies(self) -> dict[str, Tensor]:
        return {name: tensor.to(self.device, non_blocking=True)
                for name, tensor in self.linear.state_dict().items()}

    def arrived(self) -> dict[str, Tensor]:
        """The weights on the device; they are this layer's for one use."""
        self.start()
        weights = self.arriving
        self.arriving = None
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            for tensor in weights.values():
                tensor.record_stream(torch.cuda.current_stream(self.device))
        return weights
