"""Reads config.json: from JSON that a stranger wrote to a checked `Config`.

    folder ── read_config ─► config.json ── config_from_dict ─► Config (model/config.py)

Official files and those of transformers 4 and 5 spell a few keys differently; all are read. Fine-tunes leave
out whatever equals the library's default, so a key that is absent or null means the official default. Unknown
keys are ignored. Everything that `model/` relies on is checked here.
"""
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

from model.config import Config, RopeScaling, TextConfig, VisionConfig
from weights.files import read_json
from weights.messages import named, quoted
from weights.quantization_config import refuse_unread

MOST = 2 ** 31 - 1                              # no size of a model is larger
MOST_LAYERS = 500                               # building more layers would take long
RANGES = {                                      # numbers of other ranges than 1 to MOST, both ends included
    "rms_norm_eps": (1e-12, 1.0),
    "norm_eps": (1e-12, 1.0),
    "rope_theta": (1.0, 1e18),
    "factor": (1.0, 1e6),
    "low_freq_factor": (0.0, 1e6),
    "high_freq_factor": (0.0, 1e6),
    "num_hidden_layers": (1, MOST_LAYERS),
    "num_global_layers": (1, MOST_LAYERS),
}
Part = TypeVar("Part", VisionConfig, TextConfig, RopeScaling)


def read_config(folder: str | Path) -> Config:
    """The Config of a checkpoint folder. Raises ValueError with one line where it cannot be used.

    That is: config.json is missing or not JSON, describes another kind of model, holds a value that no model
    has, or says that the weights are quantized in a format that is not read.
    """
    path = Path(folder) / "config.json"
    data = read_json(path)
    try:
        config = config_from_dict(data)
        refuse_unread([data, _section(data, "text_config")])
    except ValueError as error:
        raise ValueError(f"{named(path)}: {error}") from None
    return config


def config_from_dict(data: dict) -> Config:
    """The Config of the parsed config.json. Raises ValueError with one line that names the bad value."""
    kind = data.get("model_type") if isinstance(data, dict) else type(data).__name__
    if not isinstance(data, dict) or kind != "mllama":
        raise ValueError(f"model_type is {quoted(kind)}, not 'mllama': not a Llama-3.2-Vision checkpoint")
    vision = _build(VisionConfig, _vision_keys(_section(data, "vision_config")))
    text = _build(TextConfig, _text_keys(_section(data, "text_config")))
    image_token = _first(data.get("image_token_index"), data.get("image_token_id"), Config.image_token_index)
    config = Config(vision, text, image_token)
    _check_vision(config.vision)
    _check_text(config.text)
    _check_image_token(image_token)
    return config


# ---- spellings

def _section(data: dict, name: str) -> dict:
    """A copy of an object inside the file; empty where it is absent or null."""
    section = data.get(name)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise ValueError(f"{name} is {quoted(section)}, not an object")
    return dict(section)


def _vision_keys(section: dict) -> dict:
    """The vision section under our names: the official `attention_heads` is `num_attention_heads`."""
    heads = section.pop("attention_heads", None)
    if heads is not None:
        section["num_attention_heads"] = heads
    return section


def _text_keys(section: dict) -> dict:
    """The text section under our names: one RopeScaling or None, and a tuple of stop tokens."""
    rope_parameters = _section(section, "rope_parameters")      # transformers 5: scaling and theta together
    rope_scaling = _section(section, "rope_scaling")
    section["rope_theta"] = _first(rope_parameters.get("rope_theta"), section.get("rope_theta"))
    rope = rope_parameters or rope_scaling
    kind = _first(rope.get("rope_type"), rope.get("type"), "default" if rope.get("factor") is None else None)
    if kind is None:
        raise ValueError("rope_scaling has a factor but no rope_type; Llama-3.2-Vision uses 'llama3'")
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_type {quoted(kind)} is not supported; Llama-3.2-Vision uses 'llama3'")
    section["rope_scaling"] = _build(RopeScaling, rope) if kind == "llama3" else None
    section.pop("extra_embeddings", None)                       # no file says it: the tensors do
    if isinstance(section.get("eos_token_id"), int):
        section["eos_token_id"] = [section["eos_token_id"]]
    return section


def _first(*values: object) -> object:
    """The first value that is not None, or None."""
    return next((value for value in values if value is not None), None)


# ---- types and ranges

def _build(kind: type[Part], section: dict) -> Part:
    """A dataclass from a JSON object: unknown keys are ignored; null and absent mean the default."""
    values = {}
    for field in fields(kind):
        value = section.get(field.name)
        if value is not None:
            values[field.name] = PARSERS[field.type](field.name, value)
    return kind(**values)


def _whole(name: str, value: object) -> int:
    if type(value) is not int:                          # a bool is an int in Python, but not in JSON
        raise ValueError(f"{name} is {quoted(value)}, not a whole number")
    _check_range(name, value)
    return value


def _number(name: str, value: object) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"{name} is {quoted(value)}, not a number")
    _check_range(name, value)
    return value


def _check_range(name: str, value: float):
    low, high = RANGES.get(name, (1, MOST))
    if value < low:
        raise ValueError(f"{name} is {quoted(value)}, but must be at least {low}")
    if not value <= high:                               # NaN too
        raise ValueError(f"{name} is {quoted(value)}, which no model has: at most {high}")


def _switch(name: str, value: object) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{name} is {quoted(value)}, but must be true or false")
    return value


def _whole_numbers(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or any(type(item) is not int for item in value):
        raise ValueError(f"{name} is {quoted(value)}, but must be a list of whole numbers")
    return tuple(value)


def _grids(name: str, value: object) -> tuple[tuple[int, int], ...]:
    if not isinstance(value, (list, tuple)) or not value or not all(map(_is_grid, value)):
        raise ValueError(f"{name} is {quoted(value)}, but must be a list of pairs (rows, columns)")
    return tuple((rows, columns) for rows, columns in value)


def _is_grid(pair: object) -> bool:
    return (isinstance(pair, (list, tuple)) and len(pair) == 2
            and all(type(side) is int and side > 0 for side in pair))


def _ready_made(name: str, value: object) -> object:
    return value


PARSERS: dict[object, Callable] = {             # declared type of a field: how its value is checked
    int: _whole,
    float: _number,
    bool: _switch,
    tuple[int, ...]: _whole_numbers,
    tuple[tuple[int, int], ...]: _grids,
    RopeScaling | None: _ready_made,            # _text_keys has made it
}


# ---- values that must fit together

def _check_vision(vision: VisionConfig):
    _check_heads("vision_config", vision.hidden_size, vision.num_attention_heads)
    _check_layers("intermediate_layers_indices", vision.intermediate_layers_indices, vision.num_hidden_layers)
    if not vision.intermediate_layers_indices:
        raise ValueError("intermediate_layers_indices is empty, but the projector reads at least one layer")
    if vision.num_channels != 3:
        raise ValueError(f"vision_config: num_channels is {vision.num_channels}, but images have 3 colours")
    if vision.image_size % vision.patch_size:
        raise ValueError(f"vision_config: image_size {vision.image_size} is no multiple of patch_size "
                         f"{vision.patch_size}")
    if any(rows * columns > vision.max_num_tiles for rows, columns in vision.supported_aspect_ratios):
        raise ValueError("vision_config: supported_aspect_ratios has one of more than max_num_tiles, "
                         f"{vision.max_num_tiles} tiles")


def _check_text(text: TextConfig):
    _check_heads("text_config", text.hidden_size, text.num_attention_heads)
    _check_layers("cross_attention_layers", text.cross_attention_layers, text.num_hidden_layers)
    if not text.cross_attention_layers:
        raise ValueError("cross_attention_layers is empty, so no layer would see the image")
    if len(text.cross_attention_layers) == text.num_hidden_layers:
        raise ValueError("cross_attention_layers names all layers, so no layer would see the text")
    if text.head_dim % 2:
        raise ValueError(f"text_config: rotary embedding needs an even head width, not {text.head_dim}")
    if text.num_attention_heads % text.num_key_value_heads:
        raise ValueError(f"text_config: {text.num_attention_heads} query heads do not share "
                         f"{text.num_key_value_heads} key/value heads evenly")
    rope = text.rope_scaling
    if rope is not None and rope.low_freq_factor >= rope.high_freq_factor:
        raise ValueError(f"text_config: high_freq_factor {rope.high_freq_factor} must be above "
                         f"low_freq_factor {rope.low_freq_factor}")


def _check_heads(section: str, width: int, heads: int):
    if width % heads:
        raise ValueError(f"{section}: hidden_size {width} does not divide into {heads} heads")


def _check_layers(name: str, layers: tuple[int, ...], count: int):
    """Layer numbers lie within the network and rise."""
    if any(not 0 <= layer < count for layer in layers):
        raise ValueError(f"{name} is {quoted(list(layers))}, but the layers are 0 to {count - 1}")
    if list(layers) != sorted(set(layers)):
        raise ValueError(f"{name} is {quoted(list(layers))}, but must rise, each layer once")


def _check_image_token(image_token: object):
    """That the embedding has a row for it is checked when its rows are known."""
    if type(image_token) is not int or not 0 <= image_token <= MOST:
        raise ValueError(f"image_token_index is {quoted(image_token)}, but must be a token id")
