"""What the network keeps, how it calls attention, and what the encoder skips."""
import copy
import math

import pytest
import torch
from helpers import close, noise, random_tiles, randomise
from small_model import CONFIG, CROSS, IMAGE, ROWS, SELF, SMALL, TOKENS, every_ratio, pad
from torch import Tensor

from model.cache import BUCKET
from model.image_tokens import attention_mask, visible_images
from model.layers import attend
from model.llama_vision import LlamaVision
from model.vision import VisionEncoder
from weights import config_from_dict

# ----- what is kept, and how attention is called


def test_image_keys_are_of_real_tiles_and_not_repeated(network, tiles):
    image = network.encode(tiles[:1])
    _, cache = network.prefill(torch.tensor(ROWS[:1]), [8], image, 3)
    heads, width = CONFIG.text.num_key_value_heads, CONFIG.text.head_dim
    assert len(cache.image_kv) == CROSS
    for kv in cache.image_kv:
        assert kv.key.shape == kv.value.shape == (1, heads, 4 * TOKENS, width)
        assert kv.key.untyped_storage().nbytes() == kv.key.nbytes           # nor a view of something larger
    assert image.features.shape == (1, 4 * TOKENS, CONFIG.text.hidden_size)


def test_the_text_cache_is_allocated_once(network, tiles):
    _, cache = network.prefill(pad(ROWS), [len(row) for row in ROWS], network.encode(tiles), 6)
    held = cache.text_keys + cache.text_values + [t for kv in cache.image_kv for t in (kv.key, kv.value)]
    coords_of = [tensor.data_ptr() for tensor in held]
    shape = len(ROWS), CONFIG.text.num_key_value_heads, BUCKET, CONFIG.text.head_dim       # 8 + 6, rounded up
    assert len(cache.text_keys) == len(cache.text_values) == SELF
    for step in range(6):
        network.decode(torch.arange(len(ROWS)), cache)
        assert cache.positions.tolist() == [len(row) + step + 1 for row in ROWS]
    assert all(tensor.shape == shape for tensor in cache.text_keys + cache.text_values)
    now = cache.text_keys + cache.text_values + [t for kv in cache.image_kv for t in (kv.key, kv.value)]
    assert [tensor.data_ptr() for tensor in now] == coords_of
    assert all(a is b for a, b in zip(held, now, strict=True))


@pytest.mark.parametrize("rows, grids, prefill, decode", [      # no mask; all see an image, no mask
    ([[5, 6, IMAGE, 7]], [[(1, 2)]], True, (True, True)),                               # the usual prompt
    ([[5, IMAGE, 7], [6, IMAGE, 8]], [[(1, 2)], [(2, 1)]], True, (True, True)),
    ([[5, IMAGE, 7], [6, IMAGE, 8]], [[(1, 2)], [(1, 1)]], False, (True, False)),
    ([[5, IMAGE, IMAGE, 7]], [[(1, 1), (1, 1)]], False, (True, True)),                  # the first sees one
    ([[5, IMAGE, 7, 8], [5, 6, IMAGE, 8]], [[(1, 1)], [(1, 1)]], True, (True, True)),
    ([[IMAGE, 5], [6, 7]], [[(1, 1)], []], True, (False, True))])
def test_masks_only_where_needed(network, calls, rows, grids, prefill, decode):
    image = network.encode([random_tiles(row, CONFIG.vision) if row else None for row in grids])
    ids = torch.tensor(rows)
    assert (attention_mask(visible_images(ids, IMAGE), image) is None) == prefill
    calls.clear()
    _, cache = network.prefill(ids, [ids.shape[1]] * len(ids), image, 1)
    assert {call["mask"] is None for call in calls if not call["causal"]} == {prefill}
    cache.image_kv = list(cache.image_kv)                   # what is masked everywhere is dropped
    assert (cache.sees_image is None, all(kv.mask is None for kv in cache.image_kv)) == decode


def test_attention_shares_heads_without_repeating_and_has_no_mask(network, tiles, calls):
    """One prompt about one image: the fused kernels' way, in the encoder, in prefill and in every step."""
    text, heads = CONFIG.text, CONFIG.text.num_attention_heads
    query, groups = (1, heads), text.num_key_value_heads
    shared = 1, groups
    image = network.encode(tiles[:1])
    assert calls and not any(call["gqa"] or call["causal"] for call in calls)
    calls.clear()
    _, cache = network.prefill(torch.tensor(ROWS[:1]), [8], image, 2)
    seen = [call for call in calls if not call["causal"]]
    assert len(seen) == CROSS and len(calls) == CROSS + SELF
    assert all(call["q"] == (*query, 8, text.head_dim) for call in seen)
    assert all(call["k"] == call["v"] == (*shared, 4 * TOKENS, text.head_dim) for call in seen)
    assert all(call["mask"] is None and call["gqa"] for call in calls)
    for step in range(2):           # heads that share keys are rows of one head; text is masked to its length
        network.decode(torch.tensor([5]), cache)
        steps = calls[-CROSS - SELF:]
        images = [i in text.cross_attention_layers for i in range(CROSS + SELF)]
        keys = [4 * TOKENS if image else BUCKET for image in images]
        assert [call["k"] for call in steps] == [(*shared, n, text.head_dim) for n in keys]
        assert all(call["q"] == (1, groups, heads // groups, text.head_dim) for call in steps)
        assert not any(call["causal"] or call["gqa"] for call in steps)
        assert [call["mask"] is None for call in steps] == images
        masks = [call["mask"] for call in steps if call["mask"] is not None]
        assert all(mask.tolist() == [[[[i < 9 + step for i in range(BUCKET)]]]] for mask in masks)


def test_attention_without_shared_heads_does_not_ask_for_them(calls):
    config = config_from_dict(SMALL | {"text_config": SMALL["text_config"] | {"num_key_value_heads": 4}})
    randomise(LlamaVision(config), config.vision, 0)(torch.tensor([[5, 6]]), [None])
    assert len(calls) == SELF and not any(call["gqa"] for call in calls)


@pytest.mark.parametrize("positions", [1, 5])
@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("kind", ["where", "added"])
def test_with_a_mask_heads_that_share_keys_are_positions_of_one_head(calls, positions, sets, kind):
    """No kernel is asked to share them: on CUDA the memory-efficient one, which takes masks, cannot."""
    q, k, v = noise(2, 6, 5, 4), noise(2, 2, 7, 4, seed=1), noise(2, 2, 7, 4, seed=2)
    added = noise(2, sets, positions, 7, seed=3)
    mask = added > -1 if kind == "where" else added
    out = attend(q, k, v, mask)                                                         # [2, 5, 6 · 4]
    assert calls[-1]["q"] == (2, 2, 3 * 5, 4) and not calls[-1]["gqa"] and calls[-1]["k"] == k.shape
    bias = torch.zeros_like(added).masked_fill(~mask, -torch.inf) if kind == "where" else added
    for b in range(2):
        for head in range(6):
            for t in range(5):
                own = bias[b, head // 3 if sets == 2 else 0, t if positions == 5 else 0]
                weights = (k[b, head // 3] @ q[b, head, t] / 2 + own).softmax(0)
                close(out[b, t, 4 * head:4 * head + 4], weights @ v[b, head // 3])


# ----- the encoder's shortcut


def general_path(monkeypatch, encoder: VisionEncoder, pixels: Tensor, grid) -> Tensor:
    """All tiles computed, as where padding tiles differ."""
    with monkeypatch.context() as patch:
        patch.setattr(VisionEncoder, "_padding_alike", lambda *arguments: False)
        return encoder(pixels, grid)[0]


@every_ratio
def test_computing_padding_once_changes_nothing(double, monkeypatch, calls, grid):
    encoder, pixels = double.vision_model, random_tiles([grid] * 2, CONFIG.vision).pixels.double()
    short, real = encoder(pixels, grid)[0], math.prod(grid)
    computed = sum(call["q"][2] for call in calls[:2])
    assert computed == min(real + 1, 4) * (TOKENS + 1)              # tiles, and a zero token for each
    calls.clear()
    close(short, general_path(monkeypatch, encoder, pixels, grid), atol=1e-12)
    assert sum(call["q"][2] for call in calls[:2]) == 4 * (TOKENS + 1)
    assert short.shape == (2, real * TOKENS, 3 * CONFIG.vision.hidden_size)
    assert all(call["mask"] is None for call in calls)


@pytest.mark.parametrize("table", ["pre_tile_positional_embedding.embedding",
                                   "post_tile_positional_embedding.embedding",
                                   "gated_positional_embedding.tile_embedding"])
def test_tables_that_tell_padding_tiles_apart_take_the_general_path(double, monkeypatch, table):
    encoder, grid = copy.deepcopy(double.vision_model), (1, 2)
    pixels = random_tiles([grid], CONFIG.vision).pixels.double()
    official = encoder(pixels, grid)[0]
    rows = encoder.get_submodule(table).weight[CONFIG.vision.ratio_id(*grid)].unflatten(0, (4, -1))
    rows[2:] = torch.arange(rows.shape[1]).sin()                    # not official, but both alike
    alike = encoder(pixels, grid)[0]
    assert encoder._padding_alike(CONFIG.vision.ratio_id(*grid), 2)
    close(alike, general_path(monkeypatch, encoder, pixels, grid), atol=1e-12)
    rows[3, 1] += 1.5
    apart = encoder(pixels, grid)[0]
    assert not encoder._padding_alike(CONFIG.vision.ratio_id(*grid), 2)
    close(apart, general_path(monkeypatch, encoder, pixels, grid), atol=0)
    assert (official - alike).abs().max() > 1e-3 and (alike - apart).abs().max() > 1e-6
