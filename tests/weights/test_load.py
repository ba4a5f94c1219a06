"""Loading: every spelling gives the same model, and nothing is copied.

What the official checkpoints hold is in tests/model/data/official_{11b,90b}_tensors.txt.gz, one
`name dtype shape` a line.
"""
import gzip
import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoint import (
    HEAD,
    INDEX,
    ROPE,
    SHARDS,
    assert_equal,
    runtime,
    single,
    small_tensors,
    write_safetensors,
    write_sharded,
)

from model.llama_vision import LlamaVision
from weights import config_from_dict, load_model, official_state_dict, save_model
from weights.names import model_name, official_name

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parents[1] / "model" / "data"
GOLDEN = DATA / "golden"


def official_config(name: str) -> dict:
    text = {"model_type": "mllama_text_model", "rope_scaling": ROPE, "eos_token_id": [128001, 128008, 128009]}
    if name == "90b":
        text |= {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 100,
                 "num_attention_heads": 64, "cross_attention_layers": list(range(3, 100, 5))}
    return {"architectures": ["MllamaForConditionalGeneration"], "model_type": "mllama", "text_config": text,
            "image_token_index": 128256, "torch_dtype": "bfloat16",
            "vision_config": {"model_type": "mllama_vision_model", "image_size": 560, "attention_heads": 16}}


def official_tensors(name: str) -> dict[str, list[int]]:
    lines = gzip.decompress((DATA / f"official_{name}_tensors.txt.gz").read_bytes()).decode().splitlines()
    fields = (re.fullmatch(r"(\S+) BF16 (\[.*\])", line).groups() for line in lines)
    return {name: json.loads(shape) for name, shape in fields}


def wrapped_layers(name: str) -> str:
    """torch.compile and activation checkpointing of single layers, FSDP of their parts."""
    name = re.sub(r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module._checkpoint_wrapped_module.", runtime(name))
    return re.sub(r"\b(self_attn|mlp)\.", r"_orig_mod.\1._fsdp_wrapped_module.", name)


WRAPPED = {
    "merged by PEFT": lambda name: "base_model.model." + runtime(name),
    "PEFT, official": lambda name: "base_model.model." + name,
    "DataParallel": lambda name: "module." + runtime(name),
    "compiled": lambda name: "_orig_mod." + name,
    "FSDP": lambda name: "_fsdp_wrapped_module." + runtime(name),
    "compiled, parallel, PEFT": lambda name: "_orig_mod.module.base_model.model.model." + name,
    "parallel, PEFT, compiled": lambda name: "module.base_model.model._orig_mod." + runtime(name),
    "text model compiled": lambda name: name.replace("language_model.", "language_model._orig_mod."),
    "layers": wrapped_layers,
    "layers in FSDP": lambda name: "_fsdp_wrapped_module." + wrapped_layers(name),
}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_sharded(tmp_path)


def file_mapped_at(address: int) -> str:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < stop:
            return line.split(maxsplit=5)[5] if len(line.split(maxsplit=5)) == 6 else ""
    return ""


# ---- what is accepted

def test_shards_load_as_views_of_the_files():
    model = load_model(GOLDEN)
    assert_equal(model, load_file(GOLDEN / SHARDS[0]) | load_file(GOLDEN / SHARDS[1]))
    assert not model.training
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert list(model.buffers()) == []
    for tensor in model.state_dict().values():
        assert Path(file_mapped_at(tensor.data_ptr())).name in SHARDS


@pytest.mark.parametrize("spelling", [lambda name: name, runtime, lambda name: "model." + name,
                                      lambda name: "model." + runtime(name), lambda name: model_name(name),
                                      *WRAPPED.values()],
                         ids=["official", "runtime", "model.official", "model.runtime", "own", *WRAPPED])
def test_every_spelling_gives_the_same_model(tmp_path, spelling):
    tensors = small_tensors()
    single(tmp_path, {spelling(name): tensor for name, tensor in tensors.items()})
    assert_equal(load_model(tmp_path), tensors)


def test_the_names_that_the_wrappers_themselves_give(tmp_path):
    tensors = small_tensors()
    wrapped = load_model(single(tmp_path, tensors))
    layers = wrapped.language_model.layers
    layers[0] = torch.compile(layers[0])
    layers[1] = torch.nn.DataParallel(layers[1])
    wrapped.vision_model = torch.compile(torch.nn.DataParallel(wrapped.vision_model))
    stored = torch.nn.DataParallel(wrapped).state_dict()
    assert "module.language_model.layers.0._orig_mod.mlp.up_proj.weight" in stored
    assert "module.vision_model._orig_mod.module.class_embedding" in stored
    other = tmp_path / "other"
    other.mkdir()
    assert_equal(load_model(single(other, stored)), tensors)


@pytest.mark.parametrize("dtype", ["bfloat16", "bf16", "float16", "fp16", "float64", "fp64", torch.bfloat16])
def test_dtype(sharded, dtype):
    model = load_model(sharded, dtype=dtype)
    wanted = {"b": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16}
    wanted = wanted.get(dtype, wanted["b"] if "b" in str(dtype) else torch.float64)
    assert {p.dtype for p in model.parameters()} == {wanted}
    assert_equal(model, {name: tensor.to(wanted) for name, tensor in small_tensors().items()})


def test_mixed_dtypes_become_that_of_most_weights(tmp_path):
    tensors = small_tensors()
    mixed = {name: t.float() if "norm" in name else t.bfloat16() for name, t in tensors.items()}
    assert_equal(load_model(single(tmp_path, mixed)), {name: t.bfloat16() for name, t in mixed.items()})


def test_device_as_object_and_as_text(sharded):
    for device in torch.device("cpu"), "cpu":
        assert load_model(sharded, device=device).lm_head.weight.device.type == "cpu"


@pytest.mark.parametrize("spelling", [lambda name: name, runtime])
def test_a_tied_head_is_the_first_rows_of_the_embedding(tmp_path, spelling):
    tensors = small_tensors()
    del tensors[HEAD]
    stored = {spelling(name): tensor for name, tensor in tensors.items()}
    model = load_model(single(tmp_path, stored, tie_word_embeddings=True))
    embedding = model.language_model.embed_tokens.weight
    assert embedding.shape == (72, 32) and model.lm_head.weight.shape == (64, 32)
    assert torch.equal(model.lm_head.weight, embedding[:64])
    assert model.lm_head.weight.data_ptr() == embedding.data_ptr()
    save_model(model, tmp_path)
    assert HEAD not in load_file(tmp_path / "model.safetensors")
    assert torch.equal(load_model(tmp_path).lm_head.weight, embedding[:64])


def test_a_head_of_its_own_wins_over_tie_word_embeddings(tmp_path):
    tensors = small_tensors()
    model = load_model(single(tmp_path, tensors, tie_word_embeddings=True))
    assert_equal(model, tensors)
    save_model(model, tmp_path)
    assert_equal(load_model(tmp_path), tensors)


def test_known_non_parameters_are_ignored(tmp_path):
    tensors = small_tensors()
    extra = {"rope_freqs.weight": torch.ones(4), "language_model.model.rotary_emb.inv_freq": torch.ones(4),
             "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    assert_equal(load_model(single(tmp_path, tensors | extra)), tensors)


def test_a_header_without_padding_still_gives_aligned_tensors(tmp_path):
    tensors = small_tensors()
    single(tmp_path, tensors)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    length, = struct.unpack("<Q", content[:8])
    header = content[8:8 + length].rstrip() + b" "
    header += b" " * (len(header) % 2 == 0)                         # an odd length: every address is odd
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length:])
    model = load_model(tmp_path)
    assert_equal(model, tensors)
    assert all(p.data_ptr() % p.element_size() == 0 for p in model.parameters())


def test_one_file_wins_over_an_index(sharded):
    raised = {name: tensor + 1 for name, tensor in small_tensors().items()}
    save_file(raised, sharded / "model.safetensors")
    assert_equal(load_model(sharded), raised)


# ---- the official checkpoints

@pytest.mark.parametrize("name", ["11b", "90b"])
def test_official_names_and_shapes(name):
    with torch.device("meta"):
        model = LlamaVision(config_from_dict(official_config(name)))
    assert {n: list(t.shape) for n, t in official_state_dict(model).items()} == official_tensors(name)
    for own in model.state_dict():
        assert model_name(official_name(own)) == model_name(runtime(official_name(own))) == own


def test_the_448_pixel_base_differs_only_in_two_tables():
    config = official_config("11b")
    del config["vision_config"]["image_size"]
    with torch.device("meta"):
        model = LlamaVision(config_from_dict(config))
    official = official_tensors("11b")
    shapes = {name: list(tensor.shape) for name, tensor in official_state_dict(model).items()}
    differing = {name: shape for name, shape in shapes.items() if shape != official[name]}
    table = "vision_model.gated_positional_embedding."
    assert differing == {table + "embedding": [1025, 1280], table + "tile_embedding.weight": [9, 5248000]}


MEASURE = """
import re, sys, time
from pathlib import Path
from weights import load_model
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before, start = anonymous(), time.perf_counter()
model = load_model(sys.argv[1])
seconds = time.perf_counter() - start
parameters = list(model.parameters())
assert {str(p.dtype) for p in parameters} == {"torch.bfloat16"}
print(len(parameters), sum(p.numel() for p in parameters), round(anonymous() - before), round(seconds, 2))
"""


def test_the_11b_loads_from_five_shards_without_a_copy(tmp_path):
    tensors = official_tensors("11b")
    names, shards = sorted(tensors, key=lambda name: not name.startswith("vision_model.")), [{}]
    for name in names:                                              # vision first
        if sum(2 * torch.Size(shape).numel() for shape in shards[-1].values()) > 4.5e9:
            shards.append({})
        shards[-1][name] = tensors[name]
    assert len(shards) == 5
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-00005.safetensors"
        write_safetensors(tmp_path / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(official_config("11b")))
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    count, numel, megabytes, _ = done.stdout.split()
    assert (int(count), int(numel)) == (906, 10_670_220_835)
    assert int(megabytes) < 1000, f"loading took {megabytes} MB beside the mapped files"
