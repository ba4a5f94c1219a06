"""The transformers that the benchmark compares with: the same weights, the same numbers once it is corrected,
the same inputs of every pass as its own `generate` passes, one graph where it compiles, and our decode loop.
"""
import pytest
import torch
from helpers import random_tiles
from peer_models import SHAPES, make, prompts
from torch import Tensor
from transformers import CompileConfig

from benchmarks.peer import Peer, PeerImage
from generate import generate
from model.image_tokens import Tiles
from model.llama_vision import LlamaVision

CLOSE = {"atol": 1e-4, "rtol": 0}
DIFFERENT = 1e-2
STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=[*SHAPES, "tiny"])
def pair(request) -> tuple[LlamaVision, dict[bool, Peer]]:
    return make(request.param)


@pytest.fixture(scope="module")
def plain() -> tuple[LlamaVision, dict[bool, Peer]]:
    return make("plain")


def answer(peer: Peer, ids: Tensor, image: PeerImage, steps: int) -> Tensor:
    """The logits of a greedy answer [steps + 1, B, V]."""
    logits, cache = peer.prefill(ids, [ids.shape[1]] * len(ids), image, steps)
    steps_logits = [logits]
    for _ in range(steps):
        steps_logits.append(peer.decode(steps_logits[-1].argmax(-1), cache))
    return torch.stack(steps_logits)


# ----- the same network


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("grids", [[(1, 1)], [(1, 2)], [(2, 2)], [(2, 1), (1, 1)]], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_equal_once_corrected(pair, batch, grids, static):
    """Prefill and greedy steps; its cache has every tile slot, ours the real tiles: 4x for one tile."""
    ours, peers = pair
    peer = peers[static]
    tiles, ids = random_tiles(grids, ours.config.vision), prompts(ours.config, batch, len(grids))
    lengths = [ids.shape[1]] * batch
    logits, cache = ours.prefill(ids, lengths, ours.encode([tiles]).expand(batch), STEPS)
    with peer.corrected():
        theirs, their_cache = peer.prefill(ids, lengths, peer.encode(tiles), STEPS)
        assert logits.std() > 0.5                                   # so that 1e-4 says something
        torch.testing.assert_close(theirs, logits, **CLOSE)
        for _ in range(STEPS):
            tokens = logits.argmax(-1)
            logits = ours.decode(tokens, cache)
            torch.testing.assert_close(peer.decode(tokens, their_cache), logits, **CLOSE)
    real, slots = sum(rows * columns for rows, columns in grids), 4 * len(grids)
    assert their_cache.image_bytes() * real == cache.image_bytes() * slots


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_both_are_decoded_by_the_same_loop(pair, static):
    """`generate` gives the same answers of both."""
    ours, peers = pair
    peer = peers[static]
    tiles, ids = random_tiles([(1, 2)], ours.config.vision), prompts(ours.config, 2)
    expected = generate(ours, ids.tolist(), ours.encode([tiles]).expand(2), STEPS + 1, ())
    with peer.corrected():
        theirs = generate(peer, ids.tolist(), peer.encode(tiles), STEPS + 1, ())
    assert theirs.tokens == expected.tokens and theirs.decoded == expected.decoded == 2 * STEPS
    assert theirs.image_kv_bytes == 2 * expected.image_kv_bytes and theirs.kept == [[], []]
    assert theirs.seen == [2 * count for count in expected.seen]
    text = ours.config.text
    own = text.num_hidden_layers - len(text.cross_attention_layers)
    tokens = ids.shape[1] + STEPS + 1 if static else ids.shape[1] + STEPS           # the last one is not read
    assert theirs.text_kv_bytes == own * 2 * text.num_key_value_heads * text.head_dim * 4 * 2 * tokens


def test_both_deviations_are_left_as_shipped(plain):
    """Each of them alone changes the numbers, and `corrected` leaves nothing behind."""
    ours, peers = plain
    peer = peers[False]
    ids = prompts(ours.config, 1)
    tiles = random_tiles([(1, 1)], ours.config.vision)
    logits, _ = ours.prefill(ids, [11], ours.encode([tiles]), 1)
    shipped = peer.encode(tiles)
    with peer.corrected():
        image = peer.encode(tiles)
        late_taps, _ = peer.prefill(ids, [11], shipped, 1)
        corrected, _ = peer.prefill(ids, [11], image, 1)
    leaky_positions, _ = peer.prefill(ids, [11], image, 1)
    both, _ = peer.prefill(ids, [11], shipped, 1)
    torch.testing.assert_close(corrected, logits, **CLOSE)
    for wrong in late_taps, leaky_positions, both:
        assert (wrong - logits).abs().max() > DIFFERENT
    assert torch.equal(peer.encode(tiles).states, shipped.states)
    assert not torch.equal(image.states, shipped.states)


def test_the_same_memory(pair):
    """Every parameter is ours, and nothing is left without memory."""
    ours, peers = pair
    peer = peers[False]
    held = {parameter.data_ptr(): parameter.shape for parameter in ours.parameters()}
    theirs = list(peer.model.parameters())
    assert {parameter.data_ptr(): parameter.shape for parameter in theirs} == held
    assert len(theirs) == len(held)
    assert not any(tensor.is_meta for tensor in [*theirs, *peer.model.buffers()])
    assert {part._attn_implementation for part in (peer.model.config, peer.model.config.text_config,
                                                   peer.model.config.vision_config)} == {"sdpa"}


def test_encode_takes_images_of_all_grids(plain):
    """Side by side as alone, and all their tile slots."""
    ours, peers = plain
    peer = peers[False]
    tiles = random_tiles([(1, 1), (2, 2), (1, 3)], ours.config.vision)
    image = peer.encode(tiles)
    assert image.states.shape == (3, 4 * 5, 32) and image.grids == [(1, 1), (2, 2), (1, 3)]
    alone = peer.encode(Tiles(tiles.pixels[1:2], tiles.grid[1:2]))
    torch.testing.assert_close(image.states[1:2], alone.states, atol=1e-5, rtol=0)


# ----- run as its own generate runs it


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("batch", [1, 3])
def test_like_its_own_generate(plain, monkeypatch, batch, static):
    """The same logits, and in every step the very inputs that its generate passes."""
    ours, peers = plain
    peer = peers[static]
    ids = prompts(ours.config, batch)
    tiles, inputs = random_tiles([(1, 2)], ours.config.vision), []
    hook = peer.model.register_forward_pre_hook(lambda *call: inputs.append(call[2]), with_kwargs=True)
    monkeypatch.setattr(peer, "eager", True)                # as its generate does on a CPU
    logits = answer(peer, ids, peer.encode(tiles), STEPS)
    run, inputs[:] = inputs[:], []
    peer.model.generation_config.eos_token_id = None                # or it may stop early
    expected = peer.model.generate(
        input_ids=ids, pixel_values=tiles.pixels[None].expand(batch, -1, -1, -1, -1, -1),
        aspect_ratio_ids=torch.full((batch, 1), 2), aspect_ratio_mask=torch.tensor([[[1, 1, 0, 0]]] * batch),
        cross_attention_mask=run[0]["cross_attention_mask"], max_new_tokens=STEPS + 1, do_sample=False,
        return_dict_in_generate=True, output_logits=True, cache_implementation="static" if static else None)
    hook.remove()
    torch.testing.assert_close(logits, torch.stack(expected.logits), atol=1e-5, rtol=0)
    assert len(run) == len(inputs) == STEPS + 1
    pixels = {"pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"}
    seen = {name: value for name, value in given(inputs[0], peer).items() if name not in pixels}
    passed = {name: value for name, value in given(run[0], peer).items() if name != "cross_attention_states"}
    assert passed == seen
    assert [given(call, peer) for call in run[1:]] == [given(call, peer) for call in inputs[1:]]
    caches = [call[-1][peer.cache_argument] for call in (run, inputs)]
    assert type(caches[0]) is type(caches[1]) and caches[0] is not caches[1]
    held = [[(type(layer), layer.keys.shape) for layer in cache.layers] for cache in caches]
    assert held[0] == held[1]


def given(call: dict, peer: Peer) -> dict:
    """The arguments of a pass that are not None, without the cache, in a form that can be compared."""
    return {name: (value.tolist(), value.stride()) if isinstance(value, Tensor) else value
            for name, value in call.items() if value is not None and name != peer.cache_argument}


def test_logits_of_the_last_position_only(plain):
    ours, peers = plain
    peer = peers[False]
    tiles, shapes = random_tiles([(1, 1)], ours.config.vision), []
    hook = peer.model.lm_head.register_forward_pre_hook(lambda head, args: shapes.append(args[0].shape))
    logits, _ = peer.prefill(prompts(ours.config, 3), [11] * 3, peer.encode(tiles), 1)
    hook.remove()
    assert shapes == [(3, 1, 32)] and logits.shape == (3, 60) and logits.dtype == torch.float32


def test_images_of_their_own(plain):
    """An image for each sequence gives what each sequence gives alone."""
    ours, peers = plain
    peer = peers[False]
    ids, grids = prompts(ours.config, 2), [(1, 1)]
    states = peer.encode(random_tiles(grids * 2, ours.config.vision)).states
    both, _ = peer.prefill(ids, [11] * 2, PeerImage(states, grids), 1)
    for b in 0, 1:
        alone, _ = peer.prefill(ids[b:b + 1], [11], PeerImage(states[b:b + 1], grids), 1)
        torch.testing.assert_close(both[b:b + 1], alone, atol=1e-5, rtol=0)
    assert (both[0] - both[1]).abs().max() > DIFFERENT


def test_one_graph(plain, monkeypatch):
    """The compiled step is one graph for all prompts of a shape, and gives what eager decoding gives."""
    ours, peers = plain
    peer, graphs = peers[True], []

    def backend(graph: torch.fx.GraphModule, inputs: list, mode: str):
        graphs.append((graph, mode))
        return graph.forward

    default = CompileConfig()
    assert (peer.compiling.mode, peer.compiling.backend) == (default.mode, default.backend)
    monkeypatch.setattr(peer, "compiling", CompileConfig(fullgraph=peer.compiling.fullgraph, backend=backend,
                                                         dynamic=peer.compiling.dynamic))
    ids = prompts(ours.config, 2)
    image = peer.encode(random_tiles([(1, 1)], ours.config.vision))
    for text in ids, ids.flip(0):
        compiled = answer(peer, text, image, STEPS)
        eager = answer(peers[False], text, image, STEPS)
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=0)
        assert torch.equal(compiled.argmax(-1), eager.argmax(-1))
    assert [mode for _, mode in graphs] == ["reduce-overhead"]


def test_a_static_cache_is_used_again(plain):
    """At the same addresses, as a CUDA graph needs, without the last prompt; one shape at a time."""
    ours, peers = plain
    peer, ids = peers[True], prompts(ours.config, 2)
    images = [peer.encode(random_tiles([grid], ours.config.vision)) for grid in ((1, 1), (2, 2))]
    with peer.corrected():                                          # which decodes eagerly
        first, cache = peer.prefill(ids, [11] * 2, images[0], STEPS)
        places = [layer.keys.data_ptr() for layer in cache.kv.layers]
        peer.decode(first.argmax(-1), cache)
        other, _ = peer.prefill(ids.flip(0), [11] * 2, images[1], STEPS)
        again, cache = peer.prefill(ids, [11] * 2, images[0], STEPS)
        assert places == [layer.keys.data_ptr() for layer in cache.kv.layers]
        torch.testing.assert_close(again, first, atol=0, rtol=0)
        assert (other - first).abs().max() > DIFFERENT
        peer.prefill(ids, [11] * 2, images[0], STEPS + 1)
        assert len(peer.static_caches) == 1
