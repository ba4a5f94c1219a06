"""Programs in several processes, as torchrun starts them: one answer, one line where something is wrong."""
import json
import shutil

import pytest
import torch
from generate_helpers import TINY, drawn
from ranks_run import Ended, all_well, run_ranks
from together_checks import killed, start, stuck

from weights import load_model, save_model

QUESTION = "--prompt", "What is written on the circle?", "--device", "cpu"


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("images") / "photo.png"
    drawn(112, 112).save(path)
    return str(path)


def without_times(text: str) -> dict:
    measured = "ms", "tokens_per_second", "peak_memory_bytes", "mapped_memory_bytes"
    return {key: value for key, value in json.loads(text).items() if key not in measured}


def the_line(ended: list[Ended]) -> str:
    """The one error that all processes together said, at the end; before it the first may have spoken."""
    lines = [process.err.splitlines() for process in ended]
    error, = (line for said in lines for line in said if line.startswith("error: "))
    assert all(said in ([], [error]) for said in lines[1:]), ended
    assert not any(process.out for process in ended), ended
    return error


# ----- answers


def test_one_process_speaks_and_several_answer_as_one_does(photo, tmp_path):
    """Sampled, about piped text, with sets of tokens of each head's own, and a map."""
    args = ("--image", photo, "--json", "--device", "cpu", "--prune", "csp", "--temperature", "1.3",
            "--max-new-tokens", "8", "--save-map")
    alone, = run_ranks(start, "generate", *args, str(tmp_path / "1.png"), count=1, stdin="Is it red?")
    ended = run_ranks(start, "generate", *args, str(tmp_path / "2.png"), stdin="Is it red?")
    all_well([alone, *ended])
    assert ended[1] == Ended(0, "", "")
    assert (tmp_path / "2.png").read_bytes() == (tmp_path / "1.png").read_bytes()
    theirs, ours = without_times(alone.out), without_times(ended[0].out)
    for share in "image_kv_bytes", "image_kv_stored_bytes", "text_kv_bytes":
        assert ours.pop(share) == theirs.pop(share) / 2
    assert ours == theirs and len(ours["token_ids"]) > 1


def test_an_evaluation_is_that_of_one_process(tmp_path):
    args = "evaluate", "--questions", "9", "--prune", "fastv", "--keep", "0.1", "--device", "cpu", "--json"
    files = tmp_path / "alone.json", tmp_path / "together.json"
    all_well(run_ranks(start, *args, str(files[0]), count=1))
    all_well(run_ranks(start, *args, str(files[1])))
    alone, together = (json.loads(file.read_text())["rows"] for file in files)
    for theirs, ours in zip(alone, together, strict=True):
        assert ours["right"] == theirs["right"] and ours["kept"] == pytest.approx(theirs["kept"])


# ----- what goes wrong


@pytest.mark.parametrize("args, parts", [
    (("generate", "--image", "nowhere.png", *QUESTION), ("nowhere.png", "no such file")),
    (("generate", "--nonsense"), ("unrecognized arguments: --nonsense",)),
    (("generate", *QUESTION[:2], "--device", "cpu:1"), ("say cuda or cpu",)),
    (("generate", *QUESTION, "--offload"), ("--offload", "one process")),
    (("evaluate", "--jobs", "2"), ("--jobs", "one process")),
    (("benchmark",), ("torchrun is for",))])
def test_one_line_for_the_same_mistake_of_all(args, parts):
    ended = run_ranks(start, *args)
    assert [process.code for process in ended] == [2, 2]
    assert all(part in the_line(ended) for part in parts)


def test_heads_that_do_not_divide():
    ended = run_ranks(start, "generate", *QUESTION, count=3)
    assert "heads of this model do not divide over 3 processes: start 2" in the_line(ended)
    assert [process.code for process in ended] == [2, 2, 2]


def test_two_checkpoints(tmp_path):
    """They differ in numbers alone."""
    for rank in "01":
        shutil.copytree(TINY, tmp_path / rank)
    model = load_model(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    save_model(model, tmp_path / "1")
    ended = run_ranks(start, "generate", *QUESTION, "--model", str(tmp_path / "RANK"))
    assert "different checkpoints" in the_line(ended) and [process.code for process in ended] == [2, 2]


def test_one_checkpoint_that_is_damaged(tmp_path):
    shutil.copytree(TINY, tmp_path / "0")
    shutil.copytree(TINY, tmp_path / "1")
    (tmp_path / "1" / "model.safetensors").write_bytes(b"")
    ended = run_ranks(start, "generate", *QUESTION, "--model", str(tmp_path / "RANK"))
    assert "the file is empty" in the_line(ended) and [process.code for process in ended] == [2, 2]


@pytest.mark.parametrize("happens", [killed, stuck])
def test_nobody_waits_for_a_process_that_is_gone(photo, happens):
    ended = run_ranks(happens, "--image", photo, *QUESTION, limit=20)
    assert "another process of this run has ended, or did not answer in time" in the_line(ended)
    assert ended[0].code == 2
