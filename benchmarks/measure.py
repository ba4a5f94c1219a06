"""Timing in turns, the ceilings of this machine, and peak memory; nothing here is about any model.

Things that are compared run in turns, one after the other and again, so that whatever else the machine does
meets them all alike. A GPU's queue is drained before and after each. Ceilings are the best of a few runs: no
program moves bytes faster than a large copy (read and written bytes both count) or multiplies faster than
one large bf16 product. Peak memory is what a job adds, at its highest, to what was held before it.
"""
import ctypes
import gc
import os
import platform
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from pathlib import Path

import torch

from model.clock import drain

COPY_BYTES = {"cpu": 2 ** 28, "cuda": 2 ** 31}         # of each of the two buffers: far beyond any cache
PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}             # of the square matrices
CEILING_RUNS = 7

Job = Callable[[], object]


def timed(job: Job, device: torch.device) -> float:
    """Milliseconds that a job takes."""
    drain(device)
    began = time.perf_counter()
    job()
    drain(device)
    return (time.perf_counter() - began) * 1000


def in_turns(jobs: Mapping[Hashable, Job], repeat: int, device: torch.device,
             warm_up: int = 1) -> dict[Hashable, list[float]]:
    """Milliseconds of each job in each of `repeat` rounds; those of `warm_up` rounds before are left out."""
    samples: dict[Hashable, list[float]] = {name: [] for name in jobs}
    for turn in range(-warm_up, repeat):
        for name, job in jobs.items():
            ms = timed(job, device)
            if turn >= 0:
                samples[name].append(ms)
    return samples


def ceilings(device: torch.device) -> dict[str, float]:
    """`copy_bytes_per_s`, read and written, and `matmul_flops` per second of a bf16 product."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    source = torch.ones(COPY_BYTES[kind] // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    copy = min(in_turns({"": partial(target.copy_, source)}, CEILING_RUNS, device)[""])
    side = PRODUCT_SIDE[kind]
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    product = min(in_turns({"": partial(torch.mm, a, b)}, CEILING_RUNS, device)[""])
    return {"copy_bytes_per_s": 2 * source.nbytes / copy * 1000,
            "matmul_flops": 2 * side ** 3 / product * 1000}


def peak_added(job: Job, device: torch.device) -> int | None:
    """Bytes that a job adds, at its highest, to what was held before; None where that cannot be known.

    On a GPU what PyTorch allocates; on Linux what the process holds in memory, all of it.
    """
    gc.collect()
    if device.type == "cuda":
        drain(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        job()
        drain(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not knows_peak():
        return None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):            # glibc keeps what was freed, and would hide its second use
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")         # the peak starts anew from here
    before = _held("VmRSS")
    job()
    return max(0, _held("VmHWM") - before)


def knows_peak() -> bool:
    """Whether the system lets a process reset its own peak of memory."""
    return sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)


def _held(line: str) -> int:
    """Bytes that /proc says of this process, which counts in kB."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return next(int(text.split()[1]) * 1024 for text in status.splitlines() if text.startswith(line + ":"))


def machine(device: torch.device) -> dict[str, object]:
    """What was measured on, without a name of its own: the card, or the CPU and the threads it was given."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return {"gpu": torch.cuda.get_device_name(device), "gpu_memory_bytes": memory, "cpu": _cpu_name()}
    return {"cpu": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
