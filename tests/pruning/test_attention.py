"""Attention as methods compute it, against plain loops in float64, and the memory that it takes."""
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.measure import Allocated
from model.image_tokens import ImageKV, Queries
from pruning import attention
from pruning.attention import attention_received, peak_bytes, positions_at_once

WIDTH = 8
# Of each sequence: the image of every token, -1: none, and the images that each position sees.
IMAGES = [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, -1, -1, -1, -1], [-1] * 7, [0, 1, 1, 1, 2, 2, -1]]
SEEN = [[(0, 0), (0, 1), (0, 1), (0, 2), (0, 2), (0, 0)], [(0, 0), (0, 0), (0, 1), (0, 1), (0, 1), (0, 1)],
        [(0, 0)] * 6, [(0, 1), (1, 2), (1, 3), (1, 3), (0, 0), (0, 0)]]


def example(seed: int, heads: int, kv_heads: int, sets: int = 1) -> tuple[Queries, ImageKV]:
    """A ragged batch; with `sets` > 1 every key/value head has other tokens, of other images."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.tensor(IMAGES)[:, None].repeat(1, sets, 1)                   # [B, K, N]
    for head in range(1, sets):
        images[3, head, 1:] = images[3, 0, :-1]
    coords, mask = images[..., None].expand(-1, -1, -1, 4), images >= 0
    q, key = (3 * torch.randn(4, n, t, WIDTH, generator=generator) for n, t in ((heads, 6), (kv_heads, 7)))
    return Queries(q, torch.tensor(SEEN)), ImageKV(key, key, coords, mask)


def naive(queries: Queries, kv: ImageKV, positions: str | Tensor) -> Tensor:
    """[B, H, N] float64: a softmax for each position over the tokens that it sees, a number at a time."""
    B, H, T, d = queries.q.shape
    G, N = kv.key.shape[1:3]
    received = torch.zeros(B, H, N, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            g, last = h // (H // G), {}
            k = g if kv.coords.shape[1] > 1 else 0
            for t in range(T):
                low, high = queries.seen[b, t].tolist()
                sees = [n for n in range(N) if (kv.mask is None or kv.mask[b, k, n])
                        and low <= int(kv.coords[b, k, n, 0]) < high]
                dots = [float(queries.q[b, h, t].double() @ kv.key[b, g, n].double()) / math.sqrt(d)
                        for n in sees]
                total = sum(map(math.exp, dots))
                for n, dot in zip(sees, dots, strict=True):
                    last[n] = math.exp(dot) / total
                    if isinstance(positions, Tensor) and positions[b, t] or positions is ALL:
                        received[b, h, n] += last[n]
            for n, weight in last.items() if positions is LAST else ():
                received[b, h, n] = weight
    return received


ALL, LAST = "all", "last"


def reduced(received: Tensor, per: str, kv_heads: int) -> Tensor:
    if per == "kv_head":
        return received.unflatten(1, (kv_heads, -1)).mean(2)
    return received.mean(1) if per == "layer" else received


@pytest.mark.parametrize("chunk", [None, 1, 2], ids=["one chunk", "a position a chunk", "two a chunk"])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1), (6, 2)], ids=str)
@pytest.mark.parametrize("positions", [ALL, LAST])
def test_attention_received_is_a_plain_softmax(positions, heads, kv_heads, chunk, monkeypatch):
    """Of a ragged batch of several images, with padding of text and images, and positions that see none."""
    queries, kv = example(heads + kv_heads, heads, kv_heads)
    if chunk:
        monkeypatch.setattr(attention, "CHUNK_BYTES", chunk * heads * 7 * 4)
        assert positions_at_once(heads, 7) == chunk
    expected = naive(queries, kv, positions)
    for per in "head", "kv_head", "layer":
        received = attention_received(queries, kv, positions, per)
        assert received.dtype == torch.float32
        torch.testing.assert_close(received.double(), reduced(expected, per, kv_heads), atol=1e-5, rtol=1e-5)
    visible = kv.coords[:, 0, :, 0] >= 0
    assert (expected[:, 0] > 0).equal(visible & torch.tensor([True, True, False, True])[:, None])
    assert not attention_received(queries, kv, positions).masked_select(~visible[:, None]).any()


@pytest.mark.parametrize("positions", [ALL, LAST])
def test_every_head_may_have_a_set_of_its_own(positions):
    queries, kv = example(5, 4, 2, sets=2)
    received = attention_received(queries, kv, positions)
    torch.testing.assert_close(received.double(), naive(queries, kv, positions), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_some_positions_alone(seed):
    """Those where a mask [B, T] is True; of them, those that see an image."""
    queries, kv = example(seed, 4, 2)
    asked = torch.rand(4, 6, generator=torch.Generator().manual_seed(seed)) < 0.5
    received = attention_received(queries, kv, asked)
    torch.testing.assert_close(received.double(), naive(queries, kv, asked), atol=1e-5, rtol=1e-5)
    everywhere = attention_received(queries, kv, torch.ones_like(asked))
    assert torch.equal(everywhere, attention_received(queries, kv))


def test_another_function_than_softmax():
    """It is given the scores [H, t, N] of a chunk, with -inf where a position does not see a token."""
    queries, kv = example(3, 4, 2)

    def counted(scores: Tensor) -> Tensor:
        return scores.isfinite().float()
    seen = attention_received(queries, kv, per="layer", softmax=counted)
    expected = [[sum(first <= image < stop for first, stop in own) for image in images]
                for images, own in zip(IMAGES, SEEN, strict=True)]
    assert seen.tolist() == expected


def test_attention_of_half_precision_is_made_in_fp32():
    queries, kv = example(6, 4, 2)
    half = Queries(queries.q.bfloat16(), queries.seen), replace(kv, key=kv.key.bfloat16())
    exact = Queries(half[0].q.float(), queries.seen), replace(kv, key=half[1].key.float())
    assert torch.equal(attention_received(*half), attention_received(*exact))


def test_positions_that_see_nothing_give_nothing():
    queries, kv = example(7, 4, 2)
    blind = Queries(queries.q, torch.zeros_like(queries.seen))
    assert not attention_received(blind, kv).any() and not attention_received(blind, kv, "last").any()


def test_chunks_have_the_positions_they_are_said_to_have(monkeypatch):
    queries, kv = example(8, 4, 2)
    monkeypatch.setattr(attention, "CHUNK_BYTES", 2 * 4 * 7 * 4 + 5)
    chunks = list(attention.attention_weights(queries, kv, 0, torch.ones(6, dtype=torch.bool)))
    assert [which.tolist() for which, _ in chunks] == [[1, 2], [3, 4]]      # 0 and 5 see nothing
    assert all(weights.shape == (4, 2, 7) and weights.dtype == torch.float32 for _, weights in chunks)
    monkeypatch.setattr(attention, "CHUNK_BYTES", 1)
    assert positions_at_once(32, 6404) == 1                                      # never none


# ----- memory


def test_peak_bytes_of_the_11b_model():
    """A 512-token prompt about an image of four tiles: 32 query heads, 8 key/value heads, 6,404 tokens."""
    assert peak_bytes(32, 8, 6404, 128) < 75e6
    assert positions_at_once(32, 6404) == 2 ** 24 // (32 * 6404 * 4) == 20


@pytest.mark.parametrize("positions", [ALL, LAST])
def test_peak_bytes_is_what_is_allocated(positions):
    """With the shapes of the 11B model and three chunks of positions; more of them only make more chunks."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 32, 90, 128, generator=generator).bfloat16()
    key = torch.randn(1, 8, 6404, 128, generator=generator).bfloat16()
    kv = ImageKV(key, key, torch.zeros(1, 1, 6404, 4, dtype=torch.long))
    with torch.inference_mode(), Allocated() as allocated:
        attention_received(Queries(q, torch.tensor([0, 1]).expand(1, 90, 2)), kv, positions)
    assert allocated.peak <= peak_bytes(32, 8, 6404, 128), f"{allocated.peak / 1e6:.0f} MB"
    assert positions is LAST or allocated.peak > 0.7 * peak_bytes(32, 8, 6404, 128)
