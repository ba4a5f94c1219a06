"""The record of kept image tokens: a file of JSON lines, one for each question, which outlives a stopped run.

    {"model": "tiny", "prune": ["trimmed_llama", 0.25, {}], ...}                    the settings, once
    {"task": "mme", "doc_id": 7, "real": 1601, "kept": [...], ...}                  a question

lmms-eval's own cache keeps texts alone, so a line is written before it gets the text. A run that was killed
goes on with the same file: what is there is not written again, and a last line that was cut off is removed.
"""
import json
import os
from collections.abc import Sequence
from pathlib import Path

from cli.answers import mean
from weights.files import read_bytes, unreadable
from weights.messages import named, quoted

MOST_BYTES = 1_000_000_000
Key = tuple[str, str]               # task, and number of the document as text


class Record:
    """A file to write. Raises ValueError where it cannot be written, or is of other settings."""

    def __init__(self, path: Path, settings: dict):
        self.path = path
        data = read_bytes(path, MOST_BYTES) if path.exists() else b""
        whole = data[:data.rfind(b"\n") + 1]
        lines = parsed(path, whole)
        if lines and lines[0] != json.loads(json.dumps(settings)):
            raise ValueError(f"{named(path)} is the record of a run with other settings: give another name")
        self.known = {key_of(path, line) for line in lines[1:]}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "ab")        # noqa: SIM115  open until the program ends
            os.ftruncate(self.file.fileno(), len(whole))
        except OSError as error:
            raise unreadable(path, error) from None
        if not lines:
            self._write([settings])

    def add(self, lines: Sequence[dict]):
        """Write what was found of some questions, but for those whose line is there already."""
        new = {key_of(self.path, line): line for line in lines}
        new = {key: line for key, line in new.items() if key not in self.known}
        self._write(list(new.values()))
        self.known |= new.keys()

    def _write(self, lines: list[dict]):
        self.file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        self.file.flush()


def read_record(path: Path) -> tuple[dict, dict[Key, dict]]:
    """The settings of a record, and its lines by task and document. Raises ValueError where it is damaged."""
    data = read_bytes(path, MOST_BYTES)
    lines = parsed(path, data[:data.rfind(b"\n") + 1])
    if not lines:
        raise ValueError(f"{named(path)} is no record of kept tokens: name what record= has written")
    return lines[0], {key_of(path, line): line for line in lines[1:]}


def parsed(path: Path, data: bytes) -> list[dict]:
    try:
        lines = [json.loads(line) for line in data.splitlines()]
    except (ValueError, RecursionError):
        lines = [None]
    if not all(isinstance(line, dict) for line in lines):
        raise ValueError(f"{named(path)} is no record of kept tokens, or damaged: give another name")
    return lines


def key_of(path: Path, line: dict) -> Key:
    if not {"task", "doc_id", "real", "kept"} <= line.keys():
        raise ValueError(f"{named(path)}: a line without a task or a document, {quoted(line)}: it is damaged")
    return line["task"], str(line["doc_id"])


def shares(lines: dict[Key, dict], task: str, first: int = 0) -> list[float]:
    """The share of its image tokens that each question of a task kept, a mean over the layers from `first`
    on. A question without an image has none."""
    return [mean(line["kept"][first:]) / line["real"] for (name, _), line in lines.items()
            if name == task and line["real"] and line["kept"]]
