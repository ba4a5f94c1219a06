"""Runs a function in several processes at once, with the environment that torchrun gives to each.

A server process imports torch and the programs once, and is forked for every process, so that starting one
takes no time. Functions and arguments come to the processes as `multiprocessing` sends them.
"""
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.distributed import TCPStore

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "torch._dynamo", "evaluate", "benchmark", "pruning.over_ranks"])


@dataclass
class Ended:
    """How a process ended: None for one that had to be stopped; what it wrote."""
    code: int | None
    out: str
    err: str


def run_ranks(function: Callable, *args: object, count: int = 2, limit: float = 60,
              stdin: str = "") -> list[Ended]:
    """What became of `function(*args)` in every process, by rank."""
    with TemporaryDirectory() as folder:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)    # torchrun's, there
        Path(folder, "stdin").write_text(stdin)
        for rank in range(count):
            Path(folder, f"out {rank}").touch()
            Path(folder, f"err {rank}").touch()
        processes = [CONTEXT.Process(target=one_rank, args=(rank, count, store.port, folder, function, args))
                     for rank in range(count)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(limit)
        stuck = [process.is_alive() for process in processes]
        for process in processes:
            process.kill()
            process.join()
        return [Ended(None if stuck[rank] else process.exitcode, Path(folder, f"out {rank}").read_text(),
                      Path(folder, f"err {rank}").read_text()) for rank, process in enumerate(processes)]


def one_rank(rank: int, count: int, port: int, folder: str, function: Callable, args: tuple):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    os.dup2(os.open(Path(folder, "stdin"), os.O_RDONLY), 0)
    for descriptor, name in (1, "out"), (2, "err"):
        os.dup2(os.open(Path(folder, f"{name} {rank}"), os.O_WRONLY), descriptor)
    import torch

    torch.set_num_threads(1)
    with torch.no_grad():
        function(*args)


def all_well(ended: list[Ended]):
    for rank, process in enumerate(ended):
        assert process.code == 0, (rank, process)
