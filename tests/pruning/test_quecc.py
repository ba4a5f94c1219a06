"""QueCC against its definition (arXiv 2411.03312 and its code), in loops over patches.

Strict locality, regions and grids on any tile. What every method promises is in test_pruners.py, for
`weights="pool"`; here random compressors are held to some of it. Training and the bundled compressors are in
test_quecc_training.py.
B batch, N image tokens, D width of text, E of vision states, F of all states of a patch, g cells a side.
"""
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import I, alone, close, encode, noise, random_tiles, refused, small_network
from quecc_by_hand import D, E, F, by_hand, random_compressor, tiles
from reference import forced
from torch import nn

from generate import generate
from model.image_tokens import ImageTokens
from model.llama_vision import LlamaVision
from pruning.methods import quecc
from pruning.methods.quecc import Compressor, QueCC, compress, load_compressor, means, pooled_grids
from scenes.train_quecc import export

PROMPTS = [[5, 6, I, 7, 8, 9, 10, 11], [12, 13, 14], [I, 5, 15, I, 16, 17], [9, 8, I, I, 18], [4, 19, 20, I]]
GRIDS = [[(2, 2)], [], [(1, 1), (1, 3)], [(1, 2), (2, 1)], [(1, 1)]]        # of the images of each prompt


# ----- the compressor


@pytest.mark.parametrize("side, grid", [(4, 2), (7, 4), (7, 2), (7, 3), (5, 1), (6, 6)])
@pytest.mark.parametrize("seed", range(2))
def test_the_definition(side, grid, seed):
    """Plain loops over cells, patches and heads, for every tile of a ragged batch; class tokens stay."""
    image, question, stride = tiles(side, [2, 0, 3], seed), noise(3, D, seed=seed), math.ceil(side / grid)
    compressor, size = random_compressor(stride, seed), side ** 2 + 1
    new = compress(image, stride, compressor, question)
    assert new.features.shape == (3, 3 * (grid ** 2 + 1), D) and new.states is None
    for b, count in enumerate([2, 0, 3]):
        for tile in range(count):
            old = slice(tile * size + 1, (tile + 1) * size)
            expected = by_hand(image.features[b, old], image.states.features[b, old], question[b],
                               compressor.state_dict(), side, stride)
            start = tile * (grid ** 2 + 1)
            close(new.features[b, start + 1:start + 1 + grid ** 2], expected)
            assert torch.equal(new.features[b, start], image.features[b, tile * size])


def test_several_heads():
    """A head is 64 wide, as in the vision encoder."""
    image, question = tiles(4, [1], states=256), noise(1, D)
    compressor = random_compressor(2, width=128, states=256)
    assert compressor.attention.num_heads == 2
    expected = by_hand(image.features[0, 1:], image.states.features[0, 1:], question[0],
                       compressor.state_dict(), 4, 2, heads=2)
    close(compress(image, 2, compressor, question).features[0, 1:], expected)


def test_strict_locality():
    """A patch changes its own cell alone; the question changes all of them.

    40 x 40 patches, regions of 4 x 4: patch 165 is at row 4, column 5, in cell (1, 1), which is token 11."""
    image, question, compressor = tiles(40, [1]), noise(1, D), random_compressor(4)
    before = compress(image, 4, compressor, question).features[0, 1:]
    assert before.shape == (100, D)
    for patch, cell in (165, 11), (0, 0), (1599, 99), (3 * 40 + 36, 9):
        moved = replace(image, states=replace(image.states, features=image.states.features.clone()))
        moved.states.features[0, 1 + patch] += 1
        changed = (compress(moved, 4, compressor, question).features[0, 1:] != before).any(-1)
        assert changed.nonzero()[:, 0].tolist() == [cell]
    assert (compress(image, 4, compressor, question + noise(1, D, seed=9)).features[0, 1:] != before
            ).any(-1).all()


@pytest.mark.parametrize("side, stride", [(8, 4), (7, 2), (7, 4), (9, 3)])
def test_each_token_mixes_its_own_cell(side, stride):
    """Each value is the number of its patch: a token lies between the numbers in its cell."""
    compressor, named = random_compressor(stride), torch.arange(side ** 2.0)
    compressor.value = nn.Sequential()
    weight = compressor.attention.in_proj_weight
    compressor.key[0] = nn.Linear(E, E).requires_grad_(False)
    weight[2 * E:], compressor.attention.in_proj_bias[2 * E:] = torch.eye(E), 0
    compressor.attention.out_proj.weight.copy_(torch.eye(E))
    compressor.attention.out_proj.bias.zero_()
    compressor.out = nn.Identity()
    mixed = compressor(named.view(1, -1, 1).expand(1, -1, E), noise(1, D))[0]
    names = named.view(side, side)
    cells = [names[r:r + stride, c:c + stride].flatten()
             for r in range(0, side, stride) for c in range(0, side, stride)]
    assert len(mixed) == len(cells)
    for token, cell in zip(mixed, cells, strict=True):
        assert (token >= cell.min() - 1e-4).all() and (token <= cell.max() + 1e-4).all()


def test_one_region_is_attention_over_the_whole_tile():
    compressor, states, question = random_compressor(6), noise(2, 36, F), noise(2, D)
    asked = compressor.query(states[..., :E] + compressor.question(question)[:, None])
    query = compressor.shrink(asked.transpose(1, 2).unflatten(2, (6, 6))).flatten(1)
    found, _ = compressor.attention(query[:, None], compressor.key(states), compressor.value(states))
    close(compressor(states, question), compressor.out(found))


# ----- before training, and without: averages


@pytest.mark.parametrize("stride", [2, 4, 5, 8, 10, 20, 40])
def test_averages_of_40_x_40_patches(stride):
    """Where the stride divides the side, a region's mean is avg_pool2d."""
    patches = noise(2, 1600, 3)
    expected = nn.functional.avg_pool2d(patches.transpose(1, 2).unflatten(2, (40, 40)), stride)
    found = means(patches, stride)
    close(found, expected.flatten(2).transpose(1, 2))
    assert found.shape[1] == ((40 - stride) // stride + 1) ** 2 and 40 // stride in pooled_grids(40)


@pytest.mark.parametrize("stride", range(1, 8))
def test_averages_of_7_x_7_patches(stride):
    """Patches beyond the tile are no part of a mean."""
    patches = noise(49, 3)
    cells = [[r * 7 + c for r in range(top, min(top + stride, 7)) for c in range(left, min(left + stride, 7))]
             for top in range(0, 7, stride) for left in range(0, 7, stride)]
    close(means(patches[None], stride)[0], torch.stack([patches[cell].mean(0) for cell in cells]))
    assert len(cells) == math.ceil(7 / stride) ** 2


def test_untrained_it_is_average_pooling():
    image, question = tiles(7, [2, 1]), noise(2, D)
    for stride in 1, 2, 4, 7:
        untrained = compress(image, stride, Compressor(E, F, D, stride).requires_grad_(False), question)
        plain = compress(image, stride)
        assert torch.equal(untrained.features, plain.features)
    assert torch.equal(compress(image, 1).features, image.features)


def test_the_mean_of_projected_tokens_is_the_projected_mean():
    network = small_network(1)
    with torch.no_grad():
        image = network.encode([random_tiles([(1, 2)], network.config.vision)], keep_states=True)
        pooled = means(image.states.features.unflatten(1, (2, 5))[0, :, 1:], 2)
        expected = network.multi_modal_projector(pooled)
    close(compress(image, 2).features.unflatten(1, (2, 2))[0, :, 1:], expected)


# ----- grids, coords, shapes


def encoded(pruner: QueCC, image: ImageTokens, network: LlamaVision | None = None) -> ImageTokens:
    """Hook 1 alone, with the network that reads the question."""
    pruner.begin(network)
    return pruner.encoded(image, PROMPTS)


@pytest.mark.parametrize("keep, pooled, trained", [
    (0.99, 16, 16), (0.5, 16, 16), (0.34, 16, 16), (0.33, 9, 4), (0.2, 9, 4), (0.1, 4, 4), (0.09, 1, 4),
    (0.001, 1, 4), (49, 16, 16), (17, 16, 16), (16, 9, 4), (10, 9, 4), (5, 4, 4), (4, 1, 4), (1, 1, 4),
    (1.0, 49, 49), (50, 49, 49), (51, 49, 49)])
def test_the_largest_grid_within_the_share(keep, pooled, trained, tmp_path, monkeypatch):
    """Of 50 tokens a tile: averages have any grid that fits, what was trained has two."""
    for grid in 4, 2:
        export(random_compressor(math.ceil(7 / grid)), grid, tmp_path)
    monkeypatch.setattr(quecc, "question_states", lambda model, prompts: noise(1, D))
    for weights, expected in ("pool", pooled), (str(tmp_path), trained):
        assert encoded(QueCC(keep, weights), tiles(7, [2])).features.shape[1] == 2 * (expected + 1)


def test_grids_of_7_and_40():
    assert pooled_grids(7) == {1, 2, 3, 4, 7} and pooled_grids(2) == {1, 2}
    assert pooled_grids(40) >= {1, 2, 4, 5, 8, 10, 20, 40}


def test_a_new_token_has_the_coords_of_its_first_patch():
    new = compress(tiles(7, [2]), 2)
    firsts = [(-1, -1)] + [(row, column) for row in (0, 2, 4, 6) for column in (0, 2, 4, 6)]
    assert [tuple(coords) for coords in new.coords[0].tolist()] == [(0, tile, *where) for tile in (0, 1)
                                                               for where in firsts]


def test_404_tokens_of_four_tiles():
    new = compress(tiles(40, [4, 1]), 4, random_compressor(4), noise(2, D))
    assert new.features.shape == (2, 404, D) and new.mask.sum(1).tolist() == [404, 101]
    assert not new.features[1, 101:].any() and (new.coords[1, 101:] == -1).all()


def test_padding_tiles_are_ignored():
    """Not even as NaN."""
    image, question, compressor = tiles(7, [2, 1]), noise(2, D), random_compressor(2)
    expected = compress(image, 2, compressor, question)
    image.features[~image.mask], image.states.features[~image.mask] = math.nan, math.nan
    found = compress(image, 2, compressor, question)
    assert torch.equal(found.features, expected.features) and torch.equal(found.mask, expected.mask)


# ----- in the model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A random compressor for the networks that the tests of all methods use: 2 x 2 patches, one token."""
    compressor = random_compressor(2, 1, width=16, states=48, text=32)
    return str(export(compressor, 1, tmp_path_factory.mktemp("random")).parent)


@pytest.fixture
def case(folder):
    """A network, and the images of PROMPTS with the encoder's states."""
    network = small_network(2, 2, 3)
    image = encode(network, GRIDS, 3, QueCC(weights=folder))
    assert image.states is not None and image.mask is not None
    return network, image


def test_a_batch_gives_each_prompt_what_it_gets_alone(case, folder):
    (network, image), pruner = case, QueCC(0.5, folder)
    run = forced(network, PROMPTS, image, pruner, steps=4)
    for b, prompt in enumerate(PROMPTS):
        close(run.logits[b], forced(network, [prompt], alone(image, b), pruner, steps=4).logits[0])
    assert run.answer.kept == [[2.0 * tiles] * 3 for tiles in (4, 0, 3, 4, 1)]       # of images it sees


def test_the_logits_are_those_of_the_new_tokens(case, folder):
    """The network without a cache, on a token made by hand."""
    network, image, prompt = *case, PROMPTS[4]
    run = forced(network, [prompt], alone(image, 4), QueCC(2, folder), steps=3)
    words = torch.tensor([[token for token in prompt if token != I]])
    compressor = load_compressor(Path(folder) / "quecc_1.safetensors", torch.device("cpu"))
    token = by_hand(image.features[4, 1:5], image.states.features[4, 1:5],
                    network.language_model(words, None, None)[0, -1], compressor.state_dict(), 2, 2)
    made = ImageTokens(torch.cat((image.features[4, :1], token))[None], image.coords[4:, :2])
    close(run.logits, network.read(torch.tensor([prompt + run.fed[:-1]]), made)[:, len(prompt) - 1:])


def test_the_question_decides(case, folder):
    """Another question about the same image makes other tokens; the image token itself is not read."""
    (network, image), pruner = case, QueCC(2, folder)
    one = image.select([4, 4])
    keys = forced(network, [[4, 19, 20, I], [4, 19, 21, I]], one, pruner).read[0].key
    same = forced(network, [[4, 19, 20, I], [I, 4, 19, 20]], one, pruner).read[0].key
    assert (keys[0, :, 1] - keys[1, :, 1]).abs().max() > 1e-3 and torch.equal(keys[0, :, 0], keys[1, :, 0])
    close(same[0], same[1])


def test_only_what_is_needed_is_computed(case, folder, monkeypatch):
    network, image = case
    assert QueCC().keep_states and QueCC(weights=folder).keep_states and QueCC.merges
    assert not QueCC(weights="pool").keep_states
    monkeypatch.setattr(quecc, "question_states", lambda *arguments: pytest.fail("nobody needs it"))
    generate(network, PROMPTS, replace(image, states=None), 2, (), pruner=QueCC(weights="pool"))


def test_half_precision(case, folder, monkeypatch):
    """Computed in fp32, so that only the rounding to bf16 differs; padding is zeros."""
    image = case[1]
    half = replace(image, features=image.features.bfloat16(), states=replace(
        image.states, features=image.states.features.bfloat16()))
    results = []
    for tokens in image, half:
        question = noise(5, 32).to(tokens.features.dtype)
        monkeypatch.setattr(quecc, "question_states", lambda model, prompts, asked=question: asked)
        results.append(encoded(QueCC(2, folder), tokens))
    exact, found = results
    assert found.features.dtype == torch.bfloat16 and not found.features[~found.mask].any()
    assert (found.features - exact.features).norm() < 0.02 * exact.features.norm()


# ----- options and files


def test_the_trained_weights_are_for_the_bundled_model_alone(case):
    network, image = case
    here = r"trained for another model.*here \(16, 48, 32, 1\)\): train one .* or use weights=pool"
    with refused(here):
        generate(network, PROMPTS, image, 2, (), pruner=QueCC(0.4))


@pytest.mark.parametrize("options, message", [
    ({"keep": 0}, "keep is 0,"), ({"keep": 1.5}, "keep is 1.5,"), ({"keep": True}, "keep is True,"),
    ({"weights": "pooled"}, "weights is 'pooled', but must be trained, pool, or a folder"),
    ({"weights": 3}, "weights is 3, but must be text")])
def test_bad_options(options, message):
    with refused(message):
        QueCC(**options)


def test_folders_without_weights(tmp_path):
    with refused(r"quecc: no quecc_\*.safetensors in"):
        encoded(QueCC(weights=str(tmp_path)), tiles(7, [1]))
    (tmp_path / "quecc_16.safetensors").write_bytes(b"nothing")
    (tmp_path / "quecc_best.safetensors").write_bytes(b"of no known size")
    with refused("quecc_16.safetensors: no weights of this method"):
        encoded(QueCC(weights=str(tmp_path)), tiles(7, [1]))
