"""What the tests of the page in a browser share. They are collected only where gradio and Playwright are
installed; `.ci/demo` makes such an environment, installs Debian's Chromium, and runs them.
"""
import importlib.util
import os
import signal
from collections.abc import Callable, Iterator

import pytest

if all(importlib.util.find_spec(name) for name in ("gradio", "playwright")):
    from playwright.sync_api import expect
    from served import CHROMIUM, HERE, PATIENCE, Served, Visits, serve, visits

    expect.set_options(timeout=PATIENCE * 1000)
else:
    collect_ignore_glob = ["test_browser*.py"]


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Iterator["Served"]:
    """demo.py with the bundled checkpoint, for all tests of a run. Of all that visitors did, nothing may have
    been a fault of the program: it would have said so."""
    with serve(tmp_path_factory.mktemp("demo")) as running:
        yield running
        assert running.interrupt() == (128 + signal.SIGINT, running.greeting)


@pytest.fixture(scope="session")
def browser() -> Iterator["Visits"]:
    if not CHROMIUM.exists():
        missing = f"{CHROMIUM} is missing: apt-get install --no-install-recommends chromium-headless-shell"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)
    with visits() as running:
        yield running


@pytest.fixture
def visit(browser, served) -> Iterator[Callable]:
    """Opens the page for one more visitor. At the end no page may have written an error on its console, and
    nothing may have been asked of any other machine."""
    pages = []

    def visit(**options):
        pages.append(browser.open(served.url, **options))
        return pages[-1]

    browser.forget()
    yield visit
    for page in pages:
        page.context.close()
    assert (browser.faults, browser.elsewhere.asked) == ([], [])
    assert served.hosts() <= {HERE}
