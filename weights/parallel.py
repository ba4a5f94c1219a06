"""Tensor parallelism: every rank holds a share of the heads, of the MLPs and of the vocabulary.

    q, k, v, gate, up, fc1, the head        a share of the outputs: rows
    o, down, fc2                            a share of the inputs: columns; results are summed over ranks

Shoeybi et al., "Megatron-LM", arXiv 1909.08053. All else is whole on every rank, also the attention of the
encoder's last layer, which pruners ask. `divide` acts before weights are read, so that each rank reads its
share only, and `connect` after, around linear layers of whatever kind.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.decoder import Projections
from model.llama_vision import LlamaVision
from model.vision import VisionAttention
from weights.checkpoint import fingerprint
from weights.part import Part
from weights.ranks import Ranks
from weights.stored import Stored

ROWS = "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1", "lm_head"
COLUMNS = "o_proj", "down_proj", "fc2"


class Summed(nn.Module):
    """A linear layer of which every rank has some of the inputs."""

    def __init__(self, linear: nn.Module, ranks: Ranks):
        super().__init__()
        self.linear = linear
        self.ranks = ranks
        self.inputs = linear.in_features

    def forward(self, x: Tensor) -> Tensor:
        """x [..., own inputs], or [..., all inputs], of which the rank takes its own -> [..., outputs]."""
        return self.ranks.sum(self.linear(x if x.shape[-1] == self.inputs else self.ranks.part(x, -1)))


class Gathered(nn.Module):
    """A linear layer of which every rank has some of the outputs, as the first ones of `sizes` say."""

    def __init__(self, linear: nn.Module, ranks: Ranks, outputs: int):
        super().__init__()
        self.linear = linear
        self.ranks = ranks
        self.sizes = [len(part) for part in torch.empty(outputs, device="meta").tensor_split(ranks.count)]

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., all outputs]."""
        own = self.linear(x)
        own = F.pad(own, (0, self.sizes[0] - own.shape[-1]))        # the last shares may be one shorter
        parts = self.ranks.gather(own, -1).split(self.sizes[0], -1)
        return torch.cat([part[..., :size] for part, size in zip(parts, self.sizes, strict=True)], -1)


def divide(model: LlamaVision, found: dict[str, Stored], ranks: Ranks,
           offload: bool = False) -> dict[str, Stored | Part]:
    """Make a model on the meta device this rank's share, and say what to read for it of the checkpoint.
    Raises ValueError where heads do not divide, or the ranks have found different checkpoints."""
    if ranks.count == 1:
        return found
    if offload:
        raise ValueError("--offload is for a model in one process: start more processes in its place")
    narrow(model, ranks)
    ranks.check_alike("checkpoints", (model.config, fingerprint(found)))
    shares = dict(found)
    for name, linear in shared_layers(model):
        dim = int(name.endswith(COLUMNS))
        if f"{name}.weight" in found:                   # a tied head is not
            shares[f"{name}.weight"] = Part(found[f"{name}.weight"], ranks, dim)
        if linear.bias is None:
            shares.pop(f"{name}.bias", None)
        elif dim == 0:
            shares[f"{name}.bias"] = Part(found[f"{name}.bias"], ranks, 0)
    return shares


def narrow(model: LlamaVision, ranks: Ranks):
    """Leave of a model on the meta device this rank's share. Raises ValueError where heads do not divide."""
    most = math.gcd(model.config.text.num_key_value_heads, model.config.vision.num_attention_heads)
    if most % ranks.count:
        raise ValueError(f"heads of this model do not divide over {ranks.count} processes: start {most}, or "
                         "as many as divide it")
    last = model.vision_model.global_transformer.layers[-1].self_attn
    for module in model.modules():
        if isinstance(module, Projections):
            module.heads //= ranks.count
            module.kv_heads //= ranks.count
        elif isinstance(module, VisionAttention) and module is not last:
            module.heads //= ranks.count
    for name, linear in shared_layers(model):
        summed = name.endswith(COLUMNS)
        linear.weight = nn.Parameter(ranks.part(linear.weight, int(summed)))
        linear.out_features, linear.in_features = linear.weight.shape
        if linear.bias is not None and not summed:
            linear.bias = nn.Parameter(ranks.part(linear.bias, 0))
        elif ranks.rank:                                # it is added once, by rank 0
            linear.bias = None


def connect(model: LlamaVision, ranks: Ranks):
    """Let the shares of all ranks work as one model, for inference only."""
    if ranks.count == 1:
        return
    for name, linear in shared_layers(model):
        if name.endswith(COLUMNS):
            model.set_submodule(name, Summed(linear, ranks))
    model.lm_head = Gathered(model.lm_head, ranks, model.config.text.vocab_size)
    model.requires_grad_(False)


def shared_layers(model: LlamaVision) -> list[tuple[str, nn.Module]]:
    """The linear layers of which every rank has a share, by their names."""
    depth = len(model.vision_model.global_transformer.layers)
    whole = f"vision_model.global_transformer.layers.{depth - 1}.self_attn."
    return [(name, module) for name, module in model.named_modules()
            if name.endswith(ROWS + COLUMNS) and not name.startswith(whole)]
