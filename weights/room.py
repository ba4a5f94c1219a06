"""Whether there is room: what will be allocated is compared with what is free, before anything is.

Otherwise the system would end this program, or another, without a word, or torch with words that do not help.
Weights that are mapped from their files allocate nothing, so they are not counted.
"""
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from model.cache import rounded_up
from model.decoder import Projections
from model.image_tokens import ImageTokens
from model.llama_vision import LlamaVision
from model.sampling import limits_of
from weights.devices import Placement
from weights.free import free_memory
from weights.messages import named
from weights.quantized_layers import choice
from weights.quantized_linear import Int8Linear, QuantizedLinear
from weights.stored import Stored

# What may fit instead: a dtype, and a `quantize`.
SMALLER = {"dtype fp32": (torch.float32, None), "dtype bf16": (torch.bfloat16, None),
           "quantize int8": (torch.bfloat16, "int8"), "quantize int4": (torch.bfloat16, "int4")}

Kinds = Mapping[str, type[QuantizedLinear]]


def check_weights(found: Mapping[str, Stored], layers: Mapping[str, QuantizedLinear], placement: Placement,
                  dtype: torch.dtype, folder: Path):
    """Raise ValueError with one line where the weights need more memory than is free on a device.

    `layers` are the quantised ones, by the names of their weights.
    """
    kinds = {name: type(layer) for name, layer in layers.items()}
    places = {name: placement.device_of(name) for name in found}
    for device in dict.fromkeys(places.values()):
        there = {name: stored for name, stored in found.items() if places[name] == device}
        needed = allocated(there, kinds, device, dtype)
        free = free_memory(device)
        if free is None or needed <= free:
            continue
        fitting = []
        for words, (smaller, way) in SMALLER.items():
            count = allocated(there, chosen(there, way), device, smaller)
            if count <= min(free, needed - 1):
                size = f"{count / 1e9:.1f} GB" if count else "mapped from its files"
                fitting.append(f"{words} ({size})")
        advice = f"what fits: {', '.join(fitting)}" if fitting else "choose another device or a smaller model"
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f"{named(folder)}: on {device} in {kind} the weights need {needed / 1e9:.1f} GB, "
                         f"and {free / 1e9:.1f} GB are free; {advice}")


def chosen(found: Mapping[str, Stored], way: str | None) -> Kinds:
    """What `quantize` would make of linear layers, by the names of their weights."""
    if way is None:
        return {}
    kinds = {name: choice(name.removesuffix(".weight"), stored.shape, way) for name, stored in found.items()
             if name.endswith(".weight")}
    return {name: kind for name, kind in kinds.items() if kind is not None}


def allocated(found: Mapping[str, Stored], kinds: Kinds, device: torch.device, dtype: torch.dtype) -> int:
    """Bytes that are allocated for parameters on a device; those that are the mapped files need none."""
    total = 0
    for name, stored in found.items():
        mapped = device.type == "cpu" and stored.dtype == dtype
        if name not in kinds:
            if not (mapped and stored.maps):
                total += math.prod(stored.shape) * dtype.itemsize
        elif not (mapped and stored.layer is kinds[name] is Int8Linear):
            total += sum(part.nbytes for part in kinds[name].empty(stored.shape, dtype).values())
    return total


def check_answer(model: LlamaVision, prompts: list[list[int]], image: ImageTokens | None,
                 max_new_tokens: int | Sequence[int]):
    """Raise ValueError with one line where prompts cannot be answered, or need caches of more memory than is
    free."""
    model.check_prompts(prompts, max_new_tokens)        # first: no memory would do for what is too long
    text = model.config.text
    batch = len(prompts)
    heads = min(part.kv_heads for part in model.modules() if isinstance(part, Projections))   # of this rank
    each = 2 * heads * text.head_dim * model.dtype.itemsize
    cross = len(text.cross_attention_layers)
    tokens = rounded_up(max(map(len, prompts), default=0) + max(limits_of(max_new_tokens, batch)))
    for_text = batch * tokens * (text.num_hidden_layers - cross) * each
    for_images = 0 if image is None else batch * image.features.shape[1] * cross * each
    free = free_memory(model.device)
    if free is not None and for_text + for_images > free:
        raise ValueError(f"{batch} answers of up to {tokens} tokens need {for_text / 1e9:.1f} GB of caches "
                         f"for text, {for_images / 1e9:.1f} GB for images, and {free / 1e9:.1f} GB are free: "
                         "ask fewer questions at once, for fewer new tokens, or about fewer images")
