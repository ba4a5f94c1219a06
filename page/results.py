"""The files of evaluate.py as the Curve tab reads them: accuracy of some methods on some kinds of question.

    evaluation/results/*.json ── read ─► Results ── points ─► one Point for each row

Of all kinds together the accuracy and its interval are those in the file. Of some kinds they are computed
from the answers in it as evaluate.py does it, with the same paired bootstrap.
"""
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from itertools import compress
from pathlib import Path

from cli.options import labelled
from evaluation.compare import read_rows
from evaluation.exam import make_exam
from evaluation.scoring import paired_bootstrap
from evaluation.store import MOST_BYTES
from scenes.questions import KINDS
from weights.files import read_json

FOLDER = Path(__file__).parents[1] / "evaluation" / "results"
SETTINGS = {                        # what the files are about; those of another name are called by it
    "curve": "the curve of the README: every layer reads only what is kept",
    "every_layer": "every layer reads only what is kept",
    "first_layer_whole": "the first layer reads everything in prefill",
    "after_prefill": "the cache is cut after prefill",
    "early_exit": "a smaller model answers first: sgl and its threshold",
    "heights": "coreset by the height at which clusters are cut",
    "exists": "only whether something is there",
    "exists_blurred": "only whether something is there, in blurred images",
    "guide": "the smaller checkpoint: every layer reads only what is kept",
    "guide_first_layer_whole": "the smaller checkpoint: the first layer reads everything in prefill",
    "guide_after_prefill": "the smaller checkpoint: the cache is cut after prefill",
    "seed1": "trained again: every layer reads only what is kept",
    "seed1_first_layer_whole": "trained again: the first layer reads everything in prefill",
    "seed1_after_prefill": "trained again: the cache is cut after prefill"}


@dataclass(frozen=True)
class Point:
    """One row of a file, of the kinds that were chosen."""
    method: str                                 # its label
    keep: float | None
    kept: float                                 # share of the image tokens, a mean over layers and questions
    accuracy: float
    low: float                                  # ends of the 95 % interval against the full model
    high: float
    questions: int
    image_kv_bytes: float                       # that decoding reads, a mean over all questions


@dataclass
class Results:
    """Rows of one or several files of the same questions; the first row is the full model."""
    settings: dict
    rows: list[dict]
    labels: list[str]                           # of the rows
    known: dict[tuple, Point] = field(default_factory=dict)         # those that were computed once

    @property
    def methods(self) -> list[str]:
        """Labels without the full model's, in their order."""
        return list(dict.fromkeys(self.labels[1:]))

    @property
    def asked(self) -> list[str]:
        """The kinds that were asked."""
        return [kind for kind, share in self.rows[0]["accuracy_by_kind"].items() if share is not None]

    def kinds(self) -> list[list[str]]:
        """The kinds of the questions of every image. Raises ValueError if they are asked otherwise now."""
        names = self.settings["kinds"]
        kinds = kinds_asked(self.settings["questions"], self.settings.get("split", "test"),
                            tuple(KINDS) if names is None else tuple(names.split(",")))
        if any([*map(len, row["right"].split())] != [*map(len, kinds)] for row in self.rows):
            raise ValueError("the answers in the file are not to the questions that are asked now: ask again "
                             "with evaluate.py")
        return kinds

    def points(self, methods: list[str], kinds: list[str]) -> list[Point]:
        """The full model, and every row of these methods. Raises ValueError where no question is left."""
        kinds = [kind for kind in self.asked if kind in kinds]
        if not kinds:
            raise ValueError("no question is of these kinds: choose at least one kind that was asked")
        found = []
        for i, label in enumerate(self.labels):
            if i == 0 or label in methods:
                key = i, *kinds
                if key not in self.known:
                    self.known[key] = self.point(i, kinds)
                found.append(self.known[key])
        return found

    def point(self, i: int, kinds: list[str]) -> Point:
        """Row i, of some of the kinds that were asked."""
        row = self.rows[i]
        if kinds != self.asked:
            return self.computed(i, kinds)
        return Point(self.labels[i], row["keep"], row["kept"], row["accuracy"], row["low"], row["high"],
                     self.settings["questions"], row["image_kv_bytes"])

    def computed(self, i: int, kinds: list[str]) -> Point:
        """The same from the answers to these questions, as evaluate.py computes it."""
        row = self.rows[i]
        wanted = [[kind in kinds for kind in image] for image in self.kinds()]
        counts = Counter(kind for image in self.kinds() for kind in image if kind in kinds)
        asked = counts.total()
        kept = sum(row["kept_by_kind"][kind] * count for kind, count in counts.items()) / asked
        full, right = (answers(each, wanted) for each in (self.rows[0], row))
        base = "".join(full).count("1") / asked
        difference, low, high = paired_bootstrap(right, full)
        return Point(self.labels[i], row["keep"], kept, base + difference, base + low, base + high, asked,
                     row["image_kv_bytes"])


def answers(row: dict, wanted: list[list[bool]]) -> list[str]:
    """0 and 1 of the questions that are wanted; images without one are left out."""
    images = zip(row["right"].split(), wanted, strict=True)
    return [kept for image, some in images if (kept := "".join(compress(image, some)))]


@cache
def files(folder: Path = FOLDER) -> dict[str, list[Path]]:
    """What the files of evaluate.py in a folder are about, and which they are; several thresholds are one set
    of results."""
    found: dict[str, list[Path]] = {}
    for path in filter(is_evaluation, folder.glob("*.json")):
        name = re.sub(r"_[\d.]+$", "", path.stem)
        found.setdefault(name, []).append(path)
    order = [*SETTINGS, *sorted(found.keys() - SETTINGS.keys())]
    return {SETTINGS.get(name, name): sorted(found[name]) for name in order if name in found}


def is_evaluation(path: Path) -> bool:
    """Whether a file is one of evaluate.py. One that is no JSON may have been: whoever chooses it is told."""
    try:
        made = read_json(path, MOST_BYTES)
    except ValueError:
        return True
    return isinstance(made, dict) and "rows" in made


@cache
def read(*paths: Path) -> Results:
    """Raises ValueError for files that evaluate.py has not written, or that cannot be compared."""
    rows = read_rows(paths)
    labels = [label for label, _ in labelled([(row["method"], row["options"]) for row in rows])]
    return Results(read_json(paths[0], MOST_BYTES)["settings"], rows, labels)


@cache
def kinds_asked(questions: int, split: str, kinds: tuple[str, ...]) -> list[list[str]]:
    """The kinds of the questions of every image, as evaluate.py asks them."""
    return [[question.kind for question in asked] for _, asked in make_exam(questions, split, kinds)]
