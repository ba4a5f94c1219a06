"""The tokenizers library: a tokenizer.json is read, and whatever goes wrong in the library becomes one line.

    tokenizer.json ── load_tokenizer ─► Tokenizer (the library's) and Vocabulary ─► tokenizer.py

The library is written in Rust. Every call of it that a file can make fail goes through `library_call`. What
a file can make slow or large is refused: some patterns take hours on one line of text, and 30 steps that each
double the text take all memory.
"""
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from tokenizers import Tokenizer, decoders, models
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from weights.messages import one_line, quoted

Result = TypeVar("Result")
# How Llama 3 splits text before byte-pair merging. Source: `tokenizer.py` of Meta's reference.
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                r"\s*[\r\n]+|\s+(?!\S)|\s+")
NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents"}
MOST_STEPS = 4                      # of a normalizer, and of a pre-tokenizer; Llama 3 has none and 2
STDERR = 2                          # its file descriptor
_stderr_lock = threading.Lock()


@dataclass
class Vocabulary:
    """What the library knows about its tokens."""
    texts: dict[int, str]           # of every id, in the letters of byte-level BPE unless special or a word
    special: dict[str, int]         # ids of the special tokens
    words: set[str]                 # added tokens that are ordinary text
    byte_level: bool                # whether it is byte-level BPE
    normalizes: bool                # whether it may spell a text differently


def load_tokenizer(content: bytes) -> tuple[Tokenizer, Vocabulary]:
    """The tokenizer of a tokenizer.json and its vocabulary. To be called in `library_call`."""
    tokenizer = Tokenizer.from_buffer(content)
    _check_steps(tokenizer)
    tokenizer.no_truncation()               # the file may ask for both: prompts would be cut or padded
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a special token typed in ordinary text is only characters
    added = tokenizer.get_added_tokens_decoder()
    vocabulary = Vocabulary(
        texts={i: text for text, i in tokenizer.get_vocab(with_added_tokens=True).items()},
        special={token.content: i for i, token in added.items() if token.special},
        words={token.content for token in added.values() if not token.special},
        byte_level=(isinstance(tokenizer.model, models.BPE)
                    and isinstance(tokenizer.decoder, decoders.ByteLevel)),
        normalizes=tokenizer.normalizer is not None)
    return tokenizer, vocabulary


def _check_steps(tokenizer: Tokenizer):
    """Raise ValueError where it could take time or memory without bound on its way to byte-pair merging."""
    for step in _steps(tokenizer.normalizer):
        if step["type"] not in NORMALIZERS:
            raise ValueError(f"its normalizer {quoted(step['type'])} is not supported; Llama 3's has none")
    for step in _steps(tokenizer.pre_tokenizer):
        pattern = step.get("pattern")
        if isinstance(pattern, dict) and pattern.get("Regex", LLAMA3_SPLIT) != LLAMA3_SPLIT:
            raise ValueError(f"it splits text by the pattern {quoted(pattern['Regex'])}, not by Llama 3's")


def _steps(part: Normalizer | PreTokenizer | None) -> list[dict]:
    """The steps of a normalizer or pre-tokenizer in the words of the file, those inside sequences too."""
    todo = [] if part is None else [json.loads(part.__getstate__())]
    steps = []
    while todo:
        step = todo.pop()
        inner = step.get("normalizers", step.get("pretokenizers"))
        if inner is None:
            steps.append(step)
        else:
            todo += inner
    if len(steps) > MOST_STEPS:
        raise ValueError(f"it takes {len(steps)} steps to split text, where Llama 3 takes 2")
    return steps


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
