"""Every bad checkpoint gets one line that says what is wrong and what to do."""
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoint import (
    HEAD,
    INDEX,
    NORM,
    SHARDS,
    refusal,
    single,
    small_tensors,
    write_index,
    write_sharded,
)

from weights import load_model


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_sharded(tmp_path)


def edit_json(name: str, **changes):
    def edit(folder: Path):
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(data | changes))
    return edit


def edit_config(section: str, **changes):
    def edit(folder: Path):
        config = json.loads((folder / "config.json").read_text())
        config[section] |= changes
        (folder / "config.json").write_text(json.dumps(config))
    return edit


def edit_map(changes: dict[str, str]):
    def edit(folder: Path):
        data = json.loads((folder / INDEX).read_text())
        data["weight_map"] |= changes
        (folder / INDEX).write_text(json.dumps(data))
    return edit


def edit_shard(change, file=SHARDS[1]):
    """Change a shard's tensors, and make the index agree."""
    def edit(folder: Path):
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
        change(tensors)
        save_file(tensors, folder / file)
        write_index(folder)
    return edit


def edit_bytes(change, file=SHARDS[1]):
    def edit(folder: Path):
        (folder / file).write_bytes(change((folder / file).read_bytes()))
    return edit


def keep_only(*names: str):
    def edit(folder: Path):
        for path in list(folder.iterdir()):
            if path.name not in names:
                path.unlink()
    return edit


def then(*edits):
    def edit(folder: Path):
        for one in edits:
            one(folder)
    return edit


def write(name: str, content: bytes = b"x"):
    return lambda folder: (folder / name).write_bytes(content)


def add(name: str, tensor: torch.Tensor):
    return edit_shard(lambda t: t.update({name: tensor}))


SOME = "vision_model.transformer.layers.1.input_layernorm.bias"         # lies in the second shard
WEIGHT = "language_model.model.layers.0.mlp.down_proj.weight"
BIG = struct.pack("<Q", 1 << 62)
QUANTIZED = {"gptq": "GPTQ", "awq": "AWQ", "auto-round": "AutoRound", "quark": "AMD Quark",
             "fp8": "FP8 in blocks", "fbgemm_fp8": "FBGEMM FP8", "modelopt": "NVIDIA ModelOpt",
             "something": "something"}
BAD = {                                                     # name: (how to spoil it, what the line says)
    "no config": (lambda f: (f / "config.json").unlink(), ["no config.json"]),
    "config not JSON": (write("config.json", b"{"), ["config.json", "JSON"]),
    "another model": (edit_json("config.json", model_type="llama"), ["'llama'", "not a Llama-3.2-Vision"]),
    "quantized text part": (edit_config("text_config", quantization_config={"bits": 4}),
                            ["unnamed method", "not read here", "bf16"]),
    "MLX config": (edit_json("config.json", quantization={"group_size": 64, "bits": 4}), ["MLX", "bf16"]),
    "absurd sizes": (edit_config("vision_config", image_size=10 ** 9, patch_size=1, max_num_tiles=10 ** 9),
                     ["config.json: no model has these"]),
    "sizes beyond 64 bits": (edit_config("text_config", vocab_size=10 ** 30), ["vocab_size", "no model has"]),
    "nothing but config": (keep_only("config.json"), ["no model.safetensors", INDEX]),
    "pickles": (then(keep_only("config.json"), write("pytorch_model-00001-of-00002.bin")),
                ["pytorch_model.bin", "safetensors"]),
    "gguf": (then(keep_only("config.json"), write("model-Q4_K_M.gguf")), ["GGUF", "safetensors"]),
    "pth": (then(keep_only("config.json"), write("consolidated.00.pth")), ["Meta's original .pth"]),
    "shards without index": (lambda f: (f / INDEX).unlink(), ["no model.safetensors", INDEX]),
    "missing shard": (lambda f: (f / SHARDS[1]).unlink(), [SHARDS[1], "missing files (1)"]),
    "empty shard": (write(SHARDS[1], b""), [SHARDS[1], "empty"]),
    "git-lfs pointer": (write(SHARDS[1], b"version https://git-lfs.github.com/spec/v1"), ["`git lfs pull`"]),
    "four bytes": (write(SHARDS[1], b"abcd"), [SHARDS[1]]),
    "text": (write(SHARDS[1], b"<html><body>404 not found</body></html>"), [SHARDS[1], "not a safetensors"]),
    "header cut": (edit_bytes(lambda b: b[:100]), [SHARDS[1], "truncated within its header"]),
    "data cut": (edit_bytes(lambda b: b[:-1]), [SHARDS[1], "truncated", " bytes are there"]),
    "data cut by half": (edit_bytes(lambda b: b[:len(b) // 2]), [SHARDS[1], "truncated", " bytes are there"]),
    "data too long": (edit_bytes(lambda b: b + b"x"), [SHARDS[1], "not fully covered"]),
    "header length wrong": (edit_bytes(lambda b: BIG + b[8:]), [SHARDS[1], "header is damaged"]),
    "header damaged": (edit_bytes(lambda b: b[:50] + b'"{\x00' + b[53:]), [SHARDS[1], "header is damaged"]),
    "header not an object": (write(SHARDS[1], struct.pack("<Q", 8) + b"[1,2,3] "), ["header is damaged"]),
    "unknown dtype": (edit_bytes(lambda b: b.replace(b'"F32"', b'"Q32"', 1)), [SHARDS[1], "Q32"]),
    "index not JSON": (write(INDEX, b'{"weight_map": '), [INDEX, "not readable as JSON"]),
    "index binary": (write(INDEX, b"\xff\xfe\x00"), [INDEX, "not readable as JSON"]),
    "index without map": (write(INDEX, b"{}"), [INDEX, "weight_map"]),
    "index a list": (write(INDEX, b"[]"), [INDEX, "weight_map"]),
    "index map a list": (write(INDEX, b'{"weight_map": ["a"]}'), [INDEX, "weight_map"]),
    "index map of numbers": (write(INDEX, b'{"weight_map": {"a": 1}}'), [INDEX, "it names 1,"]),
    "index leads up": (edit_map({SOME: "../" + SHARDS[1]}), [INDEX, "'../", "same folder"]),
    "index absolute": (edit_map({SOME: "/" + SHARDS[1]}), [INDEX, "'/model", "same folder"]),
    "index to a pickle": (edit_map({SOME: "a.bin"}), [INDEX, "'a.bin'"]),
    "index to the parent": (edit_map({SOME: ".."}), [INDEX, "'..'"]),
    "index to nothing": (edit_map({SOME: ""}), [INDEX, "''"]),
    "index to the wrong shard": (edit_map({SOME: SHARDS[0]}), [SOME, SHARDS[0], "does not hold"]),
    "missing tensor": (edit_shard(lambda t: t.pop(SOME)), ["missing tensors (1): ", SOME]),
    "no vision": (edit_shard(lambda t: [t.pop(n) for n in list(t) if n.startswith("vision_model")]),
                  ["missing", "vision_model.", ", ..."]),
    "untied head missing": (edit_shard(lambda t: t.pop(HEAD), SHARDS[0]), ["missing", HEAD]),
    "unexpected tensor": (add("language_model.model.layers.99.mlp.up_proj.weight", torch.ones(2)),
                          ["unexpected tensors (1): ", "layers.99.mlp.up_proj.weight"]),
    "tensor of another name": (edit_shard(lambda t: t.update({"extra.bias": t.pop(SOME)})),
                               ["missing", SOME, "unexpected", "extra.bias"]),
    "wrong shape": (add(SOME, torch.ones(3)), [SOME, "[3]", "[16]"]),
    "scalar": (add(SOME, torch.tensor(1.0)), [SOME, "[]", "[16]"]),
    "config of another size": (edit_config("vision_config", image_size=112), ["[5, 16]", "[65, 16]"]),
    "a name of two lines": (add("extra\nbias", torch.ones(2)), ["unexpected tensors (1): 'extra\\nbias'"]),
    "two spellings": (add("model.language_model.norm.weight", torch.ones(32)),
                      ["twice", NORM, "model.language_model.norm.weight"]),
    "two spellings, one wrapped": (add("_orig_mod." + NORM, torch.ones(32)), ["twice", "_orig_mod." + NORM]),
    **{f"unmerged {part}": (add(f"base_model.model.{WEIGHT[:-7]}.{part}.weight", torch.ones(2)),
                            [part, "PEFT", "merge_and_unload", "--adapter"])
       for part in ("base_layer", "lora_A.default", "lora_B", "modules_to_save.default", "original_module")},
    "int8": (add(SOME, torch.ones(16, dtype=torch.int8)), [SOME, "I8", "BF16"]),
    "float8": (add(SOME, torch.ones(16).to(torch.float8_e4m3fn)), [SOME, "F8_E4M3", "BF16"]),
    **{f"config {method}": (edit_json("config.json", quantization_config={"quant_method": method, "bits": 4}),
                            [name, "not read here", "bf16 checkpoint"])
       for method, name in QUANTIZED.items()},
    **{f"tensor {ending}": (add(WEIGHT.replace(".weight", ending), torch.ones(2)), [ending, kind, "bf16"])
       for ending, kind in {".weight_scale_inv": "FP8 in blocks", ".weight_scale_2": "NVIDIA ModelOpt",
                            ".weight_global_scale": "compressed-tensors, nvfp4", ".qweight": "GPTQ",
                            ".qzeros": "AWQ", ".scales": "MLX"}.items()},
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_gets_one_line(sharded, case):
    spoil, fragments = BAD[case]
    spoil(sharded)
    line = refusal(sharded)
    for fragment in fragments:
        assert fragment in line


def test_a_damaged_single_file_is_named(tmp_path):
    single(tmp_path, small_tensors())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated: [\d,]+ of [\d,]+ bytes are there"):
        load_model(tmp_path)


# ---- arguments

@pytest.mark.parametrize("arguments, fragments", [
    ({"device": 2 ** 70}, ["cpu, cuda"]),
    ({"device": "foo"}, ["foo", "cpu, cuda"]),
    ({"device": "meta"}, ["meta", "cpu, cuda"]),
    ({"device": "cuda:99"}, ["cuda:99"]),
    ({"dtype": "int4"}, ["int4", "bfloat16, bf16, float16, fp16, float32, fp32"]),
    ({"dtype": torch.int8}, ["torch.int8", "bf16"]),
    ({"dtype": ["bf16"]}, ["['bf16']", "fp32"]),
], ids=str)
def test_a_bad_argument_gets_one_line(arguments, fragments):
    with pytest.raises(ValueError) as caught:
        load_model("nowhere/that-exists", **arguments)              # refused before the source is looked at
    assert len(str(caught.value).splitlines()) == 1
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("count, device, fragments", [
    (0, "cuda", ["'cuda'", "no CUDA GPU", "use device cpu"]),
    (2, "cuda:2", ["'cuda:2'", "2 GPUs", "cuda:1"]),
])
def test_a_gpu_that_is_not_there(monkeypatch, count, device, fragments):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ValueError) as caught:
        load_model(device=device)
    for fragment in fragments:
        assert fragment in str(caught.value)
