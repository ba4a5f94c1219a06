"""The tables of a benchmark as plain text, in lines that fit a terminal."""
from itertools import groupby

from benchmarks.parts import STATIC
from benchmarks.tables import HEAD, Table, all_tables, notes
from cli.terminal import fits, fitted, widths_of, wrapped

# How many of the first columns of a table tell what a line is about, by the first one's name; else one.
KEYS = {"part": 3, "kept": 2, "tiles": 3, "attention in": 3}
TILES_AND_BATCH = slice(1, 3)               # of the columns of the main table
SHORT = {STATIC: "static"}


def text(made: dict, columns: int | None = None) -> str:
    """Everything; `columns` are those of a terminal, None where lines may be as long as they are."""
    parts = [part for table in all_tables(made) for part in in_columns(table, columns)]
    lines = notes(made)
    if columns is not None:
        lines = [part for line in lines for part in wrapped(line, columns, "    ")]
    return "\n".join(parts + lines)


def in_columns(table: Table, columns: int | None) -> list[str]:
    """A table as text, or several that fit."""
    if fits(table, columns, gap=2):
        return [aligned(table, gap=2)]
    if table[0] != HEAD:
        return [aligned(part, gap=1) for part in fitted(table, columns, KEYS.get(table[0][0], 1), gap=1)]
    parts = []
    if any(STATIC in line for line in table):
        parts.append(f"{SHORT[STATIC]}: {STATIC}\n")
    for (tiles, batch), lines in groupby(table[1:], key=lambda line: line[TILES_AND_BATCH]):
        title = "" if tiles == "-" else f"tiles {tiles}, batch {batch}\n"
        group = [[SHORT.get(cell, cell) for cell in line[:1] + line[TILES_AND_BATCH.stop:]]
                 for line in [table[0], *lines]]
        parts += [title + aligned(part, gap=1) for part in fitted(group, columns, KEYS["part"], gap=1)]
    return parts


def aligned(table: Table, gap: int) -> str:
    """All columns to the left."""
    widths = widths_of(table)
    lines = [(" " * gap).join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True))
             for line in table]
    return "".join(line.rstrip() + "\n" for line in lines)
