"""That the network can be trained: which parameters take gradients, and that these are right."""
import math
import re

import pytest
import torch
from small_model import GRIDS, RATIOS, ROWS, pad
from torch import Tensor

from model.image_tokens import Tiles
from model.llama_vision import LlamaVision
from model.vision import VisionEncoder


def loss_of(network: LlamaVision, tiles: list[Tiles | None]) -> Tensor:
    """A weighted sum of the logits of the real tokens of the ragged batch."""
    logits = network(pad(ROWS), tiles)
    weights = torch.linspace(-1, 1, logits.numel()).sin().view_as(logits)
    real = torch.arange(8) < torch.tensor([len(row) for row in ROWS])[:, None]
    return (logits * weights)[real].sum() / 30


@pytest.mark.parametrize("general", [False, True], ids=["shortcut", "general path"])
def test_tables_of_unused_tiles_take_no_gradient(trained, tiles, monkeypatch, general):
    """Else training would make the padding tiles differ, and every image slower."""
    if general:
        monkeypatch.setattr(VisionEncoder, "_padding_alike", lambda *arguments: False)
    loss_of(trained, tiles).backward()
    encoder, used = trained.vision_model, {grid for grids in GRIDS for grid in grids}
    for table in (encoder.pre_tile_positional_embedding.embedding,
                  encoder.post_tile_positional_embedding.embedding,
                  encoder.gated_positional_embedding.tile_embedding):
        rows = table.weight.grad.unflatten(1, (4, -1)).abs().amax(-1)           # [ratios + 1, tiles]
        expected = [[grid in used and tile < math.prod(grid) for tile in range(4)] for grid in RATIOS]
        assert (rows > 0).tolist() == [[False] * 4, *expected]


def test_gradients_reach_every_parameter(trained, tiles):
    loss_of(trained, tiles).backward()
    without = [name for name, p in trained.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert all(p.grad.isfinite().all() for p in trained.parameters())
    seen = trained.language_model.embed_tokens.weight.grad.any(-1).nonzero().flatten().tolist()
    assert set(seen) == {token for row in ROWS for token in row}    # not the padding


def test_gradients_are_the_slopes_of_the_loss(trained, tiles):
    """Of each kind of parameter in all layers at once, along the gradient with as much noise added to it.

    RMSNorm is float32 in any dtype: that bounds the precision.
    """
    loss_of(trained, tiles).backward()
    kinds, wrong, step = {}, {}, 2e-3
    for name, parameter in trained.named_parameters():
        kinds.setdefault(re.sub(r"\d+", "N", name), []).append(parameter)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for kind, parameters in kinds.items():
            ways = [p.grad * (1 + torch.randn(p.shape, generator=generator)) for p in parameters]
            size = sum(way.square().sum() for way in ways).sqrt()
            expected = sum((p.grad * way).sum() for p, way in zip(parameters, ways, strict=True)) / size
            losses = []
            for there in step, -2 * step:
                for p, way in zip(parameters, ways, strict=True):
                    p += there / size * way
                losses.append(loss_of(trained, tiles))
            for p, way in zip(parameters, ways, strict=True):
                p += step / size * way
            slope = (losses[0] - losses[1]) / (2 * step)
            if abs(slope - expected) > 5e-5 + 0.01 * abs(expected):
                wrong[kind] = slope.item(), expected.item()
    assert wrong == {}
