"""The maps: every patch where the model saw it, every count right, and a Recorder that changes nothing."""
from pathlib import Path

import pytest
import torch
from helpers import refused
from map_helpers import PROCESSOR, SIZES, P, S, kv, noisy_image, patches, pixels, recorded, tokens
from PIL import Image, ImageFont
from torch import Tensor

from generate import Assistant
from model.image_tokens import ImageKV, ImageTokens, Queries
from pruning import Pruner, load, view, visualize
from pruning.recorder import Recorder
from pruning.sheet import GAP, wrap
from pruning.visualize import attention_map, kept_map
from weights.image_file import open_image
from weights.tokenizer import messages


def clear(panel: Image.Image, image: Image.Image, grid: tuple[int, int]) -> Tensor:
    """Which patches of a panel are just as the image processor drew them, [rows · P, columns · P]."""
    canvas = PROCESSOR._draw(image, grid).float()
    factor = panel.width // canvas.shape[1]
    canvas = canvas.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    return (patches(pixels(panel), grid) == patches(canvas, grid)).flatten(2).all(-1)


def chosen(grid: tuple[int, int], *kept: tuple[int, int, int]) -> Tensor:
    """The same map, said by tile, row and column."""
    wanted = torch.zeros(grid[0] * P, grid[1] * P, dtype=torch.bool)
    for tile, row, column in kept:
        wanted[tile // grid[1] * P + row, tile % grid[1] * P + column] = True
    return wanted


# ----- what was kept


@pytest.mark.parametrize("grid", SIZES)
def test_the_patch_that_is_kept_is_clear_and_no_other(drawn, grid):
    image = noisy_image(*SIZES[grid])
    assert PROCESSOR([image]).grid.tolist() == [list(grid)]
    for kept in {(0, 0, 1), (grid[0] * grid[1] - 1, 2, 3), (grid[0] * grid[1] // 2, 3, 0)}:
        drawn.clear()
        sheet = kept_map([image], PROCESSOR, recorded([grid], kv([(0, *kept)])), "title")
        panel, label = drawn[0]
        assert torch.equal(clear(panel, image, grid), chosen(grid, kept))
        assert max(panel.size) >= 560 and label.startswith("layer 0: 1 kept\nclass tokens kept 0 of ")
        assert sheet.width >= panel.width and sheet.height > panel.height


def test_dropped_patches_are_far_darker_and_their_padding_is_no_longer_black(drawn):
    kept_map([noisy_image(32, 20)], PROCESSOR, recorded([(1, 1)], kv([(0, 0, 0, 0), (0, 0, 0, 3)])), "")
    panel = patches(pixels(drawn[0][0]), (1, 1)).flatten(2).mean(-1)
    assert panel[0, 0] > 130 > 90 > panel[1:, :2].max()         # an image of 90 to 200
    assert panel[0, 3] == 0 and (panel[1:, 3] > 30).all()       # the canvas is black there


def test_panels_are_complete_on_the_sheet(drawn):
    layers = [kv([(0, 0, 0, column)]) for column in range(3)]
    sheet = kept_map([noisy_image(96, 20)], PROCESSOR, recorded([(3, 1)], *layers), "")
    x = GAP
    for panel, label in drawn[:3]:
        y = GAP + visualize.cell(panel, label).height - panel.height
        assert sheet.crop((x, y, x + panel.width, y + panel.height)).tobytes() == panel.tobytes()
        x += panel.width + GAP


def test_layers_that_differ_have_a_panel_each_and_equal_ones_share_one(drawn):
    image, kept = noisy_image(20, 64), [(0, 2, 1), (1, 0, 0), (1, 3, 3)]
    layers = [kv([(0, *where)]) for where in kept]
    kept_map([image], PROCESSOR, recorded([(1, 2)], *layers), "")
    assert [label.split(":")[0] for _, label in drawn[:-1]] == ["layer 0", "layer 1", "layer 2"]
    for (panel, _), where in zip(drawn[:-1], kept, strict=True):
        assert torch.equal(clear(panel, image, (1, 2)), chosen((1, 2), where))
    assert "34 real image tokens -> 1 kept (2.9%, mean over layers)" in drawn[-1]
    drawn.clear()
    kept_map([image], PROCESSOR, recorded([(1, 2)], layers[1], layers[1]), "")
    assert [label.split("\n")[0] for _, label in drawn[:-1]] == ["all 2 layers: 1 kept"]


def test_a_patch_is_as_clear_as_the_share_of_heads_that_hold_it(drawn):
    image, both, one = noisy_image(32, 32), (0, 0, 1, 1), (0, 0, 2, 2)
    mask = torch.tensor([[[True, True], [True, False]]])
    kept_map([image], PROCESSOR, recorded([(1, 1)], kv([both, one], [both, both], mask=mask)), "")
    panel, label = drawn[0]
    light = patches(pixels(panel), (1, 1))
    canvas = PROCESSOR._draw(image, (1, 1)).float().repeat_interleave(18, 0).repeat_interleave(18, 1)
    full = patches(canvas, (1, 1))
    dark = torch.tensor(view.DARK)[:, None, None]
    for where, dim in ((1, 1), 0), ((2, 2), view.DIM / 2), ((3, 3), view.DIM):
        assert torch.allclose(light[where], full[where] * (1 - dim) + dark * dim, atol=0.6)
    assert "layer 0: 1.5 kept" in label and any("between: dropped by some" in line for line in drawn[-1])


def test_class_tokens_are_counted_and_masked_ones_are_not(drawn):
    held = [(0, 0, -1, -1), (0, 1, -1, -1), (0, 3, -1, -1), (0, 3, 0, 0), (0, 2, -1, -1), (0, 2, 2, 2)]
    mask = torch.tensor([[[True, True, True, True, False, False]]])
    image = noisy_image(64, 50)
    kept_map([image], PROCESSOR, recorded([(2, 2)], kv(held, mask=mask)), "a title")
    assert drawn[0][1] == "layer 0: 4 kept\nclass tokens kept 3 of 4"
    assert torch.equal(clear(drawn[0][0], image, (2, 2)), chosen((2, 2), (3, 0, 0)))
    assert drawn[-1][:2] == ["a title", "68 real image tokens -> 4 kept (5.9%)"]


def test_only_images_in_sight_are_drawn(drawn):
    images, grids = [noisy_image(32, 20), noisy_image(20, 64), noisy_image(96, 20)], [(1, 1), (1, 2), (3, 1)]
    kept = [(1, 1, 2, 1), (2, 0, 3, 3), (2, 2, 0, 2)]
    kept_map(images, PROCESSOR, recorded(grids, kv(kept)), "")
    assert [label.split("\n")[0] for _, label in drawn[:-1]] == ["image 2, layer 0: 1 kept",
                                                                 "image 3, layer 0: 2 kept"]
    assert torch.equal(clear(drawn[0][0], images[1], (1, 2)), chosen((1, 2), (1, 2, 1)))
    assert torch.equal(clear(drawn[1][0], images[2], (3, 1)), chosen((3, 1), (0, 3, 3), (2, 0, 2)))
    assert "85 real image tokens -> 3 kept (3.5%)" in drawn[-1]
    assert "out of sight, not drawn: image 1" in drawn[-1]


def test_an_image_made_smaller_is_drawn_as_it_was_read(drawn):
    image, recorder = noisy_image(128, 20), Recorder(load("downsample", keep=0.5))
    assert recorder.preprocess([image], PROCESSOR).grid.tolist() == [[2, 1]]
    coords = tokens((2, 1))
    recorder.encoded(ImageTokens(torch.ones(1, len(coords), 8), coords[None]), [[0]])
    recorder.prefilled([kv(coords.tolist())])
    kept_map([image], PROCESSOR, recorder, "")
    assert clear(drawn[0][0], image, (2, 1)).all()
    assert "68 real image tokens -> 34 kept (50.0%)" in drawn[-1]
    assert "made smaller: 2 x 1 tiles, not 4 x 1" in drawn[-1]


# ----- what the prompt attends to


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (2, 2), (3, 1)])
def test_the_attention_map_is_brighter_where_there_is_more_attention(drawn, grid):
    recorder, coords = recorded([grid]), tokens(grid)
    weights = torch.rand(len(coords), generator=torch.Generator().manual_seed(1))
    gone = torch.arange(len(coords)) % 5 == 2
    recorder.received = [(weights, coords), (weights[~gone], coords[~gone])]
    attention_map([Image.new("RGB", (grid[1] * S, grid[0] * S), "grey")], PROCESSOR, recorder, "")
    first, second = (patches(pixels(panel), grid).flatten(2).mean(-1) for panel, _ in drawn[:-1])
    wanted = torch.zeros_like(first)
    for weight, (_, tile, row, column) in zip(weights, coords.tolist(), strict=True):
        if row >= 0:
            wanted[tile // grid[1] * P + row, tile % grid[1] * P + column] = weight
    assert first.argmax() == wanted.argmax()
    assert torch.corrcoef(torch.stack((first.flatten(), wanted.sqrt().flatten())))[0, 1] > 0.95
    order = first.flatten()[wanted.flatten().argsort()]
    assert (order.diff() > -1).all()                            # a rounding apart
    dropped = (second - first).abs() > 1
    assert 0 < dropped.sum() <= gone.sum() and len(set(second[dropped].tolist())) == 1
    share = weights[coords[:, 2] < 0].sum() / weights.sum()
    assert drawn[0][1] == f"layer 0\n{share:.1%} on class tokens"
    assert any("no colour: dropped" in line for line in drawn[-1])


def test_the_attention_is_that_of_the_first_sequence_on_its_own_tokens():
    coords, heads = tokens((1, 1))[:5], 4
    q, key = torch.randn(2, heads, 3, 8), torch.randn(2, 2, 5, 8)
    mask = torch.tensor([[[True, True, True, True, False]]]).expand(2, 1, 5)
    seen = torch.tensor([[[0, 0], [0, 1], [0, 1]]]).expand(2, 3, 2)
    recorder = Recorder(Pruner(), attention=True)
    layer = ImageKV(key, key, coords.expand(2, 1, 5, 4), mask)
    assert recorder.layer(0, Queries(q, seen), None, layer) == (None, layer)
    scores = q[0] @ key[0].repeat_interleave(2, 0).transpose(1, 2) / 8 ** 0.5
    wanted = scores[..., :4].softmax(-1)[:, 1:].sum(1).mean(0)  # position 0 sees no image
    received, where = recorder.received[0]
    assert torch.allclose(received, wanted, atol=1e-6) and torch.equal(where, coords[:4])


# ----- Recorder


def test_a_recorder_holds_no_memory_that_decoding_frees():
    """Features, keys and values have width 0; coords and masks are those of sequence 0."""
    image = ImageTokens(torch.ones(1, 17, 8), tokens((1, 1))[None])
    recorder = recorded([(1, 1)], kv([(0, 0, 0, 0)]))
    assert recorder.encoded(image, [[0]]) is image and recorder.image_kv == []          # a new answer
    recorder.prefilled([kv([(0, 0, 0, 0)])])
    assert recorder.image_kv[0].key.numel() == recorder.image.features.numel() == 0
    assert torch.equal(recorder.image.coords, image.coords)
    assert recorder.image_kv[0].coords.tolist() == [[[[0, 0, 0, 0]]]]


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return Assistant("tiny", device="cpu")


PRUNERS = {"trimmed_llama": {"keep": 0.1}, "fastv": {"keep": 0.3, "when": "step"},
           "random": {"early_caches": "full"}, "downsample": {}, "none": {}, "spatial": {"keep": 1.0},
           "elastic_cache": {}, "attention_predictor": {"block": 4}, "mint": {}, "sgl": {}, "quecc": {}}


@pytest.mark.parametrize("method", PRUNERS)
def test_a_recorder_changes_no_answer_and_knows_what_was_kept(assistant, method):
    examples = Path(__file__).parents[2] / "examples"
    images = [open_image(examples / "tall.png")]
    prompts = [messages("Describe the picture.", 1), messages("Where is the star?", 1)]
    answers = []
    for wrap_it in False, True:
        pruner = load(method, **PRUNERS[method])
        pruner = Recorder(pruner, attention=True) if wrap_it else pruner
        answers.append(assistant.answer(prompts, assistant.encode_images(images, pruner), 6, pruner=pruner))
    assert answers[0].tokens == answers[1].tokens and answers[0].kept == answers[1].kept
    assert not pruner.keeps_all and str(pruner) == str(load(method, **PRUNERS[method]))
    assert [float(layer.counts()[0]) for layer in pruner.image_kv] == answers[0].kept[0]
    assert len(pruner.received) == 3
    assert all(len(received) == len(coords) for received, coords in pruner.received)
    for draw in kept_map, attention_map:
        assert min(draw(images, assistant.processor, pruner, str(pruner)).size) >= 560


# ----- words


def test_lines_are_wrapped_and_nothing_is_cut_off():
    font = ImageFont.load_default(15)
    text = "some/folder/a_method_with_a_long_name.py:Mine, keep 0.1\n\nand more"
    for width in 40, 150, 1000:
        lines = wrap(text, font, width)
        assert all(font.getlength(line) <= width for line in lines)
        assert "".join(lines).replace(" ", "") == "".join(text.split())
    assert lines == text.split("\n")


def test_what_cannot_be_drawn_is_refused_in_one_line():
    image, recorder = noisy_image(32, 20), recorded([(1, 1)], kv([(0, 0, 0, 0)]))
    for draw, given, which, reason in ((kept_map, [image], Recorder(Pruner()), "ask about an image"),
                                       (kept_map, [image] * 2, recorder, "about 1 images, but 2"),
                                       (attention_map, [image], recorder, "attention=True")):
        with refused(reason):
            draw(given, PROCESSOR, which, "")
