"""What the benchmark says of the complete model: how it is put together from a slice, and what is asked."""
from types import SimpleNamespace

import pytest
import torch
from small_benchmark import CONFIG, CPU

from benchmarks import whole
from benchmarks.subject import Subject, cut, random_model
from generate import generate
from model.image_tokens import ImageTokens
from pruning import Pruner, load

pytestmark = pytest.mark.usefixtures("small_measurements")
TOKENS = CONFIG.vision.tokens_per_tile
TOKEN_BYTES = 2 * 2 * CONFIG.text.num_key_value_heads * CONFIG.text.head_dim    # in one layer, bf16


def test_what_methods_cost_in_the_complete_model(run_benchmark):
    out, made = run_benchmark("--whole", "coreset,coreset:question=0,csp", "--keep", "0.5,0.25",
                              "--tiles", "2", "--layers", "4")
    rows = made["whole"]
    assert [(row["features"], row["method"], row["keep"]) for row in rows] == [
        (kind, method, keep) for kind in ("normal", "smooth") for method, keep in (
            ("none", 1.0), ("coreset", 0.5), ("coreset", 0.25), ("coreset question=0", 0.5),
            ("coreset question=0", 0.25), ("csp", 0.5), ("csp", 0.25))]
    layers = len(CONFIG.text.cross_attention_layers)
    for row in rows:
        kept = max(1, int(2 * TOKENS * row["keep"] + 0.5))
        assert row["image_kv_bytes"] == layers * kept * TOKEN_BYTES and row["tiles"] == 2
        assert row["prefill_ms"] == pytest.approx(row["full_prefill_ms"] + row["own_ms"] - row["saved_ms"])
        assert (row["saved_ms"] == 0) == (row["method"] in ("none", "csp"))         # csp cuts after prefill
        assert min(row["own_ms"], row["encode_ms"], row["slice_prefill_ms"]) > 0
    assert [(row["dtype"], row["positions"], row["tokens"]) for row in made["masks"]] == [
        (dtype, positions, n) for dtype in ("bfloat16", "float32") for positions in (7, 1)
        for n in (2 * TOKENS // 10, 2 * TOKENS)]
    assert all(min(row["none_ms"], row["mask_ms"], row["bias_ms"]) > 0 for row in made["masks"])
    assert "coreset question=0 0.25" in out and "bias / no mask" in out and made["rows"] == []


def test_the_encoder_is_put_together_from_a_slice(monkeypatch):
    sliced = Subject(random_model(cut(CONFIG, 4), CPU, torch.float32), generate, "tiny", CONFIG)
    asked = {}

    def in_turns(jobs, repeat, what):
        asked.update({name: job() for name, job in jobs.items()})
        return {"encode": [9, 10, 11], "layer": [2, 2, 8], "projector": [5, 4, 3]}

    monkeypatch.setattr(whole, "in_turns", in_turns)
    states = CONFIG.vision.output_dim / sliced.config.vision.output_dim
    assert sliced.config.vision.num_hidden_layers == 2 and CONFIG.vision.num_hidden_layers == 3
    assert whole.complete_encode(sliced, 1, 3) == 10 + 2 + 4 * (states - 1)
    assert min(asked.values()) > 0


def test_prefill_and_decode_are_put_together_from_a_slice(subject):
    """Of four layers of keys and values, the first of all 100 tokens and the others of 40."""
    image = subject.model.encode([subject.tiles(1, Pruner())])
    parts = whole.Parts(subject, image, 7, 2)
    parts.tokens, parts.subject = 100, SimpleNamespace(
        complete=SimpleNamespace(text=SimpleNamespace(cross_attention_layers=[0] * 4, num_hidden_layers=9)),
        complete_prefill=lambda image, text, head: 100 * image + 10 * text + head)
    clock = SimpleNamespace(projected=[100, 40], cached=[500, 300], bytes=77)
    results = {("keys_values", 100): [5.0, 6.0, 90.0], ("keys_values", 40): [2.0, 2.5, 2.25], "head": [1.0],
               "text": [{"prefill": 3.0, "decode": 4.0}], 0: [{"prefill": 20.0, "decode": 99.0, "own": 0.0}],
               1: [{"prefill": 15.0, "decode": 10.0, "own": 0.5}]}
    assert parts.row(load("coreset", keep=0.4), clock, results, 1) == {
        "keep": 0.4, "own_ms": 0.5, "saved_ms": 3 * (6 - 2.25), "own_bytes": 77, "full_prefill_ms": 2031.0,
        "prefill_ms": 2031 + 0.5 - 11.25, "token_ms": 100 * 5 + 10 * 2 + 1, "image_kv_bytes": 500 + 3 * 300,
        "slice_prefill_ms": 15.0}


@pytest.mark.parametrize(("question", "projected"), [(0.5, [TOKENS, TOKENS // 2]), (0, [TOKENS // 2] * 2)])
def test_the_tokens_that_layers_make_keys_of_are_counted(subject, question, projected):
    image = subject.model.encode([subject.tiles(1, Pruner())])
    pruner = load("coreset", keep=TOKENS // 2, question=question)
    watched = whole.Watched(pruner, CPU)
    answer = subject.answer(subject.prompt(1, 7), image, 1, watched)
    assert watched.projected == projected and sum(watched.cached) == answer.image_kv_stored


def test_the_peak_is_of_the_tensors_in_one_hook(subject):
    class Two(Pruner):
        """3 and 2 kB at a time in one hook, and 4 in another."""
        keeps_all = False

        def begin(self, model):
            self.one = torch.ones(256) + torch.zeros(256)
            self.two = self.one.view(16, 16)[2:]

        def encoded(self, image, prompts):
            both = torch.ones(256), torch.ones(256)
            del both
            self.one.mul_(2)
            self.three = [torch.ones(512) for _ in range(2)]
            return image

    clock = whole.Peak(Two(), CPU)
    subject.answer(subject.prompt(1, 7), subject.model.encode([subject.tiles(1, Pruner())]), 1, clock)
    assert clock.bytes == 4096


def test_smooth_tokens_are_like_their_neighbours():
    side = 40
    one = [(-1, -1), *((row, column) for row in range(side) for column in range(side))]
    coords = torch.tensor([[(0, tile, *place) for tile in (0, 1) for place in one]])
    image = ImageTokens(torch.zeros(1, 2 * len(one), 16), coords)
    features, flat = whole.smooth(image), whole.normal(image)
    assert torch.equal(features, whole.smooth(image)) and features.shape == flat.shape == image.features.shape
    tiles = features.view(2, len(one), 16)[:, 1:].unflatten(1, (side, side))
    beside, below = tiles[:, :, 1:] - tiles[:, :, :-1], tiles[:, 1:] - tiles[:, :-1]
    for near in beside, below:
        assert 0.5 * whole.NOISE ** 2 < near.var() < 0.5 < 1.5 < (tiles[0] - tiles[1]).var()
    assert features.view(2, len(one), 16)[:, 0].std() < 2 * whole.NOISE
    assert abs(float(flat.std()) - 1) < 0.1 and (flat[:, 1:] - flat[:, :-1]).var() > 1.5


def test_a_slice_with_one_cross_attention_layer_is_refused(run_benchmark, capsys):
    with pytest.raises(SystemExit):
        run_benchmark("--whole", "random", "--layers", "2")
    assert "it needs two" in capsys.readouterr().err.splitlines()[-1]
