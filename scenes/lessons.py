"""Scenes as training batches: tiles, conversations in the Llama-3 chat format, and what each patch shows.

Each image has one conversation of several questions, so that one encoding of the image serves them all. The
labels of the patches are for a small extra loss in training and are no part of the model.
P images in a batch, T text tokens, N image tokens.
"""
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from model.image_tokens import Tiles
from scenes.draw import CHARACTERS, COLOURS, SHAPES, Scene, draw, make_scene
from scenes.questions import Question, questions
from scenes.tiny import IMAGE_TOKEN, PATCH, TILE
from weights.images import ImageProcessor, fit

TURNS = 7           # questions about an image, as far as they fit into the text
SHAPE_LABELS = ("nothing", *SHAPES, "sign")
COLOUR_LABELS = ("none", *COLOURS)
CHARACTER_LABELS = ("none", *CHARACTERS)
DIGITS = 3          # of a sign, left to right


@dataclass
class Batch:
    tiles: list[Tiles]
    input_ids: Tensor           # [P, T] padded on the right
    targets: Tensor             # [P, T] the next token if it belongs to an answer, else -100
    weights: Tensor             # [P, T] fp32 how much a token of an answer counts
    patches: dict[str, Tensor]  # name -> labels [P, N], or [P, N, 2] for "place"


class Lessons:
    """Batches of scenes of one ratio of tiles, the same ones for the same seed."""

    def __init__(self, tokenizer: Tokenizer, processor: ImageProcessor, length: int):
        self.tokenizer = tokenizer
        self.processor = processor
        self.length = length                # of a conversation, in tokens

    def batch(self, split: str, first: int, images: int, ratio: tuple[int, int], seed: int,
              crowded: bool = False) -> Batch:
        """The scenes first .. first + images - 1 of a split, with questions drawn by `seed`.

        `crowded` takes the scene with most shapes of three: more to recognise for the same work.
        """
        rng = random.Random(f"{seed}:{first}")
        scenes = [make_scene(split, first + i, ratio) for i in range(images)]
        if crowded:
            others = range(10 ** 9 + 2 * first, 10 ** 9 + 2 * (first + images))
            scenes += [make_scene(split, i, ratio) for i in others]
            scenes = [max(scenes[i::images], key=lambda scene: len(scene.things)) for i in range(images)]
        tiles = [self.processor([draw(scene)]) for scene in scenes]
        texts = [self._conversation(turns(scene, rng)) for scene in scenes]
        ids, targets, weights = (torch.stack([text[i] for text in texts]) for i in range(3))
        each = [patch_labels(scene) for scene in scenes]
        labels = {name: torch.stack([label[name] for label in each]) for name in each[0]}
        return Batch(tiles, ids, targets, weights, labels)

    def _conversation(self, turns: list[Question]) -> tuple[Tensor, Tensor, Tensor]:
        ids = self._encode("<|begin_of_text|>")
        answer = [0.0]                                              # how much each token counts
        for i, turn in enumerate(turns):
            image = IMAGE_TOKEN if i == 0 else ""
            asked = self._encode(f"<|start_header_id|>user<|end_header_id|>\n\n{image}{turn.text}<|eot_id|>"
                                 "<|start_header_id|>assistant<|end_header_id|>\n\n")
            said = self._encode(f"{turn.answer}<|eot_id|>")
            if len(ids) + len(asked) + len(said) > self.length:
                break
            ids += asked + said
            answer += [0.0] * len(asked) + [len(said) ** -0.5] * len(said)
        room = self.length + 1 - len(ids)
        ids = torch.tensor(ids + self._encode("<|finetune_right_pad_id|>") * room)
        weights = torch.tensor(answer + [0.0] * room)[1:]
        return ids[:-1], torch.where(weights > 0, ids[1:], -100), weights

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def turns(scene: Scene, rng: random.Random) -> list[Question]:
    """The questions of a conversation. A description is last, where it seldom finds room, or first."""
    asked = questions(scene, rng.getrandbits(30), TURNS)
    if asked[-1].kind == "describe" and rng.random() < 0.5:
        asked = asked[-1:] + asked[:-1]
    return asked


def patch_labels(scene: Scene) -> dict[str, Tensor]:
    """What is under the centre of each patch, and where in the image that is (0 to 1); class tokens too."""
    side = TILE // PATCH
    centre = (torch.arange(side) + 0.5) * PATCH
    where = torch.zeros(scene.rows, scene.columns, side * side + 1, 2)
    rows, columns = torch.arange(scene.rows).view(-1, 1, 1, 1), torch.arange(scene.columns).view(1, -1, 1, 1)
    where[:, :, 1:, 0] = (rows * TILE + centre[:, None]).expand(-1, scene.columns, -1, side).flatten(2)
    where[:, :, 1:, 1] = (columns * TILE + centre[None]).expand(scene.rows, -1, side, -1).flatten(2)
    scale = fit(scene.height, scene.width, (scene.rows, scene.columns), TILE)[0] / scene.height
    y, x = (where.view(-1, 2) / scale).unbind(-1)                                # [N] pixels of the image
    patch = torch.arange(len(x)) % (side * side + 1) > 0
    labels = {name: torch.zeros(len(x), dtype=torch.long) for name in
              ("shape", "colour", "character", *(f"digit{i}" for i in range(DIGITS)))}
    for thing in scene.things:
        under = patch & ((x - thing.x) ** 2 + (y - thing.y) ** 2 < thing.radius ** 2)
        labels["shape"][under] = SHAPE_LABELS.index(thing.shape)
        labels["colour"][under] = COLOUR_LABELS.index(thing.colour)
        labels["character"][under] = CHARACTER_LABELS.index(thing.character or "none")
    if scene.sign is not None:
        sign = scene.sign
        under = patch & ((x - sign.x).abs() < sign.width / 2) & ((y - sign.y).abs() < sign.height / 2)
        labels["shape"][under] = SHAPE_LABELS.index("sign")
        for i, digit in enumerate(sign.text):
            labels[f"digit{i}"][under] = 1 + int(digit)
    labels["place"] = torch.stack((y / scene.height, x / scene.width), -1)
    return labels


class PatchReader(nn.Module):
    """Reads linearly from its image token what a patch shows. It is not part of the model."""

    def __init__(self, width: int):
        super().__init__()
        self.sizes = {"shape": len(SHAPE_LABELS), "colour": len(COLOUR_LABELS),
                      "character": len(CHARACTER_LABELS), **{f"digit{i}": 11 for i in range(DIGITS)}}
        self.head = nn.Linear(width, 2 + sum(self.sizes.values()))

    def forward(self, features: Tensor, labels: dict[str, Tensor]) -> Tensor:
        """features [P, N, D] and the labels of `patch_labels` -> the sum of their losses."""
        labels = {name: label.flatten(0, 1) for name, label in labels.items()}
        x = features.float().flatten(0, 1)
        shape = labels["shape"]
        place, *scores = self.head(x).split([2, *self.sizes.values()], dim=-1)
        loss = 10 * F.mse_loss(place, labels["place"])
        rare = torch.where(shape > 0, 1.0, 0.1)                     # most patches show no shape
        sign = shape == SHAPE_LABELS.index("sign")
        for name, score in zip(self.sizes, scores, strict=True):
            each = F.cross_entropy(score, labels[name], reduction="none")
            counts = rare if name == "shape" else (sign if "digit" in name else (shape > 0) & ~sign).float()
            loss = loss + (each * counts).sum() / counts.sum().clamp(min=1)
        return loss
