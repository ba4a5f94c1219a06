"""Everything that the command line of generate.py promises, without pruning and chat.

It runs on the bundled checkpoint, mostly inside this process. Tests of what is printed replace the sampler
by a script.
"""
import json
import re
import sys
from collections.abc import Callable

import pytest
from generate_helpers import JSON_KEYS, TINY, command_line, drawn
from helpers import randomise

import generate as program
from generate import Assistant
from model.cache import rounded_up
from weights import read_config
from weights.tokenizer import messages


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., tuple[str, str]]:
    return command_line(monkeypatch, capsys)


def test_the_answer_alone_is_on_stdout(run, wide):
    command = "--image", wide, "--prompt", "What is this?", "--max-new-tokens", "12"
    expected = json.loads(run(*command, "--json")[0])["answer"]
    out, err = run(*command)
    assert out == expected + "\n"
    *_, model, image, speed = err.splitlines()          # before them, perhaps, how this CPU computes
    assert model.startswith("tiny: ") and "toy" in model and "--model meta-llama/" in model
    assert image == "image tokens 200 slots -> 100 real"
    assert re.fullmatch(r"image KV [\d.]+ k?B, encode [\d.]+ ms, prefill [\d.]+ ms, [\d.]+ tok/s, "
                        r"peak memory [\d.]+ [MG]B( and [\d.]+ [MG]B of mapped files)?", speed)


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
    monkeypatch.setattr(program, "load_model", lambda *args, **named: randomise(
        load(*args, **named), read_config(TINY).vision, seed=2))

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
