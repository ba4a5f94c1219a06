"""Table 2 of arXiv 2504.00557 for people: how pruning changes the time of the first token, in per cent.

Changes against the unpruned decoder stand beside each other: the paper's measurement, its formula of
operations (Appendix A.3), this model's operations (`LlamaVision.decoder_flops`), what was measured here, and
in a slice the processor's time, of all threads together. The paper measured its own method; others at the
same share stand beside those figures too.
"""
from cli.terminal import milliseconds

SETTINGS = {"batch": [1, 4, 8, 16, 32], "tiles": [4]}
METHODS, SHARES = "trimmed_llama,coreset", "0.509,0.396"          # beside random
# By the share of image tokens that is kept, and batch.
MEASURED = {0.509: {1: -4.1, 4: -7.1, 8: -12.1, 16: -14.2, 32: -19.7},
            0.396: {1: -4.3, 4: -11.4, 8: -14.0, 16: -18.3, 32: -26.0}}
HEAD = ["kept", "batch", "first token", "own work", "paper", "paper's formula", "operations", "measured",
        "processor", "rounds"]


def table2(made: dict) -> list[list[str]]:
    """A line for each method and batch, also of files that hold none: then only the names of the columns."""
    lines = made.get("table2") or of_rows(made)         # files of before have none
    full = {line["batch"]: line for line in lines if line["method"] == "none"}
    return [HEAD, *(cells(line, full[line["batch"]]) for line in lines)]


def of_rows(made: dict) -> list[dict]:
    """The same of a complete model, which was measured as it is: without compiling, which prefill ignores."""
    if made["settings"]["preset"] is None:
        return []
    counted = {(each["method"], each["keep"], each["tiles"]): each for each in made.get("operations", [])}
    own = {(row["pruner"], row["batch"], row["tiles"]): row["ours_ms"]
           for row in made["rows"] if row["component"] == "prune"}
    lines = {}
    for row in made["rows"]:
        if row["component"] == "prefill" and row["ours"] == "eager":
            which = row["pruner"], row["batch"], row["tiles"]
            lines[which] = {**row, "ms": row["ours_ms"], "own_ms": own.get(which, 0.0),
                            "rounds": made["settings"]["repeat"],
                            **counted.get((row["method"], row["keep"], row["tiles"]), {})}
    return list(lines.values())


def cells(line: dict, full: dict) -> list[str]:
    pruned = line["method"] != "none"
    paper = MEASURED.get(line["keep"], {}).get(line["batch"])
    return [f"{line['method']} {line['keep']:g}" if pruned else "all", str(line["batch"]),
            milliseconds(line["ms"]), milliseconds(line["own_ms"]) if pruned else "-", change(paper),
            change(-100 * line["formula_saves"] if pruned else None),
            change(100 * (line["operations"] / full["operations"] - 1) if pruned else None),
            change(100 * (line["ms"] / full["ms"] - 1) if pruned else None),
            change(100 * (line["cpu_ms"] / full["cpu_ms"] - 1) if pruned and "cpu_ms" in line else None),
            str(line["rounds"])]


def change(percent: float | None) -> str:
    return "-" if percent is None else f"{percent:+.1f} %"


def notes(made: dict) -> list[str]:
    """What a line of the table does not say."""
    lines = []
    if made.get("seconds"):
        before, after = made["load"]
        load = "" if before is None else f"; the machine's load was {before:.1f} before and {after:.1f} after"
        lines.append("put together from the pieces of a slice (how: `benchmarks/table2.py`), all measured in "
                     f"{made['seconds'] / 60:.1f} minutes{load}")
    for line in made.get("table2", []):
        if "through_ms" in line:
            lines.append(f"batch {line['batch']}, all: put together {milliseconds(line['ms'])}; run once "
                         "through a decoder of full depth, made of the slice's layers again and again, "
                         f"{milliseconds(line['through_ms'])}")
    return lines
