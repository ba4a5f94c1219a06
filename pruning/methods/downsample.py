"""Fewer tiles: the image is resized to a smaller canvas before it is encoded.

`keep` is a share of the image's tiles. It saves the encoder's work as well, and loses sharpness only. Whole
tiles are kept, at least one, so an image of one tile stays as it is. See docs/PAPERS.md.
"""
import math
from dataclasses import dataclass, replace

from PIL import Image

from model.image_tokens import Tiles
from pruning.pruner import Pruner
from weights.images import ImageProcessor


@dataclass
class Downsample(Pruner):
    """Resizes the image to fewer tiles."""
    keep: float | int = 0.5
    unit = "of the tiles"

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.keep, float):
            raise ValueError(f"downsample: keep is {self.keep}, but must be a fraction: it keeps whole tiles")

    def preprocess(self, images: list[Image.Image], processor: ImageProcessor) -> Tiles:
        parts = [processor([])]
        for image in images:
            whole = processor([image])
            most = max(1, math.floor(self.keep * int(whole.real[0]) + 0.5))
            fewer = tuple(grid for grid in processor.canvases if math.prod(grid) <= most)
            parts.append(replace(processor, canvases=fewer)([image]))
        return Tiles.cat(parts)
