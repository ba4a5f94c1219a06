"""Files that are no ordinary files, names that no file has, too little memory: one line for each."""
import json
import os
import resource
import struct
from pathlib import Path

import pytest
import torch
from small_checkpoint import (
    EMBEDDING,
    HEAD,
    INDEX,
    NORM,
    SHARDS,
    SMALL,
    refusal,
    single,
    small_tensors,
    write_safetensors,
    write_sharded,
)

import weights.safetensors_file
from weights import load_model


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_sharded(tmp_path)


# ---- what is not an ordinary file

def as_folder(path: Path):
    path.mkdir()


def as_pipe(path: Path):
    os.mkfifo(path)


def as_endless_device(path: Path):
    path.symlink_to("/dev/zero")


def as_link_to_itself(path: Path):
    path.symlink_to(path.name)


def as_link_to_nothing(path: Path):
    path.symlink_to("nothing")


def as_huge_file(path: Path):
    with path.open("wb") as file:
        file.truncate(2 ** 40)                                      # one hole, which takes no disk


ODD = {as_folder: "this is a folder, not a file", as_pipe: "this is a pipe, a socket or a device",
       as_endless_device: "this is a pipe, a socket or a device",
       as_link_to_itself: "cannot be read (Too many levels of symbolic links)",
       as_link_to_nothing: "cannot be read (No such file or directory)", as_huge_file: ""}


@pytest.mark.parametrize("become", ODD, ids=lambda become: become.__name__)
@pytest.mark.parametrize("name", ["config.json", INDEX, SHARDS[1], "model.safetensors"])
def test_what_is_not_an_ordinary_file(sharded, become, name):
    """Nothing is waited for, nothing is taken for absent, and a damaged file is not the fault."""
    (sharded / name).unlink(missing_ok=True)
    become(sharded / name)
    line = refusal(sharded)
    assert line.startswith(f"{sharded / name}: ") and ODD[become] in line
    if become is as_huge_file:
        assert ("over 10 MB" if name.endswith(".json") else "not a safetensors file") in line
    else:
        assert "download" not in line


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize("text", ["null", "5", '"x"', "[[]]", "[" * 100_000, "NaN", '{"a": ' * 100_000, ""])
def test_json_of_another_kind(sharded, name, text):
    (sharded / name).write_text(text)
    assert refusal(sharded).startswith(f"{sharded / name}: ")


@pytest.mark.parametrize("file, words", [
    ("x" * 300 + ".safetensors", "File name too long"), ("a\0.safetensors", "not the name of a file"),
    ("\ud800.safetensors", "not the name of a file"), (["a"] * 10 ** 5, "which is not a safetensors file"),
    ({"a": {"b": 1}}, "which is not a safetensors file"), (None, "it names None"), (True, "it names True")],
    ids=["long", "NUL", "surrogate", "list", "object", "null", "true"])
def test_an_index_that_names_no_possible_file(sharded, file, words):
    (sharded / INDEX).write_text(json.dumps({"weight_map": {NORM: file}}))
    assert words in refusal(sharded)


@pytest.mark.parametrize("name", ["", "config.json", INDEX, SHARDS[0]])
def test_what_may_not_be_read(sharded, name, without_permission):
    load_model(sharded)                                             # so that nothing is imported below
    with without_permission(sharded / name):
        assert "cannot be read (Permission denied)" in refusal(sharded)


def test_a_folder_whose_name_is_not_utf8(sharded):
    folder = sharded.rename(sharded.with_name(os.fsdecode(b"caf\xe9")))
    line = refusal(folder)
    assert "caf\\udce9: the folder's path is not valid UTF-8" in line and "rename" in line
    assert "download" not in line


# ---- long names, little memory, files that change

def test_every_message_has_a_bounded_length(tmp_path):
    """Names of a million letters, in every message that holds a name."""
    long = "model." * 100_000 + "x" * 10 ** 6
    odd = {"data_offsets": [0, 4], "dtype": "Q" * 10 ** 6, "shape": [1]}
    many = {"data_offsets": [0, 4], "dtype": "F32", "shape": [1] * 10 ** 6}
    folder = write_sharded(tmp_path)
    for file, content in [(SHARDS[0], header({long: many})), (SHARDS[0], header({NORM: odd})),
                          (SHARDS[0], header({long + ".absmax": many})),
                          (SHARDS[0], header({NORM: {"data_offsets": [0, 10 ** 4000]}})),
                          (INDEX, json.dumps({"weight_map": {long: SHARDS[0]}}).encode()),
                          (INDEX, json.dumps({"weight_map": {long: long}}).encode()),
                          (INDEX, json.dumps({"weight_map": {long: long + ".safetensors"}}).encode()),
                          ("config.json", json.dumps({"model_type": long}).encode()),
                          ("config.json", json.dumps({"model_type": "mllama", "text_config": {
                              "quantization_config": {"quant_method": long}}}).encode())]:
        before = (folder / file).read_bytes()
        (folder / file).write_bytes(content)
        refusal(folder)
        (folder / file).write_bytes(before)
    for arguments in ({"source": long}, {"device": long}, {"dtype": long},
                      {"source": folder, "revision": long}):
        with pytest.raises(ValueError) as caught:
            load_model(**arguments)
        assert len(str(caught.value)) < 600


def header(entries: dict[str, dict]) -> bytes:
    """A safetensors file without data."""
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize("rows, dtype, words", [
    (2 ** 30, None, "cannot be mapped into memory (Cannot allocate memory); let the process have 137.4 GB"),
    (2 ** 23, "float64", "choose a smaller dtype")])
def test_too_little_memory_is_no_damaged_file(tmp_path, rows, dtype, words):
    """The files are holes of 256 and 2 GB; 2.5 GB may be mapped or allocated beyond what is in use."""
    shapes = {name: list(tensor.shape) for name, tensor in small_tensors().items()}
    shapes[HEAD][0] = rows
    shapes[EMBEDDING][0] = rows + 8
    config = SMALL | {"text_config": SMALL["text_config"] | {"vocab_size": rows}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_safetensors(tmp_path / "model.safetensors", shapes)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2_500_000_000, before[1]))
    try:
        line = refusal(tmp_path, dtype=dtype)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert words in line and "download" not in line


def test_a_file_that_shrinks_while_it_is_opened(tmp_path, monkeypatch):
    path = single(tmp_path, small_tensors()) / "model.safetensors"
    map_file = weights.safetensors_file.mapped

    def cut_after_check(name: Path, size: int) -> torch.UntypedStorage:
        os.truncate(path, path.stat().st_size - 1)
        return map_file(name, size)

    monkeypatch.setattr("weights.safetensors_file.mapped", cut_after_check)
    line = refusal(tmp_path)
    assert "mmap length is greater than file size" in line and "let no program write to the file" in line
