"""Sweeps over pruners add up, are drawn, and say how sure they are."""
import json
from collections import Counter
from functools import partial

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from sweeps import MINE, ROWS, SWEEP, evaluate_command

import evaluate
import generate
from cli.options import labelled
from evaluation.exam import make_exam
from evaluation.plot import plot, table
from evaluation.scoring import paired_bootstrap
from pruning import METHODS, Pruner, load


@pytest.fixture(scope="module")
def assistant():
    return generate.Assistant("tiny")


@pytest.fixture
def run(monkeypatch, capsys):
    return evaluate_command(monkeypatch, capsys)


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
    with pytest.raises(TypeError):
        run(*SWEEP, "--split", "val", "--json", sweep / "out.json", "--plot", tmp_path / "again.png")


def test_figures_of_before_there_were_splits_are_of_test_scenes(sweep, run, monkeypatch, tmp_path):
    made, out = json.loads((sweep / "out.json").read_text()), tmp_path / "out.json"
    del made["split"], made["settings"]["split"]
    out.write_text(json.dumps(made))
    monkeypatch.setattr(evaluate, "Assistant", None)
    printed = run(*SWEEP, "--json", out, "--plot", tmp_path / "again.png")
    assert printed.out == (sweep / "out.txt").read_text()
    assert (tmp_path / "again.png").read_bytes() == (sweep / "out.png").read_bytes()


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


# ----- options


def test_an_option_for_all_methods_that_have_it():
    settings = ["full_layers=0", "fastv.full_layers=2", "when=boundary"]
    pruners = evaluate.plan("random,spatial,fastv,topv", "0.5,7", settings)
    assert [(p.name, p.keep, p.options_set()) for p in pruners[1:]] == [
        (name, keep, chosen) for name, chosen in (
            ("random", {"full_layers": 0, "when": "boundary"}),
            ("spatial", {"full_layers": 0, "when": "boundary"}),
            ("fastv", {"full_layers": 2, "when": "boundary"}), ("topv", {})) for keep in (0.5, 7)]


def test_a_method_with_options_of_its_own_beside_itself(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    mine = f"{tmp_path}/mine.py:Mine"
    listed = f"random,random:seed=1:full_layers=0,{mine},{mine}:option=3,random"
    pruners = evaluate.plan(listed, "0.5", ["seed=7", "random.full_layers=2"])
    assert [(p.name, p.options_set()) for p in pruners[1:]] == [
        ("random", {"full_layers": 2, "seed": 7}), ("random", {"full_layers": 0, "seed": 1}),
        ("own", {}), ("own", {"option": 3})]


def test_labels_tell_what_differs():
    assert labelled([("a", {"x": 1}), ("a", {"x": 1}), ("b", {})]) == [("a", {"x": 1})] * 2 + [("b", {})]
    assert labelled([("a", {"x": 1, "y": 2}), ("b", {"x": 1}), ("a", {"x": 1}), ("a", {"x": 1, "y": 3})]) == [
        ("a y=2", {"x": 1}), ("b", {"x": 1}), ("a", {"x": 1}), ("a y=3", {"x": 1})]


def test_variants_in_table_and_plot(sweep, tmp_path):
    made = json.loads((sweep / "out.json").read_text())
    for row, chosen in zip(made["rows"][1:], [{}, {}, {"seed": 1}, {"seed": 1}], strict=True):
        row.update(method="random", options={"full_layers": 0, **chosen})
    lines = table({**made, "split": "validation"}).splitlines()
    assert [line.split("  ")[0] for line in lines[2:6]] == ["random"] * 2 + ["random seed=1"] * 2
    assert lines[6:8] == ["random: full_layers 0", "12 questions about validation scenes"]
    drawn = legend_of({**made, "split": "validation"}, tmp_path / "out.svg")
    assert drawn == ("tiny, 12 questions about validation scenes",
                     ["full model", "random\n  full_layers 0", "random seed=1\n  full_layers 0"])


def legend_of(made, path):
    """The title and the legend that `plot` draws."""
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
        plot(made, path)
    figure = figures[0]
    return figure.axes[0].get_title(), [text.get_text() for text in figure.legends[0].get_texts()]


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
