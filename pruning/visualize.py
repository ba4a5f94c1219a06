"""An image of what a pruner kept, or of where the prompt looks, over the image as the model saw it.

    Recorder(pruner) ── generate ─► Recorder.image, .kvs, .mass ── kept_map, attention_map ─► a PIL image

The image is rebuilt from the Tiles that the encoder read, black padding and all, so that every patch stands
where the model saw it: `place` says image, tile, row and column. A class token has no place in its tile, and
is counted instead. Only batch row 0 is drawn. n tokens, P patches along a tile's side, H x W pixels; a map is
[rows · P, columns · P], a number for every patch of an image.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from model.image_tokens import ImageKV, ImageTokens, Tiles
from pruning.recorder import Recorder
from weights.images import ImageProcessor

DIM, DARK = 0.75, (48, 48, 56)              # how far a dropped patch goes towards this colour
OUTLINE, BORDER = (255, 255, 255), (64, 160, 255)                       # of what is kept; between tiles
WARM = ((0, 0, 0), (96, 12, 32), (224, 84, 16), (255, 200, 40), (255, 255, 224))        # none to most
LEAST, GAP, TEXT, HEADING = 560, 16, 15, 17         # pixels; LEAST of an image's longer side, and the width


def kept_map(images: list[Image.Image], processor: ImageProcessor, recorder: Recorder,
             title: str) -> Image.Image:
    """What every layer holds after prefill: dropped patches are dark, kept ones clear and outlined.

    A patch that some key/value heads dropped is darkened in proportion. A panel for each image that the
    last prompt token sees, and for each cross-attention layer where they differ. `title` heads the legend.
    Raises ValueError where nothing was recorded, or of other images.
    """
    held = [coords_of(kv) for kv in recorder.kvs]
    views = look(images, processor, recorder, [coords for sets in held for coords in sets])
    blocks, every = [], []
    for view in views:
        layers = [view.shares(sets) for sets in held]
        alike = all(torch.equal(layer[0], layers[0][0]) and layer[1:] == layers[0][1:] for layer in layers)
        every += layers
        names = [f"layer {i}" for i in range(len(held))]
        names = [f"all {len(held)} layers"] if alike and len(held) > 1 else names
        blocks.append([cell(view.paint(share), f"{view.name}{name}: {round(tokens, 1):g} kept\n"
                            f"class tokens kept {round(classes, 1):g} of {view.tiles}")
                       for name, (share, tokens, classes) in zip(names, layers, strict=False)])
    real, kept = sum(view.tokens for view in views), sum(tokens for _, tokens, _ in every) / len(held)
    mean = ", mean over layers" if any(len(cells) > 1 for cells in blocks) else ""
    some = any(bool(((share > 0) & (share < 1)).any()) for share, _, _ in every)
    legend = "kept; dark: dropped" if not recorder.merges else "a token that others, dark, were merged into"
    return sheet(blocks, title, [
        f"{real} real image tokens -> {round(kept, 1):g} kept ({kept / real:.1%}{mean})",
        f"bright and outlined: {legend}" + "; between: dropped by some key/value heads" * some,
        *remarks(views, len(images))])


def attention_map(images: list[Image.Image], processor: ImageProcessor, recorder: Recorder,
                  title: str) -> Image.Image:
    """The attention that each patch gets, a panel for each cross-attention layer, over the image in grey.

    Brightest is most, one scale for all images in a layer; what was dropped before a layer has no colour
    there. `title` heads the legend. Raises ValueError where no attention was recorded, or of other images.
    """
    views = look(images, processor, recorder, [coords for _, coords in recorder.mass])
    blocks = [[] for _ in views]
    for i, (mass, coords) in enumerate(recorder.mass):
        patch = coords[:, 2] >= 0
        share, most = mass / mass.sum(), mass[patch].max() if patch.any() else mass.max()
        for cells, view in zip(blocks, views, strict=True):
            mine = coords[:, 0] == view.image
            label = f"{view.name}layer {i}\n{share[mine & ~patch].sum():.1%} on class tokens"
            if len(views) > 1:
                label += f", {share[mine & patch].sum():.1%} on patches"
            heat = view.spread(coords[mine], mass[mine] / most).clamp(0, 1).sqrt()
            there = view.spread(coords[mine], torch.ones(int(mine.sum()))) > 0
            cells.append(cell(view.paint(there.float(), heat), label))
    dropped = min(len(mass) for mass, _ in recorder.mass) < len(coords_of(recorder.image)[0])
    return sheet(blocks, title, [
        "attention of the prompt's rows on each patch, mean over heads, in each cross-attention layer",
        "brightest: most, by the square root" + "; no colour: dropped before this layer" * dropped,
        *remarks(views, len(images))])


# ----- an image as the encoder read it


@dataclass
class View:
    """One image, and where on it a token's place is."""
    image: int
    name: str                                   # "image 2, "; empty where there is but one
    canvas: Tensor                              # [H, W, 3] fp32, 0 to 255, enlarged by a whole factor
    rows: int                                   # of tiles
    tiles: int
    patches: int                                # along a tile's side
    tokens: int                                 # of the whole image, before any pruning
    remark: str                                 # on how it was read; empty where as usual

    def spread(self, coords: Tensor, values: Tensor) -> Tensor:
        """Values [n] of tokens of this image at their places [n, 4] -> a map, without class tokens."""
        tiles, patch = torch.zeros(self.tiles, self.patches, self.patches), coords[:, 2] >= 0
        tiles.index_put_(coords[patch, 1:].unbind(-1), values[patch], accumulate=True)
        return rearrange(tiles, "(r c) h w -> (r h) (c w)", r=self.rows)

    def shares(self, sets: list[Tensor]) -> tuple[Tensor, float, float]:
        """Of the places that a layer holds, a set for all key/value heads or one each: a map of the share of
        sets that hold a patch; and in the mean, how many tokens a set holds, and how many class tokens."""
        sets = [coords[coords[:, 0] == self.image] for coords in sets]
        maps = [self.spread(coords, torch.ones(len(coords))).clamp(max=1) for coords in sets]
        classes = sum(int((coords[:, 2] < 0).sum()) for coords in sets)
        return torch.stack(maps).mean(0), sum(map(len, sets)) / len(sets), classes / len(sets)

    def paint(self, share: Tensor, heat: Tensor | None = None) -> Image.Image:
        """Every patch as clear as its share, 0 to 1, and those with any outlined; with `heat`, 0 to 1, in
        grey, and these in its colours."""
        side = len(self.canvas) // len(share)                                           # of a patch

        def grow(values: Tensor) -> Tensor:
            return values.repeat_interleave(side, 0).repeat_interleave(side, 1)[..., None]      # [H, W, 1]

        pixels, there, line = self.canvas, grow(share > 0), min(3, max(1, side // 24))
        if heat is not None:
            pixels = (pixels @ pixels.new_tensor([0.299, 0.587, 0.114]))[..., None].expand(-1, -1, 3)
        pixels = pixels.lerp(pixels.new_tensor(DARK).expand_as(pixels), DIM * (1 - grow(share)))
        if heat is not None:
            pixels = torch.where(there, pixels.lerp(warm(grow(heat)), 0.65), pixels)
        near = F.max_pool2d(there[None, ..., 0].float(), 2 * line + 1, stride=1, padding=line)[0] > 0
        pixels[near & ~there[..., 0]] = pixels.new_tensor(OUTLINE)
        for rows in pixels, pixels.transpose(0, 1):
            for border in range(side * self.patches, len(rows), side * self.patches):
                rows[border - 1:border + 1] = pixels.new_tensor(BORDER)
        data = bytearray(pixels.numel())
        torch.frombuffer(data, dtype=torch.uint8).copy_(pixels.round().to(torch.uint8).flatten())
        return Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), bytes(data))


def warm(heat: Tensor) -> Tensor:
    """0 to 1 [H, W, 1] -> colours between those of WARM [H, W, 3]."""
    steps = torch.tensor(WARM, dtype=torch.float32)
    at = heat * (len(WARM) - 1)
    low = at[..., 0].long().clamp(max=len(WARM) - 2)
    return steps[low].lerp(steps[low + 1], at - low[..., None])


def look(images: list[Image.Image], processor: ImageProcessor, recorder: Recorder,
         sets: list[Tensor]) -> list[View]:
    """A View of each image that any of these sets of places [n, 4] is in."""
    if not any(map(len, sets)):
        raise ValueError("there is no map to draw: ask about an image first, for the attention with "
                         "Recorder(pruner, attention=True); a smaller model's answer leaves none")
    whole, coords = processor(images), coords_of(recorder.image)[0]
    tiles, seen = whole if recorder.tiles is None else recorder.tiles, int(coords[:, 0].max()) + 1
    if not len(whole) == len(tiles) == seen:
        raise ValueError(f"the answer was about {seen} images, but {len(whole)} are to be drawn: "
                         "give those that were asked about")
    views, patches = [], int(coords[:, 2].max()) + 1
    for image in sorted(set(torch.cat(sets)[:, 0].tolist())):
        (rows, columns), full = tiles.grid[image].tolist(), whole.grid[image].tolist()
        name, tokens = f"image {image + 1}, " if len(whole) > 1 else "", int((coords[:, 0] == image).sum())
        smaller = f"{name}made smaller: {rows} x {columns} tiles, not {full[0]} x {full[1]}"
        views.append(View(image, name, canvas(tiles, image, processor), rows, rows * columns, patches,
                          tokens * math.prod(full) // (rows * columns), smaller * ([rows, columns] != full)))
    return views


def remarks(views: list[View], images: int) -> list[str]:
    """What the legend of any map says."""
    hidden = ", ".join(str(i + 1) for i in range(images) if i not in {view.image for view in views})
    lines = ["class tokens, one a tile, have no place in the image; black at its right or bottom: padding"
             + "; blue: borders of tiles" * any(view.tiles > 1 for view in views),
             *(view.remark for view in views), f"out of sight, not drawn: image {hidden}" * bool(hidden)]
    return [line for line in lines if line]


def coords_of(tokens: ImageTokens | ImageKV) -> list[Tensor]:
    """The places [n, 4] that batch row 0 holds, without padding: one set, or one a key/value head."""
    sets = tokens.coords[0].reshape(-1, *tokens.coords.shape[-2:])
    masks = torch.ones(sets.shape[:2], dtype=torch.bool) if tokens.mask is None else tokens.mask[0]
    return [coords[mask] for coords, mask in zip(sets, masks.reshape(sets.shape[:2]), strict=True)]


def canvas(tiles: Tiles, image: int, processor: ImageProcessor) -> Tensor:
    """An image as the encoder read it, [H, W, 3] fp32 in 0 to 255, enlarged by a whole factor."""
    rows, columns = tiles.grid[image].tolist()
    x = rearrange(tiles.pixels[image, :rows * columns].cpu().float(), "(r c) k h w -> (r h) (c w) k", r=rows)
    if processor.do_normalize:
        x = x * x.new_tensor(processor.image_std) + x.new_tensor(processor.image_mean)
    x = (x / processor.rescale_factor if processor.do_rescale else x).round().clamp(0, 255)
    factor = math.ceil(LEAST / max(x.shape[:2]))
    return x.repeat_interleave(factor, 0).repeat_interleave(factor, 1)


# ----- panels and words on a sheet


def sheet(blocks: list[list[Image.Image]], title: str, lines: list[str]) -> Image.Image:
    """The panels of one image under those of another, and the legend below."""
    parts = [arrange(cells) for cells in blocks]
    width = max(LEAST, *(part.width for part in parts))
    legend = stack([words(title, HEADING, width), *(words(line, TEXT, width) for line in lines)], 4)
    return ImageOps.expand(stack([*parts, legend], GAP), GAP, "white")


def cell(image: Image.Image, label: str) -> Image.Image:
    """A panel: the label stands above."""
    return stack([words(label, TEXT, image.width), image], 4)


def arrange(cells: list[Image.Image]) -> Image.Image:
    """Panels of one width in rows that make the whole about twice as wide as high, with few gaps."""
    width, height, costs = cells[0].width + GAP, max(panel.height for panel in cells) + GAP, {}
    for columns in range(1, len(cells) + 1):
        rows = math.ceil(len(cells) / columns)
        gaps = (rows * columns - len(cells)) / len(cells)
        costs[abs(math.log(columns * width / (rows * height) / 2)) + gaps] = columns, rows
    columns, rows = costs[min(costs)]
    block = Image.new("RGB", (columns * width - GAP, rows * height - GAP), "white")
    for i, panel in enumerate(cells):           # their lower ends in a line, whatever their labels need
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
    """Black on white, in as many lines as it needs."""
    font, height = ImageFont.load_default(size), size + size // 3
    lines = wrap(text, font, width)
    strip = Image.new("RGB", (width, height * len(lines)), "white")
    for i, line in enumerate(lines):
        ImageDraw.Draw(strip).text((0, i * height), line, fill="black", font=font)
    return strip


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no wider than `width` pixels; a word that is wider than a line is broken."""
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
