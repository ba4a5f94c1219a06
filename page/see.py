"""The See tab: where the model looked for each word of the answer, what was kept, and all methods beside it.

    Asked ─► Desk.again with a Looker ─► its Looks ─► maps.py ─► the image for a word, a layer and a head
    Asked ─► tries.py ─► a small image and an answer of every method

Elements that tests may rely on (`elem_id`): see-note, see-answer, see-words, see-layer, see-head, see-heat,
see-share, see-kept, see-all, see-methods; and in the last one a `figure` with `data-method`, `data-kept`,
`data-answer` and `data-same` for every method, and see-progress.
"""
from collections.abc import Callable, Iterator
from functools import partial
from html import escape

import gradio as gr
from PIL import Image

from page.answers import refusal_html, said_of
from page.ask import MODEL
from page.desk import Asked, Desk, Said
from page.looks import Looker, Word, words_of
from page.maps import heat_map, heat_words
from page.scene import shown
from page.tries import Tried, grid_html, try_methods
from pruning.visualize import kept_map

NOT_YET = '<p id="see-empty">Ask a question first, in the tab Ask: here is then what the model looked at.</p>'
EARLY = "a smaller model gave this answer, so there is no map of where this one looked"
PRUNED, FULL = "with fewer image tokens", "with all image tokens"
ALL_WORDS = -1
ALL = "all"
LEGEND = "Brightest, and framed: most attention. Colours go by its square root; class tokens are not drawn."


def see_tab(desk: Desk, state: gr.State) -> tuple[Callable, list]:
    """Build the tab inside the current `gr.Tab`; returns what is done when it is opened, and what that fills.
    """
    note = gr.HTML(NOT_YET, elem_id="see-note")
    with gr.Column(visible=False) as body:
        with gr.Row():
            with gr.Column(min_width=300):
                heat = gr.Image(label="Where the model looked", format="png", interactive=False,
                                height="min(460px, 85vw)", buttons=["download", "fullscreen"],
                                elem_id="see-heat")
                share = gr.HTML(elem_id="see-share")
            with gr.Column(min_width=300):
                which = gr.Radio([PRUNED, FULL], value=PRUNED, label="Answer", elem_id="see-answer")
                word = gr.Radio([], label="Words of the answer: choose one", elem_id="see-words")
                layer = gr.Dropdown([], label="Cross-attention layer", elem_id="see-layer")
                head = gr.Dropdown([], label="Head", elem_id="see-head")
        gr.Markdown("### What is kept")
        kept = gr.Image(show_label=False, format="png", interactive=False, buttons=["download", "fullscreen"],
                        elem_id="see-kept")
        every = gr.Button("All methods", elem_id="see-all")
        methods = gr.HTML(elem_id="see-methods")

    answer = [note, body, word, layer, head, heat, share, kept]
    chosen = [state, which, word, layer, head]
    which.input(partial(show_answer, desk), [state, which], answer, concurrency_limit=1, concurrency_id=MODEL,
                show_progress="minimal", show_progress_on=heat)
    for choice in word, layer, head:
        choice.input(partial(redraw, desk), chosen, [note, heat, share], show_progress="hidden")
    every.click(partial(show_methods, desk), state, methods, concurrency_limit=1, concurrency_id="methods",
                show_progress="minimal")
    return partial(show, desk), [which, methods, *answer]


def show(desk: Desk, asked: Asked | None) -> tuple:
    """The tab of another question, or of none."""
    return PRUNED, "", *show_answer(desk, asked, PRUNED)


def show_answer(desk: Desk, asked: Asked | None, which: str) -> tuple:
    """One of the two answers: its words, its layers and heads, and its maps."""
    if asked is None or not asked.done:
        return gr.HTML(NOT_YET, visible=True), gr.Column(visible=False), *[gr.skip()] * 6
    try:
        said = watched(desk, asked, which)
        _, words = words_of(desk.assistant.tokenizer, said.figures["token_ids"])
        choices = [("all of it", ALL_WORDS), *((word.text, i) for i, word in enumerate(words))]
        title = f"{asked.question} {said.text}; {asked.pruner() if which == PRUNED else FULL}"
        return (no_note(), gr.Column(visible=True), gr.Radio(choices, value=ALL_WORDS),
                choose_of("layer", said.looks.layers), choose_of("head", said.looks.heads),
                *maps(desk, asked, said, ALL_WORDS, ALL, ALL),
                kept_map([asked.image], desk.assistant.processor, said.recorder, title))
    except Exception as error:
        return note_of(error), gr.Column(visible=False), *[gr.skip()] * 6


def redraw(desk: Desk, asked: Asked, which: str, word: int, layer: str, head: str) -> tuple:
    """Another word, layer or head of the answer that is shown."""
    try:
        return no_note(), *maps(desk, asked, said_by(asked, which), word, layer, head)
    except Exception as error:
        return note_of(error), gr.skip(), gr.skip()


def no_note() -> gr.HTML:
    return gr.HTML("", visible=False)


def note_of(error: Exception) -> gr.HTML:
    """Why there is no map."""
    return gr.HTML(refusal_html(said_of(error)), visible=True)


def said_by(asked: Asked, which: str) -> Said:
    return asked.pruned if which == PRUNED else asked.full


def watched(desk: Desk, asked: Asked, which: str) -> Said:
    """The answer, with its recorder and looks. It is asked once more where they are not there yet."""
    said = said_by(asked, which)
    if said.figures["answered_early"]:
        raise ValueError(EARLY)
    if said.looks is None:
        looker = desk.again(asked, Looker, which == PRUNED)
        said.recorder, said.looks = looker, looker.looks(len(said.figures["token_ids"]))
    return said


def maps(desk: Desk, asked: Asked, said: Said, word: int, layer: str, head: str) -> tuple[Image.Image, str]:
    """The heat map, and what is said below it."""
    _, words = words_of(desk.assistant.tokenizer, said.figures["token_ids"])
    tokens = [token for token in tokens_of(words, word, len(said.looks)) if token < len(said.looks)]
    if not tokens:
        why = "this word was not recorded" if words else "the answer is empty"
        return shown(asked.image), share_html(why)
    of = (None if layer == ALL else int(layer)), (None if head == ALL else int(head))
    name = "the answer" if word == ALL_WORDS else f"“{words[word].text}”"
    drawn = heat_map(asked.image, desk.assistant.processor, said.recorder, said.looks, tokens, *of)
    return drawn, share_html(f"For {name}: {heat_words(said.looks, tokens, *of)}.")


def tokens_of(words: list[Word], word: int, tokens: int) -> list[int]:
    return list(range(tokens)) if word == ALL_WORDS else words[word].tokens


def choose_of(what: str, count: int) -> gr.Dropdown:
    """All of the layers or heads, or one of them."""
    one = [(f"{what} {i}", str(i)) for i in range(count)]
    return gr.Dropdown([(f"all {count} {what}s, mean", ALL), *one], value=ALL)


def share_html(words: str) -> str:
    return f'<p role="status">{escape(words)}</p><p><small>{LEGEND}</small></p>'


# ----- all methods


def show_methods(desk: Desk, asked: Asked | None) -> Iterator[str]:
    """The grid as it grows."""
    if asked is None or not asked.done:
        yield NOT_YET
        return
    made: list[Tried] = []
    yield grid_html(asked, made)
    try:
        for tried in try_methods(desk, asked):
            made.append(tried)
            yield grid_html(asked, made)
    except Exception as error:
        yield grid_html(asked, made) + refusal_html(said_of(error))
