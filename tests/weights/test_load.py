"""Loading: every spelling gives the same model, nothing is copied, every bad checkpoint gets one line.

Most tests use a random checkpoint of a few layers, in two shards under official names. What the official
checkpoints hold is in tests/data/official_{11b,90b}_tensors.txt.gz, one `name dtype shape` a line.
"""
import gzip
import json
import re
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model.llama_vision import LlamaVision
from weights import config_from_dict, load_model, official_state_dict, save_model
from weights.names import model_name, official_name

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parents[1] / "model" / "data"
GOLDEN = DATA / "golden"
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


def small_tensors() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = LlamaVision(config_from_dict(SMALL))
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(tensor.shape, generator=generator)
            for name, tensor in official_state_dict(model).items()}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A small checkpoint in two shards, the vision part in the second."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    parts = {}, {}
    for name, tensor in small_tensors().items():
        parts["vision_model" in name][name] = tensor
    for file, part in zip(SHARDS, parts, strict=True):
        save_file(part, tmp_path / file)
    write_index(tmp_path)
    return tmp_path


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


def assert_equal(model: LlamaVision, tensors: dict[str, torch.Tensor]):
    state = official_state_dict(model)
    assert state.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(state[name], tensor), name


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


def runtime(name: str) -> str:
    """The names that transformers' modules have in memory since 4.52."""
    if name == HEAD:
        return "lm_head.weight"
    return "model." + name.replace("language_model.model.", "language_model.")


@pytest.mark.parametrize("spelling", [lambda name: name, runtime, lambda name: "model." + name,
                                      lambda name: "model." + runtime(name), lambda name: model_name(name)],
                         ids=["official", "runtime", "model.official", "model.runtime", "own"])
def test_every_spelling_gives_the_same_model(tmp_path, spelling):
    tensors = small_tensors()
    single(tmp_path, {spelling(name): tensor for name, tensor in tensors.items()})
    assert_equal(load_model(tmp_path), tensors)


def test_save_and_load_round_trip_even_over_the_mapped_file(tmp_path):
    tensors = small_tensors()
    model = load_model(single(tmp_path, tensors))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1                                          # goes to private pages, not to the file
    assert_equal(load_model(tmp_path), tensors)
    assert save_model(model, tmp_path) == tmp_path / "model.safetensors"
    raised = {name: tensor + 1 for name, tensor in tensors.items()}
    assert_equal(load_model(tmp_path), raised)
    assert_equal(model, raised)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_saving_needs_no_numpy_and_keeps_mixed_dtypes_aligned(tmp_path, monkeypatch):
    model = load_model(single(tmp_path, small_tensors()), dtype="bf16")
    model.language_model.norm.float()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "numpy", None)
        save_model(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored[NORM].dtype == torch.float32
    assert_equal(model, stored)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.offset_keys()[0] == NORM                        # wide items before narrow ones


@pytest.fixture
def small_disk():
    """No file may grow beyond 20 kB: writing more fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failed_save_leaves_the_old_file(tmp_path, request):
    tensors = small_tensors()
    model = load_model(single(tmp_path, tensors))
    request.getfixturevalue("small_disk")
    with pytest.raises(OSError, match="File too large"):
        save_model(model, tmp_path)
    assert_equal(load_model(tmp_path), tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


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


# ---- what is refused

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
QUANTIZED = ["bitsandbytes", "compressed-tensors", "gptq", "awq", "auto-round", "quark", "fp8", "fbgemm_fp8"]
BAD = {                                                     # name: (how to spoil it, what the line says)
    "no config": (lambda f: (f / "config.json").unlink(), ["no config.json"]),
    "config not JSON": (write("config.json", b"{"), ["config.json", "JSON"]),
    "another model": (edit_json("config.json", model_type="llama"), ["'llama'", "not a Llama-3.2-Vision"]),
    "quantized text part": (edit_config("text_config", quantization_config={"bits": 4}),
                            ["unnamed method", "not supported yet", "bf16"]),
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
    "int8": (add(SOME, torch.ones(16, dtype=torch.int8)), [SOME, "I8", "BF16"]),
    "float8": (add(SOME, torch.ones(16).to(torch.float8_e4m3fn)), [SOME, "F8_E4M3", "BF16"]),
    **{f"config {method}": (edit_json("config.json", quantization_config={"quant_method": method, "bits": 4}),
                            [method, "not supported yet", "bf16 checkpoint"]) for method in QUANTIZED},
    **{f"tensor {ending}": (add(WEIGHT + ending, torch.ones(2)), [ending, kind, "not supported yet", "bf16"])
       for ending, kind in {".absmax": "bitsandbytes", ".quant_state.bitsandbytes__nf4": "bitsandbytes",
                            ".SCB": "bitsandbytes"}.items()},
    **{f"tensor {ending}": (add(WEIGHT.replace(".weight", ending), torch.ones(2)), [ending, kind, "bf16"])
       for ending, kind in {".weight_scale": "fp8", ".weight_packed": "compressed-tensors",
                            ".qweight": "GPTQ", ".qzeros": "AWQ", ".scales": "MLX"}.items()},
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_gets_one_line(sharded, case):
    spoil, fragments = BAD[case]
    spoil(sharded)
    with pytest.raises(ValueError) as caught:
        load_model(sharded)
    line = str(caught.value)
    assert len(line.splitlines()) == 1 and len(line) < 500 + 2 * len(str(sharded)), line
    for fragment in fragments:
        assert fragment in line


def test_a_damaged_single_file_is_named(tmp_path):
    single(tmp_path, small_tensors())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated: [\d,]+ of [\d,]+ bytes are there"):
        load_model(tmp_path)


@pytest.mark.parametrize("arguments, fragments", [
    ({"device": "foo"}, ["foo", "cpu, cuda"]),
    ({"device": "meta"}, ["meta", "cpu, cuda"]),
    ({"device": "cuda:99"}, ["cuda:99"]),
    ({"device": None}, ["None", "cpu, cuda"]),
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
        load_model(GOLDEN, device=device)
    for fragment in fragments:
        assert fragment in str(caught.value)
