"""generate(): its tokens, its batches, where it stops, and the costs that it reports.

The network has random weights here, so that nothing depends on what the bundled checkpoint has learnt.
"""
from dataclasses import replace

import pytest
import torch
from generate_helpers import drawn
from helpers import randomise
from PIL import Image

from generate import Assistant, EncodedImages, Sampler, generate
from model.cache import rounded_up
from model.llama_vision import LlamaVision
from weights.tokenizer import messages


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    """The bundled prompt format and image processing, with random weights in fp32."""
    assistant = Assistant("tiny", "cpu", "fp32")
    randomise(assistant.model, assistant.model.config.vision, seed=1)
    return assistant


@pytest.fixture(scope="module")
def random_image(assistant) -> EncodedImages:
    return assistant.encode_images([drawn(224, 112)])


class Script:
    """A sampler that says what it was told, one list of tokens a row, and counts its calls."""

    def __init__(self, *rows: list[int]):
        self.rows, self.calls = rows, 0

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        assert len(logits) == len(self.rows)
        self.calls += 1
        return torch.tensor([row[self.calls - 1] for row in self.rows])



@pytest.mark.parametrize("images", [0, 1])
def test_greedy_is_the_argmax_of_forward(assistant, random_image, images):
    ids = assistant.tokenizer.encode(messages("Which colour is the circle?", images))
    answer = generate(assistant.model, [ids], random_image.tokens if images else None, 16, stop_ids=())
    tiles = random_image.tiles if images else None
    with torch.inference_mode():
        logits = assistant.model(torch.tensor([ids + answer.tokens[0][:-1]]), [tiles])
    assert answer.tokens[0] == logits[0, len(ids) - 1:].argmax(-1).tolist()


def test_the_image_matters(assistant, random_image):
    other = assistant.encode_images([Image.new("RGB", (224, 112), "blue")])
    question = messages("Which colour?", 1)
    tokens = [assistant.answer([question], image, 8).tokens for image in (random_image, other)]
    assert tokens[0] != tokens[1]


SAMPLERS = {"greedy": lambda: Sampler(), "sampled": lambda: Sampler(0.9, 0.95, seed=5)}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_batch_gives_what_each_prompt_gives_alone(assistant, random_image, sampler):
    questions = ["Hm?", "Is there a star in the upper half of the image?", "Describe the picture.", "Hm?"]
    prompts = [assistant.tokenizer.encode(messages(question, 1)) for question in questions]
    assert len(set(map(len, prompts))) == 3

    def ask(rows: list[list[int]], stop_ids: tuple[int, ...]) -> list[list[int]]:
        image = random_image.tokens.expand(len(rows))
        return generate(assistant.model, rows, image, 12, stop_ids, SAMPLERS[sampler]()).tokens

    free = [ask([prompt], ())[0] for prompt in prompts]
    assert [len(row) for row in free] == [12] * 4 and free[0] == free[3]
    assert ask(prompts, ()) == free
    ends = {stop: [(row + [stop]).index(stop) for row in free] for stop in free[1]}
    stop = next(stop for stop in ends if len(set(ends[stop])) > 1)      # some sequences end early
    assert ask(prompts, (stop,)) == [row[:end] for row, end in zip(free, ends[stop], strict=True)]
    assert [ask([prompt], (stop,))[0] for prompt in prompts] == ask(prompts, (stop,))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_batch_of_different_images_and_none(assistant, sampler):
    processor, model = assistant.processor, assistant.model
    tiles = [processor([drawn(112, 112)]), None, processor([drawn(112, 440), drawn(224, 224)])]
    questions = [("What is this?", 1), ("What is a star made of, in short?", 0), ("Compare them.", 2)]
    prompts = [assistant.tokenizer.encode(messages(*question)) for question in questions]
    with torch.inference_mode():
        together, alone = model.encode(tiles), [model.encode([row]) for row in tiles]
    batch = generate(model, prompts, together, 10, (), SAMPLERS[sampler]())
    for row, (prompt, image) in enumerate(zip(prompts, alone, strict=True)):
        assert batch.tokens[row] == generate(model, [prompt], image, 10, (), SAMPLERS[sampler]()).tokens[0]


def run_script(assistant: Assistant, script: Script, max_new_tokens: int, stop_ids: tuple[int, ...]):
    """What a script makes of prompts without an image: the answer and what was emitted."""
    emitted = []
    prompts = [assistant.tokenizer.encode(messages("Hm?"))] * len(script.rows)
    answer = generate(assistant.model, prompts, None, max_new_tokens, stop_ids, script,
                      lambda row, token: emitted.append((row, token)))
    return answer, emitted


@pytest.mark.parametrize("stop", [5, 6, 7])
def test_any_stop_token_ends_the_answer_and_is_not_part_of_it(assistant, stop):
    script = Script([1, 2, stop, 3, 4])
    answer, emitted = run_script(assistant, script, 5, stop_ids=(5, 6, 7))
    assert answer.tokens == [[1, 2]] and emitted == [(0, 1), (0, 2)]
    assert script.calls == 3


@pytest.mark.parametrize("most", [1, 2, 5])
def test_max_new_tokens_is_exact(assistant, monkeypatch, most):
    decode, steps = LlamaVision.decode, []
    monkeypatch.setattr(LlamaVision, "decode", lambda *args: steps.append(1) or decode(*args))
    script = Script([1, 2, 3, 4, 5, 6])
    answer, emitted = run_script(assistant, script, most, stop_ids=(9,))
    assert answer.tokens == [[1, 2, 3, 4, 5][:most]] and len(emitted) == most
    assert (script.calls, len(steps), answer.decoded) == (most, most - 1, most - 1)


def test_a_first_token_that_stops_leaves_an_empty_answer(assistant):
    script = Script([9, 1])
    answer, emitted = run_script(assistant, script, 5, stop_ids=(9,))
    assert (answer.tokens, emitted, script.calls) == ([[]], [], 1)
    assert answer.decoded == answer.tokens_per_second == 0


def test_tokens_are_emitted_step_by_step_and_row_by_row(assistant):
    script = Script([1, 2, 9, 8], [3, 9, 7, 9], [4, 5, 6, 6])
    answer, emitted = run_script(assistant, script, 4, stop_ids=(9,))
    assert emitted == [(0, 1), (1, 3), (2, 4), (0, 2), (2, 5), (2, 6), (2, 6)]
    assert answer.tokens == [[1, 2], [3], [4, 5, 6, 6]]
    assert answer.decoded == 3 + 2 + 1              # a row's stop token was made, what follows is waste


def test_an_answer_must_fit_the_context(assistant, monkeypatch):
    ids, config = assistant.tokenizer.encode(messages("Hm?")), assistant.model.config
    text = replace(config.text, max_position_embeddings=len(ids) + 4)
    monkeypatch.setattr(assistant.model, "config", replace(config, text=text))
    assert len(generate(assistant.model, [ids], None, 4, ()).tokens[0]) == 4
    for prompts in [ids], [ids[:-1], ids]:
        with pytest.raises(ValueError, match=f"^{len(ids)} prompt tokens and 5 new .* holds {len(ids) + 4}"):
            generate(assistant.model, prompts, None, 5, ())


def test_the_costs_are_those_that_the_model_states(assistant, random_image):
    ids = assistant.tokenizer.encode(messages("Hm?", 1))
    grids = random_image.tiles.grid.tolist()
    for batch in 1, 3:
        answer = generate(assistant.model, [ids] * batch, random_image.tokens.expand(batch), 6, ())
        expected = assistant.model.kv_bytes(rounded_up(len(ids) + 6), grids)
        assert answer.image_kv_bytes == batch * expected["image"] > 0
        assert answer.text_kv_bytes == batch * expected["text"] > 0
        assert answer.ms["prefill"] > 0 and answer.ms["decode"] > 0
        assert answer.tokens_per_second == pytest.approx(batch * 5 / answer.ms["decode"] * 1000)
