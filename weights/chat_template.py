"""The chat template of a checkpoint: finds it, and writes a conversation out with it.

    turns (chat_format.py) ── ChatTemplate.pieces ─► ids of special tokens, texts between them ─► tokenizer.py

A template is a jinja program that comes with the checkpoint; it runs in sandbox.py. Two things are ensured
here, whatever it does. Nobody can end a turn or claim an image by typing a special token: a mark follows each
character of a message that can begin one. And everything that was said is in the text, in its order: a mark
follows the first character of each text, and is looked for afterwards. White space at the ends of a text may
go, as Meta's template trims the system message. Marks are halves of surrogate pairs, which valid text never
has; `without_marks` removes them.
"""
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2

from weights.chat_format import BEGIN, IMAGE, TOOLS, Turn
from weights.files import exists, read_json, read_text
from weights.messages import named, one_line, quoted
from weights.meter import Meter
from weights.policy import Policy
from weights.sandbox import compile_template, render

MARK = "\ud800"                     # behind what can begin a special token
TEXT_MARKS = range(0xD801, 0xE000)  # behind the first character of text 0, 1, ...
MARKS = re.compile("[\ud800-\udfff]")


@dataclass
class Said:
    """A text that a template must write: as it was given, and as it is looked for, trimmed and with marks."""
    role: str
    text: str
    marked: str


class ChatTemplate:
    """A chat template that is ready to write conversations. `special` has the ids of the special tokens."""

    def __init__(self, source: str, path: Path, special: dict[str, int], eos: str):
        self.template = _compile(source, path)
        self.special = special
        self.eos = eos
        self.guard = {ord(token[0]): token[0] + MARK for token in special}
        longest_first = sorted(special, key=len, reverse=True)
        self._cuts = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def pieces(self, turns: list[Turn], date: str | None = None,
               policy: Policy | None = None) -> list[int | str]:
        """The template's text, cut at the special tokens that it wrote: their ids, and the texts between.

        Line breaks of the template and those that begin a message are in one text, as in transformers.
        """
        cut = self._cuts.split(self.render(turns, date, policy))
        return [self.special[piece] if i % 2 else without_marks(piece) for i, piece in enumerate(cut)]

    def render(self, turns: list[Turn], date: str | None = None, policy: Policy | None = None) -> str:
        """The text of a conversation, with marks, up to its answer. Raises ValueError with one line.

        Some templates can read a message as a string only, others as a list of parts only. The form that was
        given is tried first, then the others.
        """
        turns = [replace(turn, parts=list(turn.parts)) for turn in turns]       # they get marks
        variables = self._variables(date, policy)
        said = self._mark_texts(turns)
        meter = Meter(sum(len(one.text) for one in said))       # for all forms: who fails gains no time
        tried, errors = [], []
        for as_string in None, False, True:
            written = [_content(turn, as_string) for turn in turns]
            if written in tried:
                continue
            tried.append(written)
            try:
                text = self._run(written, variables, meter)
                _check_images(text, sum(turn.parts.count(None) for turn in turns))
                _check_texts(text, said)
                return text
            except ValueError as error:
                errors.append(error)
        raise errors[0]

    def _mark_texts(self, turns: list[Turn]) -> list[Said]:
        """Put the marks into the turns' texts. Returns those that the template must write."""
        said = []
        for turn in turns:
            for i, text in enumerate(turn.parts):
                if text is None:
                    continue
                core = text.strip()
                if not core:                        # only white space: it need not be written
                    turn.parts[i] = text.translate(self.guard)
                    continue
                before, after = text.split(core, 1)
                mark = chr(TEXT_MARKS[len(said) % len(TEXT_MARKS)])
                marked = self._guarded(core, mark)
                turn.parts[i] = before.translate(self.guard) + marked + after.translate(self.guard)
                said.append(Said(turn.role, text, marked))
        return said

    def _guarded(self, text: str, mark: str = MARK) -> str:
        """The text with `mark` behind its first character, which the template's text could lead up to, and
        MARK behind all others that can begin a special token."""
        if not text:
            return text
        return text[:1] + mark + text[1:].translate(self.guard)

    def _variables(self, date: str | None, policy: Policy | None) -> dict[str, object]:
        """What the template gets beside the messages, only where it was given: it has defaults of its own."""
        variables = {}
        if date is not None:
            variables["date_string"] = self._guarded(date)
        if policy is not None:
            # These are compared with keys in the template, so they get no mark of their own.
            variables["excluded_category_keys"] = [key.translate(self.guard) for key in policy.excluded]
            if policy.categories is not None:
                variables["categories"] = {self._guarded(key): self._guarded(text) for key, text
                                           in policy.categories.items() if key not in policy.excluded}
        return variables

    def _run(self, messages: list[dict], variables: dict[str, object], meter: Meter) -> str:
        context = {"messages": messages, "add_generation_prompt": True, "tools": None, "documents": None,
                   "bos_token": BEGIN, "eos_token": self.eos, **variables}
        try:
            return render(self.template, context, meter)
        except MemoryError:
            raise
        except Exception as error:                  # a template is a program: anything may go wrong in it
            words = one_line(without_marks(str(error)) or type(error).__name__)
            raise ValueError(f"the chat template cannot write this conversation: {words}") from None


def without_marks(text: str) -> str:
    """The text with all marks removed."""
    return MARKS.sub("", text)


def find_template(folder: Path, settings: dict) -> tuple[str | None, Path]:
    """The source of a checkpoint's chat template, None where it has none, and the file that it is in.

    `settings` is the content of tokenizer_config.json. Raises ValueError with one line.
    """
    path = folder / "chat_template.jinja"
    if exists(path):
        return read_text(path), path
    path = folder / "chat_template.json"
    value = read_settings(path).get("chat_template")
    if value is None:
        path = folder / "tokenizer_config.json"
        value = settings.get("chat_template")
    if isinstance(value, list):                     # several templates, each with a name
        defaults = [item for item in value if isinstance(item, dict) and item.get("name") == "default"]
        value = defaults[-1].get("template", value) if defaults else value
    elif isinstance(value, dict):
        value = value.get("default", value)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{named(path)}: chat_template is neither text nor a list with a template "
                         "named 'default'")
    return value, path


def read_settings(path: Path) -> dict:
    """The object in a JSON file; an empty one if there is no such file. Raises ValueError with one line."""
    data = read_json(path) if exists(path) else {}
    if not isinstance(data, dict):
        raise ValueError(f"{named(path)}: holds a {type(data).__name__}, not an object")
    return data


def _compile(source: str, path: Path) -> jinja2.Template:
    try:
        source.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{named(path)}: the chat template is not valid Unicode") from None
    try:
        return compile_template(source)
    except Exception as error:                      # MemoryError too: Python raises it for nested brackets
        words = one_line(without_marks(str(error)) or type(error).__name__)
        raise ValueError(f"{named(path)}: the chat template does not parse: {words}") from None


# ---- what goes into it

def _content(turn: Turn, as_string: bool | None) -> dict:
    """A message as templates get it. `as_string` None: as it was given; with an image it is always a list."""
    as_string = turn.as_string if as_string is None else as_string
    if as_string and None not in turn.parts:
        return {"role": turn.role, "content": "".join(turn.parts)}
    parts = [{"type": "image"} if text is None else {"type": "text", "text": text} for text in turn.parts]
    return {"role": turn.role, "content": parts}


# ---- what comes out of it

def _check_images(text: str, images: int):
    found = text.count(IMAGE)
    if found != images:
        raise ValueError(f"the chat template writes {found} {IMAGE} for {images} images: it does not fit")


def _check_texts(text: str, said: list[Said]):
    """Raise ValueError where a text that was said is not in the template's, in its place."""
    position = 0
    for one in said:
        written = one.marked
        if one.role in TOOLS and text.find(written, position) < 0:  # official templates write these as JSON
            written = json.dumps(written, ensure_ascii=False)[1:-1]
        found = text.find(written, position)
        if found < 0:
            remedy = ("leave the system message out" if one.role == "system" else
                      "put a chat_template.jinja that writes all messages into the checkpoint's folder")
            raise ValueError(f"the chat template leaves out or changes what the {one.role} message says, "
                             f"{quoted(one.text)}: {remedy}")
        position = found + len(written)
