"""Pruning from the command line of generate.py: what is reported, own methods, and maps."""
import json
from collections.abc import Callable

import pytest
from full_disk import full_disk
from generate_helpers import command_line
from PIL import Image

import pruning


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., tuple[str, str]]:
    return command_line(monkeypatch, capsys)


def test_pruning_is_reported_in_words_and_numbers(run, wide):
    command = "--image", wide, "--prompt", "What is this?", "--max-new-tokens", "3", "--prune"
    prefill = "layer 0 attends to all tokens in prefill"
    _, err = run(*command, "spatial", "--keep", "0.3")
    assert f"200 slots -> 100 real -> 30 kept (spatial, keep 0.3; {prefill})\n" in err
    _, err = run(*command, "fastv", "--keep", "30")
    assert f"-> 53 kept (by layer 100 30 30; fastv, keep 30; {prefill})\n" in err
    data = json.loads(run(*command, "fastv", "--keep", "0.3", "--json")[0])
    assert data["image_tokens"] == {"slots": 200, "real": 100, "kept": 53}
    assert data["kept_by_layer"] == [100, 30, 30] and data["pruner"].startswith("fastv, keep 0.3")
    whole = json.loads(run(*command, "none", "--json")[0])
    assert data["image_kv_bytes"] * 300 == whole["image_kv_bytes"] * 160
    _, err = run(*command, "attention_predictor", "--keep", "0.5", "--set", "block=4")
    assert "image KV 63 kB of 127 kB stored, encode" in err
    _, err = run(*command, "downsample", "--keep", "0.5")
    assert "200 slots -> 100 real -> 50 kept (downsample, keep 0.5 of the tiles)\n" in err


def test_an_answer_of_the_guide_alone_is_said_so(run, wide):
    command = "--image", wide, "--prompt", "What is this?", "--prompt", "Where?", "--prune", "sgl"
    early = "--set", "threshold=-1", "--json"
    data, late = (json.loads(run(*command, *more)[0]) for more in (early, ("--json",)))
    assert data["answered_early"] == [0, 1] and late["answered_early"] == []
    assert data["image_tokens"]["kept"] == [0, 0] and data["image_kv_bytes"] == 0 < late["image_kv_bytes"]
    guide = json.loads(run(*command[:6], "--model", "guide", "--json")[0])
    assert data["answer"] == guide["answer"]
    assert "2 of 2 answered by the guide alone" in run(*command, *early[:2])[1]


def test_keep_everything_is_no_pruning(run, wide):
    command = "--image", wide, "--prompt", "What is this?", "--max-new-tokens", "8", "--json"
    expected = json.loads(run(*command)[0])
    for method in pruning.METHODS:
        data = json.loads(run(*command, "--prune", method, "--keep", "1.0")[0])
        for key in "answer", "token_ids", "image_tokens", "image_kv_bytes", "kept_by_layer":
            assert data[key] == expected[key]


def test_a_method_from_a_file_with_an_option(run, wide, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    command = "--image", wide, "--prompt", "What is this?", "--max-new-tokens", "3", "--json"
    data = json.loads(run(*command, "--prune", f"{tmp_path / 'mine.py'}:Mine", "--set", "first=7")[0])
    assert data["kept_by_layer"] == [7, 7, 7] and data["pruner"] == "mine, keep 0.5, first 7"


MINE = """
from dataclasses import dataclass
import torch
from pruning import Pruner

@dataclass
class Mine(Pruner):
    keep: float = 0.5
    first: int = 3
    def encoded(self, image, prompts):
        return image.take(torch.arange(image.coords.shape[1]).expand(len(prompts), -1) < self.first)
"""


def test_the_list_of_methods(run):
    out, err = run("--prune", "list")
    assert err == "" and all(f"{name}: " in out for name in pruning.METHODS)
    assert "arXiv 2504.00557" in out and "early_caches = trim or full" in out and "acts at: layer" in out


@pytest.mark.parametrize("kind", ["kept", "attention"])
def test_a_map_is_drawn_and_changes_nothing(run, wide, tmp_path, kind):
    command = "--image", wide, "--prompt", "What is this?", "--max-new-tokens", "6", "--json"
    prune, path = ("--prune", "trimmed_llama", "--keep", "0.2"), str(tmp_path / "map.png")
    for chosen in (), prune:
        plain = json.loads(run(*command, *chosen)[0])
        drawn = json.loads(run(*command, *chosen, "--save-map", path, "--map", kind)[0])
        assert Image.open(path).width >= 224
        for key in "answer", "token_ids", "image_tokens", "kept_by_layer", "pruner":
            assert drawn[key] == plain[key]


def test_a_full_disk_leaves_the_map_that_was_there(run, capsys, wide, tmp_path):
    path = tmp_path / "map.png"
    path.write_text("the old map")
    with full_disk(), pytest.raises(SystemExit) as stop:
        run("--image", wide, "--prompt", "What is this?", "--max-new-tokens", "2", "--save-map", str(path))
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --save-map ") and "map.png: cannot be written: " in error
    assert path.read_text() == "the old map" and list(tmp_path.iterdir()) == [path]


def test_a_chat_prunes_anew_for_every_question(run, say, wide, monkeypatch):
    say("A red circle.")
    first, later = "What is this?\n", "What is this?\nAnd where?\n"
    command = "--image", wide, "--prune", "random", "--keep", "0.2"
    for typed in first, later:
        _, err = run(*command, stdin=typed, terminal=True)
        assert err.count("-> 100 real -> 20 kept") == typed.count("\n")
