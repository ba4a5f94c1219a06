"""From what the user typed to a folder that holds a checkpoint: 'tiny', 'guide', a folder, or a hub id.

    source ── find_checkpoint ─► folder ── (config_file.py) ─► Config ── (load.py) ─► LlamaVision

The bundled checkpoints lie beside this file: tiny, and the smaller guide. A hub id is fetched into
huggingface_hub's own cache, so HF_HOME, HF_HUB_OFFLINE, HF_TOKEN and its progress bars work as everywhere
else. Whatever cannot be read (another format, another model, a quantized checkpoint) is refused here, before
its weights are downloaded, in one line that says what to do instead.
"""
import errno
import fnmatch
import os
import re
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import constants, get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from weights.config_file import read_config
from weights.files import exists, read_json, unreadable
from weights.messages import named, one_line, quoted, reason
from weights.safetensors_file import INDEX, SINGLE

BUNDLED = {name: Path(__file__).parent / name for name in ("tiny", "guide")}
LEARNED = Path(__file__).parent / "learned"        # small weights of the pruning methods that learn
FILES = ["*.safetensors", "*.json", "*.jinja"]
CHECKPOINT = "pass the folder that holds config.json and model.safetensors"
ADAPTER = "adapter_config.json"
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)      # how the system says that there is nothing
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{,95}/[\w.-]{1,96}", re.ASCII)
WANTED = "needed is a safetensors checkpoint in the official layout, as meta-llama has it on the hub"
FOREIGN = (                                             # what a folder may hold instead
    ("*.gguf", "GGUF files"),
    ("original/*.pth", "Meta's original .pth files in original/, which `python -m weights.from_meta` reads"),
    ("*.pth", "Meta's original .pth files, which `python -m weights.from_meta FOLDER OUT` converts"),
    ("adapter_config.json", "an adapter alone, which --adapter merges into the base that --model names"),
    ("pytorch_model*.bin*", "PyTorch pickle files (pytorch_model.bin)"),
)


def find_checkpoint(source: str | Path, revision: str | None = None, adapters: Sequence = (),
                    check: Callable[[Path], object] = read_config) -> Path:
    """The folder of a checkpoint: 'tiny' or 'guide' (bundled), a folder, a hub id 'owner/name' (downloaded).

    `revision` is a branch, tag or commit of the hub repository; `adapters` are those that were asked for.
    `check` gets a folder that has config.json, before the weights are downloaded. Raises ValueError with one
    line where there is no such thing, the hub does not give it out, it is not a checkpoint that can be read,
    or an adapter lies beside the weights and nothing was said about it.
    """
    text = str(source)
    folder = BUNDLED.get(text) or local_folder(text, CHECKPOINT)
    if folder is not None:
        if revision is not None:
            raise ValueError(f"{named(text)}: revision {quoted(revision)} goes with a hub id, but this is a "
                             "local folder")
        _refuse_unusable(folder, text)
        if exists(folder / ADAPTER) and not any(exists(folder / name) for name in (SINGLE, INDEX)):
            raise _adapter_alone(folder, text)
        _refuse_silent_adapter(folder, text, adapters)
        return folder
    if isinstance(source, Path) or not HUB_ID.fullmatch(text):
        raise ValueError(f"{quoted(text)} is neither 'tiny', nor a folder here, nor a hub id like owner/name")
    folder = download(text, revision, ["config.json", ADAPTER])
    _refuse_unusable(folder, text)
    _refuse_silent_adapter(folder, text, adapters)
    check(folder)                                       # refuse a wrong model now, not after 20 GB of it
    return download(text, revision, FILES)


def foreign_format(folder: Path) -> str | None:
    """The name of another checkpoint format that the folder holds, or None."""
    files = _files(folder) + [f"original/{name}" for name in _files(folder / "original")]
    return next((words for pattern, words in FOREIGN if fnmatch.filter(files, pattern)), None)


def local_folder(text: str, advice: str) -> Path | None:
    """The folder that `text` names on this machine, or None where nothing has this name.

    Raises ValueError with one line that ends in `advice` where it is a file.
    """
    try:
        name = os.path.expanduser(text)
        os.lstat(name)                                  # a link that leads nowhere is there
        mode = os.stat(name).st_mode
    except OSError as error:
        if error.errno in ABSENT and not os.path.islink(name):
            return None
        raise unreadable(text, error) from None
    except ValueError:                                  # a NUL byte or half a surrogate pair: no such name
        return None
    folder = Path(name)
    if not stat.S_ISDIR(mode):
        kind = {".gguf": " in the GGUF format", ".pth": " in Meta's original format"}.get(folder.suffix, "")
        raise ValueError(f"{named(text)} is a file{kind}, not a folder: {WANTED if kind else advice}")
    return folder


def _files(folder: Path) -> list[str]:
    """The names in a folder; none where there is no such folder."""
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise unreadable(folder, error) from None


def _refuse_unusable(folder: Path, source: str):
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{named(folder)}: the folder's path is not valid UTF-8, and the libraries that "
                         "read weights need that: rename the folder") from None
    if exists(folder / "config.json"):
        return
    foreign = foreign_format(folder)
    if exists(folder / ADAPTER):
        raise _adapter_alone(folder, source)
    if foreign is not None:
        raise ValueError(f"{named(source)}: it holds {foreign}; {WANTED}")
    raise ValueError(f"{named(source)}: no config.json there; a checkpoint is a folder of config.json and "
                     "safetensors")


def _adapter_alone(folder: Path, source: str) -> ValueError:
    """With the base that the adapter says that it has, where it says so in words that can be typed."""
    try:
        base = read_json(folder / ADAPTER)["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not HUB_ID.fullmatch(base):
        base = "BASE"
    return ValueError(f"{named(source)}: it holds an adapter alone, without its base: give --model {base} "
                      f"--adapter {named(source)}")


def _refuse_silent_adapter(folder: Path, source: str, adapters: Sequence):
    """Nobody knows whether weights have merged the adapter that lies beside them: the user must say so."""
    if not adapters and exists(folder / ADAPTER):
        raise ValueError(f"{named(source)}: an adapter lies beside the weights ({ADAPTER}): merge it with "
                         f"--adapter {named(source)}, or say --adapter none if they have merged it already")


def download(repo: str, revision: str | None, patterns: list[str]) -> Path:
    """The files of a hub repository that `patterns` names, from the cache or the network; no sub-folders."""
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns,
                                      ignore_patterns=["*/*"]))     # * matches '/' too: original/, onnx/, ...
    except Exception as error:                          # their classes differ between versions of the library
        raise ValueError(f"{named(repo)}: {_remedy(error, repo, revision)}") from error


def _remedy(error: Exception, repo: str, revision: str | None) -> str:
    """One line for an error of huggingface_hub. Many of its classes inherit from each other: order counts."""
    address = f"https://huggingface.co/{named(repo)}"
    trouble = _cache_trouble(repo)
    match error:
        case GatedRepoError():
            return f"the repository is gated: accept its licence at {address} and log in with `hf auth login`"
        case RevisionNotFoundError():
            return (f"it has no revision {quoted(revision)}: choose a branch, tag or commit that {address} "
                    "lists")
        case RepositoryNotFoundError():
            return ("no folder here and no repository on the hub has this name: check the spelling, "
                    "or log in with `hf auth login` if it is private")
        case LocalEntryNotFoundError(__cause__=HfHubHTTPError(response=reply)) if reply is not None:
            return _refusal(reply.status_code)
        case HfHubHTTPError(response=reply) if reply is not None:
            return _refusal(reply.status_code)          # before 1.0, "not in the cache" has no reply
        case HFValidationError():
            return "not a valid hub id: it should read 'owner/name'"
        case LocalEntryNotFoundError() | RuntimeError() if trouble is not None:      # RuntimeError: a loop
            return trouble
        case LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            return ("not, or not completely, in the local cache, and HF_HUB_OFFLINE forbids downloading it: "
                    "unset HF_HUB_OFFLINE, or pass a folder")
        case LocalEntryNotFoundError() | ConnectionError() | TimeoutError():
            return _no_network()
        case OSError(errno=errno.ENOSPC):
            return (f"no space left for the download in {named(constants.HF_HUB_CACHE)}: free some, "
                    "or point HF_HOME at a larger disk")
        case OSError(filename=str()):
            return _unusable(error)
    # The HTTP library beneath is another one in every major version of huggingface_hub.
    if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests", "urllib3"):
        return _no_network()
    what = one_line(error, 200)
    return f"the download failed ({type(error).__name__}: {what}); try again, or pass a folder"


def _cache_trouble(repo: str) -> str | None:
    """Why the cache cannot be read, where it is there: huggingface_hub takes an unreadable one for empty."""
    cache = Path(constants.HF_HUB_CACHE)
    home = cache / f"models--{repo.replace('/', '--')}"
    for folder in cache, home, home / "refs", home / "snapshots":
        try:
            os.listdir(folder)
        except FileNotFoundError:
            return None
        except OSError as error:
            return _unusable(error)
    return None


def _unusable(error: OSError) -> str:
    return f"{named(error.filename)}: {reason(error)}: make it usable, or point HF_HOME at another folder"


def _no_network() -> str:
    return "not in the local cache, and the hub cannot be reached: check the network, or pass a folder"


def _refusal(status: int) -> str:
    if status == 401 and get_token() is None:
        return "the hub asks for an access token: log in with `hf auth login`, or set HF_TOKEN"
    if status == 401:
        return "the hub rejects the access token: log in again with `hf auth login`, or correct HF_TOKEN"
    if status == 403:
        return "the access token may not read this repository: allow it at https://huggingface.co/settings/tokens"
    return f"the hub answers with HTTP status {status}: try again later, or pass a folder"
