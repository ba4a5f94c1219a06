"""Adapters of PEFT's own writer, merged at load: the logits that its own merging gives."""
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from adapter_base import ADAPTERS, LENGTHS, ids, images, write_base
from helpers import close, noise, refused
from prequantized_folder import folder_of
from safetensors.torch import load_file, save_file

from weights import load_model, parse_dtype, read_config, save_model
from weights.adapter_file import open_adapter
from weights.adapters import with_adapters
from weights.checkpoint import open_checkpoint
from weights.quantized_linear import Int4Linear, Int8Linear

FILE = "adapter_model.safetensors"
REFERENCE = load_file(ADAPTERS / "reference.safetensors")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@torch.no_grad()
def logits(folder: Path, *adapters: str | Path, **arguments) -> torch.Tensor:
    """After each sequence's last token."""
    paths = [ADAPTERS / adapter if adapter in REFERENCE else adapter for adapter in adapters]
    model = load_model(folder, adapters=paths, **arguments)
    tiles = images()
    found = model(ids(), tiles)[range(len(LENGTHS)), [length - 1 for length in LENGTHS]]
    return found.float()


@pytest.mark.parametrize("case", REFERENCE)
def test_the_logits_of_peft(base, case):
    adapters = [] if case == "base" else case.split("+")
    torch.testing.assert_close(logits(base, *adapters), REFERENCE[case], atol=1e-4, rtol=0)


def test_every_adapter_changes_the_logits():
    for case, reference in REFERENCE.items():
        assert case == "base" or (reference[:, :64] - REFERENCE["base"]).abs().max() > 0.1


# ---- spellings

def spelt(folder: Path, adapter: str, change) -> Path:
    """The adapter with other names of its tensors."""
    copy = shutil.copytree(ADAPTERS / adapter, folder / adapter)
    tensors = load_file(copy / FILE)
    save_file({change(name): tensor for name, tensor in tensors.items()}, copy / FILE)
    return copy


SPELLINGS = {
    "transformers 4": lambda name: name.replace("model.model.language_model.", "model.language_model.model.")
                                       .replace("model.model.vision_model.", "model.vision_model."),
    "with the adapter's name": lambda name: re.sub(r"(lora_[AB])\.weight$", r"\1.default.weight", name),
    "of a model in FSDP": lambda name: "_fsdp_wrapped_module." + name.replace(
        ".lora_A.", "._fsdp_wrapped_module.lora_A."),
    "without the prefix": lambda name: name.replace("base_model.model.", ""),
    "compiled": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_names(base, tmp_path, spelling):
    folder = spelt(tmp_path, "lora", SPELLINGS[spelling])
    torch.testing.assert_close(logits(base, folder), REFERENCE["lora"], atol=1e-4, rtol=0)


def test_magnitudes_with_their_older_names(base, tmp_path):
    for ending in "vector.weight", "vector.default.weight", "vector.default":
        folder = spelt(tmp_path / ending, "dora", lambda name, ending=ending: re.sub("vector$", ending, name))
        torch.testing.assert_close(logits(base, folder), REFERENCE["dora"], atol=1e-4, rtol=0)


# ---- how it is merged

def own_adapter(folder: Path, tensors: dict[str, torch.Tensor], **config) -> Path:
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 3} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / FILE)
    return folder


def product(rows: int, columns: int, prefix: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Two random matrices of rank 2 under their names, and their product."""
    left, right = noise(rows, 2, seed=1), noise(2, columns, seed=2)
    return {f"{prefix}.lora_A.weight": right, f"{prefix}.lora_B.weight": left}, left @ right


@pytest.mark.parametrize("stored, asked", [("bf16", None), ("bf16", "fp32"), ("fp32", "bf16"),
                                           ("fp16", None)])
def test_merged_in_fp32_and_rounded_once(tmp_path, stored, asked, monkeypatch):
    monkeypatch.setattr("weights.adapters.CHUNK", 40)               # two rows of 16 at once
    write_base(tmp_path)
    save_model(load_model(tmp_path, dtype=stored), tmp_path)
    tensors, delta = product(16, 24, "language_model.layers.0.mlp.down_proj")
    adapter = own_adapter(tmp_path / "adapter", tensors)
    name = "language_model.layers.0.mlp.down_proj.weight"
    plain = load_model(tmp_path)
    merged = load_model(tmp_path, dtype=asked, adapters=[adapter])
    wanted = plain.state_dict()[name].float() + 1.5 * delta
    assert merged.dtype == (plain.dtype if asked is None else parse_dtype(asked))
    within = 2 * torch.finfo(merged.dtype).eps * wanted.abs().max().item()
    close(merged.state_dict()[name].float(), wanted, atol=within)
    rounded = wanted.to(merged.dtype) == merged.state_dict()[name]
    assert merged.dtype == torch.float32 or rounded.float().mean() > 0.98       # others lie halfway
    for other, tensor in merged.state_dict().items():
        assert other == name or torch.equal(tensor, plain.state_dict()[other].to(merged.dtype))


@pytest.mark.parametrize("name", ["nf4", "fp8", "w4a16"])
def test_into_quantized_weights(tmp_path, name):
    folder = folder_of(name, tmp_path)
    plain = load_model(folder, dtype="fp32")
    module = "language_model.layers.0.mlp.down_proj"
    rows, columns = plain.state_dict()[f"{module}.weight"].shape
    tensors, delta = product(rows, columns, f"base_model.model.model.{module}")
    merged = load_model(folder, dtype="fp32", adapters=[own_adapter(tmp_path / "adapter", tensors)])
    wanted = plain.state_dict()[f"{module}.weight"] + 1.5 * delta
    torch.testing.assert_close(merged.state_dict()[f"{module}.weight"], wanted, atol=1e-5, rtol=1e-5)


def test_a_tied_head_gets_its_own_weights(tmp_path):
    """What training changed is the one of the two that the adapter names."""
    write_base(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    embedding = tensors["language_model.model.embed_tokens.weight"]
    head, delta = product(64, 16, "lm_head")
    merged = load_model(tmp_path, adapters=[own_adapter(tmp_path / "head", head)]).state_dict()
    torch.testing.assert_close(merged["lm_head.weight"], embedding[:64] + 1.5 * delta)
    assert torch.equal(merged["language_model.embed_tokens.weight"], embedding)
    matrices, delta = product(72, 16, "x")
    right, left = matrices.values()
    changed = {"language_model.model.embed_tokens.lora_embedding_A": left.T.contiguous(),
               "language_model.model.embed_tokens.lora_embedding_B": right.T.contiguous()}
    adapter = own_adapter(tmp_path / "embedding", changed)
    merged = load_model(tmp_path, adapters=[adapter]).state_dict()
    torch.testing.assert_close(merged["language_model.embed_tokens.weight"], embedding + 1.5 * delta)
    assert torch.equal(merged["lm_head.weight"], embedding[:64])
    adapter = own_adapter(tmp_path / "tying", changed, ensure_weight_tying=True)
    with refused("ensure_weight_tying is not supported"):
        load_model(tmp_path, adapters=[adapter])
    other, _ = product(16, 24, "language_model.model.layers.0.mlp.down_proj")
    untouched = load_model(tmp_path, adapters=[own_adapter(tmp_path / "other", other)])
    assert untouched.lm_head.weight.data_ptr() == untouched.language_model.embed_tokens.weight.data_ptr()


def test_the_files_stay_as_they_are(base):
    before = {path: path.read_bytes() for folder in (base, ADAPTERS / "lora") for path in folder.iterdir()}
    model = load_model(base, adapters=[ADAPTERS / "lora"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(path.read_bytes() == content for path, content in before.items())


@torch.no_grad()
@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_weights_in_8_or_4_bits_have_them_again_after_merging(base, tmp_path, kind):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    tensors = load_file(base / "model.safetensors")
    name = "language_model.model.layers.0.self_attn.q_proj."
    wide = noise(16, 64, seed=3) if kind is Int4Linear else tensors[name + "weight"]
    made = kind.rounded(wide, torch.float32)
    stored = {**tensors, name + "weight": made["weight"], name + "scale": made["scale"]}
    save_file(stored, tmp_path / "model.safetensors")
    found = open_checkpoint(tmp_path)
    matrices, delta = product(16, wide.shape[1], name.removesuffix("."))
    adapter = open_adapter(own_adapter(tmp_path / "adapter", matrices))
    weight = "language_model.layers.0.self_attn.q_proj.weight"
    merged = with_adapters(found, [adapter], read_config(base), None)[weight]
    wanted = kind.numbers(made).float() + 1.5 * delta
    assert merged.layer is kind and not merged.maps and merged.codes() is None
    close(merged.read(), wanted, atol=1e-5)
    if kind is Int8Linear:
        model = load_model(tmp_path, adapters=[tmp_path / "adapter"])
        layer = model.language_model.layers[0].self_attn.q_proj
        assert type(layer) is kind
        step = wanted.abs().amax(1, keepdim=True) / 127
        assert ((layer(torch.eye(16)).T - wanted).abs() <= 0.51 * step).all()


@torch.no_grad()
def test_merged_before_it_is_rounded_to_8_bits(base):
    merged = load_model(base, adapters=[ADAPTERS / "lora"])
    eight = load_model(base, adapters=[ADAPTERS / "lora"], quantize="int8")
    weight = merged.language_model.layers[0].self_attn.q_proj.weight
    layer = eight.language_model.layers[0].self_attn.q_proj
    numbers = layer(torch.eye(16)).T                                # whatever the kernel holds
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((numbers - weight).abs() <= 0.51 * step).all()
    close(logits(base, "lora", quantize="int8"), REFERENCE["lora"], atol=0.2)
