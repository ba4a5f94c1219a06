"""The small random network as fixtures, with every gate open, and the attention calls it makes."""
import copy

import pytest
from helpers import random_tiles, randomise
from small_model import CONFIG, GRIDS

from model import layers
from model.image_tokens import Tiles
from model.llama_vision import LlamaVision


@pytest.fixture(scope="module")
def network() -> LlamaVision:
    return randomise(LlamaVision(CONFIG), CONFIG.vision, seed=1).requires_grad_(False)


@pytest.fixture(scope="module")
def double(network) -> LlamaVision:
    return copy.deepcopy(network).double()


@pytest.fixture
def trained(network) -> LlamaVision:
    """A copy in float64 whose parameters take gradients."""
    return copy.deepcopy(network).double().requires_grad_(True)


@pytest.fixture(scope="module")
def tiles() -> list[Tiles | None]:
    return [random_tiles(grids, CONFIG.vision, seed) if grids else None for seed, grids in enumerate(GRIDS)]


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """What scaled_dot_product_attention is called with on a GPU, while it goes on working."""
    seen, real = [], layers.F.scaled_dot_product_attention
    monkeypatch.setattr(layers, "FEW_KEYS", 0)              # a CPU gets a mask where there are few keys

    def record(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        seen.append({"q": tuple(q.shape), "k": tuple(k.shape), "v": tuple(v.shape), "mask": attn_mask,
                     "causal": is_causal, "gqa": enable_gqa})
        return real(q, k, v, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa)
    monkeypatch.setattr(layers.F, "scaled_dot_product_attention", record)
    return seen
