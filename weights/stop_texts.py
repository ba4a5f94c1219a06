"""Stop texts: an answer ends before one of them appears, also where it is spread over several tokens.

    new token ─► Ending.push ─► tokens that belong to the answer for certain ─► emit

Tokens do not end where texts do, so what may be the beginning of a stop text is held back until it is not.
"""
import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from weights.messages import quoted
from weights.tokenizer import ChatTokenizer

MOST_LETTERS = 1_000                # of a stop text


class StopTexts:
    """The answers of a batch as they grow. `push` is an `emit` for `generate`; `stops` are texts for all
    answers, or a list of texts for each.

    `emit` gets each token when it belongs to the answer for certain. The token in which an answer ends before
    a stop text that begins within the token is never emitted, because its text is too long: only `texts` has
    the end of this answer. Raises ValueError for a stop text that is none.
    """

    def __init__(self, tokenizer: ChatTokenizer, stops: Sequence[str] | Sequence[Sequence[str]],
                 sequences: int, emit: Callable[[int, int], bool | None]):
        self.tokenizer = tokenizer
        self.emit = emit
        self.endings = [Ending(tokenizer, own) for own in stops_of_each(stops, sequences)]

    def push(self, sequence: int, token: int) -> bool:
        """One more token of a sequence. True if the answer ends here: a stop text has appeared, or `emit`
        says so."""
        ending = self.endings[sequence]
        if not ending.stops:
            return self.emit(sequence, token) is True
        for certain in ending.push(token):
            if self.emit(sequence, certain) is True:
                ending.held.clear()
                return True
        return ending.ended

    def finish(self, tokens: list[list[int]]) -> tuple[list[list[int]], list[str]]:
        """When all have ended: the tokens of each answer, without those that only a stop text needed, and its
        text."""
        cut = []
        texts = []
        for sequence, (ids, ending) in enumerate(zip(tokens, self.endings, strict=True)):
            for token in ending.rest():
                self.emit(sequence, token)
            cut.append(ids[:ending.kept()] if ending.stops else ids)
            texts.append(ending.text if ending.stops else self.tokenizer.decode(ids))
        return cut, texts


@dataclass
class Held:
    """A token that has not been emitted, and the characters of the text that it needs."""
    token: int
    end: int


class Ending:
    """One answer: its text, which ends where the first stop text begins."""

    def __init__(self, tokenizer: ChatTokenizer, stops: tuple[str, ...]):
        self.token_bytes = tokenizer.token_bytes
        self.stops = stops
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.text = ""
        self.starts: list[int] = []                 # where in the text each token begins
        self.held: list[Held] = []
        self.ended = False

    def push(self, token: int) -> list[int]:
        """The tokens that belong to the answer for certain now that this one follows."""
        before = len(self.text)
        self.starts.append(before)
        self.text += self.utf8.decode(self.token_bytes(token))
        cut_short = bool(self.utf8.getstate()[0])   # the token ends within a character
        self.held.append(Held(token, len(self.text) + cut_short))
        found = [place for stop in self.stops
                 if (place := self.text.find(stop, max(0, before - len(stop) + 1))) >= 0]
        if found:
            self.ended = True
            self.text = self.text[:min(found)]
        return self._released(len(self.text) if found else len(self.text) - self._may_begin_a_stop())

    def rest(self) -> list[int]:
        """The tokens that were held back, when the answer ends without a stop text."""
        if self.ended:
            return []
        self.text += self.utf8.decode(b"", final=True)
        return self._released(len(self.text) + 1)

    def kept(self) -> int:
        """How many tokens the answer has."""
        if not self.ended:
            return len(self.starts)
        emitted = len(self.starts) - len(self.held)
        return max(emitted, sum(start < len(self.text) for start in self.starts))

    def _may_begin_a_stop(self) -> int:
        """How many of the last characters could be the beginning of a stop text."""
        return max((length for stop in self.stops for length in range(1, len(stop))
                    if self.text.endswith(stop[:length])), default=0)

    def _released(self, certain: int) -> list[int]:
        """Take out the first tokens, as far as they need no more than `certain` characters."""
        count = 0
        while count < len(self.held) and self.held[count].end <= certain:
            count += 1
        tokens = [held.token for held in self.held[:count]]
        del self.held[:count]
        return tokens


def stops_of_each(stops: Sequence[str] | Sequence[Sequence[str]], sequences: int) -> list[tuple[str, ...]]:
    """The stop texts of every answer. Raises ValueError if there are lists for more or fewer of them."""
    if not isinstance(stops, (list, tuple)) or not any(isinstance(each, (list, tuple)) for each in stops):
        return [check_stops(stops)] * sequences
    if len(stops) != sequences:
        raise ValueError(f"there are {len(stops)} lists of stop texts for {sequences} prompts: give one for "
                         "each, or texts for all")
    return [check_stops(own) for own in stops]


def check_stops(stops: Sequence[str]) -> tuple[str, ...]:
    """Stop texts that can be looked for. Raises ValueError with one line."""
    if isinstance(stops, str) or not isinstance(stops, (list, tuple)):
        raise ValueError(f"stop texts must come as a list of texts, not as {quoted(stops)}")
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise ValueError(f"a stop text must be text of at least one character, not {quoted(stop)}")
        if len(stop) > MOST_LETTERS:
            raise ValueError(f"a stop text may have {MOST_LETTERS:,} characters, not {len(stop):,}")
        try:
            stop.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the stop text {quoted(stop)} is not valid Unicode, as answers are") from None
    return tuple(stops)
