"""The See tab in a browser: a word is clicked, and the map is that of the word."""
import io
from pathlib import Path

import pytest
from PIL import Image, ImageChops
from playwright.sync_api import expect
from visitor import WATCH, Visitor

from generate import Assistant
from page.desk import Desk
from page.looks import Looker, words_of
from page.maps import heat_map
from page.see import PRUNED, redraw, show_answer
from pruning import METHODS, Pruner, load
from weights.image_file import open_image
from weights.tokenizer import messages

QUESTION, LONG = "What is written on the circle?", "Describe the picture."
SHAPES = open_image(Path(__file__).parents[2] / "examples" / "shapes.png")        # the page begins with it
FETCH = "async address => [...new Uint8Array(await (await fetch(address)).arrayBuffer())]"
ALL = "all of it"


class Seer(Visitor):
    """One who opens the See tab."""

    def see(self, *ask: str):
        """Ask first, if there is a question."""
        for question in ask:
            self.tab("Ask")
            self.ask(question)
        self.tab("See")

    def click(self, word: str):
        self.page.locator("#see-words").get_by_text(word, exact=True).first.click()

    def share(self, *parts: str):
        """Wait until it stands below the map."""
        for part in parts:
            expect(self.page.locator("#see-share")).to_contain_text(part)

    def shown(self, element: str) -> Image.Image:
        address = self.page.locator(f"#{element} img").get_attribute("src")
        return Image.open(io.BytesIO(bytes(self.page.evaluate(FETCH, address)))).convert("RGB")

    def words(self) -> list[str]:
        return self.page.locator("#see-words label span").all_inner_texts()


@pytest.fixture
def seer(visit) -> Seer:
    return Seer(visit())


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return Assistant("tiny", device="cpu")


def made(assistant: Assistant, pruner: Pruner, word: str, *of: int | None) -> Image.Image:
    """The map as it has to be."""
    looker = Looker(pruner)
    answer = assistant.answer([messages(QUESTION, 1)], assistant.encode_images([SHAPES], looker), 64,
                              pruner=looker)
    _, words = words_of(assistant.tokenizer, answer.tokens[0])
    looks = looker.looks(len(answer.tokens[0]))
    tokens = next(each.tokens for each in words if each.text == word)
    return heat_map(SHAPES, assistant.processor, looker, looks, tokens, *of)


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and ImageChops.difference(one, other).getbbox() is None


def test_before_a_question_the_tab_says_what_to_do(seer):
    seer.see()
    expect(seer.page.locator("#see-empty")).to_contain_text("Ask a question first")
    expect(seer.page.locator("#see-all")).to_be_hidden()


def test_a_click_on_a_word_shows_where_the_model_looked_for_it(seer, assistant):
    """By layer and head, with few image tokens and with all of them."""
    seer.see(QUESTION)
    seer.share("For the answer:")
    assert seer.words() == [ALL, "Y"]
    seer.click("Y")
    seer.share("For “Y”: 10.9% of the attention is on the framed patch")
    pruner = load("coreset", keep=0.1)
    assert eventually(seer, made(assistant, pruner, "Y"))
    seer.choose("see-layer", "layer 1")
    seer.choose("see-head", "head 2")
    assert eventually(seer, made(assistant, pruner, "Y", 1, 2))
    kept = seer.shown("see-kept")
    seer.page.locator("#see-answer").get_by_text("with all image tokens").click()
    seer.share("For the answer: 19.4% of the attention")
    seer.click("Y")
    seer.share("For “Y”: 19.4%")
    assert eventually(seer, made(assistant, Pruner(), "Y"))
    assert not same(seer.shown("see-kept"), kept)


def eventually(seer: Seer, wanted: Image.Image) -> bool:
    """Whether the map becomes the wanted one."""
    for _ in range(100):
        if same(seer.shown("see-heat"), wanted):
            return True
        seer.page.wait_for_timeout(100)
    return False


def test_every_word_of_a_long_answer_can_be_chosen_also_with_the_keyboard(seer):
    seer.see(LONG)
    seer.share("For the answer:")
    words = seer.words()
    assert words[:4] == [ALL, "a", "black", "star"] and "," in words and words[-1].isdigit()
    seer.click("star")
    seer.share("For “star”:")
    seer.page.keyboard.press("Tab")
    seer.page.keyboard.press("Space")
    seer.share(f"For “{words[4]}”:")


def test_another_question_has_other_words(seer):
    seer.see(QUESTION)
    seer.click("Y")
    seer.share("For “Y”:")
    seer.see("Do you see a red star?")
    seer.share("For the answer:")
    expect(seer.page.locator("#see-words")).to_contain_text("no")
    assert seer.words() == [ALL, "no"]


def test_all_methods_answer_one_after_the_other(seer, visit):
    """And somebody else is answered meanwhile."""
    seer.see(QUESTION)
    seer.share("For the answer:")
    seer.page.evaluate(WATCH, ["see-progress"])
    seer.page.locator("#see-all").click()
    seer.page.locator("#see-methods figure").first.wait_for()
    assert Visitor(visit()).ask("Do you see a red star?")[0] == "no"
    seer.page.locator(f'#see-progress[data-done="{len(METHODS)}"]').wait_for()
    assert len(seer.page.evaluate("window.seen")["see-progress"]) > 5
    figures = seer.page.locator("#see-methods figure")
    assert [figure.get_attribute("data-method") for figure in figures.all()] == [*METHODS]
    for figure in figures.all():
        same = figure.get_attribute("data-answer") == "Y"
        assert figure.get_attribute("data-same") == str(same).lower()
        assert ("✓ Y" in figure.inner_text()) == same and 0 < float(figure.get_attribute("data-kept")) <= 1
        assert figure.locator("img").evaluate("image => image.naturalWidth") > 100


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(visit, width):
    seer = Seer(visit(viewport={"width": width, "height": 900}))
    seer.see(LONG)
    seer.share("For the answer:")
    seer.page.locator("#see-all").click()
    seer.page.locator("#see-methods figure").nth(3).wait_for()
    assert seer.page.evaluate("document.documentElement.scrollWidth") <= width


# ----- what a browser is not needed for


def test_what_has_no_map_is_said_in_words(assistant, monkeypatch):
    """An answer of SGL's small model, and the words of an answer that was too long to record."""
    desk = Desk(assistant)
    monkeypatch.setattr("page.desk.load", lambda method, **options: load(method, **options, threshold=0.0))
    asked = list(desk.ask(SHAPES, QUESTION, "sgl", 0.4))[-1]
    assert asked.pruned.figures["answered_early"] == [0]
    note, body, *rest = show_answer(desk, asked, PRUNED)
    assert "a smaller model gave this answer" in note.value
    assert note.visible and not body.visible and len(rest) == 6
    monkeypatch.undo()
    monkeypatch.setattr("page.looks.MOST_BYTES", 1)
    asked = list(desk.ask(SHAPES, LONG, "random", 0.4))[-1]
    show_answer(desk, asked, PRUNED)
    assert "For “a”" in redraw(desk, asked, PRUNED, 0, "all", "all")[2]
    assert "this word was not recorded" in redraw(desk, asked, PRUNED, 5, "all", "all")[2]
