"""A folder of Meta's files, from the state dicts that Meta's own modules had (data/meta/make.py)."""
import base64
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

DATA = Path(__file__).parent / "data" / "meta"


def meta_folder(folder: Path, ranks: int = 1) -> Path:
    """As Meta gives it out, with a tokenizer of 256 bytes; one rank is consolidated.pth, as in 11B."""
    for rank in range(ranks):
        state = load_file(DATA / f"ranks{ranks}.{rank}.safetensors")
        state["text_model.rope.freqs"] = torch.zeros(2)             # in the published files, and of no use
        torch.save(state, folder / ("consolidated.pth" if ranks == 1 else f"consolidated.{rank:02d}.pth"))
    shutil.copyfile(DATA / "params.json", folder / "params.json")
    lines = [base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    return folder


def edit_params(folder: Path, **changes):
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | changes))
