"""How often the model looks at what it names: `python -m page.pointing`.

    scenes with one circle that carries a character ─► "What is written on the circle?"
        ─► Looks of the answer's word ─► is the patch with most attention on the circle?

A hit is a patch that the circle, as drawn, overlaps. Class tokens have no place in the image and are left
out; their share of attention is told. It is the pointing game of Zhang et al., "Top-down Neural
Attention by Excitation Backprop", ECCV 2016. Wrong answers count as all others.
N image tokens, H query heads, L cross-attention layers.
"""
from cli import program

program.begin(__name__)

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cli.options import (
    Parser,
    add_model_options,
    check_output,
    model_options,
    parse_pruner,
    say_how,
    whole_number,
    writing,
)
from cli.program import write
from cli.terminal import Progress
from generate import Assistant
from model.image_tokens import Grid
from page.looks import Looker, Looks, words_of
from pruning import Pruner
from scenes.draw import RATIOS, Scene, Thing, draw, make_scene
from weights.images import ImageProcessor, fit
from weights.tokenizer import messages

QUESTION = "What is written on the circle?"
SPLITS = {"val": "validation", "test": "test"}
MAX_NEW_TOKENS = 8
MOST_SCENES = 100_000
EXAMPLES = "python -m page.pointing", "python -m page.pointing --prune coreset --keep 0.1"


def arguments() -> argparse.Namespace:
    parser = Parser("python -m page.pointing", "Does the model look at what it names?", examples=EXAMPLES)
    add = parser.add_argument
    add_model_options(parser)
    parser.section("what is asked")
    add("--scenes", type=whole_number, default=200, metavar="N", help="how many; default 200")
    add("--split", choices=SPLITS, default="test", help="the scenes asked about; default test")
    parser.section("how, and where to")
    add("--prune", metavar="P", help="with a pruning method, or FILE.py:CLASS")
    add("--keep", metavar="R", help="of each image: a fraction, or so many tokens")
    parser.add_rare("--set", action="append", default=[], metavar="K=V", help="another option of the method")
    add("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    return parser.parse_args()


@dataclass
class Hits:
    """Sums over scenes. Every list has L + 1 entries: the last is the mean over layers."""
    scenes: int = 0
    right: int = 0                                              # answers
    chance: float = 0.0                                         # share of patches that are on the circle
    layers: list[int] = field(default_factory=list)             # hits of the mean over heads
    heads: list[list[int]] = field(default_factory=list)        # and of each head, [L + 1][H]
    on_circle: list[float] = field(default_factory=list)        # share of attention, of the mean over heads
    on_classes: list[float] = field(default_factory=list)

    def add(self, looks: Looks, tokens: list[int], circle: Tensor):
        """A scene: the tokens of the answer's word, and which image tokens are `circle` [N] bool."""
        patch = looks.coords[:, 2] >= 0                                                     # [N]
        every = range(looks.heads)
        if not self.layers:
            self.layers, self.on_circle, self.on_classes = ([0] * (looks.layers + 1) for _ in range(3))
            self.heads = [[0 for _ in every] for _ in self.layers]
        for i, layer in enumerate([*range(looks.layers), None]):
            mean, _ = looks.of_word(tokens, layer)                                          # [N]
            self.layers[i] += points_at(mean, patch, circle)
            self.on_circle[i] += float(mean[circle].sum())
            self.on_classes[i] += float(mean[~patch].sum())
            for head in every:
                self.heads[i][head] += points_at(looks.of_word(tokens, layer, head)[0], patch, circle)

    def figures(self) -> dict:
        """Everything as shares of the scenes, for JSON."""
        def shares(sums: list) -> list:
            return [round(each / self.scenes, 4) for each in sums]
        names = [*(str(i) for i in range(len(self.layers) - 1)), "all"]
        rows = zip(names, shares(self.layers), map(shares, self.heads), shares(self.on_circle),
                   shares(self.on_classes), strict=True)
        return {"scenes": self.scenes, "right": round(self.right / self.scenes, 4),
                "chance": round(self.chance / self.scenes, 4),
                "layers": [{"layer": name, "hits": hits, "hits_by_head": heads, "attention_on_circle": circle,
                            "attention_on_class_tokens": classes}
                           for name, hits, heads, circle, classes in rows]}


def points_at(attention: Tensor, patch: Tensor, circle: Tensor) -> bool:
    """Whether the patch with most attention is on the circle: all [N]."""
    return bool(circle[torch.where(patch, attention, -1.0).argmax()])


def scenes_with_a_circle(split: str, count: int) -> Iterator[tuple[Scene, Thing]]:
    """Scenes of all tile ratios in turn that have one circle, with a character on it."""
    index = found = 0
    while found < count:
        scene = make_scene(split, index, RATIOS[index % len(RATIOS)])
        index += 1
        circles = [thing for thing in scene.things if thing.shape == "circle"]
        if len(circles) == 1 and circles[0].character is not None:
            found += 1
            yield scene, circles[0]


def tokens_on(circle: Thing, scene: Scene, coords: Tensor, grid: Grid, processor: ImageProcessor) -> Tensor:
    """Which image tokens [N, 4] are patches that the circle overlaps, as it is drawn on the canvas: [N]."""
    side = processor.tile_size / (int(coords[:, 2].max()) + 1)                  # of a patch, in pixels
    height, width = fit(scene.height, scene.width, grid, processor.tile_size)
    tile = torch.stack((coords[:, 1] // grid[1], coords[:, 1] % grid[1]), -1)               # [N, 2]
    corner = tile * processor.tile_size + coords[:, 2:] * side                  # y, x of the patch
    centre = torch.tensor([circle.y * height / scene.height, circle.x * width / scene.width])
    beyond = ((corner + side / 2 - centre).abs() - side / 2).clamp(min=0)       # to the nearest pixel
    radius = circle.radius * height / scene.height
    return (coords[:, 2] >= 0) & (beyond.norm(dim=-1) < radius)


def measure(assistant: Assistant, pruner: Pruner, split: str, count: int) -> Hits:
    """Ask about `count` scenes of a split."""
    hits = Hits()
    with Progress("scenes") as report:
        for scene, circle in scenes_with_a_circle(split, count):
            looker = Looker(pruner)
            encoded = assistant.encode_images([draw(scene)], looker)
            answer = assistant.answer([messages(QUESTION, 1)], encoded, MAX_NEW_TOKENS, pruner=looker)
            text, words = words_of(assistant.tokenizer, answer.tokens[0])
            looks = looker.looks(len(answer.tokens[0]))
            grid = tuple(encoded.tiles.grid[0].tolist())
            there = tokens_on(circle, scene, looks.coords, grid, assistant.processor)
            hits.scenes += 1
            hits.right += text == circle.character
            hits.chance += float(there.sum() / (looks.coords[:, 2] >= 0).sum())
            if words and looks:                 # an answer of nothing, or of a smaller model, looks nowhere
                hits.add(looks, words[0].tokens, there)
            report(hits.scenes, count)
    if not hits.layers:
        raise ValueError("no answer has a word for which the model looked at the image")
    return hits


def command(args: argparse.Namespace):
    if not 1 <= args.scenes <= MOST_SCENES:
        raise ValueError(f"--scenes is {args.scenes}, but must be at least 1, at most {MOST_SCENES}")
    check_output("--json", args.json)
    pruner = parse_pruner(args.prune, args.keep, args.set) or Pruner()
    assistant = Assistant(args.model, **model_options(args))
    say_how(assistant.model, args, assistant.adapters)
    made = measure(assistant, pruner, SPLITS[args.split], args.scenes).figures()
    made = {"model": args.model, "pruner": str(pruner), "split": SPLITS[args.split], "question": QUESTION,
            **made}
    write(table(made))
    if args.json is not None:
        with writing("--json", args.json) as file:
            file.write_text(json.dumps(made, indent=1) + "\n")


def table(made: dict) -> str:
    """The figures in per cent, a line for each layer."""
    heads = range(len(made["layers"][0]["hits_by_head"]))
    lines = [f"{made['scenes']} scenes of the {made['split']} split, {made['right']:.1%} answered right",
             f"the patch with most attention is on the circle, in per cent (by chance {made['chance']:.1%})",
             f"{'layer':8}{'mean of heads':>14}" + "".join(f"{f'head {head}':>8}" for head in heads)]
    for row in made["layers"]:
        shares = "".join(f"{share:8.1%}" for share in row["hits_by_head"])
        lines.append(f"{row['layer']:8}{row['hits']:14.1%}{shares}")
    lines.append("attention on the circle, and on class tokens, mean of heads")
    lines += [f"{row['layer']:8}{row['attention_on_circle']:14.1%}{row['attention_on_class_tokens']:8.1%}"
              for row in made["layers"]]
    return "\n".join(lines) + "\n"


def main():
    program.run(command, arguments)


if __name__ == "__main__":
    main()
