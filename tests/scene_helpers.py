"""What the tests of the built-in world share: scenes, questions about them, and scenes made by hand."""
from itertools import product

from scenes.draw import COLOURS, RATIOS, Scene, Sign, Thing, make_scene
from scenes.questions import questions

SCENES = [make_scene("train", index, ratio) for index, ratio in product(range(60), RATIOS)]
ASKED = [(scene, question) for seed, scene in enumerate(SCENES) for question in questions(scene, seed, 9)]


def thing(shape: str, colour: str, x: float, y: float, character: str | None = None) -> Thing:
    return Thing(shape, colour, x, y, 14.0, 0.0, character, COLOURS[colour])


def scene_of(*things: Thing, sign: Sign | None = None, rows: int = 1, columns: int = 1) -> Scene:
    plain = (120, 130, 140), (120, 130, 140)
    return Scene(rows, columns, 112 * columns, 112 * rows, things, sign, plain, "vertical", 0.0, 1)
