"""The small parts that the vision encoder and the decoder are made of.

RMSNorm, rotary position embedding with llama3 scaling, SwiGLU, and `attend`, the one place where attention is
computed. B batch, T text tokens, N keys, H query heads, G key/value heads, d head width, D model width.
"""
from collections.abc import Iterable
from functools import lru_cache
from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import TextConfig

FEW_KEYS = 16               # with fewer and no mask, torch's CPU kernel makes zeros where scores are NaN


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Attention of q [B, H, T, d] over k, v [B, G, N, d], each for H / G query heads; returns [B, T, H·d].

    `mask` [B, 1 or G, 1 or T, N] is True where a query may look, or is added to the scores; None if all may
    look everywhere, because the fastest kernels are only chosen then. Keys are never repeated. With a mask,
    or if there is one query position, the heads that share a key become positions of one head: the same
    numbers, and on CUDA the memory-efficient kernel, which takes masks, wants as many heads of keys as of
    queries. What is not finite never becomes a number.
    """
    B, H, T, d = q.shape
    G = k.shape[1]
    share = H // G
    if mask is None and k.shape[2] < FEW_KEYS and q.is_cpu:
        mask = torch.ones(1, 1, T, k.shape[2], dtype=torch.bool)
        mask = mask.tril() if causal else mask
        causal = False
    if mask is None and T > 1:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=share > 1)
    else:
        if mask is not None and mask.shape[2] > 1:
            mask = mask.repeat(1, 1, share, 1)                              # [B, 1 or G, H/G·T, N]
        out = F.scaled_dot_product_attention(q.reshape(B, G, share * T, d), k, v, attn_mask=mask)
    return out.reshape(B, H, T, d).transpose(1, 2).flatten(2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, H·d] -> [B, H, T, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def untracked(layers: Iterable[nn.Module]) -> Iterable[nn.Module]:
    """The layers as they are. Whoever wants to know how far a computation is sets another `track`."""
    return layers


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension: in fp32, cast back, then times the weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x, self.weight.shape, eps=self.eps)


class SwiGLU(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@lru_cache
def rotary_frequencies(config: TextConfig, device: torch.device) -> Tensor:
    """Angle per position of each pair of channels, [d/2] fp32; low ones slowed down by the llama3 rule.

    Waves longer than the original context turn `factor` times slower, short ones are left alone, and those
    between are blended. Source: Meta's `model.py`, `apply_scaling`.
    """
    d = config.head_dim
    plain = config.rope_theta ** -(torch.arange(0, d, 2, device=device, dtype=torch.float32) / d)
    s = config.rope_scaling
    if s is None:
        return plain
    turns = s.original_max_position_embeddings * plain / (2 * pi)     # full turns within the original context
    blend = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return (1 - blend) * plain / s.factor + blend * plain


def rotary_angles(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and signed sin for `rotate`: positions [B, T], frequencies [d/2] -> two of [B, 1, T, d], fp32."""
    angles = positions[:, None, :, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn channel i together with channel i + d/2; multiplied in fp32 as Meta does, then cast back."""
    cos, sin = angles
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)
