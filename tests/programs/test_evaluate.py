"""The exam is fair and repeatable, and the bundled checkpoint passes a part of it; sweeps over pruners add
up, can be continued where they were stopped, and say how sure they are."""
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
from full_disk import full_disk
from PIL import Image

import evaluate
import generate
from evaluation.exam import make_exam
from evaluation.layers import close_gates, cross_layers, gates
from evaluation.plot import plot
from evaluation.scoring import Score, full_score, paired_bootstrap
from evaluation.store import Store
from model.image_tokens import ImageTokens
from pruning import METHODS, Pruner, load
from scenes.draw import RATIOS, split_of
from scenes.questions import KINDS

SWEEP = ["--questions", "12", "--prune", "random,downsample", "--keep", "0.5,0.1", "--set", "random.seed=3"]
ROWS = [["none", 1.0], ["random", 0.5], ["random", 0.1], ["downsample", 0.5], ["downsample", 0.1]]
MINE = """from dataclasses import dataclass
from pruning import Pruner
@dataclass
class Mine(Pruner):
    "Mine."
    option: int = 1
    name = "own"
"""


@pytest.fixture(scope="module")
def assistant():
    return generate.Assistant("tiny")


@pytest.fixture
def run(monkeypatch, capsys):
    """The command with these arguments: what it prints on stdout and stderr."""
    def command(*argv):
        monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, argv)])
        evaluate.main()
        return capsys.readouterr()
    return command


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A small sweep's folder, with out.json, out.png and what was printed in out.txt."""
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch, open(folder / "out.txt", "w") as out:
        files = ["--json", str(folder / "out.json"), "--plot", str(folder / "out.png")]
        patch.setattr("sys.argv", ["evaluate.py", *SWEEP, *files])
        patch.setattr("sys.stdout", out)
        evaluate.main()
    return folder


def timeless(figures):
    times = "prefill_ms", "decode_ms"
    rows = [{key: value for key, value in row.items() if key not in times} for row in figures["rows"]]
    return {**figures, "rows": rows}


# ----- the exam


def test_exam_is_balanced_held_out_and_the_same_every_time():
    exam = make_exam(450)
    assert exam == make_exam(450)
    assert sum(len(questions) for _, questions in exam) == 450
    asked = Counter(question.kind for _, questions in exam for question in questions)
    assert set(asked) == set(KINDS) and max(asked.values()) - min(asked.values()) <= 2
    ratios = Counter((scene.rows, scene.columns) for scene, _ in exam)
    assert set(ratios) == set(RATIOS) and max(ratios.values()) - min(ratios.values()) <= 1
    assert {split_of(scene) for scene, _ in exam} == {"test"}


def test_a_longer_exam_begins_with_the_shorter():
    assert make_exam(60)[:19] == make_exam(57)[:19]


def test_bundled_checkpoint_sees(assistant):
    exam = make_exam(180)
    score = full_score(exam, evaluate.evaluate(assistant, exam))
    assert score.asked["all"] == 180
    assert score.mean() > 0.9


def test_score_counts_by_kind_and_ratio():
    score = Score(Counter({"colour": 1, "where": 2}), Counter({"colour": 2, "where": 2}))
    assert score.share("colour") == 0.5 and score.mean() == 0.75
    assert score.shares(["colour", (2, 1)]) == {"colour": 0.5, "2x1": None}
    exam = make_exam(5)
    score = Score.of(exam, [[True, False, True], [True, True]])
    assert score.share("all") == 0.8 and score.share(RATIOS[0]) == 2 / 3 and score.share(RATIOS[1]) == 1


def test_closed_layer_passes_everything_on(assistant):
    model = generate.Assistant("tiny").model
    close_gates(model, 0)
    layer = cross_layers(model)[0]
    x = torch.randn(1, 3, model.config.text.hidden_size, dtype=model.lm_head.weight.dtype)
    kv = layer.cross_attn.keys_values(ImageTokens(x, torch.zeros(1, 3, 4)))
    assert torch.equal(layer(x, layer.queries(x), kv, None, None), x)
    assert gates(model)[0] == (0, 0) and gates(assistant.model)[0] != (0, 0)


def test_command_prints_and_writes_the_figures(run, tmp_path):
    out = tmp_path / "figures.json"
    printed = run("--questions", 18, "--skip-layer", 1, "--json", out).out
    figures = json.loads(out.read_text())
    assert all(kind in printed for kind in KINDS) and "gates" in printed
    assert set(figures["accuracy_by_kind"]) == set(KINDS) and figures["skipped_layer"] == 1
    assert set(figures["accuracy_by_ratio"]) == {f"{rows}x{columns}" for rows, columns in RATIOS}
    assert f"{figures['mean_over_kinds']:.1%} over kinds, {figures['accuracy']:.1%} of all 18" in printed
    assert [row["method"] for row in figures["rows"]] == ["none"] and "layer_similarity" not in figures
    assert len(figures["gates"]) == 3 and list(tmp_path.iterdir()) == [out]


# ----- a sweep


def test_rows_of_a_sweep(sweep):
    figures = json.loads((sweep / "out.json").read_text())
    rows = figures["rows"]
    assert [[row["method"], row["keep"]] for row in rows] == ROWS
    assert [row["options"] for row in rows] == [{}, {"seed": 3}, {"seed": 3}, {}, {}]
    assert all(set(row) == {"method", "keep", "options", "kept", "accuracy", "low", "high",
                            "accuracy_by_kind", "kept_by_kind", "image_kv_bytes", "image_kv_stored",
                            "prefill_ms", "decode_ms", "right", "wrong_yes", "early"}
               for row in rows)
    for row in rows:
        assert row["accuracy"] == row["right"].count("1") / 12 and row["low"] <= row["high"]
        assert row["prefill_ms"] > 0 and row["decode_ms"] > 0
        assert all(0 < kept <= 1 for kept in row["kept_by_kind"].values() if kept is not None)
    full = rows[0]
    assert full["kept"] == 1 and full["low"] == full["high"] == full["accuracy"] == figures["accuracy"]
    assert full["accuracy_by_kind"] == figures["accuracy_by_kind"]
    assert rows[1]["kept"] == pytest.approx(0.5, abs=0.01)
    assert rows[2]["kept"] == pytest.approx(0.1, abs=0.01)
    assert rows[1]["image_kv_bytes"] == pytest.approx(full["image_kv_bytes"] / 2, rel=0.02)
    assert 0.3 < rows[4]["kept"] <= rows[3]["kept"] < 0.9           # whole tiles: at least one of 1 to 4


def test_image_bytes_are_those_of_one_question(sweep, assistant):
    full = json.loads((sweep / "out.json").read_text())["rows"][0]
    exam = make_exam(12)
    expected = [assistant.model.kv_bytes(1, [(scene.rows, scene.columns)])["image"] * len(questions)
                for scene, questions in exam]
    assert full["image_kv_bytes"] == sum(expected) / 12


def test_layers_are_compared(sweep):
    figures = json.loads((sweep / "out.json").read_text())
    for name in "cosine", "top10_overlap":
        matrix = torch.tensor(figures["layer_similarity"][name])
        assert matrix.shape == (3, 3) and torch.allclose(matrix, matrix.T)
        assert torch.allclose(matrix.diagonal(), torch.ones(3))
        assert (matrix >= 0).all() and (matrix[0, 1:] < 0.999).all()


def test_table_is_aligned_and_narrow(sweep):
    lines = (sweep / "out.txt").read_text().splitlines()
    assert [line.split()[:2] for line in lines[1:6]] == [[method, str(keep)] for method, keep in ROWS]
    assert len(set(map(len, lines[:6]))) == 1 and len(lines[0]) <= 132
    assert lines[6] == "random: seed 3" and "two layers" in lines[7] and len(lines) == 8


def test_plot_is_drawn(sweep):
    with Image.open(sweep / "out.png") as image:
        assert image.size == (1200, 900)
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20


def test_plot_needs_the_rows_alone(sweep, tmp_path):
    figures = json.loads((sweep / "out.json").read_text())
    full, *rows = ({key: row[key] for key in ("method", "options", "kept", "accuracy", "low", "high")}
                   for row in figures["rows"])
    plot({"model": "x", "questions": 5, "rows": [full, *rows]}, tmp_path / "all.svg")
    plot({"model": "x", "questions": 5, "rows": [full, rows[0]]}, tmp_path / "one.pdf")
    assert (tmp_path / "all.svg").stat().st_size > 5000 and (tmp_path / "one.pdf").stat().st_size > 2000


def test_redrawing_asks_nothing(sweep, run, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "Assistant", None)
    printed = run(*SWEEP, "--json", sweep / "out.json", "--plot", tmp_path / "again.png")
    assert printed.out == (sweep / "out.txt").read_text() and "already" in printed.err
    assert (tmp_path / "again.png").read_bytes() == (sweep / "out.png").read_bytes()
    with pytest.raises(TypeError):                                          # other settings: it would ask
        run(*SWEEP, "--keep", "0.5", "--json", sweep / "out.json", "--plot", tmp_path / "again.png")


def test_only_shrunk_images_are_encoded_again_and_steps_are_counted(assistant, monkeypatch):
    calls = Counter()

    def counted(name, original, *args, **named):
        calls[name] += 1
        return original(*args, **named)

    for owner, name in (assistant, "encode_images"), (assistant, "decode"):
        monkeypatch.setattr(owner, name, partial(counted, name, getattr(owner, name)))
    scene, questions = make_exam(9)[2]
    pruners = [Pruner(), load("random", keep=20), load("downsample", keep=0.5), load("downsample", keep=1.0)]
    record = evaluate.examine(assistant, scene, questions, pruners, compare_layers=False)
    assert calls == {"encode_images": 2, "decode": sum(row["steps"] for row in record["rows"][:3])}
    assert record["rows"][3] is record["rows"][0]                       # keeps all: not asked again
    assert record["rows"][0]["kept"] == record["rows"][3]["kept"] == [1] * len(questions)
    assert record["layer_similarity"] is None


def test_every_method_at_once():
    pruners = evaluate.plan("all,random", "0.5,0.1", ["random.seed=3"])
    assert [pruner.name for pruner in pruners[1::2]] == list(METHODS)[1:]
    assert [pruner.keep for pruner in pruners[1:3]] == [0.5, 0.1]


def test_who_says_yes_to_everything_makes_things_up(run, tmp_path, monkeypatch):
    original = evaluate.row_of
    monkeypatch.setattr(evaluate, "row_of", lambda answer, encoded, texts, questions: original(
        answer, encoded, ["yes"] * len(questions), questions))
    out = run("--questions", 12, "--kinds", "exists", "--json", tmp_path / "out.json").out
    exam = make_exam(12, kinds=["exists"])
    answers = Counter(question.answer for _, questions in exam for question in questions)
    made = json.loads((tmp_path / "out.json").read_text())
    assert answers.total() == 12 and set(answers) == {"yes", "no"}
    assert made["accuracy"] == answers["yes"] / 12 and made["rows"][0]["wrong_yes"] == 1
    assert "wrong yes  100.0%" in out and "exists" in out and "colour" not in out


def test_blurred_images_are_harder(assistant):
    exam = make_exam(12, kinds=["character"])
    sharp, blurred = (evaluate.evaluate(assistant, exam, blur=blur) for blur in (0, 8))
    right = [sum(sum(record["rows"][0]["right"]) for record in records) for records in (sharp, blurred)]
    assert right[0] >= 10 and right[1] <= 6


def test_methods_of_ones_own(run, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    name = f"{tmp_path}/mine.py:Mine"
    pruners = evaluate.plan(f"none,{name}", "1.0,7", ["own.option=2"])
    assert [(p.name, p.keep) for p in pruners] == [("none", 1.0), ("own", 1.0), ("own", 7)]
    assert [p.options_set() for p in pruners] == [{}, {"option": 2}, {"option": 2}]
    out = tmp_path / "out.json"
    run("--questions", 1, "--prune", name, "--keep", 7, "--json", out)
    before = json.loads(out.read_text())
    assert [row["method"] for row in before["rows"]] == ["none", "own"]
    (tmp_path / "mine.py").write_text(MINE + "# changed\n")
    run("--questions", 1, "--prune", name, "--keep", 7, "--json", out)
    assert json.loads(out.read_text())["settings"]["files"] != before["settings"]["files"]


# ----- how sure it is


def test_paired_bootstrap_of_known_cases():
    right = ["110", "01", "111", "0"]
    assert paired_bootstrap(right, right) == (0, 0, 0)
    assert paired_bootstrap([[True] * 3, [True]], [[False] * 3, [False]]) == (1, 1, 1)
    assert paired_bootstrap(["0"] * 5, ["1"] * 5) == (-1, -1, -1)
    half = paired_bootstrap(["1"] * 50 + ["0"] * 50, ["0"] * 100)             # binomial: 0.5 +- 1.96 * 0.05
    assert half == pytest.approx((0.5, 0.402, 0.598), abs=0.02)
    assert half == paired_bootstrap(["1"] * 50 + ["0"] * 50, ["0"] * 100)


def test_paired_bootstrap_draws_images_not_questions():
    """Two images, right throughout and wrong throughout: a quarter of the draws has only the one."""
    assert paired_bootstrap(["1" * 30, "0" * 30], ["0" * 30, "0" * 30]) == (0.5, 0, 1)


def test_only_the_same_questions_are_compared():
    for other in ["11"], ["1", "11"], []:
        with pytest.raises(ValueError, match="same questions"):
            paired_bootstrap(["11", "1"], other)
    with pytest.raises(ValueError, match="same questions"):
        paired_bootstrap([], [])


# ----- stopping and going on


def test_a_stopped_sweep_goes_on_where_it_was(sweep, run, monkeypatch, tmp_path):
    out, part, original, asked = tmp_path / "out.json", tmp_path / "out.json.part", evaluate.examine, []

    def interrupted(assistant, scene, *rest):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(scene)
        return original(assistant, scene, *rest)

    monkeypatch.setattr(evaluate, "examine", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(*SWEEP, "--json", out)
    assert stop.value.code == 130 and not out.exists()
    assert part.read_bytes().count(b'{"number": ') == 2
    with open(part, "ab") as file:
        file.write(b'{"rows": [{"right": [tr')                               # killed while it wrote

    def counted(assistant, scene, *rest):
        asked.append(scene)
        return original(assistant, scene, *rest)

    monkeypatch.setattr(evaluate, "examine", counted)
    run(*SWEEP, "--json", out)
    assert asked == [scene for scene, _ in make_exam(12)]
    expected = json.loads((sweep / "out.json").read_text())
    assert timeless(json.loads(out.read_text())) == timeless(expected)
    assert list(tmp_path.iterdir()) == [out]


def test_partial_results_of_another_run_are_refused(run, capsys, monkeypatch, tmp_path):
    part = tmp_path / "out.json.part"
    with Store(tmp_path / "out.json", {"other": 1}) as store:
        store.add({"rows": []})
    before = part.read_bytes()
    monkeypatch.setattr(evaluate, "Assistant", None)
    with pytest.raises(SystemExit) as stop:
        run(*SWEEP, "--json", tmp_path / "out.json")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "delete this file" in error
    assert part.read_bytes() == before


def test_store(sweep, tmp_path):
    path, part = tmp_path / "x.json", tmp_path / "x.json.part"
    figures = json.loads((sweep / "out.json").read_text())
    settings = {"keep": 1.0, **figures["settings"]}
    store = Store(path, settings)
    with store:
        assert store.records == [] and part.exists()
    assert store.finished() is None and not part.exists()                   # nothing was done
    part.write_bytes(b'{"ke')                                               # not even the header is complete
    with store:
        assert store.records == []
        for record in {"a": 1}, {"a": 2}:
            store.add(record)
    for _ in range(2):
        with store:
            assert store.records == [{"a": 1}, {"a": 2}]
    for other in {**settings, "keep": 1}, {**settings, "keep": 0.5}:        # 1 is one token, 1.0 all of them
        with pytest.raises(ValueError, match="other settings"), Store(path, other):
            pass
    path.write_text("[]")
    assert store.finished() is None
    with store:
        store.finish({**figures, "settings": settings})
    assert list(tmp_path.iterdir()) == [path] and store.finished()["rows"] == figures["rows"]
    assert Store(path, {**settings, "keep": 1}).finished() is None
    with store:
        store.add({"a": 3})
    assert store.finished() is None                                         # begun anew
    part.write_bytes(part.read_bytes() + b"nonsense\n")
    with pytest.raises(ValueError, match="damaged"), store:
        pass


@pytest.fixture(scope="module")
def complete(tmp_path_factory, assistant) -> bytes:
    """FILE.part of the sweep when all images are done."""
    out = tmp_path_factory.mktemp("part") / "out.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["evaluate.py", *SWEEP, "--json", str(out)])
        patch.setattr(evaluate, "Assistant", lambda *_: assistant)
        patch.setattr(evaluate, "figures", lambda *_: next(iter(())))
        with pytest.raises(StopIteration):
            evaluate.main()
    return out.with_name("out.json.part").read_bytes()


def refused(run, capsys, *argv) -> str:
    """The one line that the command says."""
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_a_second_run_on_the_same_file_is_refused(run, capsys, monkeypatch, tmp_path):
    out = tmp_path / "out.json"
    monkeypatch.setattr(evaluate, "Assistant", None)
    with Store(out, {}) as store:
        store.add({"rows": []})
        before = store.part.read_bytes()
        error = refused(run, capsys, *SWEEP, "--json", out)
        assert f"process {os.getpid()} on " in error and "is writing it; wait" in error
        assert store.part.read_bytes() == before
    with Store(out, {}) as store:                                           # and now it is free
        assert store.records == [{"rows": []}]


def test_two_runs_without_locks_do_not_mix_their_records(monkeypatch, tmp_path):
    """As on Windows: the numbers show it."""
    monkeypatch.setattr("evaluation.store.fcntl", None)
    first, second = Store(tmp_path / "x.json", {}), Store(tmp_path / "x.json", {})
    with first, second:
        for store in first, second:
            store.add({"a": 0})
    with pytest.raises(ValueError, match="damaged .record 1 is not where it should be.; delete"), first:
        pass


def edited(record: int, change: Callable[[dict], object]) -> Callable[[list[bytes]], list[bytes]]:
    """Lines of FILE.part in which one record was changed."""
    def edit(lines: list[bytes]) -> list[bytes]:
        content = json.loads(lines[2 + record])
        change(content)
        return [*lines[:2 + record], json.dumps(content).encode(), *lines[3 + record:]]
    return edit


def first_row(**values: object) -> Callable[[list[bytes]], list[bytes]]:
    return edited(1, lambda record: record["rows"][0].update(values))


DEEP = b"[" * 100000
DAMAGES = {
    **{f"a line {line[:9]!r}": (lambda lines, line=line: [*lines, line])
       for line in (b"5", b"null", b"NaN", b"[]", b"{}", b"", b'"x"', b"\xff\xfe", DEEP, b"1" * 5000, b"{{")},
    "a line cut off": lambda lines: [*lines[:3], lines[3][:50], *lines[4:]],
    "a record twice": lambda lines: [*lines[:4], lines[3], *lines[4:]],
    "a record left out": lambda lines: [*lines[:3], *lines[4:]],
    "records of another run": lambda lines: [*lines[:2], *lines[4:]],
    "too many records": lambda lines: [*lines, json.dumps({**json.loads(lines[-1]), "number": 4}).encode()],
    "no rows": edited(0, lambda record: record.pop("rows")),
    "rows of another shape": edited(0, lambda record: record.update(rows={})),
    "a row too few": edited(0, lambda record: record["rows"].pop()),
    "a row that is none": edited(0, lambda record: record["rows"].insert(0, record["rows"].pop() and 5)),
    "an answer too many": edited(2, lambda record: record["rows"][1]["right"].append(True)),
    "answers that are numbers": first_row(right=[1, 0, 1]),
    "answers that are words": first_row(wrong_yes=["no", "no", "no"]),
    "answers that are none": first_row(early=None),
    "kept that is no number": first_row(kept=[float("nan")] * 3),
    "kept that is too large": first_row(kept=[10 ** 400] * 3),
    "kept below 0": first_row(kept=[-1.0] * 3),
    "bytes that are a word": first_row(image_kv_bytes="many"),
    "a time that is none": first_row(prefill_ms=None),
    "a time that is infinite": first_row(decode_ms=float("inf")),
    "steps below 0": first_row(steps=-1),
    "no similarity": edited(0, lambda record: record.update(layer_similarity=None)),
    "similarity of two layers": edited(0, lambda record: record.update(
        layer_similarity={"cosine": [[1, 1], [1, 1]], "top10_overlap": [[1, 1], [1, 1]]})),
    "similarity of another shape": edited(0, lambda record: record.update(
        layer_similarity={"cosine": [[1, 1, 1], [1], [1]], "top10_overlap": [5, 5, 5]})),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_one_line(run, capsys, monkeypatch, assistant, complete, tmp_path, damage):
    part = tmp_path / "out.json.part"
    damaged = b"\n".join([*DAMAGES[damage](complete.split(b"\n")[:-1]), b""])
    part.write_bytes(damaged)
    monkeypatch.setattr(evaluate, "Assistant", lambda *_: assistant)
    error = refused(run, capsys, *SWEEP, "--json", tmp_path / "out.json")
    assert "out.json.part: damaged (" in error and "delete this file" in error and len(error) < 600
    assert part.read_bytes().startswith(damaged) and list(tmp_path.iterdir()) == [part]


def test_a_part_with_all_records_asks_nothing(sweep, run, monkeypatch, assistant, complete, tmp_path):
    (tmp_path / "out.json.part").write_bytes(complete)
    monkeypatch.setattr(evaluate, "Assistant", lambda *_: assistant)
    monkeypatch.setattr(evaluate, "examine", None)
    run(*SWEEP, "--json", tmp_path / "out.json")
    expected = json.loads((sweep / "out.json").read_text())
    assert timeless(json.loads((tmp_path / "out.json").read_text())) == timeless(expected)


@pytest.mark.parametrize("content", ["5", "{}", "null", "NaN", "[]", "", "{", "[" * 100000, "1" * 5000,
                                     '{"settings": 5}', "caf\udce9"], ids=len)
def test_what_holds_no_figures_is_replaced(sweep, tmp_path, content):
    out = tmp_path / "out.json"
    out.write_bytes(content.encode(errors="surrogateescape"))
    settings = json.loads((sweep / "out.json").read_text())["settings"]
    assert Store(out, settings).finished() is None
    with Store(out, settings) as store:
        store.finish({"settings": settings})
    assert json.loads(out.read_text()) == {"settings": settings}


@pytest.mark.parametrize("damage", [
    {"rows": 5}, {"rows": []}, {"rows": [5]}, {"rows": [{}]}, {"rows": None}, {"questions": None},
    {"model": 5}, {"layer_similarity": 5}, {"layer_similarity": {"cosine": [[1, 2]], "top10_overlap": [[1]]}},
    {"row": {"kept": float("nan")}}, {"row": {"accuracy": None}}, {"row": {"accuracy_by_kind": {}}},
    {"row": {"options": []}}, {"row": {"low": "x"}}, {"row": {"method": None}},
    {"row": {"prefill_ms": 10 ** 400}}, {"row": {"wrong_yes": "all"}}], ids=str)
def test_damaged_figures_are_one_line(sweep, run, capsys, tmp_path, damage):
    figures = json.loads((sweep / "out.json").read_text())
    figures["rows"][1].update(damage.pop("row", {}))
    (tmp_path / "out.json").write_text(json.dumps({**figures, **damage}))
    error = refused(run, capsys, *SWEEP, "--json", tmp_path / "out.json", "--plot", tmp_path / "out.png")
    assert "out.json: the figures are damaged; delete this file to ask again" in error
    assert list(tmp_path.iterdir()) == [tmp_path / "out.json"]


def test_a_full_disk_leaves_what_was_there(sweep, run, capsys, monkeypatch, assistant, complete, tmp_path):
    """While the answers are written, and the drawing; the same command goes on afterwards."""
    out, drawing = tmp_path / "out.json", tmp_path / "out.png"
    out.write_text("the old figures")
    drawing.write_text("the old drawing")
    monkeypatch.setattr(evaluate, "Assistant", lambda *_: assistant)
    command = *SWEEP, "--json", out, "--plot", drawing
    with full_disk(3000):
        error = refused(run, capsys, *command)
    assert "out.json.part: cannot be written" in error and "the same command goes on from here" in error
    assert out.read_text() == "the old figures" and drawing.read_text() == "the old drawing"
    run(*command)
    expected = json.loads((sweep / "out.json").read_text())
    assert timeless(json.loads(out.read_text())) == timeless(expected)
    drawing.write_text("the old drawing")
    with full_disk(1000), pytest.raises(SystemExit):
        run(*command)
    assert "out.png: cannot be written" in capsys.readouterr().err
    assert drawing.read_text() == "the old drawing" and sorted(tmp_path.iterdir()) == [out, drawing]


def test_a_full_disk_at_the_end_leaves_the_answers(tmp_path):
    store = Store(tmp_path / "x.json", {})
    store.path.write_text("the old figures")
    with pytest.raises(OSError), store:
        store.add({"a": 1})
        with full_disk(1000):
            store.finish({"rows": [0] * 1000})
    assert store.path.read_text() == "the old figures" and set(tmp_path.iterdir()) == {store.path, store.part}
    with store:
        assert store.records == [{"a": 1}]


def test_other_weights_are_other_settings(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    seen = {evaluate.fingerprint(tmp_path)}
    for content in b"1234", b"1235":
        (tmp_path / "model.safetensors").write_bytes(content)
        seen.add(evaluate.fingerprint(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    assert len(seen | {evaluate.fingerprint(tmp_path)}) == 4


def test_progress_says_how_long_it_takes():
    first = evaluate.progress_line(3, 10, 20.0)
    assert first.startswith(f"[{'=' * 9}{' ' * 21}] 3/10 images, 2:20 left")
    assert "5 h 33 min left" in evaluate.progress_line(10, 20000, 1.0)


def test_progress_is_one_line_on_a_terminal_alone(assistant, monkeypatch, capsys):
    exam = make_exam(6)
    evaluate.evaluate(assistant, exam)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    evaluate.evaluate(assistant, exam)
    _, first, last = capsys.readouterr().err.split("\r")
    assert "1/2 images" in first and "2/2 images, 0:00 left" in last
    assert last.endswith("\n") and "\n" not in first


# ----- bad input


@pytest.mark.parametrize(("argv", "words"), [
    (["--questions", "0"], "at least 1"), (["--blur", "-1"], "0 or more pixels"),
    (["--kinds", "taste"], "no question is of kind 'taste'"),
    (["--skip-layer", "9"], "cross-attention layers 0 to 2"),
    (["--model", "nowhere"], "neither"), (["--frobnicate"], "unrecognized"),
    (["--questions", "1", "--json", "/nonexistent/x.json"], "no folder /nonexistent"),
    (["--json", "."], "not a file"),
])
def test_bad_input_is_one_line(run, capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and words in error


@pytest.mark.parametrize(("argv", "words"), [
    (["--prune", "frob"], "choose one of none, trimmed_llama"), (["--prune", "random,"], "no pruning method"),
    (["--prune", "no.py:Mine"], "no such file"), (["--skip-layer", "0", "--prune", "none"], "full model"),
    (["--keep", "0.5"], "--prune"), (["--set", "random.seed=1"], "--prune"),
    (["--prune", "random", "--keep", "0"], "keep is 0"), (["--prune", "none", "--keep", "0"], "keep is 0"),
    (["--prune", "random", "--keep", "0.5,abc"], "keep is 'abc'"),
    (["--prune", "random", "--keep", "1.5"], "is 1.5"), (["--prune", "random", "--keep", ""], "keep is ''"),
    (["--prune", "downsample", "--keep", "100"], "fraction"),
    (["--prune", "random", "--set", "nonsense"], "option=value"),
    (["--prune", "random", "--set", "seed=1"], "method.option=value"),
    (["--prune", "random", "--set", "fastv.rows=all"], "of random"),
    (["--prune", "random", "--set", "random.keep=1"], "--keep is for all"),
    (["--prune", "random", "--set", "random.frob=1"], "no option 'frob'"),
    (["--prune", "random", "--set", "random.seed=x"], "whole number"),
    (["--prune", "random", "--plot", "x.jpeg"], "must end in .png, .svg, .pdf"),
    (["--prune", "random", "--plot", "/nonexistent/x.png"], "no folder /nonexistent"),
    (["--prune", "none", "--plot", "x.png"], "at least one"), (["--plot", "x.png"], "at least one"),
])
def test_bad_sweeps_are_refused_before_anything_is_loaded(run, capsys, monkeypatch, argv, words):
    monkeypatch.setattr(evaluate, "find_checkpoint", None)
    test_bad_input_is_one_line(run, capsys, argv, words)


def test_two_methods_of_one_name_are_refused(run, capsys, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "yours.py").write_text(MINE)
    names = f"{tmp_path}/mine.py:Mine,{tmp_path}/yours.py:Mine"
    test_bad_input_is_one_line(run, capsys, ["--prune", names], "same name")


def test_a_missing_matplotlib_is_found_out_first(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(evaluate, "find_checkpoint", None)
    test_bad_input_is_one_line(run, capsys, ["--prune", "random", "--plot", "x.png"], "install -e '.[eval]'")
