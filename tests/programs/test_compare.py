"""Methods are compared on the same questions alone: known differences, and bad input in one line."""
import json
from pathlib import Path

import pytest

from evaluation import compare
from evaluation.scoring import paired_bootstrap
from scenes.questions import KINDS

RESULTS = Path(__file__).parents[2] / "evaluation" / "results"
IMAGES = 40


def row(method, keep, right, **options):
    accuracy = right.count("1") / (2 * IMAGES)
    return {"method": method, "keep": keep, "options": options, "kept": 0.25, "accuracy": accuracy,
            "low": accuracy, "high": accuracy, "image_kv_bytes": 1, "prefill_ms": 1, "decode_ms": 1,
            "wrong_yes": None, "accuracy_by_kind": dict.fromkeys(KINDS), "right": right}


ALL, HALF, FEW = " ".join(["11"] * IMAGES), " ".join(["11", "00"] * (IMAGES // 2)), " ".join(["10"] * IMAGES)
FULL = row("none", 1.0, ALL)
ROWS = [FULL, row("a", 0.5, ALL), row("a", 2, HALF), row("b", 0.5, HALF), row("b", 2, HALF, seed=0)]


def written(path, rows, **settings):
    asked = [[line["method"], line["keep"], line["options"]] for line in rows]
    same = {"model": "tiny", "questions": 2 * IMAGES}
    made = {**same, "split": settings.get("split", "test"), "settings": {**same, "rows": asked, **settings},
            "rows": rows, "layer_similarity": {"cosine": [[1]], "top10_overlap": [[1]]}}
    path.write_text(json.dumps(made))
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    def command(*argv) -> str:
        monkeypatch.setattr("sys.argv", ["compare.py", *map(str, argv)])
        compare.main()
        return capsys.readouterr().out
    return command


def cells(line):
    return line.replace("[", "").replace("]", "").replace(",", "").replace("%", "").split()


def test_a_method_against_others_at_the_same_keep(run, tmp_path):
    out = run(written(tmp_path / "x.json", ROWS), "--method", "a").splitlines()
    _, low, high = (f"{100 * part:+.2f}" for part in paired_bootstrap(ALL.split(), HALF.split()))
    assert out[0] == "a, keep 0.5: 25.0% kept, accuracy 100.0; a minus"
    assert cells(out[2]) == ["none", "25.0", "100.0", "+0.00", "+0.00", "+0.00"]
    assert cells(out[3]) == ["b", "25.0", "50.0", "+50.00", low, high, "*"] and float(low) > 30
    assert out[4:6] == ["", "a, keep 2: 25.0% kept, accuracy 50.0; a minus"]
    assert cells(out[7])[:4] == ["none", "25.0", "100.0", "-50.00"] and out[7].endswith("*")
    assert cells(out[8]) == ["b", "seed=0", "25.0", "50.0", "+0.00", "+0.00", "+0.00"]
    assert out[9] == "* the interval does not hold 0" and len(out) == 10


def test_a_difference_that_may_be_chance_has_no_mark(run, tmp_path):
    better = HALF[:-2] + "01"
    rows = [row("a", 0.5, better), row("b", 0.5, HALF), row("c", 0.5, FEW)]
    path = written(tmp_path / "x.json", [FULL, *rows])
    lines = {line.split()[0]: line for line in run(path, "--method", "a").splitlines()[2:5]}
    assert cells(lines["b"])[3] == "+1.25" and not lines["b"].endswith("*")
    assert "[+0.00, +3.75]" in lines["b"]
    assert cells(lines["c"])[3] == "+1.25" and not lines["c"].endswith("*") and lines["none"].endswith("*")


def test_files_of_several_settings_are_one_table(run, tmp_path):
    first = written(tmp_path / "x.json", ROWS[:2])
    rows = [row("a", 0.5, HALF, full=0), row("b", 0.5, FEW)]
    second = written(tmp_path / "y.json", [FULL, *rows], split="test")
    out = run(first, second, first, "--method", "a").splitlines()
    assert [line.partition(" 25.0%")[0].strip() for line in out[2:5]] == ["none", "a full=0", "b"]
    assert [line[:14] for line in out if line.endswith(" minus")] == ["a, keep 0.5: 2", "a full=0, keep"]
    assert run(first, second, "--method", "a full=0").startswith("a full=0, keep 0.5:")


def test_stored_results(run):
    out = run(RESULTS / "curve.json", "--method", "coreset")
    assert out.count("coreset, keep") == 6 and out.count("\nspatial ") == 6


@pytest.mark.parametrize(("change", "words"), [
    ({"split": "validation"}, "split is 'validation', not 'test' as in"), ({"blur": 4}, "blur is 4, not 0"),
    ({"weights": 2}, "weights is 2"), ({"dtype": "bf16"}, "dtype is 'bf16', not None"),
    ({"quantize": "int8"}, "quantize is 'int8', not None"),
    ({"revision": "v2"}, "revision is 'v2', not None"),
])
def test_other_questions_are_one_line(capsys, run, tmp_path, change, words):
    first = written(tmp_path / "x.json", ROWS, blur=0, weights=1)
    second = written(tmp_path / "y.json", ROWS, **{"blur": 0, "weights": 1, **change})
    refused(capsys, run, [first, second, "--method", "a"], words)


def refused(capsys, run, argv, words):
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert words in err


def test_bad_input_is_one_line(capsys, run, tmp_path):
    good = written(tmp_path / "good.json", ROWS)
    refused(capsys, run, [good], "--method")
    refused(capsys, run, ["--method", "a"], "FILE")
    refused(capsys, run, [good, "--method", "c"], "--method 'c': choose one of none, a, b, b seed=0")
    refused(capsys, run, [tmp_path / "no.json", "--method", "a"], "no.json: cannot be read")
    refused(capsys, run, [tmp_path, "--method", "a"], "folder")
    other = written(tmp_path / "other.json", [FULL, row("a", 0.5, HALF)])
    refused(capsys, run, [good, other, "--method", "a"], "other.json: 'a' at keep 0.5 has other answers")
    shorter = written(tmp_path / "shorter.json", [*ROWS[:2], row("c", 0.5, "11 1")])
    refused(capsys, run, [shorter, "--method", "a"], "same questions")


@pytest.mark.parametrize("damage", [
    lambda made: made.pop("settings"), lambda made: made.update(settings=[]),
    lambda made: made.update(rows=5), lambda made: made.update(split="validation"),
    lambda made: made["settings"].pop("rows"), lambda made: made["settings"].pop("model"),
    lambda made: made["rows"][1].pop("right"), lambda made: made["rows"][1].update(right="12 1"),
    lambda made: made["rows"][1].update(right=[1]), lambda made: made["rows"][1].update(accuracy=None),
    lambda made: (made["rows"][1].update(method=["a"]), made["settings"]["rows"][1].__setitem__(0, ["a"])),
    lambda made: (made["rows"][1].update(options=5), made["settings"]["rows"][1].__setitem__(2, 5)),
    lambda made: [rows.__delitem__(slice(1, None)) for rows in (made["rows"], made["settings"]["rows"])],
])
def test_a_damaged_file_is_one_line(capsys, run, tmp_path, damage):
    path = written(tmp_path / "x.json", ROWS)
    made = json.loads(path.read_text())
    damage(made)
    path.write_text(json.dumps(made))
    refused(capsys, run, [path, "--method", "a"], "x.json: not written by evaluate.py")
    for content in "[]", "5", "null", "{", "[" * 100000:
        path.write_text(content)
        refused(capsys, run, [path, "--method", "a"], "x.json: not ")
