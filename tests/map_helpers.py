"""What the tests of maps share: small images, recorders of known tokens, and the pixels of what is drawn."""
import math

import torch
from helpers import tile_coords
from PIL import Image
from torch import Tensor

from model.image_tokens import ImageKV, ImageTokens
from pruning import Pruner
from pruning.recorder import Recorder
from weights.images import ImageProcessor

S, P = 32, 4                                    # a tile's side in pixels, and in patches
PROCESSOR = ImageProcessor(S)
SIZES = {       # grid: height and width of an image that is given this grid, and leaves padding
    (1, 1): (32, 20), (1, 2): (20, 64), (1, 3): (20, 96), (1, 4): (20, 128),
    (2, 1): (64, 20), (2, 2): (64, 50), (3, 1): (96, 20), (4, 1): (128, 20)}


def noisy_image(height: int, width: int) -> Image.Image:
    bits = torch.randint(90, 200, (height * width * 3,), generator=torch.Generator().manual_seed(0))
    return Image.frombytes("RGB", (width, height), bytes(bits.tolist()))


def tokens(*grids: tuple[int, int]) -> Tensor:
    """The coords of all tokens of images of these grids, [N, 4]."""
    return torch.tensor([coords for i, grid in enumerate(grids)
                         for coords in tile_coords(math.prod(grid), P, i)])


def kv(*sets: list[tuple], heads: int = 2, mask: Tensor | None = None) -> ImageKV:
    """A layer that holds tokens with these coords: one set, or one for each key/value head."""
    coords = torch.tensor(sets)[None]                                                    # [1, K, n, 4]
    empty = torch.ones(1, heads, coords.shape[2], 8)
    return ImageKV(empty, empty, coords, mask)


def recorded(grids: list[tuple[int, int]], *layers: ImageKV) -> Recorder:
    recorder, coords = Recorder(Pruner()), tokens(*grids)[None]
    recorder.encoded(ImageTokens(torch.ones(1, coords.shape[1], 8), coords), [[0]])
    recorder.prefilled(list(layers))
    return recorder


def pixels(image: Image.Image) -> Tensor:
    flat = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).float()


def patches(image: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inner pixels of every patch, without borders and outlines, [rows · P, columns · P, 3, h, w]."""
    side, edge = len(image) // (grid[0] * P), 4
    cut = image.unfold(0, side, side).unfold(1, side, side)
    return cut[..., edge:-edge, edge:-edge]
