"""Maps of what a pruner kept, or of where the prompt looks, drawn over the image as the model saw it.

    Recorder(pruner) ── generate ─► its image, image_kv, received ── kept_map, attention_map ─► a PIL image

The image is rebuilt from the Tiles that the encoder read, with their black margin, so that every patch is
where the model saw it: `coords` are image, tile, row and column. Class tokens have no position in the tile;
they are counted instead. Only the first sequence of a batch is drawn.
n tokens, P patches along the side of a tile, H x W pixels. A map is [tile rows · P, tile columns · P].
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

DARK = (48, 48, 56)     # the colour of a dropped patch ...
DIM = 0.75              # ... and how far it goes towards it
OUTLINE, BORDER = (255, 255, 255), (64, 160, 255)           # of kept patches; between tiles
WARM = ((0, 0, 0), (96, 12, 32), (224, 84, 16), (255, 200, 40), (255, 255, 224))        # no attention to most
LEAST = 560                                 # pixels: the longer side of an image, and the width of the sheet
GAP = 16                # pixels
TEXT = 15
HEADING = 17


def kept_map(images: list[Image.Image], processor: ImageProcessor, recorder: Recorder,
             title: str) -> Image.Image:
    """What every layer holds after prefill: dropped patches are dark, kept ones clear and outlined.

    A patch that only some key/value heads dropped is less dark. There is one panel for each image that the
    last prompt token sees, and for each cross-attention layer if the layers differ. `title` is the first line
    of the legend. Raises ValueError if nothing was recorded, or if other images were.
    """
    held = [coords_of(kv) for kv in recorder.image_kv]
    views = views_of(images, processor, recorder, [coords for sets in held for coords in sets])
    blocks = []
    every = []
    for view in views:
        layers = [view.shares(sets) for sets in held]
        alike = all(torch.equal(layer[0], layers[0][0]) and layer[1:] == layers[0][1:] for layer in layers)
        every += layers
        names = [f"layer {i}" for i in range(len(held))]
        names = [f"all {len(held)} layers"] if alike and len(held) > 1 else names
        blocks.append([cell(view.paint(share), f"{view.name}{name}: {round(tokens, 1):g} kept\n"
                            f"class tokens kept {round(classes, 1):g} of {view.tiles}")
                       for name, (share, tokens, classes) in zip(names, layers, strict=False)])
    real = sum(view.tokens for view in views)
    kept = sum(tokens for _, tokens, _ in every) / len(held)
    mean = ", mean over layers" if any(len(cells) > 1 for cells in blocks) else ""
    some = any(bool(((share > 0) & (share < 1)).any()) for share, _, _ in every)
    legend = "kept; dark: dropped" if not recorder.merges else "kept; dark: merged into kept tokens"
    return sheet(blocks, title, [
        f"{real} real image tokens -> {round(kept, 1):g} kept ({kept / real:.1%}{mean})",
        f"bright and outlined: {legend}" + ("; between: dropped by some key/value heads" if some else ""),
        *remarks(views, len(images))])


def attention_map(images: list[Image.Image], processor: ImageProcessor, recorder: Recorder,
                  title: str) -> Image.Image:
    """The attention that each patch receives, over the image in grey: a panel for each cross-attention layer.

    The brightest patch receives most; all images of a layer have one scale. A token that was dropped before a
    layer has no colour there. `title` is the first line of the legend. Raises ValueError if no attention was
    recorded, or if other images were.
    """
    views = views_of(images, processor, recorder, [coords for _, coords in recorder.received])
    blocks = [[] for _ in views]
    for i, (mass, coords) in enumerate(recorder.received):
        patch = coords[:, 2] >= 0
        share = mass / mass.sum()
        most = mass[patch].max() if patch.any() else mass.max()
        for cells, view in zip(blocks, views, strict=True):
            mine = coords[:, 0] == view.image
            label = f"{view.name}layer {i}\n{share[mine & ~patch].sum():.1%} on class tokens"
            if len(views) > 1:
                label += f", {share[mine & patch].sum():.1%} on patches"
            heat = view.spread(coords[mine], mass[mine] / most).clamp(0, 1).sqrt()
            there = view.spread(coords[mine], torch.ones(int(mine.sum()))) > 0
            cells.append(cell(view.paint(there.float(), heat), label))
    dropped = min(len(mass) for mass, _ in recorder.received) < len(coords_of(recorder.image)[0])
    return sheet(blocks, title, [
        "attention of the prompt on each patch, mean over heads, in each cross-attention layer",
        "brightest: most (square root)" + ("; no colour: dropped before this layer" if dropped else ""),
        *remarks(views, len(images))])


# ----- an image as the encoder read it


@dataclass
class View:
    """One image, and where on it each token is."""
    image: int
    name: str                                   # "image 2, "; empty if there is only one
    canvas: Tensor                              # [H, W, 3] fp32, 0 to 255, enlarged by a whole number
    rows: int                                   # of tiles
    tiles: int
    patches: int                                # along a tile's side
    tokens: int                                 # of the image before any pruning
    remark: str                                 # if the image was made smaller; else empty

    def spread(self, coords: Tensor, values: Tensor) -> Tensor:
        """Values [n] of tokens of this image, and their coords [n, 4] -> a map, without class tokens."""
        tiles = torch.zeros(self.tiles, self.patches, self.patches)
        patch = coords[:, 2] >= 0
        tiles.index_put_(coords[patch, 1:].unbind(-1), values[patch], accumulate=True)
        return rearrange(tiles, "(r c) h w -> (r h) (c w)", r=self.rows)

    def shares(self, sets: list[Tensor]) -> tuple[Tensor, float, float]:
        """The coords that a layer holds, one set for all key/value heads or one each -> a map of the share of
        sets that hold each patch, and the mean number of tokens and of class tokens in a set."""
        sets = [coords[coords[:, 0] == self.image] for coords in sets]
        maps = [self.spread(coords, torch.ones(len(coords))).clamp(max=1) for coords in sets]
        classes = sum(int((coords[:, 2] < 0).sum()) for coords in sets)
        return torch.stack(maps).mean(0), sum(map(len, sets)) / len(sets), classes / len(sets)

    def paint(self, share: Tensor, heat: Tensor | None = None) -> Image.Image:
        """Every patch as clear as its share, 0 to 1; patches above 0 are outlined. With `heat`, 0 to 1, the
        image is grey and these patches have the colour of their heat."""
        side = len(self.canvas) // len(share)                                           # of a patch

        def grow(values: Tensor) -> Tensor:
            return values.repeat_interleave(side, 0).repeat_interleave(side, 1)[..., None]      # [H, W, 1]

        pixels = self.canvas
        there = grow(share > 0)
        line = min(3, max(1, side // 24))
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


def views_of(images: list[Image.Image], processor: ImageProcessor, recorder: Recorder,
             sets: list[Tensor]) -> list[View]:
    """A View of each image that is in any of these sets of coords [n, 4]."""
    if not any(map(len, sets)):
        raise ValueError("there is no map to draw: ask about an image first, for the attention with "
                         "Recorder(pruner, attention=True); a smaller model's answer leaves none")
    unpruned = processor(images)
    tiles = unpruned if recorder.tiles is None else recorder.tiles
    coords = coords_of(recorder.image)[0]
    seen = int(coords[:, 0].max()) + 1
    if not len(unpruned) == len(tiles) == seen:
        raise ValueError(f"the answer was about {seen} images, but {len(unpruned)} are to be drawn: "
                         "give those that were asked about")
    patches = int(coords[:, 2].max()) + 1
    views = []
    for image in sorted(set(torch.cat(sets)[:, 0].tolist())):
        rows, columns = tiles.grid[image].tolist()
        full = unpruned.grid[image].tolist()
        name = f"image {image + 1}, " if len(unpruned) > 1 else ""
        tokens = int((coords[:, 0] == image).sum()) * math.prod(full) // (rows * columns)
        remark = ""
        if [rows, columns] != full:
            remark = f"{name}made smaller: {rows} x {columns} tiles, not {full[0]} x {full[1]}"
        views.append(View(image, name, canvas(tiles, image, processor), rows, rows * columns, patches, tokens,
                          remark))
    return views


def remarks(views: list[View], images: int) -> list[str]:
    """Lines that stand in the legend of every map."""
    hidden = ", ".join(str(i + 1) for i in range(images) if i not in {view.image for view in views})
    borders = "; blue: borders of tiles" if any(view.tiles > 1 for view in views) else ""
    lines = ["class tokens, one a tile, are not drawn; black at the right or bottom: padding" + borders]
    lines += [view.remark for view in views if view.remark]
    return lines + [f"out of sight, not drawn: image {hidden}"] if hidden else lines


def coords_of(tokens: ImageTokens | ImageKV) -> list[Tensor]:
    """The coords [n, 4] of the first sequence, without padding: one set, or one for each key/value head."""
    sets = tokens.coords[0].reshape(-1, *tokens.coords.shape[-2:])
    masks = torch.ones(sets.shape[:2], dtype=torch.bool) if tokens.mask is None else tokens.mask[0]
    return [coords[mask] for coords, mask in zip(sets, masks.reshape(sets.shape[:2]), strict=True)]


def canvas(tiles: Tiles, image: int, processor: ImageProcessor) -> Tensor:
    """An image as the encoder read it, [H, W, 3] fp32 in 0 to 255, enlarged by a whole number."""
    rows, columns = tiles.grid[image].tolist()
    x = rearrange(tiles.pixels[image, :rows * columns].cpu().float(), "(r c) k h w -> (r h) (c w) k", r=rows)
    if processor.do_normalize:
        x = x * x.new_tensor(processor.image_std) + x.new_tensor(processor.image_mean)
    x = (x / processor.rescale_factor if processor.do_rescale else x).round().clamp(0, 255)
    factor = math.ceil(LEAST / max(x.shape[:2]))
    return x.repeat_interleave(factor, 0).repeat_interleave(factor, 1)


# ----- panels and words on a sheet


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
