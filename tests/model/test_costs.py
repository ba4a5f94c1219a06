"""What the network costs: operations, bytes of the caches, parameters; the same of the official shapes."""
import copy

import pytest
import torch
from helpers import random_tiles
from small_model import CONFIG, IMAGE, SELF, TOKENS, every_ratio
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from model.cache import BUCKET, rounded_up
from model.decoder import CrossAttentionLayer, SelfAttentionLayer
from model.llama_vision import LlamaVision
from weights import config_from_dict


def counted(function) -> int:
    """Operations that PyTorch counts, with attention as plain matrix products."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@every_ratio
def test_flops_of_the_encoder(network, grid):
    pixels = random_tiles([grid], CONFIG.vision).pixels
    assert counted(lambda: network.vision_model(pixels, grid)) == network.vision_model.flops(grid)


@pytest.mark.parametrize("grids", [[], [(2, 1)], [(1, 1), (1, 3)]], ids=["text", "one", "two"])
def test_flops_of_an_answer(network, grids):
    """Exactly, but that PyTorch counts causal attention over all pairs, of which half are left out, and all
    slots of the text cache."""
    prompt, steps = 9, 4
    tiles = [random_tiles(grids, CONFIG.vision)] if grids else [None]
    ids = torch.tensor([[IMAGE] * len(grids) + list(range(5, 5 + prompt - len(grids)))])
    flops = network.flops(prompt, grids, steps)
    assert counted(lambda: network.encode(tiles)) == flops["encode"]
    image = network.encode(tiles)
    above = SELF * 4 * CONFIG.text.hidden_size * prompt * (prompt - 1) // 2
    assert counted(lambda: network.prefill(ids, [prompt], image, steps)) == flops["prefill"] + above
    cache = network.prefill(ids, [prompt], image, steps)[1]
    decoding = counted(lambda: [network.decode(torch.tensor([5]), cache) for _ in range(steps - 1)])
    beyond = sum(BUCKET - held for held in range(prompt + 1, prompt + steps))       # slots that are masked
    assert decoding == flops["decode"] + SELF * 4 * CONFIG.text.hidden_size * beyond


class Started(TorchDispatchMode):
    """Counts the operations that PyTorch is asked for, but for views."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def test_a_decoded_token_takes_few_operations(network):
    """On a GPU they end sooner than a processor starts them: their number is what a token takes."""
    with torch.inference_mode():
        cache = network.prefill(torch.tensor([[5, 6]]), [2], None, 1)[1]
        with Started() as started:
            network.decode(torch.tensor([5]), cache)
    assert SELF * 20 < started.count <= SELF * 28 + 12


@pytest.mark.parametrize("kept", [1, 7])
def test_flops_of_a_decoder_that_keeps_fewer_image_tokens(network, kept):
    """What a pruned cache costs: one step over the image tokens that are left."""
    ids, decoder = torch.tensor([[IMAGE, 5, 6]]), network.language_model
    cache = network.prefill(ids, [3], network.encode([random_tiles([(1, 2)], CONFIG.vision)]), 1)[1]
    columns = torch.arange(2 * TOKENS) < kept
    cache.image_kv = [kv.take(columns[None]) for kv in cache.image_kv]
    expected = decoder.flops(1, 3, [kept] * len(decoder.cross_layers), [])
    expected += SELF * 4 * CONFIG.text.hidden_size * (BUCKET - 4)                   # slots that are masked
    assert counted(lambda: decoder.step(torch.tensor([5]), cache)) == expected


@pytest.mark.parametrize("grids", [[], [(1, 1)], [(1, 3), (2, 2)]], ids=["text", "one", "two"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_of_the_caches(network, grids, dtype):
    held = copy.deepcopy(network).to(dtype)
    ids = torch.tensor([[IMAGE] * len(grids) + [5, 6, 7]])
    image = held.encode([random_tiles(grids, CONFIG.vision)])
    _, cache = held.prefill(ids, [ids.shape[1]], image, 10)
    expected = {"text": cache.text_bytes(), "image": cache.image_bytes()}
    assert held.kv_bytes(rounded_up(ids.shape[1] + 10), grids) == expected
    assert held.image_tokens(grids) == (0 if image is None else image.features.shape[1])


def test_parameter_counts(network):
    counts = network.parameter_counts()
    assert sum(counts.values()) == sum(p.numel() for p in network.parameters())
    kinds = {"self_attention": SelfAttentionLayer, "cross_attention": CrossAttentionLayer}
    for name, kind in kinds.items():
        layers = [layer for layer in network.language_model.layers if isinstance(layer, kind)]
        assert counts[name] == len(layers) * sum(p.numel() for p in layers[0].parameters())
    assert counts["projector"] == 48 * 32 + 32
    assert (counts["embedding"], counts["lm_head"], counts["norm"]) == (68 * 32, 60 * 32, 32)


def official(image_size: int = 560, **text) -> LlamaVision:
    """A model of official size, without memory."""
    config = {"model_type": "mllama", "vision_config": {"image_size": image_size}, "text_config": text}
    with torch.device("meta"):
        return LlamaVision(config_from_dict(config)).bfloat16()


def test_official_11b():
    model = official()
    counts = model.parameter_counts()
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters()) == 10_670_220_835
    assert counts["self_attention"] == 6_979_584_000 and counts["cross_attention"] == 1_744_898_064
    assert counts["embedding"] == 525_369_344 and counts["lm_head"] == 525_336_576
    assert model.image_tokens([(2, 2)]) == 4 * 1601 and model.config.vision.pad_tokens == 7
    assert model.kv_bytes(1, [(1, 1)]) == {"text": 131_072, "image": 1601 * 32_768}     # 52.46 MB a tile
    assert model.vision_model.flops((1, 1)) == pytest.approx(7.67e12, rel=0.01)
    assert model.vision_model.flops((2, 2)) == pytest.approx(18.51e12, rel=0.01)
    assert model.flops(100, [])["prefill"] == pytest.approx(100 * (2 * 6_979_584_000), rel=0.01)


def test_official_90b_and_the_448_pixel_base():
    big = official(hidden_size=8192, intermediate_size=28672, num_hidden_layers=100, num_attention_heads=64,
                   cross_attention_layers=list(range(3, 100, 5)))
    assert sum(big.parameter_counts().values()) == 88_593_355_323
    assert big.kv_bytes(1, [(1, 1)]) == {"text": 327_680, "image": 1601 * 81_920}
    base = official(image_size=448)
    assert sum(base.parameter_counts().values()) == 10_642_941_475
    assert base.image_tokens([(1, 1)]) == 1025 and base.config.vision.pad_tokens == 7
