"""Every method in two processes that share a model keeps what it keeps in one."""
import json
from pathlib import Path

import pytest
from helpers import I, randomise
from matrix_options import OPTIONS
from over_ranks_checks import every_method
from ranks_run import all_well, run_ranks

from model.llama_vision import LlamaVision
from pruning import METHODS
from weights import config_from_dict, save_model

CONFIG = {
    "model_type": "mllama", "image_token_index": I,
    "text_config": {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6,
                    "num_attention_heads": 8, "num_key_value_heads": 4, "cross_attention_layers": [1, 3, 5]},
    "vision_config": {"hidden_size": 16, "intermediate_size": 32, "attention_heads": 4, "image_size": 28,
                      "num_hidden_layers": 2, "num_global_layers": 1,
                      "intermediate_layers_indices": [0, 1]}}
PROMPTS = [[5, 6, I, 7, 8, 9, 10, 11], [12, 13, 14], [I, 5, 15, I, 16, 17], [9, 8, I, I, 18]]
GRIDS = [[(2, 2)], [], [(1, 1), (1, 3)], [(1, 2), (2, 1)]]            # tiles of their images: rows, columns


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    config = config_from_dict(CONFIG)
    save_model(randomise(LlamaVision(config), config.vision, seed=0), folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def cases(folder: Path, options: dict[str, list[dict]]) -> list[tuple[str, dict]]:
    always = {"quecc": {"weights": "pool"}, "sgl": {"guide": str(folder)}}
    return [(method, {**always.get(method, {}), **chosen})
            for method in METHODS for chosen in options.get(method, [])]


def test_two_ranks(folder):
    first = {method: [{} if method == "zipvl" else {"keep": 0.3}] for method in METHODS}
    all_well(run_ranks(every_method, folder, cases(folder, first), PROMPTS, GRIDS))


def test_heads_alone_on_four_ranks(folder):
    """One KV head on every rank: sets of its own and sets of all heads look alike there."""
    some = {method: OPTIONS[method][:1] for method in ("csp", "zipvl", "attention_predictor")}
    some["csp"] = [{"keep": 0.3}]
    all_well(run_ranks(every_method, folder, cases(folder, some), PROMPTS[:1], GRIDS[:1], count=4))
