"""Checkpoints quantized by other programs give the logits that those programs' own weights give.

The files are written by the libraries themselves, the logits computed by transformers from what the libraries
dequantize: see data/quantized/make.py.
"""
import json

import pytest
import torch
from prequantized_folder import DATA, folder_of
from safetensors.torch import load_file, save_file

from model.image_tokens import Tiles
from model.llama_vision import LlamaVision
from weights import load_model
from weights.checkpoint import open_checkpoint
from weights.part import Part
from weights.quantized_linear import QuantizedLinear
from weights.quantized_parts import Quantized
from weights.ranks import Ranks

NAMES = sorted(path.stem for path in DATA.glob("*.json"))
HALF = {"nf4_float16": torch.float16}


def logits(model: LlamaVision) -> torch.Tensor:
    prompt = load_file(DATA / "prompt.safetensors")
    with torch.no_grad():
        return model(prompt["ids"], [Tiles(prompt["pixels"], torch.tensor([[1, 2]]))])


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_that_it_must_have(name, tmp_path):
    folder = folder_of(name, tmp_path)
    expected = load_file(DATA / f"{name}.logits.safetensors")["logits"]
    assert expected.std() > 0.5
    torch.testing.assert_close(logits(load_model(folder, dtype="fp32")), expected, atol=1e-5, rtol=0)
    assert load_model(folder).dtype == HALF.get(name, torch.bfloat16)


@pytest.mark.parametrize("name", ["fp8", "w4a16_zeros", "w4a16_order"])       # widths that int8 allows
def test_onward_to_eight_bits(name, tmp_path):
    """What is dequantized can be quantized again, as any checkpoint can."""
    folder = folder_of(name, tmp_path)
    model = load_model(folder, quantize="int8")
    rounded = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    assert len(rounded) > 10
    expected = load_file(DATA / f"{name}.logits.safetensors")["logits"]
    assert (logits(model).float() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("numbers", [64, 1000])
def test_pieces_make_no_difference(name, numbers, tmp_path, monkeypatch):
    """A weight is dequantized piece by piece; here the pieces are smaller than the small weights."""
    found = open_checkpoint(folder_of(name, tmp_path))
    whole = {key: stored.read() for key, stored in found.items()}
    monkeypatch.setattr(Quantized, "numbers_at_once", numbers)
    for key, stored in found.items():
        assert torch.equal(stored.read(), whole[key]), key
        assert whole[key].dtype == stored.dtype and list(whole[key].shape) == stored.shape


def test_an_adapter_that_was_trained_on_four_bits(tmp_path):
    """QLoRA: what is added to the dequantized weights is what was trained beside them."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    left, right = torch.randn(36, 2), torch.randn(2, 36)
    module = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    save_file({f"{module}.lora_A.weight": right, f"{module}.lora_B.weight": left},
              adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}))
    name = "language_model.layers.0.self_attn.q_proj.weight"
    dequantized = open_checkpoint(folder_of("nf4", base))[name].read().float()
    merged = load_model(base, dtype="fp32", adapters=[adapter]).state_dict()[name]
    torch.testing.assert_close(merged, dequantized + 2 * left @ right)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_rank_keeps_its_part_alone(dim, tmp_path):
    """Dequantized whole, but the other half does not stay in memory."""
    stored = open_checkpoint(folder_of("w4a16", tmp_path))["language_model.layers.0.mlp.up_proj.weight"]
    halves = [Part(stored, Ranks(rank, 2), dim).read() for rank in range(2)]
    assert torch.equal(torch.cat(halves, dim), stored.read())
    assert all(half.untyped_storage().nbytes() == half.nbytes for half in halves)


def test_parts_of_a_weight_in_two_files(tmp_path):
    """As shards are cut, the scales of a weight may lie in the next file."""
    folder = folder_of("nf4", tmp_path)
    single = folder / "model.safetensors"
    tensors = load_file(single)
    expected = {key: stored.read().clone() for key, stored in open_checkpoint(folder).items()}
    files = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    weight_map = {}
    for number, file in enumerate(files):
        part = {key: tensor for i, (key, tensor) in enumerate(tensors.items()) if i % 2 == number}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    single.unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = open_checkpoint(folder)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key].read(), tensor), key

