"""From answers to figures: shares of right answers, and how sure the questions make us of them.

The band of a row (`low` to `high`) comes from a paired bootstrap against the full model. Images are resampled
with all their questions; the 2.5 % and 97.5 % quantiles of (accuracy of the row - accuracy of the full model,
on the same resample) are added to the full model's accuracy. So the band tells where the accuracy of the row
lies, given that of the full model, and the full model's own band has no width.

A record is what `evaluate.examine` returns for one image. P images, C cross-attention layers.
"""
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from evaluation.exam import Exam, is_about_the_absent
from scenes.draw import RATIOS
from scenes.questions import KINDS

RESAMPLES_AT_ONCE = 100             # of P images, so that little memory is needed for a long exam
INTERVAL = 0.025, 0.975             # quantiles


@dataclass
class Score:
    """Right answers (or another sum) and questions, by kind, by tile ratio, and of "all"."""
    right: Counter
    asked: Counter

    @classmethod
    def of(cls, exam: Exam, values: list[list[float]]) -> "Score":
        """`values` has, for every image, a number or a truth value for each of its questions."""
        right = Counter()
        asked = Counter()
        for (scene, questions), numbers in zip(exam, values, strict=True):
            for question, number in zip(questions, numbers, strict=True):
                for part in question.kind, (scene.rows, scene.columns), "all":
                    asked[part] += 1
                    right[part] += number
        return cls(right, asked)

    def share(self, part: str | tuple[int, int]) -> float:
        return self.right[part] / self.asked[part] if self.asked[part] else float("nan")

    def mean(self) -> float:
        """Over the kinds that were asked, each with the same weight."""
        kinds = [kind for kind in KINDS if self.asked[kind]]
        return sum(self.share(kind) for kind in kinds) / len(kinds)

    def shares(self, parts: Sequence[str | tuple[int, int]]) -> dict[str, float | None]:
        """By part, a tile ratio as "2x1"; None where nothing was asked, because JSON has no NaN."""
        shares = {}
        for part in parts:
            name = part if isinstance(part, str) else f"{part[0]}x{part[1]}"
            shares[name] = self.share(part) if self.asked[part] else None
        return shares


def paired_bootstrap(right_a: Sequence[Sequence], right_b: Sequence[Sequence], resamples: int = 2000,
                     seed: int = 0) -> tuple[float, float, float]:
    """Accuracy of `a` minus that of `b` on the same questions, and the ends of its 95 % interval.

    Each has, for every image, how well its questions were answered: truth values, numbers, or a string of 0
    and 1, as in `row["right"].split()`. Raises ValueError where the questions are not the same.
    """
    if [len(answers) for answers in right_a] != [len(answers) for answers in right_b] or not right_a:
        raise ValueError("only rows with the same questions about the same images can be compared")
    pairs = zip(right_a, right_b, strict=True)
    sums = torch.tensor([[sum(map(float, a)) - sum(map(float, b)), len(a)] for a, b in pairs],
                        dtype=torch.float64)                                                # [P, 2]
    generator = torch.Generator().manual_seed(seed)
    totals = []
    for begin in range(0, resamples, RESAMPLES_AT_ONCE):
        many = min(RESAMPLES_AT_ONCE, resamples - begin)
        drawn = torch.randint(len(sums), (many, len(sums)), generator=generator)            # [many, P]
        totals.append(sums[drawn].sum(1))                                                   # [many, 2]
    difference, asked = torch.cat(totals).unbind(1)                                         # [resamples] each
    low, high = (difference / asked).quantile(torch.tensor(INTERVAL, dtype=torch.float64)).tolist()
    difference, asked = sums.sum(0).tolist()
    return difference / asked, low, high


def figures(settings: dict, exam: Exam, records: list[dict], gates: list[tuple[float, float]]) -> dict:
    """Everything that `--json` writes: first the figures of the full model, then a row for each pruner.

    `right` of a row has a word of 0 and 1 for each image, for `paired_bootstrap`.
    """
    score = full_score(exam, records)
    full = [record["rows"][0]["right"] for record in records]
    rows = []
    for i, (method, keep, options) in enumerate(settings["rows"]):
        answers = [record["rows"][i] for record in records]
        rows.append({"method": method, "keep": keep, "options": options, **row_figures(answers, full, exam)})
    made = {"model": settings["model"], "questions": settings["questions"], "split": settings["split"],
            "skipped_layer": settings["skip_layer"], "accuracy_by_kind": score.shares(list(KINDS)),
            "accuracy_by_ratio": score.shares(RATIOS), "mean_over_kinds": score.mean(),
            "accuracy": score.share("all"), "gates": gates, "settings": settings, "rows": rows}
    if records[0]["layer_similarity"] is not None:
        made["layer_similarity"] = mean_similarity([record["layer_similarity"] for record in records],
                                                   score.asked["all"])
    return made


def full_score(exam: Exam, records: list[dict]) -> Score:
    """Of the full model, which is the first row of every record."""
    return Score.of(exam, [record["rows"][0]["right"] for record in records])


def row_figures(answers: list[dict], full: list[list[bool]], exam: Exam) -> dict:
    """One row, from its part of every record; `full` says what the full model answered rightly."""
    right = [image["right"] for image in answers]
    score = Score.of(exam, right)
    kept = Score.of(exam, [image["kept"] for image in answers])
    early = Score.of(exam, [image["early"] for image in answers])
    asked = score.asked["all"]
    absent = sum(is_about_the_absent(question) for _, questions in exam for question in questions)
    wrong_yes = sum(sum(image["wrong_yes"]) for image in answers)
    steps = sum(image["steps"] for image in answers)
    _, low, high = paired_bootstrap(right, full)
    full_accuracy = Score.of(exam, full).share("all")
    return {"kept": kept.share("all"),
            "accuracy": score.share("all"),
            "low": full_accuracy + low,
            "high": full_accuracy + high,
            "accuracy_by_kind": score.shares(list(KINDS)),
            "kept_by_kind": kept.shares(list(KINDS)),
            "wrong_yes": wrong_yes / absent if absent else None,
            "early": early.share("all"),
            "image_kv_bytes": sum(image["image_kv_bytes"] for image in answers) / asked,
            "image_kv_stored": sum(image["image_kv_stored"] for image in answers) / asked,
            "prefill_ms": sum(image["prefill_ms"] for image in answers) / len(answers),
            "decode_ms": sum(image["decode_ms"] for image in answers) / max(1, steps),
            "right": " ".join("".join(str(int(answer)) for answer in image) for image in right)}


def mean_similarity(similarities: list[dict[str, list]], questions: int) -> dict[str, list[list[float]]]:
    """Matrices [C][C], the mean over the questions of what `layers.layer_similarity` summed."""
    means = {}
    for name in similarities[0]:
        sums = torch.tensor([similarity[name] for similarity in similarities], dtype=torch.float64)
        means[name] = (sums.sum(0) / questions).tolist()
    return means
