"""The arguments of a program: a parser whose errors are one line, and its two pages of help.

Pages are laid out for the width of the terminal. `add_argument` is for the options that most people need, and
`add_rare` for those that only --help-all shows.
"""
import argparse
import shlex
from collections.abc import Iterable, Sequence
from typing import TextIO

from cli.program import fail, write
from cli.terminal import width, wrapped

WIDEST_NAME = 22            # columns of an option's name; the help of a longer one begins below it


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
