"""Drawings for the Learn tab, as SVG that follows the colours of the page it stands in, light or dark.

    tiles_svg       the canvas as the model sees it: tiles with their numbers, padding hatched, unused slots
    tokens_svg      how many image tokens there are, from the slots to what each layer keeps
    flow_svg        the way from pixels to a decoded token, a box for each stage

They are as wide as there is room, down to the width of a telephone, and load nothing.
"""
import base64
import io
import textwrap
from collections.abc import Callable
from html import escape
from operator import attrgetter

from PIL import Image

from cli.terminal import size
from model.image_tokens import Grid
from page.stages import Cost, Stage

SIDE = 200              # of a tile, in units of the drawing
SLOT, GAP = 56, 10      # side of a slot without a tile, and what is between two of them
WIDTH = 360             # units of the other drawings, about as many pixels on a telephone
BOX, HIGH, DOWN = 164, 92, 116          # a box of the flow: its width and height, and from one to the next
LEFT, RIGHT = 6, 190                    # where the boxes of the image begin, and those of the text
ARROW = ('<marker id="learn-arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
         'orient="auto"><path d="M0 0 8 4 0 8z" fill="currentColor"/></marker>')
# An address with another end would load gradio's page again, and the visitor's answer would be gone.
SCROLL = "document.querySelector(this.getAttribute('href')).scrollIntoView(); return false"
HATCH = ('<pattern id="learn-hatch" width="16" height="16" patternUnits="userSpaceOnUse" '
         'patternTransform="rotate(45)"><rect width="16" height="16" fill="#000" fill-opacity=".45"/>'
         '<line x1="4" x2="4" y2="16" stroke="#fff" stroke-opacity=".75" stroke-width="3"/></pattern>')


def operations(count: float) -> str:
    """Floating-point operations as people read them: 3 digits and a unit."""
    if count == 0:
        return "none"
    for unit in "", "k", "M", "G", "T":
        if count < 999.5:
            return f"{count:.3g} {unit}FLOP"
        count /= 1000
    return f"{count:.3g} PFLOP"


# The figures of a stage, in words.
COUNT, SHAPE = attrgetter("count"), attrgetter("shape")


def byte_words(cost: Cost) -> str:
    return size(cost.bytes)


def flop_words(cost: Cost) -> str:
    return operations(cost.flops)


def svg(width: float, height: float, widest: int, label: str, content: str) -> str:
    """A drawing of so many units that is at most `widest` pixels wide."""
    return (f'<svg viewBox="0 0 {width:g} {height:g}" style="max-width:{widest}px" role="img" '
            f'aria-label="{escape(label)}">{content}</svg>')


def text(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"{more and " " + more}>{escape(words)}</text>'


def line(path: str) -> str:
    return f'<path d="{path}" class="way" marker-end="url(#learn-arrow)"/>'


# ----- tiles


def tiles_svg(pixels: Image.Image, grid: Grid, fitted: tuple[int, int], tile: int, patches: int, slots: int,
              grey: str) -> str:
    """The canvas of `grid` tiles, of which the image fills `fitted` (height, width) pixels; a tile has `tile`
    pixels and `patches` patches along its side. Slots without a tile are `grey`, as the model sees them."""
    rows, columns = grid
    width, height = columns * SIDE, rows * SIDE
    bottom, right = (length / tile * SIDE for length in fitted)
    parts = [f'<defs>{HATCH}</defs><image width="{width}" height="{height}" href="{data_url(pixels)}" '
             'style="image-rendering:pixelated"/>']
    if patches <= 16:                                       # finer lines would hide the image
        step = SIDE / patches
        lines = [f"M0 {i * step:g}H{width}" for i in range(1, rows * patches)]
        lines += [f"M{i * step:g} 0V{height}" for i in range(1, columns * patches)]
        parts.append(f'<path d="{"".join(lines)}" class="patches"/>')
    margins = (right, 0, width - right, height), (0, bottom, right, height - bottom)
    parts += [f'<rect class="padding" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" '
              'fill="url(#learn-hatch)"/>' for x, y, w, h in margins if w > 0 and h > 0]
    for number in range(rows * columns):
        y, x = (place * SIDE for place in divmod(number, columns))
        parts.append(f'<rect class="tile" x="{x}" y="{y}" width="{SIDE}" height="{SIDE}"/>'
                     + text(x + 10, y + 30, f"tile {number}", 'class="number"'))
    unused = slots - rows * columns
    for i in range(unused):
        x, y = i * (SLOT + GAP), height + 2 * GAP
        parts.append(f'<rect class="slot" x="{x}" y="{y}" width="{SLOT}" height="{SLOT}" fill="{grey}"/>'
                     + text(x + 8, y + 36, str(rows * columns + i), 'class="number"'))
    wide = max(width, unused * (SLOT + GAP))
    high = height + (3 * GAP + SLOT if unused else 0)
    return svg(wide, high, wide, f"canvas of {rows} x {columns} tiles", "".join(parts))


def data_url(image: Image.Image, kind: str = "png") -> str:
    """The image itself, as an address: nothing has to be stored or fetched."""
    data = io.BytesIO()
    image.save(data, kind)
    return f"data:image/{kind};base64," + base64.b64encode(data.getvalue()).decode()


# ----- token counts


def tokens_svg(counts: list[tuple[str, float]]) -> str:
    """A bar for each name and number of tokens; the longest is the largest number."""
    most = max(count for _, count in counts)
    parts = []
    for i, (name, count) in enumerate(counts):
        y = i * 24
        long = max(1.0, 180 * count / most)
        parts.append(text(0, y + 16, name) + f'<rect class="bar" x="120" y="{y + 4}" width="{long:g}" '
                     f'height="16"/>' + text(126 + long, y + 16, f"{round(count, 1):g}"))
    return svg(WIDTH, 24 * len(counts), 560, "image tokens at every stage", "".join(parts))


# ----- the flow


def flow_svg(stages: list[Stage], prompt_tokens: int) -> str:
    """The way of the image down the left, that of the text down the right. A box leads to its stage below."""
    model = next(iter(stages[0].full))
    *image, prefill, decoded = stages
    parts = [f"<defs>{ARROW}</defs>"]
    for row, stage in enumerate(image):
        parts.append(box(LEFT, row, row + 1, stage.name, lines_of(stage, model)))
        if row:
            parts.append(line(f"M{LEFT + BOX / 2:g} {row * DOWN - DOWN + HIGH}v{DOWN - HIGH - 2}"))
    below = len(image) - 2                      # prefill stands beside K/V, decoding beside the cache
    parts.append(question(below - 1, prompt_tokens))
    for row, number, stage in (below, len(stages) - 1, prefill), (below + 1, len(stages), decoded):
        middle = row * DOWN + HIGH / 2
        parts.append(box(RIGHT, row, number, stage.name, lines_of(stage, model), "words"))
        parts.append(line(f"M{RIGHT + BOX / 2:g} {row * DOWN - DOWN + HIGH}v{DOWN - HIGH - 2}"))
        parts.append(line(f"M{LEFT + BOX} {middle:g}h{RIGHT - LEFT - BOX - 2}"))
    end = (below + 1) * DOWN + HIGH
    parts.append(line(f"M{RIGHT + 40} {end}v14h84v-12") + text(RIGHT + 42, end + 30, "the next token"))
    return svg(WIDTH, end + 38, 560, "the way from pixels to a token", "".join(parts))


def question(row: int, prompt_tokens: int) -> str:
    """The box where the text begins; it is no stage."""
    y = row * DOWN + HIGH - 44
    return (f'<rect class="box words" x="{RIGHT}" y="{y}" width="{BOX}" height="44" rx="6"/>'
            + text(RIGHT + 10, y + 18, "question", 'class="name"')
            + text(RIGHT + 10, y + 35, f"{prompt_tokens} tokens, with template"))


def box(x: int, row: int, number: int, name: str, lines: list[str], kind: str = "image") -> str:
    """A stage: its name, on two lines if it is long, and what it makes and costs."""
    y = row * DOWN
    names = textwrap.wrap(f"{number} {name}", 24)
    words = [text(x + 10, y + 18 + 15 * i, part, 'class="name"') for i, part in enumerate(names)]
    words += [text(x + 10, y + 18 + 15 * (len(names) + i), part) for i, part in enumerate(lines)]
    return (f'<a href="#learn-stage-{number}" onclick="{SCROLL}"><rect class="box {kind}" x="{x}" y="{y}" '
            f'width="{BOX}" height="{HIGH}" rx="6"/>{"".join(words)}</a>')


def lines_of(stage: Stage, model: str) -> list[str]:
    """Tokens, bytes and operations of one model, from what they were to what pruning leaves."""
    return [change(stage, model, what) for what in (COUNT, byte_words, flop_words)
            if what is not flop_words or stage.full[model].flops]


def change(stage: Stage, model: str, what: Callable[[Cost], str]) -> str:
    """One figure of a stage; both where pruning changes it, with their unit once if it is the same."""
    before = what(stage.full[model])
    after = before if stage.pruned is None else what(stage.pruned[model])
    if before == after:
        return before
    number, _, unit = before.rpartition(" ")
    return f"{number if after.endswith(' ' + unit) else before} → {after}"
