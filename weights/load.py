"""From a folder of safetensors to a LlamaVision, without a conversion step and without a second copy.

    folder ─► shards (memory-mapped) ─► names, dtypes, shapes checked ─► parameters that ARE the mapped file

All checks read only the files' headers, so a bad checkpoint is refused before any weight is touched. On the
CPU, in the checkpoint's own dtype, parameters are views of the mapped files: a page is read when it is first
used, and a write (fine-tuning) goes to a private copy of that page, never to the file. For another device or
dtype the tensors are converted one by one, so that the extra memory is one tensor. A file must not be cut or
overwritten in place while a model on the CPU uses it; replacing or deleting it is harmless.
"""
import math
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model.config import Config
from model.llama_vision import LlamaVision
from weights.config_file import quantized, read_config
from weights.files import exists, read_json
from weights.hub import WANTED, find_checkpoint, foreign_format
from weights.messages import named, one_line, quoted
from weights.names import EMBEDDING, HEAD, is_parameter, model_name, official_name, quantization_method
from weights.safetensors_file import INDEX, SINGLE, STORED, Shard

PLAIN_NAME = re.compile(r"[^/\\]+\.safetensors")
DTYPES = {"bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float16": torch.float16, "fp16": torch.float16,
          "float32": torch.float32, "fp32": torch.float32, "float64": torch.float64, "fp64": torch.float64}


def load_model(source: str | Path = "tiny", device: str | torch.device = "cpu",
               dtype: str | torch.dtype | None = None, revision: str | None = None) -> LlamaVision:
    """The model of a checkpoint ('tiny', a folder or a hub id) in eval mode, ready to run or to fine-tune.

    dtype None is the checkpoint's own; where it mixes several, the one that most weights have. Parameters
    require gradients as in any nn.Module. Raises ValueError with one line for whatever is wrong with the
    arguments or the files, and where memory does not suffice.
    """
    device = parse_device(device)                       # before a download that may take an hour
    dtype = parse_dtype(dtype)
    folder = find_checkpoint(source, revision)
    config = read_config(folder)
    model = _without_weights(config, folder)
    found = _find_parameters(_open_shards(folder))
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = config.text.tie_word_embeddings and HEAD not in found
    if tied:
        del wanted[HEAD]
    _check_names(folder, wanted, found)
    own_dtype = _check_tensors(wanted, found)
    state = _read(found, device, own_dtype if dtype is None else dtype, folder)
    if tied:                                            # rows after the vocabulary (<|image|>) have no logit
        state[HEAD] = state[EMBEDDING][:config.text.vocab_size]
    model.load_state_dict(state, assign=True)
    return model.eval()


def _without_weights(config: Config, folder: Path) -> LlamaVision:
    try:
        with torch.device("meta"), _Unfilled():         # no memory: the weights come from the files
            return LlamaVision(config)
    except (RuntimeError, TypeError) as error:          # sizes beyond 64 bits
        raise ValueError(f"{named(folder / 'config.json')}: no model has these sizes "
                         f"({one_line(error, 120)})") from error


class _Unfilled(TorchFunctionMode):
    """Skips normal_(): the values are replaced anyway, and on the meta device it imports for 2 s."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (nn.init.normal_, Tensor.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _read(found: dict[str, tuple[Shard, str]], device: torch.device, dtype: torch.dtype,
          folder: Path) -> dict[str, Tensor]:
    """The parameters: views of the mapped files where device and dtype are theirs, else one copy of each."""
    state = {}
    try:
        for name, (shard, stored) in found.items():
            tensor = shard.view(stored)
            if tensor.data_ptr() % tensor.element_size():       # unpadded header; kernels may need alignment
                tensor = tensor.clone()
            state[name] = tensor.to(device, dtype)
    except (RuntimeError, TypeError, MemoryError) as error:     # most often: not enough memory
        raise ValueError(f"{named(folder)}: the weights cannot be put on {device} as {dtype} "
                         f"({one_line(error, 200)}); choose a smaller dtype or another device") from None
    return state


def parse_device(device: str | torch.device) -> torch.device:
    """A device that is there. Raises ValueError with one line."""
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f"unknown device {quoted(device)}: use cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise ValueError(f"device '{device}': PyTorch finds no CUDA GPU on this machine; use device cpu")
        if (device.index or 0) >= count:
            raise ValueError(f"device '{device}': the last of {count} GPUs here is cuda:{count - 1}")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps': PyTorch finds no Apple GPU on this machine; use device cpu")
    elif device.type not in ("cpu", "mps"):
        raise ValueError(f"device '{device}' is not supported: use cpu, cuda, cuda:N or mps")
    return device


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A floating-point type from its name, None for the checkpoint's own. Raises ValueError with one line."""
    if dtype is None or dtype in DTYPES.values():
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"unknown dtype {quoted(dtype)}: use one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _open_shards(folder: Path) -> list[Shard]:
    """Every file of the checkpoint, memory-mapped; headers and sizes are valid, and the index agrees."""
    if exists(folder / SINGLE):
        return [Shard(folder / SINGLE)]
    if not exists(folder / INDEX):
        foreign = foreign_format(folder)
        remedy = "download the checkpoint again" if foreign is None else f"it holds {foreign}; {WANTED}"
        raise ValueError(f"{named(folder)}: no {SINGLE} and no {INDEX}; {remedy}")
    weight_map = _read_index(folder / INDEX)
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not exists(folder / file)]
    if missing:
        raise ValueError(f"{named(folder)}: missing files ({len(missing)}) of those that {INDEX} names: "
                         f"{_some(missing)}; download them again")
    shards = {file: Shard(folder / file) for file in files}
    for name, file in weight_map.items():
        if name not in shards[file].entries:
            raise ValueError(f"{named(folder / INDEX)}: it says that {quoted(name)} is in {quoted(file)}, "
                             "which does not hold it; files of two checkpoints seem to be mixed")
    return list(shards.values())


def _read_index(path: Path) -> dict[str, str]:
    """The index's map from tensor to file; every file is a plain name: no index leads out of its folder."""
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise ValueError(f"{named(path)}: not an index: it needs a weight_map from tensors to files; "
                         "download it again")
    for file in weight_map.values():
        if not isinstance(file, str) or not PLAIN_NAME.fullmatch(file):
            raise ValueError(f"{named(path)}: it names {quoted(file)}, which is not a safetensors file in "
                             "the same folder; download it again")
    return weight_map


def _find_parameters(shards: list[Shard]) -> dict[str, tuple[Shard, str]]:
    """Where each parameter lies: its name in the model -> file, name in the file."""
    found = {}
    for shard in shards:
        for stored in shard.entries:
            method = quantization_method(stored)
            if method is not None:
                raise ValueError(f"{named(shard.path)}: tensor {quoted(stored)} shows that "
                                 f"{quantized(method)}")
            if not is_parameter(stored):
                continue
            name = model_name(stored)
            if name in found:
                other, spelling = found[name]
                raise ValueError(f"{named(shard.path)}: tensor {quoted(stored)} occurs twice, also as "
                                 f"{quoted(spelling)} in {named(other.path.name)}; download the checkpoint "
                                 "again")
            found[name] = shard, stored
    return found


def _check_names(folder: Path, wanted: dict[str, list[int]], found: dict[str, tuple[Shard, str]]):
    missing = [official_name(name) for name in wanted if name not in found]
    unexpected = [stored for name, (_, stored) in found.items() if name not in wanted]
    parts = []
    if missing:
        parts.append(f"missing tensors ({len(missing)}): {_some(missing)}")
    if unexpected:
        parts.append(f"unexpected tensors ({len(unexpected)}): {_some(unexpected)}")
    if parts:
        raise ValueError(f"{named(folder)}: {'; '.join(parts)}; config.json and weights do not belong "
                         "together, or the download is incomplete")


def _check_tensors(wanted: dict[str, list[int]], found: dict[str, tuple[Shard, str]]) -> torch.dtype:
    """Shapes and dtypes, from the headers; the dtype of most weights."""
    weights = dict.fromkeys(STORED.values(), 0)
    for name, (shard, stored) in found.items():
        entry = shard.entries[stored]
        if entry["dtype"] not in STORED:
            raise ValueError(f"{named(shard.path)}: tensor {quoted(stored)} has the dtype "
                             f"{one_line(entry['dtype'], 20)}, not one of {', '.join(STORED)}; use the bf16 "
                             "checkpoint")
        if entry["shape"] != wanted[name]:
            raise ValueError(f"{named(shard.path)}: tensor {quoted(stored)} has the shape "
                             f"{quoted(entry['shape'])}, where config.json asks for {wanted[name]}; use the "
                             "config.json of these weights")
        weights[STORED[entry["dtype"]]] += math.prod(wanted[name])
    return max(weights, key=weights.get)


def _some(names: list[str]) -> str:
    return ", ".join(map(quoted, names[:3])) + (", ..." if len(names) > 3 else "")
