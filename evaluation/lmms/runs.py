"""What one run has left: lmms-eval's results and samples, and our record of kept tokens.

    RUN/kept.jsonl                              the record
    RUN/**/TIME_results.json                    scores of each task; a later file wins
    RUN/**/TIME_samples_TASK.jsonl              a line for each question
"""
import json
from dataclasses import dataclass, field
from pathlib import Path

from evaluation.lmms.record import Key, read_record
from weights.files import exists, read_bytes, read_json
from weights.messages import named

RECORD = "kept.jsonl"
MOST_BYTES = 4_000_000_000


@dataclass
class Run:
    """One run; `scores` by task and metric, `questions` asked and there are, by task."""
    path: Path
    settings: dict
    kept: dict[Key, dict]
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    questions: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The method, its keep ratio, and the options that are not at their default."""
        method, keep, options = self.settings["prune"]
        if method == "none":
            return "none"
        return " ".join([method, str(keep), *(f"{option}={value}" for option, value in options.items())])

    def samples(self, task: str) -> list[dict]:
        """A line for each question of a task, in the order of the questions; [] if there are none."""
        files = newest(self.path.rglob(f"*_samples_{task}.jsonl"))
        if not files:
            return []
        lines = jsonl(files[-1])
        return sorted(lines, key=lambda line: int(line["doc_id"]))


def read_run(path: Path) -> Run:
    """Raises ValueError with one line where a folder has no results or no record, or they are damaged."""
    if not path.is_dir():
        raise ValueError(f"{named(path)} is no folder: name one that evaluation/lmms/scripts/row.sh wrote")
    if not exists(path / RECORD):
        raise ValueError(f"{named(path)} has no {RECORD}: run it again with the model argument "
                         f"record={named(path / RECORD)}")
    settings, kept = read_record(path / RECORD)
    prune = settings.get("prune")
    if not (isinstance(prune, list) and len(prune) == 3 and isinstance(prune[2], dict)):
        raise ValueError(f"{named(path / RECORD)}: its first line names no method: it is damaged")
    run = Run(path, settings, kept)
    for file in newest(path.rglob("*_results.json")):
        made = read_json(file, MOST_BYTES)
        try:
            for task, metrics in made["results"].items():
                run.scores[task] = {name.removesuffix(",none"): value for name, value in metrics.items()
                                    if isinstance(value, (int, float))}
                count = made["n-samples"][task]
                run.questions[task] = count["effective"], count["original"]
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"{named(file)} is no result of lmms-eval 0.7.3, or damaged") from None
    if not run.scores:
        raise ValueError(f"{named(path)} has no results of lmms-eval yet: the same command ends the run")
    return run


def newest(paths) -> list[Path]:
    """The oldest first: names begin with the time."""
    return sorted(paths, key=lambda path: path.name)


def jsonl(path: Path) -> list[dict]:
    """Raises ValueError where a line is no object with a document's number."""
    try:
        lines = [json.loads(line) for line in read_bytes(path, MOST_BYTES).splitlines()]
        if all("doc_id" in line for line in lines):
            return lines
    except (ValueError, TypeError, RecursionError):
        pass
    raise ValueError(f"{named(path)} holds no samples of lmms-eval, or is damaged")
