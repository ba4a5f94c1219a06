"""Trains the network of the method `attention_predictor`: `python -m scenes.train_attention_predictor`.

The bundled checkpoint answers questions about training scenes without pruning. For each query position that
sees the image, the attention of every cross-attention layer and head is logged as a row. The network learns
to predict the next row of an answer from the rows before it, by squared error, with the patches pooled in
blocks of BLOCKS. Then test scenes show how many of the blocks with the most attention are among those that
the network, or a simple rule, ranks highest. The histories are of the whole image, as with `calibrate` 1. The
weights and these figures go to OUT. On one CPU core this takes about ten minutes.

B answers, H heads of all layers, T rows of attention, h rows of history, n blocks, P patches in a tile.
"""
import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from cli.options import Parser
from generate import generate
from model.image_tokens import ImageKV, ImageTokens
from model.llama_vision import LlamaVision
from pruning.methods.attention_predictor import AttentionPredictor, Network
from scenes.draw import RATIOS, draw, make_scene
from scenes.questions import KINDS, ask
from weights import LEARNED, find_checkpoint, load_model, write_tensors
from weights.files import replacing
from weights.images import ImageProcessor
from weights.tokenizer import ChatTokenizer, messages

BLOCKS = 16, 4                  # patches; the first is the default of the method
WINDOW = 64
SHARES = 0.1, 0.25, 0.5         # of the blocks, in the test
MAX_NEW_TOKENS = 64
TOGETHER = 24                   # answers in a training step
SAMPLE = 4                      # test scenes whose recall is stored apart, for a quick check of the weights


@dataclass
class Log:
    """The attention of one answer."""
    rows: Tensor            # [H, T, tiles, P] fp32, one row for each query position that sees the image
    prompt: int             # how many of the rows are of the prompt

    def ends(self) -> range:
        """The rows to predict: those of the answer."""
        return range(self.prompt, self.rows.shape[1])

    def pooled(self, block: int) -> Tensor:
        """The maximum in every block: [H, T, n]."""
        short = -self.rows.shape[-1] % block
        return pad(self.rows, (0, short)).unflatten(-1, (-1, block)).amax(-1).flatten(2)


def arguments() -> argparse.Namespace:
    parser = Parser("python -m scenes.train_attention_predictor",
                    "Trains the network of the method attention_predictor.")
    add = parser.add_argument
    add("--out", type=Path, default=LEARNED, metavar="DIR", help="folder of the weights and the figures")
    add("--scenes", type=int, default=240, metavar="N", help="to learn from, two answers each; default 240")
    add("--tests", type=int, default=100, metavar="N",
        help="scenes to measure on, two answers each; default 100")
    add("--steps", type=int, default=1500, metavar="N", help="default 1500")
    add("--seed", type=int, default=0, metavar="N", help="default 0")
    return parser.parse_args()


# ----- the data


@torch.inference_mode()
def logs(model: LlamaVision, tokenizer: ChatTokenizer, processor: ImageProcessor, split: str,
         scenes: int) -> list[Log]:
    """For each scene: a description, if it has one, and one question of another kind."""
    found = []
    for i in range(scenes):
        scene, rng = make_scene(split, i, RATIOS[i % len(RATIOS)]), random.Random(f"attention/{split}/{i}")
        image = model.encode([processor([draw(scene)])])
        others = rng.sample([kind for kind in KINDS if kind != "describe"], len(KINDS) - 1)
        other = next(question for kind in others if (question := ask(scene, rng, kind)) is not None)
        for question in ask(scene, rng, "describe"), other:
            if question is not None:
                ids = tokenizer.encode(messages(question.text, 1))
                found.append(log(model, ids, image, tokenizer.stop_ids))
    return found


def log(model: LlamaVision, ids: list[int], image: ImageTokens, stop_ids: tuple[int, ...]) -> Log:
    """Answers greedily, with the whole image at every step."""
    window = len(ids) + MAX_NEW_TOKENS
    watch = Watch(1.0, block=1, predictor="last", calibrate=1, skip_layers=0, window=window)
    generate(model, [ids], image, MAX_NEW_TOKENS, stop_ids, pruner=watch)
    patches = model.config.vision.tokens_per_tile - 1
    return Log(torch.cat(watch.history, 1)[0].unflatten(-1, (-1, patches)).clone(), watch.prompt)


class Watch(AttentionPredictor):
    """Reads everything, in blocks of one token, and remembers how many rows the prompt gave."""
    keeps_all = False           # so that its hooks are called

    def prefilled(self, image_kv: list[ImageKV]) -> list[ImageKV]:
        self.prompt = self.history[0].shape[2]
        return super().prefilled(image_kv)


def histories(rows: list[Tensor], ends: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled rows [H, T, n] of several answers, and the row to predict of each -> the histories [B, H, h, n],
    which of their entries are real [B, h, n], and the rows to predict [B, H, n]."""
    h, n = min(WINDOW, max(ends)), max(row.shape[-1] for row in rows)
    history, target = torch.zeros(len(rows), len(rows[0]), h, n), torch.zeros(len(rows), len(rows[0]), n)
    there = torch.zeros(len(rows), h, n, dtype=torch.bool)
    for b, (row, end) in enumerate(zip(rows, ends, strict=True)):
        past = row[:, max(0, end - WINDOW):end]
        history[b, :, h - past.shape[1]:, :past.shape[2]] = past
        there[b, h - past.shape[1]:, :past.shape[2]] = True
        target[b, :, :past.shape[2]] = row[:, end]
    return history, there, target


# ----- learning and testing


def train(network: Network, answers: list[Log], steps: int, seed: int) -> float:
    """Returns the mean squared error in the last tenth of the steps."""
    optimiser, rng = torch.optim.Adam(network.parameters(), lr=1e-3), random.Random(seed)
    rows = {block: [answer.pooled(block) for answer in answers] for block in BLOCKS}
    # Every row to predict is equally likely, so long answers count for more.
    places = [(i, end) for i, answer in enumerate(answers) for end in answer.ends()]
    began = time.time()
    errors = []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * min(1.0, 4 * (1 - step / steps))           # falls in the last quarter
        chosen, block = rng.choices(places, k=TOGETHER), BLOCKS[step % len(BLOCKS)]
        history, there, target = histories([rows[block][i] for i, _ in chosen], [end for _, end in chosen])
        counts = there[:, -1:].expand_as(target)
        error = (network(history, there) - target)[counts].square().mean()
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
        errors.append(error.item())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps}  {(time.time() - began) / 60:.1f} min  "
                  f"mean squared error {sum(errors[-100:]) / 100:.5f}", flush=True)
    tail = errors[-max(1, steps // 10):]
    return sum(tail) / len(tail)


def recalls(network: Network, answers: list[Log]) -> list[dict]:
    """The share of the blocks with the most attention that is found: a mean over rows, layers and heads."""
    return [row for block in BLOCKS for row in recall(network, answers, block)]


@torch.inference_mode()
def recall(network: Network, answers: list[Log], block: int) -> list[dict]:
    """The same for blocks of one size."""
    found = {share: {"cnn": [], "last": [], "mean": [], "chance": []} for share in SHARES}
    for answer in answers:
        rows, ends = answer.pooled(block), list(answer.ends())
        if not ends:
            continue
        history, there, target = histories([rows] * len(ends), ends)
        n = target.shape[-1]
        guesses = {"cnn": network(history, there), "last": history[:, :, -1], "mean": history.sum(2)}
        for share, hits in found.items():
            k = max(1, round(share * n))
            true = best(target, k)
            for name, guess in guesses.items():
                hits[name].append((best(guess, k) & true).sum(-1).flatten() / k)
            hits["chance"].append(torch.full_like(hits["cnn"][-1], k / n))
    return [{"block": block, "share": share,
             **{name: round(torch.cat(values).mean().item(), 4) for name, values in hits.items()}}
            for share, hits in found.items()]


def best(row: Tensor, k: int) -> Tensor:
    """The k highest of [..., n], bool; of equal ones the first."""
    order = row.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return torch.zeros_like(row, dtype=torch.bool).scatter(-1, order, True)


def main():
    args = arguments()
    torch.manual_seed(args.seed)
    folder = find_checkpoint("tiny")
    model = load_model(folder, "cpu", torch.float32)
    tokenizer = ChatTokenizer.from_folder(folder, model.config)
    processor = ImageProcessor.from_folder(folder, model.config.vision)
    lessons = logs(model, tokenizer, processor, "train", args.scenes)
    print(f"{len(lessons)} answers, {sum(len(answer.ends()) for answer in lessons)} rows to predict",
          flush=True)
    network = Network()
    error = train(network, lessons, args.steps, args.seed)
    tests = logs(model, tokenizer, processor, "test", args.tests)
    figures = {"model": "tiny", "parameters": sum(p.numel() for p in network.parameters()),
               "scenes": args.scenes, "steps": args.steps, "seed": args.seed, "error": round(error, 6),
               "tests": args.tests, "rows": sum(len(answer.ends()) for answer in tests),
               "recall": recalls(network, tests),
               "sample_recall": recalls(network, logs(model, tokenizer, processor, "test", SAMPLE))}
    for row in figures["recall"]:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    args.out.mkdir(parents=True, exist_ok=True)
    with replacing(args.out / "attention_predictor.safetensors") as partial:
        write_tensors(partial, network.state_dict())
    with replacing(args.out / "attention_predictor.json") as partial:
        partial.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"{args.out}: attention_predictor.safetensors, attention_predictor.json")


if __name__ == "__main__":
    main()
