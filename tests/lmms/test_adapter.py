"""The adapter in this process: what requests of lmms-eval become, and what is refused."""
import json
from types import SimpleNamespace

import pytest
from helpers import refused
from lmms_eval.models import get_model
from PIL import Image

from evaluation.lmms.adapter import TrimmedLlama, listed, parse_batch
from evaluation.lmms.questions import Limits
from generate import messages
from scenes.draw import draw, make_scene

SCENES = [draw(make_scene("test", i)) for i in range(3)]
DOCUMENTS = [[SCENES[0]], [], [SCENES[1], SCENES[2]], None, [SCENES[2].convert("RGBA")]]
GREEDY = {"max_new_tokens": 4, "temperature": 0, "do_sample": False, "until": ["\n\n"]}


def made(tmp_path, **arguments) -> TrimmedLlama:
    adapter = TrimmedLlama(record=str(tmp_path / "kept.jsonl"), **arguments)
    adapter.task_dict = {"a": {"test": DOCUMENTS}, "b": {"test": DOCUMENTS}}
    return adapter


def request(doc_id: int, task: str = "a", visuals=lambda document: document, **options) -> SimpleNamespace:
    return SimpleNamespace(args=("What is this?", {**GREEDY, **options}, visuals, doc_id, task, "test"))


def test_lmms_eval_finds_the_adapter_by_its_name():
    assert get_model("trimmed_llama") is TrimmedLlama


def test_requests_of_several_images_one_or_none_in_one_batch(tmp_path):
    adapter = made(tmp_path, prune="coreset", keep=0.25, batch_size="8")
    requests = [request(i) for i in range(5)] + [request(0, "b", max_new_tokens=2), request(1, "b")]
    texts = [result.text for result in adapter.generate_until(requests)]
    for one, text in zip(requests, texts, strict=True):
        images = DOCUMENTS[one.args[3]] or []
        encoded = adapter.assistant.encode_images([image.convert("RGB") for image in images])
        answer = adapter.assistant.answer([messages("What is this?", len(images))], encoded,
                                          one.args[1]["max_new_tokens"], pruner=adapter.pruner)
        assert text == answer.texts[0]
    lines = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()[1:]]
    assert [(line["task"], line["doc_id"]) for line in lines] == [one.args[4:2:-1] for one in requests]
    assert [bool(line["kept"]) for line in lines] == [True, False, True, False, True, True, False]


def test_no_more_is_answered_than_is_asked_for(tmp_path):
    """lmms-eval stores an answer when it asks for the next one; by then it is recorded."""
    answers = made(tmp_path, batch_size=2).generate_until([request(i) for i in (0, 2, 4, 0)])
    next(answers)
    assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == 1 + 2
    next(answers), next(answers)
    assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == 1 + 3     # document 0 is there already


@pytest.mark.parametrize(("options", "limits"), [
    ({}, Limits(1024)), ({"until": "x", "max_new_tokens": 9}, Limits(9)),
    ({"do_sample": True, "temperature": 0.5, "top_p": 0.8}, Limits(1024, (), 0.5, 0.8)),
    ({"do_sample": False, "temperature": 0.5, "top_p": None}, Limits(1024))])
def test_what_generation_kwargs_mean(tmp_path, options, limits):
    assert made(tmp_path).limits(options, "a") == limits


def test_stop_texts_are_obeyed_where_asked(tmp_path):
    adapter = made(tmp_path, obey_until=True)
    assert adapter.limits({"until": ["\n\n", "", "ASSISTANT:"]}, "a").stop == ("\n\n", "ASSISTANT:")


@pytest.mark.parametrize(("bad", "words"), [
    (request(0, num_beams=4), "no beam search"),
    (request(0, visuals=lambda document: ["clip.mp4"]), "str is no")])
def test_what_cannot_be_asked_is_refused(tmp_path, bad, words):
    with refused(words, ["a, document 0"]):
        next(made(tmp_path).generate_until([bad]))


def test_what_cannot_be_an_argument_is_refused(monkeypatch, tmp_path):
    with refused("--batch_size is 'auto'"):
        parse_batch("auto")
    with refused("name it with --prune"):
        TrimmedLlama(keep=0.5)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused("one process", ["device=cuda:0"]):
        TrimmedLlama()


def test_lists_stand_in_brackets():
    assert listed("[cuda:0, cuda:1]") == ["cuda:0", "cuda:1"]
    assert listed("cpu") == ["cpu"] and listed(None) == []


def test_images_with_alpha_are_read_as_from_files(tmp_path):
    clear = Image.new("RGBA", (112, 112), (0, 0, 0, 0))
    adapter = made(tmp_path)
    adapter.task_dict["a"]["test"] = [[clear]]
    question = adapter.question(*request(0).args)
    assert question.images[0].getpixel((0, 0)) == (255, 255, 255)
