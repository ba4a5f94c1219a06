"""MINT against our definition of it (after arXiv 2502.00717), in loops over captured queries and keys.

Which tokens are key, what each branch reads, and the contrast of the two; what every method promises is in
test_pruners.py. Of 2B sequences the first B are the key branch.
"""
import math
from unittest.mock import patch

import pytest
import torch
from helpers import (
    CROSS,
    SHARES,
    I,
    attention_of,
    batch_of,
    close,
    dropped_is_nan,
    kept,
    random_image,
    refused,
    small_network,
)
from loops import best, received_by_hand, watched
from reference import Run, forced, masked_branches
from torch import Tensor

from model.image_tokens import ImageKV, Queries
from pruning.methods.mint import MINT
from pruning.select import num_kept

PROMPT = [5, 6, I, 7, 8, 9]
SEEDS = range(3)


def branches(*arguments, pruner: MINT, **settings) -> tuple[Run, Tensor]:
    """A run, and the logits [2B, steps, V] that it had before the contrast."""
    seen, contrast = [], pruner.logits

    def logits(both: Tensor) -> Tensor:
        seen.append(both)
        return contrast(both)
    with patch.object(pruner, "logits", logits):
        run = forced(*arguments, pruner, **settings)
    return run, torch.stack(seen, dim=1)


def contrast(pruner: MINT, both: Tensor) -> Tensor:
    """What the pruner makes of logits [2B, V], once: both halves of it are the same."""
    first, second = pruner.logits(both).chunk(2)
    assert torch.equal(first, second)
    return first


# ----- the definition, in loops


def ranked(q: list[Tensor], k: list[Tensor], n: int) -> list[int]:
    """The n tokens with the highest attention from the last position of q [H, T, d] of every layer: a mean
    over heads, summed over layers."""
    layers = [received_by_hand(queries[:, -1:], keys, {0: range(keys.shape[1])})[0]
              for queries, keys in zip(q, k, strict=True)]
    return best([sum(each) for each in zip(*layers, strict=True)], n)


def contrast_by_hand(key: list[float], full: list[float], alpha: float, beta: float,
               ref: str) -> list[float | None]:
    """The logits of one token; None for those that may not be."""
    powers = [math.exp(z) for z in (full if ref == "full" else key)]
    p = [power / sum(powers) for power in powers]
    return [(1 + alpha) * k - alpha * f if chance >= beta * max(p) else None
            for k, f, chance in zip(key, full, p, strict=True)]


def matches(ours: Tensor, key: Tensor, full: Tensor, alpha: float = 1.0, beta: float = 0.1,
            ref: str = "full"):
    """Logits [..., V] are the contrast of these, and what may not be has a probability of exactly 0."""
    p = ours.softmax(-1)
    for where in torch.cartesian_prod(*map(torch.arange, ours.shape[:-1])).view(-1, ours.ndim - 1).tolist():
        where = tuple(where)
        expected = contrast_by_hand(key[where].tolist(), full[where].tolist(), alpha, beta, ref)
        allowed = torch.tensor([z is not None for z in expected])
        close(ours[where][allowed], torch.tensor([z for z in expected if z is not None]), atol=2e-5)
        assert torch.equal(p[where] > 0, allowed)


@pytest.mark.parametrize("update", ["step", "prefill"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_definition(update, layers, seed):
    """Later layers of the key branch see the sets that plain loops choose, all others everything; the logits
    are the contrast of two masked networks."""
    network, image = small_network(seed, SHARES[seed], CROSS[seed]), random_image(14, seed=seed)
    pruner, later, everything = MINT(0.3, update=update, n_sel=layers), CROSS[seed] - layers, list(range(14))
    run, q, k = watched(network, lambda: forced(network, [PROMPT], image, pruner, steps=5))
    steps, k = range(5) if update == "step" else [0] * 5, [own[0] for own in k[:layers]]
    expected = [ranked([own[step] for own in q[:layers]], k, 4) for step in steps]
    assert len(set(map(tuple, expected))) > 1 or update == "prefill"
    for kvs, chosen in zip([run.read, *run.held], [expected[0], *expected], strict=True):
        assert [kept(kv, image) for kv in kvs] == [everything] * layers + [chosen] * later
        assert [kept(kv, image.expand(2), 1) for kv in kvs] == [everything] * CROSS[seed]
    assert run.answer.kept == [[14.0] * layers + [4.0] * later]
    key, full = masked_branches(network, run, [PROMPT], image)
    if later:
        matches(run.logits[0], key, full)
    else:           # nothing is masked
        close(run.logits[0], full)


@pytest.mark.parametrize("update", ["step", "prefill"])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_branches(update, seed):
    """The full branch is the ordinary model; with alpha 0 and no constraint the key branch is the answer."""
    network, image = small_network(seed, SHARES[seed], 3), random_image(14, seed=seed)
    run, (key, full) = branches(network, [PROMPT], image, steps=4,
                                pruner=MINT(0.3, alpha=0.0, beta=0.0, update=update))
    close(full, forced(network, [PROMPT], image, steps=4).logits[0])
    assert torch.equal(run.logits[0], key) and (key - full).abs().max() > 1e-3
    contrasted, both = branches(network, [PROMPT], image, steps=4, pruner=MINT(0.3, update=update))
    assert torch.equal(both, torch.stack((key, full)))          # the contrast does not change what is read
    matches(contrasted.logits[0], key, full)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_key_branch_chooses_for_the_next_token(layers):
    """By its own queries in the first layers, whatever the full branch and later layers ask for."""
    network, image, pruner = small_network(1, 2, 3), random_image(14), MINT(0.3, n_sel=layers)
    held = forced(network, [PROMPT], image, pruner).held[-1]
    queries = list(torch.randn(3, 2, 4, 1, 8, generator=torch.Generator().manual_seed(0)))
    keys = [kv.key[0] for kv in held[:layers]]
    key, full = (ranked([q[branch] for q in queries[:layers]], keys, 4) for branch in range(2))
    kvs = pruner.stepped(0, queries, held)
    assert key != full and [kept(kv, image) for kv in kvs[layers:]] == [key] * (3 - layers)
    assert all(kept(kv, image.expand(2), 1) == list(range(14)) for kv in kvs)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_first_token_is_the_same(seed):
    """Whether the set stays or not; later ones are not."""
    network, image = small_network(seed, SHARES[seed], 3), random_image(30, seed=seed)
    step, prefill = (forced(network, [PROMPT], image, MINT(0.1, beta=0.0, update=update), steps=5).logits
                     for update in ("step", "prefill"))
    close(step[:, 0], prefill[:, 0])
    assert (step[:, 1:] - prefill[:, 1:]).abs().max() > 1e-3


@pytest.mark.parametrize("seed", SEEDS)
def test_later_layers_never_read_what_the_key_branch_dropped(seed):
    """With the set of the prompt, NaN in its features after the choice changes nothing."""
    network, image = small_network(seed, SHARES[seed], 3), random_image(14, seed=seed)
    pruner = MINT(0.3, update="prefill")
    expected = forced(network, [PROMPT], image, pruner)
    with dropped_is_nan(MINT, "key_set") as dropped:
        run = forced(network, [PROMPT], image, pruner)
    assert dropped == [10] and torch.equal(run.logits, expected.logits)


@pytest.mark.parametrize("seed", SEEDS)
def test_each_image_has_a_key_set_by_the_last_position_that_sees_it(seed):
    """Two images apart; what is decoded sees the second one alone, and chooses of it alone."""
    network, image = small_network(seed, SHARES[seed]), random_image(8, 10, seed=seed)
    prompt = [I, 5, 6, I, 7, 8]
    run, (q, _), (k, _) = watched(network, lambda: forced(network, [prompt], image, MINT(0.4), steps=4))
    first = ranked([q[0][:, 2:3]], [k[0][:, :8]], 3)
    second = [[8 + i for i in ranked([asked], [k[0][:, 8:]], 4)] for asked in q]
    assert kept(run.read[1], image) == first + second[0]
    assert [kept(kvs[1], image) for kvs in run.held] == [*second[:3], second[3]] and len(q) == 4
    assert [kept(kvs[0], image) for kvs in run.held] == [list(range(8, 18))] * 4
    assert run.answer.kept == [[10.0, 4.0]] and run.answer.seen == [10]


def test_the_mean_over_heads():
    """Of the last position alone, ties to the first."""
    last = torch.tensor([[0.4, 0.1, 0.1, 0.2, 0.1, 0.1], [0.0, 0.5, 0.1, 0.2, 0.1, 0.1]])[:, None]
    other = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.4, 0.6]).expand(2, 4, 6)
    for weights, expected in ((torch.cat((other, last), dim=1), [0, 1, 3]),
                              (torch.full((2, 3, 6), 1 / 6), [0, 1, 2])):
        queries, image, kv = attention_of(weights)
        queries = Queries(*[torch.cat((each, each)) for each in (queries.q, queries.seen)])
        kv = ImageKV(*[torch.cat((each, each)) for each in (kv.key, kv.value, kv.coords)])
        read, _ = MINT(3, update="prefill").layer(0, queries, image.expand(2), kv)
        assert read.features[0, read.mask[0], 0].int().tolist() == expected
        assert read.features[1, :, 0].int().tolist() == list(range(6))


def test_the_number_of_key_tokens():
    assert int(num_kept(MINT().keep, torch.tensor(1601))) == 320


# ----- the contrast


def parted(sequences: int = 1, **settings) -> MINT:
    """One whose branches do not read the same."""
    pruner = MINT(0.3, **settings)
    pruner.differ = pruner.key_set_is_smaller(random_image(10, batch=sequences))
    assert pruner.differ.shape == (sequences, 1) and pruner.differ.all()
    return pruner


def test_the_numbers_of_an_example():
    full, key = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[1.0, 2.0, 0.0]])
    both = torch.cat((key, full))
    assert torch.equal(contrast(parted(), both), torch.tensor([[0.0, 3.0, 0.0]]))
    strict = contrast(parted(beta=0.5), both)
    assert strict.argmax() == 0 and strict.softmax(-1).tolist() == [[1.0, 0.0, 0.0]]
    close(full.softmax(-1), torch.tensor([[0.665, 0.245, 0.090]]), atol=5e-4)
    assert contrast(parted(beta=0.5, ref="key"), both).argmax() == 1
    assert torch.equal(contrast(parted(alpha=0.0, beta=0.0), both), key)
    assert torch.equal(contrast(parted(alpha=0.5, beta=0.0), both), torch.tensor([[0.5, 2.5, 0.0]]))


@pytest.mark.parametrize("ref", ["full", "key"])
@pytest.mark.parametrize("beta", [0.0, 0.02, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5])
def test_plausible_tokens(alpha, beta, ref):
    """The set of probabilities at least beta of the highest; with 1 the reference's favourite always wins."""
    key, full = both = 2 * torch.randn(2, 6, 40, generator=torch.Generator().manual_seed(int(9 * alpha)))
    ours = contrast(parted(6, alpha=alpha, beta=beta, ref=ref), both.flatten(0, 1))
    matches(ours, key, full, alpha, beta, ref)
    assert ours.isfinite().all()
    if beta == 1:
        assert torch.equal(ours.argmax(-1), (full if ref == "full" else key).argmax(-1))
    if not beta:
        assert (ours.softmax(-1) > 0).all()


# ----- where the branches read the same


@pytest.mark.parametrize("settings", [{}, {"alpha": 7.0, "beta": 1.0}, {"n_sel": 3, "update": "prefill"}],
                         ids=str)
@pytest.mark.parametrize("keep", [1.0, 14, 30])
def test_keeping_all_is_the_ordinary_model(keep, settings):
    """For every alpha and beta, bit for bit, and it is read once."""
    network, image = small_network(1, 2, 3), random_image(14)
    plain = forced(network, [PROMPT], image, steps=4)
    with patch.object(MINT, "keeps_all", False):
        run = forced(network, [PROMPT], image, MINT(keep, **settings), steps=4)
    assert torch.equal(run.logits, plain.logits) and run.answer.kept == plain.answer.kept
    assert {len(kv.key) for kvs in run.held for kv in kvs} == {1}


@pytest.mark.parametrize("update", ["step", "prefill"])
def test_in_a_mixed_batch_each_sequence_is_on_its_own(update):
    """An image; text alone; a smaller image; one that is kept entirely. The second and the last have ordinary
    logits, whatever noise a device adds to a branch, and no token of theirs is implausible."""
    network, prompts = small_network(2, 2, 3), [PROMPT, [5, 6, 7], [I, 8], [4, I]]
    image = batch_of(random_image(14, seed=0), None, random_image(9, seed=2), random_image(3, seed=3))
    pruner = MINT(3, update=update)
    run, both = branches(network, prompts, image, steps=5, pruner=pruner)
    plain = forced(network, prompts, image, steps=5)
    reference = masked_branches(network, run, prompts, image)
    close(both, reference)
    key, full = reference.view(2, 4, 5, -1)
    matches(run.logits[[0, 2]], key[[0, 2]], full[[0, 2]])
    close(run.logits[[1, 3]], plain.logits[[1, 3]])
    assert run.answer.kept == [[14.0, 3.0, 3.0], [0.0] * 3, [9.0, 3.0, 3.0], [3.0] * 3]
    last = both[:, -1].clone()
    last[:4] += 1e-6 * torch.randn(4, 60, generator=torch.Generator().manual_seed(0))
    assert torch.equal(contrast(pruner, last)[[1, 3]], last[[5, 7]])
    assert contrast(pruner, last)[[0, 2]].softmax(-1).eq(0).any(-1).all()


# ----- options, and what is left behind


def test_a_new_answer_starts_anew():
    """After an image with other tokens and a batch of another size, as from a new one."""
    network, pruner = small_network(1, 2, 3), MINT(0.3)
    fresh = forced(network, [PROMPT], random_image(14), MINT(0.3), steps=4)
    for tokens, prompts in (25, [[I, 5], [7, I]]), (2, [PROMPT]), (14, [PROMPT]):
        run = forced(network, prompts, random_image(tokens, batch=len(prompts)), pruner, steps=4)
    assert torch.equal(run.logits, fresh.logits)
    forced(network, [PROMPT], random_image(14), prefill := MINT(0.3, update="prefill"))
    assert len(pruner.stored) == 3 and len(prefill.stored) == 0


@pytest.mark.parametrize("option, value", [
    ("alpha", -0.5), ("alpha", math.nan), ("alpha", "strong"), ("beta", -0.1), ("beta", 1.1), ("n_sel", 0),
    ("n_sel", 1.0), ("update", "never"), ("ref", "both"), ("keep", 0.0), ("keep", 1.5), ("keep", 0)])
def test_a_bad_option_gets_one_line(option, value):
    with refused(f"mint: {option} is .*, but must be "):
        MINT(**{option: value})


def test_more_layers_than_there_are():
    with refused("n_sel is 3, but must be 1 to 2"):
        forced(small_network(1), [PROMPT], random_image(10), MINT(n_sel=3))


def test_what_it_says_of_itself():
    assert str(MINT(0.3, alpha=2.0)) == "mint, keep 0.3, alpha 2.0" and str(MINT()) == "mint, keep 0.2"
