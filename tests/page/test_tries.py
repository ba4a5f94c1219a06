"""The grid of all methods: each answers as generate.py does, and a refusal is said in its place."""
import re
from html import unescape
from pathlib import Path

import pytest
from PIL import Image

from generate import Assistant
from page.desk import Asked, Desk
from page.tries import Tried, grid_html, try_methods
from pruning import METHODS, load
from weights.image_file import open_image
from weights.tokenizer import messages

QUESTION = "What does the sign say?"
IMAGE = open_image(Path(__file__).parents[2] / "examples" / "wide.png")


@pytest.fixture(scope="module")
def desk() -> Desk:
    return Desk(Assistant("tiny", device="cpu"))


@pytest.fixture(scope="module")
def asked(desk) -> Asked:
    return list(desk.ask(IMAGE, QUESTION, "spatial", 0.05))[-1]


def test_every_method_answers_as_it_does_alone(desk, asked):
    made = list(try_methods(desk, asked))
    assert [tried.method for tried in made] == [*METHODS]
    for tried in made:
        pruner = load(tried.method, keep=0.05)
        encoded = desk.assistant.encode_images([IMAGE], pruner)
        alone = desk.assistant.answer([messages(QUESTION, 1)], encoded, asked.max_new_tokens, pruner=pruner)
        assert tried.text == alone.texts[0] and not tried.refused
        assert tried.kept == pytest.approx(sum(alone.kept[0]) / 3 / encoded.real)
        assert tried.same == (tried.text == asked.full.text)
    assert {tried.same for tried in made} == {True, False}
    assert len({tried.panel.tobytes() for tried in made}) > 15
    assert not desk.lock.locked()


def test_a_method_that_refuses_says_why_and_the_others_go_on(desk, asked, monkeypatch):
    monkeypatch.setattr("pruning.methods.sgl.load_guide", lambda *arguments: refuse("its guide\nis not here"))
    first, second = try_methods(desk, asked, ["sgl", "random"])
    assert (first.refused, first.text, second.refused) == ("its guide is not here", "", "") and second.text
    assert max(first.panel.size) < 300 and not desk.lock.locked()


def refuse(words: str):
    raise ValueError(words)


def test_others_may_have_the_model_in_between(desk, asked):
    trying = try_methods(desk, asked, ["random", "spatial"])
    next(trying)
    assert not desk.lock.locked() and list(desk.ask(IMAGE, "Is there a sign?", "random", 0.5))[-1].done
    assert next(trying).method == "spatial"


def test_the_grid_says_what_the_methods_did(asked):
    panel = Image.new("RGB", (4, 2))
    made = [Tried("random", panel, 0.25, "a <b>", False), Tried("spatial", panel, 0.5, asked.full.text, True),
            Tried("sgl", panel, refused="no <guide>"), Tried("tome", panel, 0.1, "", False)]
    page = grid_html(asked, made)
    assert f"{QUESTION} {asked.full.text} (with all image tokens); each method at 5%" in unescape(page)
    assert f'data-done="4">4 of {len(METHODS)} methods' in page
    assert "<guide>" not in page and "a <b>" not in page
    figures = re.findall(r"<figure (.*?)>.*?<figcaption>(.*?)</figcaption>", page)
    words = [unescape(re.sub(r"<[^>]+>", " ", words)).split() for _, words in figures]
    assert [" ".join(each) for each in words] == [
        "random 25.0% kept ✗ another answer: a <b>", f"spatial 50.0% kept ✓ {asked.full.text}",
        "sgl no <guide>", "tome 10.0% kept ✗ another answer: (nothing)"]
    assert 'data-method="spatial" data-kept="0.5000"' in figures[1][0] and 'data-same="true"' in figures[1][0]
    assert page.count('src="data:image/webp;base64,') == 4
