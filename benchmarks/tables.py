"""For people: the figures of `benchmark.py --json` as a text table, a drawing, and benchmarks/README.md.

A line is one row of the JSON: milliseconds, or bytes held in memory. `theirs / ours` above 1 is in our
favour; `of ceiling` is the share reached of the most that was measured on this machine. Below a table stand
the figures that belong to several of its lines. The page is made of the JSON files beside it alone.
"""
import json
from pathlib import Path

from cli import size
from weights.files import replacing

HEAD = ("part", "tiles", "batch", "method", "ours", "time or size", "theirs", "how", "theirs / ours",
        "of ceiling")
PAPER = {0.509: {1: -4.1, 4: -7.1, 8: -12.1, 16: -14.2, 32: -19.7},     # per cent of the first token's time:
         0.396: {1: -4.3, 4: -11.4, 8: -14.0, 16: -18.3, 32: -26.0}}    # Table 2 of arXiv 2504.00557

MARKS = "<!-- made by `python benchmark.py --report` -->", "<!-- end -->"       # around the summary

Table = list[list[str]]


def text(made: dict) -> str:
    """Everything, as aligned plain text."""
    return "\n".join(["\n".join(aligned(table)) + "\n" for table in all_tables(made)] + notes(made))


def all_tables(made: dict) -> list[Table]:
    return [table for table in (main_table(made), table2(made), bars(made), costs(made)) if len(table) > 1]


def main_table(made: dict) -> Table:
    return [list(HEAD), *(cells(row) for row in made["rows"])]


def cells(row: dict) -> list[str]:
    memory = row["ours_ms"] is None
    mine, other = ((row["ours_bytes"], row["peer_bytes"]) if memory else (row["ours_ms"], row["peer_ms"]))
    show = size if memory else milliseconds
    peer = (row["peer"] or "-").removeprefix("transformers ").partition(", ")[2] or "-"
    method = row["method"] if row["pruner"] is None else f"{row['method']} {row['keep']:g}"
    return [row["component"], dash(row["tiles"]), dash(row["batch"]), method,
            row["ours"], dash(mine, show), dash(other, show), peer,
            dash(row["ratio"], "{:.2f}".format), dash(row["fraction_of_ceiling"], "{:.0%}".format)]


def table2(made: dict) -> Table:
    """The preset: the decoder's first token at each kept share, beside the paper's percentages."""
    head = ["kept", "batch", "first token", "against all", "paper", "decode, a token", "tokens/s", "image KV"]
    if made["settings"]["preset"] is None:
        return [head]
    of = {(row["component"], row["pruner"], row["batch"], row["ours"], row["tiles"]): row
          for row in made["rows"]}
    lines = []
    for (part, pruner, batch, how, tiles), row in of.items():
        if part == "prefill" and how == "eager":
            whole = of[part, None, batch, how, tiles]["ours_ms"]
            decode = min((r for (p, name, b, _, t), r in of.items() if (p, name, b, t) ==
                          ("decode", pruner, batch, tiles)), key=lambda row: row["ours_ms"])
            paper = PAPER.get(row["keep"], {}).get(batch) if row["method"] == "random" else None
            lines.append(["all" if pruner is None else f"{row['method']} {row['keep']:g}", str(batch),
                          milliseconds(row["ours_ms"]), f"{100 * (row['ours_ms'] / whole - 1):+.1f} %",
                          dash(paper, "{:+.1f} %".format), milliseconds(decode["ours_ms"]),
                          f"{decode['tokens_per_second']:.3g}",
                          size(of["image_kv", pruner, batch, how, tiles]["ours_bytes"])])
    return [head, *lines]


def bars(made: dict) -> Table:
    """The waterfall."""
    return [["decode, a token", "time", "times as fast as the line before"],
            *([bar["step"], milliseconds(bar["ms"]), dash(bar["gain"], "{:.2f}".format)]
              for bar in made["waterfall"])]


def costs(made: dict) -> Table:
    """What each method adds to prefill and to a decoded token, by its own work and all in all, and what it
    holds and reads of the image."""
    head = ["method", "own work in prefill", "a token", "prefill", "more than all", "decode, a token",
            "more than all", "image KV stored", "read a token"]
    lines = []
    for row in made["methods"]:
        line = [f"{row['method']} {row['keep']:g}", milliseconds(row["own_prefill_ms"]),
                milliseconds(row["own_token_ms"])]
        for name in "prefill_ms", "token_ms":
            line += [milliseconds(row[name]), milliseconds(row[name] - made["methods"][0][name], "+")]
        lines.append([*line, size(row["stored_bytes"]), size(row["read_bytes"])])
    return [head, *lines]


def notes(made: dict) -> list[str]:
    """Lines of prose: ceilings, equality, and what several rows share."""
    most, lines = made["ceilings"], []
    lines.append(f"ceilings, measured in the same run: copy {most['copy_bytes_per_s'] / 1e9:.1f} GB/s (read "
                 f"and written), bf16 product {most['matmul_flops'] / 1e9:.0f} GFLOP/s")
    for equal in made["equal"]:
        lines.append(f"tiles {equal['tiles']}: logits differ from transformers' by at most "
                     f"{equal['max_difference']:.1e} (their standard deviation {equal['std']:.2g}), its two "
                     "deviations corrected")
    for row in made["rows"]:
        where = f"tiles {row['tiles']}, batch {row['batch']}"
        if row["component"] == "prune":
            lines.append(f"{where}: the own work of {row['pruner']} is {row['share_of_prefill']:.2%} of the "
                         f"whole decoder's prefill ({milliseconds(row['whole_prefill_ms'])})")
        if row["component"] == "decode" and row["pruner"] is None:
            lines.append(f"{where}: decode, {row['ours']}, takes {row['ours_ms'] / row['linears_ms']:.2f} "
                         f"times as long as its linear layers alone ({milliseconds(row['linears_ms'])}, at "
                         f"{row['linears_fraction_of_copy']:.0%} of the copy's bytes a second)")
    first = {}                                          # by far the longest where it had to compile
    for row in made["rows"]:
        names = {"first_call_s": row["pruner"] or "the whole image", "peer_first_call_s": row["peer"]}
        for key, name in names.items():
            if key in row:
                first[name] = max(first.get(name, 0.0), row[key])
    lines += [f"{name}: the first call, which compiles, took {seconds:.1f} s"
              for name, seconds in first.items()]
    return list(dict.fromkeys(lines))                   # a row beside each of theirs says the same


def aligned(table: Table) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table]


def dash(value: object, show=str) -> str:
    return "-" if value is None else show(value)


def milliseconds(ms: float, sign: str = "") -> str:
    return f"{ms:{sign}.3g} ms" if abs(ms) < 1000 else f"{ms:{sign}.0f} ms"


# ----- benchmarks/README.md


def page(files: dict[str, dict]) -> str:
    """The page of all measurements, by the names of their files."""
    parts = ["# Measured\n", "Made from the JSON files in `results/` by `python benchmark.py --report`.\n"]
    if not files:
        parts.append("Nothing has been measured yet.\n")
    for name, made in sorted(files.items()):
        machine = ", ".join(words(key, value) for key, value in made["machine"].items())
        versions = ", ".join(f"{key} {value}" for key, value in made["versions"].items() if value)
        parts += [f"## {title(made)}\n", f"[{name}](results/{name}): {machine}; {versions}\n",
                  f"```bash\n{made['command']}\n```\n"]
        parts += ["\n".join(markdown(table)) + "\n" for table in all_tables(made)]
        parts.append("\n".join(f"- {note}" for note in notes(made)) + "\n")
    return "\n".join(parts)


def title(made: dict) -> str:
    about = made["rows"][0] if made["rows"] else made["about"]
    what = {"table2": ": Table 2 of the paper"}.get(made["settings"]["preset"], "")
    return (f"{about['shape']}, {about['layers']} decoder layers, {about['dtype']}, {about['device']}"
            + (what or ": waterfall" * bool(made["waterfall"]) or ": methods" * bool(made["methods"])))


def words(key: str, value: object) -> str:
    if key == "gpu_memory_bytes":
        return size(value)
    return str(value) if key in ("cpu", "gpu") else f"{value} {key}"


def markdown(table: Table) -> list[str]:
    head, *lines = ["| " + " | ".join(line) + " |" for line in table]
    return [head, "|" + "---|" * len(table[0]), *lines]


def read_files(folder: Path) -> dict[str, dict]:
    """The measurements in a folder. Raises ValueError for a file that is none."""
    files = {}
    for path in sorted(folder.glob("*.json")):
        try:
            made = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path.name}: not readable as JSON ({error})") from None
        if not isinstance(made, dict) or not {"rows", "ceilings", "waterfall"} <= made.keys():
            raise ValueError(f"{path.name}: not written by benchmark.py --json; move it out of this folder")
        files[path.name] = made
    return files


def summary(files: dict[str, dict]) -> Table:
    """For the first README: how many times as much transformers takes, a line for each file that says so."""
    parts = {"encode, 1 tile": ("encode", 1), "2 tiles": ("encode", 2), "4 tiles": ("encode", 4),
             "first token, 1 tile": ("first_token", 1), "decode": ("decode", 1),
             "decode, its best": ("decode", 1), "peak memory, 4 tiles": ("peak_memory", 4),
             "image KV, 1 tile": ("image_kv", 1)}
    lines = [["transformers / this", *parts]]
    for _, made in sorted(files.items()):
        ratios = {}
        for row in made["rows"]:
            if row["pruner"] is None and row["batch"] == 1 and row["ratio"] is not None:
                found = ratios.setdefault((row["component"], row["tiles"]), {})
                found[row["ours"], row["peer"]] = row["ratio"]
        if ratios:
            lines.append([title(made).rpartition(",")[0], *(
                dash(best(ratios.get(coords), own=name.endswith("best")), "{:.2f}".format)
                for name, coords in parts.items())])
    return lines


def best(ratios: dict[tuple[str, str], float] | None, own: bool) -> float | None:
    """Of our best decoding over transformers' eager one, or over its `own` best."""
    if ratios is None:
        return None
    most: dict[str, float] = {}                         # of each of theirs, beside our best
    for (_, peer), ratio in ratios.items():
        most[peer] = max(ratio, most.get(peer, 0.0))
    return min(most.values()) if own else next(v for peer, v in most.items() if peer.endswith(", eager"))


def write_pages(folder: Path, page_path: Path, readme: Path):
    """Write the page of all measurements in a folder, and put their summary into the project's README."""
    files = read_files(folder)
    summarised = with_summary(readme.read_text(encoding="utf-8"), files)
    write_text(page_path, page(files))
    write_text(readme, summarised)


def write_text(path: Path, words: str):
    with replacing(path) as partial:
        partial.write_text(words, encoding="utf-8")


def with_summary(readme: str, files: dict[str, dict]) -> str:
    """A page with the summary between its two marks. Raises ValueError where these are not there."""
    before, opened, rest = readme.partition(MARKS[0])
    _, closed, after = rest.partition(MARKS[1])
    if not (opened and closed):
        raise ValueError(f"README.md: no place for the summary between {MARKS[0]} and {MARKS[1]}")
    return "\n".join([before + opened, "", *markdown(summary(files)), "", closed + after])


# ----- a drawing


def plot(made: dict, path: Path):
    """The waterfall; or the preset beside the paper; or every part's time, ours and theirs."""
    # Here, for nothing else needs it; and not pyplot, which opens windows and holds every figure.
    from matplotlib.figure import Figure
    table = table2(made)
    labels, series, axis = drawn(made)
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(labels) * max(1, len(series) - 1)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        coords_of = [line + i * height for line in range(len(labels))]
        drawn_bars = axes.barh(coords_of, values, height, label=name, color=("#0072b2", "#d55e00")[i % 2])
        axes.bar_label(drawn_bars, [f"{value:.3g}" for value in values], padding=3, fontsize="small")
    axes.set_yticks([line + 0.4 - height / 2 for line in range(len(labels))], labels)
    axes.invert_yaxis()
    axes.set_xlabel(axis)
    if not made["waterfall"] and len(table) == 1:
        axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_title(title(made), fontsize="medium")
    if len(series) > 1:
        figure.legend(loc="outside upper right", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def drawn(made: dict) -> tuple[list[str], dict[str, list[float]], str]:
    """Labels of the bars, the values of each series (NaN: none), and what the axis says."""
    nan = float("nan")
    if made["waterfall"]:
        return ([bar["step"] for bar in made["waterfall"]],
                {"ours": [bar["ms"] for bar in made["waterfall"]]}, "milliseconds a decoded token")
    if len(lines := table2(made)[1:]):
        kept = [line for line in lines if line[0] != "all"]
        series = {name: [nan if line[i] == "-" else float(line[i].split()[0]) for line in kept]
                  for name, i in (("measured", 3), ("paper", 4))}
        return [f"{line[0]}, batch {line[1]}" for line in kept], series, "per cent of the first token's time"
    rows = [row for row in made["rows"] if row["ours_ms"] is not None]
    labels = [", ".join(cell for cell in (*cells(row)[:5], cells(row)[7]) if cell != "-") for row in rows]
    series = {name: [nan if row[key] is None else row[key] for row in rows]
              for name, key in (("ours", "ours_ms"), ("transformers", "peer_ms"))}
    return labels, series, "milliseconds"
