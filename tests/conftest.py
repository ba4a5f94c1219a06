"""What several test files share: random weights that hide no path of the network, and random pictures."""
from collections.abc import Callable

import pytest
import torch
from torch import nn

from model.config import VisionConfig
from model.image import Grid, Tiles


@pytest.fixture(scope="session")
def randomise() -> Callable[..., nn.Module]:
    """Fills a network, ours or transformers', with random weights; no gate is near 0: that hides its path.

    `unused_tiles` scales what the tables say of tiles that a ratio does not have; official ones hold zeros.
    """
    def fill(network: nn.Module, vision: VisionConfig, seed: int, unused_tiles: float = 0.0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.numel() == 1:                              # the gates
                noise = noise.sign() * (0.4 + noise.abs())
            elif "norm" in name:
                noise = ("bias" not in name) + 0.2 * noise
            elif "patch" in name or "embed" not in name:                 # biases stay as they are
                noise = noise / parameter[0].numel() ** 0.5
            elif "tile_" in name and "embedding.weight" in name:    # a row for each aspect ratio, 0 has none
                rows = noise.unflatten(1, (vision.max_num_tiles, -1))
                rows[0] = 0
                for ratio, (height, width) in enumerate(vision.supported_aspect_ratios, start=1):
                    rows[ratio, height * width:] *= unused_tiles
            parameter.data.copy_(noise)
        return network.eval()
    return fill


@pytest.fixture(scope="session")
def draw() -> Callable[..., Tiles]:
    """Tiles of pictures with these grids and random pixels, zeros in the slots without a tile."""
    def tiles(grids: list[Grid], vision: VisionConfig, seed: int = 0) -> Tiles:
        side, generator = vision.image_size, torch.Generator().manual_seed(seed)
        pixels = torch.randn(len(grids), vision.max_num_tiles, 3, side, side, generator=generator)
        for picture, (rows, columns) in zip(pixels, grids, strict=True):
            picture[rows * columns:] = 0
        return Tiles(pixels, torch.tensor(grids).view(-1, 2))
    return tiles
