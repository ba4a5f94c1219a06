"""What sees what, and that each sequence of a batch gets what it gets alone.

Uses a random network of a few layers with every gate open. That its numbers are right is shown in
test_golden.py and test_transformers.py; what it keeps, costs and learns is in test_caches_and_masks.py,
test_costs.py and test_training.py.
"""
import copy

import pytest
import torch
from helpers import close, greedy, random_tiles
from small_model import CONFIG, IMAGE, ROWS, TOKENS, pad

from model.image_tokens import Tiles

# ----- rows that see no image


def test_rows_before_the_image_are_those_of_a_text_model(network):
    """Bit for bit: they skip the cross-attention layers, also beside rows that see theirs already."""
    ids = torch.tensor([[5, 6, 7, IMAGE, 9, 10], [5, IMAGE, 6, 7, 8, 9]])
    tiles = [random_tiles([(1, 2)], CONFIG.vision, seed) for seed in range(2)]
    for rows in [0], [1], [0, 1]:
        seeing = network(ids[rows], [tiles[row] for row in rows])
        blind = network(torch.where(ids == IMAGE, 11, ids)[rows], [None] * len(rows))
        for row, with_image, without in zip(rows, seeing, blind, strict=True):
            first = ids[row].tolist().index(IMAGE)
            assert torch.equal(with_image[:first], without[:first])
            assert ((with_image - without)[first:].abs().amax(-1) > 0.1).all()


def test_a_text_only_sequence_of_a_mixed_batch_is_that_of_a_text_model(network):
    """Bit for bit, while reading and while decoding; also beside a row that sees its image from the start."""
    ids = torch.tensor([[IMAGE, 6, 7, 8], [9, 10, 11, 12]])
    image = network.encode([random_tiles([(1, 2)], CONFIG.vision), None])
    text = ids.clone()
    text[0, 0] = 5
    mixed, alone = network.prefill(ids, [4, 4], image, 2), network.prefill(text, [4, 4], None, 2)
    assert torch.equal(network.read(ids, image)[1], network.read(text, None)[1])
    assert torch.equal(mixed[0][1], alone[0][1]) and not torch.equal(mixed[0][0], alone[0][0])
    for tokens in torch.tensor([[3, 4], [5, 6]]):
        seeing, blind = network.decode(tokens, mixed[1]), network.decode(tokens, alone[1])
        assert torch.equal(seeing[1], blind[1]) and not torch.equal(seeing[0], blind[0])


def test_an_image_does_not_reach_the_text_before_it_or_after_the_next(network):
    """Two images apart: the second changes nothing before it, and the first is out of sight after it."""
    ids = torch.tensor([[5, IMAGE, 6, 7, IMAGE, 8, 9]])
    a, b = random_tiles([(1, 2)], CONFIG.vision, 1), random_tiles([(1, 1)], CONFIG.vision, 2)
    other = random_tiles([(1, 1)], CONFIG.vision, 3)
    base, second = network(ids, [Tiles.cat([a, b])]), network(ids, [Tiles.cat([a, other])])
    close(base[:, :4], second[:, :4])
    assert ((base - second)[:, 4:].abs().amax(-1) > 0.01).all()
    images = [network.encode([Tiles.cat([first, b])]) for first in (a, other)]
    caches = [network.prefill(ids, [7], image, 0)[1] for image in images]
    for cache in caches:
        cache.image_kv = list(cache.image_kv)           # what no sequence sees is dropped
    kv, unseen = (cache.image_kv[0] for cache in caches)
    assert kv.key.shape[2] == TOKENS                    # of the second image alone
    close(kv.key, unseen.key)


def test_a_batch_of_text_alone(network):
    """No image anywhere, said in three ways: no cross-attention, and decoding goes on like reading."""
    rows = [[5, 6, 7, 8], [9, 10]]
    assert network.encode([None, None]) is None
    assert network.encode([random_tiles([], CONFIG.vision), None]) is None
    close(network(pad(rows), [random_tiles([], CONFIG.vision)] * 2), network(pad(rows), [None] * 2), atol=0)
    tokens, logits = greedy(network, rows, None, 5)
    for row, new, seen in zip(rows, tokens, logits, strict=True):
        close(seen, network(torch.tensor([row + new[:-1]]), [None])[0, len(row) - 1:])
    _, cache = network.prefill(pad(rows), [4, 2], None, 1)
    assert cache.image_kv == [] and cache.image_bytes() == 0


# ----- batches


def test_several_prompts_about_one_image(network, tiles):
    """One encoding, expanded without a copy, gives each prompt what it gets alone."""
    image = network.encode(tiles[2:3])
    rows = [[IMAGE, 5, 15, IMAGE, 16, 17], [5, IMAGE, IMAGE, 6], [IMAGE, IMAGE, 9, 10, 11]]
    shared = image.expand(3)
    assert shared.features.data_ptr() == image.features.data_ptr()
    tokens, logits = greedy(network, rows, shared, 6)
    for row, new, seen in zip(rows, tokens, logits, strict=True):
        [expected], alone = greedy(network, [row], image, 6)
        assert new == expected
        close(seen, alone[0])


def test_a_ragged_batch_gives_each_row_what_it_gets_alone(network, tiles):
    """Text only, one image, several; also when the rows come in another order, and with more padding."""
    image, lengths = network.encode(tiles), [len(row) for row in ROWS]
    tokens, logits = greedy(network, ROWS, image, 8)
    whole = network(pad(ROWS), tiles)
    for i, row in enumerate(ROWS):
        single = network.encode(tiles[i:i + 1])
        [expected], alone = greedy(network, [row], single, 8)
        assert tokens[i] == expected
        close(logits[i], alone[0])
        text = torch.tensor([row + expected[:-1]])
        close(alone[0], network.read(text, single)[0, len(row) - 1:])
        close(whole[i, :lengths[i]], network.read(text, single)[0, :len(row)])
    backward, _ = greedy(network, ROWS[::-1], network.encode(tiles[::-1]), 8)
    assert backward[::-1] == tokens
    wide, _ = network.prefill(torch.nn.functional.pad(pad(ROWS), (0, 5), value=3), lengths, image, 1)
    close(wide, logits[:, 0])


def test_rows_of_one_length_inside_padding(network, tiles):
    """Nothing is ragged here, but the padding still has to go when the new tokens come."""
    row = ROWS[0]
    image = network.encode(tiles[:1])
    _, cache = network.prefill(torch.tensor([row + [2, 2, 2]]), [len(row)], image, 2)
    text = row + [5, 6]
    for n in (1, 2):
        logits = network.decode(torch.tensor([text[len(row) + n - 1]]), cache)
        close(logits, network.read(torch.tensor([text[:len(row) + n]]), image)[:, -1])


def test_bfloat16_is_near_float32(network, tiles):
    half = copy.deepcopy(network).bfloat16()
    image, expected = half.encode(tiles), network(pad(ROWS), tiles)
    assert image.features.dtype == torch.bfloat16
    logits = half.read(pad(ROWS), image)
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    assert (logits - expected).std() < 0.05 * expected.std()
    _, seen = greedy(half, ROWS, image, 4)
    assert seen.isfinite().all()
    _, cache = half.prefill(pad(ROWS), [len(row) for row in ROWS], image, 1)
    tensors = [*cache.text_keys, *cache.text_values, cache.image_kv[0].key]
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


@pytest.mark.parametrize("rows, grids, fragments", [
    ([[5, IMAGE, IMAGE]], [[(1, 1)]], ["sequence 0", "2 image tokens", "1 images"]),
    ([[5, 6, 7]], [[(1, 1)]], ["sequence 0", "0 image tokens", "1 images"]),
    ([[5, IMAGE, 7]], [[]], ["sequence 0", "1 image tokens", "0 images"]),
    ([[5, IMAGE], [IMAGE, 6]], [[(1, 1)], []], ["sequence 1", "1 image tokens", "0 images"]),
    ([[5, 6], [IMAGE, 6]], [[], [(1, 1), (1, 2)]], ["sequence 1", "1 image tokens", "2 images"]),
    ([[5, IMAGE], [IMAGE, 6]], [[(1, 1)]], ["2 sequences"]),
    ([[5, IMAGE]], [[(2, 3)]], ["2 x 3"])])
def test_images_that_do_not_fit_the_text(network, rows, grids, fragments):
    """One line, by forward and by prefill."""
    tiles = [Tiles(torch.zeros(len(row), 4, 3, 28, 28), torch.tensor(row)) if row else None for row in grids]
    ids = torch.tensor(rows)
    for run in (lambda: network(ids, tiles),
                lambda: network.prefill(ids, [ids.shape[1]] * len(ids), network.encode(tiles), 1)):
        with pytest.raises(ValueError) as error:
            run()
        message = str(error.value)
        assert "\n" not in message and all(fragment in message for fragment in fragments), message
