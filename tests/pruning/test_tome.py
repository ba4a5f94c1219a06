"""ToMe against the bipartite soft matching of its paper (arXiv 2210.09461) and its authors' code, in loops.

The reference merges lists of tokens, in float64. What every method promises is in test_pruners.py.
"""
import math

import pytest
import torch
from helpers import WIDTH, I, close, encode, noise, refused, small_network, tile_coords
from loops import half_up
from reference import forced

from generate import generate
from model.image_tokens import ImageTokens
from pruning import hooks
from pruning.methods.tome import ToMe, match

PROMPTS = [[I]]


def random_images(*tiles: int, side: int = 3, seed: int = 0) -> ImageTokens:
    """Images of so many tiles in one sequence, with random features that are alike in groups."""
    coords = [place for image, n in enumerate(tiles) for place in tile_coords(n, side, image)]
    group = torch.randint(6, (len(coords),), generator=torch.Generator().manual_seed(seed))
    features = noise(6, WIDTH, seed=seed)[group] + 0.6 * noise(len(coords), WIDTH, seed=seed + 1)
    return ImageTokens(features[None], torch.tensor([coords]))


# ----- the reference


def cosine(x: list[float], y: list[float]) -> float:
    xy, xx, yy = (sum(p * q for p, q in zip(*pair, strict=True)) for pair in ((x, y), (x, x), (y, y)))
    return xy / math.sqrt(xx * yy)


def mean_of(features: list[list[float]], tokens: list[int]) -> list[float]:
    return [sum(features[i][d] for i in tokens) / len(tokens) for d in range(len(features[0]))]


def one_round(features: list[list[float]], groups: list[list[int]], r: int) -> list[list[int]]:
    """What is left of the groups of tokens when r pairs have merged; the first of a group stands for it."""
    in_a = range(0, len(groups), 2)
    in_b = range(1, len(groups), 2)
    pairs = []
    for a in in_a:
        mine = mean_of(features, groups[a])
        alike, nearest = max((cosine(mine, mean_of(features, groups[b])), -b) for b in in_b)
        pairs.append((-alike, a, -nearest))
    joins = {a: b for _, a, b in sorted(pairs)[:r]}
    grown = [list(group) for group in groups]
    for a, b in joins.items():
        grown[b] += groups[a]
    return [grown[a] for a in in_a if a not in joins] + [grown[b] for b in in_b]


def reference(features: list[list[float]], n: int) -> list[list[int]]:
    """The groups of tokens of one image that are left, each with the token that stands for it first."""
    groups = [[i] for i in range(len(features))]
    while len(groups) > n:
        groups = one_round(features, groups, min(len(groups) // 2, len(groups) - n))
    return sorted(groups)


# ----- the definition


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.3, 0.1, 0.02, 7, 1])
@pytest.mark.parametrize("tiles", [(1,), (4,), (2, 1)], ids=str)
def test_the_definition(tiles, keep):
    """Each token that is left is the mean of its group, at the place of the one that stands for it."""
    image = random_images(*tiles, seed=len(tiles))
    pruner, start = ToMe(keep), 0
    merged = pruner.encoded(image, PROMPTS)
    owner = pruner.owners[0][0]
    for i in range(len(tiles)):
        own = (image.coords[0, :, 0] == i).nonzero()[:, 0]
        features, coords = image.features[0, own].double().tolist(), image.coords[0, own]
        groups = reference(features, half_up(keep, len(features)))
        assert len(groups) == half_up(keep, len(features))
        part = slice(start, start + len(groups))
        assert merged.coords[0, part].tolist() == [coords[group[0]].tolist() for group in groups]
        close(merged.features[0, part], torch.tensor([mean_of(features, group) for group in groups]))
        close(merged.bias[0, part], torch.tensor([math.log(len(group)) for group in groups]))
        assert all((owner[own[group]] == own[group[0]]).all() for group in groups)
        start += len(groups)
    assert start == merged.coords.shape[1] and merged.mask is None


def test_six_tokens_by_hand():
    """A is 0, 2 and 4: 4 is most like 1, then 0 like 3, and 2 is hardly like any, but most like 3."""
    features = torch.tensor([[0.1, 2.0], [-3, 0.1], [1, 0.9], [0, 1], [-1, 0], [1, -1]])
    assert match(features, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert match(features, 5).tolist() == [0, 1, 2, 3, 1, 5]
    assert match(features, 4).tolist() == [3, 1, 2, 3, 1, 5]
    assert match(features, 3).tolist() == [3, 1, 3, 3, 1, 5]
    assert match(features, 2).tolist() == [3, 3, 3, 3, 3, 5]        # a second round: A is 1 and 5, B is 3


def test_length_does_not_count():
    """Cosine: the longest vector is no farther than the shortest, and a group is compared by its mean."""
    features = random_images(2).features[0]
    scale = torch.arange(1, len(features) + 1)[:, None] % 5 + 1.0
    once = match(features, len(features) // 2 + 1)
    assert torch.equal(once, match(features * scale, len(features) // 2 + 1))
    assert len(once.unique()) == len(features) // 2 + 1


def test_a_round_merges_at_most_half():
    """With one token fewer than half left, a second round is needed: some groups have been merged twice."""
    features = random_images(1, side=4, seed=4).features[0, :16]
    half, less = match(features, 8), match(features, 7)
    assert half.unique().tolist() == list(range(1, 16, 2))
    joined = {(int(a), int(b)) for a, b in zip(half, less, strict=True) if a != b}
    assert len(joined) == 1 and len(less.unique()) == 7


# ----- proportional attention


def test_tokens_that_are_equal_cost_nothing():
    """Each token twice: half of them with ln 2 on their scores give the logits of all of them."""
    network, prompt = small_network(1), [5, I, 6, 7]
    image = encode(network, [[(1, 2)]])
    patches = image.features[:, 1:10].repeat_interleave(2, 1)
    coords = torch.tensor([[[0, 0, i // 6, i % 6] for i in range(18)]])
    twice = ImageTokens(patches, coords)
    full, merged, plain = (forced(network, [prompt], twice, pruner, 3) for pruner in
                           (None, ToMe(0.5), ToMe(0.5, prop_attn=False)))
    assert merged.answer.kept == [[9.0] * 2]
    close(merged.logits, full.logits)
    close(plain.logits, full.logits)                    # the same number each: the bias cancels out
    uneven = ImageTokens(patches[:, 3:], coords[:, 3:])
    full, merged, plain = (forced(network, [prompt], uneven, pruner, 3) for pruner in
                           (None, ToMe(8), ToMe(8, prop_attn=False)))
    close(merged.logits, full.logits)
    assert (plain.logits - full.logits).abs().max() > 1e-3


# ----- batches and the rest


def test_images_and_sequences_merge_for_themselves():
    """In a batch with text alone, padding, several images: as each image does alone."""
    network, pruner = small_network(2), ToMe(0.3)
    sequences = [[(1, 2)], [], [(2, 2), (1, 1)]]
    image = encode(network, sequences)
    image.features[~image.mask] = math.nan
    batch = pruner.encoded(image, PROMPTS)
    assert batch.features.isfinite().all() and not batch.mask[1].any()
    for b, i in (0, 0), (2, 0), (2, 1):
        own = image.coords[b, :, 0] == i
        one = ImageTokens(image.features[b:b + 1, own], image.coords[b:b + 1, own])
        single = pruner.encoded(one, PROMPTS)
        found = batch.mask[b] & (batch.coords[b, :, 0] == i)
        assert batch.coords[b, found].tolist() == single.coords[0].tolist()
        close(batch.features[b, found], single.features[0])
        close(batch.bias[b, found], single.bias[0])


def test_nothing_merges_where_all_are_kept():
    image = random_images(2, 1)
    assert ToMe(1.0).keeps_all
    for keep in 1.0, 20, 1000:
        assert ToMe(keep).encoded(image, PROMPTS) is image
    assert hooks(ToMe) == ["encoded"] and ToMe.merges and not ToMe.keep_states


def test_half_precision_merges_the_same():
    """Matching is in fp32, whatever the features are."""
    image = random_images(2)
    half = ImageTokens(image.features.bfloat16(), image.coords)
    exact = ImageTokens(half.features.float(), image.coords)
    low, high = (ToMe(0.3).encoded(each, PROMPTS) for each in (half, exact))
    assert low.features.dtype == torch.bfloat16 and torch.equal(low.coords, high.coords)
    close(low.features.float(), high.features, 0.02)
    answer = generate(small_network(1), [[5, I]], exact, 2, (), pruner=ToMe(0.3))
    assert answer.kept == [[6.0, 6.0]]


def test_bad_options():
    with refused("^tome: prop_attn is 2, but must be true or false$"):
        ToMe(prop_attn=2)
