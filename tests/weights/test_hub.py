"""Finding a checkpoint: the bundled one, a folder, or a hub id; one line for what goes wrong.

Nothing here uses the network: snapshot_download works offline on a cache laid out in the library's way, or
is replaced by one that raises the library's own errors.
"""
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from weights import find_checkpoint
from weights.hub import BUNDLED, read_config

ROOT = Path(__file__).parents[2]
CONFIG = json.dumps({"model_type": "mllama"})
REPO, COMMIT = "owner/name", "0123456789abcdef0123456789abcdef01234567"


def line_of(caught) -> str:
    line = str(caught.value)
    assert len(line.splitlines()) == 1, line
    return line


# ---- folders

def test_a_folder_is_itself(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(CONFIG)
    assert find_checkpoint(str(tmp_path)) == find_checkpoint(tmp_path) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert find_checkpoint(f"~/{tmp_path.name}") == tmp_path
    monkeypatch.chdir(tmp_path.parent)                              # a folder here comes before the hub
    (tmp_path.parent / "owner" / "name").mkdir(parents=True, exist_ok=True)
    (tmp_path.parent / "owner" / "name" / "config.json").write_text(CONFIG)
    assert find_checkpoint("owner/name") == Path("owner/name")


def test_tiny_is_the_bundled_folder(tmp_path, monkeypatch):
    assert Path("weights", "tiny") == BUNDLED["tiny"].relative_to(ROOT)
    monkeypatch.setitem(BUNDLED, "tiny", tmp_path)
    (tmp_path / "config.json").write_text(CONFIG)
    monkeypatch.chdir(ROOT)
    assert find_checkpoint("tiny") == tmp_path


NOT_THERE = {                                               # name: (files, source, what the line says)
    "nothing": ([], "", ["neither 'tiny', nor a folder", "owner/name"]),
    "no such folder": ([], "./no/such/folder", ["'./no/such/folder'", "nor a folder here"]),
    "no such absolute folder": ([], "/no-such-folder/x", ["'/no-such-folder/x'", "nor a folder here"]),
    "no such user": ([], "~no-such-user/x", ["'~no-such-user/x'", "nor a folder here"]),
    "no owner": ([], "Llama-3.2-11B-Vision", ["nor a hub id like owner/name"]),
    "a web address": ([], "https://huggingface.co/owner/name", ["nor a hub id like owner/name"]),
    "too long a name": ([], "x" * 5000, ["nor a folder here"]),
    "a null byte": ([], "a\0b/c", ["nor a folder here"]),
    "a path that does not exist": ([], Path("owner/name"), ["nor a folder here"]),
    "folder without config": (["model.safetensors"], ".", ["no config.json", "safetensors"]),
    "empty folder": (["x/.keep"], "x", ["x: no config.json"]),
    "safetensors file": (["x.safetensors"], "x.safetensors", ["is a file", "pass the folder"]),
    "gguf file": (["x.gguf"], "x.gguf", ["is a file in the GGUF format", "safetensors checkpoint"]),
    "pth file": (["x.pth"], "x.pth", ["is a file in Meta's original format", "safetensors checkpoint"]),
    "gguf folder": (["x-Q4_K_M.gguf"], ".", ["GGUF", "safetensors checkpoint"]),
    "pth folder": (["consolidated.00.pth", "params.json"], ".", ["Meta's original .pth", "safetensors"]),
    "folder over original": (["original/consolidated.00.pth"], ".", ["in original/", "safetensors"]),
    "adapter": (["adapter_config.json", "adapter_model.safetensors"], ".", ["LoRA", "merged"]),
    "pickles": (["pytorch_model-00001-of-00002.bin"], ".", ["pytorch_model.bin", "safetensors checkpoint"]),
}


@pytest.mark.parametrize("case", NOT_THERE)
def test_what_is_no_checkpoint_gets_one_line(tmp_path, monkeypatch, case):
    files, source, fragments = NOT_THERE[case]
    monkeypatch.chdir(tmp_path)
    for file in files:
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_bytes(b"")
    with pytest.raises(ValueError) as caught:
        find_checkpoint(source)
    for fragment in fragments:
        assert fragment in line_of(caught)


@pytest.mark.parametrize("source", ["tiny", "."])
def test_a_folder_has_no_revisions(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="revision 'v1' goes with a hub id") as caught:
        find_checkpoint(source, revision="v1")
    line_of(caught)


# ---- the hub, offline

def fill_cache(cache: Path, revision: str) -> Path:
    """A repository as huggingface_hub keeps it: blobs, a snapshot of links into them, and a ref."""
    repo = cache / "models--owner--name"
    snapshot = repo / "snapshots" / COMMIT
    for folder in repo / "blobs", repo / "refs", snapshot:
        folder.mkdir(parents=True)
    (repo / "refs" / revision).write_text(COMMIT)
    (repo / "blobs" / "abc").write_text(CONFIG)
    (snapshot / "config.json").symlink_to(Path("../../blobs/abc"))
    return snapshot


FIND = """
from weights.hub import find_checkpoint
for revision in "v1", None:
    try:
        print(find_checkpoint("owner/name", revision=revision))
    except ValueError as error:
        print("ValueError:", error)
"""


def test_offline_the_cache_is_enough(tmp_path):
    snapshot = fill_cache(tmp_path / "hub", revision="v1")
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", FIND], cwd=ROOT, env=environment, check=True,
                          capture_output=True, text=True)           # the first import reads the environment
    cached, refused = done.stdout.splitlines()
    assert cached == str(snapshot)
    assert refused.startswith("ValueError: owner/name: not, or not completely, in the local cache")
    assert "unset HF_HUB_OFFLINE" in refused


def test_a_wrong_model_is_refused_before_its_weights_are_downloaded(tmp_path, monkeypatch):
    asked = []

    def download(repo, revision, allow_patterns, ignore_patterns):
        asked.append(allow_patterns)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        return str(tmp_path)

    monkeypatch.setattr("weights.hub.snapshot_download", download)
    with pytest.raises(ValueError, match="not a Llama-3.2-Vision checkpoint"):
        find_checkpoint(REPO)
    assert asked == [["config.json"]]


def test_only_the_files_of_the_checkpoint_are_downloaded(tmp_path, monkeypatch):
    wanted = ["chat_template.jinja", "config.json", "model-00001-of-00002.safetensors",
              "model.safetensors.index.json", "tokenizer.json"]
    others = ["README.md", "original/params.json", "original/consolidated.00.pth", "pytorch_model.bin",
              "onnx/model.safetensors", "USE_POLICY.md"]
    fetched, revisions = [], []

    def download(repo, revision, allow_patterns, ignore_patterns):
        revisions.append((repo, revision))
        fetched.append(list(huggingface_hub.utils.filter_repo_objects(
            wanted + others, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)))
        (tmp_path / "config.json").write_text(CONFIG)
        return str(tmp_path)

    monkeypatch.setattr("weights.hub.snapshot_download", download)
    assert find_checkpoint(REPO, revision="v1") == tmp_path
    assert revisions == [(REPO, "v1")] * 2
    assert fetched == [["config.json"], wanted]


def test_a_repository_without_config(tmp_path, monkeypatch):
    monkeypatch.setattr("weights.hub.snapshot_download", lambda *a, **k: str(tmp_path / "never-made"))
    with pytest.raises(ValueError, match="owner/name: no config.json there") as caught:
        find_checkpoint(REPO)
    line_of(caught)


# ---- the hub's refusals

HTTP = sys.modules[errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0]]       # httpx or so


def http_error(kind, status: int) -> Exception:
    response = HTTP.Response(status, request=HTTP.Request("GET", "https://huggingface.co/api/models/x"))
    return kind(f"{status} Client Error.\n\nsomething\nlong", response=response)


def not_cached(cause: Exception | None) -> Exception:
    error = errors.LocalEntryNotFoundError("An error happened\nwhile trying to locate the files")
    error.__cause__ = cause
    return error


REFUSALS = {
    "gated": (lambda: http_error(errors.GatedRepoError, 403),
              ["gated", "accept its licence at https://huggingface.co/owner/name", "`hf auth login`"]),
    "gated, no token": (lambda: http_error(errors.GatedRepoError, 401), ["gated", "`hf auth login`"]),
    "no repository": (lambda: http_error(errors.RepositoryNotFoundError, 404),
                      ["no folder here and no repository", "spelling", "private"]),
    "no revision": (lambda: http_error(errors.RevisionNotFoundError, 404), ["no revision 'v1'", "branch"]),
    "forbidden": (lambda: http_error(errors.HfHubHTTPError, 403), ["may not read", "settings/tokens"]),
    "disabled": (lambda: http_error(errors.DisabledRepoError, 403), ["may not read"]),
    "hub down": (lambda: http_error(errors.HfHubHTTPError, 503), ["status 503", "later"]),
    "too many": (lambda: not_cached(http_error(errors.HfHubHTTPError, 429)), ["status 429", "later"]),
    "no network": (lambda: not_cached(None), ["cannot be reached", "check the network"]),
    "cut off": (lambda: HTTP.ReadTimeout("timed\nout"), ["cannot be reached"]),
    "proxy": (lambda: HTTP.ProxyError("502\nBad Gateway"), ["cannot be reached"]),
    "connection": (lambda: ConnectionResetError(errno.ECONNRESET, "reset"), ["cannot be reached"]),
    "not a hub id": (lambda: errors.HFValidationError("Repo id must\nuse"), ["not a valid hub id"]),
    "disk full": (lambda: OSError(errno.ENOSPC, "No space left on device"), ["no space left", "HF_HOME"]),
    "read-only cache": (lambda: PermissionError(errno.EACCES, "Permission denied", "/cache/x"),
                        ["/cache/x: Permission denied", "HF_HOME"]),
    "something else": (lambda: RuntimeError("Data processing error:\nCAS service"),
                       ["RuntimeError: Data processing error: CAS service", "try again"]),
    "some system error": (lambda: OSError("Consistency check failed:\nfile is 1"),
                          ["OSError: Consistency check failed: file is 1"]),
}


def refuse(monkeypatch, make_error) -> str:
    def download(repo, revision, allow_patterns, ignore_patterns):
        raise make_error()

    monkeypatch.setattr("weights.hub.snapshot_download", download)
    with pytest.raises(ValueError) as caught:
        find_checkpoint(REPO, revision="v1")
    line = line_of(caught)
    assert line.startswith("owner/name: ")
    return line


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_of_the_hub_gets_one_line(monkeypatch, case):
    make_error, fragments = REFUSALS[case]
    line = refuse(monkeypatch, make_error)
    for fragment in fragments:
        assert fragment in line


@pytest.mark.parametrize("token, fragment", [(None, "asks for an access token: log in"),
                                             ("hf_x", "rejects the access token: log in again")])
def test_no_token_and_a_bad_token(monkeypatch, token, fragment):
    monkeypatch.setattr("weights.hub.get_token", lambda: token)
    for make_error in (lambda: http_error(errors.HfHubHTTPError, 401),
                       lambda: not_cached(http_error(errors.HfHubHTTPError, 401))):
        line = refuse(monkeypatch, make_error)
        assert fragment in line and "`hf auth login`" in line


def test_every_kind_of_refusal_reads_differently(monkeypatch):
    cases = ["gated", "no repository", "no revision", "forbidden", "hub down", "no network", "not a hub id",
             "disk full", "read-only cache", "something else"]
    lines = [refuse(monkeypatch, REFUSALS[case][0]) for case in cases]
    assert len(set(lines)) == len(cases)


def test_read_config_passes_an_unquantized_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mllama", "quantization_config": None}))
    assert read_config(tmp_path).text.vocab_size == 128256
