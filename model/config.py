"""What a checkpoint's config.json says about the network, as three frozen dataclasses.

Everything that differs between the 11B, the 90B, the 448-pixel base models and the bundled checkpoint is
here, so the rest of `model/` never asks which model it is. Fine-tunes leave out whatever equals the
library's default, so every field has the official default; transformers 4 and 5 spell a few keys
differently, and both are read.
"""
import json
from dataclasses import dataclass, field, fields
from pathlib import Path

EXTRA_EMBEDDINGS = 8       # rows of the embedding table beyond the vocabulary; the first of them is <|image|>


@dataclass(frozen=True)
class VisionConfig:
    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_attention_heads: int = 16
    num_hidden_layers: int = 32                 # local layers
    num_global_layers: int = 8                  # gated global layers
    image_size: int = 448                       # side of a tile in pixels; the Instruct models write 560
    patch_size: int = 14
    num_channels: int = 3
    max_num_tiles: int = 4
    intermediate_layers_indices: tuple[int, ...] = (3, 7, 15, 23, 30)
    norm_eps: float = 1e-5
    supported_aspect_ratios: tuple[tuple[int, int], ...] = (
        (1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))    # (rows, columns); id = place + 1

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """The patches of a tile and its class token: 1601 at 560 pixels."""
        return self.patches_per_side ** 2 + 1

    @property
    def pad_tokens(self) -> int:
        """Zero tokens that fill a tile up to a multiple of 8 inside the encoder: 7 at 560 pixels."""
        return -self.tokens_per_tile % 8

    @property
    def output_dim(self) -> int:
        """Width of the encoder's output: the final state and every tapped one."""
        return self.hidden_size * (1 + len(self.intermediate_layers_indices))

    def ratio_id(self, rows: int, columns: int) -> int:
        """The row of the tile-embedding tables for a grid of tiles; 0 is unused."""
        if (rows, columns) not in self.supported_aspect_ratios:
            raise ValueError(f"{rows} x {columns} tiles are none of {self.supported_aspect_ratios}")
        return self.supported_aspect_ratios.index((rows, columns)) + 1


@dataclass(frozen=True)
class RopeScaling:
    """The llama3 rule that stretches low frequencies (arXiv 2407.21783)."""
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class TextConfig:
    vocab_size: int = 128256
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 40                 # self- and cross-attention layers together
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    cross_attention_layers: tuple[int, ...] = (3, 8, 13, 18, 23, 28, 33, 38)
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None     # None: plain rotary embedding
    max_position_embeddings: int = 131072
    tie_word_embeddings: bool = False
    bos_token_id: int = 128000
    eos_token_id: tuple[int, ...] = (128001,)
    pad_token_id: int = 128004

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class Config:
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    image_token_index: int = 128256

    @classmethod
    def from_file(cls, path: str | Path) -> "Config":
        """Read a config.json. Raises ValueError with one line where it is not of a Llama-3.2-Vision model."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not readable as JSON ({error})") from None
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, data: dict) -> "Config":
        """Build a Config from a config.json: official, of transformers 4 or 5, or with defaults left out."""
        if not isinstance(data, dict) or data.get("model_type") != "mllama":
            kind = data.get("model_type") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"model_type is {kind!r}, not 'mllama': not a Llama-3.2-Vision checkpoint")
        vision = _build(VisionConfig, _section(data, "vision_config", _vision_spellings))
        text = _build(TextConfig, _section(data, "text_config", _text_spellings))
        image_token = data.get("image_token_index", data.get("image_token_id", cls.image_token_index))
        config = cls(vision, text, image_token)
        _check(config)
        return config


def _section(data: dict, name: str, spellings) -> dict:
    section = data.get(name) or {}
    if not isinstance(section, dict):
        raise ValueError(f"{name} is a {type(section).__name__}, not an object")
    return spellings(dict(section))


def _vision_spellings(section: dict) -> dict:
    if "attention_heads" in section:                            # official; our name is the text model's
        section["num_attention_heads"] = section.pop("attention_heads")
    section["max_num_tiles"] = section.get("max_num_tiles") or VisionConfig.max_num_tiles
    return section


def _text_spellings(section: dict) -> dict:
    for name in "rope_parameters", "rope_scaling":
        if not isinstance(section.get(name) or {}, dict):
            raise ValueError(f"{name} is {section[name]!r}, not an object")
    rope = section.pop("rope_parameters", None) or {}         # transformers 5: scaling and theta in one place
    section["rope_theta"] = rope.get("rope_theta", section.get("rope_theta"))
    rope = rope or section.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_type {kind!r} is not supported; Llama-3.2-Vision uses 'llama3'")
    section["rope_scaling"] = _build(RopeScaling, rope) if kind == "llama3" else None
    if isinstance(section.get("eos_token_id"), int):
        section["eos_token_id"] = (section["eos_token_id"],)
    return section


def _build(kind, section: dict):
    """A dataclass from a JSON object: unknown keys are passed over, null and absent mean the default."""
    known = {f.name: f for f in fields(kind)}
    values = {name: _frozen(value) for name, value in section.items() if name in known and value is not None}
    for name, value in values.items():
        _check_type(name, value, known[name].type)
    return kind(**values)


def _frozen(value):
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value


LISTS = {                                       # declared type: what it must be, in words and as a test
    tuple[int, ...]: ("a list of whole numbers", lambda v: all(type(i) is int for i in v)),
    tuple[tuple[int, int], ...]: ("a list of pairs (rows, columns)", lambda v: v and all(
        isinstance(p, tuple) and len(p) == 2 and all(type(i) is int and i > 0 for i in p) for p in v)),
}
MOST, MOST_LAYERS = 2 ** 62, 1000               # beyond any real model; building more layers takes minutes


def _check_type(name: str, value, declared):
    if declared in LISTS:
        words, good = LISTS[declared]
        if not isinstance(value, tuple) or not good(value):
            raise ValueError(f"{name} is {value!r}, but must be {words}")
        return
    wanted = {int: int, float: (int, float), bool: bool}.get(declared, object)
    if not isinstance(value, wanted) or (isinstance(value, bool) and declared is not bool):
        raise ValueError(f"{name} is {value!r}, not a number")
    if declared in (int, float) and not abs(value) <= (MOST_LAYERS if name.endswith("_layers") else MOST):
        raise ValueError(f"{name} is {value}, which no model has")              # NaN too
    if declared is int and not name.endswith("_token_id") and value < 1:
        raise ValueError(f"{name} is {value}, but must be at least 1")


def _check(config: Config):
    vision, text = config.vision, config.text
    for name, part in ("vision_config", vision), ("text_config", text):
        if part.hidden_size % part.num_attention_heads:
            raise ValueError(f"{name}: hidden_size {part.hidden_size} does not divide into "
                             f"{part.num_attention_heads} heads")
    for name, layers in (("cross_attention_layers", text.cross_attention_layers),
                         ("intermediate_layers_indices", vision.intermediate_layers_indices)):
        if list(layers) != sorted(set(layers)):
            raise ValueError(f"{name} {layers} must rise, each layer once")
    if not vision.intermediate_layers_indices:
        raise ValueError("vision_config: intermediate_layers_indices is empty, but some layer is tapped")
    rows, image_token = text.vocab_size + EXTRA_EMBEDDINGS, config.image_token_index
    if type(image_token) is not int or not 0 <= image_token < rows:
        raise ValueError(f"image_token_index is {image_token!r}, but the model embeds {rows} tokens")
    rope = text.rope_scaling or RopeScaling()
    if not (text.rope_theta > 0 and rope.factor > 0 and rope.high_freq_factor > rope.low_freq_factor):
        raise ValueError(f"text_config: rope_theta {text.rope_theta} and factor must be above 0, and "
                         f"high_freq_factor above low_freq_factor, not {rope}")
    if text.head_dim % 2:
        raise ValueError(f"text_config: rotary embedding needs an even head width, not {text.head_dim}")
    if text.num_attention_heads % text.num_key_value_heads:
        raise ValueError(f"text_config: {text.num_attention_heads} query heads do not share "
                         f"{text.num_key_value_heads} key/value heads evenly")
    if any(not 0 <= i < text.num_hidden_layers for i in text.cross_attention_layers):
        raise ValueError(f"text_config: cross_attention_layers {text.cross_attention_layers} lie outside the "
                         f"{text.num_hidden_layers} layers")
    if any(not 0 <= i < vision.num_hidden_layers for i in vision.intermediate_layers_indices):
        raise ValueError(f"vision_config: intermediate_layers_indices {vision.intermediate_layers_indices} "
                         f"lie outside the {vision.num_hidden_layers} local layers")
    if vision.image_size % vision.patch_size:
        raise ValueError(f"vision_config: image_size {vision.image_size} is no multiple of patch_size "
                         f"{vision.patch_size}")
    if any(h * w > vision.max_num_tiles for h, w in vision.supported_aspect_ratios):
        raise ValueError(f"vision_config: an aspect ratio needs more than {vision.max_num_tiles} tiles")
