"""Trains the small checkpoint that guides the bundled one (`--prune sgl`): `python -m scenes.train_guide`.

It has the vision encoder of `tiny`, with the same weights, and a smaller decoder behind it, as 11B and 90B
have the same kind of encoder. Projector and decoder, a quarter of the parameters, learn the answers of new
scenes. Everything else is as in `scenes.train`. Progress goes to the terminal and to RUN/log.csv, the state
to RUN/state.pt, from which the same command continues. On one CPU core this takes about half an hour.
"""
import argparse
import time
from pathlib import Path

import torch

from cli.options import Parser
from scenes.lessons import Lessons
from scenes.tiny import config_json, train_tokenizer, write_folder
from scenes.train import LENGTH, SAVE_EVERY, Log, Student, plan
from weights import config_from_dict, find_checkpoint, load_model, save_model
from weights.images import ImageProcessor

SMALLER = {"hidden_size": 96, "intermediate_size": 224, "num_hidden_layers": 4,
           "cross_attention_layers": [1, 3]}


def guide_json() -> dict:
    """The guide's config.json: that of tiny with a smaller decoder."""
    config = config_json()
    return {**config, "text_config": {**config["text_config"], **SMALLER}}


def arguments() -> argparse.Namespace:
    parser = Parser("python -m scenes.train_guide",
                    "Trains the checkpoint that guides the bundled one: --prune sgl.")
    add = parser.add_argument
    add("--out", type=Path, default=Path("weights/guide"), metavar="DIR", help="folder of the checkpoint")
    add("--run", type=Path, default=Path("runs/guide"), metavar="DIR", help="folder of log and state")
    add("--steps", type=int, default=4000, metavar="N", help="default 4000")
    add("--images", type=int, default=16, metavar="N", help="a step; default 16")
    add("--device", default="cpu", metavar="D", help="default cpu")
    add("--seed", type=int, default=1, metavar="N", help="default 1")
    add("--compile", action="store_true", help="torch.compile the layers, for long runs")
    return parser.parse_args()


def train(args: argparse.Namespace):
    """From the first step, or the last saved one, to the end."""
    torch.manual_seed(args.seed)
    config = config_from_dict(guide_json())
    large = load_model(find_checkpoint("tiny"), torch.device(args.device), torch.float32)
    student = Student(args, config, workers=1, vision=large.vision_model)
    processor = ImageProcessor.from_folder(args.out, config.vision)
    lessons = Lessons(train_tokenizer(), processor, LENGTH)
    log = Log(args.run / "log.csv")
    start = student.resume(args.run / "state.pt")
    began = time.time()
    for step in range(start, args.steps):
        ratio, first_alone = plan(args.seed, step, 0)
        batch = lessons.batch("train", step * args.images, args.images, ratio, args.seed)
        values = student.learn(batch, step / args.steps, vision_only=False, first_alone=first_alone)
        log.add(step + 1, args.steps, first_alone, *values)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
            student.save(args.run / "state.pt", step + 1)
    save_model(student.master.to(torch.bfloat16), args.out)
    print(f"\n{args.out}: {args.steps - start} steps in {(time.time() - began) / 60:.0f} minutes")


def main():
    args = arguments()
    args.run.mkdir(parents=True, exist_ok=True)
    write_folder(args.out, guide_json())
    train(args)


if __name__ == "__main__":
    main()
