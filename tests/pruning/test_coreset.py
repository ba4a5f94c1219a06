"""Coreset: its clusters and means beside textbook ones, the repeated means through the real decoder, one tree
for all questions, its options. That its error is bounded: test_coreset_bound.py. Clusters: test_clusters.py.
"""
import copy
import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from clusters_by_hand import k_centre_by_hand, partition, ward_by_hand
from helpers import (
    I,
    alone,
    attention_of,
    batch_of,
    close,
    encode,
    greedy,
    kept,
    kept_sets,
    noise,
    random_image,
    refused,
    small_network,
)
from reference import Run, forced, repeats
from torch import Tensor

from generate import generate
from model.image_tokens import ImageTokens
from pruning import clusters
from pruning.clusters import LLOYD, spaced
from pruning.methods.coreset import LEAST, Coreset

PROMPTS = [[5, 6, I, 7, 8, 9, 10, 11], [12, 13, 14], [I, 5, 15, I, 16, 17], [9, 8, I, I, 18]]
IN_EACH_HEAD = {"when": "boundary", "space": "keys_values"}
QUESTIONS = [[5, 6, I, 7, 8, 9], [I, 11, 12], [13, I, 14, 15, 16, 17, 18]]      # about the same image


def several() -> ImageTokens:
    """The images of PROMPTS: one, none, two, two side by side."""
    return batch_of(random_image(23, seed=1), None, random_image(7, 16, seed=2), random_image(12, 9, seed=3))


def run(pruner: Coreset, image: ImageTokens, prompt: list[int] = QUESTIONS[0], seed: int = 1) -> Run:
    return forced(small_network(seed, 2, 3), [prompt], image, pruner)


def chosen(pruner: Coreset, image: ImageTokens, seed: int = 1) -> Tensor:
    """The token that stands for each one of a single image, [N]."""
    run(pruner, image, seed=seed)
    return pruner.kept[0]


def ward_of(x: Tensor, n: int, weight: Tensor | None = None) -> set[frozenset[int]]:
    """The textbook's n clusters of x [N, d]."""
    weights = [1.0] * len(x) if weight is None else weight.double().tolist()
    return ward_by_hand(x.double().tolist(), weights)[len(x) - n - 1][1]


# ----- means that count


@pytest.mark.parametrize("keep", [0.1, 0.3, 4])
def test_a_mean_is_read_as_the_list_in_which_it_is_repeated(keep):
    """In prefill and in every step of the real decoder, in float64: several images, text alone, padding."""
    network, pruner = copy.deepcopy(small_network(2, 2, 3)).double(), Coreset(keep, question=0.0)
    image = several()
    image.features = image.features.double()
    small = pruner.encoded(image, PROMPTS)
    counts = torch.where(small.mask, small.bias.double().exp(), 0)
    assert (counts - counts.round()).abs().max() < 1e-4 and counts.max() > 1.5
    assert counts.sum(1).round().tolist() == image.mask.sum(1).tolist()
    longest = int(image.mask.sum(1).max())
    order = [torch.arange(len(own)).repeat_interleave(own.round().long()) for own in counts]
    order = torch.stack([torch.nn.functional.pad(own, (0, longest - len(own))) for own in order])
    b = torch.arange(len(PROMPTS))[:, None]
    mask = torch.arange(longest) < counts.sum(1).round()[:, None]
    repeated = ImageTokens(small.features[b, order], small.coords[b, order], mask)
    ours = forced(network, PROMPTS, image, pruner, steps=5)
    close(ours.logits, forced(network, PROMPTS, repeated, steps=5).logits, 1e-6)
    full = forced(network, PROMPTS, image, steps=5).logits
    assert (ours.logits - full)[[0, 2, 3]].abs().amax((1, 2)).min() > 1e-3
    assert torch.equal(ours.logits[1], full[1])


def test_every_bias_is_ln_of_a_number_of_tokens():
    """Weights move means, never the bias; in each head all tokens are counted."""
    for options in {}, {"full_layers": 1}, {"when": "boundary"}, IN_EACH_HEAD:
        image = random_image(23)
        for kv in run(Coreset(0.3, **options), image).held[0]:
            assert (repeats(kv, 0).sum(-1) == 23).all() and kv.bias.dtype == torch.float32
        assert all(kv.bias is None for kv in run(Coreset(0.3, bias=False, **options), image).held[0])


@pytest.mark.parametrize("options", [{"keep": 1.0}, {"keep": 500}, {"keep": 500, "question": 0.0},
                                     {"keep": 500, **IN_EACH_HEAD},
                                     {"keep": 500, "clusters": "spaced", "full_layers": 1}])
def test_a_cluster_for_each_token_is_the_full_network_bit_for_bit(options):
    network, image = small_network(1, 2, 3), several()
    full, ours = forced(network, PROMPTS, image), forced(network, PROMPTS, image, Coreset(**options))
    assert torch.equal(full.logits, ours.logits) and full.answer.kept == ours.answer.kept
    assert greedy(network, PROMPTS, image, 4)[0] == generate(network, PROMPTS, image, 4, (),
                                                             pruner=Coreset(**options)).tokens


# ----- which tokens are merged


@pytest.mark.parametrize("keep, n", [(0.1, 2), (0.5, 8), (3, 3), (1, 1)])
def test_before_the_decoder_clusters_are_the_textbooks(keep, n):
    """Of the features; each is called after the token that is nearest to the mean. No layer sees the rest."""
    image, pruner = random_image(15, seed=5), Coreset(keep, question=0.0)
    ran = run(pruner, image)
    owner = pruner.kept[0]
    assert partition(owner) == ward_of(image.features[0], n)
    means = torch.stack([image.features[0, owner == i].double().mean(0) for i in owner])
    for i in owner.unique().tolist():
        off = (image.features[0].double() - means).norm(dim=1).masked_fill(owner != i, math.inf)
        assert int(off.argmin()) == i
    assert ran.answer.kept == [[n] * 3] and all(kept(kv, image) == sorted(set(owner.tolist()))
                                                for kv in ran.read + ran.held[-1])


@pytest.mark.parametrize("question", [0.3, 0.7, 1.0])
def test_attention_weighs_in_costs_and_means(question):
    """w = 1 - question + question · m, m the attention from the prompt over its mean in the image."""
    weights = noise(4, 5, 12, seed=3).mul(2)
    weights[:, :, 4] = -math.inf
    weights = weights.softmax(-1)
    queries, image, kv = attention_of(weights, 2)
    image = replace(image, features=noise(1, 12, 6, seed=4))
    pruner = Coreset(4, question=question)
    pruner.encoded(image, [[0]])
    later, small = pruner.layer(0, queries, image, kv)
    received = [sum(float(weights[h, t, j]) for h in range(4) for t in range(5)) / 4 for j in range(12)]
    w = [max(1 - question + question * r / (sum(received) / 12), LEAST) for r in received]
    assert pruner.weight[0].tolist() == pytest.approx(w, rel=1e-4)
    owner = pruner.kept[0].tolist()
    assert partition(pruner.kept[0]) == ward_of(image.features[0], 4, torch.tensor(w))
    assert partition(pruner.kept[0]) != ward_of(image.features[0], 4) or question < 1
    for n, stays in enumerate(sorted(set(owner))):
        members = [j for j in range(12) if owner[j] == stays]
        total = sum(w[j] for j in members)
        for before, after in (image.features[0], later.features[0]), (kv.value[0, 1], small.value[0, 1]):
            close(after[n], sum(w[j] * before[j] for j in members) / total)
        for merged in later.bias[0], small.bias[0, 0]:
            assert float(merged[n]) == pytest.approx(math.log(len(members)), abs=1e-6)
        assert later.coords[0, n].tolist() == image.coords[0, stays].tolist()


def test_each_image_has_a_mean_of_its_own():
    """That the prompt looks at another image is not to move means here; padding weighs nothing."""
    image, pruner = several(), Coreset(0.3)
    forced(small_network(1, 2, 3), PROMPTS, image, pruner)
    for b in 0, 2, 3:
        for i in range(int(image.coords[b, :, 0].max()) + 1):
            assert float(pruner.weight[b, image.coords[b, :, 0] == i].mean()) == pytest.approx(1, abs=1e-5)
        single = Coreset(0.3)
        forced(small_network(1, 2, 3), [PROMPTS[b]], alone(image, b), single)
        close(single.weight[0], pruner.weight[b, image.mask[b]])


def test_every_head_has_clusters_of_its_own_keys_and_values():
    image, pruner = random_image(14, seed=6), Coreset(4, question=0.0, **IN_EACH_HEAD)
    ran = run(pruner, image)
    owners = []
    for kv, owner, held in zip(ran.read, pruner.owners, ran.held[0], strict=True):
        assert owner.shape == (1, 2, 14) and kv.key.shape[2] == 14      # prefill has read all of them
        for g in range(2):
            k, v = kv.key[0, g], kv.value[0, g]
            assert partition(owner[0, g]) == ward_of(torch.cat((k / k.norm(), v / v.norm()), 1), 4)
        assert kept_sets(held, image) == [sorted(set(o.tolist())) for o in owner[0]]
        owners += owner[0].tolist()
    assert len(set(map(tuple, owners))) == 6                            # no two alike


def test_keys_and_values_of_the_first_layer_decide_for_all():
    image, pruner = random_image(14, seed=6), Coreset(4, question=0.0, space="keys_values", full_layers=1)
    ran = run(pruner, image)
    k, v = ran.read[0].key[0], ran.read[0].value[0]                     # [G, N, d]
    joined = torch.cat([x[g] / x[g].norm() for g in range(2) for x in (k, v)], 1)
    assert partition(pruner.kept[0]) == ward_of(joined, 4) and ran.answer.kept == [[4] * 3]


# ----- one tree


def test_one_tree_serves_every_question_and_every_ratio():
    """And never another image; what it answers is what a new pruner answers."""
    network, pruner, made = small_network(1, 2, 3), Coreset(question=0.0), []
    honest = clusters.ward
    with patch.object(clusters, "ward", lambda *arguments: made.append(1) or honest(*arguments)):
        for seed, trees in (5, 1), (6, 2), (5, 2):
            for prompt in QUESTIONS:
                for keep in 0.05, 0.3, 5, 0.6:
                    image, pruner.keep = encode(network, [[(1, 3)]], seed), keep
                    ran = forced(network, [prompt], image, pruner)
                    assert len(made) == trees
                    with patch.object(clusters, "ward", honest):
                        new = forced(network, [prompt], image, Coreset(keep, question=0.0))
                    assert torch.equal(ran.logits, new.logits) and ran.answer.kept == new.answer.kept
        forced(network, QUESTIONS, image.expand(3), pruner)
        assert len(made) == 2
        for turns in 3, 4:                      # the attention of another question makes another tree
            forced(network, [QUESTIONS[turns - 3]], image, Coreset(0.3))
            assert len(made) == turns


# ----- options


def test_a_height_lets_an_image_decide():
    """As many tokens as it has places where its tokens are, but at most `keep`."""
    places = noise(8, 32, seed=1)
    groups = torch.arange(20) % 3, torch.arange(20) % 7
    image = batch_of(*(replace(random_image(20), features=places[group][None] + 0.01 * noise(1, 20, 32))
                       for group in groups))
    network, prompts = small_network(1, 2, 3), QUESTIONS[:2]
    for options in {"question": 0.0}, {}, {"when": "boundary"}:
        ran = forced(network, prompts, image, Coreset(1.0, height=0.05, **options))
        assert ran.answer.kept == [[3] * 3, [7] * 3]
    assert forced(network, prompts, image, Coreset(5, height=0.05)).answer.kept == [[3] * 3, [5] * 3]
    assert forced(network, prompts, image, Coreset(1.0, height=100.0)).answer.kept == [[1] * 3] * 2
    assert forced(network, prompts, image, Coreset(1.0)).answer.kept == [[20] * 3] * 2


@pytest.mark.parametrize("height", [0.3, 0.6, 1.0, 2.0, 5.0])
def test_a_height_is_a_share_of_the_mean_squared_distance(height):
    image = random_image(15, seed=5)
    x = image.features[0].double()
    apart = float((x - x.mean(0)).square().sum(1).mean())
    cheap = [cost for cost, _ in ward_by_hand(x.tolist(), [1.0] * 15) if cost <= height * apart]
    assert run(Coreset(1.0, question=0.0, height=height), image).answer.kept == [[15 - len(cheap)] * 3]


def test_within_a_tile():
    image = random_image(20, seed=2)
    tile = image.coords[0, :, 1]
    assert tile.unique().tolist() == [0, 1, 2, 3]
    for keep, n in (1, 4), (0.4, 8):
        owner = chosen(Coreset(keep, question=0.0, within="tile"), image)
        assert torch.equal(tile[owner], tile) and len(owner.unique()) == n
    assert not torch.equal(tile[chosen(Coreset(0.4, question=0.0), image)], tile)


def test_the_cheaper_clusters():
    image = random_image(20, seed=2)
    features = image.features[0]
    assert torch.equal(chosen(Coreset(6, clusters="spaced"), image), spaced(features, 6))
    assert (partition(chosen(Coreset(6, clusters="k_centre"), image))
            == k_centre_by_hand(features.tolist(), 6, LLOYD))


def test_a_projection_is_compared_and_features_are_merged():
    image = random_image(30, seed=3)
    owners = [chosen(Coreset(8, question=0.0, width=width), image) for width in (0, 64, 32, 4)]
    assert all(torch.equal(owner, owners[0]) for owner in owners[:3])   # the features have 32 dimensions
    assert partition(owners[3]) != partition(owners[0])


@pytest.mark.parametrize("early", ["trim", "full"])
def test_the_first_layers_may_read_everything(early):
    image = random_image(20, seed=2)
    ran = run(Coreset(0.2, full_layers=2, early_caches=early), image)
    assert [kv.key.shape[2] for kv in ran.read] == [20, 20, 4]
    assert ran.answer.kept == [[4, 4, 4] if early == "trim" else [20, 20, 4]]
    boundary = run(Coreset(0.2, when="boundary"), image)
    assert [kv.key.shape[2] for kv in boundary.read] == [20] * 3 and boundary.answer.kept == [[4] * 3]


@pytest.mark.parametrize("options, words", [
    ({"question": -0.1}, "question is -0.1, but must be at least 0"),
    ({"question": 1.5}, "question is 1.5, but must be at most 1"),
    ({"width": -1}, "width is -1"), ({"height": -1.0}, "height is -1.0"),
    ({"clusters": "kmeans"}, "clusters is 'kmeans', but must be ward or spaced or k_centre"),
    ({"clusters": "spaced", "height": 0.1}, "height and within=tile need clusters=ward, not spaced"),
    ({"clusters": "k_centre", "within": "tile"}, "need clusters=ward, not k_centre"),
    ({**IN_EACH_HEAD, "full_layers": 1}, "leave full_layers and early_caches"),
    ({**IN_EACH_HEAD, "early_caches": "full"}, "leave full_layers")])
def test_bad_options_are_refused(options, words):
    with refused(words, ["coreset: "]):
        Coreset(0.5, **options)


def test_what_does_not_fit_the_model_or_is_not_finite_is_refused():
    image = random_image(12)
    with refused("coreset: full_layers is 4, but must be 0 to 3"):
        run(Coreset(0.5, full_layers=4), image)
    for bad in math.nan, math.inf:
        image.features[0, 3, 2] = bad
        for options in {"question": 0.0}, {"clusters": "spaced"}, IN_EACH_HEAD:
            with refused("not finite"):
                run(Coreset(0.5, **options), image)
