"""`python -m weights.quantize`: the folder is what rounding at load makes, written whole or not at all."""
import json
from pathlib import Path

import pytest
import torch
from full_disk import full_disk
from helpers import refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_checkpoint import EMBEDDING, HEAD, SMALL, single, small_tensors

from generate import Assistant
from model.llama_vision import LlamaVision
from weights import load_model
from weights.checkpoint import open_checkpoint
from weights.quantize import main, write_quantized
from weights.quantized_layers import WAYS
from weights.quantized_linear import Int4Linear, Int8Linear
from weights.safetensors_file import QUANTIZED

MISFIT = "do not belong together"
Q_PROJ = "language_model.model.layers.0.self_attn.q_proj"


def state(model: LlamaVision) -> dict[str, torch.Tensor]:
    return model.state_dict()


def assert_same(model: LlamaVision, other: LlamaVision):
    ours, theirs = state(model), state(other)
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("way", WAYS)
def test_the_folder_is_the_model_rounded_at_load(way, tmp_path):
    out = write_quantized("tiny", tmp_path / "out", way)
    assert_same(load_model(out), load_model("tiny", quantize=way))
    assert_same(load_model(out, quantize=way), load_model(out))             # which changes nothing
    settings = json.loads((out / "config.json").read_text())
    assert settings["quantization_config"] == {"quant_method": "trimmed-llama", "weights": way}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_it_answers_and_needs_only_itself(tmp_path):
    assistant = Assistant(str(write_quantized("tiny", tmp_path / "out", "int4")), "cpu")
    plain = Assistant("tiny", "cpu", quantize="int4")
    assert assistant.tokenizer.stop_ids == plain.tokenizer.stop_ids
    assert vars(assistant.processor) == vars(plain.processor)


def test_what_is_stored_is_the_same_for_every_device(tmp_path):
    """Codes in the order of the weights, not as a CPU's kernel wants them."""
    tensors = small_tensors()
    out = write_quantized(single(tmp_path, tensors), tmp_path / "out", "int4")
    stored = load_file(out / QUANTIZED)
    for name, layer in ((Q_PROJ, Int4Linear), ("language_model.lm_head", Int8Linear)):
        expected = layer.rounded(tensors[f"{name}.weight"], torch.float32)
        assert all(torch.equal(stored[f"{name}.{part}"], tensor) for part, tensor in expected.items())
    assert torch.equal(stored[EMBEDDING], tensors[EMBEDDING])


def test_tensors_are_mapped_and_aligned_where_sizes_allow(tmp_path):
    out = write_quantized("tiny", tmp_path / "out", "int8")
    with safe_open(out / QUANTIZED, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    rounded = [stored for stored in open_checkpoint(out).values() if stored.layer]
    views = 0
    for stored in rounded:
        weight = stored.codes()["weight"]
        assert weight.data_ptr() % 64 == 0
        views += weight.data_ptr() == stored.shard.view(stored.name).data_ptr()
    assert len(rounded) / 2 < views < len(rounded)          # those of odd sizes lie last, and are copied


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_another_dtype_at_load(dtype, tmp_path):
    out = write_quantized("tiny", tmp_path / "out", "int4")
    model = load_model(out, dtype=dtype)
    weights = state(load_model("tiny", quantize="int4"))
    assert model.lm_head.scale.dtype == model.dtype
    assert torch.equal(model.lm_head.scale, weights["lm_head.scale"].to(model.dtype))
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])


def test_the_dtype_of_scales_can_be_chosen(tmp_path):
    out = write_quantized("tiny", tmp_path / "out", "int8", dtype="fp32")
    assert_same(load_model(out), load_model("tiny", dtype="fp32", quantize="int8"))


def test_a_tied_head_becomes_one_of_its_own(tmp_path):
    tensors = small_tensors()
    del tensors[HEAD]
    folder = single(tmp_path, tensors, tie_word_embeddings=True)
    out = write_quantized(folder, tmp_path / "out", "int8")
    assert_same(load_model(out), load_model(folder, quantize="int8"))


def test_other_ways_are_refused_and_rounding_twice_too(tmp_path):
    out = write_quantized("tiny", tmp_path / "four", "int4")
    with refused("the checkpoint has int4 and int8 weights", ["cannot become int8: leave quantize out"]):
        load_model(out, quantize="int8")
    with refused("its weights have 8 or 4 bits already", ["bf16 checkpoint"]):
        write_quantized(out, tmp_path / "again", "int4")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop(f"{Q_PROJ}.scale"), "dtype U8"),
    (lambda t: t.update({f"{Q_PROJ}.scale": t[f"{Q_PROJ}.scale"][:, :16].contiguous()}), MISFIT),
    (lambda t: t.update({f"{Q_PROJ}.scale": t[f"{Q_PROJ}.scale"].int()}), MISFIT),
    (lambda t: t.update({f"{Q_PROJ}.weight": t[f"{Q_PROJ}.weight"][:, :8].contiguous()}), MISFIT),
    (lambda t: t.update({f"{Q_PROJ}.weight": t[f"{Q_PROJ}.weight"].flatten()}), MISFIT),
    (lambda t: t.update({f"{Q_PROJ}.other": torch.ones(2)}), "unexpected tensors (1)"),
    (lambda t: t.pop(f"{Q_PROJ}.weight"), "lacks its"),
])
def test_damaged_parts_are_one_line(change, words, tmp_path):
    out = write_quantized(single(tmp_path, small_tensors()), tmp_path / "out", "int4")
    tensors = load_file(out / QUANTIZED)
    change(tensors)
    save_file(tensors, out / QUANTIZED)
    with refused("", [words]):
        load_model(out)


def test_transformers_refuses_the_folder(tmp_path):
    """It takes int8 codes for weights where it finds them, so it must not find them."""
    import transformers
    out = write_quantized("tiny", tmp_path / "out", "int8")
    with pytest.raises(OSError, match="no file named model.safetensors"):
        transformers.MllamaForConditionalGeneration.from_pretrained(out)


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = single(tmp_path, small_tensors())
    before = sorted(path.name for path in tmp_path.iterdir())
    with full_disk(20_000), pytest.raises(OSError, match="File too large"):
        write_quantized(folder, tmp_path / "out", "int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    with refused("are needed", ["free on this disk"]):
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": 1000}))
        write_quantized(folder, tmp_path / "out", "int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("words, line", [
    (["tiny", "OUT"], "one of the arguments --int8 --int4 is required"),
    (["tiny", "OUT", "--int8", "--int4"], "not allowed with argument"),
    (["nothing", "OUT", "--int8"], "'nothing' is neither 'tiny', nor a folder here"),
    (["tiny", ".", "--int8"], ". is there already: name a folder that is not"),
    (["tiny", "OUT", "--int8", "--dtype", "fp64"], "choose the dtype bf16, fp16 or fp32"),
    (["tiny", "file/OUT", "--int8"], "cannot be written"),
])
def test_bad_words_are_one_line(words, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == ""
    assert line in said.err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_the_command(tmp_path, capsys):
    main(["tiny", str(tmp_path / "out"), "--int4", "--tower"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert_same(load_model(tmp_path / "out"), load_model("tiny", quantize="int4+tower"))
    assert SMALL["model_type"] == json.loads((tmp_path / "out" / "config.json").read_text())["model_type"]
