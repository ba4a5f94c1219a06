"""SGL against its formulas (arXiv 2412.03324 and its code), in loops over captured queries and keys.

The small model's answer, what it attended to while giving it, and what the large model then keeps. How sure
the small model is and which prompts it answers is in test_sgl_cascade.py; what every method promises is in
test_pruners.py. The small model is another random network, or the same one: the paper's oracle.
"""
import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from helpers import SHARES, I, alone, close, kept, small_network
from loops import best, projected_tokens
from reference import forced, masked
from sgl_by_hand import BATCH, GRIDS, PROMPT, SEEDS, TILES, asked, attended, chances, show, words

from model.image_tokens import ImageKV
from pruning.methods.sgl import SGL

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
    fed = prompt + pruner.guide_answers[0][:-1]             # the last token is read by no model
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
    """It counts among the tokens of the answer, but no model reads it, and it is not part of the text."""
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
