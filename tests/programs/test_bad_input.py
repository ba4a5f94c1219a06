"""Bad input of every kind: one line on stderr that says what is wrong, exit code 2, and nothing else.

The table is in `bad_input.py`. All runs in this process, through `main()`, which is all that
`python generate.py` does; the hub is never asked, its answers are imitated.
"""
import io
import sys
from pathlib import Path

import pytest
import torch
from bad_files import Bench
from bad_input import KINDS, ROWS
from huggingface_hub import constants


def test_the_table_is_long_and_names_nothing_twice():
    assert len(ROWS) == sum(map(len, KINDS.values())) >= 100


class Input(io.TextIOWrapper):
    """Standard input of given bytes, or a terminal at which nobody types."""

    def __init__(self, content: bytes, terminal: bool):
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def tree(folder: Path) -> dict[Path, tuple[int, int]]:
    """Everything under a folder, with its size and time of change."""
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.mark.parametrize("row", ROWS)
def test_bad_input_gets_one_line(row, tmp_path, monkeypatch, capsys):
    prepare, *words = ROWS[row]
    bench = Bench(tmp_path, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program.py", *prepare(bench)])
    stdin = None if bench.stdin is None else Input(bench.stdin, bench.terminal)
    monkeypatch.setattr(sys, "stdin", stdin)
    before = tree(tmp_path)

    with pytest.raises(SystemExit) as caught:
        bench.program.main()

    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert err.startswith("error: ") and err.endswith("\n") and len(err.splitlines()) == 1, err
    assert len(err) <= 1010
    for word in words:
        assert word in err
    assert tree(tmp_path) == before
