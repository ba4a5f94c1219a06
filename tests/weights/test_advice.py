"""What to do about a damaged checkpoint depends on where it came from: a folder, or the hub's cache."""
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from small_checkpoint import INDEX, NORM, SHARDS, refusal, write_sharded

from weights.files import again

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path, main: str | None = COMMIT) -> Path:
    """A small checkpoint as huggingface_hub keeps owner/some--name: a snapshot, and what `main` is."""
    home = cache / "models--owner--some--name"
    folder = home / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    if main is not None:
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text(main)
    return write_sharded(folder)


def without(name: str):
    def edit(folder: Path):
        tensors = load_file(folder / SHARDS[0])
        del tensors[name]
        save_file(tensors, folder / SHARDS[0])
        path = folder / INDEX
        index = json.loads(path.read_text())
        del index["weight_map"][name]
        path.write_text(json.dumps(index))
    return edit


def twice(folder: Path):
    tensors = load_file(folder / SHARDS[0])
    save_file({**tensors, "module." + NORM: tensors[NORM].clone()}, folder / SHARDS[0])


DAMAGE = {                              # name: (what is done to the folder, what is to be fetched again)
    "cut file": (lambda f: (f / SHARDS[1]).write_bytes((f / SHARDS[1]).read_bytes()[:-4]), SHARDS[1]),
    "empty file": (lambda f: (f / SHARDS[1]).write_bytes(b""), SHARDS[1]),
    "damaged header": (lambda f: (f / SHARDS[1]).write_bytes(b"\x08" + b"\0" * 7 + b"{[}     "), SHARDS[1]),
    "no weights": (lambda f: (f / INDEX).unlink(), ""),
    "missing shard": (lambda f: (f / SHARDS[0]).unlink(), ""),
    "index not JSON": (lambda f: (f / INDEX).write_text("{"), INDEX),
    "index without a map": (lambda f: (f / INDEX).write_text("{}"), INDEX),
    "index that leads away": (lambda f: (f / INDEX).write_text('{"weight_map": {"a": "../b"}}'), INDEX),
    "missing tensor": (without(NORM), ""),
    "a tensor twice": (twice, ""),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_folder_of_ones_own(tmp_path, case):
    damage, _ = DAMAGE[case]
    damage(write_sharded(tmp_path))
    line = refusal(tmp_path)
    assert line.endswith("copy it again, or save it again") and "download" not in line


@pytest.mark.parametrize("case", DAMAGE)
def test_a_snapshot_of_the_hub(tmp_path, case):
    damage, file = DAMAGE[case]
    folder = cached(tmp_path)
    damage(folder)
    line = refusal(folder)
    named = f" {file}" if file else ""
    assert line.endswith(f"`hf download owner/some--name{named} --force-download` fetches it again")
    assert "copy" not in line


@pytest.mark.parametrize("main", [None, "f" * 40])
def test_another_revision_than_main_is_named(tmp_path, main):
    folder = cached(tmp_path, main)
    assert again(folder) == (f"`hf download owner/some--name --revision {COMMIT} --force-download` "
                             "fetches it again")


def test_a_file_in_a_folder_of_a_snapshot():
    assert again("/c/models--a--b/snapshots/0/original/c.pth").startswith("`hf download a/b original/c.pth ")


@pytest.mark.parametrize("path", ["x/models--owner/snapshots/0/y", "models--a--b/snapshots/0", "snapshots/0",
                                  "/c/models--a--b/snapshots/0/$(x)", "/c/models--a--b/blobs/0", ""])
def test_what_only_looks_like_the_cache(path):
    assert again(path) == "copy it again, or save it again"
