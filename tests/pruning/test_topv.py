"""TopV against the formulas of its paper (arXiv 2503.18278) as we read them, written out in plain loops.

The reference takes the states from the encoder's last layer by itself, and works in float64. The transport is
held against values computed by hand, and against what makes the balanced one useless; what every method
promises, that dropping is masking above all, is in test_pruners.py too.
"""
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.image_tokens import ImageTokens, Tiles, Vision
from model.llama_vision import LlamaVision
from pruning import hooks
from pruning.methods.topv import KAPPA, TopV, pick, transport
from pruning.pruner import Prompts, num_kept

I = 60          # noqa: E741  the image token
PROMPTS = Prompts([[I]], 1, ())
GRIDS = [(1, 1), (1, 3), (2, 2), (3, 1)]            # rows, columns of tiles
PLAIN = {"gamma": 0.3, "epsilon": 0.3}              # so that every term has its say


def close(a: Tensor, b: Tensor, atol: float = 1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def coords_of(grid: tuple[int, int], side: int, image: int = 0) -> list[list[int]]:
    """Image, tile, row and column of the tokens of an image, in the encoder's order."""
    tile = [(-1, -1)] + [(row, column) for row in range(side) for column in range(side)]
    return [[image, t, *where] for t in range(grid[0] * grid[1]) for where in tile]


def random_images(*grids: tuple[int, int], side: int = 3, seed: int = 0) -> ImageTokens:
    """One batch row with encoded images of these grids, of random states."""
    coords = torch.tensor([p for image, grid in enumerate(grids) for p in coords_of(grid, side, image)])[None]
    random = torch.Generator().manual_seed(seed)
    entering, leaving = torch.randn(2, 1, coords.shape[1], 6, generator=random)
    features = torch.arange(coords.shape[1]).float().view(1, -1, 1)          # a token's number, to find it by
    tiles = Tiles(torch.zeros(len(grids), 4, 3, 1, 1), torch.tensor(grids))
    return ImageTokens(features, coords, None, Vision([tiles], features, entering, leaving))


def kept(image: ImageTokens, **options) -> list[int]:
    """The numbers of the tokens of `images` that are left."""
    return TopV(**options).encoded(image, PROMPTS).features[0, :, 0].int().tolist()


def costs(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ----- the paper's formulas, in loops


def distance(a: list[float], b: list[float]) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def stretched(x: list[list[float]]) -> list[list[float]]:
    low, high = min(map(min, x)), max(map(max, x))
    return [[(v - low) / (high - low) if high > low else 0.0 for v in row] for row in x]


def slow_cost(options: TopV, source, target, spots, centre) -> list[list[float]]:
    """One source, one target and one term after the other; spots are x and y."""
    n, sigma = len(spots), options.sigma * math.sqrt(len(spots)) / 24
    F = stretched([[distance(s, t) for t in target] for s in source])
    S = stretched([[1 - math.exp(-distance(a, b) / (2 * sigma ** 2)) for b in spots] for a in spots])
    E = stretched([[math.sqrt(distance(a, centre))] for a in spots])
    return [[options.alpha * F[i][j] + options.beta * S[i][j] + options.gamma * E[i][0] for j in range(n)]
            for i in range(n)]


def slow_importance(cost: list[list[float]], kappa: float, iterations: int, epsilon: float) -> list[float]:
    """Row sums of the plan, with both shares 1 / n written out."""
    n = range(len(cost))
    share, K = 1 / len(cost), [[math.exp(-c / epsilon) for c in row] for row in cost]
    a, b = [1.0 for _ in n], [1.0 for _ in n]
    for _ in range(iterations):
        a = [(share / sum(K[i][j] * b[j] for j in n)) ** kappa for i in n]
        b = [share / sum(K[i][j] * a[i] for i in n) for j in n]
    return [sum(a[i] * K[i][j] * b[j] for j in n) for i in n]


def slow_pick(importance: list[float], n: int, stride: int) -> list[int]:
    """As many of the best as leave room for every `stride`-th of the others, by trying."""
    order = sorted(range(len(importance)), key=lambda i: (-importance[i], i))
    for best in range(n, 0, -1):
        recovered = sorted(order[best:])[::stride] if stride else []
        if best + len(recovered) == n:
            return sorted(order[:best] + recovered)
    return sorted(order[:n])


def reference(options: TopV, coords: list[list[int]], grid: tuple[int, int], source, target) -> list[int]:
    """Which tokens of one image are kept, as their numbers."""
    side = 1 + max(p[3] for p in coords)
    spot = [(side * (t % grid[1]) + column, side * (t // grid[1]) + row) for _, t, row, column in coords]
    centre = [(side * grid[1] - 1) / 2, (side * grid[0] - 1) / 2]
    n, tiles = int(num_kept(options.keep, torch.tensor(len(coords)))), grid[0] * grid[1]
    first = [i for i, p in enumerate(coords) if p[2] < 0][:n // 2]
    problems = [range(tiles)] if options.scope == "canvas" else [[t] for t in range(tiles)]
    chosen, share, over = list(first), *divmod(n - len(first), len(problems))
    for number, problem in enumerate(problems):
        which = sorted((i for i, p in enumerate(coords) if p[2] >= 0 and p[1] in problem),
                       key=lambda i: (spot[i][1], spot[i][0]))
        cost = slow_cost(options, *([states[i] for i in which] for states in (source, target, spot)), centre)
        importance = slow_importance(cost, KAPPA[options.mode], options.iterations, options.epsilon)
        chosen += [which[i] for i in slow_pick(importance, share + (number < over), options.stride)]
    return sorted(chosen)


VARIANTS = [{}, {"mode": "one_sided", "scope": "tile"}, {"mode": "balanced", "stride": 0},
            {"scope": "tile", "stride": 3, "sigma": 4}, {"alpha": 0.1, "gamma": 2, "iterations": 1},
            {"beta": 0, "epsilon": 0.1, "stride": 7}]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_the_definition(grid, options):
    for seed, keep in enumerate((0.05, 0.3, 0.5, 0.75, 7)):
        image, pruner = random_images(grid, seed=seed), TopV(keep, **PLAIN | options)
        source, target = (s[0].double().tolist() for s in (image.vision.entering, image.vision.leaving))
        expected = reference(pruner, image.coords[0].tolist(), grid, source, target)
        assert kept(image, keep=keep, **PLAIN | options) == expected


def states_of_the_last_layer(network: LlamaVision, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """What entered it, and what its MLP was given, as the network's modules saw it: [1, rows, E]."""
    seen, last = [], network.vision_model.global_transformer.layers[-1]
    hooks = [last.input_layernorm.register_forward_hook(lambda module, given, output: seen.append(given[0])),
             last.post_attention_layernorm.register_forward_hook(lambda module, given, out: seen.append(out))]
    network.vision_model(tiles.pixels, tuple(tiles.grid[0].tolist()))
    for hook in hooks:
        hook.remove()
    assert len(seen) == 2
    return seen[0], seen[1]


@pytest.mark.parametrize("scope", ["canvas", "tile"])
@pytest.mark.parametrize("grid", GRIDS)
def test_inside_the_network(grid, scope, small, draw, ask, masked):
    """The tokens that the loops choose from the encoder's states; the logits are those of the rest masked."""
    network, pruner, prompt = small(1), TopV(0.5, scope=scope, **PLAIN), [5, 6, I, 7, 8]
    tiles = draw([grid], network.config.vision, seed=3)
    image = network.encode([tiles], vision=True)
    source, target = (s[0].double().tolist() for s in states_of_the_last_layer(network, tiles))
    expected = reference(pruner, image.coords[0].tolist(), grid, source, target)
    run = ask(network, [prompt], image, pruner, steps=3)
    for kv in run.read + [kv for kvs in run.held for kv in kvs]:
        assert kv.coords[0, 0].tolist() == image.coords[0, expected].tolist()
    assert run.answer.kept == [[float(len(expected))] * len(run.read)]
    close(run.logits, masked(network, run, [prompt], image))


# ----- cost


@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 2, 0.1)])
def test_cost_against_loops(weights):
    random = torch.Generator().manual_seed(1)
    source, target = torch.randn(2, 30, 5, generator=random)
    spot = torch.tensor([[y - 2.0, x - 2.5] for y in range(5) for x in range(6)])
    options = TopV(0.5, *weights, sigma=3)
    expected = slow_cost(options, source.tolist(), target.tolist(), spot.tolist(), [0, 0])
    close(options.cost(source, target, spot), torch.tensor(expected))


def test_cost_is_finite_where_all_patches_are_alike():
    same = torch.ones(4, 5)
    assert TopV().cost(same, same, torch.zeros(4, 2)).tolist() == [[0.0] * 4] * 4


def spot_of(grid: tuple[int, int], side: int, scope: str = "canvas") -> dict[tuple[int, ...], Tensor]:
    """Where the method has each patch (tile, row, column): y and x from the centre."""
    given, image = [], random_images(grid, side=side)

    class Watched(TopV):
        def cost(self, source, target, spot):
            given.append((source[:, 0], spot))
            return super().cost(source, target, spot)
    Watched(scope=scope).encoded(image, PROMPTS)
    number = {float(s): i for i, s in enumerate(image.vision.entering[0, :, 0])}
    return {tuple(image.coords[0, number[float(s)], 1:].tolist()): where
            for source, spot in given for s, where in zip(source, spot, strict=True)}


@pytest.mark.parametrize("scope", ["canvas", "tile"])
def test_tiles_that_touch_are_neighbours(scope):
    spot = spot_of((2, 2), 10, scope)
    assert len(spot) == 400
    for i in range(10):
        for a, b in ((0, i, 9), (1, i, 0)), ((0, 9, i), (2, 0, i)), ((2, i, 9), (3, i, 0)):
            assert (spot[a] - spot[b]).norm() == 1
    assert (spot[0, 9, 9] - spot[3, 0, 0]).norm() == 2 ** 0.5
    assert (spot[1, 0, 9] - spot[2, 9, 0]).norm() == 19 * 2 ** 0.5


def test_the_centre_is_the_middle_of_the_image():
    for grid, side, middle in (((1, 1), 40, {(0, y, x) for y in (19, 20) for x in (19, 20)}),
                               ((1, 1), 5, {(0, 2, 2)}),
                               ((1, 3), 5, {(1, 2, 2)}),
                               ((2, 2), 4, {(0, 3, 3), (1, 3, 0), (2, 0, 3), (3, 0, 0)}),
                               ((2, 1), 3, {(0, 2, 1), (1, 0, 1)})):
        spot = spot_of(grid, side)
        off = {where: float(xy.norm()) for where, xy in spot.items()}
        assert {where for where, length in off.items() if length == min(off.values())} == middle


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
    random = torch.Generator().manual_seed(2)
    source, target = torch.randn(2, 144, 8, generator=random)
    spot = torch.tensor([[y - 5.5, x - 5.5] for y in range(12) for x in range(12)])
    with_e, without = (TopV(gamma=g).cost(source, target, spot).double() for g in (0.5, 0.0))
    effect = [float((transport(with_e, kappa, 3, 0.1) - transport(without, kappa, 3, 0.1)).sum(1).abs().max())
              for kappa in (0, 0.5, 0.9, 1)]
    assert effect[0] > 1.5 * effect[1] > 1.5 * 1.5 * effect[2] and effect[3] < 1e-9 < 1e-4 < effect[2]


def test_the_modes():
    """They are ends and middle of one scale, and choose differently."""
    assert KAPPA == {"one_sided": 0, "partial": 0.5, "balanced": 1}
    image = random_images((2, 2), side=4)
    central, plain = ({mode: kept(image, keep=0.5, stride=0, mode=mode, gamma=gamma) for mode in KAPPA}
                      for gamma in (0.3, 0.0))
    assert len(set(map(tuple, central.values()))) == 3
    assert [central[mode] == plain[mode] for mode in KAPPA] == [False, False, True]


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


def test_putting_back_goes_row_by_row_of_the_image():
    """Not tile by tile, where the image is one problem: what is dropped of its first row comes first."""
    image, chosen = random_images((1, 3), seed=6), kept(random_images((1, 3), seed=6), keep=0.5, stride=4)
    coords = image.coords[0].tolist()
    best = set(kept(image, keep=(15 - 3) * 4 // 3 - 9 + 3, stride=0))       # K of n = 12 of 27 patches: 7
    dropped = sorted((i for i, p in enumerate(coords) if p[2] >= 0 and i not in best),
                     key=lambda i: (coords[i][2], 3 * coords[i][1] + coords[i][3]))
    assert len(chosen) == 15 and sorted(best | set(dropped[::4])) == chosen


@pytest.mark.parametrize("scope", ["canvas", "tile"])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_share_is_what_is_left_in_the_end(grid, scope):
    """Class tokens and what is put back included; class tokens go only where they would be more than half."""
    image = random_images(grid)
    size, tiles = image.coords.shape[1], grid[0] * grid[1]
    for keep in 0.001, 0.02, 0.1, 0.25, 0.4, 0.5, 0.625, 0.9, 0.999, 1, 2, 3, 4, 5, 9, size - 1, size + 5:
        n = max(1, math.floor(keep * size + 0.5)) if isinstance(keep, float) else min(keep, size)
        for stride in 0, 4:
            chosen = kept(image, keep=keep, scope=scope, stride=stride)
            first = [i for i in chosen if image.coords[0, i, 2] < 0]
            assert len(chosen) == n and chosen == sorted(set(chosen))
            assert first == [t * 10 for t in range(min(tiles, n // 2))]


def test_each_tile_has_an_equal_share():
    image = random_images((2, 2), seed=2)
    image.vision.entering[0, :10] += 20                 # the first tile is unlike all targets
    for keep, shares in (22, [5, 5, 4, 4]), (16, [3, 3, 3, 3]), (6, [1, 1, 1, 0]):
        chosen = [image.coords[0, i] for i in kept(image, keep=keep, scope="tile", stride=0)]
        assert [sum(int(p[1]) == t and int(p[2]) >= 0 for p in chosen) for t in range(4)] == shares
    chosen = [image.coords[0, i] for i in kept(image, keep=22, stride=0)]
    assert sum(int(p[1]) == 0 and int(p[2]) >= 0 for p in chosen) == 0


def test_what_gives_most_is_kept():
    """A source like all targets is kept; one unlike any is not."""
    image = random_images((1, 1), seed=3)
    image.vision.leaving[:] = 0.1 * image.vision.leaving + 1
    image.vision.entering[0, 4], image.vision.entering[0, 7] = 1, -9
    for mode in "one_sided", "partial":
        assert kept(image, keep=2, mode=mode, beta=0.01) == [0, 4]
        assert 7 not in kept(image, keep=9, mode=mode, stride=0)


# ----- batches


def test_each_image_is_a_problem_of_its_own():
    """Of several images in one row; tokens of one have no say in another."""
    image = random_images((1, 2), (2, 2), (1, 1), seed=5)
    chosen, start = kept(image, keep=0.4), 0
    for i, grid in enumerate([(1, 2), (2, 2), (1, 1)]):
        own = image.coords[0, :, 0] == i
        coords = image.coords[:, own].clone()
        coords[..., 0] = 0
        states = [state[:, own] for state in (image.features, image.vision.entering, image.vision.leaving)]
        tiles = Tiles(torch.zeros(1, 4, 3, 1, 1), torch.tensor([grid]))
        alone = ImageTokens(states[0], coords, None, Vision([tiles], *states))
        mine = kept(alone, keep=0.4)
        assert chosen[start:start + len(mine)] == mine
        start += len(mine)
    assert start == len(chosen)


def test_padding_has_no_say(small, draw):
    """Rows of text alone, of one image and of two; NaN where a row has no token."""
    network, pruner = small(2), TopV(0.4)
    config, rows = network.config.vision, [[(1, 2)], [], [(2, 2), (1, 1)]]
    tiles = [draw(grids, config, seed=i) if grids else None for i, grids in enumerate(rows)]
    image = network.encode(tiles, vision=True)
    gone, vision = ~image.mask[..., None], image.vision
    assert gone.any()
    spoiled = replace(image, vision=Vision(vision.tiles, *(
        state.masked_fill(gone, math.nan) for state in (vision.features, vision.entering, vision.leaving))))
    batch = pruner.encoded(spoiled, PROMPTS)
    assert batch.vision is None and not batch.mask[1].any()
    for row in 0, 2:
        alone = pruner.encoded(network.encode([tiles[row]], vision=True), PROMPTS)
        assert batch.coords[row, batch.mask[row]].tolist() == alone.coords[0].tolist()
        close(batch.features[row, batch.mask[row]], alone.features[0])


def test_the_prompt_has_no_say(small, draw, ask):
    network, prompts = small(1), [[5, I, 6], [I, 30, 31, 32, 33], [9, 9, I]]
    image = network.encode([draw([(2, 2)], network.config.vision)], vision=True).expand(3)
    run = ask(network, prompts, image, TopV(0.5))
    assert all(torch.equal(kv.coords[0], kv.coords[row]) for kv in run.read for row in range(3))
    assert run.answer.kept == [[10.0] * 2] * 3
    assert hooks(TopV) == ["encoded"] and TopV.needs == ("vision",)


def test_nothing_is_dropped_where_all_are_kept():
    for grids in [(1, 1)], [(2, 2), (1, 3)]:
        for scope in "canvas", "tile":
            image = random_images(*grids)
            assert TopV(1.0).keeps_all and TopV(1.0, scope=scope).encoded(image, PROMPTS) is image


def test_half_precision_chooses_alike():
    """The transport is in fp32 whatever the states are."""
    image = random_images((2, 2), seed=1)
    vision = image.vision
    half = [state.bfloat16() for state in (vision.features, vision.entering, vision.leaving)]
    sets = [kept(replace(image, vision=Vision(vision.tiles, *states)))
            for states in (half, [state.float() for state in half])]
    assert sets[0] == sets[1]


# ----- options


@pytest.mark.parametrize("options, message", [
    ({"alpha": -1}, "alpha is -1, but must be at least 0"),
    ({"beta": -0.5}, "beta is -0.5, but must be at least 0"),
    ({"gamma": -0.1}, "gamma is -0.1, but must be at least 0"),
    ({"sigma": 0}, "sigma is 0, but must be at least 0.01"),
    ({"epsilon": 0.0}, "epsilon is 0.0, but must be at least 0.01"),
    ({"iterations": 0}, "iterations is 0, but must be at least 1"),
    ({"stride": -1}, "stride is -1, but must be at least 0"),
    ({"stride": 2.5}, "stride is 2.5, but must be a whole number"),
    ({"mode": "sinkhorn"}, "mode is 'sinkhorn', but must be partial or one_sided or balanced"),
    ({"scope": "image"}, "scope is 'image', but must be canvas or tile"),
    ({"epsilon": math.nan}, "epsilon is nan, but must be a number")])
def test_bad_knobs(options, message):
    with pytest.raises(ValueError) as error:
        TopV(**options)
    assert str(error.value) == "topv: " + message
