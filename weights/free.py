"""How much memory is free: of a GPU, or of this machine within the limits that this process has there.

A container is usually a Linux control group (cgroup) with a limit of its own, which the machine's figure does
not know. Pages of files that were read count as used in a group, but the system drops them when it needs
room, so they count as free here, as in Linux's own figure for the machine.
"""
import os
import sys
from pathlib import Path

import torch

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Of cgroup 2 and 1: where groups are, files with the limit and the use, and the count of pages of files.
VERSIONS = (("", "", "memory.max", "memory.current", "inactive_file"),
            ("memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated there now; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    if sys.platform == "linux":
        return free_on_linux(PROC, GROUPS)
    if sys.platform == "darwin":                    # all there is: macOS compresses and swaps what is in use
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def free_on_linux(proc: Path, groups: Path) -> int | None:
    """The least of what the machine has free and what each group around this process may still use."""
    rooms = [*room_of_machine(proc / "meminfo")]
    lines = text_of(proc / "self" / "cgroup").splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller, folder, limit, used, cached in VERSIONS:
            if controller not in controllers.split(","):
                continue
            group = groups / folder / path.strip("/")
            while group.is_relative_to(groups):
                rooms += room_of_group(group, limit, used, cached)
                group = group.parent
    return min(rooms, default=None)


def room_of_machine(meminfo: Path) -> list[int]:
    counts = [line.split() for line in text_of(meminfo).splitlines()]
    return [int(words[1]) * 1024 for words in counts if words[0] == "MemAvailable:"]


def room_of_group(group: Path, limit: str, used: str, cached: str) -> list[int]:
    """What a group may still use; nothing where it is unknown, or where there is no limit."""
    most, now = text_of(group / limit).strip(), text_of(group / used).strip()
    if not most.isdecimal() or not now.isdecimal():             # "max", or no such files
        return []
    stat = dict(line.split() for line in text_of(group / "memory.stat").splitlines())
    return [max(0, int(most) - int(now) + int(stat.get(cached, 0)))]


def text_of(path: Path) -> str:
    """A small file of the system; "" where there is none."""
    return path.read_text(encoding="ascii", errors="replace") if path.is_file() else ""
