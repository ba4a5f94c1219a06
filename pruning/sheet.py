"""Panels and words on a white sheet, as the maps of `pruning/visualize.py` are laid out."""
import math

from PIL import Image, ImageDraw, ImageFont, ImageOps

LEAST = 560             # pixels: the longer side of a panel's image, and the width of the sheet
GAP = 16                # pixels
TEXT = 15
HEADING = 17


def sheet(blocks: list[list[Image.Image]], title: str, lines: list[str]) -> Image.Image:
    """The panels, those of each image in a block of its own, and the legend below."""
    parts = [arrange(cells) for cells in blocks]
    width = max(LEAST, *(part.width for part in parts))
    legend = stack([words(title, HEADING, width), *(words(line, TEXT, width) for line in lines)], 4)
    return ImageOps.expand(stack([*parts, legend], GAP), GAP, "white")


def cell(image: Image.Image, label: str) -> Image.Image:
    """A panel with its label above."""
    return stack([words(label, TEXT, image.width), image], 4)


def arrange(cells: list[Image.Image]) -> Image.Image:
    """Panels of one width in rows, about twice as wide as high together, with few gaps."""
    width = cells[0].width + GAP
    height = max(panel.height for panel in cells) + GAP
    costs = {}
    for columns in range(1, len(cells) + 1):
        rows = math.ceil(len(cells) / columns)
        gaps = (rows * columns - len(cells)) / len(cells)
        costs[abs(math.log(columns * width / (rows * height) / 2)) + gaps] = columns, rows
    columns, rows = costs[min(costs)]
    block = Image.new("RGB", (columns * width - GAP, rows * height - GAP), "white")
    for i, panel in enumerate(cells):           # aligned at the bottom, because labels differ in height
        block.paste(panel, (i % columns * width, (i // columns + 1) * height - GAP - panel.height))
    return block


def stack(parts: list[Image.Image], gap: int) -> Image.Image:
    """One under the other."""
    sheet = Image.new("RGB", (max(part.width for part in parts),
                              sum(part.height + gap for part in parts) - gap), "white")
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height + gap
    return sheet


def words(text: str, size: int, width: int) -> Image.Image:
    """Text in black on white, in as many lines as it needs."""
    font = ImageFont.load_default(size)
    height = size + size // 3
    lines = wrap(text, font, width)
    strip = Image.new("RGB", (width, height * len(lines)), "white")
    for i, line in enumerate(lines):
        ImageDraw.Draw(strip).text((0, i * height), line, fill="black", font=font)
    return strip


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most `width` pixels; a word that is wider than a line is broken."""
    lines = []
    for rest in text.split("\n"):
        while font.getlength(rest) > width:
            fits = next((n for n in range(len(rest), 1, -1) if font.getlength(rest[:n]) <= width), 1)
            end = rest.rfind(" ", 1, fits + 1)
            end = fits if end < 0 else end
            lines.append(rest[:end])
            rest = rest[end:].lstrip()
        lines.append(rest)
    return lines
