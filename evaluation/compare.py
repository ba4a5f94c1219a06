"""Whether a method is better than others: `python -m evaluation.compare FILE.json... --method coreset`.

    results of evaluate.py --json ── rows at the same --keep ─► accuracy of the method - that of each other

All files must be of the same questions to the same model; rows of all of them are compared, whatever their
options. The interval is that of `scoring.paired_bootstrap`: both rows on the same resampled images. Accuracy
is that of all questions, which is the mean over kinds but for a few hundredths of a point: every kind is
asked equally often. Methods count `--keep` in different ways, so the share that each kept stands beside it.
"""
from cli import program

program.begin(__name__)

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from cli.options import Parser, labelled
from cli.program import write
from cli.terminal import stdout_width
from evaluation.plot import blocks, in_columns, percent
from evaluation.records import are_comparable
from evaluation.scoring import paired_bootstrap
from evaluation.store import MOST_BYTES
from weights.files import read_json
from weights.messages import named, quoted

# Settings that must be the same in all files; files of before there were splits are about test scenes.
SAME = {"split": "test", "model": None, "weights": None, "questions": None, "kinds": None, "blur": None,
        "skip_layer": None, "dtype": None, "revision": None, "quantize": None, "adapters": None}
HEAD = ["", "kept", "accuracy", "difference", "95 % interval", ""]
MARK = "*"


def arguments() -> argparse.Namespace:
    parser = Parser("python -m evaluation.compare", "A method against others, in points.",
                    "FILE... --method P")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="written by evaluate.py --json")
    parser.add_argument("--method", required=True, metavar="P",
                        help="the one to compare with all others: a name, or name and options as in a table")
    return parser.parse_args()


def command(args: argparse.Namespace):
    write(comparison(read_rows(args.files), args.method, stdout_width()))


def read_rows(paths: Sequence[Path]) -> list[dict]:
    """The rows of all files, each once. Raises ValueError where they cannot be compared."""
    rows = {}
    expected = {}
    for path in paths:
        made = read_json(path, MOST_BYTES)
        if not are_comparable(made):
            raise ValueError(f"{named(path)}: not written by evaluate.py --prune ... --json, or damaged")
        for name, default in SAME.items():
            value = made["settings"].get(name, default)
            if value != expected.setdefault(name, value):
                raise ValueError(f"{named(path)}: {name} is {quoted(value)}, not {quoted(expected[name])} as "
                                 f"in {named(paths[0])}: give files of the same questions to the same model")
        for row in made["rows"]:
            key = row["method"], json.dumps(row["options"], sort_keys=True), json.dumps(row["keep"])
            if row["right"] != rows.setdefault(key, row)["right"]:
                raise ValueError(f"{named(path)}: {quoted(row['method'])} at keep {quoted(row['keep'])} has "
                                 "other answers than in a file before it: leave out one of the two")
    return list(rows.values())


def comparison(rows: list[dict], method: str, columns: int | None = None) -> str:
    """A table for each row of a method, which is a name or a label: all others at the same `keep`, and the
    full model, the most accurate first; in so many columns. Raises ValueError if there is no such row."""
    labels = [label for label, _ in labelled([(row["method"], row["options"]) for row in rows])]
    pairs = list(zip(labels, rows, strict=True))
    chosen = [(label, row) for label, row in pairs if method in (label, row["method"])]
    if not chosen:
        raise ValueError(f"--method {quoted(method)}: choose one of {', '.join(dict.fromkeys(labels))}")
    tables = []
    for label, row in chosen:
        others = [(other_label, other) for other_label, other in pairs if other is not row and (
            other["method"] == "none" or json.dumps(other["keep"]) == json.dumps(row["keep"]))]
        others.sort(key=lambda pair: -pair[1]["accuracy"])
        title = (f"{label}, keep {row['keep']}: {percent(row['kept'])}% kept, accuracy "
                 f"{percent(row['accuracy'])}; {label} minus")
        tables.append(f"{in_columns([title], columns)}\n{against(row, others, columns)}")
    return "\n".join(tables) + f"{MARK} the interval does not hold 0\n"


def against(row: dict, others: list[tuple[str, dict]], columns: int | None) -> str:
    """A line for each of the others: accuracy of the row minus its own, and the interval of that."""
    lines = [HEAD]
    for label, other in others:
        difference, low, high = paired_bootstrap(row["right"].split(), other["right"].split())
        lines.append([label, percent(other["kept"]) + "%", percent(other["accuracy"]), points(difference),
                      f"[{points(low)}, {points(high)}]", MARK if low > 0 or high < 0 else " "])
    return "".join(line.rstrip() + "\n" for line in blocks(lines, columns, repeated=1))


def points(share: float) -> str:
    """A difference in points; adding 0 makes 0 of -0."""
    return f"{round(100 * share, 2) + 0:+.2f}"


def main():
    program.run(command, arguments)


if __name__ == "__main__":
    main()
