"""What `generate` and the Assistant refuse, in one line, before anything is computed."""
import pytest
import torch
from helpers import random_tiles, refused
from PIL import Image

from generate import Assistant, generate
from model.llama_vision import LlamaVision
from pruning import load
from pruning.methods.fastv import FastV
from weights.tokenizer import messages


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return Assistant("tiny", "cpu")


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
    with refused(parts=[fragment], longest=300):
        generate(assistant.model, prompts, None, 4, ())


@pytest.mark.parametrize("count", [0, -1, -10 ** 30])
def test_no_new_tokens(assistant, count):
    with refused(parts=["max_new_tokens", "at least 1"], longest=300):
        generate(assistant.model, [[5]], None, count, ())


def test_a_prompt_that_is_too_long(assistant):
    most = assistant.model.config.text.max_position_embeddings
    prompt = [5] * most
    with refused(parts=[f"the context holds {most}", "shorten"], longest=300):
        generate(assistant.model, [prompt], None, 1, ())


def test_no_conversation(assistant):
    encoded = assistant.encode_images([])
    with refused(parts=["there is no conversation to answer"], longest=300):
        assistant.answer([], encoded, 4)


@pytest.mark.parametrize("pruner", [FastV, "fastv", 0.25])
def test_something_that_is_no_pruner(assistant, pruner):
    encoded = assistant.encode_images([])
    turns = [messages("What?")]
    with refused(parts=["not an instance of a Pruner"], longest=300):
        assistant.answer(turns, encoded, 4, pruner=pruner)


@pytest.mark.parametrize("method", ["topv", "quecc", "sgl"])
def test_states_that_were_not_kept(assistant, method):
    tokens = assistant.model.encode([random_tiles([(1, 1)], assistant.model.config.vision)])
    prompt = assistant.tokenizer.encode(messages("What?", 1))
    pruner = load(method, keep=0.5)
    with refused(parts=[method, "keep_states=True"], longest=300):
        generate(assistant.model, [prompt], tokens, 4, (), pruner=pruner)


@pytest.mark.parametrize("method", ["mint", "sgl"])
def test_a_method_around_generate_is_not_called_by_generate(assistant, method):
    tokens = assistant.encode_images([Image.new("RGB", (40, 30))], keep_states=True).tokens
    prompt = assistant.tokenizer.encode(messages("What?", 1))
    pruner = load(method, keep=0.5)
    with refused(parts=["around(generate)"], longest=300):
        generate(assistant.model, [prompt], tokens, 4, (), pruner=pruner)


def test_a_model_without_weights(assistant):
    with torch.device("meta"):
        model = LlamaVision(assistant.model.config)
    with refused(parts=["meta device"], longest=300):
        generate(model, [[5, 6]], None, 4, ())
