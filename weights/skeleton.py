"""A model that has shapes and no weights: for checks, and to be filled from files."""
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model.config import Config
from model.llama_vision import LlamaVision
from weights.messages import named, one_line


def without_weights(config: Config) -> LlamaVision:
    """A model on the meta device, which has shapes only and takes no memory."""
    with torch.device("meta"), _Unfilled():
        return LlamaVision(config)


def empty_model(config: Config, folder: Path) -> LlamaVision:
    """The model of a folder's config.json on the meta device. Raises ValueError with one line."""
    try:
        return without_weights(config)
    except (RuntimeError, TypeError) as error:          # sizes beyond 64 bits
        raise ValueError(f"{named(folder / 'config.json')}: no model has these sizes "
                         f"({one_line(error, 120)})") from error


class _Unfilled(TorchFunctionMode):
    """Skips normal_(): the values are replaced anyway, and on the meta device it imports for 2 s."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (nn.init.normal_, Tensor.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))
