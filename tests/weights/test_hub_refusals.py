"""What the hub or its cache refuse gets one line with the right remedy.

Nothing here uses the network: snapshot_download works offline on a cache laid out in the library's way, or
is replaced by one that raises the library's own errors.
"""
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, errors

from weights import find_checkpoint

ROOT = Path(__file__).parents[2]
CONFIG = json.dumps({"model_type": "mllama"})
REPO, COMMIT = "owner/name", "0123456789abcdef0123456789abcdef01234567"


def line_of(caught) -> str:
    line = str(caught.value)
    assert len(line.splitlines()) == 1, line
    return line


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


def offline(cache: Path, monkeypatch) -> str:
    """What is said of a repository that the cache does not give, without a network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache.parent / "token"))
    with pytest.raises(ValueError) as caught:
        find_checkpoint(REPO, revision="v1")
    return line_of(caught)


@pytest.mark.parametrize("part", [".", "models--owner--name", "models--owner--name/refs",
                                  "models--owner--name/snapshots"])
def test_an_unreadable_cache_is_not_an_empty_one(tmp_path, monkeypatch, without_permission, part):
    cache = tmp_path / "hub"
    fill_cache(cache, revision="v1")
    with without_permission(cache / part):
        line = offline(cache, monkeypatch)
    assert f"{cache / part}: Permission denied" in line and "HF_HOME" in line


def test_a_cache_that_is_no_folder(tmp_path, monkeypatch):
    (tmp_path / "hub").touch()
    assert f"{tmp_path / 'hub'}: Not a directory" in offline(tmp_path / "hub", monkeypatch)
    (tmp_path / "loop").symlink_to("loop")
    assert "Too many levels of symbolic links" in offline(tmp_path / "loop", monkeypatch)
    assert "not, or not completely, in the local cache" in offline(tmp_path / "none", monkeypatch)


def test_a_file_that_the_cache_has_lost_or_may_not_show(tmp_path, monkeypatch, without_permission):
    snapshot = fill_cache(tmp_path / "hub", revision="v1")
    blob = tmp_path / "hub" / "models--owner--name" / "blobs" / "abc"
    with without_permission(blob):
        assert f"{snapshot / 'config.json'}"[-60:] in (line := offline(tmp_path / "hub", monkeypatch))
    assert "cannot be read (Permission denied)" in line
    blob.unlink()
    assert "cannot be read (No such file or directory)" in offline(tmp_path / "hub", monkeypatch)


# ---- the hub's refusals

HTTP = sys.modules[errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0]]       # httpx, or requests
PROXY = HTTP.exceptions.ProxyError if HTTP.__name__ == "requests" else HTTP.ProxyError


def http_error(kind, status: int) -> Exception:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(f"{status} Client Error.\n\nsomething\nlong", response=response)


def not_cached(cause: Exception | None) -> Exception:
    error = errors.LocalEntryNotFoundError("An error happened\nwhile trying to locate the files")
    error.__cause__ = cause
    return error


class OldNotCached(errors.LocalEntryNotFoundError, errors.HfHubHTTPError):
    """What huggingface_hub raised before 1.0: an HTTP error without a reply."""

    def __init__(self, cause: Exception | None = None):
        FileNotFoundError.__init__(self, "An error happened\nwhile trying to locate the files")
        self.response = None
        self.__cause__ = cause


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
    "too many, before 1.0": (lambda: OldNotCached(http_error(errors.HfHubHTTPError, 429)), ["status 429"]),
    "too many": (lambda: not_cached(http_error(errors.HfHubHTTPError, 429)), ["status 429", "later"]),
    "no network": (lambda: not_cached(None), ["cannot be reached", "check the network"]),
    "no network, before 1.0": (OldNotCached, ["cannot be reached", "check the network"]),
    "cut off": (lambda: HTTP.ReadTimeout("timed\nout"), ["cannot be reached"]),
    "proxy": (lambda: PROXY("502\nBad Gateway"), ["cannot be reached"]),
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
