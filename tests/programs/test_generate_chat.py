"""The chat of generate.py, on the bundled checkpoint; a script replaces the sampler."""
import re
import sys
from collections.abc import Callable

import pytest
from generate_helpers import command_line

from model.llama_vision import LlamaVision


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., tuple[str, str]]:
    return command_line(monkeypatch, capsys)


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
