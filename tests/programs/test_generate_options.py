"""Stop texts, sampling and images that are no files, from the command line and from Python."""
import base64
import http.server
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from generate_helpers import TINY, command_line, drawn, refusing_checkpoint
from helpers import randomise

from generate import Assistant, Sampler
from pruning import load
from weights import read_config
from weights.image_source import images_from
from weights.tokenizer import messages

QUESTIONS = "Describe the picture.", "Is there a star?", "What is written on the circle?"


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., tuple[str, str]]:
    return command_line(monkeypatch, capsys)


@pytest.fixture(scope="module")
def rambling() -> Assistant:
    """The bundled tokenizer with random weights: it never stops, and every token is likely."""
    assistant = Assistant("tiny", "cpu", "fp32")
    randomise(assistant.model, read_config(TINY).vision, seed=2)
    return assistant


@pytest.fixture(scope="module")
def conversations() -> list[list[dict]]:
    return [messages(question, 1) for question in QUESTIONS]


# ----- stop texts


@pytest.mark.parametrize(("stop", "answer"), [("s.", "Ye"), ("es", "Y"), ("Yes", ""), (".", "Yes"),
                                              ("s.x", "Yes."), ("yes", "Yes.")])
def test_an_answer_ends_before_a_stop_text(run, say, stop, answer):
    """Printed as it is made or as JSON, alone or in a batch."""
    seen = say("Yes.")
    run("--prompt", "Hm?", "--stop", stop, "--stop", "never")
    assert sys.stdout.getvalue() == answer + "\n"
    assert all(answer.startswith(text) for text in seen)
    say("Yes.")
    run("--prompt", "Hm?", "--stop", stop, "--json")
    data = json.loads(sys.stdout.getvalue())
    assert data["answer"] == answer
    assert Assistant("tiny").tokenizer.decode(data["token_ids"]).startswith(answer)
    say("Yes.")
    run("--prompt", "Hm?", "--prompt", "And?", "--stop", stop)
    assert sys.stdout.getvalue() == f"{answer}\n" * 2


@pytest.mark.parametrize("name", [None, "mint", "sgl"])
def test_every_sequence_ends_at_its_own_stop_text(rambling, conversations, name):
    """As the same answer that is cut afterwards, with pruners too that read prompts in another way."""
    encoded = rambling.encode_images([drawn(224, 112)], keep_states=True)
    pruner = None if name is None else load(name, keep=0.5)
    free = rambling.answer(conversations, encoded, 24, pruner=pruner)
    assert free.texts == [rambling.tokenizer.decode(ids) for ids in free.tokens]
    stop = [text[7:10] for text in free.texts[:2]]
    emitted = [[] for _ in QUESTIONS]
    cut = rambling.answer(conversations, encoded, 24, pruner=pruner, stop=stop,
                          emit=lambda sequence, token: emitted[sequence].append(token))
    for text, whole, ids, seen in zip(cut.texts, free.texts, cut.tokens, emitted, strict=True):
        assert text == whole[:min(whole.find(each) if each in whole else len(whole) for each in stop)]
        decoded = rambling.tokenizer.decode(ids)
        assert decoded.startswith(text) and ids[:len(seen)] == seen and len(ids) - len(seen) <= 1
    assert cut.texts[0] != free.texts[0] and cut.texts[1] != free.texts[1]
    assert cut.decoded < free.decoded


# ----- sampling


SETTINGS = {"temperature": 0.8, "top_p": 0.95, "seed": 3, "top_k": 20, "repetition_penalty": 1.5}


@pytest.mark.parametrize(("name", "settings"), [
    (None, {"repetition_penalty": 2.0}), (None, SETTINGS), ("mint", SETTINGS), ("sgl", SETTINGS)])
def test_a_batch_samples_what_each_prompt_gives_alone(rambling, conversations, name, settings):
    encoded = rambling.encode_images([drawn(224, 112)], keep_states=True)
    pruner = None if name is None else load(name, keep=0.5)
    answers = rambling.answer(conversations, encoded, 10, Sampler(**settings), pruner=pruner).tokens
    for conversation, tokens in zip(conversations, answers, strict=True):
        alone = rambling.answer([conversation], encoded, 10, Sampler(**settings), pruner=pruner)
        assert alone.tokens == [tokens]
        assert len(set(tokens)) > 6                                     # it hardly repeats itself
    plain = rambling.answer(conversations, encoded, 10, pruner=pruner).tokens
    assert plain != answers


def test_sequences_that_the_large_model_answers_keep_their_places(rambling, conversations):
    """Some are answered by the guide alone: the penalty of the others is still that of their own prompts."""
    encoded = rambling.encode_images([drawn(224, 112)], keep_states=True)
    pruner = load("sgl", keep=0.5, threshold=0.0)
    everything = rambling.answer(conversations, encoded, 12, pruner=pruner)
    assert everything.early == [0, 1, 2]
    sure = sorted(pruner.confidence)
    pruner = load("sgl", keep=0.5, threshold=(sure[1] + sure[2]) / 2)
    sampler = {"repetition_penalty": 2.0}
    together = rambling.answer(conversations, encoded, 12, Sampler(**sampler), pruner=pruner)
    assert len(together.early) == 1
    for b, conversation in enumerate(conversations):
        alone = rambling.answer([conversation], encoded, 12, Sampler(**sampler), pruner=pruner)
        assert alone.tokens == [together.tokens[b]]


def test_sample_is_what_the_checkpoint_suggests_and_flags_win(run, monkeypatch, tmp_path):
    for file in TINY.iterdir():
        (tmp_path / file.name).symlink_to(file)
    suggested = {"eos_token_id": [638], "temperature": 0.6, "top_p": 0.8, "top_k": 7, "do_sample": True}
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").write_text(json.dumps(suggested))
    made = []
    call = Sampler.__call__
    monkeypatch.setattr(Sampler, "__call__", lambda self, logits: made.append(self) or call(self, logits))

    def sampler(*flags: str) -> Sampler:
        run("--model", str(tmp_path), "--prompt", "Hm?", "--max-new-tokens", "1", *flags)
        return made[-1]
    assert sampler() == Sampler()
    assert sampler("--sample") == Sampler(0.6, 0.8, top_k=7)
    assert sampler("--sample", "--top-p", "0.5", "--top-k", "0", "--seed", "4") == Sampler(0.6, 0.5, 4, 0)
    assert sampler("--sample", "--temperature", "0") == Sampler(0, 0.8, top_k=7)
    assert sampler("--temperature", "2", "--top-k", "3") == Sampler(2.0, 0.9, top_k=3)


# ----- images that are no files


@pytest.fixture
def site(tmp_path, monkeypatch):
    """The address of a server of the files in a folder."""
    class Files(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *_):
            """Say nothing."""

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_image_by_url_as_data_and_from_standard_input(run, site, tmp_path):
    drawn(224, 112).save(tmp_path / "wide.png")
    data = (tmp_path / "wide.png").read_bytes()
    question = "--prompt", "What is this?", "--max-new-tokens", "4"
    expected = run("--image", str(tmp_path / "wide.png"), *question)[0]
    assert run("--image", f"{site}/wide.png", *question)[0] == expected
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    assert run("--image", uri, *question)[0] == expected
    assert run("--image", "-", *question, stdin=data)[0] == expected


def test_an_image_alone_on_standard_input_is_described(run, asked, tmp_path):
    drawn(224, 112).save(tmp_path / "wide.png")
    run("--image", "-", "--max-new-tokens", "1", stdin=(tmp_path / "wide.png").read_bytes())
    assert "<|image|>Describe the picture." in asked[0][0]


def test_a_map_may_be_of_an_image_that_is_no_file(run, site, tmp_path):
    drawn(224, 112).save(tmp_path / "wide.png")
    made = Path(tmp_path / "map.png")
    run("--image", f"{site}/wide.png", "--prompt", "What?", "--max-new-tokens", "1", "--prune", "coreset",
        "--save-map", str(made))
    assert images_from([str(made)])[0].size[0] > 0


@pytest.mark.parametrize("flags", [(), ("--json",), ("--prompt", "And?")])
def test_a_system_message_that_is_refused_beside_an_image_is_folded(run, asked, wide, tmp_path, flags):
    command = ("--model", refusing_checkpoint(tmp_path), "--system", "Be brief.", "--prompt", "This?",
               "--max-new-tokens", "1")
    assert "refuses a system message" not in run(*command, *flags)[1]
    assert "system<|end_header_id|>\n\nBe brief.<|eot_id|>" in asked[-1][0]
    _, err = run(*command, *flags, "--image", wide)
    assert err.count("refuses a system message beside an image") == 1
    assert "user<|end_header_id|>\n\n<|image|>Be brief.\n\nThis?<|eot_id|>" in asked[-1][0]
