"""Good files of every kind that the programs read, for `mutate.py` to damage.

Each function returns a list of folders, {name: content}: what a user could have of this kind.
"""
import base64
import io
import json
import random
import tempfile
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from evaluation.exam import make_exam
from evaluation.scoring import figures
from evaluation.store import Store
from model.llama_vision import LlamaVision
from weights import LEARNED, config_from_dict, official_state_dict, read_config, write_tensors
from weights.hub import BUNDLED
from weights.image_file import FORMATS
from weights.safetensors_file import INDEX, SINGLE

Files = dict[str, bytes]
TINY = BUNDLED["tiny"]


def bundled(*names: str) -> Files:
    return {name: (TINY / name).read_bytes() for name in names}


def as_json(value: object) -> bytes:
    return json.dumps(value, indent=1).encode()


# ----- images


SAVED = [       # format, mode, options of Pillow; further modes and compressions of one format are others
    ("PNG", "RGB", {}), ("PNG", "LA", {}), ("PNG", "1", {}), ("PNG", "I;16", {}),
    ("PNG", "P", {"transparency": 3}), ("PNG", "RGBA", {"save_all": True}),
    ("JPEG", "RGB", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"}),
    ("JPEG", "L", {"progressive": True}), ("JPEG", "CMYK", {}), ("MPO", "RGB", {"save_all": True}),
    ("GIF", "P", {"save_all": True}), ("GIF", "L", {}),
    ("BMP", "RGB", {}), ("BMP", "P", {}), ("BMP", "1", {}), ("BMP", "RGBA", {}),
    ("PPM", "RGB", {}), ("PPM", "1", {}), ("PPM", "I", {}), ("PPM", "F", {}),
    ("WEBP", "RGB", {}), ("WEBP", "RGBA", {"lossless": True}), ("WEBP", "RGBA", {"save_all": True}),
    ("TIFF", "RGB", {}), ("TIFF", "F", {}), ("TIFF", "I;16", {"save_all": True}), ("TIFF", "LAB", {}),
    ("TIFF", "RGB", {"compression": "jpeg"}), ("TIFF", "RGBA", {"compression": "tiff_lzw"}),
    ("TIFF", "P", {"compression": "packbits"}), ("TIFF", "1", {"compression": "group4"}),
    ("TIFF", "CMYK", {"compression": "tiff_adobe_deflate"}),
    ("AVIF", "RGB", {}), ("AVIF", "RGBA", {"save_all": True}),
    ("JPEG2000", "RGB", {}), ("JPEG2000", "LA", {"no_jp2": True}),
    ("ICO", "RGBA", {}), ("ICO", "RGBA", {"bitmap_format": "bmp"})]
PLAIN_PPM = b"P3\n# three\n3 2\n255\n" + b"1 20 255 " * 6


def image_files() -> list[Files]:
    """Small images of noise in every format that is read, in several modes; some have a second frame."""
    assert {*FORMATS} <= {kind for kind, _, _ in SAVED}
    Image.init()
    noise = Image.frombytes("RGB", (24, 20), random.Random(0).randbytes(24 * 20 * 3))
    files = [{"image": PLAIN_PPM}]
    for kind, mode, options in SAVED:
        if kind not in Image.SAVE:          # some builds of Pillow have no AVIF
            continue
        if mode == "LAB":
            image = Image.frombytes(mode, noise.size, noise.tobytes())
        else:
            image = noise.convert("L" if mode == "I;16" else "RGB").convert(mode)
        if "save_all" in options:
            options = options | {"append_images": [image.transpose(Image.Transpose.ROTATE_180)]}
        sizes = {"sizes": [(16, 16), (24, 20)]} if kind == "ICO" else {}
        file = io.BytesIO()
        image.save(file, kind, **options, **sizes)
        files.append({"image": file.getvalue()})
    return files


# ----- preprocessor_config.json, processor_config.json


def settings_files() -> list[Files]:
    settings = json.loads((TINY / "preprocessor_config.json").read_bytes())
    newer = {"processor_class": "MllamaProcessor", "image_processor": settings}
    return [bundled("preprocessor_config.json"), {"processor_config.json": as_json(newer)},
            {"processor_config.json": as_json(newer), "preprocessor_config.json": as_json(settings)}]


# ----- config.json, index and safetensors


SMALL = {
    "model_type": "mllama", "image_token_index": 40,
    "text_config": {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
                    "num_attention_heads": 2, "num_key_value_heads": 1, "cross_attention_layers": [1],
                    "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "rope_theta": 1e4,
                    "tie_word_embeddings": False, "eos_token_id": [1, 2],
                    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                     "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
    "vision_config": {"hidden_size": 16, "intermediate_size": 16, "attention_heads": 2, "image_size": 28,
                      "patch_size": 14, "num_hidden_layers": 2, "num_global_layers": 1, "norm_eps": 1e-5,
                      "intermediate_layers_indices": [0, 1], "max_num_tiles": 2, "vision_output_dim": 48,
                      "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}}


def checkpoint_files() -> list[Files]:
    """A small checkpoint with random weights, in one file and in two."""
    torch.manual_seed(0)
    state = official_state_dict(LlamaVision(config_from_dict(SMALL)).bfloat16())
    parts = {}, {}
    for name, tensor in state.items():
        parts[name.startswith("vision_model")][name] = tensor
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / SINGLE
        contents = []
        for tensors in state, *parts:
            write_tensors(path, tensors)
            contents.append(path.read_bytes())
    config, (single, *shards) = as_json(SMALL), contents
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"metadata": {}, "weight_map": {tensor: names[tensor in parts[1]] for tensor in state}}
    return [{"config.json": config, SINGLE: single},
            {"config.json": config, INDEX: as_json(index), **dict(zip(names, shards, strict=True))}]


# ----- adapters of the bundled checkpoint


ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "tiny", "r": 2, "lora_alpha": 4, "bias": "none",
           "rank_pattern": {"up_proj": 3}, "alpha_pattern": {r"layers\.\d+\.mlp\.down_proj": 1.5},
           "target_modules": ["q_proj", "down_proj"], "modules_to_save": None, "use_rslora": False,
           "use_dora": False, "fan_in_fan_out": False, "init_lora_weights": True, "lora_dropout": 0.1}


def adapter_files() -> list[Files]:
    """A LoRA adapter with whole biases, and a DoRA adapter with the names that peft gives them in memory."""
    torch.manual_seed(0)
    text = read_config(TINY).text
    layer = "base_model.model.model.language_model.layers.0."
    sizes = {f"{layer}self_attn.q_proj": (text.hidden_size, text.hidden_size),
             f"{layer}mlp.down_proj": (text.hidden_size, text.intermediate_size)}
    lora, dora = {"base_model.model.model.multi_modal_projector.bias": torch.randn(text.hidden_size)}, {}
    for module, (rows, columns) in sizes.items():
        for tensors, name in (lora, ""), (dora, ".default"):
            tensors[f"{module}.lora_A{name}.weight"] = torch.randn(2, columns)
            tensors[f"{module}.lora_B{name}.weight"] = 0.01 * torch.randn(rows, 2)
        dora[f"{module}.lora_magnitude_vector.default.weight"] = torch.ones(rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter_model.safetensors"
        contents = []
        for tensors in lora, dora:
            write_tensors(path, tensors)
            contents.append(path.read_bytes())
    return [{"adapter_config.json": as_json(ADAPTER | change), "adapter_model.safetensors": content}
            for change, content in zip(({}, {"use_dora": True, "use_rslora": True}), contents, strict=True)]


QUANTIZED = Path(__file__).parent / "weights" / "data" / "quantized"
META = QUANTIZED.parent / "meta"


def quantized_files() -> list[Files]:
    """What other programs have quantized, in all formats that are read."""
    return [{"config.json": path.read_bytes(), SINGLE: path.with_suffix(".safetensors").read_bytes()}
            for path in sorted(QUANTIZED.glob("*.json"))]


def meta_files() -> list[Files]:
    """Meta's own files, of one rank and of two."""
    tokens = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))
    beside = {"params.json": (META / "params.json").read_bytes(), "tokenizer.model": tokens}
    one, *two = (saved(META / name) for name in ("ranks1.0.safetensors", "ranks2.0.safetensors",
                                                 "ranks2.1.safetensors"))
    return [beside | {"consolidated.pth": one},
            beside | {"consolidated.00.pth": two[0], "consolidated.01.pth": two[1]}]


def saved(path: Path) -> bytes:
    """The tensors of a safetensors file as torch.save writes them."""
    file = io.BytesIO()
    torch.save(load_file(path), file)
    return file.getvalue()


# ----- the text side


TEMPLATE = """{{- bos_token }}{% set ns = namespace(images=0) %}
{%- macro header(role) %}<|start_header_id|>{{ role }}<|end_header_id|>{{ '\\n\\n' }}{% endmacro %}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}
    {%- set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}
{%- if system or tools is not none %}
    {{- header('system') + "Today: " + strftime_now("%d %b %Y") ~ '\\n' + system + '<|eot_id|>' }}
    {%- for tool in tools or [] %}{{ tool | tojson(indent=4) }}{% endfor %}{% endif %}
{%- for message in turns %}
    {%- if message.role not in ['user', 'assistant'] %}{{ raise_exception('Roles!') }}{% endif %}
    {{- header(message['role']) }}
    {%- if message.content is string %}{{ message.content }}{% else %}
        {%- for part in message['content'] %}
            {%- if part.type == 'image' %}{% set ns.images = ns.images + 1 %}{{ '<|image|>' }}
            {%- elif part.type == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}
    {{- '<|eot_id|>' if loop.index0 * 2 >= 0 else "".join(['a', 'b']).replace('a', 'c') }}{% endfor %}
{%- if add_generation_prompt %}{{ header('assistant') }}{% endif %}"""
SHORT = ("{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
         "{{ m.content | map(attribute='text', default='<|image|>') | join }}{% endif %}\n{% endfor %}")


def text_files() -> list[Files]:
    settings = json.loads((TINY / "tokenizer_config.json").read_bytes())
    named = [{"name": "default", "template": SHORT}, {"name": "tool_use", "template": TEMPLATE}]
    without = bundled("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    return [without, without,
            without | {"tokenizer_config.json": as_json(settings | {"chat_template": TEMPLATE})},
            without | {"tokenizer_config.json": as_json(settings | {"chat_template": named})},
            without | {"chat_template.json": as_json({"chat_template": TEMPLATE})},
            without | {"chat_template.jinja": TEMPLATE.encode()},
            without | {"chat_template.jinja": TEMPLATE.encode()}]


# ----- files of an evaluation, and weights of the methods that learn


EXAM = make_exam(6)
SETTINGS = {"split": "test", "model": "tiny", "weights": 1, "questions": 6, "kinds": None, "blur": 0,
            "skip_layer": None, "rows": [["none", 1.0, {}], ["random", 0.5, {"seed": 3}]]}
GATES = [(0.5, 0.25), (0.1, -0.2)]


def record_of(questions: int) -> dict:
    row = {"right": [True] * questions, "wrong_yes": [False] * questions, "early": [False] * questions,
           "kept": [0.5] * questions, "image_kv_bytes": 1000, "image_kv_stored": 2000, "prefill_ms": 1.5,
           "decode_ms": 2.5, "steps": 3}
    matrix = [[1.0, 0.5], [0.5, 1.0]]
    return {"rows": [row, row], "layer_similarity": {"cosine": matrix, "top10_overlap": matrix}}


RECORDS = [record_of(len(questions)) for _, questions in EXAM]


def evaluation_files() -> list[Files]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.json"
        store = Store(path, SETTINGS)
        with store:
            for record in RECORDS:
                store.add(record)
            part = store.part.read_bytes()
            store.finish(figures(SETTINGS, EXAM, RECORDS, GATES))
        return [{"out.json.part": part}, {"out.json": path.read_bytes()},
                {"out.json.part": part, "out.json": path.read_bytes()}]


def learned_files() -> list[Files]:
    names = "quecc_4.safetensors", "attention_predictor.safetensors"
    return [{name: (LEARNED / name).read_bytes()} for name in names]
