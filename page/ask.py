"""The Ask tab: an image, a question, a method and how much it keeps; both answers side by side.

    choose, draw or upload ─► Subject ─┐
    type, or choose a kind ─► question ┴─ Desk.ask ─► Asked, in the visitor's `state` ─► answers.py

Elements that tests and styles may rely on (`elem_id`): examples, new-scene, upload, image, note, question,
kind, method, about, keep, ask, stop, answers; and in the answers: full-answer, pruned-answer, verdict, doing,
refused, and the figures, full-image_tokens-kept and so on, with `data-value`.
"""
from collections.abc import Iterator
from contextlib import closing
from functools import partial

import gradio as gr

from page.answers import about_method, answers_html, refusal_html, said_of, stopped
from page.desk import Asked, Desk
from page.scene import EXAMPLES, FOLDER, Subject, example, new_scene, shown, uploaded
from pruning import METHODS

MODEL = "model"             # the queue of everything that needs the model: one at a time


def ask_tab(desk: Desk, state: gr.State):
    """Build the tab inside the current `gr.Tab`; `state` gets the Asked of each answer."""
    first = example(0)
    subject = gr.State(first)
    with gr.Row():
        with gr.Column(min_width=300):
            image = gr.Image(shown(first.image), label=first.name, interactive=False, height=320,
                             format="png", buttons=["fullscreen"], elem_id="image")
            with gr.Row():
                scene = gr.Button("New scene", elem_id="new-scene")
                upload = gr.UploadButton("Upload an image", elem_id="upload", size="lg")
            note = gr.HTML(elem_id="note", visible=False)
            gallery = gr.Gallery([(str(FOLDER / name), name) for name in EXAMPLES], show_label=False,
                                 columns=6, height=100, allow_preview=False, object_fit="contain",
                                 interactive=False, buttons=[], elem_id="examples")
        with gr.Column(min_width=300):
            kind = gr.Dropdown(list(first.questions), value=None, label="Kind of question", elem_id="kind",
                               info="fills in a question of this kind", interactive=True)
            question = gr.Textbox(first.first, label="Question", lines=1, max_lines=4, elem_id="question")
            method = gr.Dropdown(list(METHODS), value="coreset", label="Pruning method", elem_id="method")
            about = gr.Markdown(about_method("coreset"), elem_id="about")
            keep = gr.Slider(2, 100, value=10, step=1, label="Image tokens kept, %", elem_id="keep")
            with gr.Row():
                button = gr.Button("Ask", variant="primary", elem_id="ask")
                stop = gr.Button("Stop", elem_id="stop")
    answers = gr.HTML(min_height=90, elem_id="answers")

    begun = [subject, image, kind, question, note, answers]
    gallery.select(choose_example, None, begun, show_progress="hidden")
    scene.click(lambda: begin(new_scene()), None, begun, show_progress="hidden")
    upload.upload(upload_image, upload, begun, show_progress="minimal", show_progress_on=image)
    kind.select(another_question, [subject, question], question, show_progress="hidden")
    method.change(about_method, method, about, show_progress="hidden")
    answered = gr.on([button.click, question.submit], partial(answer, desk),
                     [subject, question, method, keep, state], [state, answers, button],
                     concurrency_limit=1, concurrency_id=MODEL, show_progress="minimal", api_name="ask")
    answered.then(ended, answers, [answers, button], show_progress="hidden")
    stop.click(None, cancels=[answered])


def answer(desk: Desk, subject: Subject, question: str, method: str, percent: float,
           before: Asked | None) -> Iterator[tuple]:
    """The state, the answers and the button, again and again while they grow. Whatever is wrong is said in
    the place of the answers."""
    try:
        keep = round(percent / 100, 4)
        with closing(desk.ask(subject.image, question, method, keep, before=before)) as growing:
            for asked in growing:
                right = subject.right(asked.question)
                state = asked if asked.done else gr.skip()
                yield state, answers_html(asked, right), gr.Button(interactive=asked.done)
    except Exception as error:
        yield gr.skip(), refusal_html(said_of(error)), gr.Button(interactive=True)


def ended(html: str | None) -> tuple:
    """After an answer, also one that was stopped: only here has it come to rest."""
    return stopped(html), gr.Button(interactive=True)


def choose_example(chosen: gr.SelectData) -> tuple:
    return begin(example(chosen.index))


def another_question(subject: Subject, before: str, chosen: gr.SelectData) -> str:
    """Of the kind that was chosen."""
    return subject.question(chosen.value, before)


def upload_image(path: str) -> tuple:
    """A file of any kind: what is no image, or too large, leaves everything as it is."""
    try:
        return begin(uploaded(path))
    except Exception as error:
        return *[gr.skip()] * 4, gr.HTML(refusal_html(said_of(error)), visible=True), gr.skip()


def begin(subject: Subject) -> tuple:
    """What the tab shows of another image: subject, image, kinds, question, no note, and no answers."""
    return (subject, gr.Image(shown(subject.image), label=subject.name),
            gr.Dropdown(list(subject.questions), value=None), subject.first, gr.HTML("", visible=False), "")
