"""The shape of the house: sizes of files and functions, imports that run one way, one decode loop, hooks that
are listed once."""
import ast
import io
import tokenize
from pathlib import Path

import pytest

from pruning import METHODS, Pruner
from pruning.pruner import HOOKS

ROOT = Path(__file__).parents[2]
ROOMS = "model", "weights", "pruning", "cli", "scenes", "evaluation", "benchmarks", "page"
PROGRAMS = "generate", "evaluate", "benchmark", "demo"
SOURCES = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")))]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
every_file = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())

# What each room may import; the training scripts in scenes/ are programs too.
LIBRARY = {"model", "weights", "pruning"}
SHARED = LIBRARY | {"cli"}
ALLOWED = {"model": {"model"}, "weights": {"model", "weights"}, "pruning": LIBRARY, "cli": SHARED,
           "scenes": SHARED | {"scenes"},
           "evaluation": SHARED | {"scenes", "evaluation"},
           "benchmarks": SHARED | {"scenes", "benchmarks"},
           "page": SHARED | {"scenes", "evaluation", "page", "generate"}}       # it is part of a program
EVERYTHING = {*ROOMS, *PROGRAMS}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def is_program(path: Path) -> bool:
    """The adapter of lmms-eval is one too: it is lmms-eval's `generate.py`."""
    return path.stem in PROGRAMS or path.parent.name == "scenes" and path.stem.startswith("train") or (
        path.parent.name == "lmms" and path.stem in ("adapter", "questions"))


def imported(path: Path) -> list[str]:
    """The modules that a file imports, anywhere in it."""
    names = []
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def code_lines(path: Path) -> int:
    """Lines of a file that hold code: no comments, no docstrings, no blank lines."""
    source = path.read_text(encoding="utf-8")
    documented = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
             tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in blank:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - documented)


# ----- sizes


def test_the_core_reads_in_one_sitting():
    core = [*(ROOT / "model").glob("*.py"), ROOT / "generate.py"]
    assert 800 < sum(map(code_lines, core)) <= 1300


def test_generate_is_one_page():
    page = next(node for node in functions(TREES[ROOT / "generate.py"]) if node.name == "generate")
    assert page.end_lineno - page.lineno + 1 <= 45


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))],
                         ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_is_over_300_lines_and_no_function_over_50(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 300
    for node in functions(ast.parse(source)):
        assert node.end_lineno - node.lineno + 1 <= 50, node.name


LINES = {"coreset": 80, "random": 15, "mint": 89, "spatial": 20, "fastv": 32, "trimmed_llama": 40, "sgl": 185,
         "quecc": 140, "attention_predictor": 175}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "none"])
def test_a_method_is_short_and_stands_alone(method):
    path = ROOT / "pruning" / "methods" / f"{method}.py"
    assert 5 < code_lines(path) <= LINES.get(method, 75)
    assert not [name for name in imported(path) if name.startswith("pruning.methods")]


# ----- who knows whom


@every_file
def test_imports_run_one_way(path):
    allowed = EVERYTHING if is_program(path) else ALLOWED[room_of(path)]
    assert {name.split(".")[0] for name in imported(path)} & EVERYTHING <= allowed


def test_no_file_imports_itself_through_others():
    """Files that import no other file of ours are taken away until nothing is left."""
    modules = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in SOURCES}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    left = {name: {used for used in imported(path) if used in modules and used != name}
            for name, path in modules.items()}
    while free := [name for name, uses in left.items() if not uses & left.keys()]:
        for name in free:
            del left[name]
    assert not left


def test_the_network_reads_no_file():
    for path in (ROOT / "model").glob("*.py"):
        called = {node.func.id for node in ast.walk(TREES[path])
                  if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        assert "open" not in called, path
        assert not {"json", "pathlib", "os", "PIL", "safetensors", "tokenizers", "jinja2"} & {
            name.split(".")[0] for name in imported(path)}, path


def test_nobody_asks_which_method_it_is():
    names = {kind.__name__ for kind in METHODS.values() if kind is not Pruner}
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
                assert not names & {leaf.id for leaf in ast.walk(node) if isinstance(leaf, ast.Name)}, path


# ----- once


def test_there_is_one_decode_loop():
    """A loop that decodes: `generate()` has it, and nothing else."""
    loops = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, (ast.For, ast.While)):
                continue
            called = {getattr(call.func, "attr", getattr(call.func, "id", ""))
                      for call in ast.walk(node) if isinstance(call, ast.Call)}
            if "decode" in called and called & {"argmax", "sample", "sampler", "stepped", "prefill"}:
                loops.append(path.relative_to(ROOT).as_posix())
    assert loops == ["generate.py"]


def test_every_hook_stands_in_generate_once():
    page = next(node for node in functions(TREES[ROOT / "generate.py"]) if node.name == "generate")
    called = [node.func.attr for node in ast.walk(page) if isinstance(node, ast.Call)
              and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)
              and node.func.value.id == "pruner"]
    assert sorted(called) == sorted(["begin", "encoded", "prefilled", "logits", "stepped"])
    assert {*called, "layer", "preprocess", "around"} == {*HOOKS}


def test_hooks_are_listed_once():
    """Besides the class that defines them, only a Wrapper names them all."""
    named = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                if {*HOOKS} <= {part.name for part in node.body if isinstance(part, ast.FunctionDef)}:
                    named.append(node.name)
            elif isinstance(node, (ast.Tuple, ast.List, ast.Set)):
                words = {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
                assert not {"layer", "prefilled", "stepped"} <= words, path
    assert named == ["Pruner", "Wrapper"]
