"""How long work tells how far it is, without knowing who listens.

A `Progress` is what programs hand in: `terminal.Progress`, which keeps a line on the terminal, or `silent`.

    with progress("loading", gigabytes) as report:
        report(done, total)
"""
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from model.decoder import Decoder
from model.image_tokens import Tiles
from model.layers import untracked
from model.llama_vision import LlamaVision
from model.vision import VisionEncoder

Report = Callable[[int, int], None]
Progress = Callable[..., AbstractContextManager[Report]]        # called with words, and how to write numbers


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


@contextmanager
def silent(what: str, number: Callable[[int], str] = str) -> Iterator[Report]:
    """The Progress of those who do not watch."""
    yield lambda done, total: None


class Tracker:
    """The `track` of an encoder or decoder: reports every layer that has been computed, of `total` layers."""

    def __init__(self, report: Report, total: int):
        self.report = report
        self.total = total
        self.done = 0

    def __call__(self, layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
        if self.done >= self.total:             # all once more: a pruner may answer twice
            self.done = 0
        for layer in layers:
            yield layer
            self.done += 1
            self.report(self.done, self.total)


@contextmanager
def tracked(module: VisionEncoder | Decoder, total: int, progress: Progress, what: str) -> Iterator[None]:
    """For work in which `total` layers of a module are computed."""
    with progress(what) as report:
        module.track = Tracker(report, total)
        try:
            yield
        finally:
            module.track = untracked


def tracked_encoder(model: LlamaVision, tiles: Tiles, progress: Progress) -> AbstractContextManager[None]:
    """Images with equal grids of tiles are encoded together; the last layer of all follows at once."""
    grids = [tuple(grid) for grid in tiles.grid.tolist()]
    count = sum(rows * columns for rows, columns in grids)
    c = model.config.vision
    layers = c.num_hidden_layers + c.num_global_layers - 1
    return tracked(model.vision_model, len(set(grids)) * layers, progress,
                   f"encoding {count} tile{'s' * (count != 1)}, layer")


def tracked_decoder(model: LlamaVision, progress: Progress) -> AbstractContextManager[None]:
    """Prefill; decoding is not tracked."""
    decoder = model.language_model
    return tracked(decoder, len(decoder.layers), progress, "reading the prompt, layer")
