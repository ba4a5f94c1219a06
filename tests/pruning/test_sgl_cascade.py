"""SGL: how sure the small model is, which prompts it answers, and which models may be a guide."""
import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from helpers import I, close, random_tiles, refused, small_network
from loops import best
from reference import forced
from sgl_by_hand import BATCH, GRIDS, PROMPT, SEEDS, TILES, answered, asked, attended, chances, show, words

from generate import generate
from model.image_tokens import ImageTokens
from pruning.methods.sgl import SGL, confidence, load_guide, misfit

# ----- how sure the small model is


def test_the_formula():
    """p (.9, .8, .5) -> .36^(1/3) = .7114; consistency (.8, .7, .5) -> .28; their mean is .4957."""
    found, again = torch.tensor([0.9, 0.8, 0.5]).log(), torch.tensor([0.8, 0.7, 0.5]).log()
    assert confidence(found, again) == pytest.approx((0.36 ** (1 / 3) + 0.28) / 2)
    assert round(confidence(found, again), 4) == 0.4957
    nothing, impossible = torch.zeros(3), torch.full((2,), -math.inf)
    assert confidence(nothing, nothing) == 1 and confidence(impossible, impossible) == 0
    assert confidence(found, impossible) == pytest.approx(0.7114 / 2, abs=1e-4)


@pytest.mark.parametrize("keep, tokens", [(0.05, 1), (0.3, 3), (5, 5)])
@pytest.mark.parametrize("seed", SEEDS)
def test_confidence_of_an_answer(seed, keep, tokens, pair):
    """The second reading sees what the small model itself attended to most, in all its layers."""
    large, guide = pair(seed)
    own, pruner = show(guide, [GRIDS]), SGL(threshold=1.0, consistency=keep)
    asked(pruner, show(large, [GRIDS]), new=2)
    answer = pruner.guide_answers[0]
    few = best(attended(guide, PROMPT + answer[:-1], own)[0], tokens)
    fewer = ImageTokens(own.features[:, few], own.coords[:, few])
    first, second = (math.prod(chances(guide, PROMPT, answer, image)) for image in (own, fewer))
    expected = (first ** (1 / len(answer)) + second) / 2
    assert pruner.confidence == [pytest.approx(expected, abs=1e-6)] and 0 < expected < 1
    assert abs(first - second) > 1e-4


@pytest.mark.parametrize("seed", SEEDS)
def test_a_second_reading_of_everything_agrees_with_the_first(seed, pair):
    """S_cons = S_conf ^ n."""
    large, _ = pair(seed)
    pruner = SGL(threshold=1.0, consistency=1.0)
    with patch("pruning.methods.sgl.confidence", lambda found, again: (found, again)):
        asked(pruner, show(large, TILES), BATCH, new=6)
    for found, again in (pruner.confidence[b] for b in (0, 2, 3)):
        assert len(found) == 6
        close(found, again, 1e-4)


# ----- leaving early


@pytest.mark.parametrize("seed", SEEDS)
def test_prompts_that_leave_early(seed, pair):
    """They get the small model's answer, the others what they get alone; text alone is never one of them."""
    large, guide = pair(seed)
    options = {"consistency": 0.3, "full_layers": seed % 2}
    image, measured = show(large, TILES), SGL(0.4, threshold=1.0, **options)
    unhurried = answered(measured, large, BATCH, image, 5)
    sure = [s for s in measured.confidence if s is not None]
    assert len(sure) == 3 and unhurried.early == [] and len(set(sure)) == 3
    before = 4
    for threshold in (-1.0, *sorted(sure), 1):
        pruner = SGL(0.4, threshold=threshold, **options)
        answer = answered(pruner, large, BATCH, image, 5)
        early = [b for b, s in enumerate(measured.confidence) if s is not None and s > threshold]
        assert answer.early == early and len(early) < before + (threshold > max(sure))
        assert len(pruner.scores) == 4 - len(early) and pruner.guide_answers == measured.guide_answers
        for b in range(4):
            expected = measured.guide_answers if b in early else unhurried.tokens
            assert answer.tokens[b] == expected[b]
        before = len(early)
    assert before == 0


def test_all_prompts_leave_early(pair):
    large, guide = pair(2)
    image = show(large, [GRIDS])
    pruner = SGL(threshold=-1.0)
    with patch.object(large, "prefill", side_effect=AssertionError("the large model is not needed")):
        answer = answered(pruner, large, [PROMPT], image, 4)
    assert answer.early == [0]
    assert answer.tokens == [words(guide, PROMPT, show(guide, [GRIDS]), 4)] == pruner.guide_answers


@pytest.mark.parametrize("layers", [0, 1])
def test_a_threshold_counts_also_where_all_is_kept(layers, pair):
    """The small model is asked, and the large one that is not convinced reads everything, bit for bit."""
    large, _ = pair(1)
    image, never = show(large, TILES), SGL(1.0, threshold=1, full_layers=layers)
    assert SGL(1.0).keeps_all and not never.keeps_all
    run, plain = forced(large, BATCH, image, never), forced(large, BATCH, image)
    assert torch.equal(run.logits, plain.logits) and len(never.guide_answers) == 4
    answer = answered(SGL(1.0, threshold=-1.0), large, BATCH, image, 4)
    assert [answer.tokens[b] for b in (0, 2, 3)] != [run.answer.tokens[b] for b in (0, 2, 3)]


def test_no_threshold_spares_the_second_reading(pair):
    large, guide = pair(1)
    pruner = SGL()
    with patch.object(guide, "hidden", side_effect=AssertionError("not to be read again")):
        answer = answered(pruner, large, [PROMPT], show(large, [GRIDS]), 4)
    assert pruner.confidence == [None] and answer.early == []


def test_a_new_answer_begins_anew(pair):
    large, _ = pair(1)
    pruner, other = SGL(threshold=0.0), [[I, 3], [5, I, 6, 7]]
    asked(pruner, show(large, TILES), BATCH)
    asked(pruner, show(large, [GRIDS, GRIDS]), other)
    fresh = SGL(threshold=0.0)
    asked(fresh, show(large, [GRIDS, GRIDS]), other)
    assert pruner.guide_answers == fresh.guide_answers and pruner.confidence == fresh.confidence
    assert torch.equal(pruner.scores, fresh.scores) and all(s > 0 for s in pruner.confidence)


# ----- guides


def test_the_bundled_model_guides_itself():
    """Loaded once for each dtype; the answer of its first pass, and a fifth of the image for the second."""
    cpu = torch.device("cpu")
    tiny = load_guide("tiny", cpu, torch.float32)
    assert load_guide("tiny", cpu, torch.float32) is tiny and tiny.lm_head.weight.dtype == torch.float32
    assert load_guide("tiny", cpu, torch.bfloat16).lm_head.weight.dtype == torch.bfloat16
    prompt = [632, 640, 5, 6]
    with torch.inference_mode():
        image = tiny.encode([random_tiles([(1, 1)], tiny.config.vision)], keep_states=True)
    plain = generate(tiny, [prompt], image, 3, ())
    early = answered(SGL(guide="tiny", threshold=-1.0), tiny, [prompt], image, 3)
    pruned = answered(SGL(10, guide="tiny"), tiny, [prompt], image, 3)
    assert plain.tokens == early.tokens and pruned.kept == [[50.0, 10.0, 10.0]]


def test_a_guide_that_does_not_fit(pair):
    large, guide = pair(1)
    image, prompts = show(large, [[(1, 2)], []]), [PROMPT, [1, 2]]
    vision, text = guide.config.vision, guide.config.text
    assert misfit(guide.config, image.states.tiles, image, prompts, [4, 4]) == ""
    for misfits, config in (
            ("it finds 42 pixels along a tile, the model 28",
             replace(guide.config, vision=replace(vision, image_size=42))),
            ("it finds 2 tiles an image at most, the model 4",
             replace(guide.config, vision=replace(vision, max_num_tiles=2))),
            ("it finds 17 image tokens a tile, the model 5",
             replace(guide.config, vision=replace(vision, patch_size=7))),
            ("it finds 0 images in the prompts, the model 1", replace(guide.config, image_token_index=59)),
            ("it knows no 1 x 2 tiles",
             replace(guide.config, vision=replace(vision, supported_aspect_ratios=((1, 1), (2, 2))))),
            ("it knows 28 tokens, but token 60 is in a prompt",
             replace(guide.config, text=replace(text, vocab_size=20))),
            ("its context holds 9 tokens, but 10 are asked for",
             replace(guide.config, text=replace(text, max_position_embeddings=9)))):
        assert misfit(config, image.states.tiles, image, prompts, [4, 4]) == misfits
        with (patch.object(guide, "config", config),
              refused(f"^sgl: guide 'other' does not fit the model: {misfits}$")):
            asked(SGL(guide="other"), image, prompts)


@pytest.mark.parametrize("option, value", [
    ("consistency", 0), ("consistency", 1.5), ("consistency", "all"), ("consistency", None), ("keep", 0.0),
    ("threshold", "high"), ("threshold", True), ("threshold", math.nan), ("guide", 3), ("guide", None),
    ("layer_weight", "norm"), ("full_layers", 0.4)])
def test_a_bad_option_gets_one_line(option, value):
    with refused(f"sgl: {option} is .*, but must be "):
        SGL(**{option: value})


def test_a_guide_that_is_not_there():
    with refused("nowhere"):
        asked(SGL(guide="nowhere"), show(small_network(1), [GRIDS]))


def test_more_full_layers_than_the_model_has(pair):
    large, _ = pair(0)
    with refused("sgl: full_layers is 3, but must be 0 to 2"):
        forced(large, [PROMPT], show(large, [GRIDS]), SGL(full_layers=3))


def test_what_it_says_of_itself():
    assert str(SGL(guide="tiny")).startswith("sgl, keep 0.4, guide tiny")
