"""A short run of `tests/mutate.py`: damaged files are read or refused in one line; all else is a failure."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mutate
import pytest
from file_kinds import Kind

SCRIPT = Path(mutate.__file__)


def test_damaged_files_are_read_or_refused_in_one_line():
    command = [sys.executable, SCRIPT, "--files", "300"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = [line.split()[:5] for line in ended.stdout.splitlines()[1:]]
    assert [kind for kind, *_ in rows] == list(mutate.KINDS)
    files, read, refused, failed = (sum(map(int, column)) for column in list(zip(*rows, strict=True))[1:])
    assert 295 < files < 305 and files == read + refused and failed == 0
    assert read > 40 and refused > 100              # the damage is neither too small nor too great


def test_a_seed_repeats_every_case():
    for kind in mutate.KINDS:
        assert mutate.make_case(kind, 5, 0) == mutate.make_case(kind, 5, 0) != mutate.make_case(kind, 5, 1)


class Panic(BaseException):
    pass


def refuse(words: str):
    raise ValueError(words)


def panic():
    raise Panic("a panic")


def fill_memory():
    assert len(bytearray(os.urandom(1000)) * 60_000) == 60_000_000


def wait_for_ever():
    while True:
        time.sleep(0.01)


BEHAVIOURS = [      # of a reader, and how its outcome must be called
    (lambda: None, "read", ""),
    (lambda: refuse("x.json: it is empty; download it again"), "refused", "x.json: it is empty"),
    (lambda: refuse("two\nlines"), "failed", "ValueError"),
    (lambda: refuse("x" * 1001), "failed", "1001 characters"),
    (lambda: refuse(""), "failed", "ValueError"),
    (lambda: "\ud800".encode(), "failed", "UnicodeEncodeError"),
    (lambda: {}["key"], "failed", "KeyError at tests/programs/test_mutate.py"),
    (panic, "failed", "Panic"),
    (lambda: print("x"), "failed", "stdout"),
    (lambda: os.write(1, b"x"), "failed", "stdout"),
    (fill_memory, "failed", "MB of memory"),
    (lambda: sys.exit(0), "failed", "SystemExit"),
    (lambda: os._exit(3), "failed", "exit code 3"),
    (lambda: os.kill(os.getpid(), signal.SIGKILL), "failed", "SIGKILL"),
    (lambda: sum(range(10 ** 12)), "failed", "of work"),
    (wait_for_ever, "failed", "over 2 s"),
    (lambda: None, "read", "")]


def test_every_other_end_is_a_failure(monkeypatch, tmp_path):
    def read(folder: Path):
        number = int((folder / "number").read_text())
        BEHAVIOURS[number][0]()

    monkeypatch.setitem(mutate.KINDS, "test", Kind(1, list, read, memory=50_000_000))
    monkeypatch.setattr(mutate, "make_case", lambda kind, number, seed: {"number": str(number).encode()})
    monkeypatch.setattr(mutate, "MOST_SECONDS", 0.2)
    monkeypatch.setattr(mutate, "MOST_WAITING", 2)
    cases = [("test", number) for number in range(len(BEHAVIOURS))]
    results = dict(mutate.outcomes(cases, 0, 2, tmp_path))
    assert results.keys() == {*cases}
    for (_, number), outcome in results.items():
        _, end, words = BEHAVIOURS[number]
        if words == "MB of memory" and not Path("/proc/self/clear_refs").exists():
            continue                        # only Linux measures it
        assert outcome.end == end and words in outcome.words, (number, outcome)


def test_only_needs_a_kind(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["mutate.py", "--only", "3"])
    with pytest.raises(SystemExit) as stop:
        mutate.main()
    assert stop.value.code == 2 and "--only needs a --kind" in capsys.readouterr().err
