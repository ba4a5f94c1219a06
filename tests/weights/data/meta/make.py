"""Writes the small checkpoints of Meta's format beside this file: with the modules of Meta's own code.

    pip install torch==2.13.0 llama-models==0.3.0 fairscale==0.4.13 tiktoken
    python make.py 1 && python make.py 2

One rank or two, each a process with fairscale's model-parallel layers over gloo. The widths of the vision
encoder, which Meta's code fixes, are set from outside; all else is its code: names, shapes, layouts and what
it computes, in fp32 with weights that are bf16. Stored are the state_dict of each rank as safetensors
(ranksN.R.safetensors: a .pth of so many small tensors is mostly padding; the tests write it with torch.save),
and the prompt with its logits (logitsN.safetensors).
"""
import functools
import json
import os
import sys
from pathlib import Path
from unittest.mock import MagicMock

import fairscale.nn.model_parallel.initialize as model_parallel
import torch
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from llama_models.llama3.args import ModelArgs
from safetensors.torch import save_file

for name in "torchvision", "torchvision.transforms":       # for Meta's image transform, not used here
    sys.modules[name] = MagicMock()
from llama_models.llama3.multimodal import model as meta  # noqa: E402

HERE = Path(__file__).parent
WIDTH, TILE = 16, 28                # 16 heads of one channel; 2 x 2 patches a tile
PARAMS = {"dim": 16, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 512, "multiple_of": 8,
          "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True,
          "vision_chunk_size": TILE, "vision_max_num_chunks": 4, "vision_num_cross_attention_layers": 2}


def build() -> meta.CrossAttentionTransformer:
    """Meta's model with 4 local and 1 global vision layers, random weights and open gates."""
    args = ModelArgs(**PARAMS, max_batch_size=1, max_seq_len=64)
    encoder = functools.partial(meta.VisionEncoder, width=WIDTH, layers=4)

    def small(*positional, n_global_layers, **named):
        return encoder(*positional, n_global_layers=1, **named)

    original, meta.VisionEncoder = meta.VisionEncoder, small
    model = meta.CrossAttentionTransformer(args)
    meta.VisionEncoder = original
    model.vision_model.vision_projection = ColumnParallelLinear(2 * WIDTH, args.dim, bias=True,
                                                                init_method=lambda x: x)
    generator = torch.Generator().manual_seed(model_parallel.get_model_parallel_rank())
    for name, parameter in model.named_parameters():
        mean = 1.0 if "norm" in name or ".ln_" in name and name.endswith("weight") else 0.0
        spread = 0.5 if "gate" in name.rpartition(".")[2] else 0.2
        values = torch.randn(parameter.shape, generator=generator) * spread + mean
        parameter.data = values.bfloat16().float()
    return model


def replicated(model: torch.nn.Module):
    """What fairscale does not cut is the same in all ranks: that of rank 0."""
    cut = {id(parameter) for module in model.modules()
           for name, parameter in module.named_parameters(recurse=False)
           if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding))
           or isinstance(module, RowParallelLinear) and name == "weight"}
    for parameter in model.parameters():
        if id(parameter) not in cut:
            torch.distributed.broadcast(parameter.data, 0)


def compute(model: meta.CrossAttentionTransformer) -> dict[str, torch.Tensor]:
    """Text, an image of 1 x 2 tiles, more text; logits of all positions, as Meta's forward has them."""
    torch.manual_seed(1)
    ids = torch.cat((torch.randint(0, 256, (3,)), torch.tensor([512]), torch.randint(0, 256, (10,))))[None]
    pixels = torch.zeros(1, 1, 4, 3, TILE, TILE)
    pixels[:, :, :2] = torch.randn(1, 1, 2, 3, TILE, TILE)
    model.setup_cache(1, torch.device("cpu"), torch.float32)
    features = model.vision_model(pixels, torch.tensor([[[1, 2]]]))
    tokens = features.reshape(1, -1, PARAMS["dim"])
    caches = torch.stack([layer.compute_xattn_kv_cache(tokens)
                          for layer in model.text_model.cross_attention_layers])
    lowest = meta.get_negative_inf_value(torch.float32)
    mask = torch.full((1, ids.shape[1], 1, 4), lowest)
    mask[:, 3:, :, :2] = 0                              # from the image on, its real tiles
    cross, sees = model.text_model._get_xattn_mask(ids.shape[1], "cpu", torch.float32, features, mask)
    positions = torch.arange(ids.shape[1])
    hidden = model.text_model.get_partially_trainable_embedding(ids)
    logits = model.text_model(positions, hidden, cross, sees, caches)
    return {"ids": ids, "pixels": pixels[0], "logits": logits}


def work(rank: int, world: int):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    model_parallel.initialize_model_parallel(world)
    with torch.no_grad():
        model = build().eval()
        replicated(model)
        state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
        save_file(state, HERE / f"ranks{world}.{rank}.safetensors")
        results = compute(model)
    if rank == 0:
        save_file(results, HERE / f"logits{world}.safetensors")
        (HERE / "params.json").write_text(json.dumps(PARAMS) + "\n")
    torch.distributed.barrier()


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (int(sys.argv[1]),), int(sys.argv[1]))
