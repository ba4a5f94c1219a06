"""The most memory that this process has held: its own, and pages of files that it has mapped.

They are two figures, because they mean two things. What the process holds itself (activations, caches,
converted weights) must fit. Pages of mapped weights are the file's: all processes share them, the system
drops them when it needs room, and reads them again. Linux tells both at any time, but keeps the highest of
their sum only, so they are looked at every few milliseconds while there is work.
"""
import sys
from pathlib import Path
from threading import Event, Thread

import torch

INTERVAL = 0.02             # seconds between two looks
STATUS = Path("/proc/self/status")


class PeakMemory:
    """`with peak:` around all work that counts, as often as there is some; `own` and `mapped` are bytes.

    Other systems than Linux tell only the peak of all: it is `own` there, and `mapped` is None. 0: unknown.
    """

    def __init__(self):
        self.own = 0
        self.mapped: int | None = None

    def __enter__(self) -> "PeakMemory":
        self.look()
        self.ended = Event()
        self.watcher = Thread(target=self._watch, daemon=True)
        if self.mapped is not None:
            self.watcher.start()
        return self

    def __exit__(self, *error):
        self.ended.set()
        if self.watcher.is_alive():
            self.watcher.join()
        self.look()

    def look(self):
        """Take the present into account."""
        known = now()
        if known is None:
            self.own = highest_of_all()
        else:
            self.own = max(self.own, known[0])
            self.mapped = max(self.mapped or 0, known[1])

    def figures(self, device: torch.device) -> tuple[int, int | None]:
        """`own` and `mapped`; of a GPU, where the model is on one: what torch has allocated there."""
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device), None
        return self.own, self.mapped

    def _watch(self):
        while not self.ended.wait(INTERVAL):
            self.look()


def now() -> tuple[int, int] | None:
    """What the process holds itself, and pages of files, in bytes; None where the system does not tell."""
    if sys.platform != "linux" or not STATUS.exists():
        return None
    lines = (line.split() for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines())
    kilobytes = {words[0]: int(words[1]) for words in lines if words and words[0].startswith("Rss")}
    if "RssAnon:" not in kilobytes:
        return None
    return (kilobytes["RssAnon:"] + kilobytes["RssShmem:"]) * 1024, kilobytes["RssFile:"] * 1024


def highest_of_all() -> int:
    """The peak of own memory and mapped pages together; 0 where it is unknown."""
    if sys.platform == "win32":
        return 0
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
