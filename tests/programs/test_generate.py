"""generate(), the sampler, and everything the command line promises.

The network has random weights here wherever its tokens matter, so that nothing depends on what the bundled
checkpoint has learnt; the command line runs on the bundled one, mostly inside this process. Tests of what is
printed replace the sampler by a script.
"""
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from full_disk import full_disk
from helpers import randomise
from PIL import Image, ImageDraw
from tokenizers import Tokenizer

import generate as program
import pruning
from generate import Assistant, EncodedImages, Sampler, generate
from model.cache import rounded_up
from model.llama_vision import LlamaVision
from weights import read_config
from weights.tokenizer import messages

ROOT = Path(__file__).parents[2]
TINY = ROOT / "weights" / "tiny"
STOP = 638                                          # <|eot_id|> of the bundled checkpoint
JSON_KEYS = {"answer", "token_ids", "image_tokens", "ms", "tokens_per_second", "image_kv_bytes",
             "text_kv_bytes", "peak_memory_bytes", "model", "pruner", "kept_by_layer", "answered_early",
             "image_kv_stored_bytes"}


def drawn(width: int, height: int) -> Image.Image:
    random_image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(random_image).ellipse((width // 4, height // 4, width // 2, height // 2), fill="red")
    return random_image


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> str:
    """The path of an image of two tiles."""
    path = tmp_path_factory.mktemp("images") / "wide.png"
    drawn(224, 112).save(path)
    return str(path)


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


# --- generate()

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


# --- sampling

def kept_by_top_p(logits: list[float], temperature: float, top_p: float) -> dict[int, float]:
    """Meta's rule, one token at a time: in falling order, a token goes if those before it hold over top_p."""
    p = torch.tensor(logits, dtype=torch.float64).div(temperature).exp()
    p = (p / p.sum()).tolist()
    kept, before = {}, 0.0
    for token in sorted(range(len(p)), key=lambda i: -p[i]):
        if before > top_p:
            break
        kept[token] = p[token]
        before += p[token]
    return {token: share / sum(kept.values()) for token, share in kept.items()}


LOGITS = [0.3, 2.0, -1.0, 1.1, 1.6, 0.0, -0.4, 0.9]


@pytest.mark.parametrize("temperature, top_p, size", [
    (1.0, 1.0, 8), (1.0, 0.9, 5), (1.0, 0.5, 2), (1.0, 1e-6, 1), (0.5, 0.9, 3), (3.0, 0.7, 5)])
def test_top_p_draws_as_the_rule_says(temperature, top_p, size):
    expected = kept_by_top_p(LOGITS, temperature, top_p)
    assert len(expected) == size
    logits = torch.tensor([LOGITS])
    one = Sampler(temperature, top_p, seed=0)
    along = Counter(one(logits).item() for _ in range(3000))                    # one seed, many tokens
    across = Counter(Sampler(temperature, top_p, seed)(logits).item() for seed in range(3000))
    for counts in along, across:
        assert set(counts) == set(expected)
        for token, share in expected.items():
            assert abs(counts[token] / 3000 - share) < 4 * (share * (1 - share) / 3000) ** 0.5 + 1e-9


def test_a_token_stays_where_those_before_it_hold_exactly_top_p():
    sampler = Sampler(1.0, 0.5)                     # of four equal tokens, two hold 0.5: the third stays
    assert {sampler(torch.zeros(1, 4)).item() for _ in range(300)} == {0, 1, 2}


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((1, 50), -torch.inf)
    logits[0, [7, 31]] = 0.0
    sampler = Sampler(2.0, 1.0)
    assert {sampler(logits).item() for _ in range(300)} == {7, 31}


def test_temperature_0_is_the_argmax_and_so_is_nearly_0():
    logits = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Sampler()(logits), logits.argmax(-1))
    for temperature in 1e-3, 1e-30, 1e-45, 5e-324:
        assert torch.equal(Sampler(temperature, 1.0)(logits), logits.argmax(-1)), temperature


def test_seeds_are_reproducible_and_differ():
    logits = torch.randn(1, 100, generator=torch.Generator().manual_seed(0))

    def draw(seed: int) -> list[int]:
        sampler = Sampler(1.0, 1.0, seed)
        return [sampler(logits).item() for _ in range(20)]

    state = torch.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert len(set(draw(1))) > 5                    # a sampler goes on drawing, it does not begin again
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_draw_as_they_would_alone():
    logits = torch.randn(6, 3, 40, generator=torch.Generator().manual_seed(0))
    together, alone = Sampler(1.0, 0.9, seed=4), [Sampler(1.0, 0.9, seed=4) for _ in range(3)]
    for step in logits:
        expected = [sampler(row[None]).item() for sampler, row in zip(alone, step, strict=True)]
        assert together(step).tolist() == expected


@pytest.mark.parametrize("values", [(-0.1,), (float("nan"),), (float("inf"),), (1.0, 0.0), (1.0, -1.0),
                                    (1.0, 1.01), (1.0, float("nan"))])
def test_a_sampler_refuses_what_it_cannot_do(values):
    name, value = ("temperature", "top-p")[len(values) - 1], values[-1]
    with pytest.raises(ValueError, match=f"^{name} is {re.escape(str(value))}, but must be [^\n]*$"):
        Sampler(*values)


# --- the command line, in this process

class Input(io.TextIOWrapper):
    """Standard input of given text: a pipe, or a terminal."""

    def __init__(self, text: str, terminal: bool):
        super().__init__(io.BytesIO(text.encode()), encoding="utf-8")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., tuple[str, str]]:
    """Runs the command line on the CPU; returns what it wrote to stdout and stderr."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def command(*args: str, stdin: str = "", terminal: bool = False) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["generate.py", *args])
        monkeypatch.setattr(sys, "stdin", Input(stdin, terminal))
        program.main()
        return capsys.readouterr()
    return command


@pytest.fixture
def asked(monkeypatch) -> list[list[str]]:
    """The prompts of every call of generate() so far, as text with their special tokens."""
    calls, inner, tokenizer = [], program.generate, Tokenizer.from_file(str(TINY / "tokenizer.json"))

    def spy(model, prompts, *rest):
        calls.append([tokenizer.decode(ids, skip_special_tokens=False) for ids in prompts])
        return inner(model, prompts, *rest)

    monkeypatch.setattr(program, "generate", spy)
    return calls


@pytest.fixture
def say(monkeypatch) -> Callable[..., list[str]]:
    """Lets every answer be these words, spelt in several tokens; returns what stdout holds at each token."""
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))

    def words(text: str, cut: int = 0) -> list[str]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        script, seen = [*ids[:len(ids) - cut], STOP], []

        def sample(sampler, logits):
            seen.append(sys.stdout.getvalue())
            return torch.full((len(logits),), script[(len(seen) - 1) % len(script)])

        monkeypatch.setattr(Sampler, "__call__", sample)
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        return seen
    return words


def test_the_answer_alone_is_on_stdout(run, wide):
    command = "--image", wide, "--prompt", "What is this?", "--max-new-tokens", "12"
    expected = json.loads(run(*command, "--json")[0])["answer"]
    out, err = run(*command)
    assert out == expected + "\n"
    model, image, speed = err.splitlines()
    assert model.startswith("tiny: ") and "toy" in model and "--model meta-llama/" in model
    assert image == "image tokens 200 slots -> 100 real"
    assert re.fullmatch(r"image KV [\d.]+ k?B, encode [\d.]+ ms, prefill [\d.]+ ms, [\d.]+ tok/s, "
                        r"peak memory [\d.]+ [MG]B", speed)


def test_without_an_image_there_is_no_line_about_it(run, asked):
    out, err = run("--prompt", "What is a star?", "--max-new-tokens", "3")
    assert out.endswith("\n") and "image" not in err and "tok/s" in err
    assert "<|image|>" not in asked[0][0] and "What is a star?" in asked[0][0]


def test_json_is_one_object_with_exactly_these_keys(run, wide):
    out, _ = run("--image", wide, "--prompt", "What is this?", "--max-new-tokens", "5", "--json")
    assert out.endswith("}\n") and len(out.splitlines()) == 1
    data = json.loads(out)
    assert set(data) == JSON_KEYS
    assert data["model"] == "tiny"
    assert data["image_tokens"] == {"slots": 200, "real": 100, "kept": 100}
    assert data["pruner"] is None and data["kept_by_layer"] == [100] * 3
    assert set(data["ms"]) == {"load", "encode", "prefill", "decode"} and min(data["ms"].values()) >= 0
    assistant = Assistant("tiny", "cpu")
    assert data["answer"] == assistant.tokenizer.decode(data["token_ids"]) and len(data["token_ids"]) <= 5
    length = len(assistant.tokenizer.encode(messages("What is this?", 1)))
    costs = assistant.model.kv_bytes(rounded_up(length + 5), [(1, 2)])
    assert (data["image_kv_bytes"], data["text_kv_bytes"]) == (costs["image"], costs["text"])
    assert data["tokens_per_second"] >= 0 and data["peak_memory_bytes"] > 10_000_000


def test_json_without_an_image(run):
    data = json.loads(run("--prompt", "What is a star?", "--max-new-tokens", "2", "--json")[0])
    assert set(data) == JSON_KEYS
    assert data["image_tokens"] == {"slots": 0, "real": 0, "kept": 0} and data["image_kv_bytes"] == 0


def test_json_keeps_letters_readable(run, say):
    say("caf\u00e9 \u2603")
    run("--prompt", "What?", "--json")
    assert '"caf\u00e9 \u2603"' in sys.stdout.getvalue()


def test_several_prompts_are_a_batch(run, asked, wide):
    questions = ["What is this?", "Is the circle in the upper half of the image?"]
    command = "--image", wide, "--max-new-tokens", "8", "--dtype", "fp32"
    alone = [json.loads(run(*command, "--prompt", question, "--json")[0]) for question in questions]
    asked.clear()
    both = [argument for question in questions for argument in ("--prompt", question)]
    data = json.loads(run(*command, *both, "--json")[0])
    assert [len(prompts) for prompts in asked] == [2]
    assert set(data) == JSON_KEYS
    assert data["answer"] == [one["answer"] for one in alone]
    assert data["token_ids"] == [one["token_ids"] for one in alone]
    assert data["image_tokens"] == {**alone[0]["image_tokens"], "kept": [100, 100]}
    assert data["image_kv_bytes"] == 2 * alone[0]["image_kv_bytes"]
    assert run(*command, *both)[0] == "".join(one["answer"] + "\n" for one in alone)


def test_several_images_go_into_one_prompt(run, asked, wide, tmp_path):
    drawn(112, 336).save(tmp_path / "tall.png")
    command = "--image", wide, "--image", str(tmp_path / "tall.png"), "--max-new-tokens", "3"
    data = json.loads(run(*command, "--prompt", "Compare.", "--json")[0])
    assert data["image_tokens"] == {"slots": 400, "real": 250, "kept": 250}
    assert asked[0][0].count("<|image|>") == 2
    assert data["image_kv_bytes"] == Assistant("tiny", "cpu").model.kv_bytes(0, [(1, 2), (3, 1)])["image"]
    assert "image tokens 400 slots -> 250 real\n" in run(*command, "--prompt", "Compare.")[1]


def test_a_system_message_comes_first(run, asked):
    run("--system", "Be brief.", "--prompt", "What is a star?", "--max-new-tokens", "1")
    roles = re.findall(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\s*([^<]*)", asked[0][0])
    assert roles == [("system", "Be brief."), ("user", "What is a star?"), ("assistant", "")]


def test_the_date_is_for_templates_that_write_one(run, asked, tmp_path):
    for file in TINY.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "chat_template.jinja").write_text("{{ date_string }}: {{ messages[-1].content }}")
    date = "--date", "1 April 2024"
    _, err = run("--model", str(tmp_path), *date, "--prompt", "What?", "--max-new-tokens", "1")
    assert asked == [["<|begin_of_text|>1 April 2024: What?"]]
    assert str(tmp_path) in err and "tiny" not in err.replace(str(tmp_path), "")


def test_a_prompt_can_be_piped(run, asked, wide):
    run("--image", wide, "--max-new-tokens", "1", stdin="  Where is the\ncaf\u00e9?\n\n")
    run("--image", wide, "--max-new-tokens", "1", "--prompt", "Where is the\ncaf\u00e9?", stdin="Not this.")
    assert asked[0] == asked[1] and "Not this" not in asked[1][0]


def test_an_image_alone_is_described(run, asked, wide):
    run("--image", wide, "--max-new-tokens", "1", stdin="")
    run("--image", wide, "--max-new-tokens", "1", "--prompt", "Describe the picture.")
    assert asked[0] == asked[1]


def test_dtype_is_that_of_the_weights_and_caches(run, wide):
    command = "--image", wide, "--prompt", "What?", "--max-new-tokens", "2", "--json", "--dtype"
    sizes = {dtype: json.loads(run(*command, dtype)[0])["image_kv_bytes"] for dtype in ("fp32", "bf16")}
    assert sizes["fp32"] == 2 * sizes["bf16"] > 0


def test_sampling_from_the_command_line(run, monkeypatch):
    load = program.load_model
    monkeypatch.setattr(program, "load_model", lambda *args: randomise(
        load(*args), read_config(TINY).vision, seed=2))

    def answer(*flags: str) -> list[int]:
        command = "--prompt", "What?", "--max-new-tokens", "10", "--json", "--dtype", "fp32"
        return json.loads(run(*command, *flags)[0])["token_ids"]

    hot = "--temperature", "2", "--top-p", "1"
    assert answer(*hot, "--seed", "7") == answer(*hot, "--seed", "7") != answer(*hot, "--seed", "8")
    assert answer("--seed", "7") == answer("--seed", "8") == answer("--temperature", "2", "--top-p", "1e-9")


def test_an_answer_appears_as_it_is_made_in_whole_characters(run, say):
    seen = say("\u00e9 star \u2603!")
    run("--prompt", "What?")
    assert seen == ["", "", "\u00e9", *["\u00e9 star", "\u00e9 star ", "\u00e9 star ", "\u00e9 star "],
                    "\u00e9 star \u2603", "\u00e9 star \u2603!"]
    assert sys.stdout.getvalue() == "\u00e9 star \u2603!\n"


def test_an_answer_cut_within_a_character_still_ends(run, say):
    seen = say("ok \u2603", cut=1)
    run("--prompt", "What?")
    assert all("\ufffd" not in text for text in seen)
    assert sys.stdout.getvalue() == "ok \ufffd\n"


def test_help_fits_a_terminal_and_its_examples_exist(run, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        run("--help")
    out, err = capsys.readouterr()
    assert caught.value.code == 0 and err == ""
    lines = out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    for flag in ("--model", "--revision", "--image", "--prompt", "--system", "--date", "--max-new-tokens",
                 "--temperature", "--top-p", "--seed", "--device", "--dtype", "--json", "--prune", "--keep",
                 "--set", "--save-map", "--map"):
        assert re.search(rf"^ +{flag}\b", out, re.M), flag
    images = re.findall(r"--image (\S+\.\w+)", out)
    assert images and all((ROOT / name).is_file() for name in images), images


# --- pruning

def test_pruning_is_reported_in_words_and_numbers(run, wide):
    command = "--image", wide, "--prompt", "What is this?", "--max-new-tokens", "3", "--prune"
    prefill = "layer 0 attends to all tokens in prefill"
    _, err = run(*command, "spatial", "--keep", "0.3")
    assert f"200 slots -> 100 real -> 30 kept (spatial, keep 0.3; {prefill})\n" in err
    _, err = run(*command, "fastv", "--keep", "30")
    assert f"-> 53 kept (by layer 100 30 30; fastv, keep 30; {prefill})\n" in err
    data = json.loads(run(*command, "fastv", "--keep", "0.3", "--json")[0])
    assert data["image_tokens"] == {"slots": 200, "real": 100, "kept": 53}
    assert data["kept_by_layer"] == [100, 30, 30] and data["pruner"].startswith("fastv, keep 0.3")
    whole = json.loads(run(*command, "none", "--json")[0])
    assert data["image_kv_bytes"] * 300 == whole["image_kv_bytes"] * 160
    _, err = run(*command, "attention_predictor", "--keep", "0.5", "--set", "block=4")
    assert "image KV 63 kB of 127 kB stored, encode" in err
    _, err = run(*command, "downsample", "--keep", "0.5")
    assert "200 slots -> 100 real -> 50 kept (downsample, keep 0.5 of the tiles)\n" in err


def test_an_answer_of_the_guide_alone_is_said_so(run, wide):
    command = "--image", wide, "--prompt", "What is this?", "--prompt", "Where?", "--prune", "sgl"
    early = "--set", "threshold=-1", "--json"
    data, late = (json.loads(run(*command, *more)[0]) for more in (early, ("--json",)))
    assert data["answered_early"] == [0, 1] and late["answered_early"] == []
    assert data["image_tokens"]["kept"] == [0, 0] and data["image_kv_bytes"] == 0 < late["image_kv_bytes"]
    guide = json.loads(run(*command[:6], "--model", "guide", "--json")[0])
    assert data["answer"] == guide["answer"]
    assert "2 of 2 answered by the guide alone" in run(*command, *early[:2])[1]


def test_keep_everything_is_no_pruning(run, wide):
    command = "--image", wide, "--prompt", "What is this?", "--max-new-tokens", "8", "--json"
    expected = json.loads(run(*command)[0])
    for method in pruning.METHODS:
        data = json.loads(run(*command, "--prune", method, "--keep", "1.0")[0])
        for key in "answer", "token_ids", "image_tokens", "image_kv_bytes", "kept_by_layer":
            assert data[key] == expected[key]


def test_a_method_from_a_file_with_an_option(run, wide, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    command = "--image", wide, "--prompt", "What is this?", "--max-new-tokens", "3", "--json"
    data = json.loads(run(*command, "--prune", f"{tmp_path / 'mine.py'}:Mine", "--set", "first=7")[0])
    assert data["kept_by_layer"] == [7, 7, 7] and data["pruner"] == "mine, keep 0.5, first 7"


MINE = """
from dataclasses import dataclass
import torch
from pruning import Pruner

@dataclass
class Mine(Pruner):
    keep: float = 0.5
    first: int = 3
    def encoded(self, image, prompts):
        return image.take(torch.arange(image.coords.shape[1]).expand(len(prompts), -1) < self.first)
"""


def test_the_list_of_methods(run):
    out, err = run("--prune", "list")
    assert err == "" and all(f"{name}: " in out for name in pruning.METHODS)
    assert "arXiv 2504.00557" in out and "early_caches = trim or full" in out and "acts at: layer" in out


@pytest.mark.parametrize("kind", ["kept", "attention"])
def test_a_map_is_drawn_and_changes_nothing(run, wide, tmp_path, kind):
    command = "--image", wide, "--prompt", "What is this?", "--max-new-tokens", "6", "--json"
    prune, path = ("--prune", "trimmed_llama", "--keep", "0.2"), str(tmp_path / "map.png")
    for chosen in (), prune:
        plain = json.loads(run(*command, *chosen)[0])
        drawn = json.loads(run(*command, *chosen, "--save-map", path, "--map", kind)[0])
        assert Image.open(path).width >= 224
        for key in "answer", "token_ids", "image_tokens", "kept_by_layer", "pruner":
            assert drawn[key] == plain[key]


def test_a_full_disk_leaves_the_map_that_was_there(run, capsys, wide, tmp_path):
    path = tmp_path / "map.png"
    path.write_text("the old map")
    with full_disk(), pytest.raises(SystemExit) as stop:
        run("--image", wide, "--prompt", "What is this?", "--max-new-tokens", "2", "--save-map", str(path))
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --save-map ") and "map.png: cannot be written: " in error
    assert path.read_text() == "the old map" and list(tmp_path.iterdir()) == [path]


def test_a_chat_prunes_anew_for_every_question(run, say, wide, monkeypatch):
    say("A red circle.")
    first, later = "What is this?\n", "What is this?\nAnd where?\n"
    command = "--image", wide, "--prune", "random", "--keep", "0.2"
    for typed in first, later:
        _, err = run(*command, stdin=typed, terminal=True)
        assert err.count("-> 100 real -> 20 kept") == typed.count("\n")


# --- chat

def test_a_chat_encodes_its_images_once_and_remembers(run, asked, say, wide, monkeypatch):
    encode, encoded = LlamaVision.encode, []
    monkeypatch.setattr(LlamaVision, "encode", lambda *args: encoded.append(args) or encode(*args))
    say("A red circle.")
    _, err = run("--image", wide, stdin="What is this?\n Which colour? \nAnd where?\n", terminal=True)
    assert sys.stdout.getvalue() == "A red circle.\n" * 3
    assert len(encoded) == 1
    turns = [re.findall(r"<\|end_header_id\|>\s*([^<]*(?:<\|image\|>)?[^<]*)", prompt) for [prompt] in asked]
    first = "<|image|>What is this?"
    assert turns == [[first, ""], [first, "A red circle.", "Which colour?", ""],
                     [first, "A red circle.", "Which colour?", "A red circle.", "And where?", ""]]
    assert err.count("tiny: ") == 1 and err.count("> ") >= 4
    assert err.count("tok/s") == err.count("200 slots -> 100 real") == 3


@pytest.mark.parametrize("typed", ["Hm?\n\nNot this.\n", "Hm?\n   \nNot this.\n", "Hm?\n", "Hm?"])
def test_a_chat_ends_at_an_empty_line_or_the_end_of_input(run, asked, say, typed):
    say("Yes.")
    run(stdin=typed, terminal=True)
    assert len(asked) == 1 and sys.stdout.getvalue() == "Yes.\n"


def test_a_chat_begins_with_the_system_message(run, asked, say):
    say("Yes.")
    run("--system", "Be brief.", stdin="One?\nTwo?\n", terminal=True)
    for [prompt] in asked:
        assert prompt.startswith("<|begin_of_text|><|start_header_id|>system")
        assert prompt.count("Be brief.") == 1


def test_a_chat_goes_on_after_a_question_that_is_too_long(run, asked, say, wide):
    say("Yes.")
    _, err = run("--image", wide, stdin="star " * 3000 + "\nOne?\n", terminal=True)
    assert sys.stdout.getvalue() == "Yes.\n"
    errors = [line for line in err.splitlines() if "error: " in line]
    assert len(errors) == 1 and "context holds 2048" in errors[0]
    [prompt] = asked[-1]
    assert prompt.count("<|image|>") == 1 and "star star" not in prompt
