"""Stop texts: the answer ends before them, nothing of them is emitted, and nothing else is lost."""
import random

import pytest
from helpers import refused

from weights.stop_texts import MOST_LETTERS, StopTexts


class Bytes:
    """A tokenizer with the tokens that are given to it, as bytes."""

    def __init__(self, *tokens: bytes):
        self.tokens = tokens

    def token_bytes(self, token: int) -> bytes:
        return self.tokens[token]

    def decode(self, ids: list[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")


def run(tokens: list[bytes], *stops: str) -> tuple[str, list[bytes], list[bytes], list[int]]:
    """An answer of these tokens: its text, its tokens, those emitted, and how many at each push."""
    emitted, counts, said = [], [], []
    answers = StopTexts(Bytes(*tokens), stops, 1, lambda _, token: emitted.append(tokens[token]))
    for token in range(len(tokens)):
        said.append(token)
        ended = answers.push(0, token)
        counts.append(len(emitted))
        if ended:
            break
    [kept], [text] = answers.finish([said])
    return text, [tokens[token] for token in kept], emitted, counts


@pytest.mark.parametrize(("tokens", "stops", "text", "kept", "emitted"), [
    ([b"a", b"b", b"STOP", b"c"], ["STOP"], "ab", 2, 2),
    ([b"a", b"S", b"T", b"OP", b"c"], ["STOP"], "a", 1, 1),                 # over several tokens
    ([b"a", b"bST", b"OPc", b"d"], ["STOP"], "ab", 2, 1),                   # it begins within a token
    ([b"aSTOPb"], ["STOP"], "a", 1, 0),
    ([b"STOP"], ["STOP"], "", 0, 0),
    ([b"a", b"S", b"T", b"x", b"y"], ["STOP"], "aSTxy", 5, 5),              # only the beginning of it
    ([b"a", b"ST"], ["STOP"], "aST", 2, 2),
    ([b"SSTO", b"STOP"], ["STOP"], "SSTO", 1, 1),
    ([b"a", b"a", b"b"], ["ab"], "a", 1, 1),
    ([b"x", b"b", b"c", b"d"], ["cd", "bc"], "x", 1, 1),                    # the first that appears
    ([b"x", b"abcd"], ["cd", "abcd"], "x", 1, 1),                           # two at once: the earlier begins
    ([b"\xe2", b"\x98", b"\x83", b"!"], ["\u2603"], "", 0, 0),              # a character of three tokens
    ([b"a", b"\xe2", b"\x98", b"\x83", b"!"], ["!"], "a\u2603", 4, 4),
    ([b"a", b"\xe2", b"\x98"], ["!"], "a\ufffd", 3, 3),
    ([b"a", b"", b"b", b"", b"."], ["."], "ab", 4, 4),                      # tokens without text
])
def test_where_an_answer_ends(tokens, stops, text, kept, emitted):
    made = run(tokens, *stops)
    assert made[:3] == (text, tokens[:kept], tokens[:emitted])


def test_a_token_is_emitted_as_soon_as_it_is_certain():
    assert run([b"a", b"S", b"T", b"x", b"S", b"y"], "STOP")[3] == [1, 1, 1, 4, 4, 6]
    assert run([b"a", b"b"], "STOP")[3] == [1, 2]


def test_random_answers():
    """The text is what stands before the first stop text, and what is emitted is a beginning of it."""
    draw = random.Random(0)
    ends = 0
    for _ in range(2000):
        tokens = ["".join(draw.choices("ab\u2603", k=draw.randint(0, 3))).encode() for _ in range(8)]
        tokens = [piece for token in tokens for piece in (token[:2], token[2:])]
        stops = ["".join(draw.choices("ab\u2603", k=draw.randint(2, 4))) for _ in range(2)]
        text, kept, emitted, _ = run(tokens, *stops)
        whole = b"".join(tokens).decode()
        first = [end for end in range(len(whole) + 1) if any(whole[:end].endswith(stop) for stop in stops)]
        if not first:
            assert text == whole and kept == emitted == tokens
            continue
        ends += 1
        assert not any(stop in text for stop in stops) and whole.startswith(text)
        assert any(whole[len(text):].startswith(stop) for stop in stops)
        assert text.encode().startswith(b"".join(emitted)) and b"".join(kept).startswith(text.encode())
        assert kept[:len(emitted)] == emitted and len(kept) <= len(emitted) + 2
    assert ends > 500


def test_sequences_end_alone_and_emit_may_end_them():
    tokens = [b"a", b"b", b"."]
    emitted = []

    def emit(sequence: int, token: int) -> bool:
        emitted.append((sequence, token))
        return sequence == 2
    for stops, last in ((["."], True), ([], False)):
        emitted.clear()
        answers = StopTexts(Bytes(*tokens), stops, 3, emit)
        assert [answers.push(0, 0), answers.push(1, 1), answers.push(2, 0)] == [False, False, True]
        assert answers.push(0, 2) is last and answers.push(1, 0) is False
        kept, texts = answers.finish([[0, 2], [1, 0], [0]])
        assert texts == (["a", "ba", "a"] if stops else ["a.", "ba", "a"])
        assert kept == ([[0], [1, 0], [0]] if stops else [[0, 2], [1, 0], [0]])
        assert emitted == [(0, 0), (1, 1), (2, 0)] + [(0, 2)] * (not stops) + [(1, 0)]


@pytest.mark.parametrize(("stops", "words"), [
    ([""], "at least one character"), ([7], "must be text"), ("text", "as a list"), (None, "as a list"),
    (["\udce9"], "not valid Unicode"), (["x" * (MOST_LETTERS + 1)], "1,000 characters"),
])
def test_what_is_no_stop_text(stops, words):
    with refused(words):
        StopTexts(Bytes(), stops, 1, lambda *_: None)
