"""What the desk says is what the command line prints, and nobody's question disturbs another one."""
import json
import sys
from contextlib import closing
from threading import Event, Thread

import pytest
from PIL import Image

import generate
from cli.ask import arguments, ask
from evaluation.exam import make_exam
from model.layers import untracked
from page.desk import Asked, Desk, Left, follow
from pruning import METHODS as EVERY_METHOD
from pruning.pruner import Wrapper
from pruning.recorder import Recorder
from scenes.draw import draw
from weights.image_file import open_image

METHODS = ("coreset", 0.1), ("trimmed_llama", 0.25), ("downsample", 0.5), ("visionzip", 0.05), ("sgl", 0.4)
OF_THE_MACHINE = "ms", "tokens_per_second", "peak_memory_bytes", "mapped_memory_bytes"


@pytest.fixture(scope="module")
def assistant():
    return generate.Assistant("tiny")


@pytest.fixture(scope="module")
def desk(assistant):
    return Desk(assistant)


@pytest.fixture(scope="module")
def exam(tmp_path_factory) -> list[tuple[str, str]]:
    """20 questions: the path of an image, and the text."""
    folder = tmp_path_factory.mktemp("scenes")
    asked = []
    for i, (scene, questions) in enumerate(make_exam(20)):
        path = str(folder / f"{i}.png")
        draw(scene).save(path)
        asked += [(path, question.text) for question in questions]
    return asked


@pytest.fixture
def printed(assistant, monkeypatch, capsys):
    """What `generate.py --json` prints, with the same weights."""
    def command(*argv: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["generate.py", *argv, "--json"])
        ask(lambda *args, **options: assistant, arguments())
        return json.loads(capsys.readouterr().out)
    return command


def last(growing) -> Asked:
    *_, asked = growing
    return asked


def counted(figures: dict) -> dict:
    """Figures that are the same on every machine at any time."""
    return {name: value for name, value in figures.items() if name not in OF_THE_MACHINE}


@pytest.mark.parametrize(("method", "keep"), METHODS)
def test_figures_are_those_of_the_command_line(desk, exam, printed, method, keep):
    assert len(exam) == 20
    before = None
    for path, question in exam:
        before = asked = last(desk.ask(open_image(path), question, method, keep, before=before))
        line = "--image", path, "--prompt", question
        pairs = [(asked.pruned, printed(*line, "--prune", method, "--keep", str(keep)))]
        if method in ("coreset", "visionzip"):          # as they are encoded without states, and with them
            pairs.append((asked.full, printed(*line)))
        for said, expected in pairs:
            assert counted(said.figures) == counted(expected)
            assert said.text == expected["answer"]
            assert [word.token for word in said.words] == expected["token_ids"]
            assert said.figures["ms"].keys() == expected["ms"].keys()


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_every_method_can_be_asked(desk, exam, method):
    """At both ends of the slider; watched, too."""
    image = open_image(exam[0][0])
    for keep in 0.02, 1.0:
        asked = last(desk.ask(image, exam[0][1], method, keep))
        kept, full = (said.figures["image_tokens"]["kept"] for said in (asked.pruned, asked.full))
        assert kept <= full == 50
        if keep == 1.0:
            assert asked.pruned.text == asked.full.text
        desk.again(asked, Recorder, pruned=True)


def test_an_answer_grows_and_ends(desk, exam):
    seen = list(desk.ask(open_image(exam[0][0]), "Describe the picture.", "coreset", 0.5))
    for earlier, later in zip(seen, seen[1:], strict=False):
        for name in "full", "pruned":
            was, now = getattr(earlier, name), getattr(later, name)
            assert was is None or now.text.startswith(was.text)
        assert not earlier.done
    assert seen[-1].done and seen[-1].doing == "" and seen[-1].full.text.count(" ") > 2


def test_it_says_what_is_being_done(desk, exam):
    said = []
    asked = Asked(open_image(exam[0][0]), exam[0][1], "coreset", 0.5)
    desk.answer(asked, lambda now: said.append(now.doing))
    assert any(words.startswith("encoding ") and " of " in words for words in said)
    assert any(words.startswith("reading the prompt, layer ") for words in said)
    assert said.count("answering") >= 2 and said[-1] == ""


def test_the_same_image_is_encoded_once(desk, exam, monkeypatch):
    image = open_image(exam[0][0])
    first = last(desk.ask(image, "How many shapes are there?", "coreset", 0.5))
    again = last(desk.ask(image, "Is there a sign?", "fastv", 0.5, before=first))
    other = last(desk.ask(image.copy(), "Is there a sign?", "fastv", 0.5, before=first))
    assert again.encoded is first.encoded and other.encoded is not first.encoded
    assert counted(again.pruned.figures) == counted(other.pruned.figures)
    states = last(desk.ask(image, "Is there a sign?", "visionzip", 0.5, before=first))
    assert first.encoded.tokens.states is None and states.encoded.tokens.states is not None


# ----- refusals


@pytest.mark.parametrize(("image", "question", "method", "keep", "words"), [
    (None, "What?", "coreset", 0.5, "there is no image yet"),
    (Image.new("RGB", (9, 9)), " \n", "coreset", 0.5, "the question is empty"),
    (Image.new("RGB", (9, 9)), None, "coreset", 0.5, "the question is empty"),
    (Image.new("RGB", (9, 9)), "x" * 4001, "coreset", 0.5, "4,001 characters"),
    (Image.new("RGB", (9, 9)), "What?", "corset", 0.5, "there is no pruning method 'corset'"),
    (Image.new("RGB", (9, 9)), "What?", "coreset", 0.0, "keep is 0.0"),
])
def test_what_cannot_be_asked_is_refused_at_once(desk, image, question, method, keep, words):
    with pytest.raises(ValueError, match=words):
        desk.ask(image, question, method, keep)


def test_errors_of_the_answer_reach_whoever_asked(desk, exam):
    image = open_image(exam[0][0])
    with pytest.raises(ValueError, match="full_layers is 9"):
        last(desk.ask(image, "Is there a sign?", "fastv", 0.5, {"full_layers": 9}))
    with pytest.raises(ValueError, match="context"):
        last(desk.ask(image, "Is there a sign?", "fastv", 0.5, max_new_tokens=3000))
    assert last(desk.ask(image, "Is there a sign?", "fastv", 0.5)).done


# ----- several visitors


def test_who_leaves_ends_the_answer(desk, exam):
    def leave_at_the_first_word(asked: Asked):
        if asked.full is not None and asked.full.words:
            raise Left

    asked = Asked(open_image(exam[0][0]), "Describe the picture.", "coreset", 0.5)
    with pytest.raises(Left):
        desk.answer(asked, leave_at_the_first_word)
    assert len(asked.full.words) == 1 and asked.pruned is None
    model = desk.assistant.model
    assert model.language_model.track is model.vision_model.track is untracked and not desk.lock.locked()


def test_closing_the_iterator_ends_the_work():
    ended = Event()

    def work(push):
        try:
            while True:
                push(Asked(None, "?", "coreset", 0.5))
                ended.wait(0.001)
        finally:
            ended.set()

    with closing(follow(work)) as growing:
        next(growing)
        assert not ended.is_set()
    assert ended.wait(10)


def test_without_news_the_last_one_comes_again():
    asked, released = Asked(None, "?", "coreset", 0.5), Event()

    def work(push):
        push(asked)
        released.wait(10)

    growing = follow(work)
    assert next(growing) is asked and next(growing) is asked
    released.set()
    assert all(later is asked for later in growing)


def test_two_at_once_get_their_own_answers(desk, exam):
    alone = [last(desk.ask(open_image(path), text, "coreset", 0.1)) for path, text in exam[:6]]
    together: dict[int, Asked] = {}

    def visit(i: int):
        path, text = exam[i]
        together[i] = last(desk.ask(open_image(path), text, "coreset", 0.1))

    threads = [Thread(target=visit, args=[i]) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, expected in enumerate(alone):
        assert counted(together[i].full.figures) == counted(expected.full.figures)
        assert counted(together[i].pruned.figures) == counted(expected.pruned.figures)


def test_who_waits_is_told(desk, exam):
    said = []
    asked = Asked(open_image(exam[0][0]), exam[0][1], "coreset", 0.5)
    heard = Event()

    def push(now: Asked):
        said.append(now.doing)
        heard.set()

    with desk.lock:
        waiting = Thread(target=desk.answer, args=[asked, push])
        waiting.start()
        assert heard.wait(10)
    waiting.join()
    assert said[0] == "waiting for the answer of somebody else" and said[-1] == ""


# ----- watched once more


@pytest.mark.parametrize(("method", "keep"), METHODS)
def test_a_watched_answer_is_the_same(desk, exam, method, keep):
    asked = last(desk.ask(open_image(exam[0][0]), exam[0][1], method, keep))
    recorder = desk.again(asked, Recorder, pruned=True)
    assert sum(kv.coords.shape[-2] for kv in recorder.image_kv) > 0
    full = desk.again(asked, Recorder, pruned=False)
    assert {kv.coords.shape[-2] for kv in full.image_kv} == {asked.full.figures["image_tokens"]["real"]}


def test_who_watches_may_not_change_anything(desk, exam):
    class Meddler(Wrapper):
        def logits(self, logits):
            return -logits

    asked = last(desk.ask(open_image(exam[0][0]), exam[0][1], "coreset", 0.5))
    with pytest.raises(RuntimeError, match="another one"):
        desk.again(asked, Meddler, pruned=True)
