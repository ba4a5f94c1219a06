"""CSP against its formulas (arXiv 2412.04652 and its code), in loops over captured queries and keys.

The softmax with n in its denominator, which positions are observed, a set for each key/value head. What every
method promises, that dropping is masking above all, is in test_pruners.py.
"""
import math
from unittest.mock import patch

import pytest
import torch
from helpers import SHARES, I, attention_of, close, encode, kept_sets, noise, refused, small_network
from loops import best, half_up, received_by_hand, watched
from reference import forced, masked
from torch import Tensor

from model.image_tokens import ImageKV, ImageTokens, Queries, visible_images
from model.layers import attend
from pruning.methods.csp import CSP, nsoftmax
from pruning.methods.elastic_cache import ElasticCache
from pruning.methods.fastv import FastV

PROMPTS = [[5, 6, I, 7, 8, 9, 10, 11], [12, 13, 14], [I, 5, 15, I, 16, 17], [9, 8, I, I, 18]]
GRIDS = [[(2, 2)], [], [(1, 1), (1, 3)], [(1, 2), (2, 1)]]


def scored(pruner: CSP, queries: Queries, image: ImageTokens, kv: ImageKV) -> CSP:
    """The same after prefill of one layer, about which nothing is known but these queries."""
    pruner.encoded(image, [[5] * queries.q.shape[2]])
    assert pruner.layer(0, queries, image, kv) == (image, kv)           # it is read with everything
    return pruner


def chosen(logits: Tensor, kv_heads: int = 1, **options) -> list[list[int]]:
    """What is kept of one image that is attended to with these scores [H, T, N], before the softmax."""
    queries, image, kv = attention_of(logits.exp(), kv_heads)
    return kept_sets(scored(CSP(**options), queries, image, kv).prefilled([kv])[0], image)


# ----- n in the softmax


def test_the_softmax_has_a_key_more():
    o = noise(3, 4, 7).double()
    for n in 0.25, 1.0, 7.0:
        ours, Z = nsoftmax(o, n), o.exp().sum(-1)
        close(ours, o.exp() / (n + Z)[..., None], atol=1e-12)
        close(ours.sum(-1), Z / (n + Z), atol=1e-12)
    assert torch.equal(nsoftmax(o, 0.0), o.softmax(-1))
    close(nsoftmax(torch.zeros(2), 1.0), torch.tensor([1 / 3, 1 / 3]))
    assert nsoftmax(torch.tensor([1e4, -1e4]), 1.0).tolist() == [1, 0]
    assert nsoftmax(torch.tensor([-1e4, -1e4]), 1.0).tolist() == [0, 0]


def test_n_makes_weak_positions_count_less():
    scores = torch.tensor([[[-4.0, -5.0], [2.0, 2.2]]])
    for n, sums, winner in (0.0, [1.181, 0.819], 0), (1.0, [0.442, 0.525], 1):
        close(nsoftmax(scores[0], n).sum(0), torch.tensor(sums), atol=1e-3)
        assert chosen(scores, keep=1, n=n, observed=2) == [[winner]]
    for own in scores[0]:
        assert len({tuple(chosen(own.view(1, 1, 2), keep=1, n=n)[0]) for n in (0.0, 0.1, 1.0, 50.0)}) == 1


# ----- the choice


def test_heads_choose_for_themselves_or_together():
    scores = torch.zeros(4, 1, 6)
    for head, favourite in enumerate([1, 1, 4, 5]):         # the third and the fourth share a key/value head
        scores[head, 0, favourite] = 3 + 0.1 * head
        scores[head, 0, 2] = 2.9
    assert chosen(scores, 2, keep=2) == [[1, 2], [2, 5]]
    assert chosen(scores, 2, keep=2, per="layer") == [[1, 2]]
    assert chosen(scores, 4, keep=1) == [[1], [1], [4], [5]]
    assert chosen(torch.zeros(2, 3, 5), keep=0.5) == [[0, 1, 2]]                # ties; 2.5: half up


def test_only_the_last_positions_are_observed():
    """A number of them, or a share of text and image together: 4 positions and 6 tokens."""
    scores = torch.zeros(1, 4, 6)
    for position, favourite in enumerate([5, 3, 3, 0]):
        scores[0, position, favourite] = 3
    scores[0, 0, 5] = 30
    for observed, kept in (1, 0), (0.1, 0), (2, 0), (0.2, 0), (3, 3), (0.3, 3), (0.7, 3), (1.0, 3):
        assert chosen(scores, keep=1, observed=observed) == [[kept]]
    assert chosen(scores, keep=2, observed=4) == [[3, 5]] == chosen(scores, keep=2, observed=99)


@pytest.mark.parametrize("options", [{}, {"observed": 2, "per": "layer"}, {"n": 0, "keep": 0.5},
                                   {"observed": 1.0, "n": 9.0, "keep": 3}], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_definition(seed, options):
    """The sets that plain loops choose, in every layer, and the logits of the masked network."""
    network, which = small_network(seed, SHARES[seed], 3), (0, 2, 3)[seed]
    prompt, image, pruner = PROMPTS[which], encode(network, [GRIDS[which]], seed), CSP(**options)
    run, q, k = watched(network, lambda: forced(network, [prompt], image, pruner, steps=3))
    window = half_up(pruner.observed, len(prompt) + image.coords.shape[1])
    seen, images = visible_images(torch.tensor([prompt]), I)[0].tolist(), image.coords[0, :, 0].tolist()
    observed = [t for t, (first, stop) in enumerate(seen) if first < stop][-window:]
    sees = {t: [j for j, i in enumerate(images) if i in range(*seen[t])] for t in observed}
    for (queries, *_), (keys,), kv in zip(q, k, run.held[0], strict=True):
        sets = 1 if pruner.per == "layer" else len(keys)
        expected = []
        for score in received_by_hand(queries, keys, sees, sets, pruner.n):
            expected.append([])
            for i in range(*seen[-1]):
                ours = [j for j, other in enumerate(images) if other == i]
                n = half_up(pruner.keep, len(ours))
                expected[-1] += [ours[j] for j in best([score[j] for j in ours], n)]
        assert kept_sets(kv, image) == expected
    assert all(a is b for kvs in run.held for a, b in zip(kvs, run.held[0], strict=True))
    close(run.logits, masked(network, run, [prompt], image))


def test_with_one_position_and_one_set_it_agrees_with_other_methods():
    """In the first layer, the position of the image token: n = 0 here, FastV, Elastic Cache's anchors."""
    for seed in range(3):
        network = small_network(seed, SHARES[seed])
        image = encode(network, [[(2, 2)]], seed)
        sets = [kept_sets(forced(network, [[5, 6, 7, I]], image, pruner, 1).held[0][0], image) for pruner in
                (CSP(0.3, n=0.0, per="layer"), FastV(0.3, early_caches="trim"), ElasticCache(0.3))]
        assert sets[0] == sets[1] == sets[2] and len(sets[0][0]) == 6


# ----- n while decoding


def test_the_null_key_adds_n_to_the_denominator():
    generator = torch.Generator().manual_seed(0)
    for n in 0.5, 1.0, 20.0:
        queries, image, kv = attention_of(torch.rand(2, 3, 6, generator=generator).softmax(-1), 2)
        held, bare = (scored(CSP(4, decode_n=extra), queries, image, kv).prefilled([kv])[0]
                      for extra in (n, 0))
        q = torch.randn(1, 2, 1, 6, generator=generator)
        Z = (torch.einsum("bhtd,bhnd->bhtn", q, bare.key) / 6 ** 0.5).exp().sum(-1)           # [1, 2, 1]
        without = attend(q, bare.key, bare.value, bare.decode_mask()).view(1, 2, 1, 6)
        ours = attend(q, held.key, held.value, held.decode_mask()).view(1, 2, 1, 6)
        close(ours, without * (Z / (n + Z))[..., None])
        assert held.coords[0, :, -1, 2:].tolist() == [[-2, -2]] * 2 and held.coords[0, :, -1, 0].max() == 0


def test_n_while_decoding_in_an_answer():
    """In a mixed batch, against the network by hand on what the caches hold; the prompt is read as before."""
    network = small_network(2, 2, 3)
    image, pruner = encode(network, GRIDS, 3), CSP(0.4, decode_n=2.0)
    run, plain = (forced(network, PROMPTS, image, p, steps=4) for p in (pruner, CSP(0.4)))
    with patch.object(CSP, "merges", True):
        close(run.logits, masked(network, run, PROMPTS, image, pruner))
    assert torch.equal(run.logits[:, 0], plain.logits[:, 0])
    close(run.logits[1], plain.logits[1])
    for b in 0, 2, 3:
        assert (run.logits[b, 1:] - plain.logits[b, 1:]).abs().max() > 1e-4
        assert run.answer.kept[b] == [n + 1 for n in plain.answer.kept[b]]
    assert run.answer.kept[1] == [0.0] * 3
    tiny = forced(network, PROMPTS, image, CSP(0.4, decode_n=1e-30), steps=4)
    close(tiny.logits, plain.logits)


# ----- options


@pytest.mark.parametrize("options", [{"keep": 0}, {"observed": 0}, {"observed": 1.5}, {"n": -1.0},
                                     {"per": "head"}, {"decode_n": -0.1}, {"n": math.inf}], ids=str)
def test_a_bad_option_gets_one_line(options):
    with refused(f"csp: {next(iter(options))} is"):
        CSP(**options)


def test_what_it_says_of_itself():
    assert str(CSP(0.3, n=2.0)) == "csp, keep 0.3, n 2.0"
    assert CSP(1.0).keeps_all
    assert not CSP(1.0, decode_n=1.0).keeps_all
