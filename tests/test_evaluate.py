"""The exam is fair, repeatable, and the bundled checkpoint passes a part of it."""
import json
from collections import Counter

import pytest
import torch

import evaluate
import generate
from scenes.draw import RATIOS, split_of
from scenes.questions import KINDS


@pytest.fixture(scope="module")
def assistant():
    return generate.Assistant("tiny")


def test_exam_is_balanced_held_out_and_the_same_every_time():
    papers = evaluate.exam(450)
    assert papers == evaluate.exam(450)
    assert sum(len(questions) for _, questions in papers) == 450
    asked = Counter(question.kind for _, questions in papers for question in questions)
    assert set(asked) == set(KINDS) and max(asked.values()) - min(asked.values()) <= 2
    ratios = Counter((scene.rows, scene.columns) for scene, _ in papers)
    assert set(ratios) == set(RATIOS) and max(ratios.values()) - min(ratios.values()) <= 1
    assert {split_of(scene) for scene, _ in papers} == {"test"}


def test_a_longer_exam_begins_with_the_shorter():
    assert evaluate.exam(60)[:19] == evaluate.exam(57)[:19]


def test_bundled_checkpoint_sees(assistant):
    score = evaluate.evaluate(assistant, evaluate.exam(180))
    assert score.asked["all"] == 180
    assert score.mean() > 0.7


def test_score_counts_by_kind_and_ratio():
    score = evaluate.Score(Counter({"colour": 1, "where": 2}), Counter({"colour": 2, "where": 2}))
    assert score.share("colour") == 0.5 and score.mean() == 0.75


def test_closed_layer_passes_everything_on(assistant):
    model = generate.Assistant("tiny").model
    evaluate.close(model, 0)
    layer = evaluate.cross_layers(model)[0]
    x = torch.randn(1, 3, model.config.text.hidden_size, dtype=model.lm_head.weight.dtype)
    kv = layer.cross_attn.keys_values(x)
    assert torch.equal(layer(x, kv, evaluate_sight()), x)
    assert evaluate.gates(model)[0] == (0, 0) and evaluate.gates(assistant.model)[0] != (0, 0)


def evaluate_sight():
    from model.decoder import Sight
    return Sight(0, None, None)


def test_command_prints_and_writes_the_figures(monkeypatch, capsys, tmp_path):
    out = tmp_path / "figures.json"
    argv = ["evaluate.py", "--questions", "18", "--skip-layer", "1", "--json", str(out)]
    monkeypatch.setattr("sys.argv", argv)
    evaluate.main()
    printed = capsys.readouterr().out
    figures = json.loads(out.read_text())
    assert all(kind in printed for kind in KINDS) and "gates" in printed
    assert set(figures["accuracy_by_kind"]) == set(KINDS) and figures["skipped_layer"] == 1


@pytest.mark.parametrize(("argv", "words"), [
    (["--questions", "0"], "at least 1"), (["--skip-layer", "9"], "cross-attention layers 0 to 2"),
    (["--model", "nowhere"], "neither"), (["--frobnicate"], "unrecognized"),
    (["--questions", "1", "--json", "/nonexistent/x.json"], "/nonexistent"),
])
def test_bad_input_is_one_line(monkeypatch, capsys, argv, words):
    monkeypatch.setattr("sys.argv", ["evaluate.py", *argv])
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and words in error
