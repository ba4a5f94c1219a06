"""Images that are encoded one after the other and joined are what encoding them at once gives."""
import pytest
import torch
from generate_helpers import drawn
from helpers import close

from generate import Assistant
from model.answer import EncodedImages
from pruning import METHODS, hooks, load
from weights.tokenizer import messages

IMAGES = [drawn(224, 112), drawn(112, 112), drawn(440, 112), drawn(224, 112)]
# Every method that does something before the decoder: resizes the images, or needs states of the encoder.
EARLY = [name for name, method in METHODS.items() if "preprocess" in hooks(method) or method.keep_states]


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return Assistant("tiny", "cpu", "fp32")


def joined(assistant: Assistant, parts: list[list], pruner) -> EncodedImages:
    first, *later = [assistant.encode_images(part, pruner) for part in parts]
    for each in later:
        first = first.join(each)
    return first


@pytest.mark.parametrize("name", ["none", *EARLY])
@pytest.mark.parametrize("cuts", [(0, 3), (1, 2, 2, 3)])
def test_joined_is_encoded_at_once(assistant, name, cuts):
    pruner = load(name, **({} if name == "none" else {"keep": 0.5}))
    parts = [IMAGES[a:b] for a, b in zip((0, *cuts), (*cuts, 4), strict=True)]
    made, whole = joined(assistant, parts, pruner), assistant.encode_images(IMAGES, pruner)
    assert torch.equal(made.tokens.coords, whole.tokens.coords)
    close(made.tokens.features, whole.tokens.features)
    assert made.tokens.mask is None and made.tokens.bias is None
    assert (made.slots, made.real) == (whole.slots, whole.real)
    assert torch.equal(made.tiles.pixels, whole.tiles.pixels)
    assert torch.equal(made.tiles.grid, whole.tiles.grid)
    assert (made.tokens.states is None) == (whole.tokens.states is None) == (not pruner.keep_states)
    if pruner.keep_states:
        for state in "features", "entering", "attended":
            close(getattr(made.tokens.states, state), getattr(whole.tokens.states, state))
        [tiles] = made.tokens.states.tiles
        assert torch.equal(tiles.pixels, whole.tokens.states.tiles[0].pixels)


def test_early_methods_are_all_that_there_are():
    assert "downsample" in EARLY and len(EARLY) >= 3


@pytest.mark.parametrize("name", ["none", "downsample", "coreset", "fastv"])
def test_a_conversation_with_later_images_is_answered_alike(assistant, name):
    """Images in two turns: two of them in the first, then one group of two more."""
    pruner = load(name, **({} if name == "none" else {"keep": 0.5}))
    history = [*messages("What is this?", 2), {"role": "assistant", "content": "A circle."}]
    conversation = messages("And these?", 2, history=history)
    made, whole = joined(assistant, [IMAGES[:2], IMAGES[2:3], IMAGES[3:]], pruner), \
        assistant.encode_images(IMAGES, pruner)
    answers = [assistant.answer([conversation], encoded, 12, pruner=pruner) for encoded in (made, whole)]
    assert answers[0].tokens == answers[1].tokens and answers[0].kept == answers[1].kept
    assert answers[0].seen == answers[1].seen == [made.tokens.coords[0, :, 0].ge(2).sum()]


def test_no_image_joins_with_anything(assistant):
    nothing, one = assistant.encode_images([]), assistant.encode_images(IMAGES[:1])
    assert nothing.join(one) is one and one.join(nothing) is one and nothing.join(nothing).tokens is None


def test_states_are_kept_where_both_have_them(assistant):
    with_states = assistant.encode_images(IMAGES[:1], keep_states=True)
    without = assistant.encode_images(IMAGES[1:2])
    assert with_states.join(without).tokens.states is without.join(with_states).tokens.states is None
