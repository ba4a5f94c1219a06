"""Text side of a question: messages become ids, ids become text, and which text rows see which images.

Stands in front of the decoder (`Prompter.encode`, `visible_images`) and behind it (`decode`, `Stream`). The
checkpoint's chat template, or a built-in one, writes a conversation out, which is then cut at special tokens.
Only those that the template wrote count: the same characters inside a message are plain text, so nobody can
end a turn or claim an image by typing it. A prompt begins with exactly one begin-of-text token, whatever the
template and the tokenizer would add; a base model's image follows it, as Meta has it. B batch, T text tokens.
"""
import codecs
import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, decoders

from model.config import EXTRA_EMBEDDINGS, Config

BEGIN, IMAGE, EOT = "<|begin_of_text|>", "<|image|>", "<|eot_id|>"
ROLES = ("system", "user", "assistant")
MARK = "\ud800"     # half a surrogate pair: valid text never holds it, so it can mark places for a while

_CONTENT = ("{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
            "{{ '<|image|>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}")
PLAIN = ("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('a base model knows no system "
         "message: put its text into the prompt') }}{% endif %}" + _CONTENT + "{% endfor %}")
CHAT = ("{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ '\\n\\n' }}" + _CONTENT +
        "<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}")


def messages(prompt: str, images: int = 0, system: str | None = None,
             history: Sequence[dict] = ()) -> list[dict]:
    """The conversation with a user's next turn at its end: first the turn's images, then its text.

    `history` is what came before, with answers as {"role": "assistant", "content": text}; a `system` message
    goes in front of everything. Raises ValueError where `prompt` is not text.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"the prompt must be text, not {type(prompt).__name__}")
    parts = [{"type": "image"}] * images + [{"type": "text", "text": prompt}] * bool(prompt)
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, *history, {"role": "user", "content": parts if images else prompt}]


def check_length(prompt_tokens: int, max_new_tokens: int, max_position_embeddings: int):
    """Raise ValueError where a prompt and the new tokens asked for do not fit into the model's context."""
    if (total := prompt_tokens + max_new_tokens) > max_position_embeddings:
        raise ValueError(f"{prompt_tokens} prompt tokens and {max_new_tokens} new ones make {total}, but the "
                         f"context holds {max_position_embeddings}: shorten the prompt or ask for fewer")


class ChatTokenizer:
    """Tokenizer and chat template of one checkpoint; `stop_ids` are the tokens that end an answer."""

    def __init__(self, tokenizer: Tokenizer, template: jinja2.Template, stop_ids: tuple[int, ...], eos: str):
        self.tokenizer, self.template, self.stop_ids, self.eos = tokenizer, template, stop_ids, eos
        added = tokenizer.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special}
        self.words = {token.content for token in added.values() if not token.special}
        longest_first = sorted(self.special, key=len, reverse=True)
        self._cuts = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._guard = {ord(text[0]): text[0] + MARK for text in self.special}

    @classmethod
    def from_folder(cls, folder: str | Path, config: Config) -> "ChatTokenizer":
        """Read the text side of a checkpoint in the hub's layout. Raises ValueError with one line.

        Without a chat template, a checkpoint is an instruct model if its tokenizer has the header tokens and
        `<|eot_id|>` is among the tokens that end its text; it gets Meta's chat format, with no system text or
        date added. Base models have the same tokenizer but end at `<|end_of_text|>` only; they get bare text.
        """
        folder = Path(folder)
        tokenizer = _read_tokenizer(folder / "tokenizer.json", config)
        settings = _read_json(folder / "tokenizer_config.json")
        stop_ids = _read_stop_ids(folder / "generation_config.json", config)
        source, path = _read_template(folder, settings)
        eot = tokenizer.token_to_id(EOT)
        if source is None:
            headers = [tokenizer.token_to_id(token) for token in ("<|start_header_id|>", "<|end_header_id|>")]
            source = CHAT if eot in stop_ids and None not in headers else PLAIN
        if source is not PLAIN and eot is not None and eot not in stop_ids:
            stop_ids += (eot,)              # a turn ends here, also where generation_config.json forgets it
        eos = settings.get("eos_token") or tokenizer.id_to_token(stop_ids[-1])
        eos = eos.get("content") if isinstance(eos, dict) else eos
        return cls(tokenizer, _compile(source, path), stop_ids, eos)

    def encode(self, messages: Sequence[dict], date: str | None = None) -> list[int]:
        """Token ids of a conversation, up to where the answer begins. Raises ValueError with one line.

        A message is {"role": "user", "assistant" or "system", "content": text, or a list of {"type": "image"}
        and {"type": "text", "text": text}}. `date` is written where the template would write today's.
        """
        turns = [_checked(message, self._guard) for message in messages]
        if not turns or turns[-1]["role"] != "user":
            raise ValueError("a conversation must end with a user's message, the one to answer")
        images = sum(part == {"type": "image"} for turn in turns for part in turn["content"])
        bos, image = self.tokenizer.token_to_id(BEGIN), self.tokenizer.token_to_id(IMAGE)
        ids = [bos] + [i for i in self._tokenise(self._render(turns, date)) if i != bos]
        if (found := ids.count(image)) != images:
            raise ValueError(f"the chat template writes {found} {IMAGE} for {images} images: it does not fit")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens left out; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to the text: nothing if it is special or unknown to the tokenizer."""
        text = self.tokenizer.id_to_token(token_id) or ""
        if text in self.special:
            return b""
        return text.encode() if text in self.words else b"".join(_BYTES.get(c) or c.encode() for c in text)

    def _render(self, turns: list[dict], date: str | None) -> str:
        context = {"messages": turns, "add_generation_prompt": True, "tools": None, "documents": None,
                   "bos_token": BEGIN, "eos_token": self.eos}
        if date is None:
            context["strftime_now"] = lambda form: datetime.now().strftime(form)
        else:
            context["date_string"] = today = _guarded("date", date, self._guard)
            context["strftime_now"] = lambda form: today
        try:
            return self.template.render(context)
        except Exception as error:          # the template is a program of the checkpoint's: anything may fail
            raise ValueError(f"the chat template cannot write this conversation: {_line(error)}") from None

    def _tokenise(self, text: str) -> Iterator[int]:
        # Text between two special tokens is encoded in one piece: line breaks of the template and those that
        # begin a message form one token.
        for i, piece in enumerate(self._cuts.split(text)):
            if i % 2:
                yield self.special[piece]
            else:
                yield from self.tokenizer.encode(piece.replace(MARK, ""), add_special_tokens=False).ids


class Detokenizer:
    """Text from ids that arrive one at a time: whole characters only, at the same small cost for every token.

    A character's bytes may be spread over several tokens: `push` then returns "" until the last is there, and
    `flush` returns what an answer cut in mid-character leaves. Joined, it all equals `Prompter.decode`.
    """

    def __init__(self, tokenizer: ChatTokenizer):
        self.token_bytes = tokenizer.token_bytes
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes."""
        return self.utf8.decode(self.token_bytes(token_id))

    def flush(self) -> str:
        """What is still held back when the answer ends."""
        return self.utf8.decode(b"", final=True)


# The byte behind each letter of byte-level BPE: printable ones are themselves, the others follow from U+0100.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [b for b in range(256) if b not in _PRINTABLE]
_BYTES = {chr(b): bytes([b]) for b in _PRINTABLE} | {chr(256 + i): bytes([b]) for i, b in enumerate(_OTHERS)}


def _line(words: object) -> str:
    """Someone else's message, on one line of bounded length."""
    return " ".join(str(words).replace(MARK, "").split())[:300] or type(words).__name__


def _guarded(name: str, text: object, guard: dict[int, str]) -> str:
    """Valid text with a mark behind all that can begin a special token, also one that spans two parts."""
    try:
        return text.encode().decode().translate(guard)
    except AttributeError:
        raise ValueError(f"the {name} must be text, not {type(text).__name__}") from None
    except UnicodeEncodeError:
        raise ValueError(f"the {name} is not valid Unicode: it holds bytes that are not UTF-8") from None


def _checked(message: dict, guard: dict[int, str]) -> dict:
    """A message as templates know it: text guarded, foreign keys left out, a system message as a string."""
    role = message.get("role") if isinstance(message, dict) else message
    if role not in ROLES:
        raise ValueError(f"the role of a message must be one of {', '.join(ROLES)}, not {_line(repr(role))}")
    content = message.get("content")
    parts = content if isinstance(content, (list, tuple)) else [{"type": "text", "text": content}]
    parts = [_checked_part(part, role, guard) for part in parts]
    has_image, text = {"type": "image"} in parts, "".join(part.get("text", "") for part in parts)
    if has_image and role == "system":
        raise ValueError("a system message cannot hold an image: put it into a user's message")
    if role == "user" and not has_image and not text.strip():
        raise ValueError("the prompt is empty: give it text, an image or both")
    return {"role": role, "content": text if role == "system" or isinstance(content, str) else parts}


def _checked_part(part: dict, role: str, guard: dict[int, str]) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return {"type": "text", "text": _guarded(f"text of a {role} message", part.get("text"), guard)}
    if kind != "image":
        raise ValueError(f'each part of a {role} message must be {{"type": "image"}} or {{"type": "text", '
                         f'"text": ...}}, not {_line(repr(part))}')
    return {"type": "image"}


def _refuse(words: str):
    raise jinja2.TemplateError(words)


def _compile(source: str, path: Path) -> jinja2.Template:
    # Chat templates are written for transformers: these settings, a tojson that leaves HTML alone, and blocks
    # named `generation`, which matter in training only.
    source = re.sub(r"(\{%[-+]?\s*(?:end)?)generation\b", r"\1with", source)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(source)
    except Exception as error:              # as in rendering
        raise ValueError(f"{path}: the chat template does not parse: {_line(error)}") from None


def _read_json(path: Path) -> dict:
    """The object in a file; an empty one where there is no such file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from None
    if isinstance(data, dict):
        return data
    raise ValueError(f"{path}: holds a {type(data).__name__}, not an object")


def _read_template(folder: Path, settings: dict) -> tuple[str | None, Path]:
    """The checkpoint's chat template, None where it has none, and the file it would stand in."""
    path = folder / "chat_template.jinja"
    try:
        if path.exists():
            return path.read_text(encoding="utf-8"), path
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as text ({error})") from None
    path = folder / "chat_template.json"
    if (value := _read_json(path).get("chat_template")) is None:
        path, value = folder / "tokenizer_config.json", settings.get("chat_template")
    if isinstance(value, list):             # several templates, each with a name
        value = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
    value = value.get("default", value) if isinstance(value, dict) else value
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{path}: chat_template is neither text nor a list with a template named 'default'")
    return value, path


def _read_stop_ids(path: Path, config: Config) -> tuple[int, ...]:
    value = _read_json(path).get("eos_token_id")
    value = config.text.eos_token_id if value is None else value
    ids = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not ids or any(type(i) is not int or not 0 <= i < 2 ** 31 for i in ids):
        raise ValueError(f"{path}: eos_token_id must be a token id or a list, not {_line(repr(value))}")
    return ids


def _read_tokenizer(path: Path, config: Config) -> Tokenizer:
    """The tokenizer, checked against the model: Meta's numbering is not the hub's, and forks add tokens."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:              # the library raises nothing more precise
        raise ValueError(f"{path}: not readable as a tokenizer ({_line(error)})") from None
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        raise ValueError(f"{path}: not a byte-level tokenizer, as Llama 3's is")
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    if missing := {BEGIN, IMAGE} - special:
        raise ValueError(f"{path}: lacks the special token {min(missing)}: it is another model's")
    if (image := tokenizer.token_to_id(IMAGE)) != config.image_token_index:
        raise ValueError(f"{path}: {IMAGE} is token {image}, but config.json says image_token_index "
                         f"{config.image_token_index}: take both files from the same checkpoint")
    rows = config.text.vocab_size + EXTRA_EMBEDDINGS
    if (last := max(tokenizer.get_vocab(with_added_tokens=True).values())) >= rows:
        raise ValueError(f"{path}: has ids up to {last}, but the model embeds only {rows} tokens")
    tokenizer.no_truncation()               # the file may ask for both: prompts would come out cut or padded
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a special token spelt out in ordinary text is letters
    return tokenizer
