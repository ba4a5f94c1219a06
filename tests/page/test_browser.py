"""The page in a browser, as a visitor meets it: answers, odd input, several people at once."""
import re
import signal

import pytest
from PIL import Image
from playwright.sync_api import expect
from served import HERE, SECONDS, serve
from visitor import NEW_VERDICT, WATCH, Visitor

from page.scene import EXAMPLES
from weights.image_source import MOST_FETCHED

LONG = "Describe the picture."


@pytest.fixture
def visitor(visit) -> Visitor:
    return Visitor(visit())


# ----- the program


def test_the_page_answers_in_under_ten_seconds_and_ctrl_c_ends_it(served, tmp_path):
    """The second start: at the first one, Python may still have to compile what it imports."""
    with serve(tmp_path) as another:
        assert another.seconds < SECONDS
        assert another.process.stdout.readline() == another.greeting
        assert another.interrupt() == (128 + signal.SIGINT, "")
    assert another.hosts() <= {HERE}


def test_what_is_asked_of_other_machines_is_noticed(browser, served):
    """The counters count: requests of a page, and connections of the program."""
    page = browser.open(served.url)
    for address in "http://trimmed-llama.example/one", "https://trimmed-llama.example/two":
        page.evaluate("address => fetch(address).catch(() => null)", address)
    page.context.close()
    assert [line.split()[1] for line in browser.elsewhere.asked] == [
        "http://trimmed-llama.example/one", "trimmed-llama.example:443"]
    assert len(browser.faults) == 2
    browser.forget()


# ----- an answer


def test_the_answer_streams_and_before_it_comes_the_page_says_what_is_done(visitor):
    visitor.page.evaluate(WATCH, ["doing", "pruned-answer"])
    full, pruned = visitor.ask(LONG)
    seen = visitor.page.evaluate("window.seen")
    assert full == ("a black star, a pink circle with Y, a brown ring and an orange cross, and a sign that "
                    "says 689")
    words = seen["pruned-answer"]
    assert len(words) > 3 and words[-1] == pruned
    assert all(later.startswith(earlier) for earlier, later in zip(words, words[1:], strict=False))
    assert seen["doing"][0].startswith(("encoding 4 tiles", "reading the prompt"))
    assert "answering" in seen["doing"]


def test_the_return_key_asks(visitor):
    visitor.page.locator("#question textarea").press("Enter")
    visitor.page.locator(NEW_VERDICT).wait_for()
    assert visitor.text("full-answer") == "Y"


def test_the_slider_says_how_many_tokens_are_kept(visitor):
    for percent in 100, 50, 2:
        visitor.slide(percent)
        visitor.ask()
        assert visitor.number("full-image_tokens-kept") == 200
        assert visitor.number("pruned-image_tokens-kept") == 2 * percent


def test_another_method_answers(visitor):
    before = visitor.text("about")
    visitor.choose("method", "random")
    expect(visitor.page.locator("#about")).not_to_have_text(before)
    visitor.ask()
    assert "random, keep 0.1" in visitor.text("answers")


def test_every_example_has_its_question_and_the_right_answer(visitor):
    for place, (name, asked) in enumerate(EXAMPLES.items()):
        visitor.example(place, name)
        expect(visitor.page.locator("#question textarea")).to_have_value(asked.text)
        assert visitor.ask() == (asked.answer, asked.answer)
        assert visitor.text("verdict") == "Both answers are the same. Right."


def test_a_new_scene_brings_its_questions_and_knows_the_right_answer(visitor):
    visitor.page.locator("#new-scene").click()
    expect(visitor.page.locator("#image label")).to_contain_text("of the test split")
    first = visitor.question()
    visitor.choose("kind", "exists")
    expect(visitor.page.locator("#question textarea")).not_to_have_value(first)
    visitor.ask()
    assert re.search("[Rr]ight", visitor.text("verdict"))


# ----- odd input


def test_an_upload_is_asked_about(visitor, tmp_path):
    path = tmp_path / "mine.jpg"
    Image.new("RGB", (300, 100), "red").save(path)
    visitor.upload(path)
    expect(visitor.page.locator("#image label")).to_have_text("mine.jpg")
    visitor.ask("What colour is the square?")


@pytest.mark.parametrize(("name", "words"), [
    ("notes.txt", "notes.txt: not an image in a format that is read here"),
    ("huge.png", "huge.png: over 178956970 pixels; make it smaller first")])
def test_what_is_no_image_or_has_too_many_pixels_is_refused(visitor, tmp_path, name, words):
    path = tmp_path / name
    if name == "huge.png":
        Image.new("1", (20_000, 10_000)).save(path)
    else:
        path.write_text("no image", encoding="utf-8")
    visitor.upload(path)
    assert visitor.refusal().startswith(words)
    assert visitor.image() == "examples/shapes.png"
    assert visitor.ask("What is written on the circle?")[0] == "Y"


def test_a_file_of_too_many_bytes_is_refused(visitor, tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(bytes(MOST_FETCHED + 1))
    visitor.upload(path)
    expect(visitor.page.get_by_text("exceed the maximum allowed size of 64").first).to_be_visible()
    assert visitor.ask("What is written on the circle?")[0] == "Y"


@pytest.mark.parametrize(("question", "words"), [
    ("  ", "the question is empty: type one, or choose one of the kinds")])
def test_a_question_that_cannot_be_asked_is_refused(visitor, question, words):
    visitor.start(question)
    assert visitor.refusal() == words
    assert visitor.ask("What is written on the circle?")[0] == "Y"


# ----- several people


@pytest.mark.parametrize("leave", ["reload", "close"])
def test_who_leaves_in_the_middle_of_an_answer_leaves_the_model_to_others(visit, browser, leave):
    page = visit()
    gone, other = Visitor(page), Visitor(visit())
    gone.start(LONG)
    gone.doing()
    getattr(page, leave)()
    browser.forget()                                    # a page that is left says that its answer broke off
    assert other.ask() == ("Y", "Y")
    if leave == "reload":
        assert Visitor(page).ask() == ("Y", "Y")


def test_stop_ends_an_answer_and_the_next_one_comes(visitor):
    """On a busy machine an answer may end before Stop is heard: then it is asked again."""
    ended = visitor.page.locator("#doing", has_text="stopped").or_(visitor.page.locator(NEW_VERDICT))
    for _ in range(5):
        visitor.start(LONG)
        visitor.doing()
        visitor.page.locator("#stop").click()
        ended.wait_for()
        if visitor.text("doing"):
            break
    assert visitor.text("doing") == "stopped"
    assert visitor.page.locator("#verdict").count() == 0
    assert visitor.ask("What is written on the circle?") == ("Y", "Y")


def test_two_people_at_once_get_their_own_answers(visit):
    people = [Visitor(visit()) for _ in range(2)]
    wanted = [("tall.png", 2, "bottom"), ("letters.png", 5, "P")]
    for person, (name, place, _) in zip(people, wanted, strict=True):
        person.example(place, name)
    for _ in range(3):
        for person in people:
            person.start()
        for person, (_, _, answer) in zip(people, wanted, strict=True):
            person.page.locator(NEW_VERDICT).wait_for()
            assert person.text("full-answer") == answer


# ----- looks


def test_no_tab_is_wider_than_a_phone(visit):
    visitor = Visitor(visit(viewport={"width": 390, "height": 800}))
    visitor.ask(LONG)
    for tab in visitor.tabs():
        visitor.tab(tab)
        assert not visitor.overflows(), tab
