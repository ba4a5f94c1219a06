"""The Curve tab: the figures of the files, of all kinds of question or of some, and what is drawn of them."""
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers import refused

from evaluation.compare import read_rows
from evaluation.scoring import row_figures
from page.curve import DASHES, HEAD, MARKS, PALETTE, chart, note, table
from page.results import FOLDER, SETTINGS, Results, files, read
from scenes.questions import KINDS

CURVE = SETTINGS["curve"]


@pytest.fixture(scope="module")
def curve() -> Results:
    return read(*files()[CURVE])


# ----- the files


def test_every_file_belongs_to_one_setting_and_can_be_read():
    found = files()
    listed = sorted(path for paths in found.values() for path in paths)
    there = sorted(FOLDER.glob("*.json"))
    assert listed == [path for path in there if '"questions": 2000' in path.read_text(encoding="utf-8")]
    assert {*found} == {*SETTINGS.values()} and len(found[SETTINGS["early_exit"]]) == 6
    for paths in found.values():
        results = read(*paths)
        assert results.methods and results.rows[0]["method"] == "none"
        words = note(results, paths)
        assert words.count("`") == 2 + 2 * len(paths) and words.endswith("is of the official weights.")
        results = replace(results, settings={**results.settings, "model": "meta-llama/Llama"})
        assert "official" not in note(results, paths)


def test_a_file_of_another_name_is_called_by_it(tmp_path):
    shutil.copy(FOLDER / "curve.json", tmp_path / "mine.json")
    shutil.copy(FOLDER / "curve.json", tmp_path / "curve.json")
    (tmp_path / "other.json").write_text('{"about": "something else"}')
    (tmp_path / "broken.json").write_text("{")
    assert [*files(tmp_path)] == [CURVE, "broken", "mine"]


@pytest.mark.parametrize("text", ["{", "[]", '{"settings": {}}', ""])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "curve.json"
    path.write_text(text)
    with refused("curve.json"):
        read(path)


def test_answers_to_other_questions_are_refused(tmp_path):
    made = json.loads((FOLDER / "exists.json").read_text())
    for row in made["rows"]:
        row["right"] = row["right"][2:]
    path = tmp_path / "exists.json"
    path.write_text(json.dumps(made))
    with refused("not to the questions that are asked now"):
        read(path).computed(1, ["exists"])


# ----- the figures


def test_of_all_kinds_the_figures_are_those_of_the_file(curve):
    rows = read_rows(files()[CURVE])
    points = curve.points(curve.methods, [*KINDS])
    assert [(point.kept, point.accuracy, point.low, point.high) for point in points] == [
        (row["kept"], row["accuracy"], row["low"], row["high"]) for row in rows]
    assert {point.questions for point in points} == {2000}


@pytest.mark.parametrize("i", [0, 5, 30])
def test_computed_from_the_answers_they_are_the_same(curve, i):
    stored, computed = curve.point(i, curve.asked), curve.computed(i, curve.asked)
    for name in "kept", "accuracy", "low", "high":
        assert getattr(computed, name) == pytest.approx(getattr(stored, name), abs=1e-12)
    assert computed.questions == stored.questions


@pytest.mark.parametrize("kind", ["sign", "exists"])
def test_of_one_kind_accuracy_is_that_of_the_file(curve, kind):
    for point, row in zip(curve.points(["coreset"], [kind]), curve.rows, strict=False):
        assert point.accuracy == pytest.approx(row["accuracy_by_kind"][kind])
        assert point.kept == pytest.approx(row["kept_by_kind"][kind])
        assert point.low <= point.accuracy <= point.high and 200 < point.questions < 250


def test_some_kinds_are_scored_as_evaluate_scores_them(curve):
    """The rows of an exam of two kinds alone, made of the same answers."""
    kinds = ["sign", "count"]
    exam, full, right = [], [], []
    answers = (curve.rows[i]["right"].split() for i in (0, 6))
    for image, base, row in zip(curve.kinds(), *answers, strict=True):
        places = [j for j, kind in enumerate(image) if kind in kinds]
        if places:
            questions = [SimpleNamespace(kind=image[j], answer="") for j in places]
            exam.append((SimpleNamespace(rows=1, columns=1), questions))
            full.append([base[j] == "1" for j in places])
            right.append([row[j] == "1" for j in places])
    zeros = [[0.0] * len(answers) for answers in right]
    records = [{"right": answers, "kept": none, "early": none, "wrong_yes": none, "steps": 1, "prefill_ms": 0,
                "image_kv_bytes": 0, "image_kv_stored": 0, "decode_ms": 0}
               for answers, none in zip(right, zeros, strict=True)]
    expected = row_figures(records, full, exam)
    point = curve.computed(6, kinds)
    assert [point.accuracy, point.low, point.high] == pytest.approx(
        [expected["accuracy"], expected["low"], expected["high"]])


def test_no_kind_is_refused(curve):
    for kinds in [], ["no such kind"]:
        with refused("choose at least one kind"):
            curve.points(curve.methods, kinds)
    with refused("choose at least one kind"):
        read(*files()[SETTINGS["exists"]]).points(["mint"], ["sign"])


# ----- the drawing


def test_the_chart_has_a_line_for_each_method_and_the_full_model(curve):
    points = curve.points(["coreset", "spatial"], [*KINDS])
    made = chart(points, curve.methods)
    values = made["data"]["values"]
    assert len(values) == 12 and {value["method"] for value in values} == {"coreset", "spatial"}
    assert values[4]["wrong"] == pytest.approx(100 - 95.1)
    assert values[4]["kept"] == pytest.approx(5.2, abs=0.05)
    assert all(value["high"] <= value["wrong"] <= value["low"] for value in values)
    rule, band, lines = made["layer"]
    assert rule["data"]["values"] == [{"wrong": pytest.approx(2.5), "words": "full model 97.5 %"}]
    assert (band["encoding"]["y"]["field"], band["encoding"]["y2"]["field"]) == ("low", "high")
    assert lines["encoding"]["color"]["legend"]["values"] == ["coreset", "spatial"]
    json.dumps(made, allow_nan=False)


def test_a_method_keeps_its_colour_whatever_else_is_shown(curve):
    both, one = (chart(curve.points(methods, ["sign"]), curve.methods)["layer"][2]["encoding"]["color"]
                 for methods in (["coreset", "spatial"], ["spatial"]))
    both, one = both["scale"], one["scale"]
    assert both == one and both["domain"] == curve.methods
    assert len(set(both["range"])) == len(curve.methods)


def test_no_two_methods_of_a_file_look_alike():
    most = max(len(read(*paths).methods) for paths in files().values())
    looks = {(PALETTE[i % len(PALETTE)], MARKS[i % len(MARKS)], DASHES[i % len(DASHES)][0],
              len(DASHES[i % len(DASHES)])) for i in range(most)}
    assert len(looks) == most


def test_the_chart_loads_nothing_and_offers_no_way_out(curve):
    made = chart(curve.points(curve.methods, [*KINDS]), curve.methods)
    schema = made.pop("$schema")
    assert schema.startswith("https://vega.github.io/schema/")         # a name, which nobody fetches
    assert "://" not in json.dumps(made) and made["usermeta"]["embedOptions"] == {"actions": False}


def test_of_no_method_there_is_the_full_model_alone(curve):
    points = curve.points([], [*KINDS])
    assert chart(points, curve.methods)["data"]["values"] == [] and len(table(points)) == 1


def test_the_table_has_a_line_for_each_point(curve):
    lines = table(curve.points(["coreset"], [*KINDS]))
    assert all(len(line) == len(HEAD) for line in lines)
    assert lines[0] == ["full model", 1.0, 100.0, 97.5, "97.5 to 97.5", 2000, "138 kB"]
    assert lines[5] == ["coreset", 0.05, 5.2, 95.1, "94.3 to 95.9", 2000, "7.07 kB"]
