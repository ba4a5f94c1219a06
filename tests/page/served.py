"""`demo.py` in a process of its own, and Chromium, which visits it; what they ask of others is counted.

The browser has a proxy for everything but 127.0.0.1. Whatever it wants from elsewhere, for a page or for
itself, arrives there, is written down and gets no answer. The program runs under `watch.py`. Chromium is
Debian's headless shell: the whole browser asks its maker for updates all the time.
"""
import os
import signal
import socket
import socketserver
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parents[2]
CHROMIUM = Path("/usr/bin/chromium-headless-shell")
HERE = "127.0.0.1"
SECONDS = 10                    # in which the page answers
PATIENCE = 30                   # seconds, for anything that is waited for in a browser
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]


# ----- the program


@dataclass
class Served:
    """A running demo.py: its address, the seconds until it answered (as on a machine that does nothing else),
    and its log of connections."""
    process: subprocess.Popen
    url: str
    seconds: float
    connections: Path

    def hosts(self) -> set[str]:
        """All that the program has looked up or connected to so far."""
        return {line.split()[1] for line in self.connections.read_text(encoding="utf-8").splitlines()}

    @property
    def greeting(self) -> str:
        """All that the program says while nothing goes wrong."""
        return f"the page is at {self.url} (Ctrl-C ends it)\n"

    def interrupt(self) -> tuple[int, str]:
        """Ctrl-C: the exit code, and all that the program has said."""
        self.process.send_signal(signal.SIGINT)
        said, _ = self.process.communicate(timeout=30)
        return self.process.returncode, said


def free_port() -> int:
    with socket.socket() as one:
        one.bind((HERE, 0))
        return one.getsockname()[1]


@contextmanager
def serve(folder: Path, *options: str) -> Iterator[Served]:
    """demo.py until the end of the block; `folder` takes its log and all that it writes of itself."""
    port, log = free_port(), folder / "connections.txt"
    began = time.monotonic()
    command = [sys.executable, str(ROOT / "tests/page/watch.py"), str(log), str(ROOT / "demo.py")]
    process = subprocess.Popen(
        [*command, "--port", str(port), *options], cwd=ROOT, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder)}, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        url = f"http://{HERE}:{port}"
        while not answers(url):
            assert process.poll() is None, process.communicate()[0][-3000:]
            time.sleep(0.05)
        yield Served(process, url, time.monotonic() - began - waited(process.pid), log)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def waited(process: int) -> float:
    """The seconds in which a process could have run, but others had the processors."""
    return int(Path(f"/proc/{process}/schedstat").read_text(encoding="utf-8").split()[1]) / 1e9


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as reply:
            return reply.status == 200
    except OSError:
        return False


# ----- the browser


class Elsewhere(socketserver.ThreadingTCPServer):
    """A proxy that answers nobody: `asked` has the first line of every request."""
    daemon_threads = True

    def __init__(self):
        self.asked: list[str] = []
        super().__init__((HERE, 0), Refusal)


class Refusal(socketserver.StreamRequestHandler):
    def handle(self):
        self.server.asked.append(self.rfile.readline(10_000).decode(errors="replace").strip())


@dataclass
class Visits:
    """Pages of one browser, each in a context of its own, as of different people."""
    browser: Browser
    elsewhere: Elsewhere
    faults: list[str] = field(default_factory=list)         # what pages wrote on their consoles

    def open(self, url: str, **options) -> Page:
        """A new visitor at `url`; `options` are those of Playwright's `new_context`."""
        page = self.browser.new_context(**options).new_page()
        page.set_default_timeout(PATIENCE * 1000)
        page.on("console", lambda said: said.type == "error" and self.faults.append(said.text))
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.goto(url)
        return page

    def forget(self):
        """What has been counted so far."""
        self.faults.clear()
        self.elsewhere.asked.clear()


@contextmanager
def visits() -> Iterator[Visits]:
    with sync_playwright() as playwright, Elsewhere() as elsewhere:
        Thread(target=elsewhere.serve_forever, daemon=True).start()
        proxy = {"server": f"http://{HERE}:{elsewhere.server_address[1]}", "bypass": HERE}
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, proxy=proxy)
        try:
            yield Visits(browser, elsewhere)
        finally:
            browser.close()
            elsewhere.shutdown()
