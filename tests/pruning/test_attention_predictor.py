"""AttentionPredictor against its definition (arXiv 2502.04077 and its code), in loops over captured queries
and keys: histories, blocks, budgets and what each step reads. Also the network, its training and its weights.

What every method promises, that dropping is masking above all, is in test_pruners.py.
"""
import json
import math
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.image_tokens import ImageKV, ImageTokens
from model.llama_vision import LlamaVision
from pruning import load
from pruning.methods import attention_predictor
from pruning.methods.attention_predictor import AttentionPredictor, Network, pool
from scenes.train_attention_predictor import Log, histories, logs, recalls, train
from weights import LEARNED, find_checkpoint, load_model
from weights.images import ImageProcessor
from weights.tokenizer import ChatTokenizer

I = 60          # noqa: E741  the image token
SHARES, CROSS = (1, 2, 4), (2, 3, 4)
PROMPT = [5, 6, I, 7, 8, 9]
SEEDS = range(3)
Place = tuple[int, ...]


def close(a: Tensor, b: Tensor, atol: float = 1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def coords_of(tiles: int, side: int, image: int = 0) -> list[list[int]]:
    return [[image, tile, y, x] for tile in range(tiles)
            for y, x in [(-1, -1)] + [(y, x) for y in range(side) for x in range(side)]]


def random_image(*grids: tuple[int, int], seed: int = 0) -> ImageTokens:
    """Encoded images of random features: (tiles, patches on a side) of each."""
    coords = [where for image, grid in enumerate(grids) for where in coords_of(*grid, image)]
    features = torch.randn(1, len(coords), 32, generator=torch.Generator().manual_seed(seed))
    return ImageTokens(features, torch.tensor([coords]))


def cache(coords: list[list[int]], heads: int = 2) -> ImageKV:
    key = torch.zeros(1, heads, len(coords), 8)
    return ImageKV(key, key, torch.tensor([[coords]]))


def held(kv: ImageKV, image: ImageTokens, row: int = 0) -> list[list[int]]:
    """Which tokens of the images each key/value head of a cache has, as their numbers."""
    order = {tuple(coords): i for i, coords in enumerate(image.coords[row].tolist())}
    mask = torch.ones(kv.coords.shape[:3], dtype=torch.bool) if kv.mask is None else kv.mask
    heads, result = kv.key.shape[1], []
    for where, real in zip(kv.coords[row].expand(heads, -1, -1), mask[row].expand(heads, -1), strict=True):
        result.append([order[tuple(p)] for p in where[real].tolist()])
    return result


def watched(network: LlamaVision, run) -> tuple[object, list[list[Tensor]], list[Tensor]]:
    """A run; of every cross-attention layer its queries [H, T, d], in prefill and each step, and its keys."""
    layers = network.language_model.cross_layers
    q, k, hooks = [[] for _ in layers], [[] for _ in layers], []
    for c, layer in enumerate(layers):
        for part, seen in (layer.cross_attn.q_norm, q[c]), (layer.cross_attn.k_norm, k[c]):
            hooks.append(part.register_forward_hook(lambda m, i, output, seen=seen: seen.append(output[0])))
    result = run()
    for hook in hooks:
        hook.remove()
    assert all(len(keys) == 1 for keys in k)
    return result, q, [keys[0] for keys in k]


# ----- the definition, in loops


def softmax(q: Tensor, keys: Tensor, tokens: list[int]) -> dict[int, float]:
    """A row of attention over some tokens: q [d], keys [N, d]."""
    powers = {i: math.exp(float(q.double() @ keys[i].double()) / math.sqrt(len(q))) for i in tokens}
    return {i: power / sum(powers.values()) for i, power in powers.items()}


def cut(where: list[Place], block: int, layout: str) -> list[list[int]]:
    """The blocks: tile after tile, which tokens are in each."""
    found: dict[tuple, list[int]] = {}
    side, edge = max(p[3] for p in where) + 1, math.isqrt(block)
    for i, (image, tile, y, x) in enumerate(where):
        if y >= 0:
            part = ((y * side + x) // block,) if layout == "raster" else (y // edge, x // edge)
            found.setdefault((image, tile, *part), []).append(i)
    return [found[name] for name in sorted(found)]


def pooled(row: dict[int, float], blocks: list[list[int]]) -> list[float]:
    return [max((row.get(i, 0.0) for i in block), default=0.0) for block in blocks]


def budget(row: list[float], where: list[Place], blocks: list[list[int]], keep: float | int) -> list[int]:
    """What is read when this is predicted: of each image its class tokens, then its best blocks."""
    read = []
    for image in sorted({p[0] for p in where}):
        tokens = [i for i, p in enumerate(where) if p[0] == image]
        room = max(1, math.floor(keep * len(tokens) + 0.5)) if type(keep) is float else min(keep, len(tokens))
        read += [i for i in tokens if where[i][2] < 0][:room]
        room -= sum(where[i][2] < 0 for i in tokens)
        ours = [j for j, block in enumerate(blocks) if block[0] in tokens]
        for j in sorted(ours, key=lambda j: (-row[j], j)):
            if (room := room - len(blocks[j])) < 0:
                break
            read += blocks[j]
    return sorted(read)


def by_hand(network: Network, rows: list[list[float]]) -> list[float]:
    """The network's formula on one history, tap by tap."""
    x = torch.tensor([rows])                                                            # [channels, h, n]
    for layer in network.first, network.second:
        (_, h, n), wide = x.shape, torch.nn.functional.pad(x, (1, 1, 1, 1))
        y = layer.bias[:, None].repeat(1, h * n)
        for dt in range(3):
            for dj in range(3):
                y += layer.weight[:, :, dt, dj] @ wide[:, dt:dt + h, dj:dj + n].flatten(1)
        x = y.clamp(min=0).view(-1, h, n)
    return (network.mix.weight[0, :, 0] @ (x.sum(1) / x.shape[1]) + network.mix.bias).tolist()


def definition(pruner: AttentionPredictor, q: list[Tensor], keys: Tensor, where: list[Place],
               steps: int) -> tuple[list[list[list[int]]], list[list[list[float]]]]:
    """Of one layer: what each key/value head reads in every step, and the histories of the query heads."""
    heads, share = len(q[0]), len(q[0]) // len(keys)
    everything, blocks = list(range(len(where))), cut(where, pruner.block, pruner.layout)
    history = [[pooled(softmax(row, keys[h // share], everything), blocks) for row in q[0][h]]
               for h in range(heads)]
    history = [rows[-pruner.window:] for rows in history]
    read = []
    for step in range(steps):
        guess = [rows[-1] if pruner.predictor == "last" else
                 [sum(column) / len(rows) for column in zip(*rows, strict=True)]
                 if pruner.predictor == "mean" else by_hand(pruner.network, rows) for rows in history]
        read.append([])
        for g in range(len(keys)):
            mean = [sum(values) / share for values in zip(*guess[g * share:(g + 1) * share], strict=True)]
            read[-1].append(budget(mean, where, blocks, pruner.keep))
        if step + 1 < steps:
            for h in range(heads):
                whole = (step + 1) % pruner.calibrate == 0
                tokens = everything if whole else read[-1][h // share]
                row = softmax(q[step + 1][h, 0], keys[h // share], tokens)
                history[h] = [*history[h], pooled(row, blocks)][-pruner.window:]
    return read, history


@pytest.mark.parametrize("settings", [
    {"block": 2}, {"block": 4, "layout": "square"}, {"block": 1, "predictor": "last", "calibrate": 2},
    {"block": 2, "predictor": "mean", "skip_layers": 0}, {"block": 3, "window": 2, "calibrate": 3},
    {"block": 2, "predictor": "last", "keep": 7, "skip_layers": 0}], ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_definition(settings, seed, small, ask, masked):
    """What loops choose, in every step, head and predicted layer; and the logits of the masked network."""
    network, image = small(seed, SHARES[seed], CROSS[seed]), random_image((3, 3), seed=seed)
    pruner = AttentionPredictor(**{"keep": 0.4, **settings})
    run, q, k = watched(network, lambda: ask(network, [PROMPT], image, pruner, steps=5))
    where, skip = [tuple(p) for p in image.coords[0].tolist()], pruner.skip_layers
    sets = []
    for c in range(CROSS[seed]):
        now = [held(kvs[c], image) for kvs in run.held]
        if c < skip:
            assert all(tokens == list(range(30)) for heads in now for tokens in heads)
            continue
        expected, history = definition(pruner, q[c], k[c], where, 5)
        assert now == expected
        close(pruner.history[c - skip][0], torch.tensor(history))
        sets += [tuple(tokens) for heads in now for tokens in heads]
    assert len(set(sets)) > 1 and all(0 < len(tokens) <= 12 for tokens in sets)
    assert all(kv.key.shape[2] == 30 for kv in run.read)                    # prefill reads everything
    close(run.logits, masked(network, run, [PROMPT], image))


@pytest.mark.parametrize("calibrate", [1, 100])
def test_with_room_for_everything_it_is_the_whole_network(calibrate, small, ask):
    """Bit for bit; and the history is the same, from what was gathered as from the whole image."""
    network, image = small(1, 2, 3), random_image((2, 3))
    pruner = AttentionPredictor(1.0, block=4, calibrate=calibrate)
    with patch.object(AttentionPredictor, "keeps_all", False):
        run, q, k = watched(network, lambda: ask(network, [PROMPT], image, pruner, steps=5))
    assert torch.equal(run.logits, ask(network, [PROMPT], image, steps=5).logits)
    _, history = definition(pruner, q[2], k[2], [tuple(p) for p in image.coords[0].tolist()], 5)
    assert len(history[0]) == 8                                             # four of the prompt, four steps
    close(pruner.history[1][0], torch.tensor(history))


def test_calibration_sees_what_was_not_read(small, ask):
    """A sparse row has 0 where nothing was read, the calibrated one has not."""
    network, image = small(2, 2, 3), random_image((2, 4))
    pruner = AttentionPredictor(0.3, block=2, calibrate=3)
    ask(network, [PROMPT], image, pruner, steps=6)
    empty = (pruner.history[0][0] == 0).any(-1).any(0).tolist()             # of the prompt's rows, and steps'
    assert empty == [False] * 4 + [True, True, False, True, True]


# ----- history


def test_pooling_takes_the_maximum():
    """35 tokens are three blocks of 16, of which the last has three; nothing read there: 0."""
    weights = torch.rand(2, 3, 35, generator=torch.Generator().manual_seed(0))
    got = pool(weights, torch.arange(35) // 16, 4)
    assert got.shape == (2, 3, 4) and (got[..., 3] == 0).all()
    for j, part in enumerate(weights.split(16, -1)):
        assert torch.equal(got[..., j], part.amax(-1))
    assert torch.equal(pool(weights, torch.full((35,), 2), 2), torch.zeros(2, 3, 2))    # in no block


@pytest.mark.parametrize("window", [1, 3, 64])
def test_rows_leave_first_in_first_out(window, small, ask):
    network, image = small(0, 1, 2), random_image((2, 3))
    short, long = (AttentionPredictor(0.5, block=1, calibrate=1, predictor="last", window=w)
                   for w in (window, 64))
    ask(network, [PROMPT], image, short, steps=6)
    ask(network, [PROMPT], image, long, steps=6)
    assert long.history[0].shape[2] == 9 and short.history[0].shape[2] == min(9, window)
    assert torch.equal(short.history[0], long.history[0][:, :, -window:])
    assert short.rows.tolist() == [min(9, window)]


def test_the_history_is_of_the_images_that_the_last_row_sees(small, ask):
    """Rows of the first of two images apart do not count, and it has no blocks."""
    network, image = small(1, 2, 3), random_image((1, 3), (2, 3))
    pruner = AttentionPredictor(0.5, block=3, predictor="last")
    run, q, k = watched(network, lambda: ask(network, [[I, 5, 6, I, 7, 8]], image, pruner, steps=1))
    assert pruner.history[0].shape[2:] == (3, 6) and pruner.whole[0].key.shape[2] == 20
    where = [tuple(p) for p in image.coords[0, 10:].tolist()]
    blocks = cut(where, 3, "raster")
    for h in range(4):
        keys = k[1][h // 2, 10:]
        expected = [pooled(softmax(row, keys, list(range(20))), blocks) for row in q[1][0][h, 3:]]
        close(pruner.history[0][0, h], torch.tensor(expected))
    assert all(i >= 10 for tokens in held(run.held[0][1], image) for i in tokens)


def test_two_images_side_by_side_share_nothing_but_the_order(small, ask):
    """Each has a budget of its own; the row of the first image sees no more than that."""
    network, image = small(2, 2, 2), random_image((2, 3), (1, 3))
    pruner = AttentionPredictor(0.4, block=3, predictor="last")
    run, q, k = watched(network, lambda: ask(network, [[5, I, I, 7, 8]], image, pruner, steps=1))
    where = [tuple(p) for p in image.coords[0].tolist()]
    blocks = cut(where, 3, "raster")
    assert pruner.history[0].shape[2:] == (4, 9) and (pruner.history[0][0, :, 0, 6:] == 0).all()
    for g, tokens in enumerate(held(run.held[0][1], image)):
        rows = [pooled(softmax(q[1][0][h, -1], k[1][g], list(range(30))), blocks) for h in (2 * g, 2 * g + 1)]
        assert tokens == budget([sum(pair) / 2 for pair in zip(*rows, strict=True)], where, blocks, 0.4)
        assert sum(i < 20 for i in tokens) == 2 + 6 and sum(i >= 20 for i in tokens) == 1 + 3


def batch_of(*images: ImageTokens | None) -> ImageTokens:
    n = max(image.coords.shape[1] for image in images if image is not None)
    features, coords = torch.zeros(len(images), n, 32), torch.full((len(images), n, 4), -1)
    mask = torch.zeros(len(images), n, dtype=torch.bool)
    for row, image in enumerate(images):
        if image is not None:
            there = image.coords.shape[1]
            features[row, :there], coords[row, :there] = image.features[0], image.coords[0]
            mask[row, :there] = True
    return ImageTokens(features, coords, mask)


@pytest.mark.parametrize("predictor", ["cnn", "mean"])
def test_nothing_leaks_between_the_rows_of_a_batch(predictor, small, ask):
    """Histories of other lengths and widths; each row reads what it reads alone, in every step."""
    network = small(1, 2, 3)
    images = [random_image((3, 3), seed=1), None, random_image((1, 3), seed=2), random_image((2, 3), (2, 3), seed=3)]
    prompts = [[5, I, 7, 8, 9, 10, 11], [5, 6, 7], [6, I], [I, I, 8, 9]]
    options = {"keep": 0.4, "block": 2, "predictor": predictor, "window": 6, "calibrate": 2}
    together = AttentionPredictor(**options)
    run = ask(network, prompts, batch_of(*images), together, steps=5)
    for row, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        single = AttentionPredictor(**options)
        alone = ask(network, [prompt], image, single, steps=5)
        close(run.logits[row], alone.logits[0])
        if image is not None:
            for step in range(5):
                assert rows_held(run.held[step][2], row) == rows_held(alone.held[step][2], 0)
            h, n = single.history[1].shape[2:]
            close(together.history[1][row, :, -h:, :n], single.history[1][0])
            rest = torch.cat((together.history[1][row, :, :, n:].flatten(),
                              together.history[1][row, :, :-h].flatten()))
            assert (rest == 0).all()


def rows_held(kv: ImageKV, row: int) -> list[list[tuple[int, ...]]]:
    mask = torch.ones(kv.coords.shape[:3], dtype=torch.bool) if kv.mask is None else kv.mask
    heads = kv.key.shape[1]
    return [[tuple(p) for p in where[real].tolist()] for where, real in
            zip(kv.coords[row].expand(heads, -1, -1), mask[row].expand(heads, -1), strict=True)]


# ----- blocks and budgets


@pytest.mark.parametrize("layout, block", [("raster", 16), ("raster", 5), ("square", 16), ("square", 4)])
@pytest.mark.parametrize("side", [4, 7])
def test_blocks_end_where_a_tile_does(layout, block, side):
    where = coords_of(3, side) + coords_of(1, side, image=1)
    of, blocks = AttentionPredictor(block=block, layout=layout).blocks(cache(where))
    expected = cut([tuple(p) for p in where], block, layout)
    assert blocks == len(expected)
    for j, tokens in enumerate(expected):
        assert (of[0] == j).nonzero()[:, 0].tolist() == tokens
        assert len({tuple(where[i][:2]) for i in tokens}) == 1 and len(tokens) <= block
    assert (of[0] == blocks).nonzero()[:, 0].tolist() == [i for i, p in enumerate(where) if p[2] < 0]
    if (layout, block, side) == ("raster", 16, 7):
        assert [len(tokens) for tokens in expected] == [16, 16, 16, 1] * 4


def test_a_tile_of_the_large_models():
    """256 tokens of one tile: a class token and 15 blocks of 16, which is 241."""
    kv, pruner = cache(coords_of(1, 40)), AttentionPredictor(256)
    pruner.lay_out(kv)
    row = torch.rand(1, 2, 100, generator=torch.Generator().manual_seed(0))
    kept = pruner.chosen(row)
    assert kept.sum(-1).tolist() == [[241, 241]] and kept[..., 0].all()
    best = row[0] >= row[0].topk(15).values[:, -1:]
    assert torch.equal(kept[0, :, 1:].unflatten(-1, (100, 16)), best[..., None].expand(-1, -1, 16))


@pytest.mark.parametrize("block, layout", [(16, "raster"), (4, "raster"), (16, "square")])
def test_never_more_than_the_budget(block, layout):
    """Budgets from 1 token to all, on tiles whose last blocks are shorter; each as loops choose."""
    where = coords_of(2, 7) + coords_of(1, 7, image=1)
    flat, kv = [tuple(p) for p in where], cache(where, heads=1)
    blocks = cut(flat, block, layout)
    row = torch.rand(1, 1, len(blocks), generator=torch.Generator().manual_seed(block))
    for keep in [*range(1, 60, 3), 66, 67, 98, 99, 100, 0.05, 0.25, 0.5, 1.0]:
        pruner = AttentionPredictor(keep, block=block, layout=layout)
        pruner.lay_out(kv)
        kept = pruner.chosen(row)[0, 0].nonzero()[:, 0].tolist()
        assert kept == budget(row[0, 0].tolist(), flat, blocks, keep)
        if type(keep) is int:
            assert 1 <= sum(i < 100 for i in kept) <= keep and 1 <= sum(i >= 100 for i in kept) <= keep
    assert len(kept) == 150


@pytest.mark.parametrize("predictor", ["cnn", "last", "mean"])
def test_a_hot_block_is_read(predictor):
    """That one alone, 16 tokens, and the class tokens; of heads that share keys, their mean decides."""
    for hot in range(12):
        pruner = AttentionPredictor(20, predictor=predictor)
        kv = cache(coords_of(4, 7), heads=2)
        pruner.whole, pruner.stream = [kv], None
        pruner.lay_out(kv)
        block = 4 * (hot // 3) + hot % 3                                # those of 16 tokens, not of one
        history = torch.full((1, 4, 10, 16), 0.01)
        history[0, :2, :, block] = 0.6
        history[0, 2, :, (block + 4) % 16] = 0.3                        # a third head outvoted by the fourth
        history[0, 3, :, block] = 0.6
        pruner.history, pruner.rows = [history], torch.tensor([10])
        first = 50 * (hot // 3) + 1 + 16 * (hot % 3)
        expected = sorted({0, 50, 100, 150} | set(range(first, first + 16)))
        image = ImageTokens(torch.zeros(1, 200, 1), kv.coords[:, 0])
        assert held(pruner.select()[0], image) == [expected, expected]


def test_of_equal_blocks_the_first_are_read():
    pruner = AttentionPredictor(9, block=2, predictor="last")
    pruner.lay_out(cache(coords_of(2, 3)))
    assert pruner.chosen(torch.full((1, 1, 10), 0.5))[0, 0].nonzero()[:, 0].tolist() == [0, *range(1, 7), 10]


def test_a_step_has_no_say_in_what_it_reads(small):
    """Another token in a step changes what the next one reads, not what it reads itself."""
    network, image = small(1, 2, 3), random_image((3, 3))

    def reads(tokens: list[int]) -> list[list[list[list[int]]]]:
        pruner = AttentionPredictor(0.4, block=1, predictor="last", calibrate=1)
        with torch.inference_mode():
            _, cache = network.prefill(torch.tensor([PROMPT]), [len(PROMPT)], image, len(tokens) + 1, pruner)
            found = [[held(kv, image) for kv in cache.images]]
            for step, token in enumerate(tokens):
                network.decode(torch.tensor([token]), cache)
                cache.hold(pruner.stepped(step, cache.queries, cache.images))
                found.append([held(kv, image) for kv in cache.images])
        return found
    one, other = reads([7, 30, 11]), reads([7, 52, 11])
    assert one[:2] == other[:2] and one[2] != other[2]


# ----- the network and its weights


def test_the_network_is_its_formula():
    """At any length of history, in and out of padding, which may hold anything."""
    torch.manual_seed(0)
    network = Network().requires_grad_(False)
    assert [sum(p.numel() for p in part.parameters()) for part in
            (network, network.first, network.second, network.mix)] == [4833, 160, 4640, 33]
    for h, n in (1, 1), (1, 5), (3, 2), (7, 6):
        rows = torch.rand(h, n)
        expected = torch.tensor(by_hand(network, rows.tolist()))
        plain = network(rows.expand(1, 2, h, n), torch.ones(1, h, n, dtype=torch.bool))
        assert plain.shape == (1, 2, n)
        close(plain[0, 1], expected)
        history = torch.full((1, 2, h + 3, n + 2), 50.0)
        there = torch.zeros(1, h + 3, n + 2, dtype=torch.bool)
        history[..., 3:, :n], there[..., 3:, :n] = rows, True
        close(network(history, there)[0, 0, :n], expected)


def test_the_weights_and_their_figures():
    """20 kB, those of the network; and what is said of them holds on the first scenes."""
    path = LEARNED / "attention_predictor.safetensors"
    state = load_file(path)
    assert sum(weight.numel() for weight in state.values()) == 4833 and path.stat().st_size < 21_000
    figures = json.loads(path.with_suffix(".json").read_text())
    assert figures["parameters"] == 4833
    for row in figures["recall"] + figures["sample_recall"]:
        assert all(0 < row[name] <= 1 for name in ("cnn", "last", "mean", "chance"))
    folder, network = find_checkpoint("tiny"), Network().requires_grad_(False)
    model, state = load_model(folder, "cpu", torch.float32), network.load_state_dict(state)
    processor = ImageProcessor.from_folder(folder, model.config.vision)
    answers = logs(model, ChatTokenizer.from_folder(folder, model.config), processor, "test", 4)
    for row, expected in zip(recalls(network, answers), figures["sample_recall"], strict=True):
        assert row == pytest.approx(expected, abs=0.01)


def test_training_learns(tmp_path):
    """What is looked at again and again is found after a while; and the method loads such weights."""
    torch.manual_seed(0)
    answers = [Log(torch.rand(2, 12, 1, 16) * 0.02, 5) for _ in range(4)]
    for hot, answer in enumerate(answers):
        answer.rows[..., 4 * hot + 1] += 0.5
    network = Network()
    error = train(network, answers, 80, seed=0)
    assert error < 0.02 < 3 / 16 * 0.5 ** 2                     # which a guess that is always the same makes
    found = recalls(network.requires_grad_(False), answers)
    assert found[3]["block"] == 4 and found[3]["cnn"] == found[3]["last"] == 1 and found[3]["chance"] == 0.25
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    with patch.object(attention_predictor, "WEIGHTS", tmp_path / "w.safetensors"):
        loaded = AttentionPredictor()
    assert torch.equal(loaded.network.mix.weight, network.mix.weight)


def test_histories_of_the_training():
    one, two = torch.rand(3, 9, 4), torch.rand(3, 80, 6)
    history, there, target = histories([one, two], [5, 70])
    assert history.shape == (2, 3, 64, 6)
    assert torch.equal(history[0, :, -5:, :4], one[:, :5]) and torch.equal(history[1], two[:, 6:70])
    assert there[0].sum() == 20 and there[0, -5:, :4].all() and there[1].all()
    assert not history[0, :, :-5].any() and not history[0, ..., 4:].any()
    assert torch.equal(target[0, :, :4], one[:, 5]) and torch.equal(target[1], two[:, 70])


# ----- options


@pytest.mark.parametrize("option, value, words", [
    ("block", 0, "at least 1"), ("calibrate", 0, "at least 1"), ("window", 0, "at least 1"),
    ("skip_layers", -1, "at least 0"), ("keep", 0.0, "a fraction above 0"),
    ("layout", "round", "raster or square"),
    ("predictor", "best", "cnn or last or mean"), ("offload", 1, "true or false")])
def test_bad_knobs(option, value, words):
    with pytest.raises(ValueError, match=f"attention_predictor: {option} is .*, but must be .*{words}") as e:
        AttentionPredictor(**{option: value})
    assert "\n" not in str(e.value)


def test_squares_have_square_sizes():
    with pytest.raises(ValueError, match="block is 8, but must be a square number"):
        AttentionPredictor(block=8, layout="square")


def test_layers_that_the_network_lacks(small, ask):
    """At least one is left to predict."""
    for skip in 2, 3:
        with pytest.raises(ValueError, match=f"skip_layers is {skip}, but must be less than 2,") as e:
            ask(small(1), [PROMPT], random_image((1, 3)), AttentionPredictor(skip_layers=skip))
        assert "\n" not in str(e.value)


def test_what_is_counted(small, ask):
    """What a step reads, and beside it the whole image of the predicted layers."""
    network, image, pruner = small(1, 2, 3), random_image((1, 7)), AttentionPredictor(0.5)
    run = ask(network, [PROMPT], image, pruner)
    assert run.answer.kept[0][0] == 50 and all(1 <= n <= 25 for n in run.answer.kept[0][1:])
    assert [kv.key.shape[2] for kv in pruner.whole] == [50, 50]
    assert run.answer.image_kv_stored == run.answer.image_kv_bytes + 2 * 50 * 2 * 2 * 8 * 4


def test_offloading_does_nothing_on_a_cpu(small, ask):
    network, image = small(1, 2, 3), random_image((2, 3))
    here, there = (ask(network, [PROMPT], image, AttentionPredictor(0.4, block=2, offload=o), steps=4)
                   for o in (False, True))
    assert torch.equal(here.logits, there.logits)


def test_what_it_says_of_itself():
    assert str(load(f"{attention_predictor.__file__}:AttentionPredictor", keep=0.3)
               ) == "attention_predictor, keep 0.3 read a step"
