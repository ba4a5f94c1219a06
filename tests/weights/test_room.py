"""What will be allocated is compared with what is free: of machines, of groups with limits, of GPUs."""
import json
from pathlib import Path

import pytest
import torch
from small_checkpoint import refusal, single, small_tensors, write_safetensors
from test_load import official_config, official_tensors

from generate import Assistant
from weights import load_model
from weights.free import free_memory, free_on_linux
from weights.tokenizer import messages

GB = 10 ** 9


@pytest.fixture
def free(monkeypatch):
    """Sets how much memory is free."""
    def to(count: int | None):
        monkeypatch.setattr("weights.room.free_memory", lambda device: count)
    return to


@pytest.fixture(scope="module")
def eleven(tmp_path_factory) -> Path:
    """The 11B: a hole of 21 GB."""
    folder = tmp_path_factory.mktemp("eleven")
    write_safetensors(folder / "model.safetensors", official_tensors("11b"))
    (folder / "config.json").write_text(json.dumps(official_config("11b")))
    return folder


@pytest.mark.parametrize("gigabytes, fitting", [
    (24, "dtype bf16 (mapped from its files), quantize int8 (9.3 GB), quantize int4 (5.2 GB)"),
    (6, "dtype bf16 (mapped from its files), quantize int4 (5.2 GB)"),
    (1, "dtype bf16 (mapped from its files)")])
def test_11b_in_fp32_says_what_it_needs_and_what_fits(eleven, free, gigabytes, fitting):
    free(gigabytes * GB)
    line = refusal(eleven, dtype="fp32")
    assert f"on cpu in float32 the weights need 42.7 GB, and {gigabytes}.0 GB are free; what fits: " in line
    assert line.endswith("what fits: " + fitting)
    load_model(eleven)                                                  # mapped: nothing is allocated


def test_quantising_needs_what_is_not_mapped(eleven, free):
    free(9 * GB)
    line = refusal(eleven, quantize="int8")
    assert "need 9.3 GB" in line and "quantize int4 (5.2 GB)" in line and "int8 (" not in line
    free(None)                                                          # a system that does not tell
    single_tensor = official_tensors("11b")
    assert sum(torch.Size(shape).numel() for shape in single_tensor.values()) == 10_670_220_835


def test_converted_weights_count_and_mapped_ones_do_not(tmp_path, free):
    single(tmp_path, small_tensors())
    free(0)
    assert load_model(tmp_path).dtype == torch.float32
    assert "the weights need 0.0 GB, and 0.0 GB are free" in refusal(tmp_path, dtype="bf16")


def test_too_many_answers_at_once(monkeypatch, free):
    assistant = Assistant("tiny")
    image = assistant.encode_images([])
    free(10 ** 6)
    with pytest.raises(ValueError) as caught:
        assistant.answer([messages("Where?")] * 8, image, 500)
    assert "8 answers of up to 512 tokens need 0.0 GB" in str(caught.value)
    assert "fewer questions at once" in str(caught.value)
    free(10 ** 9)
    assert len(assistant.answer([messages("Where?")] * 8, image, 2).tokens) == 8


# ----- what is free


def test_what_is_free_here():
    free = free_memory(torch.device("cpu"))
    assert free is None or 10 ** 8 < free < 10 ** 14


def test_a_gpu_tells_itself(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 9))
    assert free_memory(torch.device("cuda:1")) == 7


def written(folder: Path, files: dict[str, object]):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


MEMINFO = "MemTotal: 24000000 kB\nMemFree: 100 kB\nMemAvailable: 20000000 kB"


@pytest.mark.parametrize("groups, files, expected", [
    ("0::/", {}, 20_480_000_000),
    ("0::/a/b", {"a/memory.max": 8 * GB, "a/memory.current": 3 * GB, "a/memory.stat": f"inactive_file {GB}",
                 "a/b/memory.max": "max", "a/b/memory.current": GB}, 6 * GB),
    ("0::/a/b", {"a/memory.max": 8 * GB, "a/memory.current": 3 * GB, "a/b/memory.max": 2 * GB,
                 "a/b/memory.current": GB}, GB),
    ("0::/", {"memory.max": 4 * GB, "memory.current": 5 * GB}, 0),
    ("8:pids:/x\n4:memory:/x/y", {"memory/x/y/memory.limit_in_bytes": 5 * GB,
                                  "memory/x/y/memory.usage_in_bytes": 4 * GB,
                                  "memory/x/y/memory.stat": f"cache 5\ntotal_inactive_file {GB}"}, 2 * GB),
    ("4:cpu,memory:/", {"memory/memory.limit_in_bytes": 2 ** 63 - 4096, "memory/memory.usage_in_bytes": GB},
     20_480_000_000)],
    ids=["no limit", "an outer group", "the inner group", "over its limit", "cgroup 1", "no limit in 1"])
def test_the_smallest_limit_counts(tmp_path, groups, files, expected):
    written(tmp_path / "proc", {"meminfo": MEMINFO, "self/cgroup": groups})
    written(tmp_path / "groups", files)
    assert free_on_linux(tmp_path / "proc", tmp_path / "groups") == expected


def test_a_system_without_these_files_tells_nothing(tmp_path):
    assert free_on_linux(tmp_path, tmp_path) is None
