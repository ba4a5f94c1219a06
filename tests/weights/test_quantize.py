"""Models whose weights are rounded at load: which layers, what works with them, and their memory."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import refused
from PIL import Image
from safetensors.torch import save_file
from small_checkpoint import EMBEDDING, HEAD, SMALL, single, small_tensors
from torch import nn

from generate import Assistant
from model.llama_vision import LlamaVision
from pruning import load
from weights import config_from_dict, load_model, save_model
from weights.names import official_name
from weights.quantized_layers import WAYS, check_quantize, choice
from weights.quantized_linear import Int4Linear, Int8Linear, QuantizedLinear
from weights.tokenizer import messages

ROOT = Path(__file__).parents[2]


def layers_of(model: LlamaVision) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, QuantizedLinear))}


@pytest.mark.parametrize("way", WAYS)
def test_which_layers(way):
    kind, _, tower = way.partition("+")
    for name, found in layers_of(load_model(quantize=way)).items():
        if name == "multi_modal_projector":
            assert found is nn.Linear
        elif name.startswith("vision_model."):
            assert found is (Int8Linear if tower else nn.Linear)
        else:
            assert found is (Int4Linear if kind == "int4" and name != "lm_head" else Int8Linear)


def test_names_and_shapes_suffice_to_choose():
    norm = "vision_model.transformer.layers.0.input_layernorm"
    assert choice(norm, [1280], "int8+tower") is None
    assert choice(norm.replace("input_layernorm", "mlp.fc1"), [5120, 1280], "int4+tower") is Int8Linear
    assert choice("multi_modal_projector", [4096, 7680], "int4+tower") is None


def test_what_does_not_fit_has_more_bits(tmp_path):
    """The small model's MLP has 48 inputs on the way down: no groups of 32. With 40 it stays as it is."""
    model = load_model(single(tmp_path, small_tensors()), quantize="int4")
    found = {type(layer.mlp.down_proj) for layer in model.language_model.layers}
    assert found == {Int8Linear}
    tensors = {name: tensor[..., :40] if name.endswith("mlp.down_proj.weight") else
               tensor[:40] if name.endswith(("mlp.up_proj.weight", "mlp.gate_proj.weight")) else tensor
               for name, tensor in small_tensors().items()}
    model = load_model(single(tmp_path, {name: t.contiguous() for name, t in tensors.items()},
                              intermediate_size=40), quantize="int4")
    layer = model.language_model.layers[0]
    assert type(layer.mlp.down_proj) is nn.Linear and type(layer.mlp.up_proj) is Int8Linear


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("way", WAYS)
def test_answers_in_every_dtype(way, dtype):
    assistant = Assistant("tiny", "cpu", dtype, quantize=way)
    assert str(assistant.model.dtype) == {"bf16": "torch.bfloat16", "fp16": "torch.float16",
                                          "fp32": "torch.float32"}[dtype]
    encoded = assistant.encode_images([Image.open(ROOT / "examples" / "shapes.png").convert("RGB")])
    questions = "What is written on the circle?", "Do you see a red star?"
    answer = assistant.answer([messages(question, 1) for question in questions], encoded, 8)
    assert [assistant.tokenizer.decode(tokens) for tokens in answer.tokens] == ["Y", "no"]


@pytest.mark.parametrize("method", ["trimmed_llama", "coreset", "aircache", "fastv", "csp"])
def test_pruners_work_on_quantised_models(method, plain, rounded):
    """They keep about the tokens that they keep of the model in full."""
    answers = []
    for assistant in plain, rounded:
        encoded = assistant.encode_images([Image.open(ROOT / "examples" / "shapes.png").convert("RGB")])
        answers.append(assistant.answer([messages("What is written on the circle?", 1)], encoded, 8,
                                        pruner=load(method, keep=0.25)))
    full, other = answers
    assert plain.tokenizer.decode(other.tokens[0]) == plain.tokenizer.decode(full.tokens[0]) == "Y"
    assert other.kept[0] == pytest.approx(full.kept[0], rel=0.25)
    assert other.image_kv_bytes == pytest.approx(full.image_kv_bytes, rel=0.25)     # bf16 keys and values


@pytest.fixture(scope="module")
def plain() -> Assistant:
    return Assistant("tiny", "cpu")


@pytest.fixture(scope="module")
def rounded() -> Assistant:
    return Assistant("tiny", "cpu", quantize="int4+tower")


def test_costs_do_not_depend_on_how_weights_are_stored(plain, rounded):
    assert rounded.model.kv_bytes(64, [(1, 2)]) == plain.model.kv_bytes(64, [(1, 2)])
    assert rounded.model.flops(10, [(1, 1)]) == plain.model.flops(10, [(1, 1)])


def test_a_tied_head_is_rounded_and_the_embedding_is_not(tmp_path):
    tensors = small_tensors()
    del tensors[HEAD]
    model = load_model(single(tmp_path, tensors, tie_word_embeddings=True), quantize="int4")
    embedding = model.language_model.embed_tokens.weight
    assert torch.equal(embedding, tensors[EMBEDDING])
    stored = Int8Linear.rounded(tensors[EMBEDDING][:64], torch.float32)
    assert torch.equal(model.lm_head.weight, stored["weight"])
    assert torch.equal(model.lm_head.scale, stored["scale"])


def test_no_gradients_and_no_saving(tmp_path):
    folder = single(tmp_path, small_tensors())
    model = load_model(folder, quantize="int8")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    ids = torch.zeros(1, 3, dtype=torch.long)
    assert not model(ids, [None]).requires_grad
    model.requires_grad_(True)
    with refused("no gradients", ["without quantize"]):
        model(ids, [None])
    before = (folder / "model.safetensors").read_bytes()
    with refused("the model is quantised", ["python -m weights.quantize"]):
        save_model(model, folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_refused_before_anything_is_read():
    for way, device, dtype, words in (
            ("int5", "cpu", None, "'int5': use one of int8, int4, int8+tower, int4+tower"),
            ("int4+head", "cpu", None, "'int4+head'"), ("", "cpu", None, "''"),
            (4, "cpu", None, "unknown quantize 4"),
            ("int8", "cpu", torch.float64, "choose the dtype bf16, fp16 or fp32"),
            ("int4", "mps", None, "quantise to int8"),
            ("int4", "cuda", torch.float16, "choose the dtype bf16")):
        with pytest.raises(ValueError, match=re.escape(words)):
            check_quantize(way, torch.device(device), dtype)
    check_quantize("int8+tower", torch.device("cuda"), torch.float32)
    check_quantize("int4", torch.device("cuda"), torch.bfloat16)
    with refused("unknown quantize 'int2'"):
        load_model("owner/name", quantize="int2")


MEMORY = """
import sys, torch
from benchmarks.measure import peak_added
from weights import load_model
torch.set_num_threads(1)
load_model("tiny", "cpu", quantize="int8")              # what the first call needs is not the model's
made = []
job = lambda: made.append(load_model(sys.argv[1], "cpu", quantize=sys.argv[2]))
print(peak_added(job, torch.device("cpu")))
print(sum(buffer.nbytes for buffer in made[0].buffers()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("way", ["int8", "int4"])
def test_peak_memory_is_the_rounded_model_and_one_tensor(tmp_path, way):
    """No tensor takes more than 8.4 MB in bf16, and all take 128 MB. Pages of the file count, too."""
    text = SMALL["text_config"] | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4,
                                   "num_attention_heads": 8}
    config = SMALL | {"text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = LlamaVision(config_from_dict(config))
    save_file({official_name(name): torch.full(tensor.shape, 0.01, dtype=torch.bfloat16)
               for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    no_holes = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}        # what is freed goes back at once
    done = subprocess.run([sys.executable, "-c", MEMORY, tmp_path, way], cwd=ROOT, env=no_holes,
                          capture_output=True, text=True)
    peak, held = map(int, done.stdout.split())
    assert held in {"int8": range(60_000_000, 62_000_000), "int4": range(32_000_000, 34_000_000)}[way]
    assert held <= peak <= held + 3 * 8.4e6
