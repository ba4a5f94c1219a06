"""The pointing game: the right patches, honest hits, and the figures that are stored."""
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import close, refused
from scene_helpers import scene_of, thing

from generate import Assistant
from page import pointing
from page.looks import Look, Looks
from page.pointing import Hits, measure, scenes_with_a_circle, tokens_on
from pruning import Pruner, load
from scenes.draw import RATIOS, draw
from weights.images import ImageProcessor

ROOT = Path(__file__).parents[2]
PROCESSOR = ImageProcessor(112)
STORED = json.loads((ROOT / "evaluation" / "results" / "pointing.json").read_text())


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return Assistant("tiny", device="cpu")


def test_scenes_have_one_circle_with_a_character_and_all_tile_ratios():
    found = list(scenes_with_a_circle("test", 40))
    assert {(scene.rows, scene.columns) for scene, _ in found} == {*RATIOS}
    for scene, circle in found:
        assert circle.character and [t for t in scene.things if t.shape == "circle"] == [circle]
    assert [scene for scene, _ in scenes_with_a_circle("test", 3)] == [scene for scene, _ in found[:3]]


@pytest.mark.parametrize("scene, circle", list(scenes_with_a_circle("test", 12)))
def test_the_patches_are_those_whose_pixels_the_circle_changes(scene, circle):
    """Without it, other pixels are the same."""
    without = replace(scene, things=tuple(t for t in scene.things if t is not circle))
    tiles = [PROCESSOR([draw(each)]) for each in (scene, without)]
    grid = tuple(tiles[0].grid[0].tolist())
    changed = (tiles[0].pixels[0] != tiles[1].pixels[0]).any(1)                             # [S, 112, 112]
    changed = changed.unflatten(2, (7, 16)).unflatten(1, (7, 16)).any(4).any(2)             # [S, 7, 7]
    coords = torch.tensor([[0, tile, row, column] for tile in range(grid[0] * grid[1])
                           for row in range(7) for column in range(7)])
    seen = changed[coords[:, 1], coords[:, 2], coords[:, 3]]
    smaller, larger = (tokens_on(replace(circle, radius=circle.radius + edge), scene, coords, grid, PROCESSOR)
                       for edge in (-2, 2))                     # antialiasing and resizing blur the edge
    exact = tokens_on(circle, scene, coords, grid, PROCESSOR)
    assert not (smaller & ~seen).any() and not (seen & ~larger).any()
    assert not (smaller & ~exact).any() and not (exact & ~larger).any()
    assert 4 <= exact.sum() < len(coords) / 2


def test_a_class_token_is_on_no_circle():
    circle = thing("circle", "red", 8.0, 8.0, "K")
    coords = torch.tensor([[0, 0, -1, -1], [0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 6, 6]])
    on = tokens_on(circle, scene_of(circle), coords, (1, 1), PROCESSOR)
    assert on.tolist() == [False, True, True, False]            # a radius of 14; 8 * sqrt(2) away is the next


def test_hits_are_counted_by_layer_and_head():
    """A class token with most attention does not count; the mean of layers is the last."""
    coords = torch.tensor([[0, 0, -1, -1], [0, 0, 0, 0], [0, 0, 0, 1]])
    where = torch.arange(3)[None]
    first, second = [[0.6, 0.3, 0.1], [0.0, 0.1, 0.9]], [[0.2, 0.8, 0.0], [0.5, 0.1, 0.4]]
    looks = Looks(coords, [[Look(torch.tensor(weights), where) for weights in (first, second)]], [])
    hits = Hits(scenes=2, right=1, chance=0.5)
    hits.add(looks, [0], torch.tensor([False, True, False]))
    made = hits.figures()
    assert [row["layer"] for row in made["layers"]] == ["0", "1", "all"]
    assert [row["hits_by_head"] for row in made["layers"]] == [[0.5, 0], [0.5, 0], [0.5, 0]]
    assert [row["hits"] for row in made["layers"]] == [0, 0.5, 0]
    close(torch.tensor([row["attention_on_class_tokens"] for row in made["layers"]]),
          torch.tensor([0.15, 0.175, 0.1625]), 1e-4)
    assert made["right"] == 0.5 and made["chance"] == 0.25


def test_the_bundled_model_looks_at_what_it_names(assistant):
    made = measure(assistant, Pruner(), "test", 24).figures()
    assert made["scenes"] == 24 and made["right"] == 1 and 0.05 < made["chance"] < 0.2
    assert all(row["hits"] >= 0.85 for row in made["layers"]) and made["layers"][-1]["hits"] == 1
    for row in made["layers"]:
        assert 0.3 < row["attention_on_circle"] < 1 - row["attention_on_class_tokens"]
    assert made["layers"][0]["hits_by_head"][2] < 0.5           # not all that is measured is a hit


def test_after_pruning_too(assistant):
    made = measure(assistant, load("coreset", keep=0.1), "validation", 8).figures()
    assert made["layers"][-1]["hits"] == 1


def test_the_stored_figures_are_those_on_the_page():
    assert STORED["scenes"] == 200 and STORED["split"] == "test" and STORED["pruner"].startswith("none")
    assert all(row["hits"] >= 0.9 for row in STORED["layers"])
    page = (ROOT / "pruning" / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| (0|1|2|all) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.M)
    assert lines == [(row["layer"], f"{row['hits'] * 100:.1f}", f"{row['attention_on_circle'] * 100:.1f}",
                      f"{row['attention_on_class_tokens'] * 100:.1f}") for row in STORED["layers"]]


def test_the_command_prints_what_it_writes(monkeypatch, capsys, tmp_path):
    path = tmp_path / "pointing.json"
    monkeypatch.setattr("sys.argv", ["pointing", "--scenes", "2", "--device", "cpu", "--json", str(path)])
    pointing.main()
    out = capsys.readouterr().out
    made = json.loads(path.read_text())
    assert out == pointing.table(made) and out.startswith("2 scenes of the test split, 100.0% answered right")
    assert made.keys() == STORED.keys() and len(made["layers"]) == 4


@pytest.mark.parametrize("scenes", ["0", "-1", "100001"])
def test_a_number_of_scenes_that_cannot_be_asked_about_is_refused(monkeypatch, scenes):
    monkeypatch.setattr("sys.argv", ["pointing", f"--scenes={scenes}"])
    with refused("--scenes is"):
        pointing.command(pointing.arguments())
