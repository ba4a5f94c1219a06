"""AttentionPredictor's blocks and budgets, its network, its training and its weights."""
import json
from unittest.mock import patch

import pytest
import torch
from attention_predictor_by_hand import budget, by_hand, cut
from helpers import close, kept_sets, tile_coords
from safetensors.torch import load_file, save_file

from model.image_tokens import ImageKV, ImageTokens
from pruning.methods import attention_predictor
from pruning.methods.attention_predictor import AttentionPredictor, Network
from scenes.train_attention_predictor import Log, histories, logs, recalls, train
from weights import LEARNED, find_checkpoint, load_model
from weights.images import ImageProcessor
from weights.tokenizer import ChatTokenizer


def cache_of(coords: list[list[int]], heads: int = 2) -> ImageKV:
    key = torch.zeros(1, heads, len(coords), 8)
    return ImageKV(key, key, torch.tensor([[coords]]))


# ----- blocks and budgets


@pytest.mark.parametrize("layout, block", [("raster", 16), ("raster", 5), ("square", 16), ("square", 4)])
@pytest.mark.parametrize("side", [4, 7])
def test_blocks_end_where_a_tile_does(layout, block, side):
    where = tile_coords(3, side) + tile_coords(1, side, image=1)
    of, blocks = AttentionPredictor(block=block, layout=layout).blocks(cache_of(where))
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
    kv, pruner = cache_of(tile_coords(1, 40)), AttentionPredictor(256)
    pruner.lay_out(kv)
    row = torch.rand(1, 2, 100, generator=torch.Generator().manual_seed(0))
    kept = pruner.chosen(row)
    assert kept.sum(-1).tolist() == [[241, 241]] and kept[..., 0].all()
    best = row[0] >= row[0].topk(15).values[:, -1:]
    assert torch.equal(kept[0, :, 1:].unflatten(-1, (100, 16)), best[..., None].expand(-1, -1, 16))


@pytest.mark.parametrize("block, layout", [(16, "raster"), (4, "raster"), (16, "square")])
def test_never_more_than_the_budget(block, layout):
    """Budgets from 1 token to all, on tiles whose last blocks are shorter; each as loops choose."""
    where = tile_coords(2, 7) + tile_coords(1, 7, image=1)
    flat, kv = [tuple(p) for p in where], cache_of(where, heads=1)
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
        kv = cache_of(tile_coords(4, 7), heads=2)
        pruner.stored, pruner.stream = [kv], None
        pruner.lay_out(kv)
        block = 4 * (hot // 3) + hot % 3                                # those of 16 tokens, not of one
        history = torch.full((1, 4, 10, 16), 0.01)
        history[0, :2, :, block] = 0.6
        history[0, 2, :, (block + 4) % 16] = 0.3                        # a third head outvoted by the fourth
        history[0, 3, :, block] = 0.6
        pruner.history, pruner.length = [history], torch.tensor([10])
        first = 50 * (hot // 3) + 1 + 16 * (hot % 3)
        expected = sorted({0, 50, 100, 150} | set(range(first, first + 16)))
        image = ImageTokens(torch.zeros(1, 200, 1), kv.coords[:, 0])
        assert kept_sets(pruner.select()[0], image) == [expected, expected]


def test_of_equal_blocks_the_first_are_read():
    pruner = AttentionPredictor(9, block=2, predictor="last")
    pruner.lay_out(cache_of(tile_coords(2, 3)))
    assert pruner.chosen(torch.full((1, 1, 10), 0.5))[0, 0].nonzero()[:, 0].tolist() == [0, *range(1, 7), 10]


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
    """They are 20 kB and fit the network; the figures beside them are true for the first scenes."""
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
    """A block that is attended to in every step is found after a while; the method loads such weights."""
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
