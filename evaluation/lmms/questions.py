"""Questions about different images in one batch, each with limits of its own.

    questions ── groups with the same limits ─► encode_sequences ─► Assistant.answer ─► Answered, in order

A batch may mix sequences with several images, one, or none. Nothing here knows lmms-eval. B sequences.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from generate import Assistant
from model.answer import EncodedImages
from model.clock import Clock
from model.image_tokens import ImageTokens, Tiles
from model.sampling import Sampler
from pruning import Pruner
from weights.tokenizer import messages

DATE = "26 Jul 2024"        # for chat templates that write today's: the one that they name themselves


@dataclass(frozen=True)
class Limits:
    """Where an answer ends, and how its tokens are drawn."""
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Question:
    """A text, and the RGB images that come before it."""
    text: str
    images: Sequence[Image.Image]
    limits: Limits


@dataclass(frozen=True)
class Answered:
    """One answer, and what it cost."""
    text: str
    prompt_tokens: int
    new_tokens: int
    real: int                   # image tokens of the tiles that the images fill
    kept: list[float]           # of these, in each cross-attention layer; empty without an image
    early: bool                 # whether a smaller model answered
    ms: float                   # of the whole batch, shared equally


def answer(assistant: Assistant, questions: Sequence[Question],
           pruner: Pruner | None = None) -> list[Answered]:
    """Answer all questions, as each of them alone is answered.

    An answer is cut short where the model's context ends. Raises ValueError for a prompt that fills it.
    """
    groups: dict[Limits, list[int]] = {}
    for i, question in enumerate(questions):
        groups.setdefault(limits_in_context(assistant, question), []).append(i)
    answered = {}
    for limits, members in groups.items():
        group = answer_alike(assistant, [questions[i] for i in members], limits, pruner)
        answered.update(zip(members, group, strict=True))
    return [answered[i] for i in range(len(questions))]


def limits_in_context(assistant: Assistant, question: Question) -> Limits:
    """The limits of a question, with no more new tokens than the context has room for after the prompt."""
    prompt = assistant.tokenizer.encode(messages(question.text, len(question.images)), DATE)
    context = assistant.model.config.text.max_position_embeddings
    room = context - len(prompt)
    if room < 1:
        raise ValueError(f"a prompt of {len(prompt)} tokens fills the context of {context}: leave out this "
                         "question or its task")
    limits = question.limits
    return Limits(min(limits.max_new_tokens, room), limits.stop, limits.temperature, limits.top_p)


def answer_alike(assistant: Assistant, questions: Sequence[Question], limits: Limits,
                 pruner: Pruner | None) -> list[Answered]:
    """One batch: questions with the same limits."""
    encoded = encode_sequences(assistant, [question.images for question in questions], pruner)
    conversations = [messages(question.text, len(question.images)) for question in questions]
    made = assistant.answer(conversations, encoded, limits.max_new_tokens,
                            Sampler(limits.temperature, limits.top_p), DATE, pruner=pruner, stop=limits.stop)
    ms = (encoded.ms + made.ms["prefill"] + made.ms["decode"]) / len(questions)
    lengths = [len(assistant.tokenizer.encode(conversation, DATE)) for conversation in conversations]
    return [Answered(made.texts[b], lengths[b], len(made.tokens[b]), encoded.real_of_each[b],
                     list(made.kept[b]) if encoded.real_of_each[b] else [], b in made.early, ms)
            for b in range(len(questions))]


# ----- images of several sequences


@dataclass
class EncodedSequences(EncodedImages):
    """The encoded images of every sequence of a batch, each its own."""
    real_of_each: list[int]

    def expand(self, batch: int) -> ImageTokens | None:
        """The tokens [B, N, D] as they are: they are of all sequences already."""
        return self.tokens


def encode_sequences(assistant: Assistant, images: Sequence[Sequence[Image.Image]],
                     pruner: Pruner | None = None) -> EncodedSequences:
    """What `Assistant.encode_images` does, for the images of each sequence, which may have none."""
    if pruner is None or pruner.keeps_all:
        pruner = Pruner()
    model = assistant.model
    processor = assistant.processor
    tiles = [pruner.preprocess(list(own), processor) if own else None for own in images]       # hook 0
    grids = [[processor.grid(image) for image in own] for own in images]
    real = [model.image_tokens(own) for own in grids]
    slots = sum(map(len, images)) * model.config.vision.max_num_tiles * model.config.vision.tokens_per_tile
    clock = Clock(model.device)
    with torch.inference_mode(), assistant.peak:
        tokens = model.encode(tiles, pruner.keep_states)
    there = [each for each in tiles if each is not None]
    together = Tiles.cat(there) if there else processor([])
    return EncodedSequences(together, tokens, clock.lap(), slots, sum(real), real)
