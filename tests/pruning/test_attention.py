"""The attention that methods look at, the choice of the highest, and how methods and options are found.

`column_mass` is held against plain loops in float64, its memory against what PyTorch allocates.
"""
import math
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cli import catalogue, parse_option
from model.image_tokens import ImageKV, ImageTokens, Queries
from pruning import METHODS, attention, find, load, options
from pruning.attention import attention_received, peak_bytes, rows_at_once
from pruning.pruner import fits, num_kept, top_k_mask

WIDTH = 8
# Of each batch row: the image of every column, -1: none, and the images that each text row sees.
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


def naive(queries: Queries, kv: ImageKV, rows: str) -> Tensor:
    """[B, H, N] float64: a softmax a row over the columns that it sees, added up a number at a time."""
    B, H, T, d = queries.q.shape
    G, N = kv.key.shape[1:3]
    mass = torch.zeros(B, H, N, dtype=torch.float64)
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
                    if rows == "all":
                        mass[b, h, n] += math.exp(dot) / total
                    last[n] = math.exp(dot) / total
            for n, weight in last.items() if rows == "last" else ():
                mass[b, h, n] = weight
    return mass


def reduced(mass: Tensor, heads: str, kv_heads: int) -> Tensor:
    return {"query": mass, "layer": mass.mean(1), "kv": mass.unflatten(1, (kv_heads, -1)).mean(2)}[heads]


@pytest.mark.parametrize("chunk", [None, 1, 2], ids=["one chunk", "a row a chunk", "two rows a chunk"])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1), (6, 2)], ids=str)
@pytest.mark.parametrize("rows", ["all", "last"])
def test_column_mass_is_a_plain_softmax(rows, heads, kv_heads, chunk, monkeypatch):
    """Of a ragged batch of several images, with padding rows, padding columns and rows that see nothing."""
    queries, kv = example(heads + kv_heads, heads, kv_heads)
    if chunk:
        monkeypatch.setattr(attention, "CHUNK_BYTES", chunk * heads * 7 * 4)
        assert rows_at_once(heads, 7) == chunk
    expected = naive(queries, kv, rows)
    for by in "query", "kv", "layer":
        mass = attention_received(queries, kv, rows, by)
        assert mass.dtype == torch.float32
        torch.testing.assert_close(mass.double(), reduced(expected, by, kv_heads), atol=1e-5, rtol=1e-5)
    visible = kv.coords[:, 0, :, 0] >= 0
    assert (expected[:, 0] > 0).equal(visible & torch.tensor([True, True, False, True])[:, None])
    mass = attention_received(queries, kv, rows)
    assert not mass.masked_select(~visible[:, None]).any()


@pytest.mark.parametrize("rows", ["all", "last"])
def test_column_mass_where_every_head_has_a_set_of_its_own(rows):
    queries, kv = example(5, 4, 2, sets=2)
    mass = attention_received(queries, kv, rows)
    torch.testing.assert_close(mass.double(), naive(queries, kv, rows), atol=1e-5, rtol=1e-5)


def test_column_mass_of_half_precision_is_made_in_fp32():
    queries, kv = example(6, 4, 2)
    half = Queries(queries.q.bfloat16(), queries.seen), replace(kv, key=kv.key.bfloat16())
    exact = Queries(half[0].q.float(), queries.seen), replace(kv, key=half[1].key.float())
    assert torch.equal(attention_received(*half), attention_received(*exact))


def test_the_mass_of_rows_that_see_nothing_is_nothing():
    queries, kv = example(7, 4, 2)
    blind = Queries(queries.q, torch.zeros_like(queries.seen))
    assert not attention_received(blind, kv).any() and not attention_received(blind, kv, "last").any()


def test_chunks_have_the_rows_they_are_said_to_have(monkeypatch):
    queries, kv = example(8, 4, 2)
    monkeypatch.setattr(attention, "CHUNK_BYTES", 2 * 4 * 7 * 4 + 5)
    chunks = list(attention.row_weights(queries, kv, 0, torch.ones(6, dtype=torch.bool)))
    assert [rows.tolist() for rows, _ in chunks] == [[1, 2], [3, 4]]        # 0 and 5 see nothing
    assert all(weights.shape == (4, 2, 7) and weights.dtype == torch.float32 for _, weights in chunks)
    monkeypatch.setattr(attention, "CHUNK_BYTES", 1)
    assert rows_at_once(32, 6404) == 1                                      # never none


# ----- memory


class Allocated(TorchDispatchMode):
    """Bytes of the storages that are alive of those made inside, and the most there were."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def free(self, size: int):
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {id(t.untyped_storage()) for t in tensors((args, kwargs or {}))}
        result = function(*args, **(kwargs or {}))
        for tensor in tensors(result):
            storage = tensor.untyped_storage()
            if storage not in self.known and id(storage) not in given:
                self.known.add(storage)
                weakref.finalize(storage, self.free, storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return result


def tensors(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def test_peak_bytes_of_the_11b_model():
    """A 512-token prompt about an image of four tiles: 32 query heads, 8 key/value heads, 6,404 tokens."""
    assert peak_bytes(32, 8, 6404, 128) < 150e6
    assert rows_at_once(32, 6404) == 2 ** 25 // (32 * 6404 * 4) == 40


@pytest.mark.parametrize("rows", ["all", "last"])
def test_peak_bytes_is_what_is_allocated(rows):
    """With the shapes of the 11B model and three chunks of rows; more rows make more chunks alone."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 32, 90, 128, generator=generator).bfloat16()
    key = torch.randn(1, 8, 6404, 128, generator=generator).bfloat16()
    kv = ImageKV(key, key, torch.zeros(1, 1, 6404, 4, dtype=torch.long))
    with torch.inference_mode(), Allocated() as allocated:
        attention_received(Queries(q, torch.tensor([0, 1]).expand(1, 90, 2)), kv, rows)
    assert allocated.peak <= peak_bytes(32, 8, 6404, 128), f"{allocated.peak / 1e6:.0f} MB"
    assert rows == "last" or allocated.peak > 0.7 * peak_bytes(32, 8, 6404, 128)


# ----- the highest, and how many


def image_of(which: list[int]) -> ImageTokens:
    which = torch.tensor([which])
    return ImageTokens(which[..., None].float(), which[..., None].expand(-1, -1, 4), which >= 0)


@pytest.mark.parametrize("scores, keep, which, kept", [
    ([0.3, 0.5, 0.3, 0.3], 2, [0, 0, 0, 0], [0, 1]),                        # ties: the first
    ([0.0] * 5, 3, [0] * 5, [0, 1, 2]),
    ([0.1, 0.2, 0.3, 0.4], 0.5, [0] * 4, [2, 3]),
    ([0.1, 0.2, 0.3, 0.4], 0.625, [0] * 4, [1, 2, 3]),                      # 2.5: half up
    ([0.1, 0.2, 0.3, 0.4], 0.01, [0] * 4, [3]),                             # at least one
    ([0.1, 0.2, 0.3, 0.4], 99, [0] * 4, [0, 1, 2, 3]),
    ([9.0, 8.0, 0.1, 0.2], 1, [0, 0, 1, 1], [0, 3]),                        # of every image
    ([9.0, 8.0, 7.0, 0.1, 0.2], 0.5, [0, 0, 0, 1, 1], [0, 1, 4]),
    ([0.1, 0.2, 9.0, 9.0], 2, [0, 0, -1, -1], [0, 1]),                      # never padding
    ([0.1, 0.2, 0.3, 9.0], 0.5, [0, 0, 0, -1], [1, 2])])
def test_top(scores, keep, which, kept):
    """Alike for scores [B, N] and [B, K, N], of ImageTokens and of an ImageKV."""
    image, scores = image_of(which), torch.tensor([scores])
    kv = ImageKV(torch.zeros(1, 2, len(which), 1), torch.zeros(1, 2, len(which), 1), image.coords[:, None],
                 image.mask[:, None])
    for tokens in image, kv:
        assert top_k_mask(scores, keep, tokens)[0].nonzero()[:, 0].tolist() == kept
        for head in top_k_mask(scores[:, None].expand(-1, 3, -1), keep, tokens)[0]:
            assert head.nonzero()[:, 0].tolist() == kept


@pytest.mark.parametrize("keep, tokens, expected", [
    (0.5, 1601, 801), (0.1, 1601, 160), (0.01, 1601, 16), (0.25, 1601, 400), (0.2, 1601, 320),
    (0.15, 1601, 240), (0.05, 1601, 80), (0.25, 6404, 1601), (0.2, 6404, 1281), (0.15, 6404, 961),
    (0.1, 6404, 640), (0.05, 6404, 320), (1.0, 1601, 1601), (1e-9, 1601, 1), (0.15, 10, 2), (0.35, 10, 4),
    (0.29, 50, 15), (0.07, 50, 4), (0.145, 100, 15), (300, 1601, 300), (1601, 1601, 1601), (9999, 1601, 1601),
    (1, 1601, 1)])
def test_count(keep, tokens, expected):
    """Half up, also where the fraction in floating point lies a little below."""
    assert num_kept(keep, torch.tensor([tokens, tokens])).tolist() == [expected] * 2


# ----- methods and options


MINE = '''
from dataclasses import dataclass
from typing import Literal
from pruning import Pruner

NOT_A_PRUNER = 5

class Other:
    pass

@dataclass
class Mine(Pruner):
    """Does nothing."""
    taste: Literal["sweet", "sour"] = "sweet"
    depth: int | None = None
'''


@pytest.fixture
def mine(tmp_path) -> str:
    (tmp_path / "mine.py").write_text(MINE)
    return str(tmp_path / "mine.py")


def refused(function, *fragments: str):
    """ValueError with one line that holds all of these."""
    with pytest.raises(ValueError) as error:
        function()
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in fragments), message


@pytest.mark.parametrize("method", METHODS)
def test_registered_methods(method):
    pruner = load(method)
    assert type(pruner) is find(method) is METHODS[method] and pruner.name == method
    assert set(options(METHODS[method])) >= {"keep"} and method in catalogue()
    refused(lambda: load(method, nonsense=1), "'nonsense'", *options(METHODS[method]))
    nothing = [None] if METHODS[method].keep is not None else []       # who may do without finds a number
    for keep in 0, 0.0, -1, 1.5, -0.5, True, "half", float("nan"), float("inf"), [0.5], *nothing:
        refused(lambda keep=keep: load(method, keep=keep), method, "keep", repr(keep))


@pytest.mark.parametrize("method, settings, fragments", [
    ("fastvv", {}, ["'fastvv'", *METHODS, "mine.py:Mine"]), ("", {}, [*METHODS]), ("Pruner", {}, [*METHODS]),
    ("fastv", {"rows": "first"}, ["fastv", "rows", "'first'", "last", "all"]),
    ("fastv", {"full_layers": 1.5}, ["full_layers", "1.5", "whole number"]),
    ("fastv", {"seed": "x"}, ["seed", "'x'"]),
    ("trimmed_llama", {"per": "head"}, ["'head'", "query", "kv_head"]),
    ("trimmed_llama", {"budget": "all"}, ["budget", "'all'", "none"]),
    ("trimmed_llama", {"early_caches": True}, ["early_caches", "True", "trim", "full"]),
    ("random", {"when": "later"}, ["when", "'later'", "prefill", "boundary"]),
    ("downsample", {"keep": 3}, ["downsample", "3", "fraction"])], ids=str)
def test_what_is_unknown_gets_one_line(method, settings, fragments):
    refused(lambda: load(method, **settings), *fragments)


@pytest.mark.parametrize("text, expected", [
    ("keep=0.5", ("keep", 0.5)), ("keep=3", ("keep", 3)), ("a=TRUE", ("a", True)), ("a=false", ("a", False)),
    ("a=None", ("a", None)), ("rows=last", ("rows", "last")), ("a=1e-3", ("a", 0.001)),
    ("a=x=y", ("a", "x=y")), ("a=-2", ("a", -2)), ("a=", ("a", ""))])
def test_parse_knob(text, expected):
    name, value = parse_option(text)
    assert (name, value) == expected and type(value) is type(expected[1])


@pytest.mark.parametrize("text", ["keep", "=3", "", "="])
def test_a_knob_that_is_none(text):
    refused(lambda: parse_option(text), repr(text), "option=value")


def test_fits():
    good = [(1, int), (1, float), (0.5, float), (True, bool), ("x", str), (None, int | None),
            (2, float | int), ("a", Literal["a", "b"])]
    bad = [(True, int), (1, bool), (True, float), (0.5, int), (None, int), (float("nan"), float), (1, str),
           ("c", Literal["a", "b"])]
    assert all(fits(*pair) for pair in good) and not any(fits(*pair) for pair in bad)


def test_a_class_from_a_file(mine):
    pruner = load(f"{mine}:Mine", keep=0.5, taste="sour", depth=2)
    assert (pruner.name, pruner.taste, pruner.depth) == ("mine", "sour", 2) and "sour" in str(pruner)
    refused(lambda: load(f"{mine}:Mine", taste="salty"), "mine", "taste", "'salty'", "sweet", "sour")
    refused(lambda: load(f"{mine}:Mine", tast="sour"), "'tast'", "taste", "depth", "keep")
    for name in "Missing", "Other", "NOT_A_PRUNER", "":
        refused(lambda name=name: load(f"{mine}:{name}"), mine, repr(name), "Pruner")


def test_a_class_from_a_file_with_postponed_annotations(mine, tmp_path):
    """They are text until somebody asks, and mean something in their own file only."""
    path = tmp_path / "later.py"
    path.write_text("from __future__ import annotations\n" + MINE)
    assert load(f"{path}:Mine", taste="sour").taste == "sour"
    refused(lambda: load(f"{path}:Mine", taste="salty"), "sweet", "sour")


@pytest.mark.parametrize("text, fragment", [
    ("def broken(:\n", "SyntaxError"), ("import no_such_package_anywhere", "ModuleNotFoundError"),
    ("raise RuntimeError('two\\nlines')", "RuntimeError"), ("1 / 0", "ZeroDivisionError")])
def test_a_file_that_cannot_be_run(tmp_path, text, fragment):
    path = tmp_path / "broken.py"
    path.write_text(text)
    refused(lambda: load(f"{path}:Mine"), str(path), fragment)


def test_a_file_that_is_not_there(tmp_path):
    refused(lambda: load(f"{tmp_path}/nowhere.py:Mine"), "nowhere.py", "no such file")
    refused(lambda: load(f"{tmp_path}:Mine"), *METHODS)
