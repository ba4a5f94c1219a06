"""generate.py --guard and Assistant.judge. What the guard says is put into its mouth by a pruner."""
import json
import shutil
from collections.abc import Callable

import pytest
from generate_helpers import JSON_KEYS, ROOT, TINY, command_line

from generate import Assistant
from pruning import load
from weights.guard import Verdict
from weights.image_file import open_image
from weights.policy import Policy
from weights.tokenizer import messages

PUBLISHED = ROOT / "tests" / "weights" / "data" / "llama_guard_3_vision" / "chat_template.json"
SAYS = """
from pruning import Pruner

class Says(Pruner):
    said = {0}

    def begin(self, model):
        self.step = 0

    def logits(self, logits):
        for sequence, tokens in enumerate(self.said):
            logits[sequence, tokens[min(self.step, len(tokens) - 1)]] = 1e4
        self.step += 1
        return logits
"""
UNSAFE = {"S1": "Violent Crimes.", "S10": "Hate."}


@pytest.fixture(scope="module")
def guard_folder(tmp_path_factory):
    folder = shutil.copytree(TINY, tmp_path_factory.mktemp("guard") / "guard")
    shutil.copy(PUBLISHED, folder)
    return str(folder)


@pytest.fixture(scope="module")
def assistant(guard_folder):
    return Assistant(guard_folder, device="cpu")


@pytest.fixture
def says(assistant, tmp_path) -> Callable[..., str]:
    """The --prune of a method with which the answers are these texts."""
    def method(*texts: str) -> str:
        encoded = [assistant.tokenizer.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        tokens = [[*ids, assistant.tokenizer.stop_ids[-1]] for ids in encoded]
        (tmp_path / "says.py").write_text(SAYS.format(tokens), encoding="utf-8")
        return f"{tmp_path / 'says.py'}:Says"
    return method


@pytest.fixture
def run(monkeypatch, capsys, guard_folder, wide) -> Callable[..., tuple[str, str]]:
    command = command_line(monkeypatch, capsys)
    return lambda *args: command("--model", guard_folder, "--guard", "--image", wide, "--keep", "0.9", *args)


@pytest.mark.parametrize("said, line", [
    ("\n\nsafe", "safe\n"), ("\n\nunsafe\nS1,S10", "unsafe: S1 Violent Crimes, S10 Hate\n")])
def test_a_verdict_is_one_line(run, says, said, line):
    out, err = run("--prompt", "What is this?", "--prune", says(said))
    assert out == line and "image tokens" in err and "model " in err


def test_a_batch_has_a_line_each(run, says):
    prompts = "--prompt", "One?", "--answer", "Yes.", "--prompt", "Two?", "--answer", "No."
    out, _ = run(*prompts, "--prune", says("safe", "unsafe\nS2"))
    assert out == "safe\nunsafe: S2 Non-Violent Crimes\n"
    data = json.loads(run(*prompts, "--json", "--prune", says("safe", "unsafe\nS2"))[0])
    assert data["safe"] == [True, False] and data["answer"] == ["safe", "unsafe\nS2"]
    assert data["categories"] == [{}, {"S2": "Non-Violent Crimes."}]


def test_json_of_one_verdict(run, says):
    data = json.loads(run("--prompt", "What?", "--json", "--prune", says("unsafe\nS1,S10"))[0])
    assert data.keys() == JSON_KEYS | {"safe", "categories"}
    assert data["safe"] is False and data["categories"] == UNSAFE and data["answer"] == "unsafe\nS1,S10"


def test_what_is_judged_and_by_what(run, says, monkeypatch):
    asked = []
    encode = Assistant.answer
    monkeypatch.setattr(Assistant, "answer", lambda self, conversations, *args, **options: (
        asked.append((conversations, options["policy"])), encode(self, conversations, *args, **options))[1])
    run("--prompt", "What?", "--answer", "A star.", "--category", "A: Stars: all.", "--category", "B:Circles",
        "--exclude-category", "B", "--prune", says("safe"))
    (conversations, policy), = asked
    assert conversations == [[*messages("What?", 1), {"role": "assistant", "content": "A star."}]]
    assert policy == Policy({"A": "Stars: all.", "B": "Circles"}, ["B"])


def test_own_categories_are_named(run, says):
    own = "--category", "A: Stars.", "--category", "B: Circles."
    assert run("--prompt", "?", *own, "--prune", says("unsafe\nB,S1"))[0] == "unsafe: B Circles, S1\n"


def test_judge_returns_verdicts(assistant, says, wide):
    encoded = assistant.encode_images([open_image(wide)])
    turns = [*messages("What?", 1), {"role": "assistant", "content": "A star."}]
    pruner = load(says("safe", "unsafe\nS1,S10"), keep=0.9)
    verdicts = assistant.judge([messages("What?", 1), turns], encoded, pruner=pruner)
    assert verdicts == [Verdict(True, {}), Verdict(False, UNSAFE)]
    policy = Policy({"S1": "Stars."})
    verdicts = assistant.judge([turns], encoded, policy, load(says("unsafe\nS1"), keep=0.9))
    assert verdicts == [Verdict(False, {"S1": "Stars."})]
    with pytest.raises(ValueError, match="neither safe nor unsafe"):
        assistant.judge([turns], encoded)               # the bundled model knows nothing of this


def test_text_alone_is_judged_too(assistant):
    with pytest.raises(ValueError, match="neither safe nor unsafe"):
        assistant.judge([messages("What?")], assistant.encode_images([]))
    with pytest.raises(ValueError, match="take a guard"):
        Assistant(str(TINY), device="cpu").judge([messages("What?")], assistant.encode_images([]))
