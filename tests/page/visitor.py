"""What a visitor of the page does, and what the page then shows, for tests in a browser."""
from pathlib import Path

from playwright.sync_api import Page, expect

# Every text that some elements have had, from now on: window.seen[id].
WATCH = """ids => {
    window.seen = Object.fromEntries(ids.map(id => [id, []]));
    new MutationObserver(() => ids.forEach(id => {
        const text = document.getElementById(id)?.innerText ?? "";
        if (text && window.seen[id].at(-1) !== text) window.seen[id].push(text);
    })).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""
# Whether no element waits for an answer, and all images are here.
IDLE = """() => ![...document.querySelectorAll("[data-testid=status-tracker]:not(.hide)")].some(
    waiting => waiting.checkVisibility() && waiting.innerText)
    && [...document.images].every(image => image.complete || !image.checkVisibility())"""
MARK = "selector => document.querySelectorAll(selector).forEach(old => old.setAttribute('data-old', ''))"
NEW_VERDICT = "#verdict:not([data-old])"


class Visitor:
    """One who has opened the page."""

    def __init__(self, page: Page):
        self.page = page
        page.locator("#question textarea").wait_for()

    def tabs(self) -> list[str]:
        return self.page.get_by_role("tab").all_inner_texts()

    def tab(self, name: str):
        self.page.get_by_role("tab", name=name, exact=True).click()

    def settle(self):
        """Wait until nothing that the page asked for is still on its way."""
        self.page.wait_for_timeout(500)             # until it has asked
        self.page.wait_for_function(IDLE)

    def overflows(self) -> bool:
        """Whether the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth > window.innerWidth")

    # ----- the Ask tab

    def choose(self, element: str, option: str):
        """An option of a dropdown."""
        self.page.locator(f"#{element} input").click()
        self.page.get_by_role("option", name=option, exact=True).click()

    def example(self, place: int, name: str):
        """One of the examples, by its place in the row and its file's name."""
        self.page.locator("#examples button").nth(place).click()
        expect(self.page.locator("#image label")).to_have_text(f"examples/{name}")

    def slide(self, percent: int):
        self.page.locator("#keep input[type=range]").fill(str(percent))

    def upload(self, path: Path):
        self.page.locator("#upload").locator("xpath=..").locator("input[type=file]").set_input_files(path)

    def start(self, question: str | None = None):
        """Ask, and return at once."""
        if question is not None:
            self.page.locator("#question textarea").fill(question)
        self.page.evaluate(MARK, "#verdict, #refused")
        self.page.locator("#ask").click()

    def ask(self, question: str | None = None) -> tuple[str, str]:
        """The answer with all image tokens, and the one with fewer."""
        self.start(question)
        self.page.locator(NEW_VERDICT).wait_for()
        return self.text("full-answer"), self.text("pruned-answer")

    def doing(self):
        """Wait until an answer is on its way."""
        expect(self.page.locator("#doing")).not_to_be_empty()

    def refusal(self) -> str:
        return self.page.locator("#refused:not([data-old])").inner_text()

    def text(self, element: str) -> str:
        return self.page.locator(f"#{element}").inner_text()

    def question(self) -> str:
        return self.page.locator("#question textarea").input_value()

    def number(self, element: str) -> float:
        """A figure of the answer as the page has it, not as it is written."""
        return float(self.page.locator(f"#{element}").get_attribute("data-value"))

    def image(self) -> str:
        """The name of the image."""
        return self.page.locator("#image label").inner_text()
