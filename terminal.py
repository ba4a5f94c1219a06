"""What is shown on a terminal: two pages of help, laid out for its width, and the progress of long work."""
import argparse
import os
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from threading import Event, Lock, Thread
from typing import TextIO

from program import fail, write

LEAST_WIDTH = 30            # a narrower terminal breaks the lines itself
WIDEST_NAME = 22            # columns of an option's name; the help of a longer one begins below it
PATIENCE = 1.0              # seconds of work before its progress is shown
INTERVAL = 0.2              # seconds between two looks at how far it is
INTERVAL_IN_FILE = 60.0     # the same where every look adds a line
THE_LINE = Lock()           # a terminal has one line for progress: whoever holds this may write there

# ----- help


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line and two pages of help.

    `add_argument` is for the options that most people need; `add_rare`, with the same arguments, is for those
    that only --help-all shows. `section(title)` begins a part of --help-all.
    """

    def __init__(self, prog: str, description: str = "", usage: str = "[options]",
                 examples: Sequence[str] = ()):
        """`usage` is what follows the program's name; the examples are commands."""
        super().__init__(prog=prog, description=description, usage=f"{prog} {usage}", add_help=False)
        self.examples = examples
        self.sections: list[tuple[str, list[argparse.Action]]] = [("options", [])]
        self.rare: list[argparse.Action] = []
        add = super().add_argument
        self.about_help = [add("-h", "--help", action="help", help="show the options that most people need"),
                           add("--help-all", action=ShowAll, nargs=0, help="show all options")]

    def section(self, title: str):
        """Options that are added from here on stand under this title in --help-all."""
        self.sections.append((title, []))

    def add_argument(self, *names: str, **settings) -> argparse.Action:
        action = super().add_argument(*names, **settings)
        self.sections[-1][1].append(action)
        return action

    def add_rare(self, *names: str, **settings) -> argparse.Action:
        action = self.add_argument(*names, **settings)
        self.rare.append(action)
        return action

    def format_help(self) -> str:
        common = [action for _, actions in self.sections for action in actions if action not in self.rare]
        end = "--help-all shows all options." if self.rare else ""
        return help_page(self.usage, self.description, [("", common)], self.examples, end)

    def format_help_all(self) -> str:
        sections = [*self.sections, ("help", self.about_help)]
        return help_page(self.usage, self.description, sections, self.examples)

    def print_help(self, file: TextIO | None = None):
        """On stdout; argparse would swallow an error."""
        write(self.format_help())

    def error(self, message: str):
        fail(message)


class ShowAll(argparse.Action):
    """What --help-all does."""

    def __call__(self, parser: Parser, *_):
        write(parser.format_help_all())
        parser.exit()


def width() -> int:
    """Columns of the terminal: COLUMNS if it is set, 80 where stdout is none."""
    return max(LEAST_WIDTH, shutil.get_terminal_size().columns)


def help_page(usage: str, description: str, sections: Iterable[tuple[str, Sequence[argparse.Action]]],
              examples: Sequence[str], end: str = "") -> str:
    """A page of help. Sections are titles and their options; a title may be empty."""
    columns = width()
    sections = [(title, actions) for title, actions in sections if actions]
    names = [len(name_of(action)) for _, actions in sections for action in actions]
    widest = min(max(names, default=0), WIDEST_NAME, columns * 2 // 5)
    parts = [wrapped(f"usage: {usage}", columns, "    ") + wrapped(description, columns)]
    for title, actions in sections:
        lines = [f"{title}:"] if title else []
        for action in actions:
            lines += option_lines(action, widest, columns)
        parts.append(lines)
    if examples:
        parts.append(["examples:"] + [line for text in examples for line in command_lines(text, columns)])
    text = "\n\n".join("\n".join(lines) for lines in parts)
    return "\n".join([text, *wrapped(end, columns)]) + "\n"


def name_of(action: argparse.Action) -> str:
    """An option and what it takes: "--keep R"."""
    value = action.metavar or (action.dest.upper() if action.choices is None else "|".join(action.choices))
    if not action.option_strings:
        return value
    return ", ".join(action.option_strings) + ("" if action.nargs == 0 else f" {value}")


def option_lines(action: argparse.Action, widest: int, columns: int) -> list[str]:
    """An option and its help, in two columns."""
    name = name_of(action)
    left = " " * (widest + 4)
    lines = wrapped(action.help or "", columns - len(left))
    lines = [(left + line).rstrip() for line in lines]
    if len(name) > widest or not lines:
        return [f"  {name}", *lines]
    return [f"  {name:{widest}}  {lines[0][len(left):]}", *lines[1:]]


def wrapped(text: str, columns: int, indent: str = "") -> list[str]:
    """Lines of at most so many columns, broken between words only; all but the first are indented."""
    return textwrap.wrap(text, columns, subsequent_indent=indent, break_long_words=False,
                         break_on_hyphens=False)


def command_lines(command: str, columns: int) -> list[str]:
    """A command as it can be typed: a long one goes on after a backslash, never within quotes."""
    words = shlex.shlex(command, posix=False, punctuation_chars=False)
    words.whitespace_split = True
    lines = []
    line = " "
    for word in words:
        if line.strip() and len(f"{line} {word} \\") > columns:
            lines.append(f"{line} \\")
            line = "     "
        line += f" {word}"
    return [*lines, line]


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
