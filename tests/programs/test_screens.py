"""Tables and lines on terminals of several widths: they fit, and hold what they hold in a file."""
import io
import json
import re
import sys
from collections import Counter

import pytest
from program_inputs import IMAGE, PROGRAMS, QUESTION, ROOT

from benchmarks.tables import read_files
from benchmarks.text import text
from cli import terminal
from cli.answers import speed
from cli.terminal import fitted, milliseconds, size, took
from evaluation.compare import comparison
from evaluation.plot import summary, table
from evaluation.scoring import Score
from scenes.questions import KINDS

RESULTS = read_files(ROOT / "benchmarks" / "results")
LABELS = "trimmed_llama", "attention_matching", "random"


@pytest.fixture
def made(sweep) -> dict:
    """An evaluation of methods with long names, on a slow machine, with all kinds of questions."""
    made = json.loads((sweep / "out.json").read_text())
    for row, label in zip(made["rows"][1:], LABELS, strict=False):
        row.update(method=label, low=0.81, high=0.95, accuracy_by_kind=dict.fromkeys(KINDS, 1.0),
                   wrong_yes=1.0, image_kv_bytes=123456, prefill_ms=98765.4, decode_ms=1219.6)
    return made


def cells(lines: list[str]) -> set[str]:
    """What the cells of a table say. A cell may have spaces, but those of a file have two between them."""
    return {word for line in lines for word in line.split()}


# ----- numbers


def test_numbers_have_no_exponents():
    assert [milliseconds(ms) for ms in (0.01234, 55.72, 999.4, 999.6, 1219.6)] == [
        "0.0123 ms", "55.7 ms", "999 ms", "1000 ms", "1220 ms"]
    assert [milliseconds(ms, "+") for ms in (-0.5, 1219.6)] == ["-0.5 ms", "+1220 ms"]
    assert [size(count) for count in (0, 999, 999.7, 999_600, 21.3e9, 999.9e9, 1.5e15)] == [
        "0 B", "999 B", "1 kB", "1 MB", "21.3 GB", "1 TB", "1500 TB"]
    assert [took(ms) for ms in (0.4, 55.7, 9999, 98765.4)] == ["0 ms", "56 ms", "9999 ms", "98.8 s"]
    assert [speed(rate) for rate in (2345.6, 122.61, 0.031)] == ["2345.6 tok/s", "122.6 tok/s", "0.031 tok/s"]


# ----- tables


def test_a_table_that_fits_is_left_alone():
    lines = [["method", "a time"], ["x", "1"]]
    assert fitted(lines, None, 1, gap=1) == fitted(lines, 13, 1, gap=1) == [lines]


def test_a_wide_head_stands_in_several_lines():
    lines = [["method", "time of a token"], ["x", "1 ms"]]
    assert fitted(lines, 20, 1, gap=1) == [
        [["", "time"], ["", "of a"], ["method", "token"], ["x", "1 ms"]]]


def test_a_wide_table_goes_on_below_with_its_first_columns():
    lines = [["method", "keep", "first", "second"], ["some", "1", "one", "two"]]
    assert fitted(lines, 20, 2, gap=1) == [
        [["method", "keep", "first"], ["some", "1", "one"]],
        [["method", "keep", "second"], ["some", "1", "two"]]]
    narrow = fitted(lines, 3, 1, gap=1)
    assert [part[0][1] for part in narrow] == ["keep", "first", "second"]


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_the_table_of_an_evaluation_fits(made, columns):
    lines = table(made, columns).splitlines()
    assert max(map(len, lines)) <= columns
    assert cells(lines) == cells(table(made).splitlines())
    heads = [line for line in lines if line.startswith("method")]
    assert len(heads) == (1 if columns == 200 else 2)
    assert "98.8 s" in table(made) and "1220 ms" in table(made) and "e+" not in table(made)


def test_the_summary_of_an_evaluation_fits():
    asked = dict.fromkeys(KINDS, 100) | {(1, 1): 50, (2, 2): 50, "all": 900}
    score = Score(Counter(asked), Counter(asked))
    assert "nan" not in summary(score, [(0.5, 0.5)] * 8)
    lines = summary(score, [(0.5, 0.5)] * 8, columns=50).splitlines()
    assert max(map(len, lines)) <= 50
    assert cells(lines) == cells(summary(score, [(0.5, 0.5)] * 8).splitlines())


@pytest.mark.parametrize("columns", [50, 80])
def test_a_comparison_fits(made, columns):
    lines = comparison(made["rows"], "trimmed_llama", columns).splitlines()
    assert max(map(len, lines)) <= columns
    assert cells(lines) == cells(comparison(made["rows"], "trimmed_llama").splitlines())


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", RESULTS)
def test_the_tables_of_a_benchmark_fit(name, columns):
    narrow, wide = text(RESULTS[name], columns), text(RESULTS[name])
    assert max(map(len, narrow.splitlines())) <= columns
    figures = r"[\d.]+ (?:ms|kB|MB|GB)|[+-]?[\d.]+%"
    assert set(re.findall(figures, narrow)) == set(re.findall(figures, wide))


# ----- programs


@pytest.mark.parametrize("columns", [50, 80, 200])
def test_what_an_answer_took_fits_a_terminal(monkeypatch, capsys, columns):
    monkeypatch.setattr(sys, "argv", ["generate.py", *QUESTION, "--prune", "trimmed_llama"])
    monkeypatch.setattr(terminal, "is_terminal", lambda stream: True)
    monkeypatch.setattr(terminal, "columns_of", lambda stream: columns)
    PROGRAMS["generate"].main()
    out, err = capsys.readouterr()
    lines = [line for line in err.split("\n") if "\r" not in line]
    assert out == "Y\n" and max(map(len, lines)) <= columns
    assert re.search(r"image KV .*, encode \d+ ms, prefill \d+ ms, .* tok/s, peak memory",
                     re.sub(r"\n *", " ", err), re.S)


def test_what_an_answer_took_is_two_lines_in_a_file(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--image", IMAGE, "--prompt", "What?"])
    PROGRAMS["generate"].main()
    assert capsys.readouterr().err.count("\n") == 3


class Output(io.StringIO):
    """One of two streams to the same terminal, whose texts are kept in the order in which they came."""

    def __init__(self, texts: list[tuple["Output", str]]):
        super().__init__()
        self.texts = texts

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.texts.append((self, text))
        return len(text)


@pytest.mark.parametrize("method", ["none", "sgl", "attention_matching"])
def test_progress_is_gone_when_an_answer_begins(monkeypatch, method):
    """Also with a method that asks a second model, and with one that works after prefill."""
    texts = []
    out, err = Output(texts), Output(texts)
    monkeypatch.setattr(terminal, "PATIENCE", 0.0)
    monkeypatch.setattr(terminal, "INTERVAL", 0.0001)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "argv", ["generate.py", "--image", IMAGE, "--prompt", "Describe the picture.",
                                      "--prune", method, "--max-new-tokens", "20"])
    PROGRAMS["generate"].main()
    answered = [i for i, (stream, text) in enumerate(texts) if stream is out and text.strip()]
    assert len(answered) > 5
    before = "".join(text for _, text in texts[:answered[0]])
    assert "\rloading" in before or "\rencoding" in before
    *_, last, end = before.rpartition("\n")[2].split("\r")
    assert last.strip() == end == ""
    assert not [text for stream, text in texts[answered[0]:answered[-1]] if stream is err]
