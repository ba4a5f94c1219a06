"""Finding a checkpoint: the bundled one, a folder, or a hub id; one line for what goes wrong.

Nothing here uses the network: snapshot_download works offline on a cache laid out in the library's way, or
is replaced by one that raises the library's own errors.
"""
import json
import os
from pathlib import Path

import huggingface_hub
import pytest

from weights import find_checkpoint
from weights.hub import BUNDLED, read_config

ROOT = Path(__file__).parents[2]
CONFIG = json.dumps({"model_type": "mllama"})
REPO, COMMIT = "owner/name", "0123456789abcdef0123456789abcdef01234567"


def line_of(caught) -> str:
    line = str(caught.value)
    assert len(line.splitlines()) == 1, line
    return line


# ---- folders

def test_a_folder_is_itself(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(CONFIG)
    assert find_checkpoint(str(tmp_path)) == find_checkpoint(tmp_path) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert find_checkpoint(f"~/{tmp_path.name}") == tmp_path
    monkeypatch.chdir(tmp_path.parent)                              # a folder here comes before the hub
    (tmp_path.parent / "owner" / "name").mkdir(parents=True, exist_ok=True)
    (tmp_path.parent / "owner" / "name" / "config.json").write_text(CONFIG)
    assert find_checkpoint("owner/name") == Path("owner/name")


def test_tiny_is_the_bundled_folder(tmp_path, monkeypatch):
    assert Path("weights", "tiny") == BUNDLED["tiny"].relative_to(ROOT)
    monkeypatch.setitem(BUNDLED, "tiny", tmp_path)
    (tmp_path / "config.json").write_text(CONFIG)
    monkeypatch.chdir(ROOT)
    assert find_checkpoint("tiny") == tmp_path


NOT_THERE = {                                               # name: (files, source, what the line says)
    "nothing": ([], "", ["neither 'tiny', nor a folder", "owner/name"]),
    "no such folder": ([], "./no/such/folder", ["'./no/such/folder'", "nor a folder here"]),
    "no such absolute folder": ([], "/no-such-folder/x", ["'/no-such-folder/x'", "nor a folder here"]),
    "no such user": ([], "~no-such-user/x", ["'~no-such-user/x'", "nor a folder here"]),
    "no owner": ([], "Llama-3.2-11B-Vision", ["nor a hub id like owner/name"]),
    "a web address": ([], "https://huggingface.co/owner/name", ["nor a hub id like owner/name"]),
    "too long a name": ([], "x" * 5000, ["nor a folder here"]),
    "a null byte": ([], "a\0b/c", ["nor a folder here"]),
    "a path that does not exist": ([], Path("owner/name"), ["nor a folder here"]),
    "folder without config": (["model.safetensors"], ".", ["no config.json", "safetensors"]),
    "empty folder": (["x/.keep"], "x", ["x: no config.json"]),
    "safetensors file": (["x.safetensors"], "x.safetensors", ["is a file", "pass the folder"]),
    "gguf file": (["x.gguf"], "x.gguf", ["is a file in the GGUF format", "safetensors checkpoint"]),
    "pth file": (["x.pth"], "x.pth", ["is a file in Meta's original format", "safetensors checkpoint"]),
    "gguf folder": (["x-Q4_K_M.gguf"], ".", ["GGUF", "safetensors checkpoint"]),
    "pth folder": (["consolidated.00.pth", "params.json"], ".", ["Meta's original .pth", "safetensors"]),
    "folder over original": (["original/consolidated.00.pth"], ".", ["in original/", "safetensors"]),
    "adapter": (["adapter_config.json", "adapter_model.safetensors"], ".",
                ["adapter alone", "--model BASE --adapter ."]),
    "pickles": (["pytorch_model-00001-of-00002.bin"], ".", ["pytorch_model.bin", "safetensors checkpoint"]),
}


@pytest.mark.parametrize("case", NOT_THERE)
def test_what_is_no_checkpoint_gets_one_line(tmp_path, monkeypatch, case):
    files, source, fragments = NOT_THERE[case]
    monkeypatch.chdir(tmp_path)
    for file in files:
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_bytes(b"")
    with pytest.raises(ValueError) as caught:
        find_checkpoint(source)
    for fragment in fragments:
        assert fragment in line_of(caught)


@pytest.mark.parametrize("source", ["tiny", "."])
def test_a_folder_has_no_revisions(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="revision 'v1' goes with a hub id") as caught:
        find_checkpoint(source, revision="v1")
    line_of(caught)


def link_to(where: str):
    return lambda path: path.symlink_to(where)


@pytest.mark.parametrize("name, put, words", [
    ("owner/name", link_to("name"), "cannot be read (Too many levels of symbolic links)"),
    ("owner/name", link_to("nothing"), "cannot be read (No such file or directory)"),
    ("owner/name", os.mkfifo, "is a file, not a folder"),
    ("owner/name", Path.touch, "is a file, not a folder")],
    ids=["link to itself", "link to nothing", "pipe", "file"])
def test_what_is_here_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, name, put, words):
    monkeypatch.setattr("weights.hub.snapshot_download", lambda *a, **k: pytest.fail("asks the hub"))
    monkeypatch.chdir(tmp_path)
    Path("owner").mkdir()
    put(Path(name))
    with pytest.raises(ValueError) as caught:
        find_checkpoint(name)
    assert line_of(caught).startswith("owner/name") and words in line_of(caught)


@pytest.mark.parametrize("part", ["", "config.json", "inside"])
def test_a_folder_without_permission(tmp_path, without_permission, part):
    (tmp_path / "inside").mkdir()
    if part == "config.json":
        (tmp_path / part).write_text(CONFIG)
    source = tmp_path / "inside" / "checkpoint" if part == "inside" else tmp_path
    with without_permission(tmp_path / part), pytest.raises(ValueError) as caught:
        read_config(find_checkpoint(source))
    assert "cannot be read (Permission denied)" in line_of(caught)


@pytest.mark.parametrize("source", [
    "~a\0b/c", "~\ud800/x", "\ud800", "x" * 10 ** 6, "y/" * 10 ** 5, "a" * 10 ** 5 + "/b", "é" * 100 + "/b",
    None, 5, b"tiny", ["tiny"]], ids=lambda source: ascii(source)[:20])
def test_a_source_of_any_kind_gets_one_line(source):
    with pytest.raises(ValueError) as caught:
        find_checkpoint(source)
    assert len(line_of(caught)) < 400


# ---- what is downloaded

def test_a_wrong_model_is_refused_before_its_weights_are_downloaded(tmp_path, monkeypatch):
    asked = []

    def download(repo, revision, allow_patterns, ignore_patterns):
        asked.append(allow_patterns)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        return str(tmp_path)

    monkeypatch.setattr("weights.hub.snapshot_download", download)
    with pytest.raises(ValueError, match="not a Llama-3.2-Vision checkpoint"):
        find_checkpoint(REPO)
    assert asked == [["config.json", "adapter_config.json"]]


def test_only_the_files_of_the_checkpoint_are_downloaded(tmp_path, monkeypatch):
    wanted = ["chat_template.jinja", "config.json", "model-00001-of-00002.safetensors",
              "model.safetensors.index.json", "tokenizer.json"]
    others = ["README.md", "original/params.json", "original/consolidated.00.pth", "pytorch_model.bin",
              "onnx/model.safetensors", "USE_POLICY.md"]
    fetched, revisions = [], []

    def download(repo, revision, allow_patterns, ignore_patterns):
        revisions.append((repo, revision))
        fetched.append(list(huggingface_hub.utils.filter_repo_objects(
            wanted + others, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)))
        (tmp_path / "config.json").write_text(CONFIG)
        return str(tmp_path)

    monkeypatch.setattr("weights.hub.snapshot_download", download)
    assert find_checkpoint(REPO, revision="v1") == tmp_path
    assert revisions == [(REPO, "v1")] * 2
    assert fetched == [["config.json"], wanted]


def test_a_repository_without_config(tmp_path, monkeypatch):
    monkeypatch.setattr("weights.hub.snapshot_download", lambda *a, **k: str(tmp_path / "never-made"))
    with pytest.raises(ValueError, match="owner/name: no config.json there") as caught:
        find_checkpoint(REPO)
    line_of(caught)


def test_read_config_passes_an_unquantized_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mllama", "quantization_config": None}))
    assert read_config(tmp_path).text.vocab_size == 128256
