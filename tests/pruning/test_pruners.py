"""What every pruning method promises, one matrix over all of them.

Add your own with `pytest tests/test_pruners.py --pruner ./mine.py:Mine`. The methods run inside the real
`generate.generate`; what they left is read off the caches, and the network is computed once more by hand with
everything else masked. Networks of one, two and four query heads to a key/value head; batches that mix text
alone, one image and several, of other shapes and prompts of other lengths.
"""
import copy
import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from generate import generate
from model.image_tokens import ImageKV, ImageTokens
from pruning import METHODS, Pruner, SelectOnce, hooks
from pruning.methods.trimmed_llama import TrimmedLlama

I = 60          # noqa: E741  the image token, as prompts show it
PROMPTS = [[5, 6, I, 7, 8, 9, 10, 11], [12, 13, 14], [I, 5, 15, I, 16, 17], [9, 8, I, I, 18], [4, 19, 20, I]]
GRIDS = [[(2, 2)], [], [(1, 1), (1, 3)], [(1, 2), (2, 1)], [(1, 1)]]     # rows, columns of tiles, by prompt
QUESTIONS = [[5, 6, I, 7, 8, 9], [I, 11, 12], [13, I, 14, 15, 16, 17, 18]]  # about the same image
KEEPS = [{"keep": 0.25}, {"keep": 0.6}]
OPTIONS = {
    "trimmed_llama": [{"keep": 3, "per": "kv_head"}, {"keep": 0.1, "when": "boundary"},
                      {"keep": 0.1, "early_caches": "full"}, {"keep": 2, "budget": 4, "full_layers": 2},
                      {"keep": 0.2, "full_layers": 0}],
    "fastv": [{"keep": 3, "positions": "all"}, {"keep": 0.4, "full_layers": 0, "seed": 3},
              {"keep": 0.3, "full_layers": 2, "early_caches": "trim"}, {"keep": 0.3, "when": "boundary"},
              {"keep": 0.3, "when": "step", "early_caches": "trim"}],
    "elastic_cache": [{"keep": 3, "bucket_scope": "sequence"}, {"keep": 0.3, "drop": True},
                      {"keep": 0.3, "mass_bias": True, "protect_cls": True}],
    "csp": [{"keep": 3, "per": "layer"}, {"keep": 0.3, "n": 0.0, "observed": 2}],
    "aircache": [{"keep": 3, "alpha": 0.3}, {"keep": 0.2, "strength": "none", "alpha": 0.0},
                 {"keep": 0.9, "alpha": 1.0}],
    "zipvl": [{"tau": 0.8}, {"tau": 0.6, "per": "kv_head"}, {"tau": 0.7, "when": "boundary"},
              {"keep": 3, "per": "kv_head"}, {"tau": 0.3, "when": "boundary", "per": "kv_head"}],
    "topv": [{"keep": 7, "mode": "balanced", "stride": 0}, {"keep": 0.5, "scope": "tile", "stride": 2},
             {"keep": 0.4, "mode": "one_sided", "gamma": 1.0}],
    "attention_predictor": [{"keep": 0.4, "block": 1, "calibrate": 2},
                            {"keep": 0.5, "block": 2, "predictor": "last", "skip_layers": 0, "window": 2},
                            {"keep": 6, "block": 4, "layout": "square", "predictor": "mean"}],
    "mint": [{"keep": 0.3, "update": "prefill", "alpha": 0.5}, {"keep": 3, "n_sel": 2, "ref": "key"},
             {"keep": 0.3, "n_sel": 2, "update": "prefill", "beta": 0.0},
             {"keep": 0.1, "alpha": 3.0, "beta": 0.5}],
    "sgl": [{"keep": 3, "full_layers": 0},
            {"keep": 0.4, "full_layers": 2, "layer_weight": "gate", "threshold": 1.0},
            {"keep": 0.3, "when": "boundary", "early_caches": "trim"},
            {"keep": 0.3, "full_layers": 0, "when": "boundary"}],
    "quecc": [{"keep": 2}, {"keep": 1}],
    "random": [{"keep": 4, "seed": 5, "full_layers": 2}, {"keep": 0.3, "full_layers": 0}],
    "spatial": [{"keep": 4, "when": "boundary", "early_caches": "full"}, {"keep": 5, "full_layers": 0}]}
ALWAYS = {"quecc": {"weights": "pool"}}                     # the trained ones fit the bundled model alone
STATES = "features", "entering", "attended"         # of EncoderStates
MODELS = {"two": (1, 1, 2), "three": (2, 2, 3), "four": (3, 4, 4)}     # seed, share, cross-attention layers


@pytest.fixture(params=MODELS)
def network(small, request):
    return small(*MODELS[request.param])


@pytest.fixture
def some(small, request):
    """One of them, another for every test and method."""
    return small(*list(MODELS.values())[sum(map(ord, request.node.name)) % 3])


def close(a: Tensor, b: Tensor, atol: float = 1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def rows_of(kv: ImageKV, row: int) -> list[list[tuple[int, ...]]]:
    """The places held in one batch row, of each key/value head."""
    return [[tuple(p) for p, there in zip(coords_of.tolist(), real, strict=True) if there]
            for coords_of, real in zip(kv.coords[row], real_of(kv, row), strict=True)]


def real_of(kv: ImageKV, row: int) -> list[list[bool]]:
    heads, n = kv.coords.shape[1:3]
    return [[True] * n] * heads if kv.mask is None else kv.mask[row].expand(heads, -1).tolist()


# ----- keeping everything


def whole(make) -> Pruner:
    """With every token kept; a budget beside it is a limit of its own, and goes, and so does a threshold."""
    return make(keep=1.0, **{option: None for option in ("budget", "threshold") if option in make.keywords})


def test_keeping_all_is_the_whole_network_bit_for_bit(make, some, see, ask):
    pruner, image = whole(make), see(some, GRIDS)
    plain = ask(some, PROMPTS, image, steps=5)
    pruned = ask(some, PROMPTS, see(some, GRIDS, pruner=Pruner()), pruner, steps=5)
    assert torch.equal(plain.logits, pruned.logits) and plain.answer.kept == pruned.answer.kept
    answers = [generate(some, PROMPTS, image, 5, (), pruner=p).tokens for p in (None, pruner, Pruner())]
    assert answers[0] == answers[1] == answers[2]


def test_keeping_all_changes_nothing_at_any_moment(make, some, see, ask):
    """Not even where the hooks are called all the same."""
    pruner, image = whole(make), see(some, GRIDS)
    with patch.object(type(pruner), "keeps_all", False):
        assert torch.equal(see(some, GRIDS, pruner=pruner).features, image.features)
        pruned = ask(some, PROMPTS, see(some, GRIDS, pruner=pruner), pruner, steps=5)
    plain = ask(some, PROMPTS, image, steps=5)
    assert torch.equal(plain.logits, pruned.logits) and plain.answer.kept == pruned.answer.kept
    with patch.object(Pruner, "keeps_all", False):
        assert torch.equal(ask(some, PROMPTS, image, Pruner(), steps=5).logits, plain.logits)


# ----- dropping


def test_dropping_is_masking(make, network, see, ask, masked):
    """In prefill and in every step the logits are those of the whole image with -inf on what was dropped."""
    pruner = make()
    image = see(network, GRIDS, 1, pruner)
    run = ask(network, PROMPTS, image, pruner, steps=4)
    assert len(run.read) == len(network.language_model.cross_layers)
    close(run.logits, masked(network, run, PROMPTS, image, pruner))


def test_what_the_caches_hold(make, some, see, ask):
    """Real tokens, in the encoder's order, none twice; as many as the answer says; unchanged by decoding."""
    pruner = make()
    image = see(some, GRIDS, 3, pruner)
    run = ask(some, PROMPTS, image, pruner)
    for row in range(len(PROMPTS)):
        real = torch.ones(image.coords.shape[1]) if image.mask is None else image.mask[row]
        order = {tuple(p): i for i, p in enumerate(image.coords[row][real.bool()].tolist())}
        last = max((p[0] for p in order), default=-1)
        group = {last} if row != 3 else {0, 1}                      # row 3 has two images side by side
        for kv in run.read:
            for coords_of in rows_of(kv, row):
                ranks = [order[coords] for coords in coords_of]
                assert ranks == sorted(set(ranks))
        for kvs, counts in zip(zip(*run.held, strict=True), run.answer.kept[row], strict=True):
            first = rows_of(kvs[0], row) if order else [[]]
            assert sum(map(len, first)) / len(first) == counts
            for kv in kvs if order else []:
                held = rows_of(kv, row)
                for ranks in [[order[coords] for coords in coords_of] for coords_of in held]:
                    assert ranks == sorted(set(ranks))
                assert {p[0] for coords_of in held for p in coords_of} == group
                assert "stepped" in hooks(type(pruner)) or held == first
    bytes_held = sum(kv.key.nbytes + kv.value.nbytes for kv in run.held[-1])
    assert run.answer.image_kv_bytes == bytes_held


def test_every_image_keeps_its_share(make, some, see, ask):
    """At least one token of each in every layer; where the share is of the image, exactly so many."""
    for seed, keep in (1, None), (2, 0.01), (3, 0.5):
        pruner = make() if keep is None else make(keep=keep)
        image = see(some, GRIDS, seed, pruner)
        run = ask(some, PROMPTS, image, pruner)
        for row, grids in enumerate(GRIDS):
            coords_of = image.coords[row].tolist()
            for i in range(len(grids)):
                size = sum(coords[0] == i for coords in coords_of)
                kept = [[sum(p[0] == i for p in head) for head in rows_of(kv, row)] for kv in run.read]
                assert min(map(min, kept)) >= 1
                if isinstance(pruner, SelectOnce) and pruner.when == "prefill":
                    share = pruner.keep if type(pruner.keep) is int else math.floor(pruner.keep * size + 0.5)
                    share, later = max(1, min(share, size)), kept[pruner.full_layers:]
                    assert all(n == [size] for n in kept[:pruner.full_layers])
                    if not isinstance(pruner, TrimmedLlama):
                        assert all(n == [share] for n in later)
                    elif pruner.budget is None:
                        assert all(share <= n[0] <= size for n in later)


# ----- batches


def alone(network, image, row: int):
    """The image of one batch row as it comes without the others."""
    one = image.select([row])
    real = slice(None) if image.mask is None else image.mask[row]
    states = one.states and replace(one.states, **{n: getattr(one.states, n)[:, real] for n in STATES})
    coords = one.coords[:, real]
    return ImageTokens(one.features[:, real], coords, None, states) if coords.numel() else None


def test_a_batch_gives_each_row_what_it_gets_alone(make, some, see, ask):
    """Text only, one image, several, of other shapes; each row keeps as many tokens as it likes."""
    pruner = make()
    image = see(some, GRIDS, 4, pruner)
    run = ask(some, PROMPTS, image, pruner)
    for row, prompt in enumerate(PROMPTS):
        single = ask(some, [prompt], alone(some, image, row), pruner)
        close(run.logits[row], single.logits[0])
        assert run.answer.kept[row] == (single.answer.kept[0] or [0] * len(run.read))
        assert run.answer.seen[row] == single.answer.seen[0]


def test_one_image_for_several_questions(make, some, see, ask):
    pruner = make()
    image = see(some, [[(1, 3)]], 5, pruner)
    run = ask(some, QUESTIONS, image.expand(3), pruner)
    for row, prompt in enumerate(QUESTIONS):
        single = ask(some, [prompt], image, make())
        close(run.logits[row], single.logits[0])
        assert run.answer.kept[row] == single.answer.kept[0]


def test_text_alone_is_untouched(make, some, see, ask):
    """Bit for bit: a prompt without an image, and a row without one beside a row that has one."""
    pruner = make()
    for prompts in [[12, 13, 14]], [[12, 13, 14, 15], [16, 17]]:
        plain, pruned = ask(some, prompts, None), ask(some, prompts, None, pruner)
        assert torch.equal(plain.logits, pruned.logits) and pruned.read == []
    mixed = ask(some, [[I, 6, 7, 8], [9, 10, 11, 12]], see(some, [[(1, 3)], []], 6, pruner), pruner)
    branches = len(mixed.read[0].key) // 2                  # products of another size round otherwise
    text = ask(some, [[5, 6, 7, 8], [9, 10, 11, 12]] * branches, None)
    assert torch.equal(mixed.logits[1], text.logits[1]) and not torch.equal(mixed.logits[0], text.logits[0])
    assert mixed.answer.kept[1] == [0] * len(mixed.read) and min(mixed.answer.kept[0]) >= 1


# ----- the choice


def chosen(run) -> list:
    return [rows_of(kv, row) for kv in run.read for row in range(len(PROMPTS))]


def test_the_same_again(make, some, see, ask):
    """From the same pruner and from a new one: what it leaves behind is not in the way."""
    pruner = make()
    image = see(some, GRIDS, 7, pruner)
    first, again, other = (ask(some, PROMPTS, image, p) for p in (pruner, pruner, make()))
    assert torch.equal(first.logits, again.logits) and torch.equal(first.logits, other.logits)
    assert chosen(first) == chosen(again) == chosen(other)


def test_a_chat_finds_the_image_as_it_was(make, some, see, ask):
    """A pruner leaves the encoded image alone: the next question is answered as if it were the first."""
    pruner = make()
    image = see(some, [[(2, 2)]], 8, pruner)
    before = copy.deepcopy(image)
    for prompt in QUESTIONS:
        run = ask(some, [prompt], image, pruner)
        fresh = ask(some, [prompt], see(some, [[(2, 2)]], 8, pruner), make())
        assert torch.equal(run.logits, fresh.logits) and run.answer.kept == fresh.answer.kept
        assert torch.equal(image.features, before.features) and torch.equal(image.coords, before.coords)
        assert image.mask is before.mask is None


def test_rows_that_see_no_image_have_no_say(make, some, see, ask):
    """Neither those before it nor padding: their queries may ask for anything."""
    for seed in range(2):
        plain, deceived = make(), make()
        image = see(some, GRIDS, seed, plain)
        honest, strange = deceived.layer, 1e4 * torch.randn(8, generator=torch.Generator().manual_seed(seed))

        def layer(i, queries, *arguments, honest=honest, strange=strange):
            blind = queries.seen[..., 0] == queries.seen[..., 1]
            assert blind.any()                                              # else nothing is tested here
            q = torch.where(blind[:, None, :, None], strange, queries.q)
            return honest(i, replace(queries, q=q), *arguments)
        with patch.object(type(deceived), "layer", lambda self, *arguments, layer=layer: layer(*arguments)):
            run = ask(some, PROMPTS, image, deceived)
        expected = ask(some, PROMPTS, image, plain)
        assert chosen(run) == chosen(expected) and torch.equal(run.logits, expected.logits)


def test_padding_among_image_tokens_has_no_say(make, some, see, ask):
    """Rows with fewer tokens are filled up with anything; it is never kept and changes nothing."""
    pruner = make()
    image = see(some, GRIDS, 9, pruner)
    assert image.mask is not None
    generator = torch.Generator().manual_seed(0)

    def fill(state: Tensor) -> Tensor:
        return torch.where(image.mask[..., None], state, 1e3 * torch.randn(state.shape, generator=generator))
    states = image.states and replace(image.states, **{n: fill(getattr(image.states, n)) for n in STATES})
    filled = replace(image, features=fill(image.features), states=states)
    run, expected = ask(some, PROMPTS, filled, make()), ask(some, PROMPTS, image, pruner)
    assert chosen(run) == chosen(expected)
    close(run.logits, expected.logits)


def test_half_precision_is_finite(make, some, see, ask):
    half, pruner = copy.deepcopy(some).bfloat16(), make()
    run = ask(half, PROMPTS, see(half, GRIDS, 10, pruner), pruner)
    assert run.logits.isfinite().all()
    assert {kv.key.dtype for kvs in run.held for kv in kvs} == {torch.bfloat16}


def test_every_method_is_here():
    assert set(OPTIONS) <= set(METHODS)
    assert set(METHODS) >= {"none", "trimmed_llama", "fastv", "random", "spatial", "downsample"}
