"""A file that grows line by line and outlives a stopped run; only one process at a time writes it."""
import errno
import os
from collections.abc import Callable
from pathlib import Path

from weights.messages import named, reason

try:
    import fcntl
except ImportError:                 # on Windows, which has no such locks
    fcntl = None

NO_LOCKS = errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP            # what a file system without locks answers


def another_process(path: Path) -> str:
    """The writer, where nobody knows which."""
    return "another process"


class LockedFile:
    """A file that is open for appending, for this process alone. Raises ValueError with one line where that
    cannot be: where `writer(path)` has it, say."""

    def __init__(self, path: Path, writer: Callable[[Path], str] = another_process):
        self.path = path
        while True:
            if path.exists() and not path.is_file():
                raise ValueError(f"{named(path)}: this is not a file; choose another name")
            self.file = open(path, "a+b", buffering=0)          # noqa: SIM115  `close` closes it
            try:
                if fcntl is not None:
                    fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.file.close()
                raise ValueError(f"{named(path)}: {writer(path)} is writing it; wait until that has ended, "
                                 "or name another file") from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            if self._is_at_its_path():
                return
            self.file.close()                   # another process has just finished, and removed it

    def _is_at_its_path(self) -> bool:
        """Whether the open file is still the one that has this path."""
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def is_empty(self) -> bool:
        return os.fstat(self.file.fileno()).st_size == 0

    def truncate(self, size: int):
        self.file.truncate(size)

    def write(self, data: bytes):
        """At the end. Raises ValueError with one line."""
        try:
            while data:
                data = data[self.file.write(data):]
        except OSError as error:
            raise ValueError(f"{named(self.path)}: cannot be written: {reason(error)}; the same command "
                             "goes on from here") from None

    def close(self, remove: bool = False):
        """Give back the lock; remove the file first, or another process could have locked it by then."""
        if fcntl is None:                       # Windows removes no open file
            self.file.close()
        if remove:
            self.path.unlink(missing_ok=True)
        self.file.close()
