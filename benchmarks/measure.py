"""Timing in turns, the ceilings of this machine, and peak memory. Nothing here is about any model.

Jobs that are compared run in turns, one after the other and again, so that other work on the machine slows
all of them alike. The device's queue is empty before and after each. Ceilings are the best of a few runs:
no program moves bytes faster than a large copy (bytes read and bytes written both count), or multiplies
faster than one large product: in bf16, or in fp32 where that is faster, on CPUs without bf16 instructions.
Peak memory is the most that a job adds to the memory in use before it.
"""
import ctypes
import gc
import os
import platform
import sys
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cli.terminal import Progress
from model.clock import drain
from weights.wide import is_slow

COPY_BYTES = {"cpu": 2 ** 28, "cuda": 2 ** 31}         # of each of the two buffers: far larger than any cache
PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}             # of the square matrices
PROBE = 8                                              # those of a first run are so many times smaller
CEILING_RUNS = 7
CEILING_MS = 2000                                      # for all runs of one ceiling

Result = TypeVar("Result")
Job = Callable[[], Result]


def with_time(job: Job, device: torch.device) -> tuple[float, Result]:
    """Milliseconds that a job takes, and what it returns."""
    drain(device)
    began = time.perf_counter()
    result = job()
    drain(device)
    return (time.perf_counter() - began) * 1000, result


def timed(job: Job, device: torch.device) -> float:
    """Milliseconds that a job takes."""
    return with_time(job, device)[0]


def in_turns(jobs: Mapping[Hashable, Job], repeat: int, warm_up: int = 1,
             what: str = "rounds") -> dict[Hashable, list[Result]]:
    """What each job returns in each of `repeat` rounds. The `warm_up` rounds before them are not recorded.

    `what` tells people what takes so long.
    """
    results: dict[Hashable, list[Result]] = {name: [] for name in jobs}
    done = 0
    with Progress(what, in_file=True) as report:
        for turn in range(-warm_up, repeat):
            for name, job in jobs.items():
                report(done, (warm_up + repeat) * len(jobs))
                result = job()
                done += 1
                if turn >= 0:
                    results[name].append(result)
    return results


def times_in_turns(jobs: Mapping[Hashable, Job], repeat: int, device: torch.device,
                   what: str = "rounds") -> dict[Hashable, list[float]]:
    """Milliseconds of each job in each of `repeat` rounds, after one round that is not recorded."""
    timed_jobs = {name: partial(timed, job, device) for name, job in jobs.items()}
    return in_turns(timed_jobs, repeat, what=what)


def ceilings(device: torch.device) -> dict[str, float | str]:
    """`copy_bytes_per_s`, read and written, and `matmul_flops` per second of a product in `matmul_dtype`."""
    kind = "cuda" if device.type == "cuda" else "cpu"

    def copy(count: int) -> Job:
        source = torch.ones(count // 4, dtype=torch.float32, device=device)
        return partial(torch.zeros_like(source).copy_, source)

    def product(dtype: torch.dtype, side: int) -> Job:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        return partial(torch.mm, a, b)

    dtype = torch.float32 if is_slow(torch.bfloat16, device) else torch.bfloat16
    with Progress("ceilings of this machine", in_file=True):
        count, copy_ms = fastest(copy, COPY_BYTES[kind], 1, device)
        side, product_ms = fastest(partial(product, dtype), PRODUCT_SIDE[kind], 3, device)
    return {"copy_bytes_per_s": 2 * count / copy_ms * 1000,
            "matmul_flops": 2 * side ** 3 / product_ms * 1000,
            "matmul_dtype": "bf16" if dtype == torch.bfloat16 else "fp32"}


def fastest(make: Callable[[int], Job], largest: int, power: int, device: torch.device) -> tuple[int, float]:
    """The size of a job, and the least milliseconds of a few runs of it.

    The size is `largest` where that takes CEILING_MS at most, else a smaller one. The work of a job is its
    size to the `power`: each size is reckoned from the one before it, which is half as large.
    """
    size = max(1, largest // PROBE)
    while True:
        job = make(size)
        ms = [timed(job, device), timed(job, device)]           # the first one has to get its memory
        if size >= largest or ms[1] * 2 ** power * (CEILING_RUNS + 1) > CEILING_MS:
            break
        size = min(2 * size, largest)
    while len(ms) <= CEILING_RUNS and sum(ms) < CEILING_MS:
        ms.append(timed(job, device))
    return size, min(ms)


def peak_added(job: Job, device: torch.device) -> int | None:
    """The most bytes that a job adds to those in use before it; None if the system does not tell.

    On a GPU they are what PyTorch allocates, on Linux all resident memory of the process.
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
    if hasattr(libc, "malloc_trim"):            # glibc keeps freed memory, and its second use would not show
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")         # resets the peak
    before = _bytes_in_use("VmRSS")
    job()
    return max(0, _bytes_in_use("VmHWM") - before)


def knows_peak() -> bool:
    """Whether a process can reset its own peak of memory on this system."""
    return sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)


def _bytes_in_use(line: str) -> int:
    """What /proc says of this process, which counts in kB."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return next(int(text.split()[1]) * 1024 for text in status.splitlines() if text.startswith(line + ":"))


class Allocated(TorchDispatchMode):
    """A context that counts the bytes of tensors that are alive of those made inside: `peak`, the most there
    were. What a kernel uses inside, and what the allocator holds back, is not among them."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def free(self, size: int):
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {id(tensor.untyped_storage()) for tensor in tensors((args, kwargs or {}))}
        result = function(*args, **(kwargs or {}))
        for tensor in tensors(result):
            storage = tensor.untyped_storage()
            if storage not in self.known and id(storage) not in given:
                self.known.add(storage)
                weakref.finalize(storage, self.free, storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return result


def tensors(value: object) -> Iterator[Tensor]:
    """All tensors in lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def machine(device: torch.device) -> dict[str, object]:
    """The hardware, without the host's name: the GPU, or the CPU, its instructions and the threads."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return {"gpu": torch.cuda.get_device_name(device), "gpu_memory_bytes": memory, "cpu": _cpu_name()}
    without = is_slow(torch.bfloat16, device)
    return {"cpu": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability() + ", none for bf16" * without}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
