"""Questions about different images in one batch, each with limits of its own.

    questions ── groups with the same sampling ─► encode_images, answer of Assistant ─► Answered, in order

A batch may mix sequences with several images, one, or none. Nothing here knows lmms-eval. B sequences.
"""
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from generate import Assistant
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
    groups: dict[tuple[float, float], list[int]] = {}
    for i, question in enumerate(questions):
        check_prompt(assistant, question)
        groups.setdefault((question.limits.temperature, question.limits.top_p), []).append(i)
    answered = {}
    for sampling, members in groups.items():
        group = answer_alike(assistant, [questions[i] for i in members], Sampler(*sampling), pruner)
        answered.update(zip(members, group, strict=True))
    return [answered[i] for i in range(len(questions))]


def check_prompt(assistant: Assistant, question: Question):
    """Raise ValueError where the context has no room for an answer after the prompt."""
    prompt = assistant.tokenizer.encode(conversation_of(question), DATE)
    context = assistant.model.config.text.max_position_embeddings
    if len(prompt) >= context:
        raise ValueError(f"a prompt of {len(prompt)} tokens fills the context of {context}: leave out this "
                         "question or its task")


def conversation_of(question: Question) -> list[dict]:
    return messages(question.text, len(question.images))


def answer_alike(assistant: Assistant, questions: Sequence[Question], sampler: Sampler,
                 pruner: Pruner | None) -> list[Answered]:
    """One batch: questions whose tokens are drawn in the same way."""
    encoded = assistant.encode_images([list(question.images) for question in questions], pruner)
    made = assistant.answer([conversation_of(question) for question in questions], encoded,
                            [question.limits.max_new_tokens for question in questions], sampler, DATE,
                            pruner=pruner, stop=[question.limits.stop for question in questions],
                            too_long="clamp")
    ms = (encoded.ms + made.ms["prefill"] + made.ms["decode"]) / len(questions)
    return [Answered(made.texts[b], made.prompt_tokens[b], len(made.tokens[b]), made.real[b],
                     list(made.kept[b]) if made.real[b] else [], b in made.early, ms)
            for b in range(len(questions))]
