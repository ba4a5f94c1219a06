"""From a model in memory to model.safetensors with the official names."""
from pathlib import Path

import torch
from torch import Tensor

from model.llama_vision import LlamaVision
from weights.names import EMBEDDING, HEAD, official_name
from weights.parallel import Gathered
from weights.quantized_linear import QuantizedLinear
from weights.safetensors_file import SINGLE, write_tensors


def official_state_dict(model: LlamaVision) -> dict[str, Tensor]:
    """The model's parameters under official names; no copies. Raises ValueError for a quantised model, whose
    layers hold something else than parameters."""
    if any(isinstance(module, Gathered) for module in model.modules()):
        raise ValueError("this process holds a part of the model only: load it in one process to save it")
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError("the model is quantised, and its weights in full are gone: load it without quantize,"
                         " or write it quantised with `python -m weights.quantize MODEL OUT`")
    return {official_name(name): tensor for name, tensor in model.state_dict().items()}


def save_model(model: LlamaVision, folder: str | Path) -> Path:
    """Write model.safetensors with official names into a folder; config.json is the caller's to add.

    The file is replaced at the end, so a model may be saved over the very file that it is mapped from, and a
    full disk leaves the old file. A reader prefers it to an index of shards in the same folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = official_state_dict(model)
    if model.config.text.tie_word_embeddings:           # a tied head is the embedding's memory: store it once
        head = state[official_name(HEAD)]
        embedding = state[official_name(EMBEDDING)]
        if torch.equal(head, embedding[:len(head)]):
            del state[official_name(HEAD)]
    write_tensors(folder / SINGLE, state)
    return folder / SINGLE
