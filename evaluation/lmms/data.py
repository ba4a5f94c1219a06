"""Data sets with the columns of the real ones, of drawn scenes: `python -m evaluation.lmms.data FOLDER`.

    FOLDER/scenes.parquet                       for the task `scenes`
    FOLDER/lmms-lab-encoder/MME/data/...        for lmms-eval's own tasks: started in FOLDER, they find a
                                                folder of this name before they look on the hub

So a whole run can be rehearsed offline before an hour of a GPU is paid for. The columns are those that the
code of the tasks in lmms-eval 0.7.3 reads. Needs the library `datasets`.
"""
import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import datasets
from datasets import Dataset, Features, Sequence, Value
from PIL import Image

from cli.options import Parser, whole_number
from cli.program import run, say
from evaluation.exam import Exam, make_exam
from scenes.draw import COLOURS, RATIOS, draw, make_scene
from scenes.questions import Question, ask
from weights.messages import named, reason

TEXT, NUMBER, IMAGE = Value("string"), Value("int64"), datasets.Image()
MOST_QUESTIONS = 100_000
YES_NO = " Please answer yes or no."
FRAMES = 8                  # images of a video in SEED-Bench
CATEGORIES = "existence", "count", "OCR", "code_reasoning"      # of MME: one of cognition
LLAVA_CATEGORIES = "conv", "detail", "complex"
HUB = {"MME": ("lmms-lab-encoder/MME", "test"), "SEED": ("lmms-lab-encoder/SEED-Bench", "test"),
       "MMVP": ("lmms-lab-eval/MMVP", "train"),
       "LLaVA": ("lmms-lab-encoder/llava-bench-in-the-wild", "train")}


def arguments() -> argparse.Namespace:
    parser = Parser("python -m evaluation.lmms.data", "Fake data sets for lmms-eval, of drawn scenes.",
                    "FOLDER [options]")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to write them")
    parser.add_argument("--questions", type=whole_number, default=200, metavar="N",
                        help="about scenes, and at most as many of each other set; default 200")
    return parser.parse_args()


def command(args: argparse.Namespace):
    if not 4 <= args.questions <= MOST_QUESTIONS:
        raise ValueError(f"--questions is {args.questions}, but must be at least 4, at most {MOST_QUESTIONS}")
    exam = make_exam(args.questions)
    write(args.folder / "scenes.parquet", list(scenes(exam)),
          {"image": IMAGE, "question": TEXT, "answer": TEXT, "kind": TEXT, "scene": NUMBER})
    pairs = list(yes_no_pairs(args.questions // 2))
    write_hub(args.folder, "MME", list(mme(pairs)),
              {"question_id": TEXT, "image": IMAGE, "question": TEXT, "answer": TEXT, "category": TEXT})
    write_hub(args.folder, "SEED", list(seed_bench(args.questions // 2)), {
        **dict.fromkeys(("answer", "choice_a", "choice_b", "choice_c", "choice_d", "data_id", "data_type",
                         "question", "question_id"), TEXT),
        "question_type_id": NUMBER, "image": Sequence(IMAGE), "segment": Sequence(NUMBER)})
    write_hub(args.folder, "MMVP", list(mmvp(pairs)),
              {"Index": NUMBER, "image": IMAGE, "Question": TEXT, "Options": TEXT, "Correct Answer": TEXT})
    write_hub(args.folder, "LLaVA", list(llava_bench(args.questions // 4)),
              {"question_id": NUMBER, "image": IMAGE, "question": TEXT, "caption": TEXT, "gpt_answer": TEXT,
               "image_id": TEXT, "category": TEXT})


def write_hub(folder: Path, name: str, rows: list[dict], columns: dict):
    """A data set where `load_dataset` finds it instead of the hub's."""
    place, split = HUB[name]
    write(folder / place / "data" / f"{split}-00000-of-00001.parquet", rows, columns)


def write(path: Path, rows: list[dict], columns: dict):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows, features=Features(columns)).to_parquet(path)
    except OSError as error:
        raise ValueError(f"{named(path)}: cannot be written: {reason(error)}; choose another folder"
                         ) from None
    say(f"{path}: {len(rows)} questions")


# ----- the sets


def scenes(exam: Exam) -> Iterator[dict]:
    """What evaluate.py asks, in its order."""
    for number, (scene, questions) in enumerate(exam):
        image = draw(scene)
        for question in questions:
            yield {"image": image, "question": question.text, "answer": question.answer,
                   "kind": question.kind, "scene": number}


def asked(kind: str, count: int) -> Iterator[tuple[int, Image.Image, Question]]:
    """Questions of one kind about `count` different scenes, with the number of the scene."""
    number = 0
    while count:
        scene = make_scene("test", number, RATIOS[number % len(RATIOS)])
        question = ask(scene, random.Random(number), kind)
        if question is not None:
            yield number, draw(scene), question
            count -= 1
        number += 1


def yes_no_pairs(count: int) -> Iterator[tuple[int, Image.Image, str, str]]:
    """Two questions about each of `count` // 2 images: one with the answer yes, one with the answer no."""
    for number in range(count // 2):
        scene = make_scene("test", number, RATIOS[number % len(RATIOS)])
        found = {}
        seed = 0
        while len(found) < 2:
            question = ask(scene, random.Random(seed), "exists")
            found.setdefault(question.answer, question.text)
            seed += 1
        image = draw(scene)
        for answer in "yes", "no":
            yield number, image, found[answer], answer


def mme(pairs: list) -> Iterator[dict]:
    for number, image, text, answer in pairs:
        category = CATEGORIES[number % len(CATEGORIES)]
        yield {"question_id": f"{category}/{number:04}.png", "image": image, "question": text + YES_NO,
               "answer": answer.capitalize(), "category": category}


def mmvp(pairs: list) -> Iterator[dict]:
    for index, (_, image, text, answer) in enumerate(pairs, start=1):
        yield {"Index": index, "image": image, "Question": text, "Options": "(a) yes (b) no",
               "Correct Answer": "(a)" if answer == "yes" else "(b)"}


def seed_bench(count: int) -> Iterator[dict]:
    """Every fifth question is about a video."""
    rng = random.Random(0)
    for i, (_, image, question) in enumerate(asked("colour", count)):
        choices = [question.answer, *rng.sample([name for name in COLOURS if name != question.answer], 3)]
        rng.shuffle(choices)
        video = i % 5 == 4
        yield {"answer": "ABCD"[choices.index(question.answer)],
               **{f"choice_{letter}": choice for letter, choice in zip("abcd", choices, strict=True)},
               "data_id": str(i), "data_type": "video" if video else "image", "question": question.text,
               "question_id": str(i), "question_type_id": 1, "image": [image] * (FRAMES if video else 1),
               "segment": [0, 1] if video else []}


def llava_bench(count: int) -> Iterator[dict]:
    for i, (number, image, question) in enumerate(asked("describe", count)):
        yield {"question_id": i, "image": image, "question": question.text, "caption": question.answer,
               "gpt_answer": question.answer, "image_id": f"{number:03}",
               "category": LLAVA_CATEGORIES[i % len(LLAVA_CATEGORIES)]}


def main():
    run(command, arguments)


if __name__ == "__main__":
    main()
