"""A random network of a few layers, and a ragged batch for it: what the tests of the network share."""
import pytest
import torch
from torch import Tensor

from weights import config_from_dict

IMAGE = 60
SMALL = {
    "model_type": "mllama", "image_token_index": IMAGE,
    "text_config": {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5,
                    "num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1, 3],
                    "rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 64}},
    "vision_config": {"hidden_size": 16, "intermediate_size": 32, "attention_heads": 2, "image_size": 28,
                      "num_hidden_layers": 3, "num_global_layers": 2, "intermediate_layers_indices": [1, 2]}}
CONFIG = config_from_dict(SMALL)
RATIOS = CONFIG.vision.supported_aspect_ratios
TOKENS = CONFIG.vision.tokens_per_tile                  # 4 patches and the class token
CROSS, SELF = 2, 3                                      # layers of each kind
every_ratio = pytest.mark.parametrize("grid", RATIOS, ids=lambda grid: "{}x{}".format(*grid))
# A ragged batch: one image, none, two apart, two side by side, one at the end. Padding stands on the right.
ROWS = [[5, 6, IMAGE, 7, 8, 9, 10, 11], [12, 13, 14], [IMAGE, 5, 15, IMAGE, 16, 17], [9, 8, IMAGE, IMAGE, 18],
        [4, 19, 20, IMAGE]]
GRIDS = [[(2, 2)], [], [(1, 1), (1, 3)], [(1, 2), (2, 1)], [(1, 1)]]


def pad(rows: list[list[int]]) -> Tensor:
    return torch.tensor([row + [2] * (max(map(len, rows)) - len(row)) for row in rows])
