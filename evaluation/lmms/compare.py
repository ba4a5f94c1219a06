"""Whether two runs of lmms-eval differ by more than chance: `python -m evaluation.lmms.compare RUN OTHER`.

    samples of both ─ score of each question ─► scoring.paired_bootstrap ─► difference, 95 % interval

Both runs must have asked the same questions, with --log_samples. Questions about one image (of MME, of the
scenes) are resampled together; of metrics called `pair`, both questions of a pair must be right. What is
compared is a mean over questions, so a metric that is no mean of what its samples say of single questions, as
CIDEr or F1, is named and left out. Of MME right answers are compared, of LLaVA-Bench the judge's points.
"""
import argparse
from collections.abc import Sequence
from pathlib import Path

from cli.answers import mean
from cli.options import Parser
from cli.program import run as run_program
from cli.program import write
from cli.terminal import stdout_width
from evaluation.lmms.record import shares
from evaluation.lmms.runs import Run, read_run
from evaluation.plot import blocks, in_columns, percent
from evaluation.scoring import paired_bootstrap
from weights.messages import named

GROUPS = "scene", "pair_index", "question_id"       # what questions have in common that are not independent
MARK = "*"
# Metrics of which something else is compared than what lmms-eval prints: the mean of what its samples say.
INSTEAD = {"mme_": "right answers", "gpt_eval_llava_": "points of 10"}


def arguments() -> argparse.Namespace:
    parser = Parser("python -m evaluation.lmms.compare", "Two runs of lmms-eval, question by question.",
                    "RUN OTHER [options]")
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN",
                        help="folders with kept.jsonl and samples")
    parser.add_argument("--task", action="append", metavar="T", help="these alone; default: all of both")
    return parser.parse_args()


def command(args: argparse.Namespace):
    first, second = [read_run(path) for path in args.runs]
    tasks = args.task or [task for task in first.scores if task in second.scores]
    write(comparison(first, second, tasks, stdout_width()))


def comparison(first: Run, second: Run, tasks: Sequence[str], columns: int | None = None) -> str:
    """A line for each metric of each task. Raises ValueError where the questions are not the same."""
    lines = [["task, metric", "questions", first.name, second.name, "difference", "95 % interval", ""]]
    without = []
    for task in tasks:
        pairs = paired(first, second, task)
        kept = [shares(run.kept, task) for run in (first, second)]
        lines.append([f"{task}, kept", str(len(pairs)), *(percent(mean(each)) + "%" for each in kept),
                      "", "", ""])
        for metric in (name for name in first.scores[task] if any(name in pair[0] for pair in pairs)):
            both = [grouped(samples, metric) for samples in zip(*pairs, strict=True)]
            printed = [run.scores[task].get(metric) for run in (first, second)]
            labels = [label_of(metric, *each) for each in zip(both, printed, strict=True)]
            if None in labels:
                without.append(f"{task}, {metric}")
                continue
            difference, low, high = paired_bootstrap(*both)
            means = [mean_of(groups) for groups in both]
            lines.append([f"{task}, {labels[0]}", str(sum(map(len, both[0]))),
                          *(f"{each:.3f}" for each in means),
                          f"{difference + 0:+.3f}", f"[{low + 0:+.3f}, {high + 0:+.3f}]",
                          MARK if low > 0 or high < 0 else ""])
    text = [f"{MARK} the interval does not hold 0"]
    if without:
        text.append(f"no score of single questions: {'; '.join(without)}")
    text = [in_columns([line], columns) for line in text]
    return "\n".join([*blocks(lines, columns, repeated=1), *text]) + "\n"


def paired(first: Run, second: Run, task: str) -> list[tuple[dict, dict]]:
    """The samples of both runs, question by question."""
    both = [run.samples(task) for run in (first, second)]
    for run, samples in zip((first, second), both, strict=True):
        if not samples:
            raise ValueError(f"{named(run.path)} has no samples of {task}: run it with --log_samples")
    asked = [[[line.get(name) for name in ("doc_id", "input", "target")] for line in samples]
             for samples in both]
    if asked[0] != asked[1]:
        raise ValueError(f"{task}: {named(first.path)} and {named(second.path)} asked other questions: give "
                         "two runs of the same data, with the same --limit")
    return list(zip(*both, strict=True))


def grouped(samples: Sequence[dict], metric: str) -> list[list[float]] | None:
    """The scores of a metric, questions about one thing together; None where questions have no scores."""
    groups = {}
    for sample in samples:
        if metric not in sample:
            continue
        value = sample[metric]
        score = score_of(value)
        if score is None:
            return None
        if score != score:                                      # a question of another category
            continue
        names = [name for name in GROUPS if isinstance(value, dict) and name in value]
        key = str(value[names[0]]) if names else str(sample["doc_id"])
        groups.setdefault(key, []).append(score)
    if "pair" in metric:
        return [[min(group)] for group in groups.values()] or None
    return list(groups.values()) or None


def mean_of(groups: list[list[float]]) -> float:
    return mean([score for group in groups for score in group])


def label_of(metric: str, groups: list[list[float]] | None, printed: float | None) -> str | None:
    """What to call the mean of the scores: the metric, if lmms-eval has printed the same, as a share or in
    per cent; None where there are no scores, or they do not make up the metric."""
    if groups is None or printed is None:
        return None
    for start, what in INSTEAD.items():
        if metric.startswith(start):
            return f"{metric}, {what}"
    same = any(abs(factor * mean_of(groups) - printed) < 1e-3 * factor for factor in (1, 100))
    return metric if same else None


def score_of(value: object) -> float | None:
    """What lmms-eval's tasks say of one question, as a number; NaN where it does not count here."""
    if isinstance(value, (bool, int, float)):
        return float(value)
    if not isinstance(value, dict):
        return None
    for name in "score", "is_correct":
        if isinstance(value.get(name), (bool, int, float)):
            return float(value[name])
    if isinstance(value.get("scores"), list) and len(value["scores"]) == 2:     # of LLaVA-Bench, to 10
        return float("nan") if -999 in value["scores"] else float(value["scores"][1])
    if {"pred", "answer", "question_id"} == value.keys():                       # of SEED-Bench
        return float(value["pred"].lower().strip() == value["answer"].lower().strip())
    return None


def main():
    run_program(command, arguments)


if __name__ == "__main__":
    main()
