"""What the programs share on the command line: arguments, --prune, the chat, the costs of an answer.

How a program starts and ends, and how an error becomes one line, stands in program.py.
"""
import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch

from model.answer import Answer, EncodedImages
from program import MOST_LETTERS, fail, is_in_a_pruner_of_the_user, say, write
from pruning import METHODS, Pruner, find, hooks, load, options
from pruning.options import MOST as MOST_OPTION
from weights.files import replacing
from weights.messages import named, one_line, quoted, reason
from weights.tokenizer import messages

# ----- arguments


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str):
        fail(message)

    def print_help(self, file: TextIO | None = None):
        """On stdout; argparse would swallow an error."""
        write(self.format_help())


def whole_number(text: str) -> int:
    """The type of an argument."""
    try:
        number = int(text[:100])
    except ValueError:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a whole number") from None
    if len(text) > 100:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is too large")
    return number


def real_number(text: str) -> float:
    """The type of an argument; what is not finite is left to whoever uses it."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a number") from None


def check_output(option: str, path: Path | None, suffixes: tuple[str, ...] = ()):
    """Raise ValueError for a file that could not be written, before hours of work; None is no file."""
    if path is None:
        return
    name = f"{option} {named(path)}"
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"{name}: the name must end in {', '.join(suffixes)}")
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"{name}: this is not a file; choose another name")
        folder = path.resolve().parent
        if not folder.is_dir():
            raise ValueError(f"{name}: there is no folder {named(path.parent)}; create it first")
    except OSError as error:
        raise ValueError(f"{name}: {reason(error)}; choose another name") from None
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{name}: this file is write-protected; choose another name")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{name}: nothing can be written in this folder; choose another one")


@contextmanager
def writing(option: str, path: Path) -> Iterator[Path]:
    """`replacing(path)`, with errors that name the option."""
    try:
        with replacing(path) as partial:
            yield partial
    except OSError as error:
        raise ValueError(f"{option} {named(path)}: cannot be written: {reason(error)}") from None


# ----- --prune, --keep and --set


def parse_pruner(method: str | None, keep: str | None, settings: list[str]) -> Pruner | None:
    """What --prune, --keep and --set say, for one method; ValueError with one line for bad input."""
    chosen = dict(map(parse_option, settings))
    if keep is not None:
        chosen["keep"] = parse_number(keep)
    if method is None and chosen:
        raise ValueError("--keep and --set are options of a method: name it with --prune ('list' shows all)")
    return None if method is None else load(method, **chosen)


def parse_pruners(methods: str, keeps: list[str], settings: list[str]) -> list[Pruner]:
    """Every method of a list "a,b" (or "all") at every keep ratio; `settings` are "method.option=value".

    Raises ValueError with one line for bad input.
    """
    names = []
    for part in methods.split(","):
        names += [name for name in METHODS if name != Pruner.name] if part == "all" else [part]
    names = list(dict.fromkeys(names))
    chosen = {find(name).name: (name, {}) for name in names}
    if len(chosen) < len(names):
        raise ValueError(f"{quoted(methods)}: two methods have the same name")
    for text in settings:
        where, value = parse_option(text)
        method, dot, option = where.rpartition(".")
        if not dot or method not in chosen or option == "keep":
            raise ValueError(f"--set {quoted(text)}: give it as method.option=value, of {', '.join(chosen)}; "
                             "--keep is for all methods")
        chosen[method][1][option] = value
    numbers = [parse_number(keep) for keep in keeps]
    return [load(name, keep=keep, **options) for name, options in chosen.values() for keep in numbers]


def parse_option(text: str) -> tuple[str, object]:
    """"name=value": a number, true, false or none where it reads as one, else text."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ValueError(f"--set {quoted(text)}: give it as option=value")
    words = {"true": True, "false": False, "none": None}
    return name, words[value.lower()] if value.lower() in words else parse_number(value)


def parse_number(text: str) -> int | float | str:
    """A whole number, a number, or the text itself."""
    try:
        number = int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return text
    if abs(number) > MOST_OPTION:
        raise ValueError(f"{quoted(text)} is too large a number: give one of at most {MOST_OPTION}")
    return number


def catalogue() -> str:
    """Every method: what it does, its paper, its hooks and its options."""
    lines = []
    for name, method in METHODS.items():
        lines.append(f"{name}: {method.__doc__.splitlines()[0]}")
        if method.paper:
            lines.append(f"    paper: {method.paper}")
        lines.append(f"    acts at: {', '.join(hooks(method)) or 'no hook'}")
        lines += [f"    {option} = {what}" for option, what in options(method).items()]
    return "\n".join(lines) + "\n"


# ----- prompts


def piped_prompt(has_image: bool) -> str:
    """The prompt where none was given and nobody sits at a terminal."""
    try:
        text = "" if sys.stdin is None else sys.stdin.read().strip()        # None: closed by the caller
    except UnicodeDecodeError:
        encoding = sys.stdin.encoding.upper()
        remedy = "" if encoding == "UTF-8" else "; if it is UTF-8, set PYTHONIOENCODING=utf-8"
        raise ValueError(f"the prompt on standard input is not valid {encoding} text{remedy}") from None
    if not text and not has_image:
        raise ValueError("nothing to answer: give --prompt TEXT, and --image PATH to ask about an image")
    return text or "Describe the picture."


def chat(answer: Callable[[list[dict]], str], system: str | None, images: int):
    """Questions and answers until the input ends. `answer` answers a conversation, on stdout too.

    The images belong to the first question; later ones see them too.
    """
    say("Ask; an empty line or Ctrl-D ends.")
    history = [] if system is None else [{"role": "system", "content": system}]
    while question := ask_person():
        asked = messages(question, images, history=history)
        try:
            text = answer(asked)
        except ValueError as error:             # too long, say: the chat goes on without this question
            if is_in_a_pruner_of_the_user(error):
                raise
            say(f"error: {one_line(error, MOST_LETTERS)}")
            continue
        history = [*asked, {"role": "assistant", "content": text}]
        images = 0


def ask_person() -> str:
    """The next question; "" at an empty line or the end of the input."""
    while True:
        say("> ", end="")
        try:
            line = sys.stdin.readline()         # input() would need a second Enter after a NUL
        except UnicodeDecodeError:
            say(f"error: this is not valid {sys.stdin.encoding.upper()} text; type it again")
            continue
        except KeyboardInterrupt:
            say("")                             # or the shell's prompt would stand on this line
            raise
        if not line:
            say("")
        return line.strip()


# ----- what an answer took


def as_json(model: str, texts: list[str], answer: Answer, encoded: EncodedImages, pruner: str | None) -> dict:
    """One object; a batch has lists where one prompt has its answer, token ids and kept tokens."""
    kept = [round(mean(layers)) for layers in answer.kept]
    one = len(texts) == 1
    return {"model": model,
            "answer": texts[0] if one else texts,
            "token_ids": answer.tokens[0] if one else answer.tokens,
            "pruner": pruner,
            "image_tokens": {"slots": encoded.slots, "real": encoded.real, "kept": kept[0] if one else kept},
            "kept_by_layer": answer.kept[0] if one else answer.kept,
            "answered_early": answer.early,
            "ms": {part: round(ms, 2) for part, ms in answer.ms.items()},
            "tokens_per_second": round(answer.tokens_per_second, 2),
            "image_kv_bytes": answer.image_kv_bytes, "image_kv_stored_bytes": answer.image_kv_stored,
            "text_kv_bytes": answer.text_kv_bytes,
            "peak_memory_bytes": peak_memory()}


def write_json(data: dict):
    """One line on stdout; letters that it cannot hold are escaped as JSON does it."""
    text = json.dumps(data, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(data)
    write(text + "\n")


def say_model(model: str):
    if model == "tiny":
        say("tiny: the bundled toy checkpoint, which knows only drawn shapes; for the real one: "
            "--model meta-llama/Llama-3.2-11B-Vision-Instruct")
    else:
        say(f"model {model}")


def say_cost(answer: Answer, encoded: EncodedImages, pruner: str | None):
    """Image tokens, bytes, times and memory, on one or two lines."""
    if encoded.tokens is not None:
        say(f"image tokens {encoded.slots} slots -> {encoded.real} real{kept_words(answer, encoded, pruner)}")
        more = ""
        if answer.image_kv_stored > answer.image_kv_bytes:
            more = f" of {size(answer.image_kv_stored)} held"
        say(f"image KV {size(answer.image_kv_bytes)}{more}, encode {answer.ms['encode']:.0f} ms, ", end="")
    say(f"prefill {answer.ms['prefill']:.0f} ms, {answer.tokens_per_second:.1f} tok/s, "
        f"peak memory {size(peak_memory())}")


def kept_words(answer: Answer, encoded: EncodedImages, pruner: str | None) -> str:
    """What became of the real image tokens: those of earlier images are out of sight, others are pruned."""
    seen = mean(answer.seen)
    words = ""
    if round(seen) != encoded.tokens.features.shape[1]:
        words = f" -> {seen:.0f} in sight"
    if pruner is None:
        return words
    if answer.early:
        pruner += f"; {len(answer.early)} of {len(answer.tokens)} answered by the guide alone"
    layers = [mean(column) for column in zip(*answer.kept, strict=True)]
    by_layer = ""
    if len({round(layer) for layer in layers}) > 1:
        by_layer = f"by layer {' '.join(f'{layer:.0f}' for layer in layers)}; "
    return f"{words} -> {mean(layers):.0f} kept ({by_layer}{pruner})"


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0


def peak_memory() -> int:
    """The most bytes held so far: on the GPU if one is in use, else by the process; 0: unknown (Windows)."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def size(count: float) -> str:
    """Bytes as people read them: 3 digits and a unit."""
    for unit in "B", "kB", "MB":
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
