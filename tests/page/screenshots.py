"""`python tests/page/screenshots.py FOLDER` stores every tab: light and dark, on a desk and a phone."""
import argparse
import sys
import tempfile
from itertools import product
from pathlib import Path

from served import serve, visits
from visitor import Visitor

from pruning import METHODS

SCHEMES = "light", "dark"
WIDTHS = 1280, 390
QUESTION = "Describe the picture."


def take(folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as own, serve(Path(own)) as served, visits() as browser:
        for scheme, width in product(SCHEMES, WIDTHS):
            page = browser.open(served.url, color_scheme=scheme, viewport={"width": width, "height": 800})
            visitor = Visitor(page)
            visitor.ask(QUESTION)
            for tab in visitor.tabs():
                visitor.tab(tab)
                visitor.settle()
                if tab == "See":
                    page.locator("#see-all").click()
                    page.locator("#see-methods figure").nth(len(METHODS) - 1).wait_for()
                    visitor.settle()
                path = folder / f"{tab.lower()}-{scheme}-{width}.png"
                page.screenshot(path=path, full_page=True)
                print(path, "wider than the window" if visitor.overflows() else "")
            page.context.close()
        for fault in browser.faults + browser.elsewhere.asked:
            print(fault, file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    take(parser.parse_args().folder)
