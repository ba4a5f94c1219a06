"""For people: the figures of `benchmark.py --json` as tables, and benchmarks/README.md.

A line is one row of the JSON: milliseconds, or bytes in memory. `theirs / ours` above 1 is in our favour; `of
ceiling` is the share reached of the highest figure that was measured on this machine. Below a table are the
figures that belong to several of its lines. The page is made from the JSON files in results/ alone.
"""
from pathlib import Path

from benchmarks import paper
from cli.terminal import milliseconds, size
from weights.files import read_json, replacing

HEAD = ["part", "tiles", "batch", "method", "ours", "time or size", "theirs", "how", "theirs / ours",
        "of ceiling"]
MARKS = "<!-- made by `python benchmark.py --report` -->", "<!-- end -->"       # around the summary
SUMMARY = {"encode, 1 tile": ("encode", 1), "2 tiles": ("encode", 2), "4 tiles": ("encode", 4),
           "first token, 1 tile": ("first_token", 1), "decode": ("decode", 1),
           "decode, its best": ("decode", 1),
           "peak memory, 4 tiles": ("peak_memory", 4), "image KV, 1 tile": ("image_kv", 1)}

Table = list[list[str]]


def all_tables(made: dict) -> list[Table]:
    kinds = main_table, paper.table2, bars, costs, complete, masks, quantized
    tables = [kind(made) for kind in kinds]
    return [table for table in tables if len(table) > 1]


def main_table(made: dict) -> Table:
    return [HEAD, *(cells(row) for row in made["rows"])]


def cells(row: dict) -> list[str]:
    if row["ours_ms"] is None:
        show, mine, other = size, row["ours_bytes"], row["peer_bytes"]
    else:
        show, mine, other = milliseconds, row["ours_ms"], row["peer_ms"]
    peer = (row["peer"] or "-").removeprefix("transformers ").partition(", ")[2] or "-"
    method = row["method"] if row["pruner"] is None else f"{row['method']} {row['keep']:g}"
    return [row["component"], dash(row["tiles"]), dash(row["batch"]), method,
            row["ours"], dash(mine, show), dash(other, show), peer,
            dash(row["ratio"], "{:.2f}".format), dash(row["fraction_of_ceiling"], "{:.0%}".format)]


def bars(made: dict) -> Table:
    """The waterfall."""
    return [["decode, a token", "time", "times as fast as the line before"],
            *([bar["step"], milliseconds(bar["ms"]), dash(bar["gain"], "{:.2f}".format)]
              for bar in made["waterfall"])]


def costs(made: dict) -> Table:
    """What each method adds to prefill and to a decoded token, by its own work and in total, and what it
    stores and reads of the image."""
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


def complete(made: dict) -> Table:
    """What each method costs and saves in the complete model."""
    head = ["tiles", "image tokens", "method", "own work", "of encode and prefill", "keys and values saved",
            "peak memory of own work", "prefill", "first token", "decode, a token", "image KV"]
    lines = []
    for row in made.get("whole", []):           # files of before have none
        all_work = row["encode_ms"] + row["full_prefill_ms"]
        lines.append([str(row["tiles"]), row["features"], f"{row['method']} {row['keep']:g}",
                      milliseconds(row["own_ms"]), f"{row['own_ms'] / all_work:.2%}",
                      milliseconds(row["saved_ms"]), size(row["own_bytes"]),
                      milliseconds(row["prefill_ms"]), milliseconds(row["encode_ms"] + row["prefill_ms"]),
                      milliseconds(row["token_ms"]), size(row["image_kv_bytes"])])
    return [head, *lines]


def masks(made: dict) -> Table:
    """What attention costs with a mask and with a bias."""
    head = ["attention in", "query positions", "image tokens", "no mask", "mask", "bias", "bias / no mask"]
    return [head, *([row["dtype"], str(row["positions"]), str(row["tokens"]), milliseconds(row["none_ms"]),
                     milliseconds(row["mask_ms"]), milliseconds(row["bias_ms"]),
                     f"{row['bias_ms'] / row['none_ms']:.2f}"] for row in made.get("masks", []))]


def quantized(made: dict) -> Table:
    """What weights in fewer bits gain, beside the same way of decoding with weights in full."""
    head = ["weights", "batch", "method", "decode", "prefill", "times as fast", "decode, a token",
            "times as fast", "tokens/s", "of ceiling", "all weights", "read a token", "logits differ by"]
    rows = made.get("quantized", [])            # files of before have none
    full = {(row["how"], row["batch"], row["pruner"]): row for row in rows if row["weights"] == "in full"}
    names = short({row["pruner"] or "none" for row in rows})
    lines = []
    for row in rows:
        ours = full[row["how"], row["batch"], row["pruner"]]
        lines.append([row["weights"], str(row["batch"]), names[row["pruner"] or "none"], row["how"],
                      milliseconds(row["prefill_ms"]), f"{ours['prefill_ms'] / row['prefill_ms']:.2f}",
                      milliseconds(row["token_ms"]), f"{ours['token_ms'] / row['token_ms']:.2f}",
                      f"{row['tokens_per_second']:.3g}", f"{row['fraction_of_ceiling']:.0%}",
                      size(row["bytes"]), size(row["read_bytes"]), dash(row["difference"], "{:.1%}".format)])
    return [head, *lines]


def short(pruners: set[str]) -> dict[str, str]:
    """Methods without what stands behind a semicolon, where that tells them apart; the notes have it all."""
    names = {pruner: pruner.partition(";")[0] for pruner in pruners}
    return names if len(set(names.values())) == len(names) else dict(zip(pruners, pruners, strict=True))


def notes(made: dict) -> list[str]:
    """Lines of prose: ceilings, equality, and what several rows share."""
    most = made["ceilings"]
    dtype = most.get("matmul_dtype", "bf16")    # files of before do not say it
    lines = [f"ceilings, measured in the same run: copy {most['copy_bytes_per_s'] / 1e9:.1f} GB/s (read "
             f"and written), {dtype} product {most['matmul_flops'] / 1e9:.0f} GFLOP/s"]
    for equal in made["equal"]:
        lines.append(f"tiles {equal['tiles']}: logits differ from transformers' by at most "
                     f"{equal['max_difference']:.1e} (their standard deviation {equal['std']:.2g}), its two "
                     "deviations corrected")
    lines += paper.notes(made)
    lines += [compiled(each) for each in made.get("compiled", [])]
    for row in made["rows"]:
        where = f"tiles {row['tiles']}, batch {row['batch']}"
        if row["component"] == "prune":
            lines.append(f"{where}: the own work of {row['pruner']} is {row['share_of_prefill']:.2%} of the "
                         f"whole decoder's prefill ({milliseconds(row['whole_prefill_ms'])})")
        if row["component"] == "decode" and row["pruner"] is None:
            lines.append(f"{where}: decode, {row['ours']}, takes {row['ours_ms'] / row['linears_ms']:.2f} "
                         f"times as long as its linear layers alone ({milliseconds(row['linears_ms'])}, at "
                         f"{row['linears_fraction_of_copy']:.0%} of the copy's bytes a second)")
    lines = list(dict.fromkeys(lines))          # a row beside each of theirs says the same
    return lines + [f"{name}: the first call, which compiles, took {seconds:.1f} s"
                    for name, seconds in first_calls(made).items()]


def compiled(each: dict) -> str:
    """How compiled decoding compares with plain decoding, in one line."""
    of = f"{each['weights']}, " if "weights" in each else ""
    of += each["pruner"] or "the whole image"
    return (f"tiles {each['tiles']}, batch {each['batch']}, {of}: compiled "
            f"logits differ from the plain ones by at most {each['max_difference']:.1e} (their standard "
            f"deviation {each['std']:.2g}), {each['equal_tokens']} of {each['tokens']} tokens are the same, "
            f"{each['graphs']} graphs were made")


def first_calls(made: dict) -> dict[str, float]:
    """The longest first call of each in seconds: that is the one which had to compile."""
    longest: dict[str, float] = {}
    for row in made["rows"]:
        names = {"first_call_s": row["pruner"] or "the whole image", "peer_first_call_s": row["peer"]}
        for key, name in names.items():
            if key in row:
                longest[name] = max(longest.get(name, 0.0), row[key])
    return longest


def dash(value: object, show=str) -> str:
    return "-" if value is None else show(value)


# ----- benchmarks/README.md


def page(files: dict[str, dict]) -> str:
    """The page of all measurements, by the names of their files."""
    parts = ["# Measured\n",
             "Made from the JSON files in `results/` by `python benchmark.py --report`. Figures hold for the "
             "instruction set of their CPU: files that do not name it are from one with AVX512 and its "
             "instructions for bf16.\n"]
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
    what = ""
    if made["settings"]["preset"] == "table2":
        what = ": Table 2 of the paper" + ", put together" * bool(made.get("table2"))
    elif made["waterfall"]:
        what = ": waterfall"
    elif made["methods"]:
        what = ": methods"
    elif made.get("quantized"):
        what = ": weights in fewer bits"
    elif made.get("whole"):
        what = ": the complete model, put together"
    return f"{about['shape']}, {about['layers']} decoder layers, {about['dtype']}, {about['device']}{what}"


def words(key: str, value: object) -> str:
    if key == "gpu_memory_bytes":
        return size(value)
    return str(value) if key in ("cpu", "gpu", "instructions") else f"{value} {key}"


def markdown(table: Table) -> list[str]:
    head, *lines = ["| " + " | ".join(line) + " |" for line in table]
    return [head, "|" + "---|" * len(table[0]), *lines]


def read_files(folder: Path) -> dict[str, dict]:
    """The measurements in a folder. Raises ValueError for a file that is none."""
    files = {}
    for path in sorted(folder.glob("*.json")):
        made = read_json(path)
        try:
            page({path.name: made})
            summary({path.name: made})
        except (LookupError, TypeError, AttributeError, ArithmeticError, StopIteration):
            raise ValueError(f"{path.name}: not written by benchmark.py --json, or by another version of it; "
                             "move it out of this folder") from None
        files[path.name] = made
    return files


def summary(files: dict[str, dict]) -> Table:
    """For the project's README: theirs / ours of the main parts, a line for each file that has any."""
    lines = [["transformers / this", *SUMMARY]]
    for _, made in sorted(files.items()):
        ratios: dict[tuple[str, int], dict[tuple[str, str], float]] = {}
        for row in made["rows"]:
            if row["pruner"] is None and row["batch"] == 1 and row["ratio"] is not None:
                found = ratios.setdefault((row["component"], row["tiles"]), {})
                found[row["ours"], row["peer"]] = row["ratio"]
        if ratios:
            gpu = made["machine"].get("gpu")
            line = [title(made).rpartition(",")[0] + ("" if gpu is None else f", {gpu}")]
            for name, part in SUMMARY.items():
                ratio = best(ratios.get(part), own=name.endswith("best"))
                line.append(dash(ratio, "{:.2f}".format))
            lines.append(line)
    return lines


def best(ratios: dict[tuple[str, str], float] | None, own: bool) -> float | None:
    """Of our best decoding over transformers' eager one, or over its `own` best."""
    if ratios is None:
        return None
    most: dict[str, float] = {}                 # of each of theirs, beside our best
    for (_, peer), ratio in ratios.items():
        most[peer] = max(ratio, most.get(peer, 0.0))
    if own:
        return min(most.values())
    return next(ratio for peer, ratio in most.items() if peer.endswith(", eager"))


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
