"""The processes of a run that torchrun starts: who is who, and what they tell each other.

Every rank runs the same program with the same arguments, and so calls the functions below in the same order.
Rank 0 reads what a person types, tells it to the others by `first`, and speaks.
"""
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from weights.device import parse_device
from weights.messages import quoted

TIMEOUT = timedelta(minutes=30)         # for a rank that the others wait for
NEVER = timedelta(days=365)             # a person may take long to ask
SOON = timedelta(seconds=10)            # for the store of the run, when a process fails
TORCHRUN = "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"      # what it sets for each

T = TypeVar("T")


class Ranks:
    """This process, `rank` of `count`, and those beside it; `Ranks()` is a process alone."""

    def __init__(self, rank: int = 0, count: int = 1, device: torch.device | None = None,
                 store: dist.Store | None = None):
        self.rank = rank
        self.count = count
        self.device = device
        self.store = store
        self.told = 0                                       # how often `first` was called

    # ----- tensors

    def part(self, tensor: Tensor, dim: int) -> Tensor:
        """What this rank holds of a tensor."""
        return tensor.tensor_split(self.count, dim)[self.rank]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, written into `tensor`."""
        dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        """The tensors of all ranks, which have one shape, one after the other."""
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.count)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts, dim)

    def from_first(self, tensors: list[Tensor | None]) -> list[Tensor | None]:
        """The tensors of rank 0, whatever shapes the others have."""
        if self.count == 1:
            return tensors
        kinds = self.first(lambda: [None if each is None else (each.shape, each.dtype) for each in tensors])
        shared = []
        for kind, own in zip(kinds, tensors, strict=True):
            if kind is None:
                shared.append(None)
                continue
            shape, dtype = kind
            own = own if self.rank == 0 else torch.empty(shape, dtype=dtype, device=self.device)
            tensor = own.contiguous()
            dist.broadcast(tensor, 0)
            shared.append(tensor)
        return shared

    def alike(self, sample: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The sampler of rank 0: sums on a GPU are not the same each time, and so may be what is drawn."""
        def of_first(logits: Tensor) -> Tensor:
            tokens = sample(logits)
            dist.broadcast(tokens, 0)
            return tokens
        return sample if self.count == 1 else of_first

    # ----- anything else

    def each(self, value: T) -> list[T]:
        """The values of all ranks."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def first(self, read: Callable[[], T]) -> T:
        """What `read()` gives on rank 0, or its ValueError, on every rank. It may wait for a person."""
        if self.count == 1:
            return read()
        self.told += 1
        message = [None]
        if self.rank == 0:
            try:
                message = [read()]
            except ValueError as error:
                message = [error]
            self.store.set(f"told {self.told}", "")         # a collective would wait until its timeout only
        else:
            self.store.wait([f"told {self.told}"], NEVER)
        dist.broadcast_object_list(message, device=self.device)
        if isinstance(message[0], ValueError):
            raise message[0]
        return message[0]

    def check(self, check: Callable[[], None]):
        """Run a check on every rank; if it raises ValueError on some, all raise that of the first one."""
        error = None
        try:
            check()
        except ValueError as found:
            error = found
        for found in self.each(error):
            if found is not None:
                raise found

    def check_alike(self, what: str, value: object):
        """Raise ValueError on every rank if they do not all have this value."""
        others = [rank for rank, its in enumerate(self.each(value)) if its != value]
        if any(self.each(bool(others))):
            raise ValueError(f"the processes of this run have found different {what}: give all of them the "
                             "same files")


def join(device: str | torch.device | None = None, timeout: timedelta = TIMEOUT) -> Ranks:
    """This process among those that torchrun started, each with a GPU of its own, or on the CPU.

    Without torchrun it is alone, and its device is left open. Raises ValueError with one line.
    """
    count = int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in TORCHRUN) else 1
    if count == 1:
        return Ranks()
    rank, local = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK"))
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if str(device) not in ("cpu", "cuda"):
        raise ValueError(f"device {quoted(str(device))}: several processes are on a GPU each, or all on the "
                         "CPU: say cuda or cpu")
    device = parse_device(f"cuda:{local}" if str(device) == "cuda" else device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = open_store(rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True", timeout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("work", store), rank=rank, world_size=count,
                            timeout=timeout)
    return Ranks(rank, count, device, dist.PrefixStore("words", store))


def open_store(is_master: bool, timeout: timedelta) -> dist.TCPStore:
    """What all processes of the run can write to and read; torchrun's, or that of rank 0."""
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=is_master,
                         timeout=timeout)


def leave():
    """At the end of a run that went well, on every rank: its last words may be under way to another one."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def is_first(what: str) -> bool:
    """Whether this is the first process of the run that asks for `what`; also before `join`, and after others
    have ended. Where nobody can be asked it is."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = open_store(False, SOON)
        return store.add(f"{what} {attempt}", 1) == 1
    except (RuntimeError, ValueError, KeyError):
        return True
