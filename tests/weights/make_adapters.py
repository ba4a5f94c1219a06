"""Writes data/adapters: adapters as peft writes them, and the logits that peft's own merging gives.

    pip install peft==0.21.2
    PYTHONPATH=.:tests:tests/model:tests/weights python tests/weights/make_adapters.py

peft 0.21.2 with transformers 5.23.0 and torch 2.13.0 made those that are there. The weights that training
would change are random. transformers is corrected from outside, as in tests/model/test_transformers.py.
"""
import shutil
import tempfile
from pathlib import Path

import torch
from adapter_base import ADAPTERS, GRIDS, LENGTHS, ids, images, write_base
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
)
from safetensors.torch import save_file
from test_transformers import Batch, run_transformers
from transformers import MllamaForConditionalGeneration

NAME = "meta-llama/Llama-3.2-11B-Vision-Instruct"           # said to be the base of each
CASES = {
    "lora": LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "v_proj", "o_proj", "down_proj", "fc1"],
                       rank_pattern={"o_proj": 2},
                       alpha_pattern={"mlp.down_proj": 3, r"layers\.1\..*\.q_proj": 14}),
    "rslora": LoraConfig(r=4, lora_alpha=4, use_rslora=True, bias="all", fan_in_fan_out=True,
                         target_modules=["gate_proj", "fc2"], modules_to_save=["multi_modal_projector"]),
    "lora_bias": LoraConfig(r=2, lora_alpha=4, bias="lora_only", lora_bias=True, target_modules=["fc2"]),
    "dora": LoraConfig(r=3, lora_alpha=9, use_dora=True, target_modules=["k_proj", "v_proj", "up_proj"]),
    "embedding": LoraConfig(r=2, lora_alpha=6, target_modules=["embed_tokens", "lm_head", "patch_embedding"]),
    "resized": LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"],
                          modules_to_save=["embed_tokens", "lm_head"]),
}
OTHERS = {
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(r=2, target_modules=["q_proj"]),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_layers=3, token_dim=16,
                                 num_attention_heads=4, num_transformer_submodules=1),
}


def load(folder: Path, rows: int | None) -> MllamaForConditionalGeneration:
    model = MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    model.name_or_path = NAME
    return model.eval()


def randomise_trained(model: PeftModel, seed: int):
    """What training would change, at a size that shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            drawn = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name:
                parameter.data *= 1 + 0.3 * drawn
            else:
                parameter.data += 0.2 * drawn


def logits(model: MllamaForConditionalGeneration) -> torch.Tensor:
    batch = Batch(ids(), LENGTHS, images(), [[list(grid) for grid in grids] for grids in GRIDS])
    return run_transformers(model, batch)[range(len(LENGTHS)), [length - 1 for length in LENGTHS]]


@torch.no_grad()
def main():
    torch.manual_seed(0)                                    # of peft's own beginnings
    shutil.rmtree(ADAPTERS, ignore_errors=True)
    with tempfile.TemporaryDirectory() as name:
        base = write_base(Path(name))
        reference = {"base": logits(load(base, None))}
        for seed, (case, config) in enumerate(CASES.items()):
            model = get_peft_model(load(base, 70 if case == "resized" else None), config)
            randomise_trained(model, seed)
            model.save_pretrained(ADAPTERS / case)
            reference[case] = logits(model.merge_and_unload())
        for case in "lora+dora", "dora+lora", "lora+lora_bias+embedding":
            first, *others = case.split("+")
            model = PeftModel.from_pretrained(load(base, None), ADAPTERS / first, "0")
            for i, other in enumerate(others, start=1):
                model.load_adapter(ADAPTERS / other, str(i))
            names = list(map(str, range(len(others) + 1)))
            model.base_model.set_adapter(names)
            reference[case] = logits(model.merge_and_unload(adapter_names=names))
        for case, config in OTHERS.items():
            config.base_model_name_or_path = NAME
            config.save_pretrained(ADAPTERS / case)
    for readme in ADAPTERS.rglob("README.md"):
        readme.unlink()
    save_file(reference, ADAPTERS / "reference.safetensors")


if __name__ == "__main__":
    main()
