"""What is shown on a terminal: text and tables that fit its width, and the progress of long work."""
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from threading import Event, Lock, Thread
from typing import TextIO

from cli.program import say

LEAST_WIDTH = 30            # a narrower terminal breaks the lines itself
PATIENCE = 1.0              # seconds of work before its progress is shown
INTERVAL = 0.2              # seconds between two looks at how far it is
INTERVAL_IN_FILE = 60.0     # the same where every look adds a line
THE_LINE = Lock()           # a terminal has one line for progress: whoever holds this may write there

# ----- text and tables


def width() -> int:
    """Columns of the terminal: COLUMNS if it is set, 80 where stdout is none."""
    return max(LEAST_WIDTH, shutil.get_terminal_size().columns)


def stdout_width() -> int | None:
    """Columns of stdout; None if it is no terminal, and lines may be as long as they are."""
    return width() if sys.stdout is not None and sys.stdout.isatty() else None


def wrapped(text: str, columns: int, indent: str = "") -> list[str]:
    """Lines of at most so many columns, broken between words only; all but the first are indented."""
    return textwrap.wrap(text, columns, subsequent_indent=indent, break_long_words=False,
                         break_on_hyphens=False)


def say_wrapped(text: str):
    """On stderr; on a terminal in lines that fit."""
    lines = wrapped(text, columns_of(sys.stderr), "    ") if is_terminal(sys.stderr) else [text]
    say("\n".join(lines))


def fitted(table: list[list[str]], columns: int | None, repeated: int, gap: int) -> list[list[list[str]]]:
    """A table, or where it is wider than so many columns several that stand below each other.

    The first line is the head. Cells have `gap` spaces between them. If that is too wide, words of the head
    stand below each other; if that is not enough, the first `repeated` columns begin each of the tables.
    """
    if fits(table, columns, gap):
        return [table]
    table = with_high_head(table)
    widths = widths_of(table)
    blocks = [list(range(repeated))]
    for i in range(repeated, len(widths)):
        wide = sum(widths[j] + gap for j in blocks[-1]) + widths[i]
        if wide > columns and len(blocks[-1]) > repeated:
            blocks.append(list(range(repeated)))
        blocks[-1].append(i)
    return [[cells for line in table if any(cells := [line[i] for i in block])] for block in blocks]


def fits(table: list[list[str]], columns: int | None, gap: int) -> bool:
    """Whether its lines are not longer than so many columns."""
    return columns is None or sum(widths_of(table)) + gap * (len(table[0]) - 1) <= columns


def with_high_head(table: list[list[str]]) -> list[list[str]]:
    """With a head of as many lines as its longest words allow, the last words in the last one."""
    head, *body = table
    cells = []
    for name, width in zip(head, widths_of(body), strict=True):
        cells.append(wrapped(name, max([width, *map(len, name.split())])))
    high = max(map(len, cells))
    lines = [[""] * (high - len(cell)) + cell for cell in cells]
    return [list(line) for line in zip(*lines, strict=True)] + body


def widths_of(table: list[list[str]]) -> list[int]:
    """Of each column."""
    return [max(map(len, column)) for column in zip(*table, strict=True)]


def milliseconds(ms: float, sign: str = "") -> str:
    """As people read them: 3 digits or whole ones, never an exponent."""
    return f"{ms:{sign}.3g} ms" if abs(ms) < 999.5 else f"{ms:{sign}.0f} ms"


def took(ms: float) -> str:
    """A time in whole milliseconds; in seconds where it is long."""
    return f"{ms:.0f} ms" if ms < 9999.5 else f"{ms / 1000:.1f} s"


def size(count: float) -> str:
    """Bytes as people read them: 3 digits and a unit."""
    for unit in "B", "kB", "MB", "GB":
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB" if count < 999.5 else f"{count:.0f} TB"


# ----- progress


class Progress:
    """One line on the terminal about work that takes longer than a second.

        with Progress("encoding") as report:
            for i, layer in enumerate(layers):
                ...
                report(i + 1, len(layers))

    The line tells what is done, how far it is, and how long it will take, or how long it has taken where
    nothing is reported. It is rewritten on stderr, from a thread of its own, so that a report costs less than
    a microsecond and a long step is not a silent one. It is gone when all is done (the next report of less
    shows it again), and when the context ends, in whatever way: an answer may be written then. `clear` before
    a message in between. Without a terminal, or within the context of another Progress, nothing is shown.
    With `in_file`, a file gets a line after the first second, and one a minute. `number` writes what is
    counted, bytes for example.
    """

    def __init__(self, what: str, number: Callable[[int], str] = str, in_file: bool = False):
        self.what = what
        self.number = number
        self.in_file = in_file
        self.first: tuple[int, float] | None = None             # what was done, and when
        self.last: tuple[int, int, float] | None = None         # what is done, of how many, and when
        self.shown = ""
        self.stream: TextIO | None = None
        self.drawing = Lock()
        self.ended = Event()

    def __enter__(self) -> "Progress":
        self.began = time.monotonic()
        self.rewritten = is_terminal(sys.stderr)
        shown = THE_LINE.acquire(blocking=False) if self.rewritten else self.in_file
        if shown and sys.stderr is not None:
            self.stream = sys.stderr
            Thread(target=self._watch, daemon=True).start()
        return self

    def __call__(self, done: int, total: int):
        """Report how much of the work is done."""
        if self.stream is None:
            return
        now = time.monotonic()
        if self.first is None or done < self.last[0]:           # it may begin again, with the next image
            self.first = done, now
        self.last = done, total, now
        if done >= total:
            self.clear()

    def __exit__(self, *error):
        if self.stream is not None:
            self.ended.set()
            self.clear()
            self.stream = None
            if self.rewritten:
                THE_LINE.release()

    def clear(self):
        """Remove the line; it comes back if the work goes on."""
        with self.drawing:
            if self.shown:
                self._rewrite("")

    def _watch(self):
        wait = PATIENCE
        while not self.ended.wait(wait):
            with self.drawing:
                if self.ended.is_set() or self.last is not None and self.last[0] >= self.last[1]:
                    continue
                text = self._text(time.monotonic())
                if self.rewritten:
                    self._rewrite(text)
                else:
                    self._write(f"{self.what}{text}\n")
            wait = INTERVAL if self.rewritten else INTERVAL_IN_FILE

    def _text(self, now: float) -> str:
        if self.last is None:
            return f", {duration(now - self.began)}"
        done, total, reported = self.last
        first, began = self.first
        text = f" {self.number(done)} of {self.number(total)}, "
        if done == first:
            return text + duration(now - self.began)
        left = (reported - began) / (done - first) * (total - done) - (now - reported)
        return text + f"{duration(max(0, left))} left"

    def _rewrite(self, text: str):
        """Over the text before it. The cursor is left at the start, where the terminal writes ^C."""
        room = columns_of(self.stream) - 1
        if text:                                # on a narrow terminal the numbers matter more than the words
            text = (self.what[:max(0, room - len(text))] + text)[:room]
        if text != self.shown:
            self._write(f"\r{text:{min(room, len(self.shown))}}\r")
        self.shown = text

    def _write(self, text: str):
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):           # the terminal is gone or closed: nobody is there to be told
            self.ended.set()


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a line there can be rewritten."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def columns_of(stream: TextIO) -> int:
    """Its width now: a window may change."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):               # no real terminal
        return 80


def duration(seconds: float) -> str:
    """Minutes and seconds, "0:35", or "5 h 33 min"."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes}:{seconds:02}"
