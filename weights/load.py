"""From a folder of safetensors to a LlamaVision, without a conversion step and without a second copy.

    folder ─► shards (memory-mapped) ─► names, dtypes, shapes checked ─► parameters that ARE the mapped file

All checks read only the files' headers, so a bad checkpoint is refused before any weight is touched. On the
CPU, in the checkpoint's own dtype, parameters are views of the mapped files: a page is read when it is first
used, and a write (fine-tuning) goes to a private copy of that page, never to the file. For another device or
dtype the tensors are converted one by one, so that the extra memory is one tensor. A file must not be cut or
overwritten in place while a model on the CPU uses it; replacing or deleting it is harmless.
"""
import ctypes
import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model.config import Config
from model.llama_vision import LlamaVision
from weights.hub import WANTED, find_checkpoint, foreign_format, quantized, read_config

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "language_model.embed_tokens.weight", "lm_head.weight"
DTYPES = {"bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float16": torch.float16, "fp16": torch.float16,
          "float32": torch.float32, "fp32": torch.float32, "float64": torch.float64, "fp64": torch.float64}
STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
MAX_HEADER = 100_000_000                                # bytes; the format's own limit
NOT_PARAMETERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|rope_freqs(\.weight)?|rope\.freqs)$")
QUANTIZED = (                                           # how tensor names end, where config.json says nothing
    (re.compile(r"\.((nested_)?(absmax|quant_map)|quant_state\.\w+)$"), "bitsandbytes 4-bit"),
    (re.compile(r"\.(SCB|weight_format)$"), "bitsandbytes int8"),
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "GPTQ or AWQ"),
    (re.compile(r"\.weight_packed$"), "compressed-tensors"),
    (re.compile(r"\.(weight_scale(_\w+)?|input_scale)$"), "fp8 or int8 with weight scales"),
    (re.compile(r"\.(scales|biases)$"), "MLX"),
)


def model_name(stored: str) -> str:
    """A parameter's name in LlamaVision, from its official name or transformers' (`model.` before either)."""
    while stored.startswith("model."):
        stored = stored.removeprefix("model.")
    stored = re.sub(r"^language_model\.model\.", "language_model.", stored)
    return re.sub(r"^language_model\.lm_head\.", "lm_head.", stored)


def official_name(name: str) -> str:
    """The inverse of `model_name`: the name that official checkpoints use."""
    name = re.sub(r"^language_model\.", "language_model.model.", name)
    return re.sub(r"^lm_head\.", "language_model.lm_head.", name)


def official_state_dict(model: LlamaVision) -> dict[str, Tensor]:
    """The model's parameters under official names; no copies."""
    return {official_name(name): tensor for name, tensor in model.state_dict().items()}


def save_model(model: LlamaVision, folder: str | Path) -> Path:
    """Write model.safetensors with official names into a folder; config.json is the caller's to add.

    The file is replaced whole at the end, so a model may be saved over the very file that it is mapped from,
    and a full disk leaves the old one. A reader prefers it to an index of shards in the same folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = official_state_dict(model)
    if model.config.text.tie_word_embeddings:           # a tied head is the embedding's memory: store it once
        head, embedding = (state[official_name(name)] for name in (HEAD, EMBEDDING))
        if torch.equal(head, embedding[:len(head)]):
            del state[official_name(HEAD)]
    partial = folder / (SINGLE + ".partial")
    try:
        write_tensors(partial, state)
        os.replace(partial, folder / SINGLE)
    finally:
        partial.unlink(missing_ok=True)
    return folder / SINGLE


def write_tensors(path: Path, tensors: dict[str, Tensor]):
    """A safetensors file, written tensor by tensor; safetensors' own save_file would need numpy."""
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))   # so they are aligned
    codes = {dtype: code for code, dtype in STORED.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0             # transformers asks for the metadata
    for name, tensor in tensors.items():
        place = [end, end + tensor.nbytes]
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        end = place[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            tensor = tensor.cpu().contiguous()
            file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))


def load_model(source: str | Path = "tiny", device: str | torch.device = "cpu",
               dtype: str | torch.dtype | None = None, revision: str | None = None) -> LlamaVision:
    """The model of a checkpoint ('tiny', a folder or a hub id) in eval mode, ready to run or to fine-tune.

    dtype None is the checkpoint's own; where it mixes several, the one that most weights have. Parameters
    require gradients as in any nn.Module. Raises ValueError with one line for whatever is wrong with the
    arguments or the files.
    """
    device, dtype = parse_device(device), parse_dtype(dtype)      # before a download that may take an hour
    folder = find_checkpoint(source, revision)
    config = read_config(folder)
    model = _without_weights(config, folder)
    shards = _open_shards(folder)
    found = _find_parameters(shards)
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = config.text.tie_word_embeddings and HEAD not in found
    if tied:
        del wanted[HEAD]
    _check_names(folder, wanted, found)
    own = _check_tensors(wanted, found)
    dtype = dtype or own
    state = {name: _read(shard, stored, device, dtype) for name, (shard, stored) in found.items()}
    if tied:                                            # rows after the vocabulary (<|image|>) have no logit
        state[HEAD] = state[EMBEDDING][:config.text.vocab_size]
    model.load_state_dict(state, assign=True)
    return model.eval()


def _without_weights(config: Config, folder: Path) -> LlamaVision:
    try:
        with torch.device("meta"), _Unfilled():         # no memory: the weights come from the files
            return LlamaVision(config)
    except (RuntimeError, TypeError) as error:          # sizes beyond 64 bits
        reason = str(error).splitlines()[0]
        raise ValueError(f"{folder / 'config.json'}: no model has these sizes ({reason})") from error


class _Unfilled(TorchFunctionMode):
    """Skips normal_(): the values are replaced anyway, and on the meta device it imports for 2 s."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (nn.init.normal_, Tensor.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _read(shard: "_Shard", stored: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    tensor = shard.view(stored)
    if tensor.data_ptr() % tensor.element_size():       # an unpadded header: kernels may need alignment
        tensor = tensor.clone()
    return tensor.to(device, dtype)


def parse_device(device: str | torch.device) -> torch.device:
    """A device that is there. Raises ValueError with one line."""
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"unknown device {device!r}: use cpu, cuda, cuda:N or mps") from None
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
        raise ValueError(f"unknown dtype {str(dtype)!r}: use one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _open_shards(folder: Path) -> list["_Shard"]:
    """Every file of the checkpoint, memory-mapped; headers and sizes are valid, and the index agrees."""
    if (folder / SINGLE).is_file():
        return [_Shard(folder / SINGLE)]
    if not (folder / INDEX).is_file():
        foreign = foreign_format(folder)
        raise ValueError(f"{folder}: no {SINGLE} and no {INDEX}; "
                         + (f"it holds {foreign}; {WANTED}" if foreign else "download the checkpoint again"))
    weight_map = _read_index(folder / INDEX)
    missing = [file for file in sorted(set(weight_map.values())) if not (folder / file).is_file()]
    if missing:
        raise ValueError(f"{folder}: missing files ({len(missing)}) of those that {INDEX} names: "
                         f"{_some(missing)}; download them again")
    shards = {file: _Shard(folder / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in shards[file].entries:
            raise ValueError(f"{folder / INDEX}: it says that {name!r} is in {file}, which does not hold it; "
                             "files of two checkpoints seem to be mixed")
    return list(shards.values())


def _read_index(path: Path) -> dict[str, str]:
    """The index's map from tensor to file; every file is a plain name: no index leads out of its folder."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {str(file) for file in weight_map.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path}: not an index (JSON with a weight_map); download it again") from None
    for file in sorted(files):
        if file != os.path.basename(file) or "\\" in file or not file.endswith(".safetensors"):
            raise ValueError(f"{path}: it names {file!r}, which is not a safetensors file in the same folder")
    return weight_map


class _Shard:
    """One safetensors file, memory-mapped: names -> dtype, shape and place, and views of the data."""

    def __init__(self, path: Path):
        self.path = path
        self.entries, self.start = _header(path)
        try:
            safe_open(path, "pt")                       # checks the rest: offsets, sizes, dtypes, no gaps
            self.storage = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ValueError(f"{path}: cannot be read ({' '.join(str(error).split())}); "
                             "download the file again") from None

    def view(self, name: str) -> Tensor:
        """A tensor that is the mapped file. (safe_open's reads a byte of each: gigabytes, with readahead.)"""
        entry = self.entries[name]
        start, stop = (self.start + offset for offset in entry["data_offsets"])
        flat = torch.empty(0, dtype=STORED[entry["dtype"]], device="cpu").set_(self.storage[start:stop])
        return flat.view(entry["shape"])


def _header(path: Path) -> tuple[dict[str, dict], int]:
    """What a safetensors file says it holds, and where its data start; ValueError where it is damaged."""
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            text = file.read(min(length, MAX_HEADER))
            size = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        needed = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        damage = size < needed and f"truncated: {size:,} of {needed:,} bytes are there"
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        cut = size < 8 + length < MAX_HEADER
        damage = "truncated within its header" if cut else "not a safetensors file, or its header is damaged"
    if size == 0:
        damage = "the file is empty"
    if prefix == b"version ":
        damage = "a git-lfs pointer instead of the weights (`git lfs pull` fetches them)"
    if damage:
        raise ValueError(f"{path}: {damage}; download the file again")
    return entries, 8 + length


def _find_parameters(shards: list[_Shard]) -> dict[str, tuple[_Shard, str]]:
    """Where each parameter lies: its name in the model -> file, name in the file."""
    found = {}
    for shard in shards:
        for stored in shard.entries:
            method = next((method for pattern, method in QUANTIZED if pattern.search(stored)), None)
            if method:
                raise ValueError(f"{shard.path}: tensor {stored!r} shows that {quantized(method)}")
            if NOT_PARAMETERS.search(stored):
                continue
            name = model_name(stored)
            if name in found:
                other, spelling = found[name]
                raise ValueError(f"{shard.path}: tensor {stored!r} occurs twice, also as {spelling!r} in "
                                 f"{other.path.name}; download the checkpoint again")
            found[name] = shard, stored
    return found


def _check_names(folder: Path, wanted: dict[str, list[int]], found: dict[str, tuple[_Shard, str]]):
    missing = [official_name(name) for name in wanted if name not in found]
    unexpected = [stored for name, (_, stored) in found.items() if name not in wanted]
    parts = [f"{kind} tensors ({len(names)}): {_some(names)}"
             for kind, names in (("missing", missing), ("unexpected", unexpected)) if names]
    if parts:
        raise ValueError(f"{folder}: {'; '.join(parts)}; config.json and weights do not belong together, "
                         "or the download is incomplete")


def _check_tensors(wanted: dict[str, list[int]], found: dict[str, tuple[_Shard, str]]) -> torch.dtype:
    """Shapes and dtypes, from the headers; the dtype of most weights."""
    weights = dict.fromkeys(STORED.values(), 0)
    for name, (shard, stored) in found.items():
        kind, shape = shard.entries[stored]["dtype"], shard.entries[stored]["shape"]
        if kind not in STORED:
            raise ValueError(f"{shard.path}: tensor {stored!r} has the dtype {kind}, not one of "
                             f"{', '.join(STORED)}; use the bf16 checkpoint")
        if shape != wanted[name]:
            raise ValueError(f"{shard.path}: tensor {stored!r} has the shape {shape}, where config.json asks "
                             f"for {wanted[name]}")
        weights[STORED[kind]] += torch.Size(shape).numel()
    return max(weights, key=weights.get)


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
