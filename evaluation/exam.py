"""Which questions are asked: the same every time, about test scenes of all eight tile ratios in turn."""
import random
from collections import Counter
from collections.abc import Sequence

from scenes.draw import RATIOS, Scene, make_scene
from scenes.questions import KINDS, Question, ask

Exam = list[tuple[Scene, list[Question]]]

QUESTIONS_PER_IMAGE = 3


def make_exam(count: int, split: str = "test", kinds: Sequence[str] = tuple(KINDS)) -> Exam:
    """`count` questions about scenes of a split, of every kind about equally many.

    Of each scene, the kinds that were asked least so far come first.
    """
    asked = Counter()
    exam = []
    index = 0
    while (left := count - asked.total()) > 0:
        scene = make_scene(split, index, RATIOS[index % len(RATIOS)])
        rng = random.Random(f"exam/{split}/{index}")
        questions = []
        for kind in sorted(kinds, key=lambda kind: asked[kind]):
            if len(questions) == min(QUESTIONS_PER_IMAGE, left):
                break
            question = ask(scene, rng, kind)
            if question is not None:
                questions.append(question)
        asked.update(question.kind for question in questions)
        if questions:
            exam.append((scene, questions))
        index += 1
    return exam


def is_about_the_absent(question: Question) -> bool:
    """Whether it asks for something that is not in the image: who answers yes makes it up."""
    return question.kind == "exists" and question.answer == "no"
