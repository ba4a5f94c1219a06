"""The benchmark runs on small layers, says what it compares, and refuses bad input in one line."""
import re

import pytest

import benchmark
from model.config import TextConfig

SMALL = TextConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*argv: str) -> str:
        monkeypatch.setitem(benchmark.MODELS, "11b", SMALL)
        monkeypatch.setattr("sys.argv", ["benchmark.py", "--device", "cpu", *argv])
        benchmark.main()
        return capsys.readouterr().out
    return run


@pytest.mark.parametrize("prune", ["trimmed_llama", "fastv", "none"])
def test_own_work_is_compared_with_the_slice_and_the_whole(run, prune):
    shape = "--image-tokens", "90", "--text-tokens", "7"
    out = run("--prune", prune, "--keep", "0.5", *shape, "--repeat", "3")
    alone, looking, own = (float(ms) for ms in re.findall(r"([\d.]+) ms$", out, re.M))
    whole = re.search(r"([\d.]+)% of the prefill of all 40 \((\d+) ms\)", out)
    assert "90 image and 7 text tokens" in out and min(alone, looking, own) >= 0
    assert abs(int(whole[2]) - (32 * alone + 8 * looking)) <= 1             # times are printed rounded


@pytest.mark.parametrize(("argv", "words"), [
    (["--repeat", "0"], "--repeat is 0"), (["--image-tokens", "-1"], "--image-tokens is -1"),
    (["--prune", "nothing"], "no pruning method"), (["--shape", "7b"], "invalid choice"),
    (["--device", "tpu"], "tpu"), (["--keep", "2.0"], "keep is 2.0"),
])
def test_bad_input_is_one_line(run, capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and words in error
