"""The exam is fair and repeatable, the bundled checkpoint passes a part of it, and bad input is one line."""
import json
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from sweeps import MINE, evaluate_command

import evaluate
import generate
from evaluation.exam import make_exam
from evaluation.layers import close_gates, cross_layers, gates
from evaluation.scoring import Score, full_score
from model.image_tokens import ImageTokens
from scenes.draw import RATIOS, split_of
from scenes.questions import KINDS


@pytest.fixture(scope="module")
def assistant():
    return generate.Assistant("tiny")


@pytest.fixture
def run(monkeypatch, capsys):
    return evaluate_command(monkeypatch, capsys)


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


def test_validation_scenes_are_other_scenes():
    exam = make_exam(30, "validation")
    assert {split_of(scene) for scene, _ in exam} == {"validation"}
    assert not any(scene in [other for other, _ in make_exam(30)] for scene, _ in exam)


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


def test_split(run, tmp_path):
    """The scenes are those of the split; it is stored, and printed where they are not test scenes."""
    out = tmp_path / "out.json"
    asked, original = [], evaluate.examine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "examine", lambda assistant, scene, *rest: (
            asked.append(split_of(scene)), original(assistant, scene, *rest))[1])
        texts = [run("--questions", 3, "--json", out, *split).out for split in
                 ([], ["--split", "test"], ["--split", "val"])]
    made = json.loads(out.read_text())
    assert asked == ["test", "test", "validation"]
    assert made["split"] == made["settings"]["split"] == "validation"
    assert texts[0] == texts[1] and "of all 3\n" in texts[0]
    assert "of all 3 about validation scenes\n" in texts[2]


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


# ----- settings and progress


def test_other_weights_are_other_settings(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    seen = {evaluate.fingerprint(tmp_path)}
    for content in b"1234", b"1235":
        (tmp_path / "model.safetensors").write_bytes(content)
        seen.add(evaluate.fingerprint(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    assert len(seen | {evaluate.fingerprint(tmp_path)}) == 4


def test_another_revision_is_another_setting_and_none_is_as_it_always_was(monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "find_base", lambda *given: asked.append(given[1]))
    monkeypatch.setattr(evaluate, "fingerprint", lambda folder: 1)
    settings = []
    for more in [], ["--revision", "v2"]:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", "some/model", *more])
        settings.append(evaluate.settings_of(evaluate.arguments(), []))
    assert asked == [None, "v2"]
    assert settings[1] == settings[0] | {"revision": "v2"} and "revision" not in settings[0]


def test_progress_counts_the_images_of_this_run_and_of_those_before(assistant, monkeypatch):
    reported = []

    class Recorded(evaluate.Progress):
        def __call__(self, done: int, total: int):
            reported.append((self.what, done, total))

    monkeypatch.setattr(evaluate, "Progress", Recorded)
    exam = make_exam(6)
    records = evaluate.evaluate(assistant, exam)
    assert reported == [("images", done, 2) for done in range(3)]
    reported.clear()
    store = SimpleNamespace(records=records[:1], add=lambda record: None)
    assert len(evaluate.evaluate(assistant, exam, store=store)) == 2
    assert reported == [("images", done, 2) for done in (1, 2)]


# ----- bad input


@pytest.mark.parametrize(("argv", "words"), [
    (["--questions", "0"], "at least 1"), (["--blur", "-1"], "0 or more pixels"),
    (["--jobs", "0"], "--jobs is 0, but must be at least 1"), (["--jobs", "257"], "at most 256"),
    (["--jobs", "two"], "'two' is not a whole number"),
    (["--split", "train"], "invalid choice: 'train'"), (["--split", ""], "invalid choice"),
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
    (["--prune", "frob"], "choose one of none, "), (["--prune", "random,"], "no pruning method"),
    (["--prune", "no.py:Mine"], "no such file"), (["--skip-layer", "0", "--prune", "none"], "full model"),
    (["--keep", "0.5"], "--prune"), (["--set", "random.seed=1"], "--prune"),
    (["--prune", "random", "--keep", "0"], "keep is 0"), (["--prune", "none", "--keep", "0"], "keep is 0"),
    (["--prune", "random", "--keep", "0.5,abc"], "keep is 'abc'"),
    (["--prune", "random", "--keep", "1.5"], "is 1.5"), (["--prune", "random", "--keep", ""], "keep is ''"),
    (["--prune", "downsample", "--keep", "100"], "fraction"),
    (["--prune", "random", "--set", "nonsense"], "option=value"),
    (["--prune", "random,spatial", "--set", "frob=1"], "none of random, spatial has this option"),
    (["--prune", "random", "--set", "keep=1"], "--keep is for all"),
    (["--prune", "random:keep=1"], "--keep is for all"), (["--prune", "random:frob=1"], "no option 'frob'"),
    (["--prune", "random:seed"], "no pruning method 'random:seed'"),
    (["--prune", "random:seed=x"], "whole number"), (["--prune", ":seed=1"], "no pruning method ''"),
    (["--prune", "random,random:seed=0"], "random is there twice with the same options"),
    (["--prune", "random:seed=1,random", "--set", "seed=1"], "random is there twice"),
    (["--prune", "no.py:Mine:seed=1"], "no.py: no such file"),
    (["--prune", "random", "--set", "fastv.rows=all"], "of random"),
    (["--prune", "random", "--set", "random.keep=1"], "--keep is for all"),
    (["--prune", "random", "--set", "random.frob=1"], "no option 'frob'"),
    (["--prune", "random", "--set", "random.seed=x"], "whole number"),
    (["--prune", "random", "--plot", "x.jpeg"], "must end in .png, .svg, .pdf"),
    (["--prune", "random", "--plot", "/nonexistent/x.png"], "no folder /nonexistent"),
    (["--prune", "none", "--plot", "x.png"], "at least one"), (["--plot", "x.png"], "at least one"),
])
def test_bad_sweeps_are_refused_before_anything_is_loaded(run, capsys, monkeypatch, argv, words):
    monkeypatch.setattr(evaluate, "find_base", None)
    test_bad_input_is_one_line(run, capsys, argv, words)


def test_two_methods_of_one_name_are_refused(run, capsys, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "yours.py").write_text(MINE)
    names = f"{tmp_path}/mine.py:Mine,{tmp_path}/yours.py:Mine"
    test_bad_input_is_one_line(run, capsys, ["--prune", names], "same name")


def test_a_missing_matplotlib_is_found_out_first(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(evaluate, "find_base", None)
    test_bad_input_is_one_line(run, capsys, ["--prune", "random", "--plot", "x.png"], "install -e '.[eval]'")
