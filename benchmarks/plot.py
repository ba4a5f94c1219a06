"""Draws the figures of `benchmark.py --json`: the waterfall; or Table 2 beside the paper; or all times."""
from pathlib import Path

from benchmarks.paper import table2
from benchmarks.tables import cells, title

COLOURS = "#0072b2", "#d55e00"
NONE = float("nan")


def plot(made: dict, path: Path):
    """Draw into a file: .png, .svg or .pdf."""
    # Imported here: nothing else needs it. Not pyplot, which opens windows and keeps every figure.
    from matplotlib.figure import Figure
    labels, series, unit = bars(made)
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(labels) * max(1, len(series) - 1)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        places = [line + i * height for line in range(len(labels))]
        drawn = axes.barh(places, values, height, label=name, color=COLOURS[i % 2])
        axes.bar_label(drawn, [f"{value:.3g}" for value in values], padding=3, fontsize="small")
    axes.set_yticks([line + 0.4 - height / 2 for line in range(len(labels))], labels)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    if unit == "milliseconds":
        axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_title(title(made), fontsize="medium")
    if len(series) > 1:
        figure.legend(loc="outside upper right", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def bars(made: dict) -> tuple[list[str], dict[str, list[float]], str]:
    """Labels of the bars, the values of each series (NaN: none), and their unit."""
    if made["waterfall"]:
        steps = [bar["step"] for bar in made["waterfall"]]
        return steps, {"ours": [bar["ms"] for bar in made["waterfall"]]}, "milliseconds a decoded token"
    kept = [line for line in table2(made)[1:] if line[0] != "all"]
    if kept:
        labels = [f"{line[0]}, batch {line[1]}" for line in kept]
        series = {"measured": [number(line[7]) for line in kept], "paper": [number(line[4]) for line in kept]}
        return labels, series, "per cent of the first token's time"
    rows = [row for row in made["rows"] if row["ours_ms"] is not None]
    labels = []
    for row in rows:
        line = cells(row)
        labels.append(", ".join(cell for cell in (*line[:5], line[7]) if cell != "-"))
    series = {"ours": [row["ours_ms"] for row in rows],
              "transformers": [NONE if row["peer_ms"] is None else row["peer_ms"] for row in rows]}
    return labels, series, "milliseconds"


def number(cell: str) -> float:
    """Of "-4.1 %"; NaN of "-"."""
    return NONE if cell == "-" else float(cell.split()[0])
