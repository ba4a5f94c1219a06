"""What the page says: both answers as they grow, what each took, whether they differ; errors; methods."""
import re
import sys
import traceback
from collections.abc import Callable
from html import escape

from cli.answers import speed
from cli.program import is_of_the_user, words_of
from cli.terminal import size, took
from page.desk import Asked, Said
from pruning import METHODS

STYLE = """
.answers { width: 100%; border-collapse: collapse; font-size: 1rem; table-layout: fixed; }
.answers caption { padding: .3rem .6rem; text-align: left; font-weight: 600; overflow-wrap: anywhere; }
.answers, .answers * { border: none !important; }
.answers :is(td, th) { padding: .3rem .6rem !important; text-align: left; vertical-align: top;
    overflow-wrap: anywhere; }
.answers tr { border-bottom: 1px solid var(--border-color-primary) !important; }
.answers tbody th { font-weight: 400 !important; }
.answers .said td { font-size: 1.35rem; line-height: 1.5; min-height: 2rem; }
.answers .first { width: 24%; }
.verdict { padding: .5rem .6rem; font-weight: 600; }
.doing { padding: .3rem .6rem; min-height: 1.4rem; }
#examples .grid-container { grid-template-columns: repeat(6, minmax(0, 1fr)) !important; }
#examples .caption-label { display: none; }
#examples .thumbnail-item { min-width: 0; height: 80px; }
@media (max-width: 600px) {
    .answers { font-size: .85rem; }
    .answers .said td { font-size: 1.1rem; }
}
.refused { padding: .6rem; border-left: 4px solid #d33; background: var(--block-background-fill);
    overflow-wrap: anywhere; }
"""


def answers_html(asked: Asked, right: str | None = None) -> str:
    """Everything about a question so far. `right` is the right answer, where it is known.

    A cell of the table has the figure as it is in `data-value`, and as people read it as its text.
    """
    sides = {"full": asked.full, "pruned": asked.pruned}
    heads = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads_of(asked))
    said = "".join(f'<td id="{side}-answer">{answer_html(one)}</td>' for side, one in sides.items())
    lines = "".join(line_html(*line, sides) for line in LINES)
    return (f'<table class="answers"><caption>{escape(asked.question)}</caption>'
            f'<thead><tr><th class="first"></th>{heads}</tr></thead>'
            f'<tbody><tr class="said"><th scope="row">answer</th>{said}</tr>{lines}</tbody></table>'
            f'{verdict_html(asked, right)}'
            f'<p class="doing" id="doing" role="status">{escape(asked.doing)}</p>')


def heads_of(asked: Asked) -> tuple[str, str]:
    return "all image tokens", str(asked.pruner())


def answer_html(said: Said | None) -> str:
    """An empty answer is one, too."""
    if said is None:
        return ""
    if said.figures is not None and not said.text:
        return "<em>(nothing)</em>"
    return escape(said.text)


FAULT = "a fault of this program: what happened is in the terminal where it was started"

# What the table tells of `figures`: the name of a line, where its number is, and how it is written.
LINES = (("image tokens kept", "image_tokens.kept", str), ("image KV", "image_kv_bytes", size),
         ("encode", "ms.encode", took), ("prefill", "ms.prefill", took), ("decode", "ms.decode", took),
         ("speed", "tokens_per_second", speed))


def line_html(name: str, path: str, write: Callable[[float], str], sides: dict[str, Said | None]) -> str:
    """One figure of both answers, as far as they are done."""
    cells = ""
    for side, said in sides.items():
        if said is None or said.figures is None:
            cells += "<td></td>"
            continue
        value = figure(said.figures, path)
        more = more_words(said.figures, path)
        cells += (f'<td id="{side}-{path.replace(".", "-")}" data-value="{value}">{escape(write(value))}'
                  f'{f"<br><small>{escape(more)}</small>" if more else ""}</td>')
    return f'<tr><th scope="row">{name}</th>{cells}</tr>'


def figure(figures: dict, path: str) -> float:
    """"ms.encode" is figures["ms"]["encode"]."""
    for part in path.split("."):
        figures = figures[part]
    return figures


def more_words(figures: dict, path: str) -> str:
    """What belongs to a number: the tokens of each layer where they differ, bytes that are kept beside."""
    layers = figures["kept_by_layer"]
    if path == "image_tokens.kept":
        several = len({round(layer) for layer in layers}) > 1
        by_layer = f"; by layer {' '.join(f'{layer:.0f}' for layer in layers)}" if several else ""
        return f"of {figures['image_tokens']['real']}{by_layer}"
    if path == "image_kv_bytes" and figures["image_kv_stored_bytes"] > figures["image_kv_bytes"]:
        return f"of {size(figures['image_kv_stored_bytes'])} stored"
    return ""


def verdict_html(asked: Asked, right: str | None) -> str:
    """Whether the answers differ, and whether they are right."""
    if not asked.done:
        return ""
    words = "The answers differ." if asked.differ else "Both answers are the same."
    if right is not None:
        words += " " + judged(asked, right)
    return f'<p class="verdict" id="verdict">{escape(words)}</p>'


def judged(asked: Asked, right: str) -> str:
    """An answer is right where it is the expected one to the letter, as in the evaluation."""
    full = asked.full.text == right
    pruned = asked.pruned.text == right
    if full and pruned:
        return "Right."
    if not full and not pruned:
        return f"{'Neither is' if asked.differ else 'It is not'} right: {right}."
    return f"Right is {right}: only the answer with {'all' if full else 'fewer'} image tokens."


def stopped(html: str | None) -> str:
    """The answers as they stood when somebody stopped them."""
    return re.sub(r'(<p class="doing"[^>]*>)[^<]+', r"\1stopped", html or "")


def refusal_html(words: str) -> str:
    """Why there is no answer."""
    return f'<p class="refused" id="refused" role="alert">{escape(words)}</p>'


def said_of(error: Exception) -> str:
    """What the page says of an error; one that is a fault of ours is on stderr in full."""
    if is_of_the_user(error):
        return words_of(error)
    traceback.print_exception(error, file=sys.stderr)
    return FAULT


def about_method(name: str) -> str:
    """What a method does, in a line, and its paper."""
    method = METHODS[name]
    words = " ".join(method.__doc__.split("\n\n")[0].split())
    first, dot, _ = words.partition(". ")
    unit = f" Keep is a share {method.unit}." if method.unit else ""
    return f"{first}{'.' * bool(dot)}{unit}{f' *{method.paper}*' if method.paper else ''}"
