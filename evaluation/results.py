"""What becomes of the answers of an evaluation: rows with error bands, files, a table, a curve.

    records of `evaluate.examine`, one an image ── figures ─► the JSON of `--json` ─┬─ table ─► text
              └─► FILE.part                                                          └─ plot ──► a drawing

A band says how far the questions decide: it is a paired bootstrap against the full model. Images, with all
their questions, are resampled; the 2.5 % and 97.5 % quantiles of (accuracy of the row - accuracy of the full
model on the same resample) are added to the full model's accuracy. So a band is where the row's accuracy lies
given the full model's, and the full model's own has no width. P images, C cross-attention layers.
"""
import importlib.util
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cli import size
from scenes.draw import RATIOS, Scene
from scenes.questions import KINDS, Question

Papers = list[tuple[Scene, list[Question]]]

SUFFIXES = ".png", ".svg", ".pdf"
RESAMPLES_AT_ONCE = 100                         # of P images: what is held stays small for long exams


@dataclass
class Score:
    """Right answers (or another sum over questions) and questions, by kind, by ratio of tiles, of "all"."""
    right: Counter
    asked: Counter

    @classmethod
    def of(cls, papers: Papers, values: list[list[float]]) -> "Score":
        """`values` has for every image a number, or a truth value, for each of its questions."""
        right, asked = Counter(), Counter()
        for (scene, questions), numbers in zip(papers, values, strict=True):
            for question, number in zip(questions, numbers, strict=True):
                for part in question.kind, (scene.rows, scene.columns), "all":
                    asked[part] += 1
                    right[part] += number
        return cls(right, asked)

    def share(self, part) -> float:
        return self.right[part] / self.asked[part] if self.asked[part] else float("nan")

    def mean(self) -> float:
        """Over the kinds, each counted alike."""
        kinds = [kind for kind in KINDS if self.asked[kind]]
        return sum(map(self.share, kinds)) / len(kinds)

    def shares(self, parts: Sequence) -> dict[str, float | None]:
        """By part, a ratio as "2x1"; None where nothing was asked, for JSON has no NaN."""
        return {part if isinstance(part, str) else f"{part[0]}x{part[1]}":
                self.share(part) if self.asked[part] else None for part in parts}


def paired(right_a: Sequence[Sequence], right_b: Sequence[Sequence], resamples: int = 2000,
           seed: int = 0) -> tuple[float, float, float]:
    """Accuracy of `a` minus that of `b` on the same questions, and the ends of its 95 % interval.

    Each has for every image whether its questions were answered rightly: truth values, or a string of 0
    and 1, as in `row["right"].split()`. Raises ValueError where the questions are not the same.
    """
    if [len(answers) for answers in right_a] != [len(answers) for answers in right_b] or not right_a:
        raise ValueError("only rows with the same questions about the same images can be compared")
    sums = torch.tensor([[sum(map(int, a)) - sum(map(int, b)), len(a)]
                         for a, b in zip(right_a, right_b, strict=True)], dtype=torch.float64)      # [P, 2]
    generator, totals = torch.Generator().manual_seed(seed), []
    for begin in range(0, resamples, RESAMPLES_AT_ONCE):
        many = min(RESAMPLES_AT_ONCE, resamples - begin)
        totals.append(sums[torch.randint(len(sums), (many, len(sums)), generator=generator)].sum(1))
    difference, asked = torch.cat(totals).unbind(1)                                         # [resamples] each
    low, high = (difference / asked).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    difference, asked = sums.sum(0).tolist()
    return difference / asked, low, high


def figures(settings: dict, papers: Papers, records: list[dict], gates: list[tuple[float, float]]) -> dict:
    """Everything that `--json` writes. At the top the figures of the full model, then a row for each pruner;
    in its `right` a word of 0 and 1 for each image, for `paired`."""
    score = full_score(papers, records)
    made = {"model": settings["model"], "questions": settings["questions"],
            "skipped_layer": settings["skip_layer"], "accuracy_by_kind": score.shares(list(KINDS)),
            "accuracy_by_ratio": score.shares(RATIOS), "mean_over_kinds": score.mean(),
            "accuracy": score.share("all"), "gates": gates, "settings": settings,
            "rows": [figures_of_row(*which, [record["rows"][i] for record in records],
                                    [record["rows"][0]["right"] for record in records], papers)
                     for i, which in enumerate(settings["rows"])]}
    if records[0]["alike"] is not None:
        made["layer_similarity"] = {
            name: (torch.tensor([record["alike"][name] for record in records], dtype=torch.float64).sum(0)
                   / score.asked["all"]).tolist() for name in records[0]["alike"]}                   # [C, C]
    return made


def denied(question: Question) -> bool:
    """Whether it asks if something is there that is not: the answer yes would make it up."""
    return question.kind == "exists" and question.answer == "no"


def full_score(papers: Papers, records: list[dict]) -> Score:
    return Score.of(papers, [record["rows"][0]["right"] for record in records])


def figures_of_row(method: str, keep: float | int, options: dict, asked: list[dict], full: list[list[bool]],
                   papers: Papers) -> dict:
    """One row, from its part of every image's record; `full` is what the full model answered rightly."""
    def total(name: str) -> float:
        return sum(image[name] for image in asked)

    right = [image["right"] for image in asked]
    score, kept = Score.of(papers, right), Score.of(papers, [image["kept"] for image in asked])
    absent = sum(denied(question) for _, questions in papers for question in questions)
    wrong_yes = sum(sum(image["wrong_yes"]) for image in asked)
    _, low, high = paired(right, full)
    whole = Score.of(papers, full).share("all")
    return {"method": method, "keep": keep, "options": options, "kept": kept.share("all"),
            "accuracy": score.share("all"), "low": whole + low, "high": whole + high,
            "accuracy_by_kind": score.shares(list(KINDS)), "kept_by_kind": kept.shares(list(KINDS)),
            "wrong_yes": wrong_yes / absent if absent else None,
            "early": Score.of(papers, [image["early"] for image in asked]).share("all"),
            "image_kv_bytes": total("image_kv_bytes") / score.asked["all"],
            "image_kv_stored": total("image_kv_stored") / score.asked["all"],
            "prefill_ms": total("prefill_ms") / len(asked),
            "decode_ms": total("decode_ms") / max(1, total("steps")),
            "right": " ".join("".join(str(int(answer)) for answer in answers) for answers in right)}


# ----- files


class Store:
    """FILE, written in one go; until then FILE.part, from which the same command goes on: a line with all
    settings, then one for each image that is done."""

    def __init__(self, path: Path, settings: dict):
        self.path, self.part = path, path.with_name(path.name + ".part")
        self.settings = json.dumps(settings)    # compared as text: 1 == 1.0, but one token is not all of them

    def records(self) -> list[dict]:
        """Those done so far; a last line that was cut off is dropped. ValueError for another run's file."""
        if not self.part.exists():
            return []
        data, header = self.part.read_bytes(), self._header()
        whole = data[:data.rfind(b"\n") + 1]
        if not (whole.startswith(header) or not whole and header.startswith(data)):
            raise ValueError(f"{self.part}: an evaluation with other settings or weights was not finished; "
                             "finish that one, or delete this file")
        try:
            records = [json.loads(line) for line in whole[len(header):].splitlines()]
        except ValueError:
            raise ValueError(f"{self.part}: a line is damaged; delete this file") from None
        os.truncate(self.part, len(whole))
        return records

    def add(self, record: dict):
        """The first one makes the file, so that settings which it shows to be wrong leave none."""
        with open(self.part, "ab") as file:
            file.write((b"" if file.tell() else self._header()) + json.dumps(record).encode() + b"\n")

    def finish(self, made: dict):
        """Write FILE whole or not at all."""
        new = self.path.with_name(self.path.name + ".tmp")
        new.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
        new.replace(self.path)
        self.part.unlink(missing_ok=True)

    def finished(self) -> dict | None:
        """What is in FILE, if it is of these settings and nothing has been begun since."""
        if not self.path.exists() or self.part.exists():
            return None
        try:
            made = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError:                      # something else, which the new figures will replace
            return None
        return made if isinstance(made, dict) and json.dumps(made.get("settings")) == self.settings else None

    def _header(self) -> bytes:
        return self.settings.encode() + b"\n"


# ----- for people


def table(made: dict) -> str:
    """The rows as aligned text: percentages, image KV read for one question, milliseconds of prefill
    and of one decode step. Below it the options that are set, and how alike the layers look at the image."""
    short = [kind if len(kind) < 6 else kind[:4] + "." for kind in KINDS]
    lines = [["method", "keep", "kept", "accuracy", *short, "wrong yes", "image KV", "prefill", "decode"]]
    for row in made["rows"]:
        band = f"{percent(row['accuracy'])} [{percent(row['low'])}, {percent(row['high'])}]"
        lines.append([row["method"], str(row["keep"]), percent(row["kept"]) + "%", band,
                      *(percent(row["accuracy_by_kind"][kind]) for kind in KINDS), percent(row["wrong_yes"]),
                      size(row["image_kv_bytes"]), f"{row['prefill_ms']:.3g} ms",
                      f"{row['decode_ms']:.3g} ms"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["".join(f" {cell:>{width}}" if i else f"{cell:{width}}"
                    for i, (cell, width) in enumerate(zip(line, widths, strict=True))) for line in lines]
    set_knobs = {row["method"]: row["options"] for row in made["rows"] if row["options"]}
    text += [f"{method}: " + ", ".join(f"{option} {value}" for option, value in options.items())
             for method, options in set_knobs.items()]
    cosine, shared = (pairs_mean(made["layer_similarity"][name]) for name in ("cosine", "top10_overlap"))
    return "\n".join(text + [f"attention maps of two layers, full model: cosine {cosine:.2f}, "
                             f"{shared:.0%} of the top 10 % of tokens shared"] * (cosine is not None))


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def pairs_mean(matrix: list[list[float]]) -> float | None:
    """Over all pairs of different layers; None where there is one layer."""
    pairs = [value for i, line in enumerate(matrix) for value in line[:i]]
    return sum(pairs) / len(pairs) if pairs else None


MARKERS = "o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p"
LINES = "-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))
COLOURS = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000"  # safe for colour-blind
ACCURACIES = 20, 40, 60, 70, 80, 85, 90, 92, 94, 96, 97, 98, 99, 99.5
LEAST_WRONG = 0.25                              # per cent that is drawn: none at all has no place on the axis
TICKS = 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0


def check_plot(path: Path):
    """ValueError with one line where `plot` would fail, to be known before an hour of questions."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--plot {path}: the name must end in {', '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install -e '.[eval]'")


def wrong(accuracy: float) -> float:
    """Per cent of wrong answers."""
    return max(LEAST_WRONG, 100 * (1 - accuracy))


def plot(made: dict, path: Path):
    """Accuracy against the share of image tokens kept, a line for each method; the full model lies across.

    Readable without colours. Both axes are logarithmic, in tokens kept and in wrong answers: half of the
    story is below 10 % of the one, and what differs is between 2 and 20 % of the other.
    """
    # Here, for nothing else needs it; and not pyplot, which opens windows and holds every figure.
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    full, *rows = made["rows"]
    axes.axhline(wrong(full["accuracy"]), color="0.3", linewidth=1, label="full model")
    for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        mine = [row for row in rows if row["method"] == method]
        points = sorted((row["kept"], *(wrong(row[name]) for name in ("accuracy", "low", "high")))
                        for row in mine)
        label = "\n".join([method, *(f"  {option} {value}" for option, value in mine[0]["options"].items())])
        x, y, low, high = zip(*points, strict=True)
        colour = COLOURS[i % len(COLOURS)]
        axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.vlines(x, low, high, color=colour, alpha=0.5, linewidth=1)     # a band of one point is empty
        axes.plot(x, y, color=colour, marker=MARKERS[i % len(MARKERS)], linestyle=LINES[i % len(LINES)],
                  markersize=5, linewidth=1.4, label=label)
    least = min([0.5, *(row["kept"] for row in rows)])
    axes.set_xscale("log", base=2)
    axes.set_xlim(least * 0.85, 1.1)
    axes.set_xticks([tick for tick in TICKS if tick >= least * 0.85])
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    axes.set_yscale("log")
    axes.invert_yaxis()
    most, few = axes.get_ylim()
    axes.set_yticks([100 - tick for tick in ACCURACIES if few <= 100 - tick <= most])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda percent, _: f"{100 - percent:g} %")
    axes.set_xlabel("image tokens kept, mean over layers and questions")
    axes.set_ylabel("accuracy, with 95 % band against the full model")
    axes.set_title(f"{made['model']}, {made['questions']} questions", fontsize="medium")
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)
