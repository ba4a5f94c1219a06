"""The tabs Learn and Curve in a browser."""
import re

import pytest
from playwright.sync_api import expect
from visitor import Visitor

from page.learn import NOT_YET
from page.results import SETTINGS

PHONE = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}
WIDE = {"viewport": {"width": 1280, "height": 900}}
FITS = "document.documentElement.scrollWidth <= window.innerWidth"
TOP = "id => document.getElementById(id).getBoundingClientRect().top"


@pytest.fixture
def visitor(visit) -> Visitor:
    return Visitor(visit(**WIDE))


# ----- Learn


def test_before_a_question_learn_says_what_to_do(visitor):
    visitor.tab("Learn")
    expect(visitor.page.locator("#learn")).to_contain_text(re.sub("<.*?>", "", NOT_YET))


def test_learn_follows_the_image_that_was_asked_about(visitor):
    for place, grid, slots in (1, "1 x 3", 1), (2, "3 x 1", 1):
        visitor.tab("Ask")
        visitor.page.locator("#examples button").nth(place).click()
        expect(visitor.page.locator("#question textarea")).not_to_have_value("")
        visitor.ask()
        kept = visitor.number("pruned-image_tokens-kept")
        visitor.tab("Learn")
        expect(visitor.page.locator("#learn-canvases .chosen")).to_contain_text(grid)
        expect(visitor.page.locator("#learn svg .tile")).to_have_count(3)
        expect(visitor.page.locator("#learn svg .slot")).to_have_count(slots)
        expect(visitor.page.locator("#learn-stage-6")).to_contain_text(f"150 → {kept:.0f} tokens")


def test_a_box_leads_to_its_stage_and_the_answer_stays(visitor):
    visitor.ask()
    visitor.tab("Learn")
    address = visitor.page.url
    visitor.page.locator("#learn-total").wait_for()
    assert visitor.page.evaluate(TOP, "learn-stage-4") > 900
    visitor.page.locator("#learn a[href='#learn-stage-4']").click()
    assert abs(visitor.page.evaluate(TOP, "learn-stage-4")) < 300 and visitor.page.url == address
    source = visitor.page.locator("#learn-stage-4 details").first
    expect(source.locator("pre")).to_be_hidden()
    source.locator("summary").click()
    expect(source.locator("pre")).to_contain_text("self.multi_modal_projector(states[0])")
    visitor.tab("Ask")
    assert visitor.text("full-answer") == "Y"


@pytest.mark.parametrize("options", [PHONE, WIDE], ids=["phone", "wide"])
def test_the_tabs_fit_the_screen(visit, options):
    visitor = Visitor(visit(**options))
    visitor.ask()
    visitor.tab("Learn")
    visitor.page.locator("#learn-total").wait_for()
    assert visitor.page.evaluate(FITS)
    visitor.tab("Curve")
    drawing = visitor.page.locator("#curve-plot canvas")
    drawing.wait_for()
    wide = options["viewport"]["width"]
    assert wide * 0.8 < drawing.bounding_box()["width"] < wide and visitor.page.evaluate(FITS)


# ----- Curve




def test_the_curve_is_drawn_of_what_is_chosen(visitor):
    visitor.tab("Curve")
    rows = visitor.page.locator("#curve-table").get_by_role("row")          # the first is the head
    note = visitor.page.locator("#curve-note")
    expect(rows.nth(1)).to_contain_text("97.5 to 97.5")
    expect(note).to_contain_text("evaluation/results/curve.json")
    visitor.page.locator("#curve-kinds label", has_text="colour").click()
    expect(rows.nth(1)).to_contain_text("97.2 to 97.2")
    visitor.choose("curve-setting", SETTINGS["exists"])
    expect(note).to_contain_text("exists.json")
    expect(rows.nth(2)).to_contain_text("mint")
    expect(visitor.page.locator("#curve-kinds label")).to_have_count(1)
    visitor.page.locator("#curve-plot canvas").wait_for()


def test_a_curve_of_nothing_says_why(visitor):
    visitor.tab("Curve")
    visitor.choose("curve-setting", SETTINGS["exists"])
    expect(visitor.page.locator("#curve-kinds label")).to_have_count(1)
    visitor.page.locator("#curve-kinds label").click()
    expect(visitor.page.get_by_text("choose at least one kind that was asked").first).to_be_visible()
    expect(visitor.page.locator("#curve-plot canvas")).to_have_count(0)
    visitor.page.locator("#curve-kinds label").click()
    expect(visitor.page.locator("#curve-plot canvas")).to_have_count(1)
