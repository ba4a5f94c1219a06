"""The training script: what it teaches, that it resumes, and that its checkpoint loads."""
import csv
import sys

import pytest
import torch

from model.llama_vision import LlamaVision
from scenes import train
from scenes.draw import RATIOS, make_scene
from scenes.lessons import CHARACTER_LABELS, COLOUR_LABELS, SHAPE_LABELS, Lessons, patch_labels
from scenes.questions import questions
from scenes.tiny import PATCH, TILE, tiny_config, train_tokenizer, write_folder
from weights import load_model
from weights.images import ImageProcessor
from weights.tokenizer import ChatTokenizer, messages


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_folder(folder)
    return folder


@pytest.fixture(scope="module")
def lessons(folder):
    config = tiny_config()
    tokenizer = ChatTokenizer.from_folder(folder, config).tokenizer
    tokenizer.encode_special_tokens = False
    return Lessons(tokenizer, ImageProcessor.from_folder(folder, config.vision), train.LENGTH)


def test_tokenizer_is_the_same_every_time():
    assert train_tokenizer(50).to_str() == train_tokenizer(50).to_str()


def test_a_lesson_is_a_conversation_in_the_format_of_the_chat_tokenizer(lessons, folder):
    batch = lessons.batch("train", 0, 1, (1, 2), seed=3)
    tokenizer = ChatTokenizer.from_folder(folder, tiny_config())
    ids, targets = batch.input_ids[0].tolist(), batch.targets[0].tolist()
    first = next(i for i, target in enumerate(targets) if target >= 0)      # the question's last token
    asked = tokenizer.decode(ids[:first + 1])
    question = asked.removeprefix("user\n\n").removesuffix("assistant\n\n")
    assert tokenizer.encode(messages(question, 1)) == ids[:first + 1]
    scene = make_scene("train", 0, (1, 2))
    possible = {(q.text, q.answer) for seed in range(300) for q in questions(scene, seed, 7)}
    answer = tokenizer.decode([target for target in targets[first:first + 30] if target >= 0])
    assert any(question == text and answer.startswith(said) for text, said in possible)


def test_targets_are_the_next_tokens_of_answers_alone(lessons):
    batch = lessons.batch("train", 8, 4, (2, 2), seed=0)
    said = batch.targets >= 0
    assert said.any(1).all() and not said[:, 0].any()
    follows = torch.cat((batch.input_ids[:, 1:], batch.targets[:, -1:].clamp(min=0)), 1)
    assert torch.equal(batch.targets[said], follows[said])
    assert ((batch.weights > 0) == said).all()


def test_batches_repeat_and_differ(lessons):
    one, same = (lessons.batch("train", 0, 2, (3, 1), seed=1) for _ in range(2))
    other = lessons.batch("train", 2, 2, (3, 1), seed=1)
    assert torch.equal(one.input_ids, same.input_ids)
    assert torch.equal(one.tiles[0].pixels, same.tiles[0].pixels)
    assert not torch.equal(one.tiles[0].pixels, other.tiles[0].pixels)


@pytest.mark.parametrize("ratio", RATIOS)
def test_patch_labels_name_what_is_drawn_there(ratio):
    scene = next(scene for i in range(99) if len((scene := make_scene("train", i, ratio)).things) >= 2)
    labels = patch_labels(scene)
    side = TILE // PATCH
    tokens = ratio[0] * ratio[1] * (side ** 2 + 1)
    assert all(len(label) == tokens for label in labels.values())
    scale = scene.width and max(1.0, min(TILE / scene.width, TILE / scene.height))
    for thing in scene.things:
        x, y = thing.x * scale, thing.y * scale
        tile = int(y // TILE) * ratio[1] + int(x // TILE)
        coords = tile * (side ** 2 + 1) + 1 + int(y % TILE // PATCH) * side + int(x % TILE // PATCH)
        assert SHAPE_LABELS[labels["shape"][coords]] == thing.shape
        assert COLOUR_LABELS[labels["colour"][coords]] == thing.colour
        assert CHARACTER_LABELS[labels["character"][coords]] == (thing.character or "none")
        seen_y, seen_x = labels["place"][coords].tolist()
        assert abs(seen_x * scene.width - thing.x) <= PATCH / scale
        assert abs(seen_y * scene.height - thing.y) <= PATCH / scale
    classes = torch.arange(tokens) % (side ** 2 + 1) == 0
    assert not labels["shape"][classes].any()


def test_initial_state():
    model = LlamaVision(tiny_config())
    train.initialise(model)
    gates = [p for name, p in model.named_parameters() if p.shape == (1,)]
    assert all(name.endswith(("gate", "gate_attn", "gate_ffn")) == (p.shape == (1,))
               for name, p in model.named_parameters())
    assert len(gates) == 2 * 3 + 2 + 3 and all(torch.equal(p, torch.ones(1)) for p in gates)
    table = model.vision_model.gated_positional_embedding.tile_embedding.weight
    for ratio, (rows, columns) in enumerate(RATIOS, start=1):
        used = table[ratio].view(4, -1)[:rows * columns]
        assert used.any(1).all() and not table[ratio].view(4, -1)[rows * columns:].any()
    assert 3e6 <= sum(p.numel() for p in model.parameters()) <= 6e6


def run(monkeypatch, folder, steps):
    argv = ["train", "--steps", str(steps), "--images", "2", "--workers", "1",
            "--out", str(folder / "out"), "--run", str(folder / "run")]
    monkeypatch.setattr(sys, "argv", argv)
    threads = torch.get_num_threads()
    train.main()
    torch.set_num_threads(threads)
    return torch.load(folder / "run" / "state.pt", weights_only=True)


def test_training_resumes_and_leaves_a_checkpoint(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    state = run(monkeypatch, tmp_path, 2)                       # one step of vision alone, one of both
    assert state["step"] == 2
    before = state["model"]["lm_head.weight"].clone()
    state = run(monkeypatch, tmp_path, 3)
    assert state["step"] == 3 and not torch.equal(before, state["model"]["lm_head.weight"])
    assert "1 steps in" in capsys.readouterr().out
    with (tmp_path / "run" / "log.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == sorted(set(steps)) and steps[-1] == 3
    model = load_model(tmp_path / "out")
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, state["model"]["lm_head.weight"].bfloat16())
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 16e6
