"""The line of progress: on a terminal alone, after a while, one line that is gone at the end."""
import io
import os
import pty
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from program_inputs import ROOT

from cli import terminal
from cli.terminal import Progress, duration


class Screen(io.StringIO):
    """A terminal that remembers everything that was written to it."""
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def line(self) -> str:
        """What is seen in its last line."""
        seen = ""
        for part in self.getvalue().rpartition("\n")[2].split("\r"):
            seen = part + seen[len(part):]
        return seen.rstrip()

    def soon(self, words: str) -> str:
        """The last line once it holds these words."""
        until = time.monotonic() + 10
        while words not in self.line():
            assert time.monotonic() < until, self.getvalue()
            time.sleep(0.001)
        return self.line()


@pytest.fixture
def screen(monkeypatch) -> Screen:
    """A terminal of 80 columns, and a program without patience."""
    monkeypatch.setattr(terminal, "PATIENCE", 0.01)
    monkeypatch.setattr(terminal, "INTERVAL", 0.001)
    monkeypatch.setenv("TERM", "xterm")
    made = Screen()
    # pytest sets sys.stderr again when a test begins.
    monkeypatch.setattr(terminal, "sys", SimpleNamespace(stderr=made))
    return made


def wait():
    """Long enough for a line to be shown that must not be."""
    time.sleep(0.1)


def test_what_is_done_of_how_much_and_how_long_it_takes(screen):
    with Progress("encoding") as report:
        assert screen.soon("encoding") == "encoding, 0:00"
        report(0, 40)
        assert screen.soon("of 40") == "encoding 0 of 40, 0:00"
        report(39, 40)
        assert screen.soon("39") == "encoding 39 of 40, 0:00 left"
        assert "\n" not in screen.getvalue()
    assert screen.line() == ""


def test_what_is_left_is_reckoned_from_what_this_run_has_done(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    progress = Progress("images")
    progress.began, progress.stream = 100.0, io.StringIO()
    for seconds, done in (100.0, 500), (110.0, 510):
        now[0] = seconds
        progress(done, 1000)
    assert progress._text(110.0) == " 510 of 1000, 8:10 left"
    assert progress._text(130.0) == " 510 of 1000, 7:50 left"
    assert progress._text(1000.0) == " 510 of 1000, 0:00 left"


def test_bytes_are_written_as_bytes(screen):
    with Progress("loading", lambda count: f"{count / 1e9:.1f} GB") as report:
        report(4_200_000_000, 21_300_000_000)
        assert "loading 4.2 GB of 21.3 GB" in screen.soon("loading 4")


def test_short_work_says_nothing(screen, monkeypatch):
    monkeypatch.setattr(terminal, "PATIENCE", 60.0)
    with Progress("encoding") as report:
        for done in range(1000):
            report(done + 1, 1000)
    assert screen.getvalue() == ""


def test_when_all_is_done_the_line_is_gone_and_an_answer_can_be_written(screen):
    with Progress("prefill") as report:
        report(1, 2)
        screen.soon("prefill")
        report(2, 2)
        before = screen.getvalue()
        for word in "An", " answer.":
            screen.write(word)
            wait()
        assert screen.line() == "An answer." and screen.getvalue() == before + "An answer."
        screen.write("\n")
        report(0, 2)                            # the next one
        screen.soon("prefill 0 of 2")
    assert screen.line() == ""


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_the_line_is_gone_after_an_error(screen, error):
    with pytest.raises(error), Progress("encoding") as report:
        report(1, 2)
        screen.soon("encoding")
        raise error
    before = screen.getvalue()
    wait()
    assert screen.line() == "" and screen.getvalue() == before


def test_a_message_in_between(screen):
    with Progress("loading") as report:
        report(1, 2)
        screen.soon("loading")
        report.clear()
        screen.write("a warning\n")
        screen.soon("loading")
    assert "a warning\n" in screen.getvalue().replace("\r", "\n") and screen.line() == ""


@pytest.mark.parametrize("columns", [1, 12, 20, 40])
def test_a_narrow_terminal_has_the_numbers(screen, monkeypatch, columns):
    monkeypatch.setattr(terminal, "columns_of", lambda stream: columns)
    with Progress("compiling for a long time") as report:
        report(7, 1000)
        end = time.monotonic() + 0.05
        while time.monotonic() < end:
            assert len(screen.line()) < columns
        if columns >= 20:
            assert "7 of 1000, " in screen.line()
    assert screen.line() == "" and max(map(len, screen.getvalue().split("\r"))) < columns


def test_within_another_one_it_is_silent(screen):
    for _ in range(2):
        with Progress("images") as outer:
            outer(1, 2)
            with Progress("encoding") as inner:
                inner(1, 2)
                screen.soon("images")
                wait()
            assert screen.soon("images").startswith("images 1 of 2")
    assert "encoding" not in screen.getvalue()


def test_a_file_gets_a_line_now_and_then_if_it_is_wanted(screen, monkeypatch):
    monkeypatch.setattr(screen, "isatty", lambda: False)
    monkeypatch.setattr(terminal, "INTERVAL_IN_FILE", 0.05)
    with Progress("encoding", in_file=True) as report:
        report(3, 8)
        while screen.getvalue().count("\n") < 3:
            time.sleep(0.001)
        report(8, 8)
    assert set(screen.getvalue().splitlines()) == {"encoding 3 of 8, 0:00"}
    assert 3 <= screen.getvalue().count("\n") < 6 and "\r" not in screen.getvalue()


@pytest.mark.parametrize("kind", ["file", "dumb", "closed"])
def test_nothing_is_written_where_no_line_can_be_rewritten(screen, monkeypatch, kind):
    if kind == "file":
        monkeypatch.setattr(screen, "isatty", lambda: False)
    elif kind == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    else:
        monkeypatch.setattr(terminal.sys, "stderr", None)
    threads = threading.active_count()
    with Progress("encoding") as report:
        report(1, 2)
        assert threading.active_count() == threads
        wait()
    assert screen.getvalue() == ""


def test_a_terminal_that_went_away_ends_nothing(screen, monkeypatch):
    def gone(text: str):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(screen, "write", gone)
    with Progress("encoding") as report:
        report(1, 2)
        wait()
        report(2, 2)
    with Progress("again"):
        pass


def test_durations():
    assert [duration(seconds) for seconds in (0, 35.4, 140, 3599, 20000)] == [
        "0:00", "0:35", "2:20", "59:59", "5 h 33 min"]


CODE = """
import sys, time
from cli import terminal
terminal.PATIENCE, terminal.INTERVAL = 0.05, 0.01
with terminal.Progress("working") as report:
    report(1, 3)
    time.sleep(0.5)
    report(3, 3)
    print("answer", flush=True)
"""


def test_on_a_real_terminal():
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    child = subprocess.Popen([sys.executable, "-c", CODE], cwd=ROOT, env=environment, stdout=theirs,
                             stderr=theirs, stdin=theirs)
    assert child.wait(timeout=60) == 0
    os.close(theirs)
    written = os.read(ours, 10_000).decode()
    os.close(ours)
    *progress, blank, answer, end = written.split("\r")
    assert "working 1 of 3, 0:00" in progress
    assert blank == " " * len("working 1 of 3, 0:00") and answer + end == "answer\n"
