"""Weights are mapped files: larger than memory, shared by all processes, and never written to."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_checkpoint import single, small_tensors, write_safetensors
from test_load import official_config, official_tensors

from weights import load_model

ROOT = Path(__file__).parents[2]
MAPPED = """
import re, sys
from pathlib import Path
from weights import load_model
def kilobytes(file, line):
    return int(re.search(line + r":\\s+(\\d+)", Path(file).read_text())[1])
model = load_model(sys.argv[1])
before = kilobytes("/proc/self/status", "RssAnon")
total = sum(p.double().sum().item() for p in model.parameters())
print(kilobytes("/proc/self/status", "RssAnon") - before, total, flush=True)
part = Path("/proc/self/smaps").read_text().split("model.safetensors")[1]
print(re.search(r"Pss:\\s+(\\d+)", part)[1], re.search(r"Rss:\\s+(\\d+)", part)[1], flush=True)
sys.stdin.read()
"""


def test_a_file_larger_than_any_memory_here_loads(tmp_path):
    """The 90B in one file: a hole of 177 GB."""
    write_safetensors(tmp_path / "model.safetensors", official_tensors("90b"))
    (tmp_path / "config.json").write_text(json.dumps(official_config("90b")))
    assert (tmp_path / "model.safetensors").stat().st_blocks * 512 < 1e6
    model = load_model(tmp_path)
    assert sum(p.nbytes for p in model.parameters()) == 2 * 88_593_355_323
    assert not model.lm_head.weight[-1].any()
    with torch.no_grad():
        model.lm_head.weight[-1] = 1
    assert not load_model(tmp_path).lm_head.weight[-1].any()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is shared")
def test_two_processes_share_the_pages(tmp_path):
    tensors = small_tensors()
    tensors["language_model.model.embed_tokens.weight"] = torch.ones(100_008, 32)
    tensors["language_model.lm_head.weight"] = torch.ones(100_000, 32)
    single(tmp_path, tensors, vocab_size=100_000)
    command = [sys.executable, "-c", MAPPED, str(tmp_path)]
    first = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    first.stdout.readline(), first.stdout.readline()
    second = subprocess.run(command, cwd=ROOT, input="", capture_output=True, text=True)
    first.communicate("")
    grown, total, share, resident = second.stdout.split()
    assert float(total) == pytest.approx(sum(t.double().sum().item() for t in tensors.values()))
    assert 2 * int(share) == pytest.approx(int(resident), rel=0.01)     # each counts as half
    assert int(resident) > 25_000                                   # kB: all of the file
    assert int(grown) < 60_000                                      # one tensor in fp64, and no copy of all


def test_the_mapping_lives_as_long_as_a_tensor_of_it(tmp_path):
    tensors = small_tensors()
    single(tmp_path, tensors)
    weight = load_model(tmp_path).lm_head.weight.detach()
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(weight, tensors["language_model.lm_head.weight"])
    assert re.search(r"model.safetensors \(deleted\)", Path("/proc/self/maps").read_text())
    del weight
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
