"""TopV's cost, transport and picking, against values by hand, plain loops, and what makes a plan useless."""
import math

import pytest
import torch
from helpers import close, noise
from topv_by_hand import slow_cost, slow_importance, slow_pick
from torch import Tensor

from pruning.methods.topv import KAPPA, TopV, pick, transport


def costs(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ----- cost


@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 2, 0.1)])
def test_cost_against_loops(weights):
    source, target = noise(2, 30, 5, seed=1)
    spot = torch.tensor([[y - 2.0, x - 2.5] for y in range(5) for x in range(6)])
    options = TopV(0.5, *weights, sigma=3)
    expected = slow_cost(options, source.tolist(), target.tolist(), spot.tolist(), [0, 0])
    close(options.cost(source, target, spot), torch.tensor(expected))


def test_cost_is_finite_where_all_patches_are_equal():
    same = torch.ones(4, 5)
    assert TopV().cost(same, same, torch.zeros(4, 2)).tolist() == [[0.0] * 4] * 4


def test_distance_does_not_depend_on_where_the_origin_is():
    random = torch.Generator().manual_seed(1)
    states, spot = torch.randn(30, 5, generator=random), torch.randint(20, (30, 2), generator=random).float()
    near = TopV(gamma=0)
    close(near.cost(states, states, spot), near.cost(states, states, spot + torch.tensor([31.0, -7.0])))


def test_far_is_a_share_of_the_image():
    """sigma 10 of 24 x 24 patches: 16.7 of 40 x 40."""
    spot = torch.tensor([[y, x] for y in range(40) for x in range(40)]).float() - 19.5
    cost = TopV(alpha=0, gamma=0).cost(torch.zeros(1600, 1), torch.zeros(1600, 1), spot)
    sigma = 10 * 40 / 24
    far = 1 - math.exp(-2 * 39 ** 2 / (2 * sigma ** 2))         # from corner to corner, which is cost 1
    close(cost[0, 39], torch.tensor((1 - math.exp(-39 ** 2 / (2 * sigma ** 2))) / far))
    assert cost.min() == 0 and cost.max() == 1


# ----- transport


@pytest.mark.parametrize("kappa, expected", [(0, (0.6904, 0.3096)), (0.5, (0.6086, 0.3914)), (1, (0.5, 0.5))])
def test_two_patches(kappa, expected):
    plain = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    close(transport(plain + torch.tensor([[0.0], [1.0]]), kappa, 3, 1.0).sum(1), torch.tensor(expected), 5e-5)
    close(transport(plain, kappa, 3, 1.0).sum(1), torch.tensor([0.5, 0.5]), 1e-6)


@pytest.mark.parametrize("kappa, plain, with_e", [
    (0, (0.2897, 0.3756, 0.3347), (0.2054, 0.4633, 0.3313)),
    (0.5, (0.3095, 0.3546, 0.3359), (0.2618, 0.3992, 0.3390)),
    (1, (0.3308, 0.3324, 0.3368), (0.3308, 0.3324, 0.3368))])
def test_three_patches(kappa, plain, with_e):
    cost = torch.tensor([[0, 0.5, 1], [0.2, 0, 0.7], [1, 0.4, 0.1]])
    close(transport(cost, kappa, 3, 0.5).sum(1), torch.tensor(plain), 5e-5)
    off = torch.tensor([[0.3], [0.0], [0.1]])
    close(transport(cost + off, kappa, 3, 0.5).sum(1), torch.tensor(with_e), 5e-5)


@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
@pytest.mark.parametrize("kappa", [0, 0.3, 0.5, 0.9, 1])
def test_every_target_gets_its_share(kappa, iterations):
    for epsilon in 0.05, 0.1, 1.0:
        P = transport(costs(9), kappa, iterations, epsilon)
        close(P.sum(0), torch.full((9,), 1 / 9, dtype=torch.float64), 1e-12)
        expected = slow_importance(costs(9).tolist(), kappa, iterations, epsilon)
        close(P.sum(1), torch.tensor(expected, dtype=torch.float64), 1e-12)
        assert (P >= 0).all()


def test_one_sided_is_a_softmax_over_the_sources():
    for iterations in 1, 3:
        close(transport(costs(9), 0, iterations, 0.1), (-costs(9) / 0.1).softmax(0) / 9, 1e-12)


def test_balanced_transport_ranks_nothing():
    """The longer it runs, the more equal all are: what a source gives is then prescribed, not found out."""
    r = transport(costs(12), 1, 2000, 0.1).sum(1)
    assert r.max() - r.min() < 1e-6 and abs(float(r.mean()) - 1 / 12) < 1e-9
    assert transport(costs(12), 0.5, 2000, 0.1).sum(1).std() > 1e-3


def test_the_centre_counts_the_less_the_more_balanced():
    """On 12 x 12 patches; and not at all where it is balanced."""
    source, target = noise(2, 144, 8, seed=2)
    spot = torch.tensor([[y - 5.5, x - 5.5] for y in range(12) for x in range(12)])
    with_e, without = (TopV(gamma=g).cost(source, target, spot).double() for g in (0.5, 0.0))
    effect = [float((transport(with_e, kappa, 3, 0.1) - transport(without, kappa, 3, 0.1)).sum(1).abs().max())
              for kappa in (0, 0.5, 0.9, 1)]
    assert effect[0] > 1.5 * effect[1] > 1.5 * 1.5 * effect[2] and effect[3] < 1e-9 < 1e-4 < effect[2]


def test_the_ends_of_single_precision():
    """Costs far apart and a small epsilon neither overflow nor vanish."""
    cost = 50 * costs(20).float()
    for kappa in KAPPA.values():
        P = transport(cost, kappa, 3, 0.01)
        assert P.isfinite().all()
        close(P.sum(0), torch.full((20,), 1 / 20), 1e-5)


# ----- how many, and which


@pytest.mark.parametrize("stride", [0, 1, 2, 3, 4, 6])
@pytest.mark.parametrize("total", [1, 2, 9, 10, 16, 31])
def test_exactly_so_many_whatever_the_stride(total, stride):
    importance = torch.rand(total, generator=torch.Generator().manual_seed(total))
    for n in range(total + 1):
        picked = pick(importance, n, stride).tolist()
        assert sorted(picked) == slow_pick(importance.tolist(), n, stride)
        assert len(set(picked)) == n


def test_what_is_put_back():
    """Ten patches, the best four, and every fourth of the six others: the first and the fifth."""
    importance = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6, 0.5, 0.0])
    assert sorted(pick(importance, 6, 4).tolist()) == [0, 1, 3, 5, 7, 8]
    assert sorted(pick(importance, 6, 0).tolist()) == [1, 3, 5, 6, 7, 8]


def test_a_third_is_chosen_where_half_is_kept():
    """K = N (keep - 1/4) / (1 - 1/4), as whole numbers allow; their half is 0.625 with what is put back."""
    importance = torch.arange(1600.0).flip(0)
    for n, best in (800, 533), (1000, 800), (1600, 1600), (401, 1), (400, 400), (32, 32):
        assert pick(importance, n, 4)[:best].tolist() == list(range(best))
        assert len(pick(importance, n, 4)) == n == best + len(range(best, 1600, 4)) * (n > 400)


def test_ties_go_to_the_first():
    assert pick(torch.ones(9), 3, 0).tolist() == [0, 1, 2]
