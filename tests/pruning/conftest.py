"""What tests in several files share: a model in the place of SGL's guide, and the panels of a map."""
from collections.abc import Callable

import pytest
from sgl_by_hand import networks

from model.llama_vision import LlamaVision
from pruning import visualize


@pytest.fixture
def pair(monkeypatch) -> Callable[..., tuple[LlamaVision, LlamaVision]]:
    """A large and a small network; the second, or with `same` the first, is loaded for every guide."""
    def guided(seed: int, same: bool = False) -> tuple[LlamaVision, LlamaVision]:
        large, guide = networks(seed)
        guide = large if same else guide
        monkeypatch.setattr("pruning.methods.sgl.load_guide", lambda source, device, dtype: guide)
        return large, guide
    return guided


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The panels and their labels as they are drawn, and at last the lines of the legend."""
    seen, cell, sheet = [], visualize.cell, visualize.sheet
    monkeypatch.setattr(visualize, "cell", lambda *panel: seen.append(panel) or cell(*panel))
    monkeypatch.setattr(visualize, "sheet", lambda blocks, title, lines: seen.append([title, *lines])
                        or sheet(blocks, title, lines))
    return seen
