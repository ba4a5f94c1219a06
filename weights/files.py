"""How small files are read (regular files of bounded size) and all files written (whole or not at all)."""
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weights.messages import named, one_line, reason

MOST_BYTES = 50_000_000         # of a file that is read into memory at once; tokenizer.json has up to 17 MB
MOST_JSON = 10_000_000          # of other JSON files; parsed, they can take 50 times as much


def read_bytes(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises ValueError with one line.

    A pipe or a device is refused before it is opened: reading one could wait forever or never end.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
            raise ValueError(f"{named(path)}: {kind}, not a file")
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise ValueError(f"{named(path)}: cannot be read ({reason(error)})") from None
    if len(content) > most:
        raise ValueError(f"{named(path)}: over {most / 1e6:.0f} MB, too large for what it should hold")
    return content


def read_text(path: str | Path, most: int = MOST_BYTES) -> str:
    """The UTF-8 text of a file, like `read_bytes`."""
    try:
        return read_bytes(path, most).decode()
    except UnicodeDecodeError:
        raise ValueError(f"{named(path)}: not readable as text: it is not UTF-8") from None


def read_json(path: str | Path, most: int = MOST_JSON) -> object:
    """The value in a JSON file. Raises ValueError with one line."""
    content = read_bytes(path, most)
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{named(path)}: not readable as JSON ({one_line(error, 120)})") from None


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a new temporary file beside `path`; when the block ends without an error, it replaces `path`.

    Whatever goes wrong (a full disk, an error, Ctrl-C), the old file stays as it was. The temporary name has
    the same suffix as `path`, and no two writers share one. Raises OSError as `open` does.
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
