"""The small random model that the adapters in data/adapters were made for, and a batch to ask it about."""
import json
from pathlib import Path

import torch
from helpers import random_tiles, randomise

from model.image_tokens import Tiles
from model.llama_vision import LlamaVision
from weights import config_from_dict, save_model

ADAPTERS = Path(__file__).parent / "data" / "adapters"
BASE = {
    "model_type": "mllama", "image_token_index": 64,
    "text_config": {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
                    "num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1],
                    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
    "vision_config": {"hidden_size": 16, "intermediate_size": 32, "attention_heads": 2, "image_size": 28,
                      "num_hidden_layers": 2, "num_global_layers": 1, "intermediate_layers_indices": [1],
                      "vision_output_dim": 32}}
IDS = [[4, 64, 9, 11, 3, 60, 22, 17], [30, 5, 64, 41, 7, 2, 2, 2]]      # padded on the right
LENGTHS = [8, 5]
GRIDS = [[(1, 1)], [(2, 1)]]


def write_base(folder: Path, **text_config) -> Path:
    """The base model as a folder; always the same weights."""
    config = BASE | {"text_config": BASE["text_config"] | text_config}
    model = LlamaVision(config_from_dict(BASE))
    save_model(randomise(model, model.config.vision, seed=3), folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def images() -> list[Tiles]:
    vision = config_from_dict(BASE).vision
    return [random_tiles(grids, vision, seed) for seed, grids in enumerate(GRIDS)]


def ids() -> torch.Tensor:
    return torch.tensor(IDS)
