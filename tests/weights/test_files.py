"""Files are written completely or not at all, and only regular ones are read; messages are one short line."""
import multiprocessing
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from full_disk import full_disk

from weights.files import read_bytes, read_json, read_text, replacing
from weights.messages import named, one_line, quoted, reason


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "answers.json"
    path.write_text("old")
    return path


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def only(path: Path) -> bool:
    """Whether a file is alone in its folder: no temporary file is left."""
    return list(path.parent.iterdir()) == [path]


# ---- writing

def test_a_new_file_and_a_changed_one(tmp_path):
    path = tmp_path / "answers.json"
    for words in "first", "second":
        with replacing(path) as partial:
            assert partial.parent == tmp_path and partial.suffix == ".json" and partial.name.startswith(".")
            partial.write_text(words)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == words and only(path)


def limit_file_size(partial: Path):
    """Writes more than a file may have here, as on a full disk."""
    with full_disk(10):
        partial.write_bytes(b"x" * 100)


def write_to_a_full_device(partial: Path):
    partial.write_text("half")
    with open("/dev/full", "w") as device:
        device.write("x")


def interrupt(partial: Path):
    partial.write_text("half")
    raise KeyboardInterrupt


@pytest.mark.parametrize("write, error", [(limit_file_size, OSError), (write_to_a_full_device, OSError),
                                          (interrupt, KeyboardInterrupt), (Path.unlink, FileNotFoundError)],
                         ids=["file too large", "full disk", "Ctrl-C", "writer removes it"])
def test_a_failing_writer_leaves_the_old_file(target, write, error):
    with pytest.raises(error), replacing(target) as partial:
        write(partial)
    assert target.read_text() == "old" and only(target)
    target.unlink()
    with pytest.raises(error), replacing(target) as partial:
        write(partial)
    assert list(target.parent.iterdir()) == []


def write_often(path: Path, words: str):
    for _ in range(200):
        with replacing(path) as partial:
            partial.write_text(words)


def test_two_writers_at_once(target):
    with replacing(target) as one, replacing(target) as other:
        one.write_text("one")
        other.write_text("other")
    assert target.read_text() == "one" and only(target)             # the one that ends last
    spawn = multiprocessing.get_context("fork")
    writers = [spawn.Process(target=write_often, args=(target, words * 10_000)) for words in "ab"]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add(target.read_text())
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen <= {"one", "a" * 10_000, "b" * 10_000} and only(target)


def test_a_symbolic_link_stays_one(target):
    link = target.with_name("link.json")
    link.symlink_to(target.name)
    with replacing(link) as partial:
        partial.write_text("new")
    assert os.readlink(link) == target.name and target.read_text() == "new"
    link.unlink()
    link.symlink_to("not-yet.json")
    with replacing(link) as partial:
        partial.write_text("new")
    assert link.is_symlink() and (target.parent / "not-yet.json").read_text() == "new"


def test_permissions_are_those_of_any_new_file_or_of_the_old_one(tmp_path, umask):
    path = tmp_path / "private.json"
    for wanted in 0o640, 0o600:
        with replacing(path):
            pass
        assert stat.S_IMODE(path.stat().st_mode) == wanted
        path.chmod(0o600)


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    for path, words in ((tmp_path, "Is a directory"), (pipe, "Not a regular file"),
                        ("/dev/null", "Not a regular file"), (loop, "Too many levels"),
                        (tmp_path / "nowhere" / "x.json", "No such file"),
                        (pipe / "x.json", "Not a directory"), (tmp_path / ("x" * 300), "name too long")):
        with pytest.raises(OSError, match=words), replacing(path):
            raise AssertionError("nothing may be written")
    assert sorted(tmp_path.iterdir()) == [loop, pipe]


def test_long_names_and_names_in_every_alphabet(tmp_path):
    for name in "x" * 250 + ".png", "é" * 120 + ".png", "星" * 80 + ".safetensors", "x." + "y" * 250:
        with replacing(tmp_path / name) as partial:
            partial.write_bytes(b"x")
        assert (tmp_path / name).read_bytes() == b"x"


# ---- reading

def test_reading(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')              # some editors begin UTF-8 with a mark
    assert read_json(path) == {"a": "é"} and read_json(str(path)) == {"a": "é"}
    path.write_bytes(b"caf\xc3\xa9")
    assert read_text(path) == "café" and read_bytes(path) == b"caf\xc3\xa9"
    assert read_bytes(path, most=5) == b"caf\xc3\xa9"
    for read, most, words in (read_bytes, 4, "over 0 MB"), (read_json, 10, "not readable as JSON"):
        with pytest.raises(ValueError, match=words):
            read(path, most)
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_text(path)


# ---- messages

def test_messages_are_one_printable_line_of_bounded_length():
    nested = []
    for _ in range(100_000):
        nested = [nested]
    for value in "a\nb\x1b[31m", "x" * 10 ** 6, nested, 10 ** 5000, "\ud800", b"\xff", None, ValueError():
        for words in one_line(value) if value is not nested and value != 10 ** 5000 else "x", quoted(value):
            assert words.isprintable() and 0 < len(words) <= 300
    assert one_line(ValueError()) == "ValueError" and one_line(" a\n b ") == "a b"
    assert quoted("x" * 200, 10) == "'xxxxxxxx…" and quoted("a\nb") == r"'a\nb'"
    assert named(Path("a  b/c\nd")) == r"a  b/c\nd" and named("/x" * 500).endswith("/x/x")
    assert len(named("/x" * 500)) == 200 and named("/x" * 500).startswith("…")
    assert reason(OSError(28, "No space left on device", "/somewhere")) == "No space left on device"
    assert reason(OSError("odd")) == "odd"
