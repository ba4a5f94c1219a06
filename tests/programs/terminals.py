"""A program on a terminal of its own, for tests: what a person types, and what the screen gets to see."""
import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

from program_inputs import ROOT

ESCAPE = re.compile(r"\x1b\[[\d;?]*[A-Za-z]|[\a\r]")
LEFT, UP, BACKSPACE, CTRL_C, CTRL_D = "\x1b[D", "\x1b[A", "\x7f", "\x03", "\x04"


class Terminal:
    """generate.py at a terminal; stdout or stderr may be a file instead. Close it with `end`."""

    def __init__(self, *args: str, stdout: Path | None = None, stderr: Path | None = None):
        self.ours, theirs = pty.openpty()
        os.set_blocking(self.ours, False)
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TERM": "xterm", "LC_ALL": "C.UTF-8",
                       "INPUTRC": "/dev/null"}
        out, err = (theirs if path is None else open(path, "wb") for path in (stdout, stderr))  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "generate.py"), *args], stdin=theirs, stdout=out, stderr=err,
            env=environment, start_new_session=True,            # Ctrl-C goes to whoever owns the terminal
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(theirs)
        self.seen = ""

    def wait_for(self, words: str, seconds: float = 60) -> str:
        """Read until these words come; returns what was new up to them, without what moves the cursor."""
        until = time.monotonic() + seconds
        while words not in self.seen:
            assert time.monotonic() < until, (words, self.seen)
            self.read()
        text, _, self.seen = self.seen.partition(words)
        return text

    def read(self):
        if select.select([self.ours], [], [], 0.1)[0]:
            try:
                self.seen = ESCAPE.sub("", self.seen + os.read(self.ours, 65536).decode(errors="replace"))
            except OSError:                                     # the program has ended
                time.sleep(0.05)

    def type(self, text: str):
        os.write(self.ours, text.encode(errors="surrogateescape"))

    def interrupt(self, words: str) -> str:
        """Ctrl-C, and what comes until these words; "" stands for the end of the program.

        Once more after some seconds: Python's line editor does not see one in the instant between writing
        its prompt and waiting for a key, which no person is fast enough for.
        """
        for _ in range(5):
            self.type(CTRL_C)
            until = time.monotonic() + 4
            while time.monotonic() < until and self.process.poll() is None:
                self.read()
                if words and words in self.seen:
                    return self.wait_for(words)
        return self.seen

    def end(self) -> int:
        """The exit code of a program that ends by itself."""
        until = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < until:
            self.read()                                         # or it could not write its last words
        self.read()
        self.process.kill()
        os.close(self.ours)
        return self.process.wait()
