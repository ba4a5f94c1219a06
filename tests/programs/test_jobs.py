"""Several processes make the records of one, in order; they end with whoever started them."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from program_inputs import ROOT
from sweeps import MINE, SWEEP, evaluate_command, timeless

import evaluate
from evaluation.jobs import ahead

FAILING = MINE + """
    def encoded(self, image, prompts):
        raise ValueError("of the author")
"""


@pytest.fixture
def run(monkeypatch, capsys):
    return evaluate_command(monkeypatch, capsys)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def odd_answers(signal_path: str):
    """What is even takes longer, 3 fails, and 5 ends the process when a file is there."""
    def answer(number: int) -> dict:
        time.sleep(0.2 * (number % 2 == 0))
        if number == 3:
            raise RuntimeError("never told")
        if number == 5:
            until(lambda: os.path.exists(signal_path))
            os._exit(1)
        return {"number": number, "process": os.getpid(), "threads": torch.get_num_threads()}
    return answer


def test_answers_come_in_order_until_a_process_dies(tmp_path):
    answers = ahead(2, odd_answers, (str(tmp_path / "now"),), range(1, 9))
    made = [next(answers) for _ in range(4)]
    assert made[2] is None and [answer["number"] for answer in (*made[:2], made[3])] == [1, 2, 4]
    assert {answer["threads"] for answer in made if answer} == {1}
    processes = {answer["process"] for answer in made if answer}
    assert os.getpid() not in processes
    (tmp_path / "now").touch()
    with pytest.raises(ValueError, match="a process of --jobs has died"):
        next(answers)
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    assert list(ahead(2, odd_answers, ("",), range(0))) == []


def test_processes_end_when_nobody_asks():
    answers = ahead(1, odd_answers, ("",), range(1, 3))
    process = next(answers)["process"]
    os.kill(process, 0)
    answers.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_two_processes_make_what_one_makes(run, one_thread, monkeypatch, tmp_path):
    """To the bit, also where a stopped run goes on."""
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    run(*SWEEP, "--json", one)
    add, added = evaluate.Store.add, []

    def stopped(store, record):
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(record)
        add(store, record)

    monkeypatch.setattr(evaluate.Store, "add", stopped)
    with pytest.raises(SystemExit) as stop:
        run(*SWEEP, "--json", two, "--jobs", 2)
    assert stop.value.code == 130 and (tmp_path / "two.json.part").read_bytes().count(b'{"number": ') == 2
    monkeypatch.setattr(evaluate.Store, "add", add)
    monkeypatch.setattr(evaluate, "examine", None)                          # nothing is asked here
    run(*SWEEP, "--json", two, "--jobs", 1)
    assert timeless(json.loads(two.read_text())) == timeless(json.loads(one.read_text()))
    assert sorted(tmp_path.iterdir()) == [one, two]


def test_a_method_of_ones_own_fails_with_its_traceback(monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text(FAILING)
    argv = ["--questions", "1", "--prune", f"{tmp_path}/mine.py:Mine", "--keep", "7", "--jobs", "1"]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *argv])
    with pytest.raises(ValueError, match="of the author") as error:
        evaluate.main()
    assert error.traceback[-1].path.name == "mine.py"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_command(tmp_path, how):
    """Ctrl-C reaches all processes at once, a kill only the first; neither leaves a word or a process."""
    command = [sys.executable, "evaluate.py", "--jobs", "1", "--json", str(tmp_path / "x.json")]
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE) as started:
        part = tmp_path / "x.json.part"
        until(lambda: part.exists() and b'{"number": 1,' in part.read_bytes())
        (os.killpg if how == signal.SIGINT else os.kill)(started.pid, how)
        _, words = started.communicate(timeout=120)                         # when the last process has ended
    assert words == b"" and started.returncode == (130 if how == signal.SIGINT else -how)
    assert b'{"number": 1,' in part.read_bytes()


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
