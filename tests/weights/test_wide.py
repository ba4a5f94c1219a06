"""Narrow weights on a CPU that has no fast products of them: they are widened, and the numbers stay."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_checkpoint import single, small_tensors
from torch import nn

from weights import load_model
from weights.wide import AT_ONCE, FEW, WideConv2d, WideLinear, is_slow, wide_words, widen

ROOT = Path(__file__).parents[2]
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}        # a CPU of ten years ago
NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
LOAD = """
import sys, torch
from weights import load_model
from weights.wide import wide_words
for dtype in "bf16", "fp16", "fp32":
    model = load_model(sys.argv[1], dtype=dtype)
    print(sum(type(module).__name__.startswith("Wide") for module in model.modules()), wide_words(model))
"""


def linear(bias: bool, dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 48, bias, dtype=dtype)


@NARROW
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_a_wide_product_is_that_of_fp32_rounded_once(dtype, bias, monkeypatch):
    plain = linear(bias, dtype)
    wide = WideLinear(plain)
    x = torch.randn(2, FEW, 64).to(dtype)
    expected = F.linear(x.float(), plain.weight.float(), plain.bias.float() if bias else None).to(dtype)
    assert torch.equal(wide(x), expected)
    monkeypatch.setattr("weights.wide.AT_ONCE", AT_ONCE // 2 ** 14)         # 16 rows of the weight at a time
    assert wide(x).shape == expected.shape
    torch.testing.assert_close(wide(x), expected)
    few = x[:1, :FEW - 1]
    assert torch.equal(wide(few), plain(few))


@NARROW
def test_a_convolution_is_widened_too(dtype):
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 8, 14, 14, bias=False, dtype=dtype)
    x = torch.randn(2, 3, 56, 56).to(dtype)
    with torch.inference_mode():
        expected = F.conv2d(x.float(), plain.weight.float(), stride=14).to(dtype)
        torch.testing.assert_close(WideConv2d(plain)(x), expected)


def test_training_keeps_no_widened_weight():
    """Each would stay in memory until the gradients are made."""
    plain = linear(True, torch.bfloat16)
    wide = WideLinear(plain)
    x = torch.randn(FEW, 64, dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = wide(x)
    assert torch.equal(y, plain(x))
    assert {t.dtype for t in kept} == {torch.bfloat16}


def test_a_compiled_step_is_one_graph_for_all_batches():
    wide = WideLinear(linear(True, torch.bfloat16))
    graphs = []
    step = torch.compile(wide.forward, fullgraph=True,
                         backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    with torch.inference_mode():
        for batch in 2, FEW, 3 * FEW:
            x = torch.randn(batch, 64, dtype=torch.bfloat16)
            torch._dynamo.mark_dynamic(x, 0)
            assert step(x).shape == (batch, 48)
    assert len(graphs) == 1


def test_every_layer_of_a_loaded_model_is_replaced_and_keeps_its_weights(tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in small_tensors().items()}
    model = load_model(single(tmp_path, tensors))
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    widen(model)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    kinds = [type(module) for module in model.modules()]
    assert nn.Linear not in kinds and nn.Conv2d not in kinds
    assert "bfloat16" in wide_words(model) and "float32" in wide_words(model)


def test_the_loader_widens_where_the_cpu_is_slow(tmp_path):
    single(tmp_path, small_tensors())
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], cwd=ROOT, env=os.environ | AVX2,
                          capture_output=True, text=True)
    bf16, fp16, fp32 = done.stdout.splitlines()
    for line, name in (bf16, "bfloat16"), (fp16, "float16"):
        count, words = line.split(maxsplit=1)
        assert int(count) > 20 and words.startswith(f"this CPU has no fast {name}"), done.stderr
    assert fp32 == "0 None"


def test_only_narrow_types_of_a_cpu_are_slow():
    assert not any(is_slow(dtype, torch.device("cuda")) for dtype in (torch.bfloat16, torch.float16))
    assert not any(is_slow(dtype, torch.device("cpu")) for dtype in (torch.float32, torch.float64))


@pytest.mark.parametrize("onednn, instructions, slow", [(True, True, False), (True, False, True),
                                                        (False, False, True), (False, True, True)])
def test_avx512_alone_is_not_enough(monkeypatch, onednn, instructions, slow):
    """oneDNN says yes to bf16 on every CPU with AVX512, also where it has to make it up."""
    monkeypatch.setattr("weights.wide.has_kernels", lambda dtype: onednn)
    monkeypatch.setattr("weights.wide.has_instructions", lambda dtype: instructions)
    assert is_slow(torch.bfloat16, torch.device("cpu")) == slow
