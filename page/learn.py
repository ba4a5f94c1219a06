"""The Learn tab: the way of the very image that was asked about, from pixels to a token, and what it costs.

    Asked ─► canvas_of ─┐
             stages ────┴─► learn_html ─► one piece of HTML that loads nothing

First the canvas that was chosen among those possible, and why; then the tiles as the model sees them, the
tokens at every stage, the flow, and for each stage its costs at this checkpoint and at 11B, and its source.
"""
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import torch
from PIL import Image

from model.image_tokens import Grid, ImageKV, ImageTokens, Queries, Tiles
from page.answers import refusal_html, said_of
from page.desk import Asked, Desk
from page.drawing import (
    COUNT,
    SHAPE,
    byte_words,
    change,
    flop_words,
    flow_svg,
    operations,
    tiles_svg,
    tokens_svg,
)
from page.stages import Place, Reads, Stage, place, stages
from pruning import Pruner, Wrapper, hooks
from pruning.view import canvas
from weights.images import ImageProcessor, canvas_scales, choose_canvas, fit
from weights.shapes import ELEVEN
from weights.tokenizer import messages

if TYPE_CHECKING:
    import gradio as gr

NOT_YET = "<p>Ask a question in the first tab: then this page follows its image through the model.</p>"
AFTER = "After an arrow: pruned with"
OWN_WORK = "The method's own work is not counted."
EARLY = "A smaller model gave the pruned answer, so nothing was pruned here."
CHOSEN = '<tr class="chosen">'
STYLE = """<style>
.learn {line-height: 1.45; max-width: 900px}
.learn svg {display: block; width: 100%; height: auto; margin: 8px 0; color: inherit}
.learn svg text {font-size: 12px; fill: currentColor}
.learn svg .name {font-weight: 600}
.learn svg .number {font-size: 22px; font-weight: 700; fill: #fff; stroke: #000; stroke-width: 4px;
                    paint-order: stroke}
.learn svg .tile {fill: none; stroke: #2f7fd6; stroke-width: 3px}
.learn svg .slot {stroke: currentColor; stroke-dasharray: 6 4}
.learn svg .patches {fill: none; stroke: #fff; stroke-opacity: .35; stroke-width: 1px}
.learn svg .bar {fill: #2f7fd6}
.learn svg .box {fill: #2f7fd6; fill-opacity: .1; stroke: #2f7fd6; stroke-width: 1.5px}
.learn svg .words {fill: #d97706; stroke: #d97706}
.learn svg .way {fill: none; stroke: currentColor; stroke-width: 1.5px}
.learn .wide {overflow-x: auto}
.learn svg a {text-decoration: none !important}
.learn table {border-collapse: collapse; margin: 6px 0; font-size: 13px}
.learn table td, .learn table th {text-align: left; padding: 3px 6px !important;
                                  border: 1px solid #8886 !important}
.learn tr.chosen {font-weight: 700; background: #2f7fd633}
.learn section {border-top: 1px solid #8886; padding-top: 10px; margin-top: 14px}
.learn pre {overflow-x: auto; line-height: 1.35; padding: 8px; border: 1px solid #8886;
            background: transparent; color: inherit}
.learn summary {cursor: pointer}
.learn code {background: transparent; color: inherit; padding: 0; font-size: 12px}
</style>"""


@dataclass(frozen=True)
class Candidate:
    """A canvas that an image could be put on, and what speaks for it or against it."""
    grid: Grid
    scale: float                                # of the image, if it filled this canvas
    verdict: str
    chosen: bool


@dataclass(frozen=True)
class Canvas:
    """The canvas of one image; sizes are (height, width) in pixels."""
    image: tuple[int, int]
    fitted: tuple[int, int]                     # that the image has in the canvas
    grid: Grid
    tile: int                                   # its side
    slots: int                                  # tiles that the model has room for
    candidates: list[Candidate]
    pixels: Image.Image                         # as the encoder reads them
    grey: str                                   # the colour of a slot without a tile


def candidates(height: int, width: int, tile: int, ratios: tuple[Grid, ...]) -> list[Candidate]:
    """All canvases for an image of this size in pixels, in the order of the model, and the one chosen."""
    scales = canvas_scales(height, width, tile, ratios)
    chosen = choose_canvas(height, width, tile, ratios)
    found = []
    for grid, scale in scales.items():
        if grid == chosen:
            verdict = "chosen: " + ("all shrink the image, this one least" if scale < 1 else
                                    "it enlarges the image least" if scale > 1 else "the image fits as it is")
        elif scale == scales[chosen]:
            fewer = grid[0] * grid[1] > chosen[0] * chosen[1]
            verdict = "as large, with more tiles" if fewer else "as large, with as many tiles, but later"
        elif scale < 1:
            verdict = "shrinks the image" + (" more" if scales[chosen] < 1 else "")
        else:
            verdict = "enlarges the image more"
        found.append(Candidate(grid, scale, verdict, grid == chosen))
    return found


def canvas_of(image: Image.Image, processor: ImageProcessor, tiles: Tiles | None = None) -> Canvas:
    """The canvas of an RGB image. `tiles` are those that the processor makes of it, if they are there."""
    tiles = processor([image]) if tiles is None else tiles
    pixels = canvas(tiles, 0, processor)                                            # [H, W, 3]
    data = bytearray(pixels.numel())
    torch.frombuffer(data, dtype=torch.uint8).copy_(pixels.to(torch.uint8).flatten())
    grid = processor.grid(image)
    # A slot without a tile holds zeros after normalising.
    grey = processor.image_mean if processor.do_normalize else (0.0, 0.0, 0.0)
    scale = processor.rescale_factor if processor.do_rescale else 1.0
    colour = ", ".join(str(min(255, max(0, round(value / scale)))) for value in grey)
    return Canvas((image.height, image.width), fit(image.height, image.width, grid, processor.tile_size),
                  grid, processor.tile_size, processor.max_tiles,
                  candidates(image.height, image.width, processor.tile_size, processor.canvases),
                  Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), bytes(data)),
                  f"rgb({colour})")


# ----- HTML


def learn_html(found: Canvas, made: list[Stage], slots: int, real: int, prompt_tokens: int,
               patches: int, reads: Reads | None = None, remark: str = "") -> str:
    """Everything that the tab shows. `slots` and `real` are image tokens of all slots, and of the tiles that
    the image fills; `reads` is what a pruner left of them, None without one; `remark` says which."""
    counts = [("all tile slots", slots), ("real tiles", real)]
    if reads is not None:
        counts += [(f"layer {i} keeps", count) for i, count in enumerate(reads.cached)]
    return (f'{STYLE}<div class="learn">'
            f"{canvas_html(found)}{tiles_html(found, patches)}"
            "<h3>Image tokens</h3><p>Every tile gives one token for each patch, and a class token. "
            "Padding tiles are dropped after the encoder, which loses nothing.</p>"
            f"{tokens_svg(counts)}<h3>The way to an answer</h3>"
            "<p>Blue is the image, orange the text. A box leads to its stage below.</p>"
            f"<p>{escape(remark)}</p>{flow_svg(made, prompt_tokens)}"
            "<h3>What every stage costs</h3>"
            "<p>Computed from the shapes of the models, not measured: 11B with the same grid of tiles, as "
            "many tokens of the question, and the same shares of image tokens kept.</p>"
            f"{''.join(map(stage_html, range(1, len(made) + 1), made))}{total_html(made)}</div>")


def canvas_html(found: Canvas) -> str:
    rows = "".join(
        f"{CHOSEN if each.chosen else '<tr>'}<td>{each.grid[0]} x {each.grid[1]}</td>"
        f"<td>{each.grid[0] * found.tile} x {each.grid[1] * found.tile}</td><td>{each.scale:.3g}</td>"
        f"<td>{each.verdict}</td></tr>" for each in found.candidates)
    height, width = found.image
    return ("<h3>The canvas</h3>"
            f"<p>The image has {height} x {width} pixels, height x width. Of the canvases that do not shrink "
            "it, the one is chosen that enlarges it least; if all of them shrink it, the one that shrinks it "
            "least; of those that are alike, the one with the fewest tiles.</p>"
            '<div class="wide"><table id="learn-canvases"><tr><th>rows x columns</th><th>pixels</th>'
            f"<th>scale</th><th></th></tr>{rows}</table></div>"
            f"{source_html(place(choose_canvas))}{source_html(place(canvas_scales))}")


def tiles_html(found: Canvas, patches: int) -> str:
    rows, columns = found.grid
    height, width = found.fitted
    empty = 1 - height * width / (rows * columns * found.tile ** 2)
    unused = found.slots - rows * columns
    words = f"The image has {height} x {width} pixels here"
    words += f"; hatched: padding, {empty:.0%} of the canvas." if empty else " and leaves no padding."
    words += f" A tile has {patches} x {patches} patches."
    if unused:
        words += (f" Grey: {unused} slot{'s' * (unused > 1)} without a tile, 0 after normalising, which the "
                  "encoder sees too.")
    drawing = tiles_svg(found.pixels, found.grid, found.fitted, found.tile, patches, found.slots, found.grey)
    return f"<h3>The tiles, as the model sees them</h3>{drawing}<p>{words}</p>{source_html(place(fit))}"


def stage_html(number: int, stage: Stage) -> str:
    rows = ""
    for model in stage.full:
        made = f"{change(stage, model, COUNT)}<br/><code>{change(stage, model, SHAPE)}</code>"
        costs = "".join(f"<td>{change(stage, model, what)}</td>" for what in (byte_words, flop_words))
        rows += f"<tr><th>{escape(model)}</th><td>{made}</td>{costs}</tr>"
    return (f'<section id="learn-stage-{number}"><h4>{number} {escape(stage.name)}</h4>'
            f"<p>{escape(stage.does)} Bytes: {escape(stage.bytes_are)}.</p>"
            '<div class="wide"><table><tr><th></th><th>makes</th><th>bytes</th><th>operations</th></tr>'
            f"{rows}</table></div>"
            f"{source_html(stage.code)}{source_html(stage.counted_by, 'counted by ')}</section>")


def source_html(where: Place, before: str = "") -> str:
    """A line that opens to the source of a function."""
    return (f"<details><summary>{before}<code>{where}</code> {escape(where.name)}</summary>"
            f"<pre><code>{escape(textwrap.dedent(where.source))}</code></pre></details>")


def total_html(made: list[Stage]) -> str:
    """Operations until the first token, and what a decoded token does with a byte that it reads."""
    *first, decoded = made
    lines = []
    for model, cost in decoded.full.items():
        full = sum(stage.full[model].flops for stage in first)
        encode = sum(stage.full[model].flops for stage in first[:4])
        words = f"{operations(full)} until the first token, {encode / full:.0%} of them before the decoder"
        if decoded.pruned is not None:
            words += f"; pruned {operations(sum(stage.pruned[model].flops for stage in first))}"
        lines.append(f"<li><b>{escape(model)}</b>: {words}. A decoded token does "
                     f"{cost.flops / cost.bytes:.2f} operations for each byte that it reads.</li>")
    return f'<section id="learn-total"><h4>Together</h4><ul>{"".join(lines)}</ul></section>'


# ----- the tab


def learn_tab(desk: Desk, state: "gr.State") -> tuple[Callable, list]:
    """Build the tab inside the current `gr.Tab`; returns what is done when it is opened, and what that fills.

    The element of the page is `learn`; in it are learn-canvases, learn-stage-1 to 8 and learn-total.
    """
    import gradio as gr
    shown = gr.HTML(NOT_YET, elem_id="learn", padding=False)

    def opened(asked: Asked | None) -> str:
        try:
            return show(desk, asked)
        except Exception as error:
            return refusal_html(said_of(error))
    return opened, [shown]


def show(desk: Desk, asked: Asked | None) -> str:
    """The way of the image that was asked about, in HTML."""
    if asked is None:
        return NOT_YET
    assistant = desk.assistant
    config = assistant.model.config
    found = canvas_of(asked.image, assistant.processor, asked.encoded.tiles)
    models = {"this checkpoint": config}
    if config != ELEVEN and found.grid in ELEVEN.vision.supported_aspect_ratios:
        models["11B"] = ELEVEN
    reads, remark = None, ""
    pruner = asked.pruner()
    if hooks(type(pruner)) and not pruner.keeps_all:
        reads = reads_of(desk, asked)
        remark = f"{AFTER} {pruner}. {OWN_WORK}" if reads is not None else EARLY
    prompt_tokens = len(assistant.tokenizer.encode(messages(asked.question, 1)))
    made = stages(models, found.grid, prompt_tokens, reads, assistant.model.dtype)
    return learn_html(found, made, asked.encoded.slots, asked.encoded.real, prompt_tokens,
                      config.vision.patches_per_side, reads, remark)


def reads_of(desk: Desk, asked: Asked) -> Reads | None:
    """What the pruner left of the image: the question is answered once more, and watched. None if a smaller
    model gave the answer."""
    figures = asked.pruned.figures
    if figures["answered_early"]:
        return None
    counted = desk.again(asked, Counted, pruned=True)
    return Reads(counted.grid or tuple(asked.encoded.tiles.grid[0].tolist()), tuple(counted.projected),
                 tuple(counted.attended), tuple(figures["kept_by_layer"]))


class Counted(Wrapper):
    """Counts the image tokens that every cross-attention layer reads in prefill; a new answer begins anew."""

    def __init__(self, inner: Pruner):
        super().__init__(inner)
        self.grid: Grid | None = None           # if hook 0 was called
        self.projected: list[int] = []
        self.attended: list[int] = []

    def preprocess(self, images: list[Image.Image], processor: ImageProcessor) -> Tiles:
        tiles = self.inner.preprocess(images, processor)
        self.grid = tuple(tiles.grid[0].tolist())
        return tiles

    def encoded(self, image: ImageTokens, prompts: list[list[int]]) -> ImageTokens:
        self.projected, self.attended = [], []
        return self.inner.encoded(image, prompts)

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        self.projected.append(kv.key.shape[2])
        image, kv = self.inner.layer(i, queries, image, kv)
        self.attended.append(kv.key.shape[2])
        return image, kv
