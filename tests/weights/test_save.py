"""Saving a model: official names, aligned tensors, and the old file where writing fails."""
import stat
import sys

import pytest
import torch
from full_disk import full_disk
from safetensors import safe_open
from safetensors.torch import load_file
from small_checkpoint import NORM, assert_equal, single, small_tensors

from model.llama_vision import LlamaVision
from weights import load_model, save_model, write_tensors


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


def test_a_failed_save_leaves_the_old_file(tmp_path):
    tensors = small_tensors()
    model = load_model(single(tmp_path, tensors))
    with full_disk(20_000), pytest.raises(OSError, match="File too large"):
        save_model(model, tmp_path)
    assert_equal(load_model(tmp_path), tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_file_keeps_its_permissions_and_a_link_stays_one(tmp_path):
    model = load_model(single(tmp_path, small_tensors()))
    path = tmp_path / "model.safetensors"
    target = path.rename(tmp_path / "elsewhere.safetensors")
    path.symlink_to(target.name)
    target.chmod(0o640)
    save_model(model, tmp_path)
    assert path.is_symlink() and not target.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_what_has_no_values_is_not_written(tmp_path):
    config = load_model(single(tmp_path, small_tensors())).config
    with torch.device("meta"):
        model = LlamaVision(config)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is on the meta device: it has no values to write"):
        save_model(model, tmp_path)
    with pytest.raises(ValueError, match="tensor 'x' has the dtype torch.int8"):
        write_tensors(tmp_path / "model.safetensors", {"x": torch.ones(2, dtype=torch.int8)})
    assert (tmp_path / "model.safetensors").read_bytes() == before
