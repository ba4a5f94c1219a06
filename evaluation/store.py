"""The files of an evaluation: FILE, which is written when it is finished, and FILE.part until then.

FILE.part has a line with all settings, then a line for every run and for every image that is done:

    {"model": "tiny", "questions": 2000, ...}
    {"process": 4711, "host": "name"}                   a run began, or went on after it was stopped
    {"number": 0, "rows": [...], ...}                   the record of image 0
    {"number": 1, "rows": [...], ...}

The same command goes on after the last one. Only one process at a time writes the file: it holds a lock.
Where there are no locks, mixed records are found by their numbers.
"""
import json
import os
import platform
from pathlib import Path

from evaluation.exam import Exam
from evaluation.records import are_figures, is_record
from weights.files import read_bytes, read_json, replacing
from weights.locked_file import LockedFile
from weights.messages import named, one_line

MOST_BYTES = 1_000_000_000


class Store:
    """FILE and FILE.part. Within `with store:` FILE.part is locked, and `records` are those done so far."""

    def __init__(self, path: Path, settings: dict):
        self.path = path
        self.part = path.with_name(path.name + ".part")
        self.settings = as_text(settings)
        self.records: list[dict] = []

    def __enter__(self) -> "Store":
        """Raises ValueError where another process writes FILE.part, or it is not of this evaluation."""
        self.file = LockedFile(self.part, writer_of)
        is_new = self.file.is_empty()
        try:
            self.records = self._read()
            self._write({"process": os.getpid(), "host": platform.node()})
        except BaseException:
            self.file.close(remove=is_new)
            raise
        return self

    def __exit__(self, *error: object):
        self.file.close(remove=not self.records)    # settings that fail at the first image leave no file

    def add(self, record: dict):
        """Write the record of the next image."""
        self._write({"number": len(self.records), **record})
        self.records.append(record)

    def check(self, exam: Exam, rows: int, layers: int | None):
        """Raise ValueError where a record does not fit its questions, the pruners or the layers compared."""
        if len(self.records) > len(exam):
            raise self._damaged(f"{len(self.records)} records for {len(exam)} images")
        for i, (record, (_, questions)) in enumerate(zip(self.records, exam, strict=False)):
            if not is_record(record, len(questions), rows, layers):
                raise self._damaged(f"record {i} does not fit its questions")

    def finish(self, made: dict):
        """Write FILE, and remove FILE.part."""
        with replacing(self.path) as partial:
            partial.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
        self.records = []                       # so that FILE.part goes

    def finished(self) -> dict | None:
        """What FILE holds, if it has these settings and no run began since. ValueError if damaged."""
        if not self.path.exists() or self.part.exists():
            return None
        try:
            made = read_json(self.path, MOST_BYTES)
        except ValueError:                      # something else, which the new figures will replace
            return None
        settings = made.get("settings") if isinstance(made, dict) else None
        if not isinstance(settings, dict) or as_text(settings) != self.settings:
            return None
        if not are_figures(made):
            raise ValueError(f"{named(self.path)}: the figures are damaged; delete this file to ask again")
        return made

    def _read(self) -> list[dict]:
        """The records of FILE.part; a last line that was cut off is removed."""
        data = read_bytes(self.part, MOST_BYTES)
        header = self.settings.encode() + b"\n"
        complete = data[:data.rfind(b"\n") + 1]
        if not complete and header.startswith(data):
            self.file.truncate(0)
            self.file.write(header)
            return []
        if not complete.startswith(header):
            raise ValueError(f"{named(self.part)}: an evaluation with other settings or weights was not "
                             "finished; finish that one, or delete this file")
        records = []
        for line in complete[len(header):].split(b"\n")[:-1]:
            record = self._parsed(line)
            if "process" in record:
                continue
            if record.pop("number", None) != len(records):
                raise self._damaged(f"record {len(records)} is not where it should be")
            records.append(record)
        self.file.truncate(len(complete))
        return records

    def _parsed(self, line: bytes) -> dict:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._damaged(one_line(error, 100)) from None
        if not isinstance(record, dict):
            raise self._damaged("a line is no record")
        return record

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{named(self.part)}: damaged ({what}); delete this file to begin anew")

    def _write(self, line: dict):
        self.file.write(json.dumps(line).encode() + b"\n")


def as_text(settings: dict) -> str:
    """Settings are compared as text: 1 == 1.0, but one token is not all of them.

    Files of before there were splits are about test scenes.
    """
    return json.dumps({"split": "test", **settings})


def writer_of(path: Path) -> str:
    """The process that wrote last that it began."""
    lines = [line for line in path.read_bytes().splitlines() if line.startswith(b'{"process": ')]
    try:
        run = json.loads(lines[-1])
        return f"process {int(run['process'])} on {one_line(run['host'], 60)}"
    except (IndexError, ValueError, KeyError, TypeError):
        return "another process"
