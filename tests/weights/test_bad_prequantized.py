"""Damaged quantized checkpoints, and formats that are not read, get one line that says what is wrong."""
import json
from pathlib import Path

import pytest
import torch
from prequantized_folder import folder_of
from safetensors.torch import load_file, save_file
from small_checkpoint import refusal

from weights import read_config

LAYER = "language_model.model.layers.0.mlp.down_proj"
WEIGHT = f"{LAYER}.weight"
HQQ = f"model.{LAYER.replace('language_model.model', 'language_model')}"
SCALE, ZERO = f"{LAYER}.weight_scale", f"{LAYER}.weight_zero_point"
WORDS, SHAPE, ORDER = f"{LAYER}.weight_packed", f"{LAYER}.weight_shape", f"{LAYER}.weight_g_idx"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"


def edit(change):
    def spoil(folder: Path):
        path = folder / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path)
    return spoil


def without(name: str):
    return edit(lambda tensors: tensors.pop(name))


def put(name: str, tensor: torch.Tensor):
    return edit(lambda tensors: tensors.update({name: tensor}))


def recast(name: str, dtype: torch.dtype):
    return edit(lambda tensors: tensors.update({name: tensors[name].to(dtype)}))


def cut(name: str):
    """The last row, or the last element, is missing."""
    return edit(lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))


def state(**changes):
    """Other values in bitsandbytes' JSON; None takes the key away."""
    def change(tensors: dict[str, torch.Tensor]):
        values = json.loads(bytes(tensors[STATE].tolist())) | changes
        kept = {key: value for key, value in values.items() if value is not None}
        tensors[STATE] = torch.tensor(list(json.dumps(kept).encode()), dtype=torch.uint8)
    return edit(change)


def raw_state(content: bytes):
    return put(STATE, torch.tensor(list(content), dtype=torch.uint8))


def letters(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


BAD = {                                             # name: (format, how to spoil it, what the line says)
    "nf4 without scales": ("nf4", without(f"{WEIGHT}.absmax"), ["lacks its 'absmax'"]),
    "nf4 without weight": ("nf4", without(WEIGHT), ["lacks its 'weight'"]),
    "nf4 without state": ("nf4", without(STATE), ["needs one quant_state"]),
    "nf4 without table": ("nf4", without(f"{WEIGHT}.quant_map"), ["lacks its 'quant_map'"]),
    "nf4 without nested table": ("nf4", without(f"{WEIGHT}.nested_quant_map"), ["'nested_quant_map'"]),
    "nf4 without nested scales": ("nf4", without(f"{WEIGHT}.nested_absmax"), ["'absmax'", "F32"]),
    "nf4 cut": ("nf4", cut(WEIGHT), ["[719, 1]", "720 elements"]),
    "nf4 scales cut": ("nf4", cut(f"{WEIGHT}.absmax"), ["[22]", "'absmax'", "23 elements"]),
    "nf4 table cut": ("nf4", cut(f"{WEIGHT}.quant_map"), ["'quant_map'", "16 elements"]),
    "nf4 nested table cut": ("nf4", cut(f"{WEIGHT}.nested_quant_map"), ["256 elements"]),
    "nf4 nested scales as fp16": ("nf4", recast(f"{WEIGHT}.nested_absmax", torch.half), ["'F16'", "F32"]),
    "nf4 state not JSON": ("nf4", raw_state(b"{"), ["not JSON"]),
    "nf4 state no text": ("nf4", raw_state(b"\xff\xfe\x00"), ["not JSON"]),
    "nf4 state a list": ("nf4", raw_state(b"[]"), ["not a JSON object"]),
    "nf4 state long": ("nf4", raw_state(b"[" * 20_000), ["over 10000 bytes"]),
    "nf4 state deep": ("nf4", raw_state(b"[" * 9_000), ["not JSON"]),
    "nf4 no shape": ("nf4", state(shape=None), ["shape of a matrix"]),
    "nf4 huge shape": ("nf4", state(shape=[10 ** 30, 2]), ["shape of a matrix"]),
    "nf4 negative shape": ("nf4", state(shape=[-36, -40]), ["shape of a matrix"]),
    "nf4 shape of text": ("nf4", state(shape="36x40"), ["shape of a matrix"]),
    "nf4 other shape": ("nf4", state(shape=[40, 40]), ["800 elements"]),
    "nf4 turned shape": ("nf4", state(shape=[40, 36]), ["[40, 36]", "config.json asks for [36, 40]"]),
    "nf4 no blocks": ("nf4", state(blocksize=0), ["even blocksize"]),
    "nf4 odd blocks": ("nf4", state(blocksize=63), ["even blocksize"]),
    "nf4 other blocks": ("nf4", state(blocksize=128), ["'absmax'", "12 elements"]),
    "nf4 no nested blocks": ("nf4", state(nested_blocksize=None), ["nested_blocksize"]),
    "nf4 no offset": ("nf4", state(nested_offset=None), ["nested_offset"]),
    "nf4 offset nan": ("nf4", state(nested_offset=float("nan")), ["nested_offset"]),
    "nf4 an unknown part": ("nf4", put(f"{WEIGHT}.quant_state.bitsandbytes__nf8", letters("{}")), ["nf8"]),
    "int8 without scales": ("int8", without(f"{LAYER}.SCB"), ["lacks its 'SCB'"]),
    "int8 without weight": ("int8", without(WEIGHT), ["lacks its 'weight'"]),
    "int8 scales cut": ("int8", cut(f"{LAYER}.SCB"), ["'SCB'", "36 elements"]),
    "int8 as fp16": ("int8", recast(WEIGHT, torch.half), ["'F16'", "I8"]),
    "int8 for a GPU": ("int8", put(f"{LAYER}.weight_format", torch.tensor(2).byte()), ["GPU", "bf16"]),
    "int8 and nf4": ("int8", put(f"{WEIGHT}.absmax", torch.ones(4)), ["absmax", "others of the same weight"]),
    "int8 alone": ("int8", edit(lambda t: [t.pop(f"{LAYER}.{part}") for part in ("SCB", "weight_format")]),
                   [WEIGHT, "dtype I8"]),
    "fp8 without scales": ("fp8", without(SCALE), [WEIGHT, "dtype F8_E4M3"]),
    "fp8 without weight": ("fp8", without(WEIGHT), ["lacks its 'weight'"]),
    "fp8 as bf16": ("fp8", recast(WEIGHT, torch.bfloat16), ["'BF16'", "F8_E4M3"]),
    "fp8 in blocks": ("fp8", put(SCALE, torch.ones(3, 2)), ["[3, 2]", "bf16 checkpoint"]),
    "fp8 scales as integers": ("fp8", put(SCALE, torch.ones(48).int()), ["'I32'"]),
    "fp8 of one row": ("fp8", put(WEIGHT, torch.ones(48).to(torch.float8_e4m3fn)), ["not that of a matrix"]),
    "w8a8 zero points cut": ("w8a8", put(ZERO, torch.ones(47).char()), ["48 elements"]),
    "w4a16 cut": ("w4a16", cut(WORDS), ["[47, 8]"]),
    "w4a16 without shape": ("w4a16", without(SHAPE), ["lacks its 'weight_shape'"]),
    "w4a16 shape cut": ("w4a16", cut(SHAPE), ["2 elements"]),
    "w4a16 other shape": ("w4a16", put(SHAPE, torch.tensor([48, 10 ** 15])), ["weight_shape"]),
    "w4a16 no columns": ("w4a16", put(SHAPE, torch.tensor([48, 0])), ["weight_shape"]),
    "w4a16 three bits": ("w4a16", put(WORDS, torch.ones(48, 6).int()), ["bits of a weight"]),
    "w4a16 of bytes": ("w4a16", recast(WORDS, torch.uint8), ["'U8'", "I32"]),
    "w4a16 groups": ("w4a16", put(SCALE, torch.ones(48, 5)), ["[48, 5]", "group of columns"]),
    "w4a16 no groups": ("w4a16", put(SCALE, torch.ones(48, 0)), ["group of columns"]),
    "w4a16 zeros cut": ("w4a16_zeros", cut(ZERO), ["24 elements"]),
    "w4a16 order beyond": ("w4a16_order", put(ORDER, torch.full((64,), 4).int()), ["4 groups"]),
    "w4a16 order below": ("w4a16_order", put(ORDER, torch.arange(64).int() - 60), ["groups"]),
    "w4a16 order cut": ("w4a16_order", cut(ORDER), ["64 elements"]),
    "torchao without scales": ("ao_int8", without(f"{LAYER}._weight_scale"), ["lacks its 'scale'"]),
    "torchao without weight": ("ao_int8", without(f"{LAYER}._weight_qdata"), ["lacks its 'qdata'"]),
    "torchao other scales": ("ao_int4", put(f"{LAYER}._weight_scale", torch.ones(9, 36)), ["[9, 36]"]),
    "torchao packed": ("ao_int8", put(f"{LAYER}._weight_scale_and_zero", torch.ones(2)),
                       ["'scale_and_zero'"]),
    "torchao zeros cut": ("ao_int4", cut(f"{LAYER}._weight_zero_point"), ["360 elements"]),
    "hqq without weight": ("hqq4", without(f"{HQQ}.W_q"), ["lacks its 'W_q'"]),
    "hqq cut": ("hqq4", cut(f"{HQQ}.W_q"), ["'W_q'", "elements"]),
    "hqq zeros cut": ("hqq4", cut(f"{HQQ}.zero"), ["'zero'"]),
    "hqq of another width": ("hqq3", put(f"{HQQ}.scale", torch.ones(1, 7)), ["'scale'"]),
    "hqq no groups": ("hqq4", put(f"{HQQ}.group_size", torch.tensor(0).int()), ["groups of 0"]),
    "hqq two groups": ("hqq4", put(f"{HQQ}.group_size", torch.tensor([8, 8]).int()), ["1 elements"]),
    "hqq third axis": ("hqq4", put(f"{HQQ}.axis", torch.tensor(2).int()), ["axis 2"]),
    "hqq five bits": ("hqq4", put(f"{HQQ}.nbits", torch.tensor(5).int()), ["5 bits packed as '4bit_u8'"]),
    "hqq other packing": ("hqq4", put(f"{HQQ}.packing", letters("4bit\n")), ["'4bit\\n'"]),
    "hqq long packing": ("hqq4", put(f"{HQQ}.packing", letters("4" * 1000)), ["long text"]),
    "hqq negative shape": ("hqq4", put(f"{HQQ}.shape", torch.tensor([-36, -40])), ["[-36, -40]"]),
    "hqq quantized scales": ("hqq4", put(f"{HQQ}.quant_scale", torch.tensor(1).byte()),
                             ["quantized scales", "bf16"]),
}


@pytest.mark.parametrize("case", BAD)
def test_damage_gets_one_line(case, tmp_path):
    name, spoil, fragments = BAD[case]
    spoil(folder_of(name, tmp_path))
    line = refusal(tmp_path)
    assert "model.safetensors" in line
    for fragment in fragments:
        assert fragment in line


def edited_config(folder: Path, **changes) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": changes}))
    return folder


COMPRESSED, AO = {"quant_method": "compressed-tensors"}, {"quant_method": "torchao"}
NVFP4 = {"group_0": {"format": "nvfp4-pack-quantized"}}
UNREAD = {
    "four bits for floats": (COMPRESSED | {"format": "nvfp4-pack-quantized"},
                             "compressed-tensors, nvfp4-pack-quantized"),
    "one of several": (COMPRESSED | {"format": "mixed-precision", "config_groups": NVFP4},
                       "compressed-tensors, nvfp4-pack-quantized"),
    "rotated": (COMPRESSED | {"transform_config": {"config_groups": {"R1": {}}}}, "rotated weights"),
    "sparse": (COMPRESSED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
    "torchao int4": (AO | {"quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}},
                     "torchao, Int4WeightOnlyConfig"),
    "torchao by module": (AO | {"quant_type": {"default": {
        "_type": "FqnToConfig", "_data": {"lm_head": {"_type": "NVFP4WeightOnlyConfig"}}}}},
        "torchao, NVFP4WeightOnlyConfig"),
    "torchao of old": (AO | {"quant_type": "int4_weight_only"}, "torchao, int4_weight_only"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_the_right_name_of_what_is_not_read(case, tmp_path):
    """Read from config.json, so before a download of the weights."""
    changes, name = UNREAD[case]
    edited_config(folder_of("fp8", tmp_path), **changes)
    with pytest.raises(ValueError) as caught:
        read_config(tmp_path)
    line = str(caught.value)
    assert name in line and "not read here; use the bf16 checkpoint" in line and len(line.splitlines()) == 1


@pytest.mark.parametrize("changes", [
    {"quant_method": "bitsandbytes", "load_in_4bit": True}, {"load_in_8bit": True, "llm_int8_threshold": 6.0},
    COMPRESSED | {"format": "pack-quantized", "transform_config": {}, "sparsity_config": {"format": "dense"}},
    {"quant_method": "hqq", "quant_config": {}},
    AO | {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}], ids=str)
def test_configs_that_are_read(changes, tmp_path):
    read_config(edited_config(folder_of("fp8", tmp_path), **changes))
