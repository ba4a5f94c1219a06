"""Desk: one model for all who look at the page, and what the page says of an answer.

    image, question, method ─► Desk.ask ── a thread that has the model ─► Asked, which grows token by token

Every question is answered twice, with all image tokens and with the pruned ones, by `Assistant.answer` and
nothing else: the figures are those of `generate.py --json`. One question has the model at a time, and holds
it only while it is computed. Who leaves, by closing the iterator, ends the answer.
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from cli.answers import as_json
from model.answer import Answer, EncodedImages
from pruning import Pruner, hooks, load
from weights.messages import quoted
from weights.progress import Report
from weights.tokenizer import ChatTokenizer, Detokenizer, messages

if TYPE_CHECKING:
    from generate import Assistant
    from page.looks import Looks
    from pruning.recorder import Recorder

MAX_NEW_TOKENS = 256            # as generate.py has it
MOST_LETTERS = 4000             # of a question
HEARTBEAT = 0.5                 # seconds without news after which an iterator gives what it gave before
DONE = "done"                   # how the news of a question end


class Word(NamedTuple):
    """A token of an answer, and the characters that it completes: none within a character."""
    token: int
    text: str


@dataclass
class Said:
    """One answer as far as it is made. `figures` is what `generate.py --json` prints of it, at its end."""
    words: list[Word] = field(default_factory=list)
    figures: dict | None = None
    looks: "Looks | None" = None
    recorder: "Recorder | None" = None

    @property
    def text(self) -> str:
        return "".join(word.text for word in self.words)


@dataclass
class Asked:
    """A question about an image, and its answers: `full` with all image tokens, `pruned` with those that the
    method keeps. None is an answer that has not begun; `doing` says what is being done, "" at the end."""
    image: Image.Image
    question: str
    method: str
    keep: float
    options: dict[str, object] = field(default_factory=dict)
    max_new_tokens: int = MAX_NEW_TOKENS
    full: Said | None = None
    pruned: Said | None = None
    encoded: EncodedImages | None = None        # as the full answer reads it
    doing: str = ""

    @property
    def done(self) -> bool:
        return self.pruned is not None and self.pruned.figures is not None

    @property
    def differ(self) -> bool:
        """Whether the answers do. Only for one that is done."""
        return self.full.text != self.pruned.text

    def now(self, doing: str) -> "Asked":
        """A copy that does not grow."""
        return replace(self, doing=doing, full=self.full and replace(self.full),
                       pruned=self.pruned and replace(self.pruned))

    def pruner(self) -> Pruner:
        """A new one each time. Raises ValueError for a method or option that there is not."""
        return load(self.method, keep=self.keep, **self.options)


class Left(Exception):
    """In the thread of a question, when its asker is gone."""


Push = Callable[[Asked], None]


class Desk:
    """The Assistant that all visitors share. `name` is what the checkpoint is called in figures."""

    def __init__(self, assistant: "Assistant", name: str = "tiny"):
        self.assistant = assistant
        self.name = name
        self.lock = Lock()
        self.tell: Callable[[str], None] | None = None          # of whoever has the model now
        assistant.progress = self.progress

    def ask(self, image: Image.Image | None, question: str, method: str, keep: float,
            options: dict[str, object] | None = None, max_new_tokens: int = MAX_NEW_TOKENS,
            before: Asked | None = None) -> Iterator[Asked]:
        """The question as it is answered: each Asked has more than the one before it, the last both answers.

        `image` is RGB, `keep` a fraction of its tokens. What `before` has encoded of the same image is not
        encoded again. Raises ValueError with one line, at once for what can be known at once.
        """
        asked = Asked(checked_image(image), checked_question(question), method, keep, options or {},
                      max_new_tokens)
        asked.pruner()
        if before is not None and before.image is image:
            asked.encoded = before.encoded
        return follow(partial(self.answer, asked))

    def answer(self, asked: Asked, push: Push):
        """Answer twice, in the thread that calls; `push` gets the question whenever there is more of it."""
        pruner = asked.pruner()
        with self.turn(asked, push):
            encoded = asked.encoded
            if encoded is None or pruner.keep_states and encoded.tokens.states is None:
                encoded = self.assistant.encode_images([asked.image], keep_states=pruner.keep_states)
            asked.encoded = encoded
            asked.full = Said()
            self.say(asked, asked.full, None, encoded, push)
            encoded = self.encoded_for(pruner, asked, encoded)
            asked.pruned = Said()
            self.say(asked, asked.pruned, pruner, encoded, push)
        push(asked.now(""))

    def encoded_for(self, pruner: Pruner, asked: Asked, unpruned: EncodedImages,
                    watcher: Pruner | None = None) -> EncodedImages:
        """The image as a pruner reads it: `unpruned`, or encoded anew if it shrinks the image first (hook 0).
        `watcher` is a pruner around it. Who calls it has the model."""
        if "preprocess" not in hooks(type(pruner)):
            return unpruned
        return self.assistant.encode_images([asked.image], watcher or pruner)

    def say(self, asked: Asked, said: Said, pruner: Pruner | None, encoded: EncodedImages, push: Push):
        """One of the two answers."""
        tokenizer = self.assistant.tokenizer
        detokenizer = Detokenizer(tokenizer)

        def emit(sequence: int, token: int):
            said.words = [*said.words, Word(token, detokenizer.push(token))]
            push(asked.now("answering"))

        answer = self.assistant.answer([messages(asked.question, 1)], encoded, asked.max_new_tokens,
                                       emit=emit, pruner=pruner)
        said.words = words_of(tokenizer, answer)
        said.figures = as_json(self.name, answer, encoded, None if pruner is None else str(pruner))

    def again(self, asked: Asked, around: Callable[[Pruner], Pruner], pruned: bool) -> Pruner:
        """Answer once more, with a pruner around the one that answered, and return it: it has seen everything
        and must not change anything. Raises RuntimeError if it did. Who calls it waits for the model."""
        said = asked.pruned if pruned else asked.full
        inner = asked.pruner() if pruned else Pruner()
        watcher = around(inner)
        with self.turn(asked, lambda asked: None):
            encoded = self.encoded_for(inner, asked, asked.encoded, watcher)
            answer = self.assistant.answer([messages(asked.question, 1)], encoded, asked.max_new_tokens,
                                           pruner=watcher)
        if answer.tokens[0] != [word.token for word in said.words]:
            raise RuntimeError(f"{asked.method}: an answer that is watched is another one")
        return watcher

    @contextmanager
    def turn(self, asked: Asked, push: Push) -> Iterator[None]:
        """The model, when those who asked before have their answers."""
        while not self.lock.acquire(timeout=HEARTBEAT):
            push(asked.now("waiting for the answer of somebody else"))
        try:
            self.tell = lambda words: push(asked.now(words))
            yield
        finally:
            self.tell = None
            self.lock.release()

    @contextmanager
    def progress(self, what: str, number: Callable[[int], str] = str) -> Iterator[Report]:
        """The Progress of the Assistant: whoever has the model is told how far it is."""
        def report(done: int, total: int):
            if self.tell is not None:
                self.tell(f"{what} {number(done)} of {number(total)}")
        yield report


def checked_image(image: Image.Image | None) -> Image.Image:
    if image is None:
        raise ValueError("there is no image yet: choose an example, draw a new scene, or upload one")
    return image


def checked_question(question: str | None) -> str:
    """The question without blanks around it, as a shell would hand it over. Raises ValueError."""
    question = (question or "").strip()
    if not question:
        raise ValueError("the question is empty: type one, or choose one of the kinds")
    if len(question) > MOST_LETTERS:
        raise ValueError(f"the question has {len(question):,} characters, but may have {MOST_LETTERS:,}: "
                         f"shorten it; it begins {quoted(question[:40])}")
    return question


def words_of(tokenizer: ChatTokenizer, answer: Answer) -> list[Word]:
    """The tokens of the only answer; their texts together are its text."""
    detokenizer = Detokenizer(tokenizer)
    words = [Word(token, detokenizer.push(token)) for token in answer.tokens[0]]
    if rest := answer.texts[0][sum(len(word.text) for word in words):]:
        words[-1] = Word(words[-1].token, words[-1].text + rest)
    return words


def follow(work: Callable[[Push], None]) -> Iterator[Asked]:
    """What `work(push)` pushes in a thread of its own; the newest where several have come meanwhile.

    Errors of the work are raised here. Where the iterator is closed, the next `push` ends the work. Without
    news the last Asked comes again, so that whoever reads can stop.
    """
    news: SimpleQueue[Asked | BaseException | str] = SimpleQueue()
    left = Event()

    def push(asked: Asked):
        if left.is_set():
            raise Left
        news.put(asked)

    def run():
        try:
            work(push)
            news.put(DONE)
        except Left:
            return
        except BaseException as error:
            if left.is_set():                   # nobody reads the news any more
                raise
            news.put(error)

    Thread(target=run, daemon=True, name="answer").start()
    last = None
    try:
        while True:
            newer, end = newest(news)
            last = newer or last
            if last is not None and (newer is not None or end is None):
                yield last
            if isinstance(end, BaseException):
                raise end
            if end is DONE:
                return
    finally:
        left.set()


def newest(news: SimpleQueue) -> tuple[Asked | None, BaseException | str | None]:
    """The newest of what has come, None if nothing does for a while; and how it ended, None if it has not."""
    found = None
    try:
        item = news.get(timeout=HEARTBEAT)
        while isinstance(item, Asked):
            found = item
            item = news.get_nowait()
        return found, item
    except Empty:
        return found, None
