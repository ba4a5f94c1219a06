"""The text side of a checkpoint: a conversation becomes token ids, and new token ids become text.

    messages ── chat_template.py, or else chat_format.py ─► pieces ── ChatTokenizer.encode ─► ids ─► decoder
    decoder ─► ids ── ChatTokenizer.decode, or Detokenizer for one id at a time ─► text

A piece is the id of a special token, or a text, which is tokenised by itself. Only special tokens that the
format writes count: the same characters inside a message are plain text. A prompt begins with exactly one
begin-of-text token, whatever the template and the tokenizer would add; in a base model's prompt the image
follows it, as in Meta's code. T text tokens.
"""
import codecs
import operator
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from model.config import Config
from weights.chat_format import (
    BEGIN,
    EOT,
    HEADERS,
    IMAGE,
    bare_pieces,
    check_messages,
    dialog_pieces,
    valid_text,
)
from weights.chat_template import ChatTemplate, find_template, read_settings, without_marks
from weights.files import exists, read_bytes
from weights.messages import named, quoted
from weights.policy import Policy
from weights.vocabulary import Vocabulary, library_call, load_tokenizer

MOST_IMAGES = 1000                  # in one message


def messages(prompt: str, images: int = 0, system: str | None = None,
             history: Sequence[dict] = ()) -> list[dict]:
    """A conversation that ends with the user's next turn: first the turn's images, then its text.

    `images` is how many there are in this turn. `history` is what came before, with answers as {"role":
    "assistant", "content": text}; a `system` message comes before everything. Raises ValueError where an
    argument is of another kind; the messages themselves are checked in `ChatTokenizer.encode`.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"the prompt must be text, not {type(prompt).__name__}")
    if type(images) is not int or not 0 <= images <= MOST_IMAGES:
        raise ValueError(f"the number of images is {quoted(images)}, but must be a whole number from 0 to "
                         f"{MOST_IMAGES}")
    if not isinstance(history, (list, tuple)):
        raise ValueError(f"the history must be a list of messages, not {quoted(history)}")
    content = prompt
    if images:
        content = [{"type": "image"}] * images
        if prompt:
            content.append({"type": "text", "text": prompt})
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, *history, {"role": "user", "content": content}]


class ChatTokenizer:
    """Tokenizer and prompt format of one checkpoint; `stop_ids` are the tokens that end an answer.

    `template` is None where the checkpoint has none: then prompts have Meta's own format, that of instruct
    models if `is_chat`, else that of base models.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: Vocabulary, template: ChatTemplate | None,
                 is_chat: bool, stop_ids: tuple[int, ...]):
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.template = template
        self.is_chat = is_chat
        self.stop_ids = stop_ids

    @classmethod
    def from_folder(cls, folder: str | Path, config: Config, before: Path | None = None) -> "ChatTokenizer":
        """Read the text side of a checkpoint in the hub's layout. Raises ValueError with one line.

        A file that the folder `before` has, that of an adapter with tokens of its own, is taken from there.

        Without a chat template, a checkpoint is an instruct model if its tokenizer has the header tokens and
        `<|eot_id|>` is among the tokens that end its text; it gets Meta's chat format, with no system text or
        date added. Base models have the same tokenizer but end at `<|end_of_text|>` only; they get bare text.
        """
        folders = [Path(folder)] if before is None else [before, Path(folder)]
        tokenizer, vocabulary = _read_tokenizer(_first_of(folders, "tokenizer.json"), config)
        settings_path = _first_of(folders, "tokenizer_config.json")
        settings = read_settings(settings_path)
        stop_ids = _read_stop_ids(_first_of(folders, "generation_config.json"), config)
        source, path = find_template(folders[0], settings)
        if source is None and before is not None:
            source, path = find_template(folders[1], read_settings(folders[1] / "tokenizer_config.json"))
        eot = vocabulary.special.get(EOT)
        is_chat = source is not None or eot in stop_ids and vocabulary.special.keys() >= set(HEADERS)
        if is_chat and eot is not None and eot not in stop_ids:
            stop_ids += (eot,)              # a turn ends here, also where generation_config.json forgets it
        eos = _eos_token(settings, settings_path) or vocabulary.texts.get(stop_ids[-1], "")
        template = None if source is None else ChatTemplate(source, path, vocabulary.special, eos)
        return cls(tokenizer, vocabulary, template, is_chat, stop_ids)

    def encode(self, messages: Sequence[dict], date: str | None = None,
               policy: Policy | None = None) -> list[int]:
        """Token ids [T] of a conversation, up to where the answer begins. Raises ValueError with one line.

        A message is {"role": "user", "assistant", "system" or "tool" (also called "ipython"), "content": a
        text, or a list of {"type": "image"} and {"type": "text", "text": text}}. A last message of the
        assistant's is closed like all others, and the answer is a turn of its own, as in Meta's code and in
        transformers. `date` is written where the template would write today's; `policy` is for the template
        of Llama Guard. Every text of the conversation is in the ids as it was given, but a template may trim
        white space at its ends.
        """
        turns = check_messages(messages)
        if date is not None:
            date = valid_text("date", date)
        if policy is not None and not isinstance(policy, Policy):
            raise ValueError(f"policy is {quoted(policy)}, not a Policy: make one, as in "
                             "Policy({'S1': 'Violent Crimes.'})")
        special = self.vocabulary.special
        if self.template is not None:
            pieces = self.template.pieces(turns, date, policy)
        else:
            pieces = dialog_pieces(turns, special) if self.is_chat else bare_pieces(turns, special)
        ids = library_call("the prompt cannot be tokenised", lambda: list(self._tokenise(pieces)))
        return [special[BEGIN], *(i for i in ids if i != special[BEGIN])]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens left out; bytes that are not UTF-8 become U+FFFD.

        Raises ValueError for what cannot be a token id, as `token_bytes` does.
        """
        try:
            ids = iter(ids)
        except TypeError:
            raise ValueError(f"token ids must come as a list, not as {quoted(ids)}") from None
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to the text: nothing if it is special or unknown to the tokenizer.

        Raises ValueError where `token_id` is no whole number from 0; a tensor of one whole number is fine.
        """
        try:
            number = operator.index(token_id)
        except TypeError:
            number = -1
        if number < 0:
            raise ValueError(f"a token id must be a whole number from 0, not {quoted(token_id)}")
        text = self.vocabulary.texts.get(number, "")
        if text in self.vocabulary.special:
            return b""
        if text in self.vocabulary.words:
            return text.encode()
        return b"".join(_BYTES.get(c) or c.encode() for c in text)

    def _tokenise(self, pieces: list[int | str]) -> Iterator[int]:
        for piece in pieces:
            if isinstance(piece, int):
                yield piece
                continue
            ids = self.tokenizer.encode(piece, add_special_tokens=False).ids
            self._check_ids(piece, ids)
            yield from ids

    def _check_ids(self, piece: str, ids: list[int]):
        """Raise ValueError where a tokenizer loses text: it lacks a byte, or its rules remove something.

        Added tokens may swallow white space around them, and a normalizer may spell characters differently.
        """
        if self.vocabulary.normalizes:
            return
        if "".join(self.decode(ids).split()) != "".join(piece.split()):
            raise ValueError(f"its tokens do not give {quoted(piece)} back: tokenizer.json is damaged")


class Detokenizer:
    """Text from ids that arrive one at a time: whole characters only, at the same small cost for every token.

    A character's bytes may be spread over several tokens: `push` returns "" until the last one is there, and
    `flush` returns what is left where an answer was cut within a character. All of it joined equals
    `ChatTokenizer.decode`.
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


# The byte of each letter of byte-level BPE: printable bytes are themselves, the others follow from U+0100.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [b for b in range(256) if b not in _PRINTABLE]
_BYTES = {chr(b): bytes([b]) for b in _PRINTABLE} | {chr(256 + i): bytes([b]) for i, b in enumerate(_OTHERS)}


# ---- the files

def _first_of(folders: list[Path], name: str) -> Path:
    """The file in the first folder that has it, or where it would be in the last one."""
    return next((folder / name for folder in folders if exists(folder / name)), folders[-1] / name)


def _eos_token(settings: dict, path: Path) -> str | None:
    """The end-of-text token that tokenizer_config.json names, for templates that write it."""
    eos = settings.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    if eos is None:
        return None
    if not isinstance(eos, str) or without_marks(eos) != eos:
        raise ValueError(f"{named(path)}: eos_token must be valid text, not {quoted(eos)}")
    return eos


def _read_stop_ids(path: Path, config: Config) -> tuple[int, ...]:
    """The tokens that end an answer, of generation_config.json or else of config.json."""
    value = read_settings(path).get("eos_token_id")
    if value is None:
        path = path.with_name("config.json")
        value = config.text.eos_token_id
    ids = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    rows = config.text.embedding_rows
    if not ids or any(type(i) is not int or not 0 <= i < rows for i in ids):
        raise ValueError(f"{named(path)}: eos_token_id must be a token id below {rows}, or a list of them, "
                         f"not {quoted(value)}")
    return ids


def _read_tokenizer(path: Path, config: Config) -> tuple[Tokenizer, Vocabulary]:
    """The tokenizer, checked against the model: Meta's numbering is not the hub's, and forks add tokens."""
    content = read_bytes(path)
    name = named(path)
    tokenizer, vocabulary = library_call(f"{name}: not readable as a tokenizer",
                                         lambda: load_tokenizer(content))
    if not vocabulary.byte_level:
        raise ValueError(f"{name}: not a byte-level tokenizer, as Llama 3's is")
    special = vocabulary.special
    for token in BEGIN, IMAGE:
        if token not in special:
            raise ValueError(f"{name}: lacks the special token {token}: it is another model's")
    if special[IMAGE] != config.image_token_index:
        raise ValueError(f"{name}: {IMAGE} is token {special[IMAGE]}, but config.json says image_token_index "
                         f"{config.image_token_index}: take both files from the same checkpoint")
    shortest = min(special, key=len)
    if len(shortest) < 2:
        raise ValueError(f"{name}: the special token {quoted(shortest)} is one character, and every text has "
                         "some of those: special tokens must be longer")
    rows = config.text.embedding_rows
    last = max(vocabulary.texts)
    if last >= rows:
        raise ValueError(f"{name}: has ids up to {last}, but the model embeds only {rows} tokens")
    return tokenizer, vocabulary
