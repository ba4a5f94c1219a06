"""`generate.py --jsonl`: answers equal single ones; stopping and going on; odd lines; what is in memory."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
from generate_helpers import ROOT, command_line, drawn
from odd_lines import ODD

import generate
from cli import question_file
from cli.question_file import AnswerFile, parsed
from generate import Assistant
from pruning import load
from weights.image_file import open_image
from weights.tokenizer import messages

EXAMPLES = ROOT / "examples"
LINES = [{"id": 1, "image": "shapes.png", "prompt": "What is written on the circle?"},
         {"id": "two", "image": ["tall.png", "wide.png"], "prompt": "What does the sign say?"},
         {"id": 3, "prompt": "Hm?", "system": "Answer.", "max_new_tokens": 2},
         {"id": "3", "image": "shapes.png", "prompt": "Describe the picture.", "max_new_tokens": 5},
         {"id": -5, "image": "shapes.png", "prompt": "Describe the picture.", "expected": "ignored"}]


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., tuple[str, str]]:
    return command_line(monkeypatch, capsys)


@pytest.fixture
def folder(tmp_path) -> Path:
    """With links to the examples, and a file of questions about them."""
    for image in EXAMPLES.glob("*.png"):
        (tmp_path / image.name).symlink_to(image)
    written(tmp_path / "questions.jsonl", *LINES)
    return tmp_path


def written(path: Path, *lines: dict | bytes):
    path.write_bytes(b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n"
                              for line in lines))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def flags(folder: Path, *others: str) -> list[str]:
    return ["--jsonl", str(folder / "questions.jsonl"), "--out", str(folder / "answers.jsonl"), *others]


def code_of(run, *args: str, **named) -> int:
    """The exit code where it is not 0."""
    with pytest.raises(SystemExit) as end:
        run(*args, **named)
    return end.value.code


# ----- what is written


@pytest.mark.parametrize(("batch", "method"), [(2, None), (8, "trimmed_llama"), (1, "mint")])
def test_answers_are_those_of_each_question_alone(run, folder, batch, method):
    prune = [] if method is None else ["--prune", method, "--keep", "0.3"]
    out, err = run(*flags(folder, "--batch", str(batch), *prune))
    assert out == "" and "5 answers written to" in err
    assistant = Assistant("tiny", "cpu")
    pruner = None if method is None else load(method, keep=0.3)
    answers = read(folder / "answers.jsonl")
    assert [answer["id"] for answer in answers] == [line["id"] for line in LINES]
    for line, answer in zip(LINES, answers, strict=True):
        names = line.get("image", [])
        images = [open_image(EXAMPLES / name) for name in ([names] if isinstance(names, str) else names)]
        encoded = assistant.encode_images(images, pruner)
        alone = assistant.answer([messages(line["prompt"], len(images), line.get("system"))], encoded,
                                 line.get("max_new_tokens", 256), pruner=pruner)
        kept = alone.kept[0]
        assert (answer["text"], answer["new_tokens"]) == (alone.texts[0], len(alone.tokens[0]))
        assert (answer["image_tokens"], answer["prompt_tokens"]) == (encoded.real, alone.prompt_tokens[0])
        assert answer["kept"] == round(sum(kept) / len(kept) if kept else 0, 2)
        assert answer["ms"] > 0 and len(answer["key"]) == 16
    assert answers[2]["new_tokens"] <= 2 and answers[3]["new_tokens"] == 5 < answers[4]["new_tokens"]


def test_sampling_does_not_depend_on_the_batch(run, folder):
    made = []
    for batch in "1", "3":
        run(*flags(folder, "--temperature", "2", "--seed", "7", "--batch", batch))
        made.append([answer["text"] for answer in read(folder / "answers.jsonl")])
        (folder / "answers.jsonl").unlink()
    assert made[0] == made[1]


def test_questions_on_standard_input(run, folder, monkeypatch):
    monkeypatch.chdir(folder)                       # images are relative to where one is
    questions = (folder / "questions.jsonl").read_bytes()
    run("--jsonl", "-", "--out", "answers.jsonl", stdin=questions)
    assert len(read(folder / "answers.jsonl")) == 5


def test_progress_counts_lines(run, folder, monkeypatch):
    told = []

    @contextmanager
    def progress(what, *_):
        yield lambda *numbers: told.append((what, *numbers))
    monkeypatch.setattr("cli.jsonl.Progress", progress)
    run(*flags(folder, "--batch", "2"))
    assert told == [("questions", 2, 5), ("questions", 4, 5), ("questions", 5, 5)]


# ----- stopping and going on


def test_a_process_that_is_killed_goes_on_where_it_was(run, folder):
    """Every question is answered once, as by a process that was never killed."""
    lines = [{**LINES[3], "id": i, "max_new_tokens": 1 + i % 7} for i in range(60)]
    written(folder / "questions.jsonl", *lines)
    command = [sys.executable, str(ROOT / "generate.py"), *flags(folder, "--batch", "2", "--device", "cpu")]
    answers = folder / "answers.jsonl"
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    until = time.monotonic() + 100
    while not answers.exists() or answers.read_bytes().count(b"\n") < 4:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = answers.read_bytes()
    known = before.count(b"\n")
    assert 4 <= known < 60
    answers.write_bytes(before + b'{"id": 59, "te')           # as if it had been killed while it wrote
    err = run(*flags(folder, "--batch", "8"))[1]
    assert f"which had {known}" in err
    made = read(answers)
    assert answers.read_bytes().startswith(before[:before.rfind(b"\n") + 1])
    assert sorted(answer["id"] for answer in made) == list(range(60))
    assert all(answer["new_tokens"] == 1 + answer["id"] % 7 for answer in made)


def test_what_is_answered_is_not_asked_again(run, folder, monkeypatch):
    run(*flags(folder))
    before = (folder / "answers.jsonl").read_bytes()
    monkeypatch.setattr(generate, "load_model", None)           # not even the model is loaded
    err = run(*flags(folder, "--batch", "3"))[1]
    assert "0 answers written" in err and "which had 5" in err
    assert (folder / "answers.jsonl").read_bytes() == before


@pytest.mark.parametrize("change", [["--prune", "random", "--keep", "0.5"], ["--dtype", "fp32"],
                                    ["--system", "Be brief."], ["--max-new-tokens", "9"], ["--seed", "1"],
                                    ["--quantize", "int8"], ["--stop", "x"]], ids=lambda words: words[0])
def test_answers_of_other_settings_are_refused(run, folder, change):
    written(folder / "questions.jsonl", LINES[0], b"nonsense")
    assert code_of(run, *flags(folder)) == 1
    before = (folder / "answers.jsonl").read_bytes()
    assert code_of(run, *flags(folder, *change)) == 2
    assert (folder / "answers.jsonl").read_bytes() == before


def test_another_question_of_the_same_id_is_refused(run, folder, capsys):
    run(*flags(folder))
    written(folder / "questions.jsonl", {**LINES[0], "prompt": "Where?"})
    assert code_of(run, *flags(folder)) == 2
    assert "another question" in capsys.readouterr().err


def test_errors_are_asked_again(run, folder):
    written(folder / "questions.jsonl", LINES[0], {**LINES[0], "id": 2, "image": "later.png"})
    assert code_of(run, *flags(folder)) == 1
    drawn(60, 60).save(folder / "later.png")
    run(*flags(folder))
    assert sorted((answer["id"], "error" in answer) for answer in read(folder / "answers.jsonl")) == [
        (1, False), (2, False)]


def test_two_processes_do_not_write_one_file(run, folder, capsys):
    with AnswerFile(folder / "answers.jsonl"):
        assert code_of(run, *flags(folder)) == 2
    assert "another process is writing it" in capsys.readouterr().err


def test_a_system_without_locks(run, folder, monkeypatch):
    monkeypatch.setattr("weights.locked_file.fcntl", None)
    for _ in range(2):
        run(*flags(folder))
    assert len(read(folder / "answers.jsonl")) == 5


# ----- odd lines


def test_odd_lines_get_an_error_and_the_others_their_answers(run, folder, capsys):
    written(folder / "questions.jsonl", LINES[0], *(line for line, *_ in ODD), b"", b"  ", LINES[4])
    assert code_of(run, *flags(folder)) == 1
    assert f"2 answers written to {folder}/answers.jsonl, which had 0; {len(ODD)} lines have an error" in (
        capsys.readouterr().err)
    made = read(folder / "answers.jsonl")
    errors = [line for line in made if "error" in line]
    assert [line["id"] for line in made if "text" in line] == [1, -5] and len(made) == len(ODD) + 2
    for number, (_, ident, words) in enumerate(ODD, start=2):
        found = [line["error"] for line in errors if line["id"] == ident and words in line["error"]]
        assert found and max(map(len, found)) < 400, (ident, errors)
        if ident is None:
            assert any(line.get("line") == number for line in errors)


def test_too_long_prompts_may_get_shorter_answers(run, folder):
    written(folder / "questions.jsonl", {"id": 1, "prompt": "Hm?", "max_new_tokens": 100_000})
    run(*flags(folder, "--too-long", "clamp"))
    answer, = read(folder / "answers.jsonl")
    assert "text" in answer


def test_a_batch_that_fails_is_asked_one_by_one(run, folder, monkeypatch):
    """But not where nothing was answered yet: then it is a fault of the settings."""
    answer = Assistant.answer

    def failing(self, conversations, *args, **named):
        if any("Describe" in str(turns) for turns in conversations):
            raise ValueError("the logits are not finite")
        return answer(self, conversations, *args, **named)
    monkeypatch.setattr(Assistant, "answer", failing)
    assert code_of(run, *flags(folder, "--batch", "4")) == 2
    assert not (folder / "answers.jsonl").exists()
    written(folder / "questions.jsonl", LINES[0], LINES[1], LINES[2], LINES[3])
    assert code_of(run, *flags(folder, "--batch", "2")) == 1
    made = read(folder / "answers.jsonl")
    assert ["error" in line for line in made] == [False, False, False, True]
    assert made[3]["error"] == "the logits are not finite"


def test_an_option_that_no_line_can_be_asked_with_ends_it(run, folder, capsys):
    assert code_of(run, *flags(folder, "--prune", "mint", "--set", "n_sel=9")) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (folder / "answers.jsonl").exists()


# ----- memory


def test_only_the_images_of_a_batch_are_open_and_equal_ones_once(run, folder, monkeypatch):
    opened, batches = [], []
    encode = Assistant.encode_images
    monkeypatch.setattr(question_file, "image_from",
                        lambda source: opened.append(Path(source).name) or open_image(source))
    monkeypatch.setattr(Assistant, "encode_images", lambda self, images, pruner: batches.append(
        (list(opened), len({id(image) for own in images for image in own}))) or encode(self, images, pruner))
    run(*flags(folder, "--batch", "2"))
    names = ["shapes.png", "tall.png", "wide.png", "shapes.png", "shapes.png"]
    assert opened == names and [(len(seen), count) for seen, count in batches] == [(3, 3), (4, 1), (5, 1)]
    opened.clear(), batches.clear()
    (folder / "answers.jsonl").unlink()
    run(*flags(folder))
    assert opened == names[:3] and batches[0][1] == 3


# ----- docs/BATCHES.md


def test_the_page_says_what_is_true(monkeypatch, capsys, run, folder):
    page = (ROOT / "docs" / "BATCHES.md").read_text(encoding="utf-8")
    lines, = re.findall(r"```json\n(.*?)```", page, re.S)
    assert [parsed(line.encode())["id"] for line in lines.splitlines()] == ["cat-1", 2, 3]
    code, = re.findall(r"```python\n(.*?)```", page, re.S)
    monkeypatch.chdir(ROOT)
    exec(compile(code, "docs/BATCHES.md", "exec"), {})
    assert capsys.readouterr().out.startswith("['bottom', ")
    run(*flags(folder))
    names = set(read(folder / "answers.jsonl")[0]) - {"id"}
    table = re.findall(r"^\| (`.*?) \|", page, re.M)
    assert names == {name.strip("` ") for cell in table for name in cell.split(",")}
