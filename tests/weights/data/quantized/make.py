"""Writes the small quantized checkpoints beside this file with the libraries whose formats they are.

    python make.py nf4 nf4_float16 fp4 int8 fp8 fp8_tensor w8a8 w4a16 w4a16_zeros w8a16 \
        ao_int8 ao_int4 ao_float8 hqq8 hqq4 hqq3 hqq2
    python make.py w4a16_order                              # with compressed-tensors==0.10.2

Each NAME becomes NAME.safetensors, NAME.json (its config.json) and NAME.logits.safetensors: what transformers
computes in fp32 with the weights as the same library dequantizes them, its tapped features corrected by one
layer as in tests/model/test_transformers.py. The prompt begins with its image. It needs an environment of its
own:  pip install torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 bitsandbytes==0.50.2
compressed-tensors==0.20.1 torchao==0.18.0 hqq==0.2.8.post1
"""
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, MllamaConfig, MllamaForConditionalGeneration

HERE = Path(__file__).parent
TEXT = {"vocab_size": 40, "hidden_size": 36, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 3, "num_key_value_heads": 1, "cross_attention_layers": [1],
        "max_position_embeddings": 512, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
VISION = {"hidden_size": 20, "intermediate_size": 24, "attention_heads": 2, "num_hidden_layers": 2,
          "num_global_layers": 1, "image_size": 28, "patch_size": 14, "max_num_tiles": 2,
          "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]], "intermediate_layers_indices": [1],
          "vision_output_dim": 40}
WIDER = {"hidden_size": 48, "intermediate_size": 64}        # whole groups of 16
NOT_CONVERTED = ["model.vision_model", "model.multi_modal_projector", "lm_head"]
NOT_QUANTIZED = ["re:.*lm_head", "re:.*multi_modal_projector", "re:.*vision_model.*"]   # as RedHat's have it


# ---- a model, and what it computes


def plain(text: dict, dtype: torch.dtype) -> MllamaForConditionalGeneration:
    """Random weights and open gates."""
    torch.manual_seed(0)
    config = MllamaConfig(text_config=TEXT | text, vision_config=VISION, image_token_index=40)
    model = MllamaForConditionalGeneration(config).float()
    for name, parameter in model.named_parameters():
        mean = 1.0 if name.endswith("norm.weight") else 0.0
        parameter.data.normal_(mean, 0.5 if "gate" in name else 0.1)
    return model.to(dtype)


def logits(config: MllamaConfig, state: dict[str, Tensor]) -> Tensor:
    """[1, T, V] of these weights in fp32."""
    model = MllamaForConditionalGeneration(config).float()
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    model.model.vision_model.intermediate_layers_indices = [0]
    torch.manual_seed(1)
    ids = torch.cat((torch.tensor([40]), torch.randint(3, 40, (11,))))[None]
    pixels = torch.randn(1, 1, 2, 3, 28, 28)
    output = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels,
                          aspect_ratio_ids=torch.tensor([[2]]), aspect_ratio_mask=torch.ones(1, 1, 2).long(),
                          cross_attention_mask=torch.ones(1, 12, 1, 2).long(), use_cache=False)
    save_file({"ids": ids, "pixels": pixels[0]}, HERE / "prompt.safetensors")
    return output.logits


# ---- bitsandbytes


def bitsandbytes(dtype=torch.bfloat16, **options):
    def make(folder: Path) -> dict[str, Tensor]:
        from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
        plain({}, dtype).save_pretrained(folder / "plain")
        model = MllamaForConditionalGeneration.from_pretrained(
            folder / "plain", quantization_config=BitsAndBytesConfig(**options), dtype=dtype,
            device_map={"": "cpu"})
        model.save_pretrained(folder)
        state = {}
        for name, parameter in model.named_parameters():
            state[name] = parameter.data
            if hasattr(parameter, "quant_state"):
                state[name] = dequantize_4bit(parameter.data, parameter.quant_state)
            elif parameter.dtype == torch.int8:
                state[name] = int8_vectorwise_dequant(parameter.data, parameter.SCB).to(dtype)
        return state
    return make


# ---- compressed-tensors


def compressed_tensors(scheme: str | dict, text: dict = WIDER, order: bool = False):
    layout = "pack-quantized" if order else None           # version 0.10 cannot tell by itself

    def make(folder: Path) -> dict[str, Tensor]:
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
        model = plain(text, torch.bfloat16)
        model.config.dtype = torch.bfloat16
        groups = {scheme: ["Linear"]} if isinstance(scheme, str) else {"group_0": scheme}
        config = QuantizationConfig(config_groups=groups, ignore=NOT_QUANTIZED)
        apply_quantization_config(model, config)
        for module in model.modules():
            if isinstance(module, nn.Linear) and hasattr(module, "weight_scale"):
                calibrate(module, order)
        state = {name: parameter.data for name, parameter in model.named_parameters()}
        compressor = ModelCompressor.from_pretrained_model(model, quantization_format=layout)
        compressor.compress_model(model)
        model.save_pretrained(folder)
        compressor.update_config(folder)
        if order:
            return in_order(model, state)
        compressor.decompress_model(model)
        return {name: parameter.data for name, parameter in model.named_parameters()
                if not name.endswith(("_scale", "_zero_point", "_shape"))}
    return make


def calibrate(module: nn.Linear, order: bool):
    """Scales and zero points of its weight from the least and the largest value, as llm-compressor's."""
    from compressed_tensors.quantization.utils import calculate_qparams
    args = module.quantization_scheme.weights
    weight = module.weight.data
    if order:                           # columns belong to groups in another order
        groups = torch.randperm(weight.shape[1]) // args.group_size
        module.weight_g_idx.data.copy_(groups)
        weight = weight[:, groups.argsort()]
    if args.strategy == "tensor":
        parts = weight.reshape(-1)
    elif args.strategy == "group":
        parts = weight.unflatten(1, (-1, args.group_size))                          # [N, G, group]
    else:
        parts = weight[:, None]                                                     # [N, 1, K]
    scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
    module.weight_scale.data.copy_(scale)
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data.copy_(zero)


def in_order(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What version 0.10, which cannot decompress a model in memory, made of the weights."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    result = {}
    for name, tensor in state.items():
        module = name.removesuffix(".weight")
        if f"{module}.weight_g_idx" in state:
            scale, zero = state[f"{module}.weight_scale"], state[f"{module}.weight_zero_point"]
            args = model.get_submodule(module).quantization_scheme.weights
            result[name] = fake_quantize(tensor, scale, zero, args, state[f"{module}.weight_g_idx"])
        elif not name.endswith(("_scale", "_zero_point", "_g_idx")):
            result[name] = tensor
    return result


def integers(bits: int, **options) -> dict:
    return {"targets": ["Linear"], "weights": {"num_bits": bits, "type": "int", **options}}


# ---- torchao


def torchao(make_config: Callable):
    def make(folder: Path) -> dict[str, Tensor]:
        from transformers import TorchAoConfig
        plain({}, torch.bfloat16).save_pretrained(folder / "plain")
        config = TorchAoConfig(make_config(), modules_to_not_convert=NOT_CONVERTED)
        model = MllamaForConditionalGeneration.from_pretrained(folder / "plain", quantization_config=config,
                                                               dtype=torch.bfloat16)
        model.save_pretrained(folder)
        return {name: parameter.dequantize() if type(parameter.data) is not Tensor else parameter.data
                for name, parameter in model.named_parameters()}
    return make


# ---- HQQ


def hqq(bits: int, group_size: int, axis: int):
    """transformers quantizes with HQQ on a GPU only; these are the same HQQLinear modules, and its config."""
    def make(folder: Path) -> dict[str, Tensor]:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
        from transformers import HqqConfig
        model = plain({}, torch.bfloat16)
        state = {name: parameter.data for name, parameter in model.named_parameters()}
        config = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=axis)
        for name, module in list(model.model.language_model.named_modules()):
            if type(module) is nn.Linear:
                layer = HQQLinear(module, config, compute_dtype=torch.bfloat16, device="cpu")
                model.model.language_model.set_submodule(name, layer)
                state[f"model.language_model.{name}.weight"] = layer.dequantize()
        model.config.quantization_config = HqqConfig(nbits=bits, group_size=group_size, axis=axis)
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        model.config.dtype = torch.bfloat16
        model.config.save_pretrained(folder)
        return state
    return make


# ---- the kinds


def int8_only():
    from torchao.quantization import Int8WeightOnlyConfig
    return Int8WeightOnlyConfig(version=2)


def intx_only():
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup
    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(4), version=2)


def float8_only():
    from torchao.quantization import Float8WeightOnlyConfig
    return Float8WeightOnlyConfig(version=2)


KINDS = {
    "nf4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                        llm_int8_skip_modules=["model.vision_model", "lm_head"]),
    "nf4_float16": bitsandbytes(torch.float16, load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                bnb_4bit_quant_storage=torch.float16,
                                llm_int8_skip_modules=["model.vision_model", "lm_head"]),
    "fp4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": bitsandbytes(load_in_8bit=True),
    "fp8": compressed_tensors("FP8_DYNAMIC"),
    "fp8_tensor": compressed_tensors("FP8"),
    "w8a8": compressed_tensors("W8A8"),
    "w4a16": compressed_tensors(integers(4, strategy="group", group_size=16, symmetric=True)),
    "w4a16_zeros": compressed_tensors(integers(4, strategy="group", group_size=16, symmetric=False)),
    "w4a16_order": compressed_tensors(integers(4, strategy="group", group_size=16, symmetric=True,
                                               actorder="group"), order=True),
    "w8a16": compressed_tensors(integers(8, strategy="channel", symmetric=True), text={}),
    "ao_int8": torchao(int8_only),
    "ao_int4": torchao(intx_only),
    "ao_float8": torchao(float8_only),
    "hqq8": hqq(8, 8, 1), "hqq4": hqq(4, 8, 1), "hqq3": hqq(3, 8, 0), "hqq2": hqq(2, 8, 0)}


def main(names: list[str]):
    for name in names:
        with tempfile.TemporaryDirectory() as home, torch.no_grad():
            folder = Path(home)
            state = KINDS[name](folder)
            config = MllamaConfig.from_pretrained(folder)
            del config.quantization_config
            save_file({"logits": logits(config, state)}, HERE / f"{name}.logits.safetensors")
            data = json.loads((folder / "config.json").read_text())
            (HERE / f"{name}.json").write_text(json.dumps(data) + "\n")
            shutil.copyfile(folder / "model.safetensors", HERE / f"{name}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1:])
