"""The README says what is true: its line counts, links, commands, answers and figures."""
import ast
import json
import re
import shlex
from pathlib import Path

import pytest

import generate

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
READING = re.findall(r"^\| \[`?([\w./]+)`?\]\([\w./]+\) \| (\d+) \|", README, re.M)
EXAMPLES = re.findall(r"^\| \[?`?(examples/[\w.]+)`?[^|]*\| ([^|]+) \| ([^|]+) \|$", README, re.M)
SOURCES = [*ROOT.glob("*.py"), *(p for d in ("model", "weights", "scenes") for p in (ROOT / d).glob("*.py"))]


def test_readme_is_at_most_200_lines():
    assert len(README.splitlines()) <= 200


def test_reading_table_names_every_file():
    names = {name for name, _ in READING}
    assert names == {str(p.relative_to(ROOT)) for p in SOURCES if p.name != "__init__.py"}


@pytest.mark.parametrize(("name", "lines"), READING)
def test_line_counts(name, lines):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) == int(lines)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)", text)
    targets += re.findall(r"`((?:model|weights|scenes|tests|examples)/[\w./]*)`", text)
    for target in targets:
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_at_least_six_examples():
    assert len({picture for picture, _, _ in EXAMPLES}) >= 6


@pytest.fixture(scope="module")
def assistant():
    return generate.Assistant("tiny")


@pytest.mark.parametrize(("picture", "question", "answer"), EXAMPLES)
def test_example_answers(assistant, picture, question, answer):
    look = assistant.look([generate.open_picture(ROOT / picture)])
    said = assistant.ask([generate.messages(question, 1)], look, 64)
    assert assistant.prompter.decode(said.tokens[0]) == answer


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    parts = [part.strip() for block in blocks for line in block.splitlines() for part in line.split("&&")]
    return [shlex.split(part) for part in parts if part]


def test_setup_and_test_commands_are_those_of_ci():
    line = "pip install -e '.[test]' && pytest"
    assert line in README
    assert line in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_main_command_answers(monkeypatch, capsys):
    mains = [c for c in commands() if c[:2] == ["python", "generate.py"] and "--model" not in c]
    assert mains
    monkeypatch.chdir(ROOT)
    for command in mains:
        monkeypatch.setattr("sys.argv", command[1:])
        generate.main()
        out = capsys.readouterr().out.strip()
        assert out and f"{out}\n" in README


def test_accuracy_is_that_of_the_stored_evaluation():
    figures = json.loads((ROOT / "weights" / "tiny" / "accuracy.json").read_text(encoding="utf-8"))
    rows = dict(re.findall(r"^\| (\w+) \| ([\d.]+) % \|", README, re.M))
    expected = {**figures["accuracy_by_kind"], "mean": figures["mean_over_kinds"]}
    assert rows == {kind: f"{100 * share:.1f}" for kind, share in expected.items()}
    assert figures["questions"] == 2000


def test_imports_run_one_way():
    allowed = {"model": {"model"}, "weights": {"model", "weights"}, "scenes": {"model", "weights", "scenes"},
               "": {"model", "weights", "scenes", "generate"}}
    rooms = {"model", "weights", "scenes", "generate", "evaluate"}
    for path in SOURCES:
        room = path.parent.relative_to(ROOT).as_posix().strip(".")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
            used = {name.split(".")[0] for name in names} & rooms
            assert used <= allowed[room], (path, used)


def test_no_import_circle_inside_a_room():
    """Files that import none of their neighbours are taken away until nothing is left."""
    for room in ("model", "weights", "scenes"):
        imports = {}
        for path in (ROOT / room).glob("*.py"):
            tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            modules = [node.module or "" for node in tree if isinstance(node, ast.ImportFrom)]
            imports[path.stem] = {m.split(".")[1] for m in modules if m.startswith(f"{room}.")}
        while free := [name for name, needs in imports.items() if not needs & imports.keys()]:
            for name in free:
                del imports[name]
        assert not imports, imports


def test_sizes_of_model_files_and_functions():
    for path in (ROOT / "model").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 300, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < 60, (path, node.name)
