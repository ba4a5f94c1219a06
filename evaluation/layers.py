"""What the cross-attention layers do: their gates, and how alike the layers attend to the image.

C cross-attention layers, B sequences of the batch, N image tokens.
"""
import torch
from torch import Tensor
from torch.nn.functional import normalize

from model.decoder import CrossAttentionLayer
from model.image_tokens import ImageKV, ImageTokens, Queries
from model.llama_vision import LlamaVision
from pruning import Pruner, attention_received, top_k_mask

TOP = 0.1           # the share of image tokens that are compared between layers


class Observer(Pruner):
    """Keeps everything, and notes how much attention each image token receives from the prompt."""
    keeps_all = False               # otherwise no hook would be called

    def __post_init__(self):
        super().__post_init__()
        self.received: list[Tensor] = []                                                    # C of [B, N]

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        self.received.append(attention_received(queries, kv, per="layer"))
        return image, kv


def layer_similarity(received: list[Tensor], image: ImageTokens) -> dict[str, list[list[float]]]:
    """How alike the attention maps of the layers are: two matrices [C][C], each summed over the batch.

    `cosine` is that of two maps. `top10_overlap` is the share of the 10 % of tokens that receive most
    attention in one layer which are also among those of the other.
    """
    maps = torch.stack(received, dim=1)                                                     # [B, C, N]
    best = top_k_mask(maps, TOP, image).double()                                            # [B, C, N]
    unit = normalize(maps.double(), dim=-1)                                                 # [B, C, N]
    cosine = unit @ unit.mT                                                                 # [B, C, C]
    overlap = best @ best.mT / best[0, 0].sum()                                             # [B, C, C]
    return {"cosine": cosine.sum(0).tolist(), "top10_overlap": overlap.sum(0).tolist()}


def gates(model: LlamaVision) -> list[tuple[float, float]]:
    """tanh of the attention gate and of the MLP gate, of each cross-attention layer."""
    return [(layer.cross_attn_attn_gate.tanh().item(), layer.cross_attn_mlp_gate.tanh().item())
            for layer in cross_layers(model)]


def close_gates(model: LlamaVision, ordinal: int):
    """Set the gates of a cross-attention layer to 0: it then changes nothing. Raises ValueError."""
    layers = cross_layers(model)
    if not 0 <= ordinal < len(layers):
        raise ValueError(f"--skip-layer {ordinal}: there are cross-attention layers 0 to {len(layers) - 1}")
    layer = layers[ordinal]
    for gate in layer.cross_attn_attn_gate, layer.cross_attn_mlp_gate:
        gate.data = gate.new_zeros(1)


def cross_layers(model: LlamaVision) -> list[CrossAttentionLayer]:
    return model.language_model.cross_layers
