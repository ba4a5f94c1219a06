"""Trains the compressors of the method `quecc` for the bundled checkpoint: `python -m scenes.train_quecc`.

Every step draws new scenes of one ratio of tiles and asks a few questions about each, each in a conversation
of its own, because the compressor reads only one. The model is frozen. It first answers from the whole image.
Then each compressor learns to make tokens from which the model gives every token of the answer the same
probabilities (the loss is the KL divergence). Progress goes to the terminal and to RUN/log.csv. Every few
minutes the state goes to RUN/state.pt, from which the same command continues, and the weights to OUT. At the
end OUT/quecc.json says how often the model is still right on held-out scenes. On one CPU core this takes
about ten minutes.
"""
import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cli.options import Parser
from model.image_tokens import ImageTokens
from model.llama_vision import LlamaVision
from pruning.methods.quecc import Compressor, compress, load_compressor, pooled_grids, question_states
from scenes.draw import RATIOS, draw, make_scene
from scenes.lessons import Lessons, turns
from weights import LEARNED, find_checkpoint, load_model, write_tensors
from weights.files import replacing
from weights.images import ImageProcessor
from weights.tokenizer import ChatTokenizer

LENGTH = 96                                     # the most text tokens of a question and its answer
LOG_EVERY, SAVE_EVERY = 50, 200                 # steps


def arguments() -> argparse.Namespace:
    parser = Parser("python -m scenes.train_quecc",
                    "Trains the compressors of the method quecc for the bundled checkpoint.")
    add = parser.add_argument
    add("--model", default="tiny", metavar="M", help="the checkpoint; its tokenizer must know the scenes")
    add("--out", type=Path, default=LEARNED, metavar="DIR", help="folder of the weights and the figures")
    add("--run", type=Path, default=Path("runs/quecc"), metavar="DIR", help="folder of log and state")
    add("--grids", type=int, nargs="+", default=[4, 2], metavar="N", help="tokens a side of a tile")
    add("--steps", type=int, default=800, metavar="N", help="default 800")
    add("--images", type=int, default=12, metavar="N", help="a step; default 12")
    add("--questions", type=int, default=2, metavar="N", help="about each image, at most; default 2")
    add("--exam", type=int, default=320, metavar="N", help="held-out images at the end; default 320")
    add("--seed", type=int, default=0, metavar="N", help="default 0")
    return parser.parse_args()


class Lesson:
    """Questions about images, each in a conversation of its own, and what the frozen model answers."""

    def __init__(self, model: LlamaVision, questions: "Questions", split: str, first: int, seed: int):
        ratio = random.Random(f"{seed}:{first}").choice(RATIOS)
        tiles, asked, texts = questions.draw(split, first, ratio, seed)
        self.model, (ids, targets) = model, (torch.stack(parts) for parts in zip(*texts, strict=True))
        longest = int((targets >= 0).nonzero()[:, 1].max()) + 1
        self.ids, self.targets = ids[:, :longest], targets[:, :longest]
        self.said = self.targets >= 0
        with torch.no_grad():
            self.image = model.encode(tiles, keep_states=True).select(asked)
            lengths = (self.said.int().argmax(1) + 1).tolist()
            prompts = [ids[:length].tolist() for ids, length in zip(self.ids, lengths, strict=True)]
            self.question = question_states(model, prompts)

    def answers(self, image: ImageTokens) -> Tensor:
        """The logits of all tokens of all answers, read from these image tokens."""
        with sdpa_kernel(SDPBackend.MATH):      # at this length faster than a fused kernel's backward
            return self.model.lm_head(self.model.hidden(self.ids, image)[self.said]).float()

    @torch.no_grad()
    def right(self, image: ImageTokens) -> list[bool]:
        """Which greedy answers are exactly right: each token of the right answer is the most likely one after
        the tokens before it."""
        correct = torch.ones_like(self.said)
        correct[self.said] = self.answers(image).argmax(-1) == self.targets[self.said]
        return correct.all(1).tolist()


class Questions(Lessons):
    """Scenes of one ratio of tiles with a few questions each, the same ones for the same seed."""

    def __init__(self, source: str, model: LlamaVision, images: int, most: int):
        folder = find_checkpoint(source)
        tokenizer = ChatTokenizer.from_folder(folder, model.config).tokenizer
        tokenizer.encode_special_tokens = False
        super().__init__(tokenizer, ImageProcessor.from_folder(folder, model.config.vision), LENGTH)
        self.images, self.most = images, most

    def draw(self, split: str, first: int, ratio: tuple[int, int], seed: int) -> tuple[list, list[int], list]:
        """The tiles of each image; for each question the number of its image, and its ids and targets."""
        rng = random.Random(f"{seed}:{first}")
        tiles, asked, texts = [], [], []
        for i in range(self.images):
            scene = make_scene(split, first + i, ratio)
            tiles.append(self.processor([draw(scene)]))
            for turn in turns(scene, rng)[:self.most]:
                asked.append(i)
                texts.append(self._conversation([turn])[:2])
        return tiles, asked, texts


class Student:
    """A compressor for one grid, and its optimiser."""

    def __init__(self, model: LlamaVision, grid: int, steps: int):
        vision, width = model.config.vision, model.config.text.hidden_size
        self.grid = grid
        self.stride = -(-vision.patches_per_side // grid)           # rounded up
        self.steps = steps
        self.compressor = Compressor(vision.hidden_size, vision.output_dim, width, self.stride)
        self.optimiser = torch.optim.AdamW(self.compressor.parameters(), betas=(0.9, 0.98), weight_decay=0.01)

    def learn(self, lesson: Lesson, whole: Tensor, step: int) -> float:
        """One step; `whole` are the logits from the whole image. Returns the loss."""
        small = compress(lesson.image, self.stride, self.compressor, lesson.question)
        loss = F.kl_div(lesson.answers(small).log_softmax(-1), whole.log_softmax(-1), log_target=True,
                        reduction="batchmean")
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.compressor.parameters(), 1.0)
        share = step / self.steps               # of the run: warm-up, then a cosine down to 1 %
        scale = min(1.0, share / 0.03 + 1e-2) * (0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2)
        self.optimiser.param_groups[0]["lr"] = 2e-3 * scale
        self.optimiser.step()
        return loss.item()


def export(compressor: Compressor, grid: int, folder: Path) -> Path:
    """Write the weights in bf16; a file that is there is only replaced by a complete one."""
    path = folder / f"quecc_{grid ** 2}.safetensors"
    state = {name: tensor.to(torch.bfloat16) for name, tensor in compressor.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        write_tensors(partial, state)
    return path


def train(model: LlamaVision, questions: Questions, students: list[Student], args: argparse.Namespace):
    """From the first step, or the last saved one, to the end."""
    state = args.run / "state.pt"
    log = args.run / "log.csv"
    args.run.mkdir(parents=True, exist_ok=True)
    start, minutes = resume(students, state)
    if not start:
        log.write_text(",".join(["step", "minutes", *(f"kl_{s.grid ** 2}" for s in students)]) + "\n")
    began = time.monotonic() - 60 * minutes
    sums = [0.0] * len(students)
    for step in range(start, args.steps):
        lesson = Lesson(model, questions, "train", step * args.images, args.seed)
        with torch.no_grad():
            whole = lesson.answers(lesson.image)
        sums = [total + student.learn(lesson, whole, step)
                for total, student in zip(sums, students, strict=True)]
        minutes = (time.monotonic() - began) / 60
        if (step + 1) % LOG_EVERY == 0:
            means = [f"{total / LOG_EVERY:.4f}" for total in sums]
            sums = [0.0] * len(students)
            with log.open("a") as file:
                file.write(",".join([str(step + 1), f"{minutes:.2f}", *means]) + "\n")
            print(f"step {step + 1}/{args.steps}  {minutes:.1f} min  KL {'  '.join(means)}", flush=True)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
            save(students, state, step + 1, minutes)
            for student in students:
                export(student.compressor, student.grid, args.out)


def save(students: list[Student], path: Path, step: int, minutes: float):
    parts = [(student.compressor.state_dict(), student.optimiser.state_dict()) for student in students]
    with replacing(path) as partial:
        torch.save({"step": step, "minutes": minutes, "students": parts}, partial)


def resume(students: list[Student], path: Path) -> tuple[int, float]:
    """The step to continue from, and the minutes that the steps before it took."""
    if not path.exists():
        return 0, 0.0
    held = torch.load(path, weights_only=True)
    for student, (weights, optimiser) in zip(students, held["students"], strict=True):
        student.compressor.load_state_dict(weights)
        student.optimiser.load_state_dict(optimiser)
    return held["step"], held["minutes"]


def examine(model: LlamaVision, lessons: Iterator[Lesson], grids: dict[int, tuple[int, Path]]) -> dict:
    """How often the model is right: from the whole image, from averages, and from trained compressors.

    `grids`: tokens along a side -> their stride and the file of the weights.
    """
    marks: dict[str, list[bool]] = {"whole": []}
    for lesson in lessons:
        marks["whole"] += lesson.right(lesson.image)
        for grid, (stride, path) in grids.items():
            trained = load_compressor(path, lesson.ids.device)
            for name, how in ("pool", (stride,)), ("trained", (stride, trained, lesson.question)):
                marks.setdefault(f"{name}_{grid ** 2}", []).extend(lesson.right(compress(lesson.image, *how)))
    return {"questions": len(marks["whole"]),
            "accuracy": {name: round(sum(right) / len(right), 4) for name, right in marks.items()}}


def main():
    args = arguments()
    torch.manual_seed(args.seed)
    model = load_model(args.model).requires_grad_(False)
    possible = pooled_grids(model.config.vision.patches_per_side)
    if not set(args.grids) <= possible:
        raise SystemExit(f"--grids {' '.join(map(str, args.grids))}: choose among "
                         + ", ".join(map(str, sorted(possible))))
    questions = Questions(args.model, model, args.images, args.questions)
    students = [Student(model, grid, args.steps) for grid in args.grids]
    train(model, questions, students, args)
    grids = {student.grid: (student.stride, export(student.compressor, student.grid, args.out))
             for student in students}
    lessons = (Lesson(model, questions, "test", first, args.seed)
               for first in range(0, args.exam, args.images))
    figures = examine(model, lessons, grids)
    figures |= {"model": args.model, "steps": args.steps, "images": args.images,
                "questions_per_image": args.questions, "seed": args.seed}
    with replacing(args.out / "quecc.json") as partial:
        partial.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures["accuracy"], indent=2))


if __name__ == "__main__":
    main()
