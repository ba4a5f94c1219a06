"""The README says what is true: its line counts, links, commands, answers and figures."""
import json
import re
import shlex
from pathlib import Path

import pytest

import generate
from benchmarks.tables import milliseconds
from cli.answers import size
from cli.options import labelled
from pruning import METHODS, Pruner, hooks, load
from weights.image_file import open_image

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^\| \[?`?(examples/[\w.]+)`?[^|]*\| ([^|]+) \| ([^|]+) \|$", README, re.M)


def test_readme_is_at_most_200_lines():
    assert len(README.splitlines()) <= 200


def test_at_least_six_examples():
    assert len({image for image, _, _ in EXAMPLES}) >= 6


@pytest.fixture(scope="module")
def assistant():
    return generate.Assistant("tiny")


@pytest.mark.parametrize(("image", "question", "answer"), EXAMPLES)
def test_example_answers(assistant, image, question, answer):
    look = assistant.encode_images([open_image(ROOT / image)])
    said = assistant.answer([generate.messages(question, 1)], look, 64)
    assert assistant.tokenizer.decode(said.tokens[0]) == answer


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
    expected = {**figures["accuracy_by_kind"], "mean": figures["mean_over_kinds"]}
    shares = [f"{100 * share:.1f}" for share in expected.values()]
    assert rows_of(README, next(iter(expected))) == [list(expected), shares]
    assert figures["questions"] == 2000


def rows_of(page: str, corner: str) -> list[list[str]]:
    """The cells of the table whose upper left one is this."""
    table = re.search(rf"^\| {re.escape(corner)} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", page, re.M).group(0)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [rows[0], *rows[2:]]


@pytest.mark.parametrize(("page", "name", "corner"), [
    ("README.md", "curve", "`--keep`"),
    ("pruning/README.md", "every_layer", "every layer reads what is kept, `--keep`"),
    ("pruning/README.md", "first_layer_whole", "first layer reads everything, `--keep`"),
    ("pruning/README.md", "after_prefill", "cache cut after prefill, `--keep`"),
    ("docs/CORESET.md", "guide", "`weights/guide`, `--keep`"),
    ("docs/CORESET.md", "guide_first_layer_whole", "`weights/guide`, first layer reads everything, `--keep`"),
    ("docs/CORESET.md", "guide_after_prefill", "`weights/guide`, cut after prefill, `--keep`"),
    ("docs/CORESET.md", "seed1", "seed 1, `--keep`"),
    ("docs/CORESET.md", "seed1_first_layer_whole", "seed 1, first layer reads everything, `--keep`"),
    ("docs/CORESET.md", "seed1_after_prefill", "seed 1, cut after prefill, `--keep`")])
def test_pruning_tables_are_those_of_the_stored_evaluations(page, name, corner):
    (_, *keeps), *lines = rows_of((ROOT / page).read_text(encoding="utf-8"), corner)
    made = stored(f"evaluation/results/{name}.json")
    assert made["questions"] == 2000 and made["settings"]["split"] == "test"
    rows = made["rows"][1:]
    labels = labelled([(row["method"], row["options"]) for row in rows])
    expected = {(label, f"{row['keep']:g}"): f"{100 * row['accuracy']:.1f} ({100 * row['kept']:.0f})"
                for (label, _), row in zip(labels, rows, strict=True)}
    assert len(expected) == len(keeps) * len(lines)
    for method, *cells in lines:
        assert cells == [expected[method, keep] for keep in keeps]


def stored(name: str) -> dict:
    return json.loads((ROOT / name).read_text(encoding="utf-8"))


def test_the_table_of_heights_is_that_of_the_stored_evaluation():
    (_, *heights), *lines = rows_of((ROOT / "docs" / "CORESET.md").read_text(encoding="utf-8"),
                                    "`height`, `--keep 1.0`")
    rows = stored("evaluation/results/heights.json")["rows"][1:]
    assert len(rows) == len(heights) * len(lines) and {row["keep"] for row in rows} == {1.0}
    for (label, *cells), question in zip(lines, (None, 0), strict=True):
        own = [row for row in rows if row["options"].get("question") == question]
        assert [str(row["options"]["height"]) for row in own] == heights
        assert cells == [f"{100 * row['accuracy']:.1f} ({100 * row['kept']:.0f})" for row in own], label


MEASURED = (ROOT / "pruning" / "README.md").read_text(encoding="utf-8")


def percent(*shares: float) -> list[str]:
    return [f"{100 * share:.1f}" for share in shares]


def test_the_table_of_methods_is_the_registry():
    _, *lines = rows_of(MEASURED, "method | paper")
    expected = [[f"[{name}](methods/{name}.py)", method.paper or "-", ", ".join(hooks(method))]
                for name, method in METHODS.items() if method is not Pruner]
    assert [line[:3] for line in lines] == expected


def test_the_table_of_costs_is_that_of_the_stored_measurements():
    _, *lines = rows_of(MEASURED, "method | tiny: prefill")
    both = [stored(f"benchmarks/results/cpu-{name}-methods.json")["methods"]
            for name in ("tiny", "11b-slice")]
    assert [line[0] for line in lines] == [row["method"] for row in both[0]]
    for line, *rows in zip(lines, *both, strict=True):
        cells = []
        for row, (whole, *_) in zip(rows, both, strict=True):
            for name in "prefill_ms", "token_ms":
                more = milliseconds(row[name] - whole[name], "+")
                cells.append(milliseconds(row[name]) if row is whole else more)
            cells += [size(row["stored_bytes"]), size(row["read_bytes"])]
        assert line[1:] == cells


def test_the_tables_of_single_methods_are_those_of_the_stored_figures():
    _, *lines = rows_of(MEASURED, "`--keep` of mint")
    sharp, blurred = (stored(f"evaluation/results/{name}.json")["rows"]
                      for name in ("exists", "exists_blurred"))
    pairs = zip(sharp, blurred, strict=True)
    assert [line[1:] for line in lines] == [
        percent(*(row[name] for row in pair for name in ("wrong_yes", "accuracy"))) for pair in pairs]
    for threshold, *cells in rows_of(MEASURED, "`threshold`")[1:]:
        row = stored(f"evaluation/results/early_exit_{threshold}.json")["rows"][1]
        assert row["options"] == {"threshold": float(threshold)} and row["keep"] == 0.25
        assert cells == percent(row["early"], row["accuracy"])
    learned = stored("weights/learned/attention_predictor.json")["recall"]
    assert rows_of(MEASURED, "blocks of")[1:] == [
        [str(row["block"]), f"{row['share']:g}",
         *percent(row["cnn"], row["last"], row["mean"], row["chance"])] for row in learned]
    right = stored("weights/learned/quecc.json")["accuracy"]
    assert [line[1:] for line in rows_of(MEASURED, "tokens a tile")[1:]] == [
        percent(right["whole"], right[f"{kind}_16"], right[f"{kind}_4"]) for kind in ("pool", "trained")]


def test_the_method_in_the_readme_runs(tmp_path, assistant):
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    source = next(block for block in blocks if "class Mine" in block)
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    assert len(source.splitlines()) <= 5
    mine = load(f"{tmp_path / 'mine.py'}:Mine", keep=0.2)
    look = assistant.encode_images([open_image(ROOT / "examples" / "shapes.png")])
    said = assistant.answer([generate.messages("What is written on the circle?", 1)], look, 8, pruner=mine)
    assert said.kept == [[40, 40, 40]]
