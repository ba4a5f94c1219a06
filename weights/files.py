"""How small files are read (regular, of bounded size) and all files written (completely or not at all)."""
import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from weights.messages import named, one_line, reason

MOST_BYTES = 50_000_000         # of a file that is read into memory at once; tokenizer.json has up to 17 MB
# A place in huggingface_hub's cache: owner, name, commit, and the file if it is not the whole folder.
CACHED = re.compile(r"[/\\]models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\](\w+)(?:[/\\]([\w./-]+))?$",
                    re.ASCII)
MOST_JSON = 10_000_000          # of other JSON files; parsed, they can take 50 times as much


def again(path: str | Path) -> str:
    """What to do where a file, or a folder of them, is damaged or incomplete.

    That depends on where it came from: huggingface_hub's cache takes what is there for good until it is told
    otherwise, and only a folder of one's own can be copied or saved again.
    """
    match = CACHED.search(str(path))
    if match is None:
        return "copy it again, or save it again"
    owner, name, commit, file = match.groups()
    with suppress(OSError, ValueError):         # the commit that is meant where no revision is named
        if (Path(match.string[:match.start(3)]).parent / "refs" / "main").read_text() == commit:
            commit = None
    revision = "" if commit is None else f" --revision {commit}"
    file = f" {file}" if file else ""
    return f"`hf download {owner}/{name}{file}{revision} --force-download` fetches it again"


def unreadable(path: object, error: OSError) -> ValueError:
    """The error to raise where the system does not let a file or folder be read."""
    return ValueError(f"{named(path)}: cannot be read ({reason(error)}); make it readable or name another")


def exists(path: Path) -> bool:
    """Whether anything has this name, also a link that leads nowhere. Raises ValueError where it is unknown.

    `Path.exists` is False for a link to itself and for a name in a folder without permission. These are not
    absent: whoever is told so looks for the fault in the wrong place.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise unreadable(path, error) from None
    except ValueError as error:                         # a NUL byte or half a surrogate pair in the name
        raise ValueError(f"{named(path)}: not the name of a file ({one_line(error)})") from None
    return True


def regular_file(path: str | os.PathLike) -> BinaryIO:
    """A regular file, open for reading. Raises OSError as `open` does, and ENXIO for any other kind of file.

    Opening a pipe would wait for a writer, and a device may never end. What was opened is what is checked:
    the same path can lead elsewhere a moment later.
    """
    file = open(path, "rb", opener=_open_without_waiting)           # noqa: SIM115  the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.ENXIO, "this is a pipe, a socket or a device, not a file")
    return file


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))      # Windows has no pipes among its files


def open_regular(path: Path) -> BinaryIO:
    """A regular file, open for reading. Raises ValueError with one line."""
    try:
        return regular_file(path)
    except IsADirectoryError:
        raise ValueError(f"{named(path)}: this is a folder, not a file") from None
    except OSError as error:
        raise unreadable(path, error) from None


def read_bytes(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises ValueError with one line."""
    path = Path(path)
    with open_regular(path) as file:
        try:
            content = file.read(most + 1)
        except OSError as error:
            raise unreadable(path, error) from None
    if len(content) > most:
        raise ValueError(f"{named(path)}: over {most / 1e6:.0f} MB, which no such file of a checkpoint has")
    return content


def read_text(path: str | Path, most: int = MOST_BYTES) -> str:
    """The text of a UTF-8 file of at most `most` bytes. Raises ValueError with one line."""
    try:
        return read_bytes(path, most).decode()
    except UnicodeDecodeError:
        raise ValueError(f"{named(path)}: not readable as text: it is not UTF-8") from None


def read_json(path: str | Path, most: int = MOST_JSON) -> object:
    """The value in a JSON file of at most `most` bytes. Raises ValueError with one line."""
    content = read_bytes(path, most)
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{named(path)}: not readable as JSON ({one_line(error, 120)}); "
                         f"correct it, or {again(path)}") from None


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a new temporary file beside `path`; when the block ends without an error, it replaces `path`.

    Whatever goes wrong (a full disk, an error, Ctrl-C), the old file stays as it was. The temporary name has
    the same suffix as `path`, and no two writers share one. The permissions are those of the old file, or of
    any new file. Raises OSError as `open` does; also where `path` is a folder, a pipe or a device.
    """
    path = Path(os.path.realpath(path))                 # a symbolic link stays one
    mode = _mode_of_regular(path)
    partial = path.with_name(f".{path.stem[:20]}.{secrets.token_hex(8)}{path.suffix[:20]}")
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))     # the umask applies
    try:
        if mode is not None:
            os.chmod(partial, mode)
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _mode_of_regular(path: Path) -> int | None:
    """The permissions of a regular file; None where there is no file yet."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return stat.S_IMODE(mode)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Gives a new temporary folder beside `path`; when the block ends without an error, it becomes `path`,
    which must not be there. Whatever goes wrong, nothing is left. Raises OSError as `mkdir` does."""
    path = Path(path)
    partial = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}")
    try:
        partial.mkdir(parents=True)
        yield partial
        os.rename(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_room(folder: Path, needed: int):
    """Raise ValueError where a disk has too little room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{named(folder.parent)}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are "
                         "free on this disk; name a folder on a larger one")
