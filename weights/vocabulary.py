"""The tokenizers library: a tokenizer.json is read, and whatever goes wrong in the library becomes one line.

    tokenizer.json ── load_tokenizer ─► Tokenizer (the library's) and Vocabulary ─► tokenizer.py

The library is written in Rust. Every call of it that a file can make fail goes through `library_call`.
"""
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from tokenizers import Tokenizer, decoders

from weights.messages import one_line

Result = TypeVar("Result")
STDERR = 2                          # its file descriptor
_stderr_lock = threading.Lock()


@dataclass
class Vocabulary:
    """What the library knows about its tokens."""
    texts: dict[int, str]           # of every id, in the letters of byte-level BPE unless special or a word
    special: dict[str, int]         # ids of the special tokens
    words: set[str]                 # added tokens that are ordinary text
    byte_level: bool                # whether it decodes as byte-level BPE does
    normalizes: bool                # whether it may spell a text differently


def load_tokenizer(content: bytes) -> tuple[Tokenizer, Vocabulary]:
    """The tokenizer of a tokenizer.json and its vocabulary. To be called in `library_call`."""
    tokenizer = Tokenizer.from_buffer(content)
    tokenizer.no_truncation()               # the file may ask for both: prompts would be cut or padded
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a special token typed in ordinary text is only characters
    added = tokenizer.get_added_tokens_decoder()
    vocabulary = Vocabulary(
        texts={i: text for text, i in tokenizer.get_vocab(with_added_tokens=True).items()},
        special={token.content: i for i, token in added.items() if token.special},
        words={token.content for token in added.values() if not token.special},
        byte_level=isinstance(tokenizer.decoder, decoders.ByteLevel),
        normalizes=tokenizer.normalizer is not None)
    return tokenizer, vocabulary


def library_call(words: str, call: Callable[[], Result]) -> Result:
    """What `call` returns; whatever the tokenizers library raises in it becomes a ValueError with one line.

    Where a file surprises the library, it panics: that raises a BaseException which is no Exception, and
    writes to stderr, which is not shown. What other threads write to stderr in that time is lost, too.
    """
    with _without_stderr():
        try:
            return call()
        except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
            raise
        except BaseException as error:
            raise ValueError(f"{words}: {one_line(error)}") from None


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Nothing that is written to stderr by way of its file descriptor is shown."""
    with _stderr_lock:
        try:
            kept = os.dup(STDERR)
        except OSError:                     # the caller has closed it
            kept = None
        if kept is not None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, STDERR)
            os.close(nowhere)
        try:
            yield
        finally:
            if kept is not None:
                os.dup2(kept, STDERR)
                os.close(kept)
