"""One question answered with every method at one keep ratio, and the answers as a grid of small images.

    Asked ─► try_methods ─► Tried, one after the other ─► grid_html
"""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

from cli.answers import mean
from page.desk import Asked, Desk
from page.drawing import data_url
from page.looks import Looker
from page.maps import SMALL, kept_panel, smaller
from pruning import METHODS, load
from weights.messages import one_line
from weights.tokenizer import messages

GRID = "display:grid;grid-template-columns:repeat(auto-fill,minmax(140px,1fr));gap:.75rem"
SAID = "max-height:9.5em;overflow-y:auto"       # a method that keeps the wrong tokens may ramble on


@dataclass
class Tried:
    """What a method made of the question; where it refuses, only why."""
    method: str
    panel: Image.Image                          # what it keeps, small
    kept: float = 0.0                           # share of the image tokens, mean over layers
    text: str = ""
    same: bool = False                          # as the answer with all image tokens
    refused: str = ""


def try_methods(desk: Desk, asked: Asked, methods: Sequence[str] = tuple(METHODS)) -> Iterator[Tried]:
    """Ask again with each of these methods, at the keep ratio of `asked` and with their defaults otherwise.
    Whoever else asks may have the model in between."""
    assistant = desk.assistant
    with desk.turn(asked, ignore):
        unpruned = assistant.encode_images([asked.image], keep_states=True)
    for name in methods:
        pruner = load(name, keep=asked.keep)
        looker = Looker(pruner)
        try:
            with desk.turn(asked, ignore):
                encoded = desk.encoded_for(pruner, asked, unpruned, looker)
                answer = assistant.answer([messages(asked.question, 1)], encoded, asked.max_new_tokens,
                                          pruner=looker)
            panel = kept_panel(asked.image, assistant.processor, looker)
            yield Tried(name, panel, mean(answer.kept[0]) / unpruned.real, answer.texts[0],
                        answer.texts[0] == asked.full.text)
        except ValueError as error:             # a guide that does not fit the model, say
            yield Tried(name, smaller(asked.image, SMALL), refused=one_line(error))


def ignore(asked: Asked):
    """The `push` of those who do not watch."""


# ----- the grid


def grid_html(asked: Asked, made: list[Tried]) -> str:
    """A figure for each method so far, and how many are still to come."""
    head = f"{asked.question} {asked.full.text} (with all image tokens); each method at {asked.keep:.0%}"
    progress = f"{len(made)} of {len(METHODS)} methods"
    return (f'<p>{escape(head)}</p>'
            f'<p id="see-progress" role="status" data-done="{len(made)}">{progress}</p>'
            f'<div style="{GRID}">{"".join(map(figure_html, made))}</div>')


def figure_html(tried: Tried) -> str:
    """One small multiple."""
    if tried.refused:
        said = escape(tried.refused)
    else:
        mark = "✓" if tried.same else "✗ another answer:"
        said = f"{tried.kept:.1%} kept<br>{mark} {escape(tried.text) or '<em>(nothing)</em>'}"
    return (f'<figure data-method="{tried.method}" data-kept="{tried.kept:.4f}" '
            f'data-answer="{escape(tried.text)}" data-same="{str(tried.same).lower()}" '
            f'style="margin:0;overflow-wrap:anywhere"><img src="{data_url(tried.panel, "webp")}" '
            f'alt="what {tried.method} keeps" style="width:100%"><figcaption><b style="font-size:.85em">'
            f'{tried.method}</b><div style="{SAID}">{said}</div></figcaption></figure>')
