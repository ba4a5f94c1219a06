"""A method of one's own: a class in a file, by `path/to/file.py:Class`."""
import pytest
from helpers import refused

from pruning import METHODS, load

MINE = '''
from dataclasses import dataclass
from typing import Literal
from pruning import Pruner

NOT_A_PRUNER = 5

class Other:
    pass

@dataclass
class Mine(Pruner):
    """Does nothing."""
    taste: Literal["sweet", "sour"] = "sweet"
    depth: int | None = None
'''


@pytest.fixture
def mine(tmp_path) -> str:
    (tmp_path / "mine.py").write_text(MINE)
    return str(tmp_path / "mine.py")


def test_a_class_from_a_file(mine):
    pruner = load(f"{mine}:Mine", keep=0.5, taste="sour", depth=2)
    assert (pruner.name, pruner.taste, pruner.depth) == ("mine", "sour", 2) and "sour" in str(pruner)
    with refused(parts=["mine", "taste", "'salty'", "sweet", "sour"]):
        load(f"{mine}:Mine", taste="salty")
    with refused(parts=["'tast'", "taste", "depth", "keep"]):
        load(f"{mine}:Mine", tast="sour")
    for name in "Missing", "Other", "NOT_A_PRUNER", "":
        with refused(parts=[mine, repr(name), "Pruner"]):
            load(f"{mine}:{name}")


def test_a_class_from_a_file_with_postponed_annotations(mine, tmp_path):
    """They are text until somebody asks, and mean something in their own file only."""
    path = tmp_path / "later.py"
    path.write_text("from __future__ import annotations\n" + MINE)
    assert load(f"{path}:Mine", taste="sour").taste == "sour"
    with refused(parts=["sweet", "sour"]):
        load(f"{path}:Mine", taste="salty")


@pytest.mark.parametrize("text, fragment", [
    ("def broken(:\n", "SyntaxError"), ("import no_such_package_anywhere", "ModuleNotFoundError"),
    ("raise RuntimeError('two\\nlines')", "RuntimeError"), ("1 / 0", "ZeroDivisionError")])
def test_a_file_that_cannot_be_run(tmp_path, text, fragment):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with refused(parts=[str(path), fragment]):
        load(f"{path}:Mine")


def test_a_file_that_is_not_there(tmp_path):
    with refused(parts=["nowhere.py", "no such file"]):
        load(f"{tmp_path}/nowhere.py:Mine")
    with refused(parts=[*METHODS]):
        load(f"{tmp_path}:Mine")
