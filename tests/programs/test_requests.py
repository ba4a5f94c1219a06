"""What `generate` and the Assistant refuse, in one line, before anything is computed."""
import pytest
import torch
from helpers import random_tiles
from PIL import Image

from generate import Assistant, generate
from model.llama_vision import LlamaVision
from pruning import load
from pruning.methods.fastv import FastV
from weights.tokenizer import messages


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return Assistant("tiny", "cpu")


def refused(work, *fragments: str):
    """The ValueError is one line of bounded length that holds these words."""
    with pytest.raises(ValueError) as error:
        work()
    message = str(error.value)
    assert "\n" not in message and len(message) < 300
    for fragment in fragments:
        assert fragment in message, message


@pytest.mark.parametrize(("prompts", "fragment"), [
    ([], "there is no prompt"),
    ([[5, 6], []], "prompt 1 is empty"),
    ([[5, -1]], "whole numbers from 0 to 647"),
    ([[5], [6, 648]], "prompt 1 holds something else"),
    ([[5, 10 ** 50]], "prompt 0 holds something else"),
    ([[5, 6.0]], "prompt 0 holds something else"),
    ([[5, "6"]], "prompt 0 holds something else"),
    ([[5, True]], "prompt 0 holds something else")], ids=range(8))
def test_prompts_that_no_model_can_read(assistant, prompts, fragment):
    assert assistant.model.config.text.vocab_size == 640
    refused(lambda: generate(assistant.model, prompts, None, 4, ()), fragment)


@pytest.mark.parametrize("count", [0, -1, -10 ** 30])
def test_no_new_tokens(assistant, count):
    refused(lambda: generate(assistant.model, [[5]], None, count, ()), "max_new_tokens", "at least 1")


def test_a_prompt_that_is_too_long(assistant):
    most = assistant.model.config.text.max_position_embeddings
    prompt = [5] * most
    refused(lambda: generate(assistant.model, [prompt], None, 1, ()), f"the context holds {most}", "shorten")


def test_no_conversation(assistant):
    encoded = assistant.encode_images([])
    refused(lambda: assistant.answer([], encoded, 4), "there is no conversation to answer")


@pytest.mark.parametrize("pruner", [FastV, "fastv", 0.25])
def test_something_that_is_no_pruner(assistant, pruner):
    encoded = assistant.encode_images([])
    turns = [messages("What?")]
    refused(lambda: assistant.answer(turns, encoded, 4, pruner=pruner), "not an instance of a Pruner")


@pytest.mark.parametrize("method", ["topv", "quecc", "sgl"])
def test_states_that_were_not_kept(assistant, method):
    tokens = assistant.model.encode([random_tiles([(1, 1)], assistant.model.config.vision)])
    prompt = assistant.tokenizer.encode(messages("What?", 1))
    pruner = load(method, keep=0.5)
    refused(lambda: generate(assistant.model, [prompt], tokens, 4, (), pruner=pruner),
            method, "keep_states=True")


@pytest.mark.parametrize("method", ["mint", "sgl"])
def test_a_method_around_generate_is_not_called_by_generate(assistant, method):
    tokens = assistant.encode_images([Image.new("RGB", (40, 30))], keep_states=True).tokens
    prompt = assistant.tokenizer.encode(messages("What?", 1))
    pruner = load(method, keep=0.5)
    refused(lambda: generate(assistant.model, [prompt], tokens, 4, (), pruner=pruner), "around(generate)")


def test_a_model_without_weights(assistant):
    with torch.device("meta"):
        model = LlamaVision(assistant.model.config)
    refused(lambda: generate(model, [[5, 6]], None, 4, ()), "meta device")
