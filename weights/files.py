"""How files are written here: whole, or not at all."""
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a new temporary file beside `path`; when the block has ended well, it takes the place of `path`.

    Whatever goes wrong (a full disk, an error, Ctrl-C), the file that was there stays as it was. The temporary
    name ends like the name itself, and no two writers share one. Raises OSError as `open` does.
    """
    path = Path(os.path.realpath(path))         # a symbolic link stays one
    handle, name = tempfile.mkstemp(prefix=f".{path.stem[:40]}.", suffix=path.suffix[:20], dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        os.chmod(partial, 0o666 & ~current_umask())
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def current_umask() -> int:
    """The permissions that new files do not get; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
