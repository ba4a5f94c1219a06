"""What a question can be about: one of the examples, a new scene, or an image that somebody uploads.

    Subject: the image, and its questions by kind, with the right answers where they are known
"""
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from scenes.draw import draw, make_scene
from scenes.questions import KINDS, Question, ask
from weights.image_file import open_image

EXAMPLES = {                    # each with a question that the README asks, and its right answer
    "shapes.png": Question("character", "What is written on the circle?", "Y"),
    "wide.png": Question("sign", "What does the sign say?", "111"),
    "tall.png": Question("where", "Where is the star?", "bottom"),
    "small.png": Question("exists", "Do you see a red star?", "yes"),
    "sign.png": Question("colour", "What colour is the square?", "yellow"),
    "letters.png": Question("character", "What is written on the square?", "P")}
FOLDER = Path(__file__).parents[1] / "examples"
OF_ANY_IMAGE = {                # a question of each kind where nobody knows what the image shows
    "colour": "What colour is the square?", "shape": "Which shape is red?",
    "character": "What is written on the square?", "count": "How many shapes are there?",
    "exists": "Is there a sign?", "where": "Where is the square?",
    "relation": "Which is further left, the square or the circle?", "sign": "What does the sign say?",
    "describe": "Describe the picture."}
TRIES = 20                      # of a kind; a scene may have no question of it
MOST_SHOWN = 1024               # pixels of the longer side, of an image as the page shows it
LEAST_SHOWN = 448
SCENES = 1_000_000              # test scenes to draw from: none was trained on


@dataclass
class Subject:
    """An RGB image, where it comes from, and what can be asked about it."""
    image: Image.Image
    name: str
    questions: dict[str, list[Question]]        # by kind
    first: str = ""                             # the question to begin with

    def question(self, kind: str, before: str = "") -> str:
        """One of a kind, another than `before` where there are several. Raises ValueError for a kind that is
        not there."""
        if kind not in self.questions:
            raise ValueError(f"there is no question of kind {kind!r} about this image; choose one of "
                             f"{', '.join(self.questions)}")
        texts = [question.text for question in self.questions[kind]]
        return random.choice([text for text in texts if text != before] or texts)

    def right(self, question: str) -> str | None:
        """The right answer to one of these questions; None where nobody knows it."""
        known = {asked.text: asked.answer for several in self.questions.values() for asked in several}
        return known.get(question.strip()) or None


def example(index: int) -> Subject:
    """One of EXAMPLES, by its place there."""
    name, first = list(EXAMPLES.items())[index]
    questions = {**of_any_image(), first.kind: [first]}
    return Subject(open_image(FOLDER / name), f"examples/{name}", questions, first.text)


def uploaded(path: str) -> Subject:
    """A file that somebody sent. Raises ValueError with one line that names it."""
    name = Path(path).name
    return Subject(open_image(path, name), name, of_any_image(), "")


def shown(image: Image.Image) -> Image.Image:
    """In a size for the screen: a large image takes long to send, a small one is hard to see."""
    longest = max(image.size)
    scale = max(min(1, MOST_SHOWN / longest), min(LEAST_SHOWN / longest, 4))
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)


def of_any_image() -> dict[str, list[Question]]:
    return {kind: [Question(kind, text, "")] for kind, text in OF_ANY_IMAGE.items()}


def new_scene(index: int | None = None) -> Subject:
    """A test scene, a random one without its number, and the questions about it, each with its answer."""
    index = random.randrange(SCENES) if index is None else index
    scene = make_scene("test", index)
    rng = random.Random(f"page/{index}")
    questions = {}
    for kind in KINDS:
        made = [asked for _ in range(TRIES) if (asked := ask(scene, rng, kind)) is not None]
        if made:
            questions[kind] = list(dict.fromkeys(made))
    first = rng.choice([kind for kind in questions if kind != "describe"] or list(questions))
    return Subject(draw(scene), f"scene {index} of the test split", questions, questions[first][0].text)
