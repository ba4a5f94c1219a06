"""A batch of different images, limits and stop texts: every conversation gets what it gets alone.

`test_pruners.py` has the logits of mixed batches; here it is what people call: `Assistant`.
"""
from dataclasses import replace

import pytest
from helpers import randomise, refused
from PIL import Image, ImageDraw

from generate import WARM_UP_TOKENS, Assistant
from model.sampling import Sampler
from pruning import METHODS, Pruner, load
from pruning.pruner import Wrapper
from weights.tokenizer import messages

LIMITS = [3, 9, 6, 12]
NO_STOPS = [[]] * 4
OPTIONS = [*((name, {}) for name in METHODS), ("sgl", {"threshold": 0.0}), ("sgl", {"full_layers": 0}),
           ("mint", {"update": "prefill"}), ("coreset", {"when": "boundary"})]


def drawn(width: int, height: int, colour: str) -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).ellipse((width // 4, height // 4, width // 2, height // 2), fill=colour)
    return image


WIDE, TALL, SMALL = drawn(224, 112, "red"), drawn(112, 336, "blue"), drawn(100, 90, "green")
IMAGES = [[WIDE, SMALL], [], [TALL], [TALL]]
QUESTIONS = ["Which circle is red?", "How are you?", "Describe the picture.", "Describe the picture."]
CONVERSATIONS = [messages(text, len(own)) for text, own in zip(QUESTIONS, IMAGES, strict=True)]


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    """The bundled tokenizer with random weights: it never stops."""
    assistant = Assistant("tiny", "cpu", "fp32")
    randomise(assistant.model, assistant.model.config.vision, seed=2)
    return assistant


def alone(assistant, b, pruner, limits, stops, sampler=None):
    encoded = assistant.encode_images(IMAGES[b], pruner)
    emitted = []
    made = assistant.answer([CONVERSATIONS[b]], encoded, limits[b], sampler or Sampler(), pruner=pruner,
                            stop=stops[b], emit=lambda _, token: emitted.append(token))
    return made, emitted, encoded


@pytest.mark.parametrize(("method", "options"), OPTIONS, ids=lambda value: str(value))
def test_a_mixed_batch_equals_its_conversations_alone(assistant, method, options):
    """For some methods what an answer is depends on how long it may be."""
    def pruner() -> Pruner:
        return load(method, **({} if method == "none" else {"keep": 0.4}), **options)
    free = alone(assistant, 3, pruner(), LIMITS, NO_STOPS)[0]
    stops = [["no such text"], [], [], [free.texts[0][5:7]]]
    encoded = assistant.encode_images(IMAGES, pruner())
    emitted = [[] for _ in IMAGES]
    made = assistant.answer(CONVERSATIONS, encoded, LIMITS, pruner=pruner(), stop=stops,
                            emit=lambda b, token: emitted[b].append(token))
    for b in range(len(IMAGES)):
        single, tokens, own = alone(assistant, b, pruner(), LIMITS, stops)
        assert (made.tokens[b], made.texts[b], emitted[b]) == (single.tokens[0], single.texts[0], tokens)
        assert made.kept[b] == pytest.approx(single.kept[0] or [0] * len(made.kept[b]))
        assert ([made.seen[b]], [made.real[b]], [made.prompt_tokens[b]], [made.limits[b]]) == (
            single.seen, single.real, single.prompt_tokens, single.limits)
        assert (encoded.real_of_each[b], encoded.slots_of_each[b]) == (own.real, own.slots)
        assert (b in made.early) == bool(single.early)
    if not made.early:
        assert len(made.tokens[0]) == 3 and len(made.tokens[2]) == 6 and len(made.tokens[3]) < 12
        assert made.decoded < sum(LIMITS)
    assert encoded.real == sum(encoded.real_of_each) and encoded.slots == sum(encoded.slots_of_each)
    assert made.real == encoded.real_of_each and made.real[1] == 0 < made.real[0]


def test_each_draws_what_it_draws_alone(assistant):
    settings = {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.5}
    encoded = assistant.encode_images(IMAGES)
    made = assistant.answer(CONVERSATIONS, encoded, LIMITS, Sampler(**settings))
    for b in range(len(IMAGES)):
        single = alone(assistant, b, None, LIMITS, NO_STOPS, Sampler(**settings))[0]
        assert [made.tokens[b]] == single.tokens


def test_the_same_images_are_encoded_once(assistant, monkeypatch):
    encoded = []
    encode = type(assistant.model).encode
    monkeypatch.setattr(type(assistant.model), "encode",
                        lambda model, tiles, *states: encoded.append(tiles) or encode(model, tiles, *states))
    twice = assistant.encode_images([[WIDE], [TALL], [WIDE]], keep_states=True)
    assert [len(tiles) for tiles in encoded.pop()] == [1, 1] and len(twice.tiles) == 2
    assert twice.tokens.features[0].equal(twice.tokens.features[2])
    assert twice.images_of_each == [1, 1, 1] and twice.real == sum(twice.real_of_each)
    assert twice.tokens.states.features.shape[0] == 3


def test_no_images_at_all(assistant):
    encoded = assistant.encode_images([[], []])
    assert encoded.tokens is None and encoded.real_of_each == [0, 0] and len(encoded.tiles) == 0
    texts = [messages("Hm?"), messages("And?")]
    made = assistant.answer(texts, encoded, [2, 4])
    assert made.tokens == assistant.answer(texts, assistant.encode_images([]), [2, 4]).tokens
    assert list(map(len, made.tokens)) == [2, 4] and made.real == [0, 0]


def test_hook_0_is_called_for_each_list_of_images(assistant):
    class Watching(Wrapper):
        def preprocess(self, images, processor):
            seen.append(len(images))
            return super().preprocess(images, processor)
    seen = []
    encoded = assistant.encode_images(IMAGES, Watching(load("downsample", keep=0.25)))
    assert seen == [2, 0, 1]                                            # the last one is there already
    assert encoded.tokens.mask.sum(1).tolist()[3] < encoded.real_of_each[3]


def test_warming_up_with_images_of_each(assistant, monkeypatch):
    seen = []
    monkeypatch.setattr("generate.generate", lambda *args, **named: seen.append(args[1:4]))
    assistant.warm_up(4, assistant.encode_images(IMAGES))
    (prompts, image, new), = seen
    image_token = assistant.model.config.image_token_index
    assert [ids.count(image_token) for ids in prompts] == [2, 0, 1, 1]
    assert len(image.features) == 4 and new == WARM_UP_TOKENS


# ----- prompts that are too long


def test_a_prompt_that_is_too_long_is_refused_or_its_answer_cut(assistant, monkeypatch):
    encoded = assistant.encode_images([])
    texts = [messages("Hm?"), messages("star " * 20)]
    lengths = assistant.answer(texts, encoded, 2).prompt_tokens
    assert lengths == [len(assistant.tokenizer.encode(text)) for text in texts]
    config = assistant.model.config
    context = max(lengths) + 3
    short = replace(config, text=replace(config.text, max_position_embeddings=context))
    monkeypatch.setattr(assistant.model, "config", short)
    with refused(parts=[f"the context holds {context}", "shorten"]):
        assistant.answer(texts, encoded, 5)
    made = assistant.answer(texts, encoded, [5, 5], too_long="clamp")
    assert made.limits == [5, 3] and list(map(len, made.tokens)) == [5, 3]
    with refused(parts=["1 new ones", f"the context holds {context}"]):
        assistant.answer([messages("star " * 40)], encoded, 5, too_long="clamp")
    with refused(parts=["too_long is 'cut'", "refuse or clamp"]):
        assistant.answer(texts, encoded, 5, too_long="cut")


# ----- what does not fit together


def test_numbers_that_differ_from_that_of_the_conversations(assistant):
    encoded = assistant.encode_images([[WIDE], [TALL]])
    two = [messages("Hm?", 1)] * 2
    with refused(parts=["3 conversations, but images for 2"]):
        assistant.answer([*two, two[0]], encoded, 3)
    with refused(parts=["max_new_tokens has 3 numbers for 2 prompts"]):
        assistant.answer(two, encoded, [3, 4, 5])
    with refused(parts=["1 lists of stop texts for 2 prompts"]):
        assistant.answer(two, encoded, 3, stop=[["a"]])
    with refused(parts=["as a list of texts, not as 'a'"]):
        assistant.answer(two, encoded, 3, stop=[["b"], "a"])
    with refused(parts=["max_new_tokens is 0"]):
        assistant.answer(two, encoded, [3, 0])
    with refused(parts=["sequence 1 has 2 image tokens", "1 images"]):
        assistant.answer([two[0], messages("Hm?", 2)], encoded, 3)
    with refused(parts=["can be joined"]):
        encoded.join(assistant.encode_images([WIDE]))
    for images in [[WIDE], TALL], [TALL, [WIDE]]:
        with refused(parts=["a list of lists"]):
            assistant.encode_images(images)
    for images in WIDE, "x.png", [["x.png"]], None:
        with refused(parts=["type"]):
            assistant.encode_images(images)
