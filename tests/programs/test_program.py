"""How a program starts and ends: its standard streams, what interrupts it, and which errors are one line.

In this process, with `generate.main`; only closed streams need a process of their own.
"""
import contextlib
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from program_inputs import PROGRAMS, QUESTION, ROOT

import generate
from cli import program
from cli.answers import write_json
from cli.chat import Lines
from cli.options import Parser, piped_prompt


@pytest.fixture
def main(monkeypatch) -> Callable[..., int]:
    """Runs a program on the CPU; returns its exit code."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(*args: str, module: str = "generate") -> int:
        monkeypatch.setattr(sys, "argv", [f"{module}.py", *map(str, args)])
        try:
            PROGRAMS[module].main()
        except SystemExit as stop:
            return stop.code
        return 0
    return run


def failing(error: BaseException) -> Callable:
    def fail(*args, **named):
        raise error
    return fail


# ----- which errors are one line


ERRORS = [
    (ValueError("the prompt is odd: write another"), "the prompt is odd: write another"),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB."), "out of memory: try"),
    (RuntimeError("[fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory: try"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), "out of memory: try"),
    (MemoryError(), "out of memory: try a smaller model, --dtype bf16"),
    (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
    (OverflowError("int too large to convert to float"), "a number is too large"),
    (PermissionError(errno.EACCES, "Permission denied", "/x/y.json"), "/x/y.json: Permission denied"),
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    (ValueError("x" * 5000 + ": choose another name"), ": choose another name"),
    (ValueError("many words " * 5000), "many words"),
]


@pytest.mark.parametrize(("error", "words"), ERRORS, ids=range(len(ERRORS)))
@pytest.mark.parametrize("module", ["generate", "evaluate"])
def test_what_the_user_can_do_wrong_is_one_bounded_line(main, monkeypatch, capsys, module, error, words):
    monkeypatch.setattr(PROGRAMS[module], "Assistant", failing(error))
    assert main(*(QUESTION if module == "generate" else ["--questions", 1]), module=module) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    assert words in err and len(err) <= 1010


def test_a_fault_of_ours_is_a_traceback(main, monkeypatch):
    monkeypatch.setattr(generate, "Assistant", failing(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        main(*QUESTION)


MINE = """
from dataclasses import dataclass
from pruning import Pruner

@dataclass
class Mine(Pruner):
    keep: float = 0.5
    depth: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.depth > 9:
            raise ValueError("mine: depth is too large")

    def encoded(self, image, prompts):
        raise ValueError("I am at fault")
"""


@pytest.mark.parametrize("typed", [None, "What is this?\n"])
def test_the_author_of_a_pruner_gets_the_traceback(main, monkeypatch, tmp_path, typed):
    """Of an error at work, in a chat too; bad options are one line, as everywhere."""
    (tmp_path / "mine.py").write_text(MINE)
    prune = "--prune", f"{tmp_path / 'mine.py'}:Mine"
    arguments = QUESTION
    if typed is not None:
        monkeypatch.setattr(sys, "stdin", Terminal(typed))
        arguments = QUESTION[:2]
    with pytest.raises(ValueError, match="I am at fault"):
        main(*arguments, *prune)
    for option in ("--keep", "7.5"), ("--set", "depth=10"):
        assert main(*arguments, *prune, *option) == 2


# ----- standard streams


class Terminal(io.TextIOWrapper):
    """A terminal at which this is typed."""

    def __init__(self, typed: str | bytes):
        super().__init__(io.BytesIO(typed if isinstance(typed, bytes) else typed.encode()), encoding="utf-8")

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("module", PROGRAMS)
def test_a_closed_stdout_is_said(main, monkeypatch, capsys, module):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(*QUESTION[2:], module=module) == 2
    assert "standard output is closed" in capsys.readouterr().err


@pytest.mark.parametrize("args", [QUESTION, [*QUESTION, "--json"], ["--prompt", ""], ["--frobnicate"]])
def test_nothing_meant_for_a_closed_stderr_is_on_stdout(main, monkeypatch, capsys, args):
    expected = main(*args)
    out = capsys.readouterr().out
    monkeypatch.setattr(sys, "stderr", None)
    assert main(*args) == expected == (0 if args[0] == "--image" else 2)
    closed = capsys.readouterr().out
    times = r'"(ms|tokens_per_second|peak_memory_bytes|mapped_memory_bytes)": (\{.*?\}|[\d.]+)'
    assert re.sub(times, "", closed) == re.sub(times, "", out)


def test_files_never_take_the_place_of_a_closed_stream():
    """As a process whose stdin and stderr are closed; what is printed to stderr goes nowhere."""
    code = ("import os, sys; from cli import program; program.begin('__main__'); file = open('LICENSE'); "
            "os.write(2, b'lost'); print(file.fileno() > 2, sys.stdin)")
    out = subprocess.run(["sh", "-c", f'exec "{sys.executable}" -c "{code}" <&- 2>&-'], cwd=ROOT, check=True,
                         stdout=subprocess.PIPE, text=True).stdout
    assert out == "True None\n"


class Full(io.RawIOBase):
    """A file on a full disk, which is known when the buffer is written."""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def write(self, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def full(tmp_path):
    """A text stream to a full disk."""
    raw = Full()
    with open(tmp_path / "file", "w") as file:
        raw.descriptor = file.fileno()
        stream = io.TextIOWrapper(io.BufferedWriter(raw))
        yield stream
        with contextlib.suppress(OSError):
            stream.close()


@pytest.mark.parametrize("args", [QUESTION, [*QUESTION, "--json"], ["--help"], ["--prune", "list"]])
def test_a_full_disk_under_stdout_is_one_line(main, monkeypatch, capsys, full, args):
    monkeypatch.setattr(sys, "stdout", full)
    assert main(*args) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1] == "error: reading or writing failed: No space left on device"


def test_a_full_disk_under_stderr_costs_no_answer(main, monkeypatch, capsys, full):
    monkeypatch.setattr(sys, "stderr", full)
    assert main(*QUESTION) == 2
    assert capsys.readouterr().out == "Y\n"


@pytest.mark.parametrize("args", [QUESTION, ["--help"], ["--prune", "list"]])
def test_a_reader_that_goes_away_ends_the_program_without_a_word(main, monkeypatch, capsys, args):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert main(*args) == 141
    assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_stdout_cannot_hold_is_escaped(main, monkeypatch, encoding):
    for answer, data in (("é☃", {"answer": "é☃"}), ("Y", {"model": "caf\udce9"})):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
        program.check_streams()
        program.write(answer + "\n")
        write_json(data)
        text, line = written.getvalue().decode(encoding).splitlines()
        assert json.loads(line) == data
        assert text.encode("latin-1").decode("unicode_escape") == answer


def test_text_of_another_encoding_on_stdin(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é".encode()), encoding="ascii"))
    with pytest.raises(ValueError, match="not valid ASCII text; if it is UTF-8, set PYTHONIOENCODING=utf-8"):
        piped_prompt(False)


def test_a_chat_goes_on_after_odd_input(monkeypatch, capsys):
    """Bytes that are no text, a NUL, a line without an end."""
    monkeypatch.setattr(sys, "stdin", Terminal(b"One?\nTw\0o?\nThree?"))
    lines = Lines()
    assert [lines.next() for _ in range(5)] == ["One?", "Tw\0o?", "Three?", "", ""]
    monkeypatch.setattr(sys, "stdin", Terminal(b"caf\xe9?\n"))
    assert Lines().next() == ""
    assert "error: this is not valid UTF-8 text; type it again\n" in capsys.readouterr().err


def test_an_unknown_flag_of_many_letters_is_a_short_line(capsys):
    for args in ["--" + "x" * 5000], ["--count", "1" * 5000], ["word"] * 5000:
        parser = Parser(prog="x")
        parser.add_argument("--count", type=int)
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(args)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and len(err) <= 1010


# ----- interrupts


@pytest.mark.parametrize("module", ["generate", "evaluate"])
def test_an_interrupt_is_no_traceback(main, monkeypatch, capsys, module):
    monkeypatch.setattr(PROGRAMS[module], "Assistant", failing(KeyboardInterrupt()))
    assert main(*(QUESTION if module == "generate" else ["--questions", 1]), module=module) == 130
    assert capsys.readouterr() == ("", "")


def test_who_imports_a_program_keeps_the_own_way_with_ctrl_c():
    before = signal.getsignal(signal.SIGINT)
    program.begin("generate")
    assert signal.getsignal(signal.SIGINT) is before
