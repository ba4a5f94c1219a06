"""Peak memory: what the process holds itself and what it has mapped are two figures, and both are its own."""
import mmap
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from weights.peak import INTERVAL, PeakMemory, now

ROOT = Path(__file__).parents[2]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells both figures")
MB = 10 ** 6


@LINUX
def test_what_was_held_only_for_a_while_counts():
    before, _ = now()
    peak = PeakMemory()
    with peak:
        held = torch.ones(50 * MB)                      # 200 MB
        time.sleep(5 * INTERVAL)
        del held
    assert 190 * MB < peak.own - before < 260 * MB
    with peak:                                          # a second piece of work: the highest of both
        held = torch.ones(75 * MB)
        time.sleep(5 * INTERVAL)
    del held
    assert 290 * MB < peak.own - before < 360 * MB


@LINUX
def test_mapped_pages_are_not_the_process_own(tmp_path):
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(200 * MB)
    before, mapped_before = now()
    peak = PeakMemory()
    with peak, (tmp_path / "hole").open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        assert not torch.frombuffer(pages, dtype=torch.int32).any()
    assert peak.mapped - mapped_before > 190 * MB
    assert peak.own - before < 60 * MB


@LINUX
def test_the_peak_of_a_parent_is_not_inherited():
    held = torch.ones(100 * MB)                         # 400 MB: the child's ru_maxrss begins there
    code = ("from weights.peak import PeakMemory\n"
            "with PeakMemory() as peak: pass\n"
            "print(peak.own, peak.mapped)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    own, mapped = map(int, done.stdout.split())
    assert 20 * MB < own < held.nbytes and mapped > 20 * MB


def test_a_system_that_tells_one_figure_gets_one(monkeypatch):
    monkeypatch.setattr("weights.peak.now", lambda: None)
    with PeakMemory() as peak:
        pass
    own, mapped = peak.figures(torch.device("cpu"))
    assert own > 20 * MB and mapped is None


def test_of_a_gpu_it_is_what_torch_has_allocated_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 * MB)
    assert PeakMemory().figures(torch.device("cuda")) == (7 * MB, None)
