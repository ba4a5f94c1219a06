"""What every pruning method promises, one matrix over all of them.

Add your own with `pytest tests/pruning/test_pruners.py --pruner ./mine.py:Mine`. Networks have one, two and
four query heads to a key/value head; a batch mixes text alone, one image and several, of other shapes, and
prompts of other lengths. `tests/reference.py` says how a run is watched and what it is compared with.
"""
import copy
import math
from dataclasses import replace
from functools import cache
from unittest.mock import patch

import pytest
import torch
from helpers import STATES, I, alone, close, encode, in_bfloat16, keeping_all, kept_sets, small_network
from matrix_options import OPTIONS
from reference import Case, Run, forced, masked
from torch import Tensor

from generate import generate
from model.image_tokens import ImageTokens
from model.llama_vision import LlamaVision
from pruning import METHODS, Pruner, SelectOnce, hooks
from pruning.methods.trimmed_llama import TrimmedLlama

PROMPTS = [[5, 6, I, 7, 8, 9, 10, 11], [12, 13, 14], [I, 5, 15, I, 16, 17], [9, 8, I, I, 18], [4, 19, 20, I]]
GRIDS = [[(2, 2)], [], [(1, 1), (1, 3)], [(1, 2), (2, 1)], [(1, 1)]]     # tiles: rows, columns
QUESTIONS = [[5, 6, I, 7, 8, 9], [I, 11, 12], [13, I, 14, 15, 16, 17, 18]]  # about the same image
KEEPS = [{"keep": 0.25}, {"keep": 0.6}]
ALWAYS = {"quecc": {"weights": "pool"}}                     # the trained ones fit the bundled model alone
NETWORKS = {"two": (1, 1, 2), "three": (2, 2, 3), "four": (3, 4, 4)}    # seed, share, cross-attention layers
CASES: dict[tuple, Case] = {}           # a run that several tests use is made once


def case_of(make, name: str) -> Case:
    key = name, *make.args, *make.keywords.items()
    if key not in CASES:
        network, pruner = small_network(*NETWORKS[name]), make()
        image = encode(network, GRIDS, NETWORKS[name][0], pruner)
        CASES[key] = Case(network, image, pruner, forced(network, PROMPTS, image, pruner, steps=4))
    return CASES[key]


@cache
def plain_run(network: LlamaVision, seed: int) -> Run:
    return forced(network, PROMPTS, encode(network, GRIDS, seed), steps=5)


@pytest.fixture(params=NETWORKS)
def every_case(make, request) -> Case:
    """In each of the networks."""
    return case_of(make, request.param)


@pytest.fixture
def name(request) -> str:
    """One of the networks, another one for every test and method."""
    return list(NETWORKS)[sum(map(ord, request.node.name)) % 3]


@pytest.fixture
def case(make, name) -> Case:
    return case_of(make, name)


@pytest.fixture
def network(name) -> LlamaVision:
    return small_network(*NETWORKS[name])


# ----- keeping everything


def test_keeping_all_is_the_full_network_bit_for_bit(make, network):
    pruner, plain = keeping_all(make), plain_run(network, 0)
    pruned = forced(network, PROMPTS, encode(network, GRIDS, pruner=Pruner()), pruner, steps=5)
    assert torch.equal(plain.logits, pruned.logits) and plain.answer.kept == pruned.answer.kept
    image = encode(network, GRIDS)
    answers = [generate(network, PROMPTS, image, 5, (), pruner=p).tokens for p in (None, pruner, Pruner())]
    assert answers[0] == answers[1] == answers[2]


def test_keeping_all_changes_nothing_at_any_hook(make, network):
    """Not even where the hooks are called all the same."""
    pruner, plain = keeping_all(make), plain_run(network, 0)
    with patch.object(type(pruner), "keeps_all", False):
        image = encode(network, GRIDS, pruner=pruner)
        assert torch.equal(image.features, encode(network, GRIDS).features)
        pruned = forced(network, PROMPTS, image, pruner, steps=5)
    assert torch.equal(plain.logits, pruned.logits) and plain.answer.kept == pruned.answer.kept


def test_hooks_that_do_nothing_change_nothing(network):
    with patch.object(Pruner, "keeps_all", False):
        run = forced(network, PROMPTS, encode(network, GRIDS), Pruner(), steps=5)
    assert torch.equal(run.logits, plain_run(network, 0).logits)


# ----- dropping


def test_dropping_is_masking(every_case):
    """In prefill and in every step the logits are those of the whole image with -inf on what was dropped."""
    network, image, run = every_case.network, every_case.image, every_case.run
    assert len(run.read) == len(network.language_model.cross_layers)
    close(run.logits, masked(network, run, PROMPTS, image, every_case.pruner))


def test_what_the_caches_hold(case):
    """Real tokens, in the encoder's order, none twice; as many as the answer says; unchanged by decoding."""
    image, run = case.image, case.run
    for b in range(len(PROMPTS)):
        sees_image = alone(image, b) is not None
        for kv in run.read:
            for tokens in kept_sets(kv, image, b):
                assert tokens == sorted(set(tokens))
        for layer, count in zip(zip(*run.held, strict=True), run.answer.kept[b], strict=True):
            first = kept_sets(layer[0], image, b) if sees_image else [[]]
            assert sum(map(len, first)) / len(first) == count
            for kv in layer if sees_image else []:
                held = kept_sets(kv, image, b)
                assert all(tokens == sorted(set(tokens)) for tokens in held)
                images = {int(image.coords[b, i, 0]) for tokens in held for i in tokens}
                assert images == ({0, 1} if b == 3 else {len(GRIDS[b]) - 1})        # 3: two side by side
                assert "stepped" in hooks(type(case.pruner)) or held == first
    bytes_held = sum(kv.key.nbytes + kv.value.nbytes for kv in run.held[-1])
    assert run.answer.image_kv_bytes == bytes_held


def test_every_image_keeps_its_share(make, case):
    """At least one token of each in every layer; exactly its share, where the share is of the image."""
    for seed, keep in (1, None), (2, 0.01), (3, 0.5):
        pruner, image, run = case.pruner, case.image, case.run
        if keep is not None:
            pruner = make(keep=keep)
            image = encode(case.network, GRIDS, seed, pruner)
            run = forced(case.network, PROMPTS, image, pruner)
        for b, grids in enumerate(GRIDS):
            of_image = image.coords[b, :, 0].tolist()
            for i in range(len(grids)):
                size = of_image.count(i)
                counts = [[[of_image[token] for token in tokens].count(i)
                           for tokens in kept_sets(kv, image, b)] for kv in run.read]
                assert min(map(min, counts)) >= 1
                if isinstance(pruner, SelectOnce) and pruner.when == "prefill":
                    share = pruner.keep if type(pruner.keep) is int else math.floor(pruner.keep * size + 0.5)
                    share, later = max(1, min(share, size)), counts[pruner.full_layers:]
                    assert all(n == [size] for n in counts[:pruner.full_layers])
                    if not isinstance(pruner, TrimmedLlama):
                        assert all(n == [share] for n in later)
                    elif pruner.budget is None:
                        assert all(share <= n[0] <= size for n in later)


# ----- batches


def test_a_batch_gives_each_prompt_what_it_gets_alone(case):
    """Text only, one image, several, of other shapes; each sequence keeps as many tokens as it likes."""
    run = case.run
    for b, prompt in enumerate(PROMPTS):
        single = forced(case.network, [prompt], alone(case.image, b), case.pruner, steps=4)
        close(run.logits[b], single.logits[0])
        assert run.answer.kept[b] == (single.answer.kept[0] or [0] * len(run.read))
        assert run.answer.seen[b] == single.answer.seen[0]


def test_one_image_for_several_questions(make, network):
    pruner = make()
    image = encode(network, [[(1, 3)]], 5, pruner)
    run = forced(network, QUESTIONS, image.expand(3), pruner)
    for b, prompt in enumerate(QUESTIONS):
        single = forced(network, [prompt], image, make())
        close(run.logits[b], single.logits[0])
        assert run.answer.kept[b] == single.answer.kept[0]


def test_text_alone_is_untouched(make, network):
    """Bit for bit: prompts without an image, one taken out of a batch with images, one in such a batch."""
    pruner = make()
    image = encode(network, [[(1, 3)], []], 6, pruner)
    for prompts, own in (([[12, 13, 14]], None), ([[12, 13, 14, 15], [16, 17]], None),
                         ([[9, 5]], image.select([1]))):
        plain, pruned = forced(network, prompts, None), forced(network, prompts, own, pruner)
        assert torch.equal(plain.logits, pruned.logits) and pruned.read == []
    mixed = forced(network, [[I, 6, 7, 8], [9, 10, 11, 12]], image, pruner)
    branches = len(mixed.read[0].key) // 2                  # products of another size round otherwise
    text = forced(network, [[5, 6, 7, 8], [9, 10, 11, 12]] * branches, None)
    assert torch.equal(mixed.logits[1], text.logits[1]) and not torch.equal(mixed.logits[0], text.logits[0])
    assert mixed.answer.kept[1] == [0] * len(mixed.read) and min(mixed.answer.kept[0]) >= 1


# ----- the choice


def chosen(run: Run, image: ImageTokens) -> list:
    return [kept_sets(kv, image, b) for kv in run.read for b in range(len(PROMPTS))]


def test_the_same_again(make, case):
    """From the same pruner and from a new one: nothing of an answer changes the next one."""
    first = case.run
    again, other = (forced(case.network, PROMPTS, case.image, p, 4) for p in (case.pruner, make()))
    assert torch.equal(first.logits, again.logits) and torch.equal(first.logits, other.logits)
    assert chosen(first, case.image) == chosen(again, case.image) == chosen(other, case.image)


def test_a_chat_finds_the_image_as_it_was(make, network):
    """A pruner leaves the encoded image alone: the next question is answered as if it were the first."""
    pruner = make()
    image = encode(network, [[(2, 2)]], 8, pruner)
    before = copy.deepcopy(image)
    for prompt in QUESTIONS:
        run = forced(network, [prompt], image, pruner)
        fresh = forced(network, [prompt], encode(network, [[(2, 2)]], 8, pruner), make())
        assert torch.equal(run.logits, fresh.logits) and run.answer.kept == fresh.answer.kept
        assert torch.equal(image.features, before.features) and torch.equal(image.coords, before.coords)
        assert image.mask is before.mask is None


@pytest.mark.parametrize("seed", range(2))
def test_positions_that_see_no_image_are_ignored(seed, make, case):
    """Those before it and padding: their queries may ask for anything."""
    deceived = make()
    honest, strange = deceived.layer, 1e4 * torch.randn(8, generator=torch.Generator().manual_seed(seed))

    def layer(self, i, queries, *arguments):
        blind = queries.seen[..., 0] == queries.seen[..., 1]
        assert blind.any()                                              # else nothing is tested here
        q = torch.where(blind[:, None, :, None], strange, queries.q)
        return honest(i, replace(queries, q=q), *arguments)
    with patch.object(type(deceived), "layer", layer):
        run = forced(case.network, PROMPTS, case.image, deceived, 4)
    assert chosen(run, case.image) == chosen(case.run, case.image)
    assert torch.equal(run.logits, case.run.logits)


def test_padding_among_image_tokens_is_ignored(make, case):
    """Sequences with fewer tokens are filled up with anything; it is never kept and changes nothing."""
    image = case.image
    assert image.mask is not None
    generator = torch.Generator().manual_seed(0)

    def fill(state: Tensor) -> Tensor:
        return torch.where(image.mask[..., None], state, 1e3 * torch.randn(state.shape, generator=generator))
    states = image.states and replace(image.states, **{n: fill(getattr(image.states, n)) for n in STATES})
    filled = replace(image, features=fill(image.features), states=states)
    run = forced(case.network, PROMPTS, filled, make(), 4)
    assert chosen(run, image) == chosen(case.run, image)
    close(run.logits, case.run.logits)


def test_half_precision_is_finite(make, network):
    half, pruner = in_bfloat16(network), make()
    run = forced(half, PROMPTS, encode(half, GRIDS, 10, pruner), pruner)
    assert run.logits.isfinite().all()
    assert {kv.key.dtype for kvs in run.held for kv in kvs} == {torch.bfloat16}


def test_every_method_is_here():
    assert set(OPTIONS) <= set(METHODS)
    assert set(METHODS) >= {"none", "trimmed_llama", "fastv", "random", "spatial", "downsample"}
