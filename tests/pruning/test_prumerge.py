"""PruMerge against its definition (arXiv 2403.15388 and its code), in plain loops over tokens.

The attention of class tokens is in test_visionzip.py, what every method promises in test_pruners.py.
"""
import math

import pytest
import torch
from encoder_by_hand import (
    GRIDS,
    NETWORK,
    PROMPTS,
    check_layers,
    check_padding,
    cosine,
    last_layer,
    one_image,
    projected,
    random_images,
    received_by_hand,
    token_lists,
)
from helpers import close, refused, small_network
from loops import best, half_up
from torch import Tensor

from model.image_tokens import ImageTokens
from pruning.methods.prumerge import PruMerge


def merged(image: ImageTokens, **options) -> ImageTokens:
    pruner = PruMerge(**options)
    pruner.begin(small_network(NETWORK))
    return pruner.encoded(image, PROMPTS)


# ----- the definition


def percentile(values: list[float], share: float) -> float:
    """Between the two nearest values of the sorted list where it falls between them."""
    ranked, at = sorted(values), share * (len(values) - 1)
    low, high = ranked[math.floor(at)], ranked[math.ceil(at)]
    return low + (high - low) * (at - math.floor(at))


def chosen_by_hand(options: PruMerge, received: list[float], patches: list[int]) -> list[int]:
    """The tokens of one image that stay."""
    of_patches = [received[t] for t in patches]
    if options.threshold is not None:
        lower, upper = percentile(of_patches, 0.25), percentile(of_patches, 0.75)
        most = max(1, sum(value > upper + options.threshold * (upper - lower) for value in of_patches))
        left = min(len(patches), round(most / (1 - options.spread)))
    else:
        left = half_up(options.keep, len(received))
    spread = math.floor(left * options.spread)
    chosen = [patches[k] for k in best(of_patches, left - spread)]
    rest = [t for t in patches if t not in chosen]
    spread = min(spread, len(rest))
    chosen += [rest[(k * len(rest) + len(rest) // 2) // spread] for k in range(spread)]
    return chosen + [t for t in range(len(received)) if t not in patches][:left - len(chosen)]


def by_hand(options: PruMerge, states: Tensor, features: Tensor,
            class_tokens: list[int]) -> dict[int, Tensor]:
    """The tokens of one image that stay, and their new features."""
    queries, keys = projected(last_layer(small_network(NETWORK)), states)
    received = received_by_hand(queries, keys, class_tokens, heads=1)
    chosen = chosen_by_hand(options, received, [t for t in range(len(states)) if t not in class_tokens])
    assert len(set(chosen)) == len(chosen)
    new = {}
    for t in chosen:
        others = [j for j in range(len(states)) if j != t]
        near = sorted(others, key=lambda j, t=t: -cosine(keys[t], keys[j]))[:options.neighbours]
        total = features[t] + sum(received[j] * features[j] for j in near)
        new[t] = total / (1 + sum(received[j] for j in near))
    return new if len(chosen) < len(states) else {t: features[t] for t in chosen}


VARIANTS = [{}, {"spread": 0.0}, {"spread": 0.5, "neighbours": 3}, {"neighbours": 0}, {"neighbours": 1000}]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("grids", GRIDS)
def test_the_definition(grids, options):
    settings = [{"keep": keep} for keep in (0.05, 0.25, 0.5, 0.95, 1, 7)]
    for seed, setting in enumerate([*settings, {"threshold": 1.5}, {"threshold": 0}, {"threshold": -3.0}]):
        image, pruner = random_images(*grids, seed=seed), PruMerge(**setting, **options)
        pruner.begin(small_network(NETWORK))
        left, expected = pruner.encoded(image, PROMPTS), {}
        for i in range(len(grids)):
            tokens, class_tokens = token_lists(image, i)
            new = by_hand(pruner, image.states.entering[0, tokens], image.features[0, tokens].double(),
                          class_tokens)
            assert "threshold" in setting or len(new) == half_up(pruner.keep, len(tokens))
            expected |= {tokens[t]: feature for t, feature in new.items()}
        assert left.coords[0].tolist() == [image.coords[0, t].tolist() for t in sorted(expected)]
        close(left.features[0].double(), torch.stack([expected[t] for t in sorted(expected)]))
        assert left.bias is None and left.states is None


# ----- the choice


def chosen(received: list[float], class_tokens: int = 1, **options) -> list[int]:
    """What is chosen where tokens receive this attention; class tokens come first."""
    is_class = torch.arange(len(received)) < class_tokens
    return PruMerge(**options).choose(torch.tensor(received), is_class).tolist()


def test_what_stands_out_is_kept():
    """As many as lie above the upper quartile by more than 1.5 times the distance of the quartiles."""
    received = [9.0, 1.0, 2.0, 1.5, 8.0, 1.2, 1.8, 7.0, 1.1, 1.9, 1.4, 1.6, 1.7]
    assert chosen(received, threshold=1.5, spread=0.0) == [4, 7]
    found = chosen(received, threshold=1.5, spread=0.75)
    assert found[:2] == [4, 7] and found[2:] == [1, 3, 6, 8, 10, 12] and len(found) == 8
    assert chosen([9.0] + [1.0] * 12, threshold=1.5, spread=0.0) == [1]         # nothing does: at least one
    assert not PruMerge(1.0, threshold=1.5).keeps_all


def test_class_tokens_only_ask():
    """They are kept only when there is no patch left, though nothing receives more."""
    received = [9.0, 8.0, 1.0, 3.0, 2.0]
    assert chosen(received, 2, keep=3, spread=0.0) == [3, 4, 2]
    assert chosen(received, 2, keep=4, spread=0.0) == [3, 4, 2, 0]
    assert sorted(chosen(received, 2, keep=1.0)) == [0, 1, 2, 3, 4]


def test_the_spread_is_even():
    """Of 100 patches the ten best, and every ninth of the others."""
    received = [0.0] + [float(t < 10) for t in range(100)]
    assert chosen(received, keep=20, spread=0.5) == [*range(1, 11), *range(15, 101, 9)]


# ----- several images, padding


def test_each_image_is_merged_by_itself():
    image = random_images((1, 2), (2, 2), (1, 1))
    for options in {"keep": 0.4}, {"threshold": 0.0}:
        left = merged(image, **options)
        for i in range(3):
            single = merged(one_image(image, i), **options)
            close(left.features[0, left.coords[0, :, 0] == i], single.features[0])


def test_padding_is_ignored():
    check_padding(PruMerge(0.4))


def test_nothing_changes_where_all_are_kept():
    image = random_images((2, 2), (1, 3))
    assert PruMerge(1.0).keeps_all
    for keep in 1.0, 1000:
        assert torch.equal(merged(image, keep=keep).features, image.features)


def test_every_layer_reads_what_is_left():
    check_layers(PruMerge(0.3))


@pytest.mark.parametrize("options, message", [
    ({"spread": 1.0}, "spread is 1.0, but must be below 1"),
    ({"spread": -0.1}, "spread is -0.1, but must be at least 0"),
    ({"neighbours": -1}, "neighbours is -1, but must be at least 0")])
def test_bad_options(options, message):
    with refused(f"^prumerge: {message}$"):
        PruMerge(**options)
