"""The chat template of a checkpoint: finds it, checks messages, and writes a conversation out as text.

    messages ── check_messages ─► turns ── ChatTemplate.render ─► text with special tokens ─► tokenizer.py

A template is a jinja program that comes with the checkpoint; it runs in sandbox.py. Two things are ensured
here, whatever it does. Nobody can end a turn or claim an image by typing a special token: a mark follows each
character of a message that can begin one. And everything that was said is in the text, in its order: a mark
follows the first character of each text, and is looked for afterwards. White space at the ends of a text may
go, as Meta's template trims the system message. Marks are halves of surrogate pairs, which valid text never
has; `without_marks` removes them.
"""
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from weights.files import exists, read_json, read_text
from weights.messages import named, one_line, quoted
from weights.meter import Meter
from weights.sandbox import compile_template, render

BEGIN, IMAGE, EOT = "<|begin_of_text|>", "<|image|>", "<|eot_id|>"
HEADERS = "<|start_header_id|>", "<|end_header_id|>"
ROLES = ("system", "user", "assistant")
MOST_TEXT = 2_000_000               # characters of a conversation: more than any context holds
MARK = "\ud800"                     # behind what can begin a special token
TEXT_MARKS = range(0xD801, 0xE000)  # behind the first character of text 0, 1, ...
MARKS = re.compile("[\ud800-\udfff]")

_CONTENT = ("{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
            "{{ '<|image|>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}")
# For base models, which know no roles.
PLAIN = ("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('a base model knows no system "
         "message: put its text into the prompt') }}{% endif %}" + _CONTENT + "{% endfor %}")
# Meta's format for instruct models, without a text that nobody wrote and without a date.
CHAT = ("{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ '\\n\\n' }}" + _CONTENT +
        "<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}")


@dataclass
class Turn:
    """A checked message: its texts in order, None for an image, and whether the template gets one string."""
    role: str
    parts: list[str | None]
    as_string: bool


@dataclass
class Said:
    """A text that a template must write: as it was given, and as it is looked for, trimmed and with marks."""
    role: str
    text: str
    marked: str


class ChatTemplate:
    """A chat template that is ready to write conversations. `special` are the tokenizer's special tokens."""

    def __init__(self, source: str, path: Path, special: Iterable[str], eos: str):
        self.template = _compile(source, path)
        self.eos = eos
        self.guard = {ord(token[0]): token[0] + MARK for token in special}

    def render(self, messages: Sequence[dict], date: str | None = None) -> str:
        """The text of a conversation, with marks, up to its answer. Raises ValueError with one line.

        Some templates can read a message as a string only, others as a list of parts only. The form that was
        given is tried first, then the others.
        """
        turns = check_messages(messages)
        said = self._mark_texts(turns)
        meter = Meter(sum(len(one.text) for one in said))       # for all forms: who fails gains no time
        tried, errors = [], []
        for as_string in None, False, True:
            written = [_content(turn, as_string) for turn in turns]
            if written in tried:
                continue
            tried.append(written)
            try:
                text = self._run(written, date, meter)
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

    def _run(self, messages: list[dict], date: str | None, meter: Meter) -> str:
        context = {"messages": messages, "add_generation_prompt": True, "tools": None, "documents": None,
                   "bos_token": BEGIN, "eos_token": self.eos}
        if date is not None:
            context["date_string"] = self._guarded(_valid("date", date))
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


# ---- what goes into a template

def check_messages(messages: Sequence[dict]) -> list[Turn]:
    """The checked messages of a conversation (see ChatTokenizer.encode). Raises ValueError with one line."""
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"a conversation must be a list of messages, not {quoted(messages)}")
    turns = [_turn(message) for message in messages]
    if not turns or turns[-1].role != "user":
        raise ValueError("a conversation must end with a user's message, the one to answer")
    length = sum(len(text) for turn in turns for text in turn.parts if text is not None)
    if length > MOST_TEXT:
        raise ValueError(f"the conversation has {length:,} characters, more than any context holds: "
                         "shorten it")
    return turns


def _turn(message: dict) -> Turn:
    role = message.get("role") if isinstance(message, dict) else message
    if not isinstance(message, dict) or role not in ROLES:
        raise ValueError(f"the role of a message must be one of {', '.join(ROLES)}, not {quoted(role)}")
    content = message.get("content")
    in_parts = isinstance(content, (list, tuple))
    parts = [_part(part, role) for part in (content if in_parts else [{"type": "text", "text": content}])]
    if role == "system" and None in parts:
        raise ValueError("a system message cannot hold an image: put it into a user's message")
    if role == "user" and None not in parts and not "".join(parts).strip():
        raise ValueError("the prompt is empty: give it text, an image or both")
    return Turn(role, parts, as_string=role == "system" or not in_parts)


def _part(part: dict, role: str) -> str | None:
    """The text of a part, None for an image. What else is in it is left out."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return _valid(f"text of the {role} message", part.get("text"))
    if kind != "image":
        raise ValueError(f'each part of a {role} message must be {{"type": "image"}} or {{"type": "text", '
                         f'"text": ...}}, not {quoted(part)}; images are given beside the messages')
    return None


def _valid(name: str, text: object) -> str:
    """A plain str of valid Unicode."""
    if not isinstance(text, str):
        raise ValueError(f"the {name} must be text, not {type(text).__name__}")
    try:
        return text.encode().decode()
    except UnicodeEncodeError:
        raise ValueError(f"the {name} is not valid Unicode: it holds bytes that are not UTF-8") from None


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
        found = text.find(one.marked, position)
        if found < 0:
            remedy = ("leave the system message out" if one.role == "system" else
                      "put a chat_template.jinja that writes all messages into the checkpoint's folder")
            raise ValueError(f"the chat template leaves out or changes what the {one.role} message says, "
                             f"{quoted(one.text)}: {remedy}")
        position = found + len(one.marked)
