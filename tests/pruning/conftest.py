"""What the tests of one method in several files share: a model in the place of SGL's guide."""
from collections.abc import Callable

import pytest
from sgl_by_hand import networks

from model.llama_vision import LlamaVision


@pytest.fixture
def pair(monkeypatch) -> Callable[..., tuple[LlamaVision, LlamaVision]]:
    """A large and a small network; the second, or with `same` the first, is loaded for every guide."""
    def guided(seed: int, same: bool = False) -> tuple[LlamaVision, LlamaVision]:
        large, guide = networks(seed)
        guide = large if same else guide
        monkeypatch.setattr("pruning.methods.sgl.load_guide", lambda source, device, dtype: guide)
        return large, guide
    return guided
