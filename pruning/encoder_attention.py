"""What the class tokens of the vision encoder attend to in its last global layer, in fp32.

The encoder itself never makes attention weights. They are computed here from the states that entered the
layer (`EncoderStates.entering`). Every tile has a class token, and the layer attends across the tiles of an
image, so all class tokens of an image are asked about all its tokens. Padding is left out, though the encoder
sees it.
n tokens of one image, E width of the encoder, H heads, d head width.
"""
from torch import Tensor

from model.layers import split_heads
from model.vision import VisionLayer
from pruning.attention import attention_scores
from pruning.select import refuse_nan


def class_attention(layer: VisionLayer, states: Tensor, is_class: Tensor,
                    heads: int) -> tuple[Tensor, Tensor]:
    """The attention that each token of one image receives from its class tokens, [n], and the keys [H, n, d].

    `states` [n, E] entered the layer. Attention is a mean over `heads`, whose softmax is over all n tokens,
    and a sum over class tokens. Raises ValueError if it is NaN.
    """
    normed = layer.input_layernorm(states)
    query = split_heads(layer.self_attn.q_proj(normed[is_class])[None], heads)[0]       # [H, tiles, d]
    key = split_heads(layer.self_attn.k_proj(normed)[None], heads)[0].float()           # [H, n, d]
    received = attention_scores(query, key).softmax(-1).mean(0).sum(0)
    refuse_nan(received)
    return received, key
