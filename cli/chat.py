"""The chat of generate.py: questions, commands that begin with /, and answers until the input ends.

Answers are on stdout, everything else is on stderr, also what is typed where stdout is a file. Ctrl-C stops
an answer, or clears a line that was begun; at an empty prompt it ends the chat. The line editor keeps its
history in memory only: a file of what was asked would surprise more people than it helps.
"""
import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape, glob
from types import ModuleType

from PIL import Image

from cli.answers import Live, say_cost, say_model
from cli.options import parse_pruner, read_images
from cli.program import MOST_LETTERS, is_in_a_pruner_of_the_user, say
from cli.terminal import say_wrapped, took
from model.answer import Answer, EncodedImages
from pruning import METHODS, Pruner, hooks
from weights.image_source import is_path
from weights.messages import one_line, quoted
from weights.ranks import Ranks
from weights.system_text import FOLDED, fold_system
from weights.tokenizer import ChatTokenizer, messages

COMMANDS = "/image", "/prune", "/clear", "/help", "/quit"
HELP = """/image PATH     one more image for the next question: a path, URL or data URI
/prune METHOD [KEEP] [OPTION=VALUE]...     drop image tokens from here on
/prune off      keep all of them; /prune alone says what is done now
/clear          forget the conversation and its later images
//TEXT          a question that begins with /
Ctrl-C stops an answer; an empty line, Ctrl-D or /quit ends the chat."""


class Chat:
    """A conversation, the images that it is about, and what prunes them.

    `encode(images, pruner)` encodes images, and `ask(conversations, encoded=, emit=, pruner=)` answers:
    `Assistant.encode_images` and `Assistant.answer`. The opening images belong to the first question, and
    those of /image to the question after them; the model sees of them what Meta's rule says.
    """

    def __init__(self, args: argparse.Namespace, tokenizer: ChatTokenizer, ask: Callable[..., Answer],
                 encode: Callable[[list[Image.Image], Pruner | None], EncodedImages],
                 opening: list[Image.Image], encoded: EncodedImages, pruner: Pruner | None,
                 ranks: Ranks | None = None):
        self.args = args
        self.tokenizer = tokenizer
        self.ask = ask
        self.encode = encode
        self.pruner = pruner
        self.ranks = ranks or Ranks()
        self.beginning = [] if args.system is None else [{"role": "system", "content": args.system}]
        self.told_of_folding = False
        self.opening = opening
        self.opening_encoded = encoded
        self.forget()

    def forget(self):
        """Begin anew: with the system text and the opening images."""
        self.history = self.beginning
        self.later: list[Image.Image] = []
        self.encoded = self.opening_encoded
        self.not_asked_about = len(self.opening)

    def run(self):
        """Questions and commands until the input ends."""
        say_model(self.args.model)
        say("Ask; an empty line or Ctrl-D ends, /help shows more.")
        lines = Lines()
        while (line := self.ranks.first(lines.next)) not in ("", "/quit"):
            try:
                if line.startswith("/") and not line.startswith("//"):
                    self.obey(line)
                else:
                    self.reply(line.removeprefix("/"))
            except KeyboardInterrupt:
                say("\nstopped")
            except ValueError as error:         # too long, say: the chat goes on without this question
                if is_in_a_pruner_of_the_user(error):
                    raise
                say(f"error: {one_line(error, MOST_LETTERS)}")

    def obey(self, line: str):
        """What a command asks for."""
        name, _, rest = line.partition(" ")
        match name:
            case "/image":
                self.image(rest.strip())
            case "/prune":
                self.prune(rest.strip())
            case "/clear":
                self.clear()
            case "/help":
                say(HELP)
            case _:
                raise ValueError(f"there is no command {quoted(name)}, only {', '.join(COMMANDS)}; a "
                                 "question that begins with / is written with //")

    def reply(self, question: str):
        """Answer a question. What was said until Ctrl-C counts as the answer, and nothing as no question."""
        asked = messages(question, self.not_asked_about, history=self.history)
        conversation = fold_system(self.tokenizer.template, asked, self.args.date)
        if conversation is not asked and not self.told_of_folding:
            say_wrapped(FOLDED)
            self.told_of_folding = True
        live = Live(self.tokenizer)
        try:
            answer = self.ask([conversation], encoded=self.encoded, emit=live.push, pruner=self.pruner)
            live.finish(answer.texts[0])
        except KeyboardInterrupt:
            if not live.text:
                return say("\nstopped; this question is forgotten")
            live.finish(live.text)
            say("stopped; what it said until here stays in the conversation")
        except ValueError:
            if live.text:
                live.finish(live.text)          # or the error would stand on its line
            raise
        else:
            say_cost(answer, self.encoded, None if self.pruner is None else str(self.pruner))
        self.history = [*asked, {"role": "assistant", "content": live.text}]
        self.not_asked_about = 0

    # ----- commands

    def image(self, rest: str):
        """Only the new image is encoded."""
        if not rest:
            raise ValueError("/image needs the PATH of an image, or its URL")
        [image] = self.ranks.first(lambda: read_images([typed_path(rest)]))
        encoded = self.encode([image], self.pruner)
        self.encoded = self.encoded.join(encoded)
        self.later.append(image)
        self.not_asked_about += 1
        say_wrapped(f"image {len(self.opening) + len(self.later)}: {image.width} x {image.height} pixels, "
                    f"{encoded.real} image tokens, encode {took(encoded.ms)}; now ask about it")

    def prune(self, rest: str):
        """Images are only encoded anew if the method shrinks them first, or needs what was not kept."""
        method, *others = rest.split() or [""]
        if method:
            keeps = [word for word in others if "=" not in word]
            if len(keeps) > 1 or method == "off" and others:
                raise ValueError(f"/prune {one_line(rest, 80)}: write /prune METHOD KEEP OPTION=VALUE, or "
                                 "/prune off")
            settings = [word for word in others if "=" in word]
            pruner = None if method == "off" else parse_pruner(method, keeps[0] if keeps else None, settings)
            if self.must_encode_for(pruner):
                opening = self.encode(self.opening, pruner)
                later = self.encode(self.later, pruner)
                self.opening_encoded = opening
                self.encoded = opening.join(later)
            self.pruner = pruner
        if self.pruner is not None:
            return say_wrapped(f"image tokens are pruned from here on: {self.pruner}")
        methods = "" if method else f"; the methods are {', '.join(METHODS)}"
        say_wrapped(f"all image tokens are kept{methods}")

    def must_encode_for(self, pruner: Pruner | None) -> bool:
        """Whether this pruner needs the images encoded otherwise than they are."""
        tokens = self.encoded.tokens
        shrinks = any("preprocess" in hooks(type(each)) for each in (pruner, self.pruner) if each is not None)
        needs_states = pruner is not None and pruner.keep_states and not pruner.keeps_all
        return tokens is not None and (shrinks or needs_states and tokens.states is None)

    def clear(self):
        self.forget()
        system = "the system message" if self.beginning else ""
        count = len(self.opening)
        images = f"{count} image{'s' * (count > 1)}" if count else ""
        remains = " and ".join(filter(None, [system, images])) or "nothing"
        say(f"forgotten; what remains: {remains}")


def typed_path(text: str) -> str:
    """A path as people type it or drop it on a terminal: ~ is the home folder, and quotes and backslashes are
    taken away if there is no such file."""
    if not is_path(text) or os.path.lexists(text):
        return text
    try:
        words = shlex.split(text)
    except ValueError:
        words = []
    return os.path.expanduser(words[0] if len(words) == 1 else text)


# ----- what is typed


class Lines:
    """The lines that a person types, with Python's line editor (Left, Up, Ctrl-R) where there is one."""

    def __init__(self):
        with stdout_on_stderr():
            self.readline = line_editor()

    def next(self) -> str:
        """The next question or command; "" at an empty line or the end of the input."""
        while True:
            try:
                return self._read().strip()
            except EOFError:
                say("")
                return ""
            except UnicodeDecodeError:
                say(f"error: this is not valid {sys.stdin.encoding.upper()} text; type it again")
            except KeyboardInterrupt:
                say("")                         # or the next prompt, or the shell's, would stand on this line
                if self.readline is None or not self.readline.get_line_buffer():
                    raise

    def _read(self) -> str:
        if self.readline is None:
            say("> ", end="")
            line = sys.stdin.readline()         # input() would need a second Enter after a NUL
            if not line:
                raise EOFError
            return line
        on_screen = os.isatty(2)
        if not on_screen:
            say("> ", end="")
        with stdout_on_stderr():                # the editor has to know its prompt, to write it again
            return input("> " if on_screen else "")


def line_editor() -> ModuleType | None:
    """The module readline if a person types at a terminal, else None; also on Windows, which edits itself."""
    if sys.stdin is not sys.__stdin__ or not os.isatty(0) or not os.isatty(1):
        return None
    try:
        import readline
    except ImportError:
        return None
    readline.set_completer_delims("\n")                             # a line is completed as a whole
    readline.set_completer(completed)
    readline.parse_and_bind("tab: complete")                        # of GNU readline, and ...
    readline.parse_and_bind("bind ^I rl_complete")                  # of libedit; neither minds the other
    readline.parse_and_bind("set enable-bracketed-paste on")        # several lines are one question
    return readline


def completed(line: str, number: int) -> str | None:
    """What Tab makes of a line: commands, methods, and the paths of files for /image."""
    name, space, rest = line.partition(" ")
    if not space:
        lines = [f"{command} " for command in COMMANDS if command.startswith(line or "no line")]
    elif name == "/image":
        beginning = os.path.expanduser(rest)
        paths = sorted(glob(f"{escape(beginning)}*"))
        lines = [f"/image {path}{'/' if os.path.isdir(path) else ''}" for path in paths]
    else:
        lines = [f"/prune {method} " for method in METHODS if name == "/prune" and method.startswith(rest)]
    return lines[number] if number < len(lines) else None


@contextmanager
def stdout_on_stderr() -> Iterator[None]:
    """Lets the line editor, which can only use stdout, use stderr where that is a terminal."""
    if not os.isatty(2):
        yield
        return
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
