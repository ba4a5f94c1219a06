"""An adapter of the hub: only its files are downloaded, and it is checked before its base is.

snapshot_download is replaced by one that serves repositories from folders, as it filters their files.
"""
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from adapter_base import ADAPTERS, write_base
from helpers import refused

from weights import find_checkpoint, load_model
from weights.adapter_file import find_adapter


class Hub:
    """Repositories in folders; which files of which were served."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.served = []

    def add(self, repo: str, source: Path, *others: str) -> Path:
        folder = shutil.copytree(source, self.folder / "hub" / repo)
        for name in others:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("{}")
        return folder

    def download(self, repo: str, revision: str | None, allow_patterns: list[str],
                 ignore_patterns: list[str]) -> str:
        there = self.folder / "hub" / repo
        names = [path.relative_to(there).as_posix() for path in sorted(there.rglob("*")) if path.is_file()]
        names = list(huggingface_hub.utils.filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        cache = self.folder / "cache" / repo
        cache.mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copyfile(there / name, cache / name)
        self.served.append((repo, names))
        return str(cache)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    hub = Hub(tmp_path)
    monkeypatch.setattr("weights.hub.snapshot_download", hub.download)
    monkeypatch.chdir(tmp_path)
    return hub


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OTHERS = "README.md", "optimizer.pt", "training_args.bin", "runs/events", "checkpoint-5/adapter_config.json"
TEXT = "tokenizer.json", "chat_template.jinja", "tokenizer_config.json"


def test_only_the_files_of_the_adapter(hub):
    hub.add("me/adapter", ADAPTERS / "lora", *OTHERS, *TEXT)
    assert find_adapter("me/adapter") == hub.folder / "cache" / "me" / "adapter"
    assert hub.served == [("me/adapter", [CONFIG, WEIGHTS])]


def test_the_tokenizer_too_where_tokens_were_added(hub):
    hub.add("me/adapter", ADAPTERS / "resized", *OTHERS, *TEXT)
    find_adapter("me/adapter")
    assert hub.served == [("me/adapter", [CONFIG, WEIGHTS]),
                          ("me/adapter", sorted([CONFIG, WEIGHTS, *TEXT]))]


def test_both_from_the_hub_and_the_adapter_first(hub, tmp_path):
    base = write_base(tmp_path / "base")
    hub.add("me/base", base)
    hub.add("me/adapter", ADAPTERS / "lora")
    model = load_model("me/base", adapters=["me/adapter"])
    assert [repo for repo, _ in hub.served] == ["me/adapter", "me/base", "me/base"]
    assert hub.served[1][1] == ["config.json"]
    local = load_model(base, adapters=[ADAPTERS / "lora"])
    assert all(tensor.equal(local.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("adapter, words", [("ia3", "peft_type 'IA3'"), ("empty", "no adapter_config.json"),
                                            ("pickle", "pickle can run code")])
def test_a_bad_adapter_is_refused_before_the_base_is_downloaded(hub, tmp_path, adapter, words):
    if adapter == "ia3":
        hub.add("me/adapter", ADAPTERS / "ia3")
    else:
        folder = tmp_path / "made"
        folder.mkdir()
        if adapter == "pickle":
            shutil.copy(ADAPTERS / "lora" / CONFIG, folder)
        hub.add("me/adapter", folder, "adapter_model.bin")
    with refused(words):
        load_model("me/base", adapters=["me/adapter"])
    assert [repo for repo, _ in hub.served] == ["me/adapter"]


def test_an_adapter_of_another_size_is_refused_before_the_weights_are_downloaded(hub, tmp_path):
    base = write_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 32
    (base / "config.json").write_text(json.dumps(config))
    hub.add("me/base", base)
    with refused("down_proj' is changed by", ["do not fit its [16, 32]"]):
        load_model("me/base", adapters=[ADAPTERS / "lora"])
    assert hub.served == [("me/base", ["config.json"])]
    with refused("tensors belong to this model"):
        config["text_config"]["num_hidden_layers"] = 2
        (hub.folder / "hub" / "me" / "base" / "config.json").write_text(json.dumps(config))
        load_model("me/base", adapters=[ADAPTERS / "lora"])
    config["text_config"] |= {"num_hidden_layers": 3, "intermediate_size": 24, "vocab_size": 60}
    (hub.folder / "hub" / "me" / "base" / "config.json").write_text(json.dumps(config))
    load_model("me/base", adapters=[ADAPTERS / "embedding"])        # how many tokens, the weights tell


def test_a_repository_that_holds_an_adapter_beside_its_weights_or_alone(hub, tmp_path):
    """Nothing large is downloaded before this is found."""
    both = hub.add("me/both", write_base(tmp_path / "base"))
    shutil.copy(ADAPTERS / "lora" / CONFIG, both)
    with refused("me/both: an adapter lies beside the weights", ["--adapter me/both", "--adapter none"]):
        find_checkpoint("me/both")
    hub.add("me/adapter", ADAPTERS / "lora")
    with refused("me/adapter: it holds an adapter alone"):
        find_checkpoint("me/adapter")
    assert hub.served == [("me/both", [CONFIG, "config.json"]), ("me/adapter", [CONFIG])]
    load_model("me/both", adapters=["none"])
    with refused("no adapter_model.safetensors there"):
        load_model("me/both", adapters=["me/both"])


def test_what_the_hub_refuses_gets_its_line(monkeypatch):
    def download(repo, revision, allow_patterns, ignore_patterns):
        raise ConnectionResetError(104, "reset")
    monkeypatch.setattr("weights.hub.snapshot_download", download)
    with refused("me/adapter: not in the local cache, and the hub cannot be reached"):
        find_adapter("me/adapter")
