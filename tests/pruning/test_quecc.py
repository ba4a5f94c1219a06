"""QueCC against its definition (arXiv 2411.03312 and its code), in loops over patches; and its training.

Strict locality, regions and grids on any tile; the bundled compressors on the bundled model. What every
method promises is in test_pruners.py, for `weights="pool"`; here random compressors are held to some of it.
B batch, N image tokens, D width of text, E of vision states, F of all states of a patch, g cells a side.
"""
import json
import math
import sys
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from generate import Assistant, generate
from model.image_tokens import ImageTokens, Vision
from pruning.methods.quecc import Compressor, QueCC, compress, load_compressor, means, pooled_grids
from pruning.pruner import Prompts, Pruner
from scenes import train_quecc
from scenes.draw import draw as draw_scene
from scenes.draw import make_scene
from scenes.train_quecc import Lesson, Questions, Student, examine, export, resume, train
from weights import LEARNED, load_model
from weights.tokenizer import messages

I = 60          # noqa: E741  the image token
PROMPTS = [[5, 6, I, 7, 8, 9, 10, 11], [12, 13, 14], [I, 5, 15, I, 16, 17], [9, 8, I, I, 18], [4, 19, 20, I]]
GRIDS = [[(2, 2)], [], [(1, 1), (1, 3)], [(1, 2), (2, 1)], [(1, 1)]]     # rows, columns of tiles, by prompt
E, F, D = 6, 12, 10         # widths of vision states, of all states, of text


def close(a: Tensor, b: Tensor, atol: float = 1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiles(side: int, counts: list[int], seed: int = 0, states: int = F, width: int = D) -> ImageTokens:
    """Batch rows of one image with so many tiles each, of side x side patches; random features."""
    size, most = side ** 2 + 1, max(counts)
    one = [(-1, -1)] + [(row, column) for row in range(side) for column in range(side)]
    coords = torch.tensor([[(0, tile, *where) for tile in range(most) for where in one]] * len(counts))
    mask = torch.arange(most * size) < torch.tensor(counts)[:, None] * size
    coords = torch.where(mask[..., None], coords, -1)
    features, known = (noise(len(counts), most * size, w, seed=seed + w) * mask[..., None]
                       for w in (width, states))
    final = known[..., :E]
    return ImageTokens(features, coords, None if mask.all() else mask,
                       Vision([None] * len(counts), known, final, final))


def random_compressor(stride: int, seed: int = 0, width: int = E, states: int = F,
                      text: int = D) -> Compressor:
    """With nothing left at its start: every bias and norm, and what is added to the mean."""
    compressor = Compressor(width, states, text, stride).requires_grad_(False)
    for i, (name, parameter) in enumerate(sorted(compressor.named_parameters())):
        drawn = noise(*parameter.shape, seed=1000 * seed + i)
        is_norm = name.endswith(("1.weight", "3.weight"))
        parameter.copy_(1 + 0.3 * drawn if is_norm else drawn / parameter[0].numel() ** 0.5)
    return compressor


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (x - x.mean()) / ((x - x.mean()).square().mean() + 1e-6).sqrt() * weight + bias


def mlp(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    first, second = (partial(torch.addmv, w[f"{name}.{i}.bias"], w[f"{name}.{i}.weight"]) for i in (0, 2))
    h = first(x)
    return norm(second(h * (1 + torch.erf(h / 2 ** 0.5)) / 2), w[f"{name}.3.weight"], w[f"{name}.3.bias"])


def by_hand(features: Tensor, states: Tensor, question: Tensor, w: dict[str, Tensor], side: int,
            stride: int, heads: int = 1) -> Tensor:
    """The new tokens of one tile: features [side², D], states [side², F], question [D] -> [g², D]."""
    w = {name: tensor.double() for name, tensor in w.items()}
    features, states, question = features.double(), states.double(), question.double()
    width, tokens = len(w["shrink.weight"]), []
    asked = norm(w["question.0.weight"] @ question + w["question.0.bias"], w["question.1.weight"],
                 w["question.1.bias"])
    (wq, wk, wv), (bq, bk, bv) = (w[f"attention.in_proj_{part}"].split(width) for part in ("weight", "bias"))
    for top in range(0, side, stride):
        for left in range(0, side, stride):
            cell = [(r, c) for r in range(top, min(top + stride, side))
                    for c in range(left, min(left + stride, side))]
            query = w["shrink.bias"].clone()
            for r, c in cell:
                seen = mlp(states[r * side + c][:width] + asked, w, "query")
                query += w["shrink.weight"][:, 0, r - top, c - left] * seen
            query = wq @ query + bq
            keys = [wk @ mlp(states[r * side + c], w, "key") + bk for r, c in cell]
            values = [wv @ mlp(states[r * side + c], w, "value") + bv for r, c in cell]
            found, d = [], width // heads
            for head in (slice(h * d, (h + 1) * d) for h in range(heads)):
                powers = [math.exp(float(query[head] @ key[head]) / math.sqrt(d)) for key in keys]
                found.append(sum(p / sum(powers) * value[head]
                                 for p, value in zip(powers, values, strict=True)))
            found = w["attention.out_proj.weight"] @ torch.cat(found) + w["attention.out_proj.bias"]
            mean = sum(features[r * side + c] for r, c in cell) / len(cell)
            tokens.append(mean + w["out.weight"] @ found + w["out.bias"])
    return torch.stack(tokens).float()


# ----- the compressor


@pytest.mark.parametrize("side, grid", [(4, 2), (7, 4), (7, 2), (7, 3), (5, 1), (6, 6)])
@pytest.mark.parametrize("seed", range(2))
def test_the_definition(side, grid, seed):
    """Plain loops over cells, patches and heads, for every tile of a ragged batch; class tokens stay."""
    image, question, stride = tiles(side, [2, 0, 3], seed), noise(3, D, seed=seed), math.ceil(side / grid)
    compressor, size = random_compressor(stride, seed), side ** 2 + 1
    new = compress(image, stride, compressor, question)
    assert new.features.shape == (3, 3 * (grid ** 2 + 1), D) and new.vision is None
    for row, count in enumerate([2, 0, 3]):
        for tile in range(count):
            old = slice(tile * size + 1, (tile + 1) * size)
            expected = by_hand(image.features[row, old], image.vision.features[row, old], question[row],
                               compressor.state_dict(), side, stride)
            start = tile * (grid ** 2 + 1)
            close(new.features[row, start + 1:start + 1 + grid ** 2], expected)
            assert torch.equal(new.features[row, start], image.features[row, tile * size])


def test_several_heads():
    """A head is 64 wide, as in the vision encoder."""
    image, question = tiles(4, [1], states=256), noise(1, D)
    compressor = random_compressor(2, width=128, states=256)
    assert compressor.attention.num_heads == 2
    expected = by_hand(image.features[0, 1:], image.vision.features[0, 1:], question[0],
                       compressor.state_dict(), 4, 2, heads=2)
    close(compress(image, 2, compressor, question).features[0, 1:], expected)


def test_strict_locality():
    """A patch is heard in its own cell alone; the question in all of them. 40 x 40 patches, regions of 4 x 4:
    patch 165 stands at row 4, column 5, in cell (1, 1), which is token 11."""
    image, question, compressor = tiles(40, [1]), noise(1, D), random_compressor(4)
    before = compress(image, 4, compressor, question).features[0, 1:]
    assert before.shape == (100, D)
    for patch, cell in (165, 11), (0, 0), (1599, 99), (3 * 40 + 36, 9):
        moved = replace(image, vision=replace(image.vision, features=image.vision.features.clone()))
        moved.vision.features[0, 1 + patch] += 1
        changed = (compress(moved, 4, compressor, question).features[0, 1:] != before).any(-1)
        assert changed.nonzero()[:, 0].tolist() == [cell]
    assert (compress(image, 4, compressor, question + noise(1, D, seed=9)).features[0, 1:] != before
            ).any(-1).all()


@pytest.mark.parametrize("side, stride", [(8, 4), (7, 2), (7, 4), (9, 3)])
def test_each_token_mixes_its_own_cell(side, stride):
    """Values that name their patch: what comes out lies between the names in the cell."""
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
    """Where it divides, a region's mean is avg_pool2d, and so many tokens come of a tile."""
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


def test_the_mean_of_projected_tokens_is_the_projected_mean(small, draw):
    network = small(1)
    with torch.no_grad():
        image = network.encode([draw([(1, 2)], network.config.vision)], vision=True)
        pooled = means(image.vision.features.unflatten(1, (2, 5))[0, :, 1:], 2)
        expected = network.multi_modal_projector(pooled)
    close(compress(image, 2).features.unflatten(1, (2, 2))[0, :, 1:], expected)


# ----- grids, places, shapes


@pytest.mark.parametrize("keep, pooled, trained", [
    (0.99, 16, 16), (0.5, 16, 16), (0.34, 16, 16), (0.33, 9, 4), (0.2, 9, 4), (0.1, 4, 4), (0.09, 1, 4),
    (0.001, 1, 4), (49, 16, 16), (17, 16, 16), (16, 9, 4), (10, 9, 4), (5, 4, 4), (4, 1, 4), (1, 1, 4),
    (1.0, 49, 49), (50, 49, 49), (51, 49, 49)])
def test_the_largest_grid_within_the_share(keep, pooled, trained, tmp_path):
    """Of 50 tokens a tile: averages have any grid that fits, what was trained has two."""
    for grid in 4, 2:
        export(random_compressor(math.ceil(7 / grid)), grid, tmp_path)
    image, prompts = tiles(7, [2]), Prompts([[1]], 1, (), noise(1, D))
    for weights, expected in ("pool", pooled), (str(tmp_path), trained):
        assert QueCC(keep, weights).encoded(image, prompts).features.shape[1] == 2 * (expected + 1)


def test_grids_of_7_and_40():
    assert pooled_grids(7) == {1, 2, 3, 4, 7} and pooled_grids(2) == {1, 2}
    assert pooled_grids(40) >= {1, 2, 4, 5, 8, 10, 20, 40}


def test_a_new_token_stands_where_its_region_begins():
    new = compress(tiles(7, [2]), 2)
    firsts = [(-1, -1)] + [(row, column) for row in (0, 2, 4, 6) for column in (0, 2, 4, 6)]
    assert [tuple(coords) for coords in new.coords[0].tolist()] == [(0, tile, *where) for tile in (0, 1)
                                                               for where in firsts]


def test_404_tokens_of_four_tiles():
    new = compress(tiles(40, [4, 1]), 4, random_compressor(4), noise(2, D))
    assert new.features.shape == (2, 404, D) and new.mask.sum(1).tolist() == [404, 101]
    assert not new.features[1, 101:].any() and (new.coords[1, 101:] == -1).all()


def test_padding_tiles_have_no_say():
    """Not even as NaN."""
    image, question, compressor = tiles(7, [2, 1]), noise(2, D), random_compressor(2)
    expected = compress(image, 2, compressor, question)
    image.features[~image.mask], image.vision.features[~image.mask] = math.nan, math.nan
    found = compress(image, 2, compressor, question)
    assert torch.equal(found.features, expected.features) and torch.equal(found.mask, expected.mask)


# ----- in the model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A random compressor for the networks that the tests of all methods use: 2 x 2 patches, one token."""
    compressor = random_compressor(2, 1, width=16, states=48, text=32)
    return str(export(compressor, 1, tmp_path_factory.mktemp("random")).parent)


@pytest.fixture
def looked(small, see, folder):
    """A network, and the images of PROMPTS with what the encoder knows of them."""
    network = small(2, 2, 3)
    image = see(network, GRIDS, 3, QueCC(weights=folder))
    assert image.vision is not None and image.mask is not None
    return network, image


def real(image: ImageTokens, row: int) -> ImageTokens | None:
    """One batch row without its padding."""
    one, n = image.rows([row]), int(image.mask[row].sum())
    states = {name: getattr(one.vision, name)[:, :n] for name in ("features", "entering", "leaving")}
    vision = replace(one.vision, **states)
    return ImageTokens(one.features[:, :n], one.coords[:, :n], None, vision) if n else None


def test_a_batch_gives_each_row_what_it_gets_alone(looked, ask, folder):
    (network, image), pruner = looked, QueCC(0.5, folder)
    run = ask(network, PROMPTS, image, pruner, steps=4)
    for row, prompt in enumerate(PROMPTS):
        close(run.logits[row], ask(network, [prompt], real(image, row), pruner, steps=4).logits[0])
    assert run.answer.kept == [[2.0 * tiles] * 3 for tiles in (4, 0, 3, 4, 1)]       # of images it sees


def test_the_logits_are_those_of_the_new_tokens(looked, ask, folder):
    """The whole network, without a cache, on a token made by hand."""
    network, image, prompt = *looked, PROMPTS[4]
    run = ask(network, [prompt], real(image, 4), QueCC(2, folder), steps=3)
    words = torch.tensor([[token for token in prompt if token != I]])
    compressor = load_compressor(Path(folder) / "quecc_1.safetensors", torch.device("cpu"))
    token = by_hand(image.features[4, 1:5], image.vision.features[4, 1:5],
                    network.language_model(words, None, None)[0, -1], compressor.state_dict(), 2, 2)
    made = ImageTokens(torch.cat((image.features[4, :1], token))[None], image.coords[4:, :2])
    close(run.logits, network.read(torch.tensor([prompt + run.fed[:-1]]), made)[:, len(prompt) - 1:])


def test_the_question_decides(looked, ask, folder):
    """Another question about the same image makes other tokens; the image token itself is not read."""
    (network, image), pruner = looked, QueCC(2, folder)
    one = image.rows([4, 4])
    keys = ask(network, [[4, 19, 20, I], [4, 19, 21, I]], one, pruner).read[0].key
    same = ask(network, [[4, 19, 20, I], [I, 4, 19, 20]], one, pruner).read[0].key
    assert (keys[0, :, 1] - keys[1, :, 1]).abs().max() > 1e-3 and torch.equal(keys[0, :, 0], keys[1, :, 0])
    close(same[0], same[1])


def test_only_what_is_needed_is_computed(looked, folder, monkeypatch):
    network, image = looked
    assert QueCC().needs == QueCC(weights=folder).needs == ("vision", "question") and QueCC.merges
    assert QueCC(weights="pool").needs == ()
    monkeypatch.setattr(network, "question", lambda *arguments: pytest.fail("nobody asked"))
    generate(network, PROMPTS, replace(image, vision=None), 2, (), pruner=QueCC(weights="pool"))


def test_half_precision(looked, folder):
    """Computed in fp32, and as close to it as bf16 comes; padding is zeros."""
    image, question = looked[1], noise(5, 32)
    half = replace(image, features=image.features.bfloat16(), vision=replace(
        image.vision, features=image.vision.features.bfloat16()))
    whole, found = (QueCC(2, folder).encoded(tokens, Prompts(PROMPTS, 1, (), asked))
                    for tokens, asked in ((image, question), (half, question.bfloat16())))
    assert found.features.dtype == torch.bfloat16 and not found.features[~found.mask].any()
    assert (found.features - whole.features).norm() < 0.02 * whole.features.norm()


# ----- options and files


def test_the_trained_weights_are_for_the_bundled_model_alone(looked):
    network, image = looked
    here = r"trained for another model.*here \(16, 48, 32, 1\)\): train one .* or use weights=pool"
    with pytest.raises(ValueError, match=here) as error:
        generate(network, PROMPTS, image, 2, (), pruner=QueCC(0.4))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options, message", [
    ({"keep": 0}, "keep is 0,"), ({"keep": 1.5}, "keep is 1.5,"), ({"keep": True}, "keep is True,"),
    ({"weights": "pooled"}, "weights is 'pooled', but must be trained, pool, or a folder"),
    ({"weights": 3}, "weights is 3, but must be text")])
def test_bad_knobs(options, message):
    with pytest.raises(ValueError, match=message) as error:
        QueCC(**options)
    assert "\n" not in str(error.value)


def test_folders_without_weights(tmp_path):
    image, prompts = tiles(7, [1]), Prompts([[1]], 1, (), noise(1, D))
    with pytest.raises(ValueError, match=r"quecc: no quecc_\*.safetensors in") as error:
        QueCC(weights=str(tmp_path)).encoded(image, prompts)
    assert "\n" not in str(error.value)
    (tmp_path / "quecc_16.safetensors").write_bytes(b"nothing")
    (tmp_path / "quecc_best.safetensors").write_bytes(b"of no known size")
    with pytest.raises(ValueError, match="quecc_16.safetensors: no weights of this method") as error:
        QueCC(weights=str(tmp_path)).encoded(image, prompts)
    assert "\n" not in str(error.value)


# ----- training, and what it left


@pytest.fixture(scope="module")
def bundled():
    """The bundled model, and questions to it."""
    model = load_model("tiny").requires_grad_(False)
    return model, Questions("tiny", model, 4, 2)


def test_right_is_what_greedy_answers_are(bundled):
    """To the letter, whole and from averages of few tokens."""
    model, questions = bundled
    assistant, marks = Assistant("tiny"), []
    lesson = Lesson(model, questions, "test", 0, 0)
    starts = (lesson.said.int().argmax(1) + 1).tolist()
    prompts = [ids[:start] for ids, start in zip(lesson.ids.tolist(), starts, strict=True)]
    for pruner in Pruner(), QueCC(0.03, "pool"):
        image = lesson.image if pruner.keeps_all else compress(lesson.image, 7)
        answer = generate(model, prompts, lesson.image, 40, assistant.tokenizer.stop_ids, pruner=pruner)
        expected = [[t for t in row if t >= 0][:-1] for row in lesson.targets.tolist()]
        right = [said == meant for said, meant in zip(answer.tokens, expected, strict=True)]
        assert lesson.right(image) == right
        marks += right
    assert set(marks) == {True, False}


def test_training_lowers_the_loss_and_goes_on_where_it_stopped(bundled, tmp_path, monkeypatch):
    model, questions = bundled
    monkeypatch.setattr(train_quecc, "SAVE_EVERY", 2)
    monkeypatch.setattr(train_quecc, "LOG_EVERY", 1)
    lesson = Lesson(model, questions, "train", 0, 0)        # the same all the time: few steps show something
    monkeypatch.setattr(train_quecc, "Lesson", lambda *arguments: lesson)

    def run(folder: str, *stops: int) -> dict[str, Tensor]:
        for stop in stops:
            torch.manual_seed(0)
            students = [Student(model, 2, 4)]
            args = Namespace(run=tmp_path / folder, out=tmp_path / folder, steps=stop, images=4, seed=0)
            train(model, questions, students, args)
        return students[0].compressor.state_dict()
    once, again = run("once", 4), run("twice", 2, 4)
    assert all(torch.equal(tensor, again[name]) for name, tensor in once.items())
    rows = [line.split(",") for line in (tmp_path / "twice" / "log.csv").read_text().splitlines()]
    assert rows[0] == ["step", "minutes", "kl_4"] and [row[0] for row in rows[1:]] == list("1234")
    assert float(rows[-1][2]) < float(rows[1][2])
    kept = load_compressor(tmp_path / "twice" / "quecc_4.safetensors", torch.device("cpu"))
    assert all(torch.equal(kept.state_dict()[name], tensor.bfloat16().float())
               for name, tensor in once.items())
    assert resume([Student(model, 2, 4)], tmp_path / "twice" / "state.pt")[0] == 4


def test_the_command(tmp_path, monkeypatch, capsys):
    """One step for a grid that the bundled weights lack; the pruner takes what it leaves."""
    options = {"out": tmp_path, "run": tmp_path / "run", "grids": 3, "steps": 1, "images": 2,
               "questions": 1, "exam": 4}
    monkeypatch.setattr(sys, "argv", ["train_quecc", *(str(part) for name, value in options.items()
                                                      for part in (f"--{name}", value))])
    train_quecc.main()
    figures = json.loads((tmp_path / "quecc.json").read_text())
    assert figures["questions"] == 4 and set(figures["accuracy"]) == {"whole", "pool_9", "trained_9"}
    assert json.loads(capsys.readouterr().out) == figures["accuracy"]
    monkeypatch.setattr(sys, "argv", ["train_quecc", "--grids", "4", "5"])
    with pytest.raises(SystemExit, match="--grids 4 5: choose among 1, 2, 3, 4, 7"):
        train_quecc.main()
    image = tiles(7, [2], states=384, width=160)
    image.vision.entering = image.vision.features[..., :128]
    new = QueCC(0.5, str(tmp_path)).encoded(image, Prompts([[1]], 1, (), noise(1, 160)))
    assert new.features.shape == (1, 20, 160)


def test_the_bundled_weights(bundled):
    """Small, in bf16, of both grids; better than averages on scenes that were not trained on."""
    model, questions = bundled
    paths = {grid: LEARNED / f"quecc_{grid ** 2}.safetensors" for grid in (4, 2)}
    assert sum(path.stat().st_size for path in paths.values()) < 1.2e6
    lessons = (Lesson(model, questions, "test", first, 1) for first in range(0, 16, 4))
    found = examine(model, lessons, {grid: (math.ceil(7 / grid), path) for grid, path in paths.items()})
    assert found["questions"] == 32
    figures = json.loads((LEARNED / "quecc.json").read_text())["accuracy"]
    assert set(found["accuracy"]) == set(figures) == {"whole", "pool_16", "trained_16", "pool_4", "trained_4"}
    assert figures["trained_16"] > figures["pool_16"] and figures["trained_4"] > figures["pool_4"]
    assert found["accuracy"]["trained_4"] > found["accuracy"]["pool_4"]
    assert found["accuracy"]["trained_16"] >= 0.8


def test_an_answer_from_17_tokens_a_tile():
    assistant, scene = Assistant("tiny"), make_scene("test", 3, (2, 2))
    pruner = QueCC()
    image = assistant.encode_images([draw_scene(scene)], pruner)
    answer = assistant.answer([messages("Is there a sign?", 1)], image, 8, pruner=pruner)
    assert answer.kept == [[4 * 17.0] * 3] and image.real == 200
    assert assistant.tokenizer.decode(answer.tokens[0]) == ("no" if scene.sign is None else "yes")
