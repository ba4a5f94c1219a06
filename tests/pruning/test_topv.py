"""TopV against the formulas of its paper (arXiv 2503.18278) as we read them, written out in plain loops.

The reference takes the states from the encoder's last layer by itself, and works in float64. The transport is
in test_topv_transport.py; what every method promises, that dropping is masking above all, in test_pruners.py.
"""
import math
from dataclasses import replace

import pytest
import torch
from helpers import I, close, noise, random_tiles, refused, small_network, tile_coords
from loops import half_up
from reference import forced, masked
from topv_by_hand import slow_cost, slow_importance, slow_pick
from torch import Tensor

from model.image_tokens import EncoderStates, ImageTokens, Tiles
from model.llama_vision import LlamaVision
from pruning import hooks
from pruning.methods.topv import KAPPA, TopV

PROMPTS = [[I]]
GRIDS = [(1, 1), (1, 3), (2, 2), (3, 1)]            # rows, columns of tiles
PLAIN = {"gamma": 0.3, "epsilon": 0.3}              # so that every term matters


def random_images(*grids: tuple[int, int], side: int = 3, seed: int = 0) -> ImageTokens:
    """Encoded images of these grids in one sequence, with random states; features are a token's number."""
    coords = torch.tensor([place for image, grid in enumerate(grids)
                           for place in tile_coords(math.prod(grid), side, image)])[None]
    entering, attended = noise(2, 1, coords.shape[1], 6, seed=seed)
    features = torch.arange(coords.shape[1]).float().view(1, -1, 1)
    tiles = Tiles(torch.zeros(len(grids), 4, 3, 1, 1), torch.tensor(grids))
    return ImageTokens(features, coords, None, EncoderStates([tiles], features, entering, attended))


def chosen_of(image: ImageTokens, **options) -> list[int]:
    """The numbers of the tokens of `random_images` that are kept."""
    return TopV(**options).encoded(image, PROMPTS).features[0, :, 0].int().tolist()


# ----- the paper's formulas, in loops


def reference(options: TopV, coords: list[list[int]], grid: tuple[int, int], source, target) -> list[int]:
    """Which tokens of one image are kept, as their numbers."""
    side = 1 + max(p[3] for p in coords)
    spot = [(side * (t % grid[1]) + column, side * (t // grid[1]) + row) for _, t, row, column in coords]
    centre = [(side * grid[1] - 1) / 2, (side * grid[0] - 1) / 2]
    n, tiles = half_up(options.keep, len(coords)), grid[0] * grid[1]
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
        source, target = (s[0].double().tolist() for s in (image.states.entering, image.states.attended))
        expected = reference(pruner, image.coords[0].tolist(), grid, source, target)
        assert chosen_of(image, keep=keep, **PLAIN | options) == expected


def states_of_the_last_layer(network: LlamaVision, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """What entered it, and what its MLP was given, as the network's modules saw it: [1, patches, E]."""
    entered, given = [], []
    last = network.vision_model.global_transformer.layers[-1]
    handles = [last.input_layernorm.register_forward_pre_hook(lambda module, x: entered.append(x[0])),
               last.post_attention_layernorm.register_forward_hook(lambda module, x, out: given.append(out))]
    network.vision_model(tiles.pixels, tuple(tiles.grid[0].tolist()))
    for handle in handles:
        handle.remove()
    (source,), (target,) = entered, given
    return source, target


@pytest.mark.parametrize("scope", ["canvas", "tile"])
@pytest.mark.parametrize("grid", GRIDS)
def test_inside_the_network(grid, scope):
    """The tokens that the loops choose from the encoder's states; the logits are those of the rest masked."""
    network, pruner, prompt = small_network(1), TopV(0.5, scope=scope, **PLAIN), [5, 6, I, 7, 8]
    tiles = random_tiles([grid], network.config.vision, seed=3)
    image = network.encode([tiles], keep_states=True)
    source, target = (s[0].double().tolist() for s in states_of_the_last_layer(network, tiles))
    expected = reference(pruner, image.coords[0].tolist(), grid, source, target)
    run = forced(network, [prompt], image, pruner, steps=3)
    for kv in run.read + [kv for kvs in run.held for kv in kvs]:
        assert kv.coords[0, 0].tolist() == image.coords[0, expected].tolist()
    assert run.answer.kept == [[float(len(expected))] * len(run.read)]
    close(run.logits, masked(network, run, [prompt], image))


# ----- where a patch is


def spot_of(grid: tuple[int, int], side: int, scope: str = "canvas") -> dict[tuple[int, ...], Tensor]:
    """Where the method has each patch (tile, row, column): y and x from the centre."""
    given, image = [], random_images(grid, side=side)

    class Watched(TopV):
        def cost(self, source, target, spot):
            given.append((source[:, 0], spot))
            return super().cost(source, target, spot)
    Watched(scope=scope).encoded(image, PROMPTS)
    number = {float(s): i for i, s in enumerate(image.states.entering[0, :, 0])}
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


def test_the_modes():
    """They are ends and middle of one scale, and choose differently."""
    assert KAPPA == {"one_sided": 0, "partial": 0.5, "balanced": 1}
    image = random_images((2, 2), side=4)
    central, plain = ({mode: chosen_of(image, keep=0.5, stride=0, mode=mode, gamma=gamma) for mode in KAPPA}
                      for gamma in (0.3, 0.0))
    assert len(set(map(tuple, central.values()))) == 3
    assert [central[mode] == plain[mode] for mode in KAPPA] == [False, False, True]


# ----- how many, and which


def test_putting_back_goes_row_by_row_of_the_image():
    """Not tile by tile, where the image is one problem: what is dropped of its first row comes first."""
    image = random_images((1, 3), seed=6)
    chosen, coords = chosen_of(image, keep=0.5, stride=4), image.coords[0].tolist()
    best = set(chosen_of(image, keep=(15 - 3) * 4 // 3 - 9 + 3, stride=0))      # K of n = 12 of 27 patches: 7
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
        n = half_up(keep, size)
        for stride in 0, 4:
            chosen = chosen_of(image, keep=keep, scope=scope, stride=stride)
            first = [i for i in chosen if image.coords[0, i, 2] < 0]
            assert len(chosen) == n and chosen == sorted(set(chosen))
            assert first == [t * 10 for t in range(min(tiles, n // 2))]


def test_each_tile_has_an_equal_share():
    image = random_images((2, 2), seed=2)
    image.states.entering[0, :10] += 20                 # the first tile is unlike all targets
    for keep, shares in (22, [5, 5, 4, 4]), (16, [3, 3, 3, 3]), (6, [1, 1, 1, 0]):
        chosen = [image.coords[0, i] for i in chosen_of(image, keep=keep, scope="tile", stride=0)]
        assert [sum(int(p[1]) == t and int(p[2]) >= 0 for p in chosen) for t in range(4)] == shares
    chosen = [image.coords[0, i] for i in chosen_of(image, keep=22, stride=0)]
    assert sum(int(p[1]) == 0 and int(p[2]) >= 0 for p in chosen) == 0


def test_what_gives_most_is_kept():
    """A source like all targets is kept; one unlike any is not."""
    image = random_images((1, 1), seed=3)
    image.states.attended[:] = 0.1 * image.states.attended + 1
    image.states.entering[0, 4], image.states.entering[0, 7] = 1, -9
    for mode in "one_sided", "partial":
        assert chosen_of(image, keep=2, mode=mode, beta=0.01) == [0, 4]
        assert 7 not in chosen_of(image, keep=9, mode=mode, stride=0)


# ----- batches


def test_each_image_is_a_problem_of_its_own():
    """Of several images in one prompt; tokens of one change nothing in another."""
    image = random_images((1, 2), (2, 2), (1, 1), seed=5)
    chosen, start = chosen_of(image, keep=0.4), 0
    for i, grid in enumerate([(1, 2), (2, 2), (1, 1)]):
        own = image.coords[0, :, 0] == i
        coords = image.coords[:, own].clone()
        coords[..., 0] = 0
        states = [state[:, own] for state in (image.features, image.states.entering, image.states.attended)]
        tiles = Tiles(torch.zeros(1, 4, 3, 1, 1), torch.tensor([grid]))
        mine = chosen_of(ImageTokens(states[0], coords, None, EncoderStates([tiles], *states)), keep=0.4)
        assert chosen[start:start + len(mine)] == mine
        start += len(mine)
    assert start == len(chosen)


def test_padding_is_ignored():
    """Text alone, one image and two; NaN where a sequence has no token."""
    network, pruner = small_network(2), TopV(0.4)
    config, sequences = network.config.vision, [[(1, 2)], [], [(2, 2), (1, 1)]]
    tiles = [random_tiles(grids, config, seed=i) if grids else None for i, grids in enumerate(sequences)]
    image = network.encode(tiles, keep_states=True)
    gone, states = ~image.mask[..., None], image.states
    assert gone.any()
    spoiled = replace(image, states=EncoderStates(states.tiles, *(
        state.masked_fill(gone, math.nan) for state in (states.features, states.entering, states.attended))))
    batch = pruner.encoded(spoiled, PROMPTS)
    assert batch.states is None and not batch.mask[1].any()
    for b in 0, 2:
        single = pruner.encoded(network.encode([tiles[b]], keep_states=True), PROMPTS)
        assert batch.coords[b, batch.mask[b]].tolist() == single.coords[0].tolist()
        close(batch.features[b, batch.mask[b]], single.features[0])


def test_the_prompt_is_ignored():
    network, prompts = small_network(1), [[5, I, 6], [I, 30, 31, 32, 33], [9, 9, I]]
    image = network.encode([random_tiles([(2, 2)], network.config.vision)], keep_states=True).expand(3)
    run = forced(network, prompts, image, TopV(0.5))
    assert all(torch.equal(kv.coords[0], kv.coords[b]) for kv in run.read for b in range(3))
    assert run.answer.kept == [[10.0] * 2] * 3
    assert hooks(TopV) == ["encoded"] and TopV.keep_states


def test_nothing_is_dropped_where_all_are_kept():
    for grids in [(1, 1)], [(2, 2), (1, 3)]:
        for scope in "canvas", "tile":
            image = random_images(*grids)
            assert TopV(1.0).keeps_all and TopV(1.0, scope=scope).encoded(image, PROMPTS) is image


def test_half_precision_chooses_the_same():
    """The transport is in fp32 whatever the states are."""
    image = random_images((2, 2), seed=1)
    own = image.states
    half = [state.bfloat16() for state in (own.features, own.entering, own.attended)]
    sets = [chosen_of(replace(image, states=EncoderStates(own.tiles, *states)))
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
    ({"iterations": 2 ** 31}, "iterations is 2147483648, but must be at most 1000"),
    ({"stride": -1}, "stride is -1, but must be at least 0"),
    ({"stride": 2.5}, "stride is 2.5, but must be a whole number"),
    ({"mode": "sinkhorn"}, "mode is 'sinkhorn', but must be partial or one_sided or balanced"),
    ({"scope": "image"}, "scope is 'image', but must be canvas or tile"),
    ({"epsilon": math.nan}, "epsilon is nan, but must be a number")])
def test_bad_options(options, message):
    with refused(f"^topv: {message}$"):
        TopV(**options)
