"""What the tests of this folder share: fixtures for the command line of generate.py, for the benchmark,
and a sweep of evaluate.py that is made once."""
import io
import json
import sys
from collections.abc import Callable

import pytest
import torch
from generate_helpers import STOP, TINY, drawn
from small_benchmark import CONFIG, CPU, Plain, Twin
from sweeps import SWEEP
from tokenizers import Tokenizer

import benchmark
import evaluate
import generate as program
from benchmarks import measure
from benchmarks.subject import SHAPES, Subject, random_model
from generate import Sampler, generate


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> str:
    """The path of an image of two tiles."""
    path = tmp_path_factory.mktemp("images") / "wide.png"
    drawn(224, 112).save(path)
    return str(path)


@pytest.fixture
def asked(monkeypatch) -> list[list[str]]:
    """The prompts of every call of generate() so far, as text with their special tokens."""
    calls, inner, tokenizer = [], program.generate, Tokenizer.from_file(str(TINY / "tokenizer.json"))

    def spy(model, prompts, *rest):
        calls.append([tokenizer.decode(ids, skip_special_tokens=False) for ids in prompts])
        return inner(model, prompts, *rest)

    monkeypatch.setattr(program, "generate", spy)
    return calls


@pytest.fixture
def say(monkeypatch) -> Callable[..., list[str]]:
    """Lets every answer be these words, spelt in several tokens; returns what stdout holds at each token."""
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))

    def words(text: str, cut: int = 0) -> list[str]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        script, seen = [*ids[:len(ids) - cut], STOP], []

        def sample(sampler, logits):
            seen.append(sys.stdout.getvalue())
            return torch.full((len(logits),), script[(len(seen) - 1) % len(script)])

        monkeypatch.setattr(Sampler, "__call__", sample)
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        return seen
    return words


@pytest.fixture
def small_measurements(monkeypatch):
    """The tiny network, small ceilings, and no gradients: nothing here depends on how fast anything is."""
    monkeypatch.setitem(SHAPES, "tiny", lambda: CONFIG)
    monkeypatch.setitem(measure.COPY_BYTES, "cpu", 2 ** 16)
    monkeypatch.setitem(measure.PRODUCT_SIDE, "cpu", 16)
    with torch.inference_mode():
        yield


@pytest.fixture
def run_benchmark(monkeypatch, capsys, tmp_path):
    """Runs the program beside a stand-in of transformers: what it printed, and its JSON."""
    def run(*argv: str) -> tuple[str, dict]:
        monkeypatch.setattr("model.compiled.Compiled", Plain)
        monkeypatch.setattr(benchmark, "Peer", Twin)
        small = "--device", "cpu", "--repeat", "2", "--new-tokens", "3", "--prompt-tokens", "7"
        argv += "--json", str(tmp_path / "made.json")
        monkeypatch.setattr("sys.argv", ["benchmark.py", *small, *argv])
        benchmark.main()
        return capsys.readouterr().out, json.loads((tmp_path / "made.json").read_text(encoding="utf-8"))
    return run


@pytest.fixture(scope="module")
def subject():
    return Subject(random_model(CONFIG, CPU, torch.float32), generate, "tiny", CONFIG)


@pytest.fixture(scope="session")
def sweep(tmp_path_factory):
    """A small sweep's folder, with out.json, out.png and what was printed in out.txt."""
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch, open(folder / "out.txt", "w") as out:
        files = ["--json", str(folder / "out.json"), "--plot", str(folder / "out.png")]
        patch.setattr("sys.argv", ["evaluate.py", *SWEEP, *files])
        patch.setattr("sys.stdout", out)
        evaluate.main()
    return folder
