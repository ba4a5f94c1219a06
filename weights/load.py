"""From a folder of safetensors to a LlamaVision, without a conversion step and without a second copy.

    folder ─► shards (memory-mapped) ─► names, dtypes, shapes checked ─► parameters that ARE the mapped file

All checks read only the files' headers, so a bad checkpoint is refused before any weight is touched. On the
CPU, in the checkpoint's own dtype, parameters are views of the mapped files: a page is read when it is first
used, and a write (fine-tuning) goes to a private copy of that page, never to the file. For another device or
dtype the tensors are converted one by one, so that the extra memory is one tensor. A file must not be cut or
overwritten in place while a model on the CPU uses it; replacing or deleting it is harmless.
"""
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from model.llama_vision import LlamaVision
from weights.adapter_file import NONE, find_adapters, open_adapter
from weights.adapters import find_base, with_adapters
from weights.added_tokens import with_stored_rows
from weights.checkpoint import open_checkpoint, some
from weights.config_file import read_config
from weights.device import parse_dtype
from weights.devices import Placement, parse_devices
from weights.files import again
from weights.messages import named, one_line, quoted
from weights.names import EMBEDDING, HEAD, official_name
from weights.parallel import connect, divide
from weights.part import Part
from weights.progress import Progress, gigabytes, silent
from weights.quantized_layers import check_quantize, fill, quantized_layers
from weights.quantized_linear import Int8Linear, QuantizedLinear
from weights.ranks import Ranks
from weights.room import check_weights
from weights.safetensors_file import STORED
from weights.skeleton import empty_model
from weights.stored import Stored
from weights.wide import is_slow, widen


def load_model(source: str | Path = "tiny", device: str | torch.device = "cpu",
               dtype: str | torch.dtype | None = None, revision: str | None = None,
               adapters: Sequence[str | Path] = (), offload: bool = False, quantize: str | None = None,
               progress: Progress = silent, ranks: Ranks | None = None) -> LlamaVision:
    """The model of a checkpoint ('tiny', a folder or a hub id) in eval mode, ready to run or to fine-tune.

    dtype None is the checkpoint's own; where it mixes several, the one that most weights have. LoRA adapters
    (folders or hub ids) are merged in their order; 'none' is for weights that have merged one already.
    Parameters require gradients as in any nn.Module, unless weights are in several places: several devices
    "cuda:0,cuda:1" share the decoder's layers, with `offload` what does not fit on a GPU stays in the CPU's
    memory, and of several `ranks` each has its share of all layers; or unless they have 8 or 4 bits,
    because `quantize` asks for it (one of `quantized_layers.WAYS`) or the checkpoint has them so. Raises
    ValueError with one line for whatever is wrong with the arguments or files, or where memory is too small.
    """
    ranks = ranks or Ranks()
    devices = parse_devices(ranks.device or device)     # before a download that may take an hour
    dtype = parse_dtype(dtype)
    check_quantize(quantize, devices[0], dtype)
    adapters = find_adapters(adapters)
    folder = find_base(source, revision, adapters)
    model, found, dtype = open_model(folder, adapters, dtype)
    vocabulary = model.config.text.vocab_size
    found = divide(model, found, ranks, offload)
    layers = quantized_layers(model, found, quantize, devices[0], dtype)
    if is_slow(dtype, devices[0]):
        widen(model)
    placement = Placement(model, devices, dtype, offload)
    check_weights(found, layers, placement, dtype, folder)
    state = _read(found, layers, placement, dtype, folder, progress)
    if HEAD not in found:                               # rows after the vocabulary (<|image|>) have no logit
        tie(state, layers, ranks.part(state[EMBEDDING][:vocabulary], 0))
    for name, layer in layers.items():
        state |= layer.named_buffers(name.removesuffix(".weight"))
    model.load_state_dict(state, assign=True)
    model.eval().requires_grad_(not layers)
    placement.connect(model)
    connect(model, ranks)
    return model


def open_model(folder: Path, adapters: Sequence[str | Path], dtype: torch.dtype | None
                    ) -> tuple[LlamaVision, dict[str, Stored], torch.dtype]:
    """The model of a checkpoint on the meta device; what each parameter is read from, but for a head that is
    tied to the embedding; and the dtype, which is the checkpoint's own if None is given. All is checked."""
    found = open_checkpoint(folder)
    config = with_stored_rows(read_config(folder), found, folder)
    opened = [open_adapter(adapter) for adapter in adapters if adapter != NONE]
    if opened:
        found = with_adapters(found, opened, config, dtype)
        config = with_stored_rows(config, found, folder)        # an adapter may bring an embedding of its own
    model = empty_model(config, folder)
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.text.tie_word_embeddings and HEAD not in found:
        del wanted[HEAD]
    _check_names(folder, wanted, found)
    own_dtype = _check_tensors(wanted, found)
    return model, found, own_dtype if dtype is None else dtype


def _read(found: dict[str, Stored | Part], layers: dict[str, QuantizedLinear], placement: Placement,
          dtype: torch.dtype, folder: Path, progress: Progress) -> dict[str, Tensor]:
    """The parameters: views of the mapped files where device and dtype are theirs, else one copy of each.
    Those of quantised layers are filled in there."""
    sizes = [math.prod(stored.shape) * stored.dtype.itemsize for stored in found.values()]
    done = 0
    state = {}
    try:
        rounding = any(name in layers and stored.layer is None for name, stored in found.items())
        with progress("quantising" if rounding else "loading", gigabytes) as report:
            for (name, stored), size in zip(found.items(), sizes, strict=True):
                device = placement.device_of(name)
                if name in layers:
                    fill(layers[name], stored, placement.works_on(name), device, dtype)
                else:
                    state[name] = stored.read().to(device, dtype)
                done += size
                report(done, sum(sizes))
    except (RuntimeError, TypeError, MemoryError) as error:     # most often: not enough memory
        raise ValueError(f"{named(folder)}: the weights cannot be put on {device} as {dtype} "
                         f"({one_line(error, 200)}); choose a smaller dtype or another device") from None
    return state


def tie(state: dict[str, Tensor], layers: dict[str, QuantizedLinear], rows: Tensor):
    """Give the head these rows of the embedding: the same memory, or a copy in 8 bits."""
    if HEAD in layers:
        layers[HEAD].fill(Int8Linear.rounded(rows, rows.dtype), rows.device, rows.dtype)
    else:
        state[HEAD] = rows


def _check_names(folder: Path, wanted: dict[str, list[int]], found: dict[str, Stored]):
    missing = [official_name(name) for name in wanted if name not in found]
    unexpected = [stored.name for name, stored in found.items() if name not in wanted]
    parts = []
    if missing:
        parts.append(f"missing tensors ({len(missing)}): {some(missing)}")
    if unexpected:
        parts.append(f"unexpected tensors ({len(unexpected)}): {some(unexpected)}")
    if parts:
        raise ValueError(f"{named(folder)}: {'; '.join(parts)}; config.json and weights do not belong "
                         f"together, or some are lost; {again(folder)}")


def _check_tensors(wanted: dict[str, list[int]], found: dict[str, Stored]) -> torch.dtype:
    """Shapes and dtypes, from the headers; the dtype of most weights."""
    weights = dict.fromkeys(STORED.values(), 0)
    for name, stored in found.items():
        if stored.dtype is None:
            kind = one_line(stored.shard.entries[stored.name]["dtype"], 20)
            raise ValueError(f"{named(stored.shard.path)}: tensor {quoted(stored.name)} has the dtype "
                             f"{kind}, not one of {', '.join(STORED)}; use the bf16 checkpoint")
        if stored.shape != wanted[name]:
            raise ValueError(f"{named(stored.shard.path)}: tensor {quoted(stored.name)} has the shape "
                             f"{quoted(stored.shape)}, where config.json asks for {wanted[name]}; use the "
                             "config.json of these weights")
        weights[stored.dtype] += math.prod(wanted[name])
    return max(weights, key=weights.get)
