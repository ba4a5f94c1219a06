"""What the network promises beside its numbers: what it skips, keeps and counts, and that it can be trained.

Uses a random network of a few layers with every gate open. That its numbers are right is shown in
test_golden.py and test_transformers.py.
"""
import copy
import math
import re

import pytest
import torch
from helpers import close, greedy, random_tiles, randomise
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import layers
from model.cache import BUCKET, rounded_up
from model.decoder import CrossAttentionLayer, SelfAttentionLayer
from model.image_tokens import Tiles, attention_mask, visible_images
from model.llama_vision import LlamaVision
from model.vision import VisionEncoder
from weights import config_from_dict

IMAGE = 60
SMALL = {
    "model_type": "mllama", "image_token_index": IMAGE,
    "text_config": {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5,
                    "num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1, 3],
                    "rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 64}},
    "vision_config": {"hidden_size": 16, "intermediate_size": 32, "attention_heads": 2, "image_size": 28,
                      "num_hidden_layers": 3, "num_global_layers": 2, "intermediate_layers_indices": [1, 2]}}
CONFIG = config_from_dict(SMALL)
RATIOS = CONFIG.vision.supported_aspect_ratios
TOKENS = CONFIG.vision.tokens_per_tile                  # 4 patches and the class token
CROSS, SELF = 2, 3                                      # layers of each kind
every_ratio = pytest.mark.parametrize("grid", RATIOS, ids=lambda grid: "{}x{}".format(*grid))
# A ragged batch: one image, none, two apart, two side by side, one at the end. Padding stands on the right.
ROWS = [[5, 6, IMAGE, 7, 8, 9, 10, 11], [12, 13, 14], [IMAGE, 5, 15, IMAGE, 16, 17], [9, 8, IMAGE, IMAGE, 18],
        [4, 19, 20, IMAGE]]
GRIDS = [[(2, 2)], [], [(1, 1), (1, 3)], [(1, 2), (2, 1)], [(1, 1)]]


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

    def record(q, k, v, attn_mask, is_causal=False, enable_gqa=False):
        seen.append({"q": tuple(q.shape), "k": tuple(k.shape), "v": tuple(v.shape), "mask": attn_mask,
                     "causal": is_causal, "gqa": enable_gqa})
        return real(q, k, v, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa)
    monkeypatch.setattr(layers.F, "scaled_dot_product_attention", record)
    return seen


def pad(rows: list[list[int]]) -> Tensor:
    return torch.tensor([row + [2] * (max(map(len, rows)) - len(row)) for row in rows])


# ----- rows that see no image


def test_rows_before_the_image_are_those_of_a_text_model(network):
    """Bit for bit: they skip the cross-attention layers, also beside rows that see theirs already."""
    ids = torch.tensor([[5, 6, 7, IMAGE, 9, 10], [5, IMAGE, 6, 7, 8, 9]])
    tiles = [random_tiles([(1, 2)], CONFIG.vision, seed) for seed in range(2)]
    for rows in [0], [1], [0, 1]:
        seeing = network(ids[rows], [tiles[row] for row in rows])
        blind = network(torch.where(ids == IMAGE, 11, ids)[rows], [None] * len(rows))
        for row, with_image, without in zip(rows, seeing, blind, strict=True):
            first = ids[row].tolist().index(IMAGE)
            assert torch.equal(with_image[:first], without[:first])
            assert ((with_image - without)[first:].abs().amax(-1) > 0.1).all()


def test_a_text_only_sequence_of_a_mixed_batch_is_that_of_a_text_model(network):
    """Bit for bit, while reading and while decoding; also beside a row that sees its image from the start."""
    ids = torch.tensor([[IMAGE, 6, 7, 8], [9, 10, 11, 12]])
    image = network.encode([random_tiles([(1, 2)], CONFIG.vision), None])
    text = ids.clone()
    text[0, 0] = 5
    mixed, alone = network.prefill(ids, [4, 4], image, 2), network.prefill(text, [4, 4], None, 2)
    assert torch.equal(network.read(ids, image)[1], network.read(text, None)[1])
    assert torch.equal(mixed[0][1], alone[0][1]) and not torch.equal(mixed[0][0], alone[0][0])
    for tokens in torch.tensor([[3, 4], [5, 6]]):
        seeing, blind = network.decode(tokens, mixed[1]), network.decode(tokens, alone[1])
        assert torch.equal(seeing[1], blind[1]) and not torch.equal(seeing[0], blind[0])


def test_an_image_does_not_reach_the_text_before_it_or_after_the_next(network):
    """Two images apart: the second changes nothing before it, and the first is out of sight after it."""
    ids = torch.tensor([[5, IMAGE, 6, 7, IMAGE, 8, 9]])
    a, b = random_tiles([(1, 2)], CONFIG.vision, 1), random_tiles([(1, 1)], CONFIG.vision, 2)
    other = random_tiles([(1, 1)], CONFIG.vision, 3)
    base, second = network(ids, [Tiles.cat([a, b])]), network(ids, [Tiles.cat([a, other])])
    close(base[:, :4], second[:, :4])
    assert ((base - second)[:, 4:].abs().amax(-1) > 0.01).all()
    images = [network.encode([Tiles.cat([first, b])]) for first in (a, other)]
    caches = [network.prefill(ids, [7], image, 0)[1] for image in images]
    for cache in caches:
        cache.image_kv = list(cache.image_kv)           # what no sequence sees is dropped
    kv, unseen = (cache.image_kv[0] for cache in caches)
    assert kv.key.shape[2] == TOKENS                    # of the second image alone
    close(kv.key, unseen.key)


def test_a_batch_of_text_alone(network):
    """No image anywhere, said in three ways: no cross-attention, and decoding goes on like reading."""
    rows = [[5, 6, 7, 8], [9, 10]]
    assert network.encode([None, None]) is None
    assert network.encode([random_tiles([], CONFIG.vision), None]) is None
    close(network(pad(rows), [random_tiles([], CONFIG.vision)] * 2), network(pad(rows), [None] * 2), atol=0)
    tokens, logits = greedy(network, rows, None, 5)
    for row, new, seen in zip(rows, tokens, logits, strict=True):
        close(seen, network(torch.tensor([row + new[:-1]]), [None])[0, len(row) - 1:])
    _, cache = network.prefill(pad(rows), [4, 2], None, 1)
    assert cache.image_kv == [] and cache.image_bytes() == 0


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


# ----- training


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


# ----- batches


def test_several_prompts_about_one_image(network, tiles):
    """One encoding, expanded without a copy, gives each prompt what it gets alone."""
    image = network.encode(tiles[2:3])
    rows = [[IMAGE, 5, 15, IMAGE, 16, 17], [5, IMAGE, IMAGE, 6], [IMAGE, IMAGE, 9, 10, 11]]
    shared = image.expand(3)
    assert shared.features.data_ptr() == image.features.data_ptr()
    tokens, logits = greedy(network, rows, shared, 6)
    for row, new, seen in zip(rows, tokens, logits, strict=True):
        [expected], alone = greedy(network, [row], image, 6)
        assert new == expected
        close(seen, alone[0])


def test_a_ragged_batch_gives_each_row_what_it_gets_alone(network, tiles):
    """Text only, one image, several; also when the rows come in another order, and with more padding."""
    image, lengths = network.encode(tiles), [len(row) for row in ROWS]
    tokens, logits = greedy(network, ROWS, image, 8)
    whole = network(pad(ROWS), tiles)
    for i, row in enumerate(ROWS):
        single = network.encode(tiles[i:i + 1])
        [expected], alone = greedy(network, [row], single, 8)
        assert tokens[i] == expected
        close(logits[i], alone[0])
        text = torch.tensor([row + expected[:-1]])
        close(alone[0], network.read(text, single)[0, len(row) - 1:])
        close(whole[i, :lengths[i]], network.read(text, single)[0, :len(row)])
    backward, _ = greedy(network, ROWS[::-1], network.encode(tiles[::-1]), 8)
    assert backward[::-1] == tokens
    wide, _ = network.prefill(torch.nn.functional.pad(pad(ROWS), (0, 5), value=3), lengths, image, 1)
    close(wide, logits[:, 0])


def test_rows_of_one_length_inside_padding(network, tiles):
    """Nothing is ragged here, but the padding still has to go when the new tokens come."""
    row = ROWS[0]
    image = network.encode(tiles[:1])
    _, cache = network.prefill(torch.tensor([row + [2, 2, 2]]), [len(row)], image, 2)
    text = row + [5, 6]
    for n in (1, 2):
        logits = network.decode(torch.tensor([text[len(row) + n - 1]]), cache)
        close(logits, network.read(torch.tensor([text[:len(row) + n]]), image)[:, -1])


def test_bfloat16_is_near_float32(network, tiles):
    half = copy.deepcopy(network).bfloat16()
    image, expected = half.encode(tiles), network(pad(ROWS), tiles)
    assert image.features.dtype == torch.bfloat16
    logits = half.read(pad(ROWS), image)
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    assert (logits - expected).std() < 0.05 * expected.std()
    _, seen = greedy(half, ROWS, image, 4)
    assert seen.isfinite().all()
    _, cache = half.prefill(pad(ROWS), [len(row) for row in ROWS], image, 1)
    tensors = [*cache.text_keys, *cache.text_values, cache.image_kv[0].key]
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


@pytest.mark.parametrize("rows, grids, fragments", [
    ([[5, IMAGE, IMAGE]], [[(1, 1)]], ["sequence 0", "2 image tokens", "1 images"]),
    ([[5, 6, 7]], [[(1, 1)]], ["sequence 0", "0 image tokens", "1 images"]),
    ([[5, IMAGE, 7]], [[]], ["sequence 0", "1 image tokens", "0 images"]),
    ([[5, IMAGE], [IMAGE, 6]], [[(1, 1)], []], ["sequence 1", "1 image tokens", "0 images"]),
    ([[5, 6], [IMAGE, 6]], [[], [(1, 1), (1, 2)]], ["sequence 1", "1 image tokens", "2 images"]),
    ([[5, IMAGE], [IMAGE, 6]], [[(1, 1)]], ["2 sequences"]),
    ([[5, IMAGE]], [[(2, 3)]], ["2 x 3"])])
def test_images_that_do_not_fit_the_text(network, rows, grids, fragments):
    """One line, by forward and by prefill."""
    tiles = [Tiles(torch.zeros(len(row), 4, 3, 28, 28), torch.tensor(row)) if row else None for row in grids]
    ids = torch.tensor(rows)
    for run in (lambda: network(ids, tiles),
                lambda: network.prefill(ids, [ids.shape[1]] * len(ids), network.encode(tiles), 1)):
        with pytest.raises(ValueError) as error:
            run()
        message = str(error.value)
        assert "\n" not in message and all(fragment in message for fragment in fragments), message


# ----- what it costs


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


@pytest.mark.parametrize("kept", [1, 7])
def test_flops_of_a_decoder_that_keeps_fewer_image_tokens(network, kept):
    """What a pruned cache costs: one step over the image tokens that are left."""
    ids, decoder = torch.tensor([[IMAGE, 5, 6]]), network.language_model
    cache = network.prefill(ids, [3], network.encode([random_tiles([(1, 2)], CONFIG.vision)]), 1)[1]
    columns = torch.arange(2 * TOKENS) < kept
    cache.image_kv = [kv.take(columns[None]) for kv in cache.image_kv]
    expected = decoder.flops(1, 3, kept, project_image=False)
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
