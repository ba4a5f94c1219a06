"""From what the user typed to a folder that holds a checkpoint: 'tiny', 'guide', a folder, or a hub id.

    source ── find_checkpoint ─► folder ── (config_file.py) ─► Config ── (load.py) ─► LlamaVision

The bundled checkpoints lie beside this file: tiny, and the smaller guide. A hub id is fetched into
huggingface_hub's own cache, so HF_HOME, HF_HUB_OFFLINE, HF_TOKEN and its progress bars work as everywhere
else. Whatever cannot be read (another format, another model, a quantized checkpoint) is refused here, before
its weights are downloaded, in one line that says what to do instead.
"""
import errno
import os
import re
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

BUNDLED = {name: Path(__file__).parent / name for name in ("tiny", "guide")}
LEARNED = Path(__file__).parent / "learned"        # small weights of the pruning methods that learn
FILES = ["*.safetensors", "*.json", "*.jinja"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
WANTED = "the safetensors checkpoint in the official layout is wanted, as meta-llama has it on the hub"
FOREIGN = (                                             # what a folder may hold instead
    ("*.gguf", "GGUF files"),
    ("*.pth", "Meta's original .pth files"),
    ("original/*.pth", "Meta's original .pth files in original/"),
    ("adapter_config.json", "a LoRA adapter, to be merged into its base model first"),
    ("pytorch_model*.bin*", "PyTorch pickle files (pytorch_model.bin)"),
)


def find_checkpoint(source: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: 'tiny' or 'guide' (bundled), a folder, a hub id 'owner/name' (downloaded).

    `revision` is a branch, tag or commit of the hub repository. Raises ValueError with one line where there
    is no such thing, the hub does not give it out, or it is not a checkpoint that can be read.
    """
    text = str(source)
    folder = BUNDLED.get(text) or Path(os.path.expanduser(text))
    if text in BUNDLED or os.path.isdir(text and folder):
        if revision is not None:
            raise ValueError(f"{text}: revision {revision!r} goes with a hub id, but this is a local folder")
        _refuse_without_config(folder, text)
        return folder
    if os.path.exists(text and folder):                 # Path("") is the folder we are in
        kind = {".gguf": " in the GGUF format", ".pth": " in Meta's original format"}.get(folder.suffix, "")
        wanted = WANTED if kind else "pass the folder that holds config.json and model.safetensors"
        raise ValueError(f"{text} is a file{kind}, not a folder: {wanted}")
    if isinstance(source, Path) or not HUB_ID.fullmatch(text):
        raise ValueError(f"{text!r} is neither 'tiny', nor a folder here, nor a hub id like owner/name")
    folder = _download(text, revision, ["config.json"])
    _refuse_without_config(folder, text)
    read_config(folder)                                 # refuse a wrong model now, not after 20 GB of it
    return _download(text, revision, FILES)


def foreign_format(folder: Path) -> str | None:
    """The name of another checkpoint format that the folder holds, or None."""
    return next((name for pattern, name in FOREIGN if any(folder.glob(pattern))), None)


def _refuse_without_config(folder: Path, source: str):
    if not (folder / "config.json").is_file():
        foreign = foreign_format(folder)
        raise ValueError(f"{source}: " + (f"it holds {foreign}; {WANTED}" if foreign else
                         "no config.json there; a checkpoint is a folder of config.json and safetensors"))


def _download(repo: str, revision: str | None, patterns: list[str]) -> Path:
    """The files of a hub repository that `patterns` names, from the cache or the network; no sub-folders."""
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns,
                                      ignore_patterns=["*/*"]))     # * matches '/' too: original/, onnx/, ...
    except Exception as error:                          # their classes differ between versions of the library
        raise ValueError(f"{repo}: {_reason(error, repo, revision)}") from error


def _reason(error: Exception, repo: str, revision: str | None) -> str:
    """One line for an error of huggingface_hub; many of its classes inherit from each other: order counts."""
    address = f"https://huggingface.co/{repo}"
    match error:
        case GatedRepoError():
            return f"the repository is gated: accept its licence at {address} and log in with `hf auth login`"
        case RevisionNotFoundError():
            return f"it has no revision {revision!r}: choose a branch, tag or commit that {address} lists"
        case RepositoryNotFoundError():
            return ("no folder here and no repository on the hub has this name: check the spelling, "
                    "or log in with `hf auth login` if it is private")
        case (HfHubHTTPError(response=reply)
              | LocalEntryNotFoundError(__cause__=HfHubHTTPError(response=reply))):
            return _refusal(reply.status_code)
        case HFValidationError():
            return "not a valid hub id: it should read 'owner/name'"
        case LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            return ("not, or not wholly, in the local cache, and HF_HUB_OFFLINE forbids downloading it: "
                    "unset HF_HUB_OFFLINE, or pass a folder")
        case LocalEntryNotFoundError() | ConnectionError() | TimeoutError():
            return _no_network()
        case OSError(errno=errno.ENOSPC):
            return (f"no space left for the download in {constants.HF_HUB_CACHE}: free some, "
                    "or point HF_HOME at a larger disk")
        case OSError(filename=str()):
            return f"{error.filename}: {error.strerror}: make it usable, or point HF_HOME at another folder"
    # The HTTP library beneath is another one in every major version of huggingface_hub.
    if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests", "urllib3"):
        return _no_network()
    what = " ".join(str(error).split())[:200]
    return f"the download failed ({type(error).__name__}: {what}); try again, or pass a folder"


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
