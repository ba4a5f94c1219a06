"""AttentionPredictor against its definition (arXiv 2502.04077 and its code), in loops over captured queries
and keys: histories and what each step reads.

Blocks, budgets, the network and its weights are in test_attention_predictor_parts.py; what every method
promises, that dropping is masking above all, in test_pruners.py.
"""
from unittest.mock import patch

import pytest
import torch
from attention_predictor_by_hand import attention, budget, cut, definition, pooled
from helpers import (
    CROSS,
    SHARES,
    WIDTH,
    I,
    batch_of,
    close,
    kept_sets,
    noise,
    refused,
    small_network,
    tile_coords,
)
from loops import watched
from reference import forced, masked

from model.image_tokens import ImageKV, ImageTokens
from pruning import load
from pruning.methods import attention_predictor
from pruning.methods.attention_predictor import AttentionPredictor, pool

PROMPT = [5, 6, I, 7, 8, 9]
FIRST = PROMPT.index(I)                 # the first position that sees the image
SEEDS = range(3)


def image_of(*grids: tuple[int, int], seed: int = 0) -> ImageTokens:
    """Encoded images of random features: (tiles, patches on a side) of each."""
    coords = [place for image, grid in enumerate(grids) for place in tile_coords(*grid, image)]
    return ImageTokens(noise(1, len(coords), WIDTH, seed=seed), torch.tensor([coords]))


def held(kv: ImageKV, image: ImageTokens, b: int = 0) -> list[list[int]]:
    """Which tokens of the images each key/value head of a cache has, as their numbers."""
    sets = kept_sets(kv, image, b)
    return sets if len(sets) > 1 else sets * kv.key.shape[1]


def asked(q: list, k: list) -> tuple[list, torch.Tensor]:
    """Of what was watched in one layer: the queries that see the image, in prefill and steps; the keys."""
    keys, = k
    return [q[0][:, FIRST:], *q[1:]], keys


@pytest.mark.parametrize("settings", [
    {"block": 2}, {"block": 4, "layout": "square"}, {"block": 1, "predictor": "last", "calibrate": 2},
    {"block": 2, "predictor": "mean", "skip_layers": 0}, {"block": 3, "window": 2, "calibrate": 3},
    {"block": 2, "predictor": "last", "keep": 7, "skip_layers": 0}], ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_definition(settings, seed):
    """What loops choose, in every step, head and predicted layer; and the logits of the masked network."""
    network, image = small_network(seed, SHARES[seed], CROSS[seed]), image_of((3, 3), seed=seed)
    pruner = AttentionPredictor(**{"keep": 0.4, **settings})
    run, q, k = watched(network, lambda: forced(network, [PROMPT], image, pruner, steps=5))
    where, skip = [tuple(place) for place in image.coords[0].tolist()], pruner.skip_layers
    sets = []
    for c in range(CROSS[seed]):
        now = [held(kvs[c], image) for kvs in run.held]
        if c < skip:
            assert all(tokens == list(range(30)) for heads in now for tokens in heads)
            continue
        expected, history = definition(pruner, *asked(q[c], k[c]), where, 5)
        assert now == expected
        close(pruner.history[c - skip][0], torch.tensor(history))
        sets += [tuple(tokens) for heads in now for tokens in heads]
    assert len(set(sets)) > 1 and all(0 < len(tokens) <= 12 for tokens in sets)
    assert all(kv.key.shape[2] == 30 for kv in run.read)                    # prefill reads everything
    close(run.logits, masked(network, run, [PROMPT], image))


@pytest.mark.parametrize("calibrate", [1, 100])
def test_with_room_for_everything_it_is_the_full_network(calibrate):
    """Bit for bit; and the history is the same, from what was gathered as from the whole image."""
    network, image = small_network(1, 2, 3), image_of((2, 3))
    pruner = AttentionPredictor(1.0, block=4, calibrate=calibrate)
    with patch.object(AttentionPredictor, "keeps_all", False):
        run, q, k = watched(network, lambda: forced(network, [PROMPT], image, pruner, steps=5))
    assert torch.equal(run.logits, forced(network, [PROMPT], image, steps=5).logits)
    where = [tuple(place) for place in image.coords[0].tolist()]
    _, history = definition(pruner, *asked(q[2], k[2]), where, 5)
    assert len(history[0]) == 8                                             # four of the prompt, four steps
    close(pruner.history[1][0], torch.tensor(history))


def test_calibration_sees_what_was_not_read():
    """Where nothing was read, a step has 0 in the history; a calibrated one has not."""
    network, image = small_network(2, 2, 3), image_of((2, 4))
    pruner = AttentionPredictor(0.3, block=2, calibrate=3)
    forced(network, [PROMPT], image, pruner, steps=6)
    empty = (pruner.history[0][0] == 0).any(-1).any(0).tolist()             # of the prompt, then of the steps
    assert empty == [False] * 4 + [True, True, False, True, True]


# ----- history


def test_pooling_takes_the_maximum():
    """35 tokens are three blocks of 16, of which the last has three; nothing read there: 0."""
    weights = noise(2, 3, 35).abs()
    got = pool(weights, torch.arange(35) // 16, 4)
    assert got.shape == (2, 3, 4) and (got[..., 3] == 0).all()
    for j, part in enumerate(weights.split(16, -1)):
        assert torch.equal(got[..., j], part.amax(-1))
    assert torch.equal(pool(weights, torch.full((35,), 2), 2), torch.zeros(2, 3, 2))    # in no block


@pytest.mark.parametrize("window", [1, 3, 64])
def test_the_oldest_steps_are_forgotten_first(window):
    network, image = small_network(0, 1, 2), image_of((2, 3))
    short, long = (AttentionPredictor(0.5, block=1, calibrate=1, predictor="last", window=w)
                   for w in (window, 64))
    forced(network, [PROMPT], image, short, steps=6)
    forced(network, [PROMPT], image, long, steps=6)
    assert long.history[0].shape[2] == 9 and short.history[0].shape[2] == min(9, window)
    assert torch.equal(short.history[0], long.history[0][:, :, -window:])
    assert short.length.tolist() == [min(9, window)]


def test_the_history_is_of_the_images_that_the_last_position_sees():
    """Positions that see the first of two images apart do not count, and it has no blocks."""
    network, image = small_network(1, 2, 3), image_of((1, 3), (2, 3))
    pruner = AttentionPredictor(0.5, block=3, predictor="last")
    run, q, k = watched(network, lambda: forced(network, [[I, 5, 6, I, 7, 8]], image, pruner, steps=1))
    assert pruner.history[0].shape[2:] == (3, 6) and pruner.stored[0].key.shape[2] == 20
    blocks = cut([tuple(place) for place in image.coords[0, 10:].tolist()], 3, "raster")
    for h in range(4):
        keys = k[1][0][h // 2, 10:]
        expected = [pooled(attention(own, keys, list(range(20))), blocks) for own in q[1][0][h, 3:]]
        close(pruner.history[0][0, h], torch.tensor(expected))
    assert all(i >= 10 for tokens in held(run.held[0][1], image) for i in tokens)


def test_two_images_side_by_side_share_nothing_but_the_order():
    """Each has a budget of its own; the position of the first image sees no more than that."""
    network, image = small_network(2, 2, 2), image_of((2, 3), (1, 3))
    pruner = AttentionPredictor(0.4, block=3, predictor="last")
    run, q, k = watched(network, lambda: forced(network, [[5, I, I, 7, 8]], image, pruner, steps=1))
    where = [tuple(place) for place in image.coords[0].tolist()]
    blocks = cut(where, 3, "raster")
    assert pruner.history[0].shape[2:] == (4, 9) and (pruner.history[0][0, :, 0, 6:] == 0).all()
    for g, tokens in enumerate(held(run.held[0][1], image)):
        newest = [pooled(attention(q[1][0][h, -1], k[1][0][g], list(range(30))), blocks)
                  for h in (2 * g, 2 * g + 1)]
        assert tokens == budget([sum(pair) / 2 for pair in zip(*newest, strict=True)], where, blocks, 0.4)
        assert sum(i < 20 for i in tokens) == 2 + 6 and sum(i >= 20 for i in tokens) == 1 + 3


@pytest.mark.parametrize("predictor", ["cnn", "mean"])
def test_nothing_leaks_between_the_sequences_of_a_batch(predictor):
    """Histories of other lengths and widths; each prompt reads what it reads alone, in every step."""
    network = small_network(1, 2, 3)
    images = [image_of((3, 3), seed=1), None, image_of((1, 3), seed=2),
              image_of((2, 3), (2, 3), seed=3)]
    prompts = [[5, I, 7, 8, 9, 10, 11], [5, 6, 7], [6, I], [I, I, 8, 9]]
    options = {"keep": 0.4, "block": 2, "predictor": predictor, "window": 6, "calibrate": 2}
    together = AttentionPredictor(**options)
    batch = batch_of(*images)
    run = forced(network, prompts, batch, together, steps=5)
    for b, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        single = AttentionPredictor(**options)
        alone = forced(network, [prompt], image, single, steps=5)
        close(run.logits[b], alone.logits[0])
        if image is not None:
            for step in range(5):
                assert held(run.held[step][2], batch, b) == held(alone.held[step][2], image)
            history = together.history[1][b]                                            # [H, h, n]
            h, n = single.history[1].shape[2:]
            close(history[:, -h:, :n], single.history[1][0])
            assert not history[..., n:].any() and not history[:, :-h].any()


def test_a_step_has_no_say_in_what_it_reads():
    """Another token in a step changes what the next one reads, not what it reads itself."""
    network, image = small_network(1, 2, 3), image_of((3, 3))

    def reads(tokens: list[int]) -> list[list[list[list[int]]]]:
        pruner = AttentionPredictor(0.4, block=1, predictor="last", calibrate=1)
        with torch.inference_mode():
            _, cache = network.prefill(torch.tensor([PROMPT]), [len(PROMPT)], image, len(tokens) + 1, pruner)
            cache.image_kv = pruner.prefilled(cache.image_kv)
            found = [[held(kv, image) for kv in cache.image_kv]]
            for step, token in enumerate(tokens):
                network.decode(torch.tensor([token]), cache)
                cache.image_kv = pruner.stepped(step, cache.queries, cache.image_kv)
                found.append([held(kv, image) for kv in cache.image_kv])
        return found
    one, other = reads([7, 30, 11]), reads([7, 52, 11])
    assert one[:2] == other[:2] and one[2] != other[2]


# ----- options


@pytest.mark.parametrize("option, value, words", [
    ("block", 0, "at least 1"), ("calibrate", 0, "at least 1"), ("window", 0, "at least 1"),
    ("skip_layers", -1, "at least 0"), ("keep", 0.0, "a fraction above 0"),
    ("layout", "round", "raster or square"),
    ("predictor", "best", "cnn or last or mean"), ("offload", 1, "true or false")])
def test_bad_options(option, value, words):
    with refused(f"attention_predictor: {option} is .*, but must be .*{words}"):
        AttentionPredictor(**{option: value})


def test_squares_have_square_sizes():
    with refused("block is 8, but must be a square number"):
        AttentionPredictor(block=8, layout="square")


def test_layers_that_the_network_lacks():
    """At least one is left to predict."""
    for skip in 2, 3:
        with refused(f"skip_layers is {skip}, but must be less than 2,"):
            forced(small_network(1), [PROMPT], image_of((1, 3)), AttentionPredictor(skip_layers=skip))


def test_what_is_counted():
    """What a step reads; and apart from it, what is stored: the whole image of the predicted layers."""
    network, image, pruner = small_network(1, 2, 3), image_of((1, 7)), AttentionPredictor(0.5)
    run = forced(network, [PROMPT], image, pruner)
    assert run.answer.kept[0][0] == 50 and all(1 <= n <= 25 for n in run.answer.kept[0][1:])
    assert [kv.key.shape[2] for kv in pruner.stored] == [50, 50]
    assert run.answer.image_kv_stored == run.answer.image_kv_bytes + 2 * 50 * 2 * 2 * 8 * 4


def test_offloading_does_nothing_on_a_cpu():
    network, image = small_network(1, 2, 3), image_of((2, 3))
    here, there = (forced(network, [PROMPT], image, AttentionPredictor(0.4, block=2, offload=o), steps=4)
                   for o in (False, True))
    assert torch.equal(here.logits, there.logits)


def test_what_it_says_of_itself():
    assert str(load(f"{attention_predictor.__file__}:AttentionPredictor", keep=0.3)
               ) == "attention_predictor, keep 0.3 read a step"
