"""Images for the See tab: where the model looked for a word, what a method keeps, all methods side by side.

    Looker, Looks ─► heat_map: one word, in a layer and head or their mean      ─► PIL
    Looker ─► kept_panel: one small image of what a method keeps or merges      ─► PIL

`pruning/visualize.py` draws the large map of what every layer keeps. All about the only image of a question.
"""
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from page.looks import Looker, Looks
from pruning.view import View, coords_of, views_of
from pruning.visualize import distinct
from weights.images import ImageProcessor

SMALL = 280                 # pixels: the longer side of a small multiple
MARK = (64, 255, 255)       # around the patch with most attention


def heat_map(image: Image.Image, processor: ImageProcessor, looker: Looker, looks: Looks,
             tokens: Sequence[int], layer: int | None = None, head: int | None = None) -> Image.Image:
    """The mean attention when these tokens of the answer were made, over the image in grey; None: the mean.

    The brightest patch has most, and a frame; in between colours go by the square root. A patch that no layer
    and head of these could look at has no colour. Raises ValueError where nothing was recorded.
    """
    view = view_of(image, processor, looker, looks.coords)
    attention, there = looks.of_word(tokens, layer, head)                                   # [N]
    patches = view.spread(looks.coords, attention)                                          # [rows, columns]
    heat = (patches / patches.max().clamp(min=1e-30)).sqrt()
    panel = view.paint(view.spread(looks.coords, there).clamp(0, 1), heat)
    row, column = divmod(int(patches.argmax()), patches.shape[1])
    side, line = view.side, view.line
    ImageDraw.Draw(panel).rectangle((column * side, row * side, (column + 1) * side - 1,
                                     (row + 1) * side - 1), outline=MARK, width=line + 1)
    return panel


def heat_words(looks: Looks, tokens: Sequence[int], layer: int | None = None, head: int | None = None) -> str:
    """What the heat map does not show: shares of attention, in per cent."""
    attention, _ = looks.of_word(tokens, layer, head)
    patch = looks.coords[:, 2] >= 0
    words = (f"{attention[patch].max():.1%} of the attention is on the framed patch, "
             f"{attention[patch].sum():.1%} on all patches, {attention[~patch].sum():.1%} on class tokens")
    elsewhere = 1 - float(attention.sum())
    return f"{words}, {elsewhere:.1%} on a token that the method added" if elsewhere > 5e-4 else words


def kept_panel(image: Image.Image, processor: ImageProcessor, looker: Looker) -> Image.Image:
    """What a method keeps, small: every patch as clear as the share of layers and key/value heads that hold
    it after prefill, or the clusters of its first layer. Raises ValueError where nothing was recorded."""
    held = [coords_of(kv) for kv in looker.image_kv]
    view = view_of(image, processor, looker, *(coords for sets in held for coords in sets))
    if looker.clusters:
        coords = coords_of(looker.image)[0]
        _, owners = distinct(looker.clusters, len(held))[0]
        tokens, sizes = owners[0].unique(return_counts=True)
        panel = view.paint_clusters(coords, owners[0], coords[tokens[sizes > 1]])
    else:
        panel = view.paint(torch.stack([view.shares(sets)[0] for sets in held]).mean(0))
    return smaller(panel, SMALL)


def view_of(image: Image.Image, processor: ImageProcessor, looker: Looker, *sets: Tensor) -> View:
    """The image as the encoder read it, for tokens at these coords [n, 4] each."""
    return views_of([image], processor, looker, list(sets))[0]


def smaller(image: Image.Image, side: int) -> Image.Image:
    """With a longer side of so many pixels."""
    scale = side / max(image.size)
    size = tuple(max(1, round(length * scale)) for length in image.size)
    return image.resize(size, Image.Resampling.LANCZOS)
