"""SGL against its formulas (arXiv 2412.03324 and its code), in loops over captured queries and keys.

The small model's answer, what it attended to while giving it, how sure it is, what the large model then
keeps, and for which prompts it is not asked; what every method promises is in test_pruners.py. The small
model is another random network, or the same one: the paper's oracle.
"""
import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from helpers import (
    CROSS,
    SHARES,
    I,
    alone,
    best,
    close,
    kept,
    projected_tokens,
    random_tiles,
    received_by_hand,
    refused,
    small_network,
    watched,
)
from reference import forced, masked

from generate import generate, no_one
from model.answer import Answer
from model.image_tokens import Grid, ImageKV, ImageTokens, visible_images
from model.llama_vision import LlamaVision
from model.sampling import GREEDY
from pruning.methods.sgl import SGL, Cascade, confidence, load_guide, misfit

PROMPT, GRIDS = [5, 6, I, 7, 8, 9], [(1, 2)]
BATCH = [PROMPT, [12, 13, 14], [I, 5, 15, I, 16, 17], [4, 19, I, I, 20]]
TILES = [[(1, 2)], [], [(1, 1), (2, 1)], [(1, 1), (1, 1)]]
SEEDS = range(3)
GUIDES = 22, 34, 33         # seeds of small networks whose answers are not one token over and over


def show(network: LlamaVision, sequences: list[list[Grid]], seed: int = 0) -> ImageTokens:
    """Encoded random images of these grids, of each sequence, with the encoder's states."""
    tiles = [random_tiles(grids, network.config.vision, 10 * seed + b) if grids else None
             for b, grids in enumerate(sequences)]
    return network.encode(tiles, keep_states=True)


@pytest.fixture
def pair(monkeypatch):
    """A large and a small network; the second is loaded for every guide."""
    def networks(seed: int, same: bool = False) -> tuple[LlamaVision, LlamaVision]:
        large = small_network(seed, SHARES[seed], CROSS[seed])
        guide = large if same else small_network(GUIDES[seed], SHARES[seed - 1], CROSS[seed - 1])
        monkeypatch.setattr("pruning.methods.sgl.load_guide", lambda source, device, dtype: guide)
        return large, guide
    return networks


def asked(pruner: SGL, image: ImageTokens, prompts: list[list[int]] = (PROMPT,), new: int = 4,
          stop: tuple[int, ...] = ()):
    """The small model alone: its scores, answers and confidence are left in the pruner."""
    Cascade(pruner, generate).ask_guide(list(prompts), image, new, stop)


def answered(pruner: SGL, network: LlamaVision, prompts: list[list[int]], image: ImageTokens,
             new: int) -> Answer:
    """Both models, by greedy answers of so many tokens."""
    return pruner.around(generate)(network, prompts, image, new, (), GREEDY, no_one, pruner, None)


def attended(network: LlamaVision, ids: list[int], image: ImageTokens, gated: bool = False
             ) -> tuple[list[float], int]:
    """How much attention each image token of one sequence gets, in one pass over its text without a cache.

    The sum over layers, query heads and positions that see it; and how many softmaxes these are."""
    _, q, k = watched(network, lambda: network.hidden(torch.tensor([ids]), image))
    seen = visible_images(torch.tensor([ids]), I)[0].tolist()
    images = image.coords[0, :, 0].tolist()
    sees = {t: [j for j, i in enumerate(images) if i in range(*own)] for t, own in enumerate(seen)}
    sees = {t: tokens for t, tokens in sees.items() if tokens}
    score = [0.0] * len(images)
    for i, layer in enumerate(network.language_model.cross_layers):
        weight = abs(math.tanh(layer.cross_attn_attn_gate.item())) if gated else 1.0
        received, = received_by_hand(q[i][0], k[i][0], sees)
        score = [s + weight * len(q[i][0]) * r for s, r in zip(score, received, strict=True)]
    return score, len(q) * len(q[0][0]) * len(sees)


def words(network: LlamaVision, prompt: list[int], image: ImageTokens, new: int,
          stop: tuple[int, ...] = ()) -> list[int]:
    """The greedy answer of a whole network and its stop token, one pass over all the text for each token."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(network.read(torch.tensor([ids]), image)[0, -1].argmax()))
        if ids[-1] in stop:
            break
    return ids[len(prompt):]


# ----- what the small model attends to


@pytest.mark.parametrize("gated", [False, True], ids=["sum", "gate"])
@pytest.mark.parametrize("prompt, grids", [(PROMPT, [(1, 2)]), (BATCH[2], TILES[2]), (BATCH[3], TILES[3])],
                         ids=["one image", "two apart", "two together"])
@pytest.mark.parametrize("seed", SEEDS)
def test_scores_are_the_sum_over_one_pass(seed, prompt, grids, gated, pair):
    """Over layers, heads and positions, though the answer is read with a cache, token by token."""
    large, guide = pair(seed)
    pruner = SGL(layer_weight="gate" if gated else "none")
    asked(pruner, show(large, [grids]), [prompt])
    assert pruner.guide_answers == [words(guide, prompt, show(guide, [grids]), 4)]
    fed = prompt + pruner.guide_answers[0][:-1]             # the last token is fed to nobody
    score, softmaxes = attended(guide, fed, show(guide, [grids]), gated)
    close(pruner.scores, torch.tensor([score]), 1e-4)
    positions, layers = len(fed) - prompt.index(I), len(guide.language_model.cross_layers)
    assert softmaxes == layers * 4 * positions
    if not gated:
        close(pruner.scores.sum(), torch.tensor(float(softmaxes)), 1e-3)


def test_mass_on_real_sizes(monkeypatch):
    """Ten positions that see the image, 4 heads, 8 layers: 8 · 4 · 10."""
    network = small_network(1, 2, 8)
    monkeypatch.setattr("pruning.methods.sgl.load_guide", lambda *_: network)
    pruner = SGL()
    asked(pruner, show(network, [GRIDS]), [[5, I, 6, 7, 8, 9, 10]], new=5)
    close(pruner.scores.sum(), torch.tensor(320.0), 1e-3)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_answer_ends_with_its_stop_token(seed, pair):
    """It counts among the tokens of the answer, but is fed to nobody, and is not part of the text."""
    large, guide = pair(seed)
    image, own = show(large, [GRIDS]), show(guide, [GRIDS])
    free = words(guide, PROMPT, own, 6)
    end = max(i for i in range(5) if free[i] not in free[:i])
    stop = free[end]
    pruner = SGL(threshold=1.0, consistency=1.0)
    asked(pruner, image, new=6, stop=(stop, 59))
    assert pruner.guide_answers == [free[:end]] and end
    close(pruner.scores, torch.tensor([attended(guide, PROMPT + free[:end], own)[0]]), 1e-4)
    p = chances(guide, PROMPT, free[:end + 1], own)
    expected = (math.prod(p) ** (1 / (end + 1)) + math.prod(p)) / 2
    assert pruner.confidence == [pytest.approx(expected, abs=1e-5)]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_batch_gives_each_prompt_what_it_gets_alone(seed, pair):
    """Text alone, one image, several; answers that end at different steps."""
    large, guide = pair(seed)
    image, pruner = show(large, TILES), SGL(threshold=1.0, consistency=0.3)
    asked(pruner, image, BATCH, new=5)
    stop = (pruner.guide_answers[0][1], pruner.guide_answers[3][3])
    asked(pruner, image, BATCH, 5, stop)
    answers, sure, scores = pruner.guide_answers, pruner.confidence, pruner.scores
    assert answers[1] == [] and sure[1] is None and not scores[1].any()
    assert len({len(answer) for answer in answers}) >= 3
    for b in 0, 2, 3:
        single = SGL(threshold=1.0, consistency=0.3)
        asked(single, alone(image, b), BATCH[b:b + 1], 5, stop)
        assert single.guide_answers == [answers[b]]
        assert single.confidence == [pytest.approx(sure[b], abs=1e-5)]
        close(scores[b][image.mask[b]], single.scores[0])


def test_one_image_is_encoded_once(pair):
    """For any number of questions about it; the scores are those of each question alone."""
    large, guide = pair(1)
    image, prompts, encode = show(large, [GRIDS]), [PROMPT, [I, 30], [3, I, 4, 1]], guide.encode
    pruner, encoded = SGL(), []
    with patch.object(guide, "encode", lambda tiles: encoded.append(len(tiles)) or encode(tiles)):
        asked(pruner, image.expand(3), prompts)
    assert encoded == [1]
    for b, prompt in enumerate(prompts):
        single = SGL()
        asked(single, image, [prompt])
        close(pruner.scores[b], single.scores[0])


# ----- what the large model keeps


@pytest.mark.parametrize("settings, read, held", [
    ({}, [10, 4, 4, 4], [10, 4, 4, 4]), ({"early_caches": "trim"}, [10, 4, 4, 4], [4] * 4),
    ({"full_layers": 2}, [10, 10, 4, 4], [10, 10, 4, 4]), ({"full_layers": 4}, [10] * 4, [10] * 4),
    ({"full_layers": 0}, [4] * 4, [4] * 4), ({"when": "boundary"}, [10] * 4, [10, 4, 4, 4]),
    ({"full_layers": 0, "when": "boundary"}, [10] * 4, [4] * 4)], ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_kept(seed, settings, read, held, pair):
    """The best by the small model's scores, in the later layers; what the first ones hold."""
    large, (_, guide) = small_network(seed, SHARES[seed], 4), pair(seed)
    image = show(large, [GRIDS])
    answer = words(guide, PROMPT, show(guide, [GRIDS]), 4)
    chosen = best(attended(guide, PROMPT + answer[:-1], show(guide, [GRIDS]))[0], 4)
    run = forced(large, [PROMPT], image, SGL(0.4, **settings), steps=4)
    sets = {4: chosen, 10: list(range(10))}
    assert [kept(kv, image) for kv in run.read] == [sets[n] for n in read]
    assert all([kept(kv, image) for kv in kvs] == [sets[n] for n in held] for kvs in run.held)
    close(run.logits, masked(large, run, [PROMPT], image))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_model_as_its_own_guide(seed, pair):
    """Two passes of the same network by hand: answer, rank by what was attended to, mask the rest."""
    network, _ = pair(seed, same=True)
    image = show(network, [GRIDS])
    score = attended(network, PROMPT + words(network, PROMPT, image, 3)[:-1], image)[0]
    run = forced(network, [PROMPT], image, SGL(3, full_layers=0), steps=3)
    nothing = torch.zeros(1, 4 // SHARES[seed], 3, 8)
    by_hand = ImageKV(nothing, nothing, image.coords[:, best(score, 3)][:, None])
    layers = len(network.language_model.cross_layers)
    ours = replace(run, read=[by_hand] * layers, held=[[by_hand] * layers] * 3)
    close(run.logits, masked(network, ours, [PROMPT], image))


@pytest.mark.parametrize("layers, sizes", [(0, [4, 4, 4]), (1, [10, 4, 4]), (2, [10, 10, 4])])
def test_keys_and_values_of_dropped_tokens_are_never_made(layers, sizes, pair):
    """Without a full layer not even in the first one."""
    large = small_network(1, 2, 3)
    image = show(large, [GRIDS])
    pair(1)
    pruner = SGL(0.4, full_layers=layers)
    _, projected = projected_tokens(large, lambda: forced(large, [PROMPT], image, pruner))
    assert projected == [size for size in sizes for _ in ("keys", "values")]


def test_the_average_keep_ratio(pair):
    """(m + (C - m) keep) / C: three full layers of eight, keep 0.4 -> 62.5 %."""
    pair(1)
    large = small_network(1, 2, 8)
    run = forced(large, [PROMPT], show(large, [GRIDS]), SGL(0.4, full_layers=3))
    assert run.answer.kept == [[10.0] * 3 + [4.0] * 5]
    assert sum(run.answer.kept[0]) / (8 * 10) == 0.625


# ----- how sure the small model is


def chances(network: LlamaVision, prompt: list[int], answer: list[int], image: ImageTokens) -> list[float]:
    """The chance of each token of an answer after those before it, each in a pass of its own."""
    p = []
    for i, token in enumerate(answer):
        logits = network.read(torch.tensor([prompt + answer[:i]]), image)[0, -1].tolist()
        p.append(math.exp(logits[token]) / sum(math.exp(logit) for logit in logits))
    return p


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
    """They get the small model's answer, the others what they get alone; text alone never leaves."""
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


def test_nobody_is_left(pair):
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
    assert misfit(guide.config, image.states.tiles, image, prompts, 4) == ""
    for words, config in (
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
        assert misfit(config, image.states.tiles, image, prompts, 4) == words
        with (patch.object(guide, "config", config),
              refused(f"^sgl: guide 'other' does not fit the model: {words}$")):
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
