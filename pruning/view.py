"""One image as the encoder read it, and the patches of its tokens painted on it.

The image is rebuilt from the Tiles that the encoder read, with their black margin, so that every patch is
where the model saw it: `coords` are image, tile, row and column. Class tokens have no position in the tile.
n tokens, P patches along the side of a tile, H x W pixels. A map is [tile rows · P, tile columns · P].
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from model.image_tokens import ImageKV, ImageTokens, Tiles
from pruning.recorder import Recorder
from pruning.sheet import LEAST
from weights.images import ImageProcessor

DARK = (48, 48, 56)     # the colour of a dropped patch ...
DIM = 0.75              # ... and how far it goes towards it
GREY = (0.299, 0.587, 0.114)                                # how bright red, green and blue are
BRIGHT = 200            # a colour of this grey or more has dark outlines
OUTLINE, BORDER = (255, 255, 255), (64, 160, 255)           # of patches; between tiles
WARM = ((0, 0, 0), (96, 12, 32), (224, 84, 16), (255, 200, 40), (255, 255, 224))        # no attention to most


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
        pixels = self.canvas
        there = self.grow(share > 0)
        if heat is not None:
            pixels = (pixels @ pixels.new_tensor(GREY))[..., None].expand(-1, -1, 3)
        pixels = pixels.lerp(pixels.new_tensor(DARK).expand_as(pixels), DIM * (1 - self.grow(share)))
        if heat is not None:
            pixels = torch.where(there, pixels.lerp(warm(self.grow(heat)), 0.65), pixels)
        near = highest_near(there[..., 0].float(), self.line) > 0
        pixels[near & ~there[..., 0]] = pixels.new_tensor(OUTLINE)
        return self.finish(pixels)

    def paint_clusters(self, coords: Tensor, owner: Tensor, dots: Tensor) -> Image.Image:
        """Every patch in the mean colour of its cluster; outlines, light or dark, where two clusters meet.
        `coords` [n, 4] and `owner` [n] are of all tokens of this image; patches at the coords `dots` [d, 4]
        get a dot."""
        side, line = self.side, min(2, self.line)
        cluster = self.spread(coords, owner.unique(return_inverse=True)[1].float())     # [rows, columns]
        patches = rearrange(self.canvas, "(r h) (c w) k -> (r c) h w k", h=side, w=side).mean((1, 2))
        which = cluster.flatten().long()
        sums = patches.new_zeros(int(which.max()) + 1, 3).index_add_(0, which, patches)
        means = sums / which.bincount()[:, None]
        label = self.grow(cluster)[..., 0]                                              # [H, W]
        pixels = means[label.long()]                                                    # [H, W, 3]
        marked = highest_near(label, line) != -highest_near(-label, line)
        wider = highest_near(label, line + 1) != -highest_near(-label, line + 1)
        for thin, wide in (marked, wider), (marked.T, wider.T):
            for border in self.borders(len(thin)):          # so that it is seen on both sides of a border
                thin[border - line - 1:border + line + 1] = wide[border - line - 1:border + line + 1]
        for row, column in self.spread(dots, torch.ones(len(dots))).nonzero().tolist():
            y, x = row * side + side // 2, column * side + side // 2
            marked[y - line - 1:y + line + 1, x - line - 1:x + line + 1] = True
        bright = (pixels @ pixels.new_tensor(GREY) > BRIGHT)[..., None]
        contrast = torch.where(bright, pixels.new_tensor(DARK), pixels.new_tensor(OUTLINE))
        return self.finish(torch.where(marked[..., None], contrast, pixels))

    @property
    def side(self) -> int:
        """Of a patch, in pixels of the canvas."""
        return len(self.canvas) // (self.rows * self.patches)

    @property
    def line(self) -> int:
        """The width of an outline, in pixels."""
        return min(3, max(1, self.side // 24))

    def grow(self, values: Tensor) -> Tensor:
        """A map in pixels of the canvas, [H, W, 1]."""
        return values.repeat_interleave(self.side, 0).repeat_interleave(self.side, 1)[..., None]

    def borders(self, length: int) -> range:
        """The pixels at which tiles meet, along a side of this length."""
        return range(self.side * self.patches, length, self.side * self.patches)

    def finish(self, pixels: Tensor) -> Image.Image:
        """[H, W, 3] as an image, with the borders of tiles."""
        for rows in pixels, pixels.transpose(0, 1):
            for border in self.borders(len(rows)):
                rows[border - 1:border + 1] = pixels.new_tensor(BORDER)
        data = bytearray(pixels.numel())
        torch.frombuffer(data, dtype=torch.uint8).copy_(pixels.round().to(torch.uint8).flatten())
        return Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), bytes(data))


def highest_near(values: Tensor, distance: int) -> Tensor:
    """The highest of the values [H, W] that are at most `distance` pixels away, in both directions."""
    return F.max_pool2d(values[None], 2 * distance + 1, stride=1, padding=distance)[0]


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
