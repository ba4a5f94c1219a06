"""A random checkpoint of a few layers, for the tests of this folder: its tensors, and how it is written."""
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.llama_vision import LlamaVision
from weights import config_from_dict, load_model, official_state_dict

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
NORM = "language_model.model.norm.weight"
ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
        "original_max_position_embeddings": 8192}
SMALL = {
    "model_type": "mllama", "image_token_index": 64,
    "text_config": {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                    "num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1]},
    "vision_config": {"hidden_size": 16, "intermediate_size": 32, "attention_heads": 2, "image_size": 28,
                      "num_hidden_layers": 2, "num_global_layers": 1, "intermediate_layers_indices": [0, 1]}}


def small_tensors() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = LlamaVision(config_from_dict(SMALL))
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(tensor.shape, generator=generator)
            for name, tensor in official_state_dict(model).items()}


def write_sharded(folder: Path) -> Path:
    """A small checkpoint in two shards under official names, the vision part in the second."""
    (folder / "config.json").write_text(json.dumps(SMALL))
    parts = {}, {}
    for name, tensor in small_tensors().items():
        parts["vision_model" in name][name] = tensor
    for file, part in zip(SHARDS, parts, strict=True):
        save_file(part, folder / file)
    write_index(folder)
    return folder


def write_index(folder: Path):
    weight_map = {name: file for file in SHARDS for name in load_file(folder / file)}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def single(folder: Path, tensors: dict[str, torch.Tensor], **text_config) -> Path:
    """A folder with one file of these tensors, and the small config with changes to its text part."""
    config = SMALL | {"text_config": SMALL["text_config"] | text_config}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_safetensors(path: Path, entries: dict[str, list[int]], dtype="BF16", item=2, pad=8):
    """A file with a real header and, as one hole, all the zeros that it promises: it takes no disk."""
    header, end = {}, 0
    for name, shape in entries.items():
        size = torch.Size(shape).numel() * item
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % pad)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def runtime(name: str) -> str:
    """The names that transformers' modules have in memory since 4.52."""
    if name == HEAD:
        return "lm_head.weight"
    return "model." + name.replace("language_model.model.", "language_model.")


def assert_equal(model: LlamaVision, tensors: dict[str, torch.Tensor]):
    state = official_state_dict(model)
    assert state.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(state[name], tensor), name


def refusal(folder: Path, **arguments) -> str:
    """The one line of bounded length that refuses a checkpoint."""
    with pytest.raises(ValueError) as caught:
        load_model(folder, **arguments)
    line = str(caught.value)
    assert len(line.splitlines()) == 1 and len(line) < 500 + 2 * len(str(folder)), line
    return line
