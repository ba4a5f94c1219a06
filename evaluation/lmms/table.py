"""The paper's rows beside the published numbers: `python -m evaluation.lmms.table RUN...`.

    RUN ── runs.read_run ─► scores, and the share of image tokens kept ─► lines like those of Tables 1 and 3

RUN is a folder that a script of `evaluation/lmms/scripts` wrote. A cell is the score and, in brackets, the
per cent of image tokens kept: of each question a mean over the cross-attention layers of what each caches for
decoding, then a mean over questions. Published rows stand below those that they can be compared with.
"""
import argparse
from collections.abc import Sequence
from pathlib import Path

from cli.answers import mean
from cli.options import Parser
from cli.program import run as run_program
from cli.program import write
from cli.terminal import stdout_width
from evaluation.lmms.published import COLUMNS, TABLE_1, TABLE_3, Cell
from evaluation.lmms.record import shares
from evaluation.lmms.runs import Run, read_run
from evaluation.plot import blocks, in_columns

# Of each column: the task, the metrics that are added, and what turns their sum into the paper's unit.
SOURCES = {"SEED-img": ("seedbench_image", ("seed_image",), 100),
           "MME": ("mme", ("mme_perception_score", "mme_cognition_score"), 1),
           "MME-cog": ("mme", ("mme_cognition_score",), 1),
           "MME-per": ("mme", ("mme_perception_score",), 1),
           "MMVP": ("mmvp", ("mmvp_pair_accuracy",), 100),
           "LLaVA-Bench": ("llava_in_the_wild", ("gpt_eval_llava_all",), 1)}
SIZES = "11B", "90B"

JUDGE = ("LLaVA-Bench: the paper does not name its judge; here the samples name {judges}. Scores of two "
         "judges cannot be compared.")
CORRECTED = ("MMVP: in lmms-eval's data two of 150 pairs are corrected, up to 1.3 points, and its task "
             "came after the paper, which must have used other code. That the paper counts pairs is "
             "inferred: 46.7 of single answers would be below chance.")
BRACKET = ("brackets: the paper does not say whether its percentage counts the first cross-attention layer; "
           "here it is a mean over all layers.")
WITHOUT_FIRST = "{name}: without the first layer {parts} are kept."
BASELINES = ("random, spatial: the paper does not say where its baselines prune; here they do after the "
             "first cross-attention layer, as trimmed_llama does, unless full_layers says otherwise.")
SOME = "{name}: {task} asked {asked} of {there} questions: the score is of these alone."
UNRECORDED = "{name}: the record has {known} of {asked} questions of {task}: its bracket is of these alone."
OTHER = "published numbers are of {size}; these runs are of {model}, so only the form can be compared."


def arguments() -> argparse.Namespace:
    parser = Parser("python -m evaluation.lmms.table", "Runs of lmms-eval as the paper's rows.",
                    "RUN... [options]")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                        help="a folder with kept.jsonl and results")
    parser.add_argument("--size", choices=SIZES,
                        help="published rows to compare with; default: of the model's name, else 11B")
    return parser.parse_args()


def command(args: argparse.Namespace):
    runs = [read_run(path) for path in args.runs]
    write(page(runs, args.size, stdout_width()))


def page(runs: Sequence[Run], size: str | None = None, columns: int | None = None) -> str:
    """The table, and below it what could not be the same as in the paper."""
    lines = [["", *COLUMNS]]
    sizes = [size or size_of(run.settings["model"]) for run in runs]
    for run, own in zip(runs, sizes, strict=True):
        found = {column: cell_of(run, column) for column in COLUMNS}
        lines.append([f"{short(run.settings['model'])}, {run.name}", *map(words, found.values())])
        label, published = published_row(run, own)
        lines.append([f"  {label}", *(words(published.get(column)) for column in COLUMNS)])
        if published:
            lines.append(["  difference", *(difference(found[name], published[name]) for name in COLUMNS)])
    notes = [line for run, own in zip(runs, sizes, strict=True) for line in notes_of(run, own)]
    notes = [*dict.fromkeys(notes), BRACKET]
    notes = [in_columns([note], columns) for note in notes]
    return "\n".join([*blocks(lines, columns, repeated=1), "", *notes]) + "\n"


def size_of(model: str) -> str:
    """11B or 90B, as the name of a model says."""
    return next((size for size in SIZES if size.lower() in model.lower()), SIZES[0])


def short(model: str) -> str:
    return Path(model).name or model


def cell_of(run: Run, column: str) -> Cell | None:
    """The score of a column and the per cent kept; None where its task was not run."""
    task, metrics, factor = SOURCES[column]
    scores = [run.scores.get(task, {}).get(metric) for metric in metrics]
    if None in scores:
        return None
    kept = shares(run.kept, task)
    return factor * sum(scores), 100 * mean(kept) if kept else None


def published_row(run: Run, size: str) -> tuple[str, dict[str, Cell]]:
    """What the paper says of the same method: a label, and the cells; none where it has no such row."""
    method, keep, _ = run.settings["prune"]
    if method == "none":
        return f"published, {size}", TABLE_1[size, None]
    if method == "trimmed_llama" and (size, keep) in TABLE_1:
        return f"published, {size}, K {keep}", TABLE_1[size, keep]
    if method in TABLE_3 and size == "11B" and keep == 0.5:
        return f"published, {size}, {method} 0.5", TABLE_3[method]
    return "not in the paper", {}


def words(cell: Cell | None) -> str:
    if cell is None or cell[0] is None:
        return "-"
    return f"{cell[0]:.1f}" if cell[1] is None else f"{cell[0]:.1f} ({cell[1]:.1f})"


def difference(found: Cell | None, published: Cell) -> str:
    if found is None or published[0] is None:
        return "-"
    score = f"{found[0] - published[0]:+.1f}"
    return score if None in (found[1], published[1]) else f"{score} ({found[1] - published[1]:+.1f})"


# ----- what could not be the same


def notes_of(run: Run, size: str) -> list[str]:
    method, _, _ = run.settings["prune"]
    notes = []
    if size.lower() not in run.settings["model"].lower():
        notes.append(OTHER.format(size=size, model=short(run.settings["model"])))
    if "llava_in_the_wild" in run.scores:
        notes.append(JUDGE.format(judges=", ".join(judges_of(run)) or "none"))
    if "mmvp" in run.scores:
        notes.append(CORRECTED)
    if method in TABLE_3:
        notes.append(BASELINES)
    for task in dict.fromkeys(task for task, _, _ in SOURCES.values() if task in run.scores):
        asked, there = run.questions[task]
        if asked < there:
            notes.append(SOME.format(name=run.name, task=task, asked=asked, there=there))
        known = sum(name == task for name, _ in run.kept)
        if known < asked:
            notes.append(UNRECORDED.format(name=run.name, task=task, known=known, asked=asked))
    return notes + without_first(run)


def judges_of(run: Run) -> list[str]:
    """The models that judged, as the samples name them."""
    reviews = [line.get("gpt_eval_llava_all") for line in run.samples("llava_in_the_wild")]
    return sorted({str(review.get("eval_model")) for review in reviews if isinstance(review, dict)})


def without_first(run: Run) -> list[str]:
    """A line where the first layer keeps another share than the later ones."""
    parts = []
    for task in dict.fromkeys(task for task, _, _ in SOURCES.values()):
        every, later = shares(run.kept, task), shares(run.kept, task, first=1)
        if abs(mean(every) - mean(later)) > 0.0005:
            parts.append(f"{100 * mean(later):.1f} % of {task}")
    return [WITHOUT_FIRST.format(name=run.name, parts=", ".join(parts))] if parts else []


def main():
    run_program(command, arguments)


if __name__ == "__main__":
    main()
