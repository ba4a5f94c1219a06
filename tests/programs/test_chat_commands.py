"""The commands of the chat, on the bundled checkpoint; a script replaces the sampler."""
import re
import sys
from collections.abc import Callable
from itertools import takewhile

import pytest
import torch
from generate_helpers import STOP, TINY, command_line, drawn, refusing_checkpoint
from tokenizers import Tokenizer

from cli.chat import HELP, completed
from model.llama_vision import LlamaVision
from model.sampling import Sampler

TURN = re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\s*((?:<\|image\|>)*[^<]*)")


@pytest.fixture
def chat(monkeypatch, capsys, say, asked) -> Callable[..., list[str]]:
    """What a chat of these lines says on stderr, line by line, without its prompts; answers are "Yes.", or
    what another sampler makes."""
    run = command_line(monkeypatch, capsys)

    def typed(*lines: str, args: tuple[str, ...] = (), sample: Callable | None = None) -> list[str]:
        say("Yes.")
        if sample is not None:
            monkeypatch.setattr(Sampler, "__call__", sample)
        _, err = run(*args, stdin="\n".join(lines) + "\n", terminal=True)
        return [line.removeprefix("> ") for line in err.splitlines()]
    return typed


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many images each call of `encode` was given."""
    encode, counts = LlamaVision.encode, []

    def spy(model, tiles, *rest):
        counts.append(len(tiles[0]))
        return encode(model, tiles, *rest)
    monkeypatch.setattr(LlamaVision, "encode", spy)
    return counts


@pytest.fixture
def interrupts(monkeypatch) -> Callable[[type, str, int], None]:
    """Lets call number n of a method be interrupted by Ctrl-C."""
    def interrupt(owner: type, method: str, number: int):
        inner, calls = getattr(owner, method), []

        def call(*args):
            calls.append(args)
            if len(calls) == number:
                raise KeyboardInterrupt
            return inner(*args)
        monkeypatch.setattr(owner, method, call)
    return interrupt


@pytest.fixture
def tall(tmp_path) -> str:
    drawn(112, 336).save(tmp_path / "tall one.png")
    return str(tmp_path / "tall one.png")


def turns(asked: list[list[str]]) -> list[tuple[str, str]]:
    """The last conversation, without the empty turn of its answer."""
    return TURN.findall(asked[-1][0])[:-1]


def costs(err: list[str]) -> list[str]:
    """The lines that say what became of the image tokens."""
    return [line for line in err if re.match(r"image tokens \d", line)]


def said(err: list[str], words: str) -> int:
    """How many lines begin with these words."""
    return sum(line.startswith(words) for line in err)


def test_an_image_in_a_later_turn(chat, asked, encoded, wide, tall):
    err = chat("One?", f"/image {tall}", f"/image {wide}", "Two?", "Three?", args=("--image", wide))
    assert encoded == [1, 1, 1]
    assert turns(asked) == [("user", "<|image|>One?"), ("assistant", "Yes."),
                            ("user", "<|image|><|image|>Two?"), ("assistant", "Yes."), ("user", "Three?")]
    assert said(err, "image 2: 112 x 336 pixels, 150 image tokens, encode ") == 1
    assert said(err, "image 3: 224 x 112 pixels, 100 image tokens, encode ") == 1
    assert costs(err) == ["image tokens 200 slots -> 100 real",
                     *["image tokens 600 slots -> 350 real -> 250 in sight"] * 2]


def test_images_before_the_first_question_are_one_group(chat, asked, wide, tall):
    err = chat(f"/image {tall}", "Compare.", args=("--image", wide))
    assert turns(asked) == [("user", "<|image|><|image|>Compare.")]
    assert "image tokens 400 slots -> 250 real" in err


def test_a_chat_without_an_image_gets_one(chat, asked, wide):
    chat("Hi?", f"/image {wide}", "And this?")
    assert turns(asked)[0] == ("user", "Hi?") and turns(asked)[-1] == ("user", "<|image|>And this?")


@pytest.mark.parametrize("spelt", ["{}", "'{}'", '"{}"', "escaped"])
def test_paths_as_they_are_typed_or_dropped(chat, asked, tall, spelt):
    chat("/image " + (tall.replace(" ", "\\ ") if spelt == "escaped" else spelt.format(tall)), "This?")
    assert turns(asked) == [("user", "<|image|>This?")]


def test_a_path_may_begin_at_home(chat, asked, tall, monkeypatch):
    monkeypatch.setenv("HOME", tall.rpartition("/")[0])
    chat("/image ~/tall one.png", "/image ~/tall\\ one.png", "This?")
    assert turns(asked) == [("user", "<|image|><|image|>This?")]


def test_clear_forgets_what_was_said_and_shown(chat, asked, encoded, wide, tall):
    args = "--image", wide, "--system", "Be brief."
    err = chat("One?", f"/image {tall}", "Two?", "/clear", "Three?", args=args)
    assert turns(asked) == [("system", "Be brief."), ("user", "<|image|>Three?")]
    assert encoded == [1, 1] and "forgotten; what remains: the system message and 1 image" in err
    assert costs(err)[-1] == "image tokens 200 slots -> 100 real"
    chat("One?", f"/image {wide}", "Two?", "/clear", "Three?")
    assert turns(asked) == [("user", "Three?")]


def test_prune_from_here_on(chat, encoded, wide, tall):
    err = chat("One?", "/prune fastv 0.25 full_layers=2", "Two?", "/prune", "/prune off", "/prune", "Three?",
               args=("--image", wide))
    assert encoded == [1]
    first, second, third = costs(err)
    assert first == third == "image tokens 200 slots -> 100 real"
    assert re.fullmatch(r".* -> 75 kept \(by layer 100 100 25; fastv, keep 0.25, full_layers 2.*", second)
    assert said(err, "image tokens are pruned from here on: fastv, keep 0.25, full_layers 2") == 2
    assert said(err, "all image tokens are kept") == 2
    assert said(err, "all image tokens are kept; the methods are none, coreset") == 1


def test_a_method_that_acts_early_encodes_all_images_anew(chat, encoded, wide, tall):
    err = chat(f"/image {tall}", "One?", "/prune downsample 0.5", "Two?", "/clear", "Three?", "/prune off",
               "Four?", args=("--image", wide))
    assert encoded == [1, 1, 1, 1, 1, 0]        # the last: no later image is left
    assert [re.sub(" kept.*", "", line) for line in costs(err)] == [
                     "image tokens 400 slots -> 250 real", "image tokens 400 slots -> 250 real -> 150",
                     "image tokens 200 slots -> 100 real -> 50", "image tokens 200 slots -> 100 real"]


def test_ctrl_c_stops_the_answer_and_keeps_what_it_said(chat, asked, wide):
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    script = [*tokenizer.encode("Yes.", add_special_tokens=False).ids, STOP]
    draws = iter([*script[:2], None, *script, *script])

    def sample(sampler, logits):
        if (token := next(draws)) is None:
            raise KeyboardInterrupt
        return torch.tensor([token])
    err = chat("One?", "Two?", args=("--image", wide), sample=sample)
    assert sys.stdout.getvalue() == "Yes\nYes.\n"
    assert turns(asked) == [("user", "<|image|>One?"), ("assistant", "Yes"), ("user", "Two?")]
    assert said(err, "stopped; what it said until here stays") == len(costs(err)) == 1


def test_ctrl_c_before_an_answer_forgets_the_question(chat, asked, wide, interrupts):
    interrupts(LlamaVision, "prefill", 1)
    err = chat("One?", "Two?", args=("--image", wide))
    assert turns(asked) == [("user", "<|image|>Two?")] and sys.stdout.getvalue() == "Yes.\n"
    assert said(err, "stopped; this question is forgotten") == 1


def test_ctrl_c_while_an_image_is_encoded(chat, asked, wide, tall, interrupts):
    interrupts(LlamaVision, "encode", 2)
    err = chat(f"/image {tall}", "One?", args=("--image", wide))
    assert turns(asked) == [("user", "<|image|>One?")] and said(err, "stopped") == 1
    assert costs(err) == ["image tokens 200 slots -> 100 real"]


@pytest.mark.parametrize(("line", "words"), [
    ("/imagine x.png", "there is no command '/imagine', only /image, /prune, /clear, /help, /quit;"),
    ("/", "there is no command '/'"), ("/image", "/image needs the PATH"),
    ("/image none.png", "none.png: no such file"), ("/image .", ".: a folder"),
    ("/image 'none.png", "'none.png: no such file"), ("/image -", "standard input: nothing is piped in"),
    ("/image data:,x", "data:,x: not an image"), ("/image a\0b", "a\\x00b: no possible path"),
    ("/prune fast 0.5", "there is no pruning method 'fast'"), ("/prune fastv 2.0", "keep is 2.0"),
    ("/prune fastv 0.5 0.5", "write /prune METHOD KEEP"), ("/prune off 0.5", "write /prune METHOD KEEP"),
    ("/prune fastv x=1", "no option 'x'"), ("/prune nowhere.py:Mine", "no such file"),
])
def test_what_is_wrong_gets_one_line_and_the_chat_goes_on(chat, asked, line, words):
    err = chat(line, "Hm?")
    errors = [line for line in err if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0]
    assert turns(asked) == [("user", "Hm?")]


def test_help_and_questions_that_begin_with_a_slash(chat, asked):
    err = chat("/help", "//image is what?")
    assert turns(asked) == [("user", "/image is what?")]
    for command in "/image PATH", "/prune METHOD", "/clear", "//TEXT":
        assert said(err, command) == 1
    assert max(map(len, HELP.splitlines())) <= 80


def test_quit_ends_the_chat(chat, asked):
    err = chat("One?", "/quit", "Two?")
    assert len(asked) == 1 and said(err, "error") == 0


def test_tab_completes_commands_methods_and_paths(tall, monkeypatch):
    def lines(typed: str) -> list[str]:
        return list(takewhile(bool, (completed(typed, number) for number in range(30))))
    folder = tall.rpartition("/")[0]
    monkeypatch.setenv("HOME", folder)
    assert lines("/i") == ["/image "] and len(lines("/")) == 5
    assert lines("/prune trim") == ["/prune trimmed_llama "] and "/prune coreset " in lines("/prune ")
    assert lines(f"/image {folder}/ta") == lines("/image ~/ta") == [f"/image {tall}"]
    assert lines(f"/image {folder}") == [f"/image {folder}/"]
    assert lines("") == lines("Is this a") == lines("/clear x") == lines(f"/image {folder}/[a-z]") == []


def test_stop_texts_end_every_answer(chat, asked):
    chat("One?", "Two?", args=("--stop", "s."))
    assert sys.stdout.getvalue().startswith("Ye\n")
    assert turns(asked)[1] == ("assistant", "Ye")


def test_a_system_message_that_is_refused_beside_an_image_is_folded(chat, asked, wide, tmp_path):
    args = "--system", "Be brief.", "--model", refusing_checkpoint(tmp_path)
    err = chat("Hi?", f"/image {wide}", "This?", "That?", args=args)
    assert TURN.findall(asked[0][0])[:-1] == [("system", "Be brief."), ("user", "Hi?")]
    assert turns(asked) == [("user", "Be brief.\n\nHi?"), ("assistant", "Yes."), ("user", "<|image|>This?"),
                            ("assistant", "Yes."), ("user", "That?")]
    assert said(err, "the chat template refuses a system message beside an image") == 1
