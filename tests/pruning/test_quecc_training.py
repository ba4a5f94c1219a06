"""Training QueCC's compressors, what the command writes, and the compressors of the bundled checkpoint."""
import json
import math
import sys
from argparse import Namespace

import pytest
import torch
from helpers import noise
from quecc_by_hand import tiles
from torch import Tensor

from generate import Assistant, generate
from pruning import Pruner
from pruning.methods import quecc
from pruning.methods.quecc import QueCC, compress, load_compressor
from scenes import train_quecc
from scenes.draw import draw, make_scene
from scenes.train_quecc import Lesson, Questions, Student, examine, resume, train
from weights import LEARNED, load_model
from weights.tokenizer import messages


@pytest.fixture(scope="module")
def bundled():
    """The bundled model, and questions to it."""
    model = load_model("tiny").requires_grad_(False)
    return model, Questions("tiny", model, 4, 2)


def test_right_is_what_greedy_answers_are(bundled):
    """To the letter, from the whole image and from averages of few tokens."""
    model, questions = bundled
    assistant, marks = Assistant("tiny"), []
    lesson = Lesson(model, questions, "test", 0, 0)
    starts = (lesson.said.int().argmax(1) + 1).tolist()
    prompts = [ids[:start] for ids, start in zip(lesson.ids.tolist(), starts, strict=True)]
    for pruner in Pruner(), QueCC(0.03, "pool"):
        image = lesson.image if pruner.keeps_all else compress(lesson.image, 7)
        answer = generate(model, prompts, lesson.image, 40, assistant.tokenizer.stop_ids, pruner=pruner)
        expected = [[t for t in targets if t >= 0][:-1] for targets in lesson.targets.tolist()]
        right = [said == meant for said, meant in zip(answer.tokens, expected, strict=True)]
        assert lesson.right(image) == right
        marks += right
    assert set(marks) == {True, False}


def test_training_lowers_the_loss_and_goes_on_where_it_stopped(bundled, tmp_path, monkeypatch):
    model, questions = bundled
    monkeypatch.setattr(train_quecc, "SAVE_EVERY", 2)
    monkeypatch.setattr(train_quecc, "LOG_EVERY", 1)
    lesson = Lesson(model, questions, "train", 0, 0)        # the same all the time: few steps show something
    monkeypatch.setattr(train_quecc, "Lesson", lambda *arguments: lesson)

    def run(folder: str, *stops: int) -> dict[str, Tensor]:
        for stop in stops:
            torch.manual_seed(0)
            students = [Student(model, 2, 4)]
            args = Namespace(run=tmp_path / folder, out=tmp_path / folder, steps=stop, images=4, seed=0)
            train(model, questions, students, args)
        return students[0].compressor.state_dict()
    once, again = run("once", 4), run("twice", 2, 4)
    assert all(torch.equal(tensor, again[name]) for name, tensor in once.items())
    rows = [line.split(",") for line in (tmp_path / "twice" / "log.csv").read_text().splitlines()]
    assert rows[0] == ["step", "minutes", "kl_4"] and [row[0] for row in rows[1:]] == list("1234")
    assert float(rows[-1][2]) < float(rows[1][2])
    kept = load_compressor(tmp_path / "twice" / "quecc_4.safetensors", torch.device("cpu"))
    assert all(torch.equal(kept.state_dict()[name], tensor.bfloat16().float())
               for name, tensor in once.items())
    assert resume([Student(model, 2, 4)], tmp_path / "twice" / "state.pt")[0] == 4


def test_the_command(tmp_path, monkeypatch, capsys):
    """One step for a grid that the bundled weights lack; the pruner takes what it writes."""
    options = {"out": tmp_path, "run": tmp_path / "run", "grids": 3, "steps": 1, "images": 2,
               "questions": 1, "exam": 4}
    monkeypatch.setattr(sys, "argv", ["train_quecc", *(str(part) for name, value in options.items()
                                                      for part in (f"--{name}", value))])
    train_quecc.main()
    figures = json.loads((tmp_path / "quecc.json").read_text())
    assert figures["questions"] == 4 and set(figures["accuracy"]) == {"whole", "pool_9", "trained_9"}
    assert json.loads(capsys.readouterr().out) == figures["accuracy"]
    monkeypatch.setattr(sys, "argv", ["train_quecc", "--grids", "4", "5"])
    with pytest.raises(SystemExit, match="--grids 4 5: choose among 1, 2, 3, 4, 7"):
        train_quecc.main()
    image = tiles(7, [2], states=384, width=160)
    image.states.entering = image.states.features[..., :128]
    monkeypatch.setattr(quecc, "question_states", lambda model, prompts: noise(1, 160))
    pruner = QueCC(0.5, str(tmp_path))
    pruner.begin(None)
    new = pruner.encoded(image, [[1]])
    assert new.features.shape == (1, 20, 160)


def test_the_bundled_weights(bundled):
    """Small, in bf16, of both grids; better than averages on scenes that were not trained on."""
    model, questions = bundled
    paths = {grid: LEARNED / f"quecc_{grid ** 2}.safetensors" for grid in (4, 2)}
    assert sum(path.stat().st_size for path in paths.values()) < 1.2e6
    lessons = (Lesson(model, questions, "test", first, 1) for first in range(0, 16, 4))
    found = examine(model, lessons, {grid: (math.ceil(7 / grid), path) for grid, path in paths.items()})
    assert found["questions"] == 32
    figures = json.loads((LEARNED / "quecc.json").read_text())["accuracy"]
    assert set(found["accuracy"]) == set(figures) == {"whole", "pool_16", "trained_16", "pool_4", "trained_4"}
    assert figures["trained_16"] > figures["pool_16"] and figures["trained_4"] > figures["pool_4"]
    assert found["accuracy"]["trained_4"] > found["accuracy"]["pool_4"]
    assert found["accuracy"]["trained_16"] >= 0.8


def test_an_answer_from_17_tokens_a_tile():
    assistant, scene = Assistant("tiny"), make_scene("test", 3, (2, 2))
    pruner = QueCC()
    image = assistant.encode_images([draw(scene)], pruner)
    answer = assistant.answer([messages("Is there a sign?", 1)], image, 8, pruner=pruner)
    assert answer.kept == [[4 * 17.0] * 3] and image.real == 200
    assert assistant.tokenizer.decode(answer.tokens[0]) == ("no" if scene.sign is None else "yes")
