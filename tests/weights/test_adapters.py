"""Adapters of PEFT's own writer, merged at load: the logits that its own merging gives."""
from pathlib import Path

import pytest
import torch
from adapter_base import ADAPTERS, LENGTHS, ids, images, write_base
from safetensors.torch import load_file

from weights import load_model

REFERENCE = load_file(ADAPTERS / "reference.safetensors")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@torch.no_grad()
def logits(folder: Path, *adapters: str | Path, **arguments) -> torch.Tensor:
    """After each sequence's last token."""
    paths = [ADAPTERS / adapter if adapter in REFERENCE else adapter for adapter in adapters]
    model = load_model(folder, adapters=paths, **arguments)
    tiles = images()
    found = model(ids(), tiles)[range(len(LENGTHS)), [length - 1 for length in LENGTHS]]
    return found.float()


@pytest.mark.parametrize("case", REFERENCE)
def test_the_logits_of_peft(base, case):
    adapters = [] if case == "base" else case.split("+")
    torch.testing.assert_close(logits(base, *adapters), REFERENCE[case], atol=1e-4, rtol=0)


def test_every_adapter_changes_the_logits():
    for case, reference in REFERENCE.items():
        assert case == "base" or (reference[:, :64] - REFERENCE["base"]).abs().max() > 0.1
