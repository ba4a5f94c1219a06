"""The figures of an evaluation for people: a summary, a table and a curve."""
import importlib.util
from pathlib import Path
from typing import Any

from cli.options import check_output, labelled
from cli.terminal import fitted, milliseconds, size, took, wrapped
from evaluation.scoring import Score
from scenes.draw import RATIOS
from scenes.questions import KINDS

SUFFIXES = ".png", ".svg", ".pdf"
MARKERS = "o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p"
LINES = "-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))
COLOURS = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000"  # of Okabe and Ito
ACCURACIES = 20, 40, 60, 70, 80, 85, 90, 92, 94, 96, 97, 98, 99, 99.5       # ticks, in per cent
KEPT = 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0                          # ticks
# A logarithmic axis has no place for 0: what is smaller is drawn here.
LEAST_WRONG = 0.25                  # per cent
LEAST_KEPT = 0.001


def summary(score: Score, gates: list[tuple[float, float]], split: str = "test",
            columns: int | None = None) -> str:
    """The full model: right answers by kind and by tile ratio, and its gates; in so many columns."""
    kinds = [kind for kind in KINDS if score.asked[kind]]
    lines = [f"{kind:10} {score.share(kind):6.1%} of {score.asked[kind]}" for kind in kinds]
    ratios = [f"{down}x{across} {score.share((down, across)):.1%}" for down, across in RATIOS
              if score.asked[down, across]]
    lines.append(f"{'mean':10} {score.mean():6.1%} over kinds, {score.share('all'):.1%} of all "
                 f"{score.asked['all']}{about(split)}")
    lines.append("tiles      " + ", ".join(ratios))
    lines.append("gates      " + ", ".join(f"{attention:.2f}/{mlp:.2f}" for attention, mlp in gates))
    return in_columns(lines, columns, " " * 11)


def in_columns(lines: list[str], columns: int | None, indent: str = "") -> str:
    """Lines of text as one, those that are too long broken between words."""
    if columns is not None:
        lines = [part for line in lines
                 for part in ([line] if len(line) <= columns else wrapped(line, columns, indent))]
    return "\n".join(lines)


def about(split: str) -> str:
    """What scenes the questions are about, where they are not the usual ones."""
    return "" if split == "test" else f" about {split} scenes"


def table(made: dict, columns: int | None = None) -> str:
    """The rows as aligned text; below them the options that labels do not tell, and how alike the layers are.

    Shares in per cent, image KV read for one question, milliseconds of prefill and of one decode step. With
    `columns`, of a terminal, it is as many tables as it takes to fit.
    """
    short = [kind if len(kind) < 6 else kind[:4] + "." for kind in KINDS]
    lines = [["method", "keep", "kept", "accuracy", "wrong yes", "image KV", "prefill", "decode", *short]]
    labels = labelled([(row["method"], row["options"]) for row in made["rows"]])
    for (label, _), row in zip(labels, made["rows"], strict=True):
        band = f"{percent(row['accuracy'])} [{percent(row['low'])}, {percent(row['high'])}]"
        lines.append([label, str(row["keep"]), percent(row["kept"]) + "%", band,
                      percent(row["wrong_yes"]), size(row["image_kv_bytes"]),
                      *(milliseconds(ms) if ms < 999.5 else took(ms)
                        for ms in (row["prefill_ms"], row["decode_ms"])),
                      *(percent(row["accuracy_by_kind"][kind]) for kind in KINDS)])
    rows = blocks(lines, columns, repeated=2)
    text = []
    common = {row["method"]: options for (_, options), row in zip(labels, made["rows"], strict=True)}
    for method, chosen in common.items():
        if chosen:
            text.append(f"{method}: " + ", ".join(f"{option} {value}" for option, value in chosen.items()))
    if scenes := about(made.get("split", "test")):
        text.append(f"{made['questions']} questions{scenes}")
    cosine = mean_of_pairs(made["layer_similarity"]["cosine"])
    overlap = mean_of_pairs(made["layer_similarity"]["top10_overlap"])
    if cosine is not None:
        text.append(f"attention maps of two layers, full model: cosine {cosine:.2f}, "
                    f"{overlap:.0%} of the top 10 % of tokens shared")
    return "\n".join([*rows, in_columns(text, columns)]).rstrip("\n")


def blocks(lines: list[list[str]], columns: int | None, repeated: int) -> list[str]:
    """The lines of a table; one that is too wide goes on below an empty line, with its first columns."""
    first, *others = [aligned(part) for part in fitted(lines, columns, repeated, gap=1)]
    return first + [line for part in others for line in ["", *part]]


def aligned(lines: list[list[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    text = []
    for first, *others in lines:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        text.append(" ".join([f"{first:{widths[0]}}", *cells]))
    return text


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def mean_of_pairs(matrix: list[list[float]]) -> float | None:
    """Over all pairs of different layers; None where there is one layer."""
    values = [value for i, line in enumerate(matrix) for value in line[:i]]
    return sum(values) / len(values) if values else None


def check_plot(path: Path):
    """Raise ValueError where `plot` would fail, before an hour of questions."""
    check_output("--plot", path, SUFFIXES)
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install -e '.[eval]'")


def plot(made: dict, path: Path):
    """Draw accuracy against the share of tokens kept: a line for each label, and the full model across.

    It can be read without colours. Both axes are logarithmic, in tokens kept and in wrong answers: most of
    what there is to see lies below 10 % of the tokens and between 2 and 20 % of wrong answers.
    """
    from matplotlib.figure import Figure  # pyplot would open windows and keep every figure
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    full, *rows = made["rows"]
    axes.axhline(wrong(full["accuracy"]), color="0.3", linewidth=1, label="full model")
    labels = labelled([(row["method"], row["options"]) for row in rows])
    for i, (label, common) in enumerate(dict(labels).items()):
        points = [row for (name, _), row in zip(labels, rows, strict=True) if name == label]
        draw_method(axes, i, label, common, points)
    draw_axes(axes, least=min([0.5, *(max(LEAST_KEPT, row["kept"]) for row in rows)]))
    # Names are text, also with two dollar signs, between which matplotlib would look for a formula.
    title = f"{made['model']}, {made['questions']} questions{about(made.get('split', 'test'))}"
    axes.set_title(title, fontsize="medium", parse_math=False)
    legend = figure.legend(loc="outside right upper", frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.savefig(path, dpi=150)


def draw_method(axes: Any, i: int, label: str, options: dict, rows: list[dict]):
    """The i-th method with these options: a line with its band."""
    points = []
    for row in rows:
        kept = max(LEAST_KEPT, row["kept"])
        points.append((kept, wrong(row["accuracy"]), wrong(row["low"]), wrong(row["high"])))
    x, y, low, high = zip(*sorted(points), strict=True)
    legend = "\n".join([label, *(f"  {option} {value}" for option, value in options.items())])
    colour = COLOURS[i % len(COLOURS)]
    axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.vlines(x, low, high, color=colour, alpha=0.5, linewidth=1)         # the band of one point is empty
    axes.plot(x, y, color=colour, marker=MARKERS[i % len(MARKERS)], linestyle=LINES[i % len(LINES)],
              markersize=5, linewidth=1.4, label=legend)


def draw_axes(axes: Any, least: float):
    """`least` is the smallest share of tokens kept."""
    left = least * 0.85
    axes.set_xscale("log", base=2)
    axes.set_xlim(left, 1.1)
    axes.set_xticks([tick for tick in KEPT if tick >= left])
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    axes.set_yscale("log")
    axes.invert_yaxis()
    bottom, top = axes.get_ylim()
    axes.set_yticks([100 - tick for tick in ACCURACIES if top <= 100 - tick <= bottom])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda percent, _: f"{100 - percent:g} %")
    axes.set_xlabel("image tokens kept, mean over layers and questions")
    axes.set_ylabel("accuracy, with 95 % band against the full model")
    axes.grid(color="0.9")
    axes.set_axisbelow(True)


def wrong(accuracy: float) -> float:
    """Per cent of wrong answers, as it is drawn."""
    return max(LEAST_WRONG, 100 * (1 - accuracy))
