"""Elastic Cache against its formulas (arXiv 2407.18121), in loops over captured queries, keys and values.

Which tokens are anchors, which tokens join them, and what a bucket becomes. What every method promises is in
test_pruners.py.
"""
import math
from dataclasses import replace

import pytest
import torch
from helpers import SHARES, I, attention_of, close, encode, kept, noise, refused, small_network
from loops import best, half_up, received_by_hand, watched
from reference import forced, masked
from torch import Tensor

from model.image_tokens import ImageKV, visible_images
from model.layers import attend
from pruning.methods.elastic_cache import ElasticCache

PROMPTS = [[5, 6, I, 7, 8, 9, 10, 11], [12, 13, 14], [I, 5, 15, I, 16, 17], [9, 8, I, I, 18]]
GRIDS = [[(2, 2)], [], [(1, 1), (1, 3)], [(1, 2), (2, 1)]]
COORDS = {"one tile": [(0, 0)] * 12, "tiles": [(0, 0)] * 5 + [(0, 1)] * 5 + [(0, 2)] * 4,       # image, tile
          "two images": [(0, 0)] * 6 + [(1, 0)] * 4 + [(1, 1)] * 4}


# ----- the formulas, slowly


def buckets(anchors: list[int], coords: list[tuple[int, int]], scope: str) -> list[list[int]]:
    """Of each anchor, the tokens that are nearest to it; `coords` are image and tile of each token."""
    members = {anchor: [] for anchor in anchors}
    for t, (image, tile) in enumerate(coords):
        ours = [a for a in anchors if coords[a][0] == image]
        if not ours:
            continue                    # no position sees this image any more
        if scope == "tile":
            ours = [a for a in ours if coords[a][1] == tile] or ours
        members[min(ours, key=lambda a: (abs(a - t), a))].append(t)
    return list(members.values())


def cache(coords: list[tuple[int, int]], value: Tensor | None = None, heads: int = 1,
          seed: int = 0) -> ImageKV:
    """One sequence with random keys; values that are not given are unit vectors: a mean names its tokens."""
    key = noise(1, heads, len(coords), 8, seed=seed)
    value = torch.eye(len(coords)).expand(1, heads, -1, -1) if value is None else value
    where = torch.tensor([[image, tile, 0, i] for i, (image, tile) in enumerate(coords)])
    return ImageKV(key, value, where[None, None])


def cut(kv: ImageKV, anchors: list[int], **options) -> ImageKV:
    kept = torch.zeros(1, 1, kv.key.shape[2], dtype=torch.bool)
    kept[..., anchors] = True
    return ElasticCache(**options).cut(kv, kept)


def joined(kv: ImageKV) -> list[list[int]]:
    """The tokens of each bucket."""
    return [value.nonzero()[:, 0].tolist() for value in kv.value[0, 0]]


# ----- buckets


def test_the_examples():
    assert joined(cut(cache([(0, 0)] * 6), [1, 4])) == [[0, 1, 2], [3, 4, 5]]
    assert joined(cut(cache([(0, 0)] * 7), [1, 5])) == [[0, 1, 2, 3], [4, 5, 6]]         # 3 is a tie


@pytest.mark.parametrize("scope", ["tile", "sequence"])
@pytest.mark.parametrize("coords", COORDS.values(), ids=COORDS)
def test_each_token_joins_its_nearest_anchor(coords, scope):
    """Tiles without an anchor among them; sums are kept, in fp32 and cast back once."""
    met = set()
    for seed in range(15):
        chance, N = torch.Generator().manual_seed(seed), len(coords)
        anchors = [j for j in range(N) if torch.rand((), generator=chance) < 0.25]
        anchors = sorted({*anchors, 2, N - 1})              # one in each image
        expected = buckets(anchors, coords, scope)
        value = torch.randn(1, 2, N, 8, generator=chance)
        kv = cache(coords, heads=2, seed=seed)
        assert joined(cut(kv, anchors, bucket_scope=scope)) == expected
        small = cut(replace(kv, value=value), anchors, bucket_scope=scope)
        for k, bucket in enumerate(expected):
            close(small.key[0, :, k], sum(kv.key[0, :, t] for t in bucket) / len(bucket))
            close(small.value[0, :, k] * len(bucket), sum(value[0, :, t] for t in bucket))
        assert small.coords.tolist() == kv.coords[:, :, anchors].tolist()
        half = cut(replace(kv, key=kv.key.bfloat16(), value=value.bfloat16()), anchors, bucket_scope=scope)
        mean = value[0, 0, expected[0]].bfloat16().float().mean(0).bfloat16()
        assert torch.equal(half.value[0, 0, 0], mean)
        crossing = {coords[t] != coords[bucket[0]] for bucket in expected for t in bucket}
        met.add((any(crossing), all(any(coords[a] == p for a in anchors) for p in coords)))
    assert (False, True) in met or scope == "sequence" and len(set(coords)) > 1
    assert all(not crossing for crossing, everywhere in met if everywhere and scope == "tile")


def test_a_bucket_counts_once_unless_its_size_is_added():
    """Six equal keys, values 1, 1, 1, 1, 4, 4: the mean is 2, and a mean of two means is not."""
    value = torch.tensor([1.0, 1, 1, 1, 4, 4]).view(1, 1, 6, 1).expand(-1, -1, -1, 8)
    kv = replace(cache([(0, 0)] * 6, value), key=torch.ones(1, 1, 6, 8))
    q = noise(1, 1, 1, 8)

    def out(kv: ImageKV) -> float:
        return float(attend(q, kv.key, kv.value, kv.decode_mask())[0, 0, 0])
    plain, biased = cut(kv, [1, 5]), cut(kv, [1, 5], mass_bias=True)
    assert out(kv) == pytest.approx(2) == out(biased) and out(plain) == pytest.approx(2.5)
    assert plain.bias is None
    close(biased.bias, torch.tensor([[[4.0, 2.0]]]).log())
    even = [out(cut(kv, [1, 4], mass_bias=bias)) for bias in (False, True)]
    assert even[0] == pytest.approx(even[1]) == pytest.approx(2)


def test_padding_reaches_no_mean():
    """NaN in what is masked, beside a longer sequence."""
    kv, N = cache([(0, 0)] * 9, heads=2), 9
    mask = torch.tensor([True] * 6 + [False] * 3).expand(2, 1, N).clone()
    mask[1] = True
    key, value = kv.key.repeat(2, 1, 1, 1), kv.value.repeat(2, 1, 1, 1)
    key[0, :, 6:] = value[0, :, 6:] = math.nan
    kept = torch.zeros(2, 1, N, dtype=torch.bool)
    kept[0, :, [1, 4]] = kept[1, :, [0, 3, 8]] = True
    both = ElasticCache(mass_bias=True).cut(ImageKV(key, value, kv.coords.repeat(2, 1, 1, 1), mask), kept)
    assert both.key.isfinite().all() and both.value.isfinite().all()
    shorter = replace(kv, key=kv.key[:, :, :6], value=kv.value[:, :, :6], coords=kv.coords[:, :, :6])
    alone = cut(shorter, [1, 4], mass_bias=True)
    assert both.mask.tolist() == [[[True, True, False]], [[True] * 3]]
    for ours, theirs in (both.key, alone.key), (both.value, alone.value), (both.bias, alone.bias):
        close(ours[:1, :, :2], theirs)


# ----- anchors


def merged(weights: Tensor, **options) -> ImageKV:
    """What is left of an image that is attended to with these weights [H, T, N]."""
    queries, image, kv = attention_of(weights)
    pruner = ElasticCache(**options)
    assert pruner.layer(0, queries, image, kv) == (image, kv)           # it is read with everything
    return pruner.prefilled([kv])[0]


def test_the_highest_scores_are_the_anchors():
    """The released code takes another: it compares what argsort returns as if these were ranks."""
    kv = merged(torch.tensor([[[0.9, 0.1, 0.3]]]), keep=1)
    assert kv.coords[0, 0, :, 3].tolist() == [0] and joined(kv) == [[0, 1, 2]]


def test_the_sum_over_positions_and_the_mean_over_heads():
    weights = torch.tensor([[[0.5, 0.2, 0.1, 0.2], [0.0, 0.5, 0.1, 0.4]], [[0.1, 0.1, 0.5, 0.3]] * 2])
    kv = merged(weights, keep=0.5)                                          # 0.35, 0.45, 0.6, 0.6
    assert kv.coords[0, 0, :, 3].tolist() == [2, 3] and joined(kv) == [[0, 1, 2], [3]]


def test_ties_go_to_the_first():
    assert merged(torch.full((2, 3, 5), 0.2), keep=0.5).coords[0, 0, :, 3].tolist() == [0, 1, 2]


@pytest.mark.parametrize("options", [{}, {"bucket_scope": "sequence", "keep": 3}, {"drop": True}], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_definition(seed, options):
    """Anchors of every layer by plain loops over its own queries and keys, and the means around them."""
    network, which = small_network(seed, SHARES[seed], 3), (0, 2, 3)[seed]
    prompt, image = PROMPTS[which], encode(network, [GRIDS[which]], seed)
    pruner = ElasticCache(**{"keep": 0.3, **options})
    run, q, k = watched(network, lambda: forced(network, [prompt], image, pruner))
    coords = [tuple(place) for place in image.coords[0, :, :2].tolist()]            # image and tile
    seen = visible_images(torch.tensor([prompt]), I)[0].tolist()
    sees = {t: [j for j, (i, _) in enumerate(coords) if i in range(*own)] for t, own in enumerate(seen)}
    visible = sees[len(prompt) - 1]                                                 # from the last position
    for (queries, *_), (keys,), before, kv in zip(q, k, run.read, run.held[0], strict=True):
        score, = received_by_hand(queries, keys, sees)
        anchors = []
        for i in range(*seen[-1]):      # a softmax is over all that a position sees, a budget for each image
            ours = [j for j in visible if coords[j][0] == i]
            anchors += [ours[j] for j in best([score[j] for j in ours], half_up(pruner.keep, len(ours)))]
        assert kept(kv, image) == anchors
        joining = [place if j in visible else (-1, 0) for j, place in enumerate(coords)]
        sets = [[a] for a in anchors] if pruner.drop else buckets(anchors, joining, pruner.bucket_scope)
        for i, bucket in enumerate(sets):
            close(kv.key[0, :, i], before.key[0, :, bucket].mean(1))
            close(kv.value[0, :, i], before.value[0, :, bucket].mean(1))
    plain = forced(network, [prompt], image)
    assert torch.equal(run.logits[:, 0], plain.logits[:, 0])
    assert (run.logits[:, 1] - plain.logits[:, 1]).abs().max() > 1e-4


def test_class_tokens_come_first_where_they_are_protected():
    """Within the budget: 5 of 20 tokens in 4 tiles; and of 2, the first two."""
    network = small_network(1)
    image = encode(network, [[(2, 2)]], 1)
    for keep, n, classes in (0.25, 5, 4), (2, 2, 2):
        plain, protected = (forced(network, [PROMPTS[0]], image, ElasticCache(keep, protect_cls=p)).held[0]
                            for p in (False, True))
        for kv, other in zip(protected, plain, strict=True):
            coords = kv.coords[0, 0].tolist()
            assert len(coords) == n and [p[1] for p in coords if p[2] == -1] == [*range(classes)]
            assert keep == 2 or int((other.coords[..., 2] == -1).sum()) < classes


def test_merging_is_not_dropping_but_holds_the_same_coords():
    network = small_network(2, 2, 3)
    image = encode(network, GRIDS, 3)
    merge, drop, bias = (forced(network, PROMPTS, image, ElasticCache(0.3, **options), steps=3)
                         for options in ({}, {"drop": True}, {"mass_bias": True}))
    close(drop.logits, masked(network, drop, PROMPTS, image, ElasticCache(drop=True)))
    close(merge.logits, masked(network, merge, PROMPTS, image, ElasticCache()))
    close(bias.logits, masked(network, bias, PROMPTS, image, ElasticCache()))
    for ours, theirs in zip(merge.held[0], drop.held[0], strict=True):
        assert torch.equal(ours.coords, theirs.coords) and not torch.equal(ours.key, theirs.key)
    assert (merge.logits - drop.logits).abs().max() > 1e-4 < (merge.logits - bias.logits).abs().max()


# ----- options


@pytest.mark.parametrize("options", [{"keep": 0}, {"bucket_scope": "row"}, {"mass_bias": 1},
                                     {"protect_cls": "yes"}, {"drop": None}], ids=str)
def test_a_bad_option_gets_one_line(options):
    with refused(f"elastic_cache: {next(iter(options))} is"):
        ElasticCache(**options)


def test_what_it_says_of_itself():
    assert str(ElasticCache(0.3, drop=True)) == "elastic_cache, keep 0.3, drop True"
    assert ElasticCache().merges and not ElasticCache(drop=True).merges
    assert ElasticCache(1.0).keeps_all
