"""Elastic Cache against its formulas (arXiv 2407.18121), in loops over captured queries, keys and values.

Which tokens are anchors, who joins them and what becomes of a bucket; then the same on the text's own caches,
and what goes from them while decoding. What every method promises is in test_pruners.py.
"""
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.cache import TextKV
from model.image_tokens import ImageKV, ImageTokens
from model.layers import attend
from pruning.methods.elastic_cache import ElasticCache
from pruning.pruner import Prompts

I = 60          # noqa: E741  the image token
PROMPTS = [[5, 6, I, 7, 8, 9, 10, 11], [12, 13, 14], [I, 5, 15, I, 16, 17], [9, 8, I, I, 18]]
GRIDS = [[(2, 2)], [], [(1, 1), (1, 3)], [(1, 2), (2, 1)]]
PLACES = {"one tile": [(0, 0)] * 12, "tiles": [(0, 0)] * 5 + [(0, 1)] * 5 + [(0, 2)] * 4,       # image, tile
          "two images": [(0, 0)] * 6 + [(1, 0)] * 4 + [(1, 1)] * 4}


def close(a: Tensor, b: Tensor, atol: float = 1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# ----- the formulas, slowly


def weights(q: Tensor, k: Tensor) -> list[float]:
    """One row of a softmax, q [d] and k [N, d]."""
    powers = [math.exp(float(q.double() @ key.double()) / math.sqrt(len(q))) for key in k]
    return [power / sum(powers) for power in powers]


def importance(q: Tensor, k: Tensor, sees: list[list[int]]) -> list[float]:
    """Summed over rows, a mean over heads: q [H, T, d], k [G, N, d], and the tokens that each row sees."""
    total = [0.0] * k.shape[1]
    for h in range(len(q)):
        for t, inside in enumerate(sees):
            for j, weight in zip(inside, weights(q[h, t], k[h * len(k) // len(q), inside]), strict=True):
                total[j] += weight / len(q)
    return total


def best(score: list[float], n: int) -> list[int]:
    return sorted(sorted(range(len(score)), key=lambda j: (-score[j], j))[:n])


def buckets(anchors: list[int], coords: list[tuple[int, int]], scope: str) -> list[list[int]]:
    """Of each anchor, the tokens that are nearest to it; `place` says image and tile of each token."""
    members = {anchor: [] for anchor in anchors}
    for t, (image, tile) in enumerate(coords):
        ours = [a for a in anchors if coords[a][0] == image]
        if not ours:
            continue                    # nobody sees this image any more
        if scope == "tile":
            ours = [a for a in ours if coords[a][1] == tile] or ours
        members[min(ours, key=lambda a: (abs(a - t), a))].append(t)
    return list(members.values())


def half_up(share: float, n: int) -> int:
    return max(1, math.floor(share * n + 0.5))


def cache(coords: list[tuple[int, int]], value: Tensor | None = None, heads: int = 1,
          seed: int = 0) -> ImageKV:
    """One batch row with random keys; values, if not given, are unit vectors, so that a mean says of whom."""
    key = torch.randn(1, heads, len(coords), 8, generator=torch.Generator().manual_seed(seed))
    value = torch.eye(len(coords)).expand(1, heads, -1, -1) if value is None else value
    where = torch.tensor([[image, tile, 0, i] for i, (image, tile) in enumerate(coords)])
    return ImageKV(key, value, where[None, None])


def cut(kv: ImageKV, anchors: list[int], **options) -> ImageKV:
    kept = torch.zeros(1, 1, kv.key.shape[2], dtype=torch.bool)
    kept[..., anchors] = True
    return ElasticCache(**options).cut(kv, kept)


def joined(kv: ImageKV) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in kv.value[0, 0]]


# ----- buckets


def test_the_examples():
    assert joined(cut(cache([(0, 0)] * 6), [1, 4])) == [[0, 1, 2], [3, 4, 5]]
    assert joined(cut(cache([(0, 0)] * 7), [1, 5])) == [[0, 1, 2, 3], [4, 5, 6]]         # 3 is a tie


@pytest.mark.parametrize("scope", ["tile", "sequence"])
@pytest.mark.parametrize("coords", PLACES.values(), ids=PLACES)
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
    q = torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def out(kv: ImageKV) -> float:
        return float(attend(q, kv.key, kv.value, kv.scores_mask())[0, 0, 0])
    plain, biased = cut(kv, [1, 5]), cut(kv, [1, 5], mass_bias=True)
    assert out(kv) == pytest.approx(2) == out(biased) and out(plain) == pytest.approx(2.5)
    assert plain.bias is None
    close(biased.bias, torch.tensor([[[4.0, 2.0]]]).log())
    even = [out(cut(kv, [1, 4], mass_bias=bias)) for bias in (False, True)]
    assert even[0] == pytest.approx(even[1]) == pytest.approx(2)


def test_padding_reaches_no_mean():
    """NaN in what is masked, and another batch row that is longer."""
    kv, N = cache([(0, 0)] * 9, heads=2), 9
    mask = torch.tensor([True] * 6 + [False] * 3).expand(2, 1, N).clone()
    mask[1] = True
    key, value = kv.key.repeat(2, 1, 1, 1), kv.value.repeat(2, 1, 1, 1)
    key[0, :, 6:] = value[0, :, 6:] = math.nan
    kept = torch.zeros(2, 1, N, dtype=torch.bool)
    kept[0, :, [1, 4]] = kept[1, :, [0, 3, 8]] = True
    both = ElasticCache(mass_bias=True).cut(ImageKV(key, value, kv.coords.repeat(2, 1, 1, 1), mask), kept)
    assert both.key.isfinite().all() and both.value.isfinite().all()
    alone = cut(replace(kv, key=kv.key[:, :, :6], value=kv.value[:, :, :6], coords=kv.coords[:, :, :6]), [1, 4],
                mass_bias=True)
    assert both.mask.tolist() == [[[True, True, False]], [[True] * 3]]
    for ours, theirs in (both.key, alone.key), (both.value, alone.value), (both.bias, alone.bias):
        close(ours[:1, :, :2], theirs)


# ----- anchors


def merged(attention_of, looked: Tensor, **options) -> ImageKV:
    queries, image, kv = attention_of(looked)
    pruner = ElasticCache(**options)
    assert pruner.layer(0, queries, image, kv) == (image, kv)           # it is read with everything
    return pruner.prefilled([kv])[0]


def test_the_highest_scores_are_the_anchors(attention_of):
    """The released code takes another: it compares what argsort returns as if these were ranks."""
    kv = merged(attention_of, torch.tensor([[[0.9, 0.1, 0.3]]]), keep=1)
    assert kv.coords[0, 0, :, 3].tolist() == [0] and joined(kv) == [[0, 1, 2]]


def test_the_sum_over_rows_and_the_mean_over_heads(attention_of):
    looked = torch.tensor([[[0.5, 0.2, 0.1, 0.2], [0.0, 0.5, 0.1, 0.4]], [[0.1, 0.1, 0.5, 0.3]] * 2])
    kv = merged(attention_of, looked, keep=0.5)                             # 0.35, 0.45, 0.6, 0.6
    assert kv.coords[0, 0, :, 3].tolist() == [2, 3] and joined(kv) == [[0, 1, 2], [3]]


def test_ties_go_to_the_first(attention_of):
    assert merged(attention_of, torch.full((2, 3, 5), 0.2), keep=0.5).coords[0, 0, :, 3].tolist() == [0, 1, 2]


@pytest.mark.parametrize("options", [{}, {"bucket_scope": "sequence", "keep": 3}, {"drop": True}], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_definition(seed, options, small, see, ask):
    """Anchors of every layer by plain loops over its own queries and keys, and the means around them."""
    network, row = small(seed, (1, 2, 4)[seed], 3), (0, 2, 3)[seed]
    image, pruner = see(network, [GRIDS[row]], seed), ElasticCache(**{"keep": 0.3, **options})
    asked: list = []
    honest = pruner.score
    pruner.score = lambda i, queries, kv: asked.append((queries, kv)) or honest(i, queries, kv)
    run = ask(network, [PROMPTS[row]], image, pruner)
    for (queries, whole), kv in zip(asked, run.held[0], strict=True):
        coords, seen = [tuple(p) for p in image.coords[0, :, :2].tolist()], queries.seen[0].tolist()
        tokens = [[t for t, (i, _) in enumerate(coords) if i in range(*images)] for images in seen]
        score, anchors = importance(queries.q[0], whole.key[0], tokens), []
        for i in range(*seen[-1]):          # a softmax is over all that a row sees, a budget for each image
            ours = [t for t in tokens[-1] if coords[t][0] == i]
            n = pruner.keep if type(pruner.keep) is int else half_up(pruner.keep, len(ours))
            anchors += [ours[t] for t in best([score[t] for t in ours], n)]
        assert kv.coords[0, 0].tolist() == image.coords[0, anchors].tolist()
        joining = [coords[t] if t in tokens[-1] else (-1, 0) for t in range(len(coords))]     # or seen no more
        sets = [[a] for a in anchors] if pruner.drop else buckets(anchors, joining, pruner.bucket_scope)
        for k, bucket in enumerate(sets):
            close(kv.key[0, :, k], whole.key[0, :, bucket].mean(1))
            close(kv.value[0, :, k], whole.value[0, :, bucket].mean(1))
    whole = ask(network, [PROMPTS[row]], image)
    assert torch.equal(run.logits[:, 0], whole.logits[:, 0])
    assert (run.logits[:, 1] - whole.logits[:, 1]).abs().max() > 1e-4


def test_class_tokens_come_first_where_they_are_protected(small, see, ask):
    """Within the budget: 5 of 20 tokens in 4 tiles; and of 2, the first two."""
    network = small(1)
    image = see(network, [[(2, 2)]], 1)
    for keep, n, classes in (0.25, 5, 4), (2, 2, 2):
        plain, protected = (ask(network, [PROMPTS[0]], image, ElasticCache(keep, protect_cls=p)).held[0]
                            for p in (False, True))
        for kv, other in zip(protected, plain, strict=True):
            coords_of = kv.coords[0, 0].tolist()
            assert len(coords_of) == n and [p[1] for p in coords_of if p[2] == -1] == [*range(classes)]
            assert keep == 2 or int((other.coords[..., 2] == -1).sum()) < classes


def test_merging_is_not_dropping_but_holds_the_same_places(small, see, ask, masked):
    network = small(2, 2, 3)
    image = see(network, GRIDS, 3)
    merge, drop, bias = (ask(network, PROMPTS, image, ElasticCache(0.3, **options), steps=3)
                         for options in ({}, {"drop": True}, {"mass_bias": True}))
    close(drop.logits, masked(network, drop, PROMPTS, image, ElasticCache(drop=True)))
    close(merge.logits, masked(network, merge, PROMPTS, image, ElasticCache()))
    close(bias.logits, masked(network, bias, PROMPTS, image, ElasticCache()))
    for ours, theirs in zip(merge.held[0], drop.held[0], strict=True):
        assert torch.equal(ours.coords, theirs.coords) and not torch.equal(ours.key, theirs.key)
    assert (merge.logits - drop.logits).abs().max() > 1e-4 < (merge.logits - bias.logits).abs().max()


# ----- the text's own caches


def text(lengths: list[int], capacity: int, seed: int, heads: int = 2) -> tuple[Tensor, TextKV]:
    """Queries of twice as many heads, and a cache; NaN where nothing is."""
    generator, B, T = torch.Generator().manual_seed(seed), len(lengths), max(lengths)
    q = 2 * torch.randn(B, 2 * heads, T, 8, generator=generator)
    key, value = torch.full((2, B, heads, capacity, 8), math.nan)
    for row, n in enumerate(lengths):
        key[row, :, :n] = torch.randn(heads, n, 8, generator=generator)
        value[row, :, :n] = torch.randn(heads, n, 8, generator=generator)
    return q, TextKV(key, value, torch.tensor(lengths))


def told(pruner: ElasticCache, lengths: list[int], imaged: list[bool]) -> ElasticCache:
    mask = torch.tensor(imaged)[:, None].expand(-1, 3)
    image = ImageTokens(torch.zeros(*mask.shape, 4), torch.zeros(*mask.shape, 4, dtype=torch.long), mask)
    pruner.encoded(image, Prompts([[5] * n for n in lengths], 10, ()))
    return pruner


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_text_is_merged_around_its_own_anchors(seed, drop):
    """Causal sums, the first and the last token protected; a row without an image keeps all."""
    lengths, imaged = [9, 5, 12, 7, 1], [True, True, True, False, True]
    pruner = told(ElasticCache(text_keep=0.4, drop=drop), lengths, imaged)
    layers = [text(lengths, 16, seed + 10 * i) for i in range(3)]
    for i, (q, kv) in enumerate(layers):
        pruner.text_layer(i, q, kv.key[:, :, :12], kv.lengths)
    for (q, kv), held in zip(layers, pruner.text_cache(-1, [kv for _, kv in layers]), strict=True):
        assert held.lengths.tolist() == [4, 2, 5, 7, 1]
        for row, n in enumerate(lengths):
            score = importance(q[row, :, :n], kv.key[row, :, :n], [[*range(t + 1)] for t in range(n)])
            score[0] = score[-1] = math.inf
            anchors = best(score, half_up(0.4, n)) if imaged[row] else list(range(n))
            sets = [[a] for a in anchors] if drop else buckets(anchors, [(0, 0)] * n, "sequence")
            for k, bucket in enumerate(sets):
                close(held.key[row, :, k], kv.key[row, :, bucket].mean(1))
                close(held.value[row, :, k], kv.value[row, :, bucket].mean(1))
            assert int(held.lengths[row]) == len(sets)


def eliminated(prompt: int, share: float, steps: int) -> list[list[int]]:
    """The paper's rule: what is held after each step; what is left of the prompt counts from 0, new tokens
    from 1000."""
    held = list(range(half_up(share, prompt)))
    point, history = len(held) - 25, []
    for step in range(steps):
        held.append(1000 + step)
        if math.floor(len(held) - (prompt + step + 1) * share + 1e-9) >= 1:
            del held[max(point, 1)]
        history.append(list(held))
    return history


@pytest.mark.parametrize("share", [0.5, 0.2, 0.75])
def test_one_entry_too_many_goes_at_a_fixed_point(share):
    """Each row counts for itself; first what is left of the prompt goes, then the oldest new tokens."""
    lengths, steps = [80, 20, 6, 41], 90
    pruner = told(ElasticCache(text_keep=share), lengths, [True, True, True, False])
    q, kv = text(lengths, 180, 1, heads=1)
    pruner.text_layer(0, q, kv.key[:, :, :80], kv.lengths)
    start = pruner.text_cache(-1, [kv])[0]
    key = torch.arange(180.0).view(1, 1, -1, 1).repeat(4, 1, 1, 1)
    held, expected = TextKV(key, -key, start.lengths), [eliminated(n, share, steps) for n in lengths[:3]]
    for step in range(steps):
        key, lengths_now = held.key.clone(), held.lengths + 1
        key[torch.arange(4), :, lengths_now - 1] = 1000.0 + step
        held = pruner.text_cache(step, [TextKV(key, -key, lengths_now)])[0]
        wide = torch.full((4, 1, 180, 1), math.nan)
        wide[:, :, :held.key.shape[2]] = held.key
        assert torch.equal(held.value.nan_to_num(), -held.key.nan_to_num())
        held = TextKV(wide, -wide, held.lengths)
        for row, history in enumerate(expected):
            assert held.key[row, 0, :int(held.lengths[row]), 0].tolist() == history[step]
    assert int(held.lengths[3]) == 41 + steps
    assert all(history[-1][0] == 0 and history[-1][-1] == 1000 + steps - 1 for history in expected)


def test_text_in_a_whole_answer(small, see, ask):
    """Each row as it is alone; a row without an image as if nothing were pruned; others change."""
    network, pruner = small(2, 2, 3), ElasticCache(0.4, text_keep=0.4)
    image = see(network, GRIDS, 5)
    assert not ElasticCache(1.0, text_keep=0.4).keeps_all and ElasticCache(1.0).keeps_all
    run, whole = ask(network, PROMPTS, image, pruner, 5), ask(network, PROMPTS, image, ElasticCache(0.4), 5)
    for row, prompt in enumerate(PROMPTS):
        one = see(network, GRIDS, 5).rows([row])
        real = slice(None) if image.mask is None else image.mask[row]
        one = ImageTokens(one.features[:, real], one.coords[:, real]) if GRIDS[row] else None
        close(run.logits[row], ask(network, [prompt], one, pruner, 5).logits[0])
    assert torch.equal(run.logits[:, 0], whole.logits[:, 0])
    close(run.logits[1], whole.logits[1])
    assert all((run.logits[row, 1:] - whole.logits[row, 1:]).abs().max() > 1e-4 for row in (0, 2, 3))
    everything = ask(network, PROMPTS, image, ElasticCache(100, text_keep=0.999), 5)    # rounds to all of it
    close(everything.logits[:, :2], ask(network, PROMPTS, image, steps=5).logits[:, :2])


# ----- options


@pytest.mark.parametrize("options", [{"keep": 0}, {"bucket_scope": "row"}, {"mass_bias": 1}, {"text_keep": 0.0},
                                   {"text_keep": 2}, {"protect_cls": "yes"}, {"drop": None}], ids=str)
def test_a_bad_knob_gets_one_line(options):
    with pytest.raises(ValueError, match=f"elastic_cache: {next(iter(options))} is") as error:
        ElasticCache(**options)
    assert "\n" not in str(error.value)


def test_what_it_says_of_itself():
    assert str(ElasticCache(0.3, drop=True)) == "elastic_cache, keep 0.3, drop True"
    assert ElasticCache().merges and not ElasticCache(drop=True).merges
