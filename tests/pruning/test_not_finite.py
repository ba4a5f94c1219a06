"""Logits that are not finite are never an answer, whatever a method keeps.

NaN in one weight, and fp16 that overflows where bf16 and fp32 do not: every method, and the model without
one, raise ValueError that says so, and no other message stands in its place.
"""
import copy
import math
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import noise, refused
from safetensors.torch import load_file, save_file

from generate import Assistant
from model.answer import Answer
from model.layers import attend
from model.llama_vision import LlamaVision
from pruning import METHODS, load
from weights import find_checkpoint
from weights.image_file import open_image
from weights.tokenizer import messages

IMAGE = Path(__file__).parents[2] / "examples" / "shapes.png"
# Few tokens too: PyTorch's kernel for CPUs makes zeros of NaN where there are fewer than 16 keys and no mask.
CASES = [(None, {}), *((method, {}) for method in METHODS), ("topv", {"keep": 7}), ("spatial", {"keep": 3}),
         ("spatial", {"keep": 5, "full_layers": 0}), ("sgl", {"keep": 3, "full_layers": 0}),
         ("trimmed_llama", {"keep": 3, "per": "kv_head"})]
EACH_CASE = pytest.mark.parametrize("method, options", CASES, ids=str)


@cache
def tiny() -> Assistant:
    return Assistant("tiny", "cpu", "fp32")


def answer(assistant: Assistant, method: str | None, options: dict) -> Answer:
    pruner = None if method is None else load(method, **options)
    encoded = assistant.encode_images([open_image(IMAGE)], pruner)
    return assistant.answer([messages("What is written on the circle?", 1)], encoded, 4, pruner=pruner)


# ----- NaN in one weight


def in_a_query(model: LlamaVision):
    model.language_model.cross_layers[1].cross_attn.q_proj.weight[0, 0] = math.nan


def in_a_key(model: LlamaVision):
    model.language_model.cross_layers[0].cross_attn.k_proj.weight[0, 0] = math.nan


def in_the_vision_encoder(model: LlamaVision):
    model.vision_model.transformer.layers[0].mlp.fc1.weight[0, 0] = math.nan


def in_the_head(model: LlamaVision):
    model.lm_head.weight[5, 5] = math.nan


@cache
def broken(damage: Callable[[LlamaVision], None]) -> Assistant:
    assistant = copy.copy(tiny())
    assistant.model = copy.deepcopy(assistant.model)
    assistant.decode = assistant.model.decode
    with torch.no_grad():
        damage(assistant.model)
    return assistant


@EACH_CASE
@pytest.mark.parametrize("damage", [in_a_query, in_a_key, in_the_vision_encoder, in_the_head])
def test_nan_in_a_weight(damage, method, options):
    with refused("not finite"):
        answer(broken(damage), method, options)


# ----- fp16 that overflows


@pytest.fixture(scope="module")
def large_activations(tmp_path_factory) -> Path:
    """The bundled checkpoint with one MLP whose inner activations are 2 ** 14 times as large, exactly."""
    folder = tmp_path_factory.mktemp("large") / "tiny"
    shutil.copytree(find_checkpoint("tiny"), folder)
    weights = load_file(folder / "model.safetensors")
    for name, power in ("up_proj", 14), ("down_proj", -14):
        weights[f"language_model.model.layers.1.mlp.{name}.weight"] *= 2.0 ** power
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def overflowing(large_activations) -> Assistant:
    return Assistant(str(large_activations), "cpu", "fp16")


@EACH_CASE
def test_fp16_that_overflows(overflowing, method, options):
    with refused("not finite: fp16 overflows where bf16 and fp32 do not"):
        answer(overflowing, method, options)


def test_other_types_do_not_overflow(large_activations):
    exact = Assistant(str(large_activations), "cpu", "fp32")
    assert answer(exact, None, {}).tokens == answer(tiny(), None, {}).tokens
    assert answer(Assistant(str(large_activations), "cpu", "bf16"), None, {}).tokens[0]


# ----- attention


@pytest.mark.parametrize("keys", [1, 2, 7, 8, 15, 16, 17, 40])
@pytest.mark.parametrize("positions", [1, 3, None], ids=["one", "three", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_never_becomes_a_number(keys, positions, dtype):
    """In the query, or in any key or value, of one head: what that head reads is NaN, the others are not."""
    causal, T = positions is None, positions or keys
    parts = {name: noise(1, heads, n, 8, seed=keys).to(dtype)
             for name, heads, n in (("q", 4, T), ("k", 2, keys), ("v", 2, keys))}
    assert attend(**parts, causal=causal).isfinite().all()
    for name, tensor in parts.items():
        for i in {0, tensor.shape[2] - 1}:
            damaged = tensor.clone()
            damaged[0, 0, i] = math.nan
            out = attend(**{**parts, name: damaged}, causal=causal)[0, -1].view(4, 8)   # at the last position
            assert bool(out[0].isnan().all()) == (name != "q" or i == T - 1)
            assert out[2:].isfinite().all()
