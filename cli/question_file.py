"""The files of `generate.py --jsonl`: questions in, answers out, one JSON object a line.

    {"id": 1, "image": "a.png", "prompt": "What is this?"}              of questions.jsonl
    {"id": 1, "text": "A star.", ..., "key": "5f0e6c3a9d1b2c47"}        of answers.jsonl, or
    {"id": 2, "error": "line 2: b.png: no such file; ...", "line": 2}

The key is of the question and of all settings, so that an answer is known again. Questions are read as they
are asked, and images are in memory for one batch only: of a million questions, only ids and keys are.
"""
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from weights.files import open_regular, replacing
from weights.image_source import image_from, is_path
from weights.locked_file import LockedFile
from weights.messages import named, one_line, quoted

MOST_LINE = 1_000_000               # bytes of a question
BEGINNING = b'{"id": '              # of every line that is written here


@dataclass
class Question:
    """One line: the images are RGB, `ident` is its id as JSON has it."""
    ident: str | int
    prompt: str
    images: list[Image.Image]
    system: str | None
    max_new_tokens: int
    key: str


class BadLine(ValueError):
    """A line that cannot be asked; `ident` is its id, if it has one."""

    def __init__(self, message: str, ident: str | int | None = None):
        super().__init__(message)
        self.ident = ident


class AnswerFile:
    """Answers as they are made. Within `with file:` it is locked, and `known` has the keys by the ids.

    Answers of before stay; errors of before are removed, and asked again, and so is a last line that was cut
    off. Raises ValueError for a file of something else, or that another process writes.
    """

    def __init__(self, path: Path):
        self.path = path
        self.known: dict[str, str] = {}
        self.answered = 0
        self.errors = 0
        self.stale = False                          # whether it has errors of before

    def __enter__(self) -> "AnswerFile":
        self.file = LockedFile(self.path)
        try:
            self._read()
        except BaseException:
            self.file.close(remove=self.file.is_empty())
            raise
        return self

    def __exit__(self, kind: type | None, *error: object):
        if kind is None:
            self._remove_errors()
        self.file.close(remove=self.file.is_empty())

    def add(self, lines: list[dict]):
        """Write these lines at the end."""
        self._remove_errors()
        self.answered += sum("error" not in line for line in lines)
        self.errors += sum("error" in line for line in lines)
        self.file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))

    def _read(self):
        """What is known already."""
        whole = 0
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n") and (line.startswith(BEGINNING) or BEGINNING.startswith(line)):
                    break                           # a process ended while it was written
                answer = self._parsed(line, number)
                if "error" in answer:
                    self.stale = True
                else:
                    self.known[json.dumps(answer["id"])] = answer["key"]
                whole += len(line)
        self.file.truncate(whole)

    def _parsed(self, line: bytes, number: int) -> dict:
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict) or "id" not in answer or not ("error" in answer or "key" in answer):
            raise ValueError(f"{named(self.path)}: line {number} is no answer of --jsonl; name another file")
        return answer

    def _remove_errors(self):
        """Those of before; only now that the questions and settings have turned out to be the same."""
        if not self.stale:
            return
        with replacing(self.path) as partial, open(partial, "wb") as file, open(self.path, "rb") as lines:
            file.writelines(line for line in lines if "error" not in json.loads(line))
        self.file.close()
        self.file = LockedFile(self.path)
        self.stale = False


class QuestionFile:
    """The questions of a file, or of standard input ("-"), that `answers` does not have yet.

    `done` counts the lines that were read, `total` all of them; None where nobody knows.
    """

    def __init__(self, source: str, answers: AnswerFile, settings: object, system: str | None,
                 max_new_tokens: int):
        self.source = source
        self.answers = answers
        self.settings = settings
        self.system = system
        self.max_new_tokens = max_new_tokens
        self.folder = Path() if source == "-" else Path(source).parent
        self.done = 0
        self.total = None
        if source != "-":
            with open_regular(Path(source)) as file:
                self.total = sum(1 for _ in file)

    def batches(self, size: int) -> Iterator[list[Question]]:
        """Up to `size` questions at once. A line that cannot be asked is written down as an error."""
        batch = []
        images = {}                                 # of this batch, by their sources
        for line in self.lines():
            try:
                question = self.question(line, images)
            except BadLine as error:
                self.answers.add([{"id": error.ident, "error": f"line {self.done}: {error}",
                                   "line": self.done}])
                continue
            if question is not None:
                batch.append(question)
            if len(batch) == size:
                yield batch
                batch = []
                images = {}
        if batch:
            yield batch

    def lines(self) -> Iterator[bytes]:
        """All lines that are not blank, without the end of those that are too long."""
        if self.source == "-" and sys.stdin is None:
            raise ValueError("standard input is closed: name a file of questions, or pipe them in")
        file = sys.stdin.buffer if self.source == "-" else open_regular(Path(self.source))
        while line := file.readline(MOST_LINE + 1):
            rest = line
            while len(rest) > MOST_LINE and not rest.endswith(b"\n"):
                rest = file.readline(MOST_LINE + 1)
            self.done += 1
            if line.strip():
                yield line
        if self.source != "-":
            file.close()

    def question(self, line: bytes, images: dict[str, Image.Image]) -> Question | None:
        """The question of a line; None if it has its answer. Raises BadLine, and ValueError if the answer is
        of another question or of other settings."""
        data = parsed(line)
        ident = data["id"]
        system = data.get("system", self.system)
        limit = data.get("max_new_tokens", self.max_new_tokens)
        sources = data.get("image", [])
        sources = [sources] if isinstance(sources, str) else sources
        asked = json.dumps([self.settings, data["prompt"], sources, system, limit])
        key = hashlib.blake2b(asked.encode(), digest_size=8).hexdigest()
        known = self.answers.known.get(json.dumps(ident))
        if known == "":
            raise BadLine(f"the id {quoted(ident)} is there twice", ident)
        if known not in (None, key):
            raise ValueError(f"{named(self.answers.path)}: it answers {quoted(ident)} with other settings or "
                             "weights, or another question; name another --out, or delete this file")
        self.answers.known[json.dumps(ident)] = ""
        if known == key:
            return None
        try:
            return Question(ident, data["prompt"], [self.image(source, images) for source in sources], system,
                            limit, key)
        except ValueError as error:
            raise BadLine(one_line(error), ident) from None

    def image(self, source: str, images: dict[str, Image.Image]) -> Image.Image:
        """Paths are relative to the file of questions; the same image is read once a batch."""
        if source == "-":
            raise ValueError("an image cannot be on standard input here: give its path")
        if source not in images:
            images[source] = image_from(str(self.folder / source) if is_path(source) else source)
        return images[source]


def parsed(line: bytes) -> dict:
    """What a line says. Raises BadLine with what is wrong."""
    if len(line) > MOST_LINE:
        raise BadLine(f"over {MOST_LINE // 1_000_000} MB, which is too long for a question")
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadLine(f"not readable as JSON ({one_line(error, 120)})") from None
    if not isinstance(data, dict) or not is_id(data.get("id")):
        raise BadLine('it must be an object with an "id", a text or a whole number')
    data = {name: value for name, value in data.items() if value is not None}
    sources = data.get("image", [])
    limit = data.get("max_new_tokens", 1)
    wrong = [
        (not isinstance(data.get("prompt"), str), 'it needs a "prompt", a text'),
        ("images" in data, 'write "image", for one path or a list of them, not "images"'),
        (not isinstance(sources, str) and not (isinstance(sources, list) and all(
            isinstance(source, str) for source in sources)), '"image" must be a path or a list of paths'),
        (not isinstance(data.get("system", ""), str), '"system" must be a text'),
        (type(limit) is not int or limit < 1, '"max_new_tokens" must be a whole number of at least 1')]
    for is_wrong, words in wrong:
        if is_wrong:
            raise BadLine(words, data["id"])
    return data


def is_id(value: object) -> bool:
    return isinstance(value, str) or type(value) is int
