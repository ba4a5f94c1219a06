"""Clusters: Ward's tree beside a slow textbook one, equal tokens, cuts, projection; the cheaper ways."""
from unittest.mock import patch

import pytest
import torch
from clusters_by_hand import (
    k_centre_by_hand,
    least_cost,
    mean_of,
    merge_cost,
    partition,
    spread,
    squared,
    ward_by_hand,
)
from helpers import close, noise, refused
from torch import Tensor

from pruning import clusters
from pruning.clusters import (
    LLOYD,
    REMEMBERED,
    Tree,
    Trees,
    alike,
    central,
    forest,
    k_centre,
    project,
    spaced,
    ward,
)


def some_weight(n: int, seed: int) -> Tensor:
    return noise(n, seed=seed).exp()


def rounds_of(x: Tensor) -> tuple[Tree, int, int]:
    """The tree, how often costs were computed, and how many."""
    honest, sizes = clusters.nearest, []
    with patch.object(clusters, "nearest", lambda mean, size, square, rows:
                      sizes.append(len(mean) * len(rows)) or honest(mean, size, square, rows)):
        tree = ward(x)
    return tree, len(sizes), sum(sizes)


# ----- Ward's tree


@pytest.mark.parametrize("seed", range(12))
def test_the_tree_is_the_textbooks(seed):
    """The same clusters at every number of them, and the same costs."""
    n, width = (9, 14, 22)[seed % 3], (1, 3, 8)[seed // 4]
    x = noise(n, width, seed=seed) * 10 ** (seed % 4 - 1) + seed
    weight = some_weight(n, seed + 50) if seed % 2 else torch.ones(n)
    tree = ward(x, weight if seed % 2 else None)
    steps = ward_by_hand(x.double().tolist(), weight.double().tolist())
    assert partition(tree.cut(n)) == {frozenset([i]) for i in range(n)}
    for merges, (_, expected) in enumerate(steps, start=1):
        assert partition(tree.cut(n - merges)) == expected
    torch.testing.assert_close(tree.cost.double(), torch.tensor([cost for cost, _ in steps]).double(),
                               rtol=1e-4, atol=1e-4 * float(x.var()))
    assert (tree.cost.diff() >= 0).all() and (tree.cost >= 0).all()


@pytest.mark.parametrize("seed", range(6))
def test_every_merge_is_the_cheapest_that_there_is(seed):
    """Also with many ties and equal tokens, where the textbook's tree is one of several. And the costs of all
    merges are the sum of squared distances to the means, at every number of clusters."""
    x = torch.randint(0, 3, (14, 2), generator=torch.Generator().manual_seed(seed)).float()
    weight = torch.ones(14) if seed < 3 else some_weight(14, seed)
    tree = ward(x, weight)
    points, weights = x.double().tolist(), weight.double().tolist()
    before = partition(tree.cut(14))
    assert len(before) == 14 > len(x.unique(dim=0))
    for merges in range(1, 14):
        now = partition(tree.cut(14 - merges))
        (union,), parts = now - before, before - now
        assert len(now) == 14 - merges and len(parts) == 2 and frozenset().union(*parts) == union
        cost = merge_cost(*parts, points, weights)
        assert cost == pytest.approx(least_cost(before, points, weights), abs=1e-4)
        assert float(tree.cost[merges - 1]) == pytest.approx(cost, abs=1e-4)
        total = sum(spread(cluster, points, weights) for cluster in now)
        assert float(tree.cost[:merges].sum()) == pytest.approx(total, abs=1e-3)
        before = now


def test_equal_tokens_merge_first_and_for_nothing():
    x = noise(5, 8)[torch.arange(40) % 5]
    tree = ward(x, some_weight(40, 1))
    assert partition(tree.cut(5)) == {frozenset(range(i, 40, 5)) for i in range(5)}
    assert tree.cost[34] == 0 < tree.cost[35] and len(tree.cut(17).unique()) == 17


def test_one_token_and_two():
    one, two = ward(noise(1, 3)), ward(torch.tensor([[0.0, 1.0], [3.0, 5.0]]), torch.tensor([1.0, 3.0]))
    assert one.cut(1).tolist() == [0] and len(one.cost) == 0 and one.clusters(1, 9.0) == 1
    assert two.cut(2).tolist() == [0, 1] and two.cut(1).tolist() == [0, 0]
    assert two.cost.tolist() == [pytest.approx(3 / 4 * 25)]


NEARLY = {"equal": (0.0, 0.0), "nearly equal": (1e-7, 0.0), "nearly equal in two places": (1e-7, 1.0),
          "nearly equal, less so": (1e-4, 1.0), "alike": (1e-2, 1.0)}


@pytest.mark.parametrize("apart, far", NEARLY.values(), ids=NEARLY)
def test_equal_tokens_take_few_rounds(apart, far):
    """Costs that are rounding alone have many ties, and must not merge one pair a round."""
    n = 2000
    x = noise(64, seed=1) + far * (torch.arange(n) % 2)[:, None] * noise(64, seed=2) + apart * noise(n, 64)
    tree, rounds, costs = rounds_of(x)
    assert rounds <= 70 and costs <= 6 * n ** 2
    assert len(tree.cost) == n - 1 and len(tree.cut(137).unique()) == 137
    if far:
        assert partition(tree.cut(2)) == {frozenset(range(0, n, 2)), frozenset(range(1, n, 2))}


def test_what_is_alike_in_steps_is_alike():
    """The first and the third of these are too far apart, but the second is alike to both."""
    x = torch.tensor([[5.0], [1.0], [1.001], [1.002], [5.006], [1.003], [5.02], [5.0]])
    assert alike(x).tolist() == [0, 1, 1, 1, 0, 1, 6, 0]


def test_few_costs_are_computed_of_random_tokens():
    assert rounds_of(noise(600, 32))[2] < 5 * 600 ** 2


@pytest.mark.parametrize("beside", [0.0, 1.2])
def test_few_costs_are_computed_where_one_token_is_nearest_to_all(beside):
    """One in the middle, and the others around it at right angles; also with one more beside each."""
    one, none = torch.eye(100), torch.zeros(100, 100)
    around = [torch.cat((one, none), 1)] + [torch.cat((one, beside * one), 1)] * (beside > 0)
    tree, _, costs = rounds_of(torch.cat((torch.zeros(1, 200), *around)))
    assert costs <= 12 * tree.tokens ** 2 and len(tree.cost) == tree.tokens - 1
    if not beside:                              # the middle takes one after the other
        m = torch.arange(1, 101)
        close(tree.cost, (m ** 2 + m - 1) / (m * (m + 1)), 1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_is_not_finite_is_refused(bad):
    x = noise(6, 4)
    x[2, 1] = bad
    for cluster in ward, lambda x: k_centre(x, 2), lambda x: spaced(x, 2):
        with refused("not finite"):
            cluster(x)


def test_chunks_change_nothing():
    x, weight = noise(50, 6, seed=3), some_weight(50, 4)
    x = torch.cat((x, x[:20], x[:5]))                   # with equal ones
    weight = torch.cat((weight, weight[:25]))
    whole = ward(x, weight)
    with patch.object(clusters, "CHUNK_BYTES", 1):
        parts = ward(x, weight)
    assert all(partition(whole.cut(n)) == partition(parts.cut(n)) for n in range(1, 51))
    close(whole.cost, parts.cost)


def test_the_tree_does_not_depend_on_where_the_tokens_are():
    """Far from 0 little is lost, and the same tokens in another order make the same clusters."""
    x = noise(60, 5, seed=5)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    near, far, mixed = ward(x), ward(x + 100), ward(x[order])
    for n in range(1, 60):
        expected = partition(near.cut(n))
        assert partition(far.cut(n)) == expected
        assert {frozenset(order[list(c)].tolist()) for c in partition(mixed.cut(n))} == expected


# ----- cuts


def test_cuts_are_nested():
    tree = ward(noise(80, 4, seed=7))
    finer = partition(tree.cut(80))
    for n in range(79, 0, -1):
        coarser = partition(tree.cut(n))
        assert len(coarser) == n and len(coarser & finer) == n - 1
        finer = coarser


def test_a_height_says_how_many_clusters_there_are():
    tree = Tree(5, torch.tensor([0, 2, 0, 0]), torch.tensor([1, 3, 2, 4]), torch.tensor([0.0, 1.0, 2.0, 7.0]))
    assert [tree.clusters(5, height) for height in (0.0, 0.5, 1.0, 6.9, 7.0, 9.0)] == [4, 4, 3, 2, 1, 1]
    assert [tree.clusters(2, height) for height in (0.0, 2.5, 8.0)] == [2, 2, 1]
    assert [tree.cut(n).tolist() for n in (5, 3, 2, 1)] == [[0, 1, 2, 3, 4], [0, 0, 2, 2, 4], [0, 0, 0, 0, 4],
                                                            [0, 0, 0, 0, 0]]


def test_a_forest_never_merges_across_parts():
    """In each part it is the tree of the part, and the cheapest merges of all come first."""
    x, weight, parts = noise(40, 3, seed=8), some_weight(40, 9), (torch.arange(40) * 7 % 3).float()
    both = forest(x, weight, parts)
    assert len(both.cost) == 37 and (both.cost.diff() >= 0).all()
    own = [(parts == p).nonzero()[:, 0] for p in range(3)]
    trees = [ward(x[i], weight[i]) for i in own]
    for n in range(3, 40):
        made = partition(both.cut(n))
        assert len(made) == n
        expected = set()
        for i, tree in zip(own, trees, strict=True):
            merges = int((tree.cost <= both.cost[39 - n]).sum()) if n < 40 else 0
            expected |= {frozenset(i[list(c)].tolist()) for c in partition(tree.cut(len(i) - merges))}
        assert made == expected
    assert partition(both.cut(1)) == {frozenset(i.tolist()) for i in own}
    assert both.clusters(40, 1e9) == 3


def test_the_latest_trees_are_remembered():
    x, one, parts = [noise(9, 3, seed=i) for i in range(REMEMBERED + 1)], torch.ones(9), torch.zeros(9)
    trees = Trees()
    first = trees.of(x[0], one, parts)
    assert trees.of(x[0].clone(), one, parts) is first
    for other in (x[1], one, parts), (x[0], 2 * one, parts), (x[0], one, torch.arange(9) % 2):
        assert trees.of(*other) is not first and trees.of(*other) is trees.of(*other)
    assert torch.equal(trees.of(x[1], one, parts).cost, ward(x[1]).cost)
    for each in x:
        trees.of(each, one, parts)
    assert len(trees.known) == REMEMBERED and trees.of(x[0], one, parts) is not first


# ----- projection


def test_a_projection_keeps_distances():
    """Of 780 pairs the mean within 3 %, each within 65 %: the standard deviation is (2 / 64)^0.5, 18 %."""
    x = noise(40, 2048, seed=1).bfloat16()
    small = project(x, 64)
    assert small.dtype == torch.float32 and small.shape == (40, 64) and torch.equal(small, project(x, 64))
    ratio = (torch.pdist(small) / torch.pdist(x.float())).square()
    assert abs(float(ratio.mean()) - 1) < 0.03 and float((ratio - 1).abs().max()) < 0.65
    with patch.object(clusters, "AT_ONCE", 7):
        close(project(x, 64), small, 1e-3)
    for width in 0, 2048, 5000:
        assert torch.equal(project(x, width), x.float())


# ----- without a tree


@pytest.mark.parametrize("n", [1, 2, 5, 12, 17])
def test_every_nth_token_and_the_others_to_the_nearest(n):
    x = noise(17, 4, seed=n)
    x[3:9] = x[2]                                       # equal ones: each centre stays in its own cluster
    owner = spaced(x, n).tolist()
    centres = sorted(set(owner))
    assert len(centres) == n and centres[0] == 0 and all(owner[c] == c for c in centres)
    gaps = [b - a for a, b in zip(centres, [*centres[1:], 17], strict=True)]
    assert set(gaps) <= {17 // n, -(-17 // n)}
    points = x.double().tolist()
    for i in range(17):
        least = min(squared(points[i], points[c]) for c in centres)
        assert squared(points[i], points[owner[i]]) == pytest.approx(least, abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_the_farthest_tokens_and_lloyds_rounds(seed):
    x = noise(20, 3, seed=seed)
    for n in 1, 4, 9, 20:
        assert partition(k_centre(x, n)) == k_centre_by_hand(x.double().tolist(), n, LLOYD)
    assert len(k_centre(x[torch.arange(20) % 4], 9).unique()) == 4          # no more than there are


def test_the_token_nearest_to_the_mean_stands_for_a_cluster():
    x = noise(30, 4, seed=2)
    owner = ward(x).cut(6)
    named = central(x, owner)
    assert partition(named) == partition(owner)
    points, ones = x.double().tolist(), [1.0] * 30
    for cluster in partition(named):
        mean, _ = mean_of(cluster, points, ones)
        best = min(sorted(cluster), key=lambda i: squared(points[i], mean))
        assert {int(named[i]) for i in cluster} == {best}
    assert central(torch.zeros(4, 2), torch.tensor([3, 3, 1, 3])).tolist() == [0, 0, 2, 0]
