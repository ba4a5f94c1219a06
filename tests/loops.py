"""Attention in plain loops and float64, and what a network computes while it is watched.

N image tokens, T text tokens, H query heads, G key/value heads, d head width.
"""
import math
from collections.abc import Callable, Sequence

from torch import Tensor

from model.llama_vision import LlamaVision


def watched(network: LlamaVision, run: Callable) -> tuple[object, list[list[Tensor]], list[list[Tensor]]]:
    """A run; and of every cross-attention layer the queries [H, T, d] and keys [G, N, d] of sequence 0, in
    prefill and in every step."""
    layers = network.language_model.cross_layers
    q = [[] for _ in layers]
    k = [[] for _ in layers]
    handles = []
    for i, layer in enumerate(layers):
        for part, seen in (layer.cross_attn.q_norm, q[i]), (layer.cross_attn.k_norm, k[i]):
            handles.append(part.register_forward_hook(
                lambda module, inputs, output, seen=seen: seen.append(output[0])))
    result = run()
    for handle in handles:
        handle.remove()
    return result, q, k


def softmax(q: list[float], keys: list[list[float]], extra: float = 0.0) -> list[float]:
    """Attention weights of a query [d] on keys [N, d]; `extra` is added to the denominator."""
    scores = [sum(a * b for a, b in zip(q, key, strict=True)) / math.sqrt(len(q)) for key in keys]
    powers = [math.exp(score) for score in scores]
    return [power / (sum(powers) + extra) for power in powers]


def received_by_hand(q: Tensor, k: Tensor, sees: dict[int, Sequence[int]], sets: int = 1,
                     extra: float = 0.0) -> list[list[float]]:
    """The attention that each image token receives, as plain loops find it: [sets, N].

    q [H, T, d], k [G, N, d], and the tokens that each query position sees. Summed over positions; of each
    set, a mean over its query heads.
    """
    H, N = len(q), k.shape[1]
    total = [[0.0] * N for _ in range(sets)]
    keys = k.double().tolist()
    for h in range(H):
        own = keys[h * len(keys) // H]
        for t, tokens in sees.items():
            weights = softmax(q[h, t].double().tolist(), [own[j] for j in tokens], extra)
            for j, weight in zip(tokens, weights, strict=True):
                total[h * sets // H][j] += weight * sets / H
    return total


def skewness_by_hand(values: list[float]) -> float:
    """The adjusted Fisher-Pearson formula."""
    n, mean = len(values), sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return n / ((n - 1) * (n - 2)) * sum(((v - mean) / deviation) ** 3 for v in values)


def best(scores: list[float], n: int) -> list[int]:
    """The n highest, in their order; of equal scores the first win."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:n])


def half_up(keep: float | int, tokens: int) -> int:
    """How many tokens a share, or a number, is: rounded half up, at least one."""
    if type(keep) is int:
        return min(keep, tokens)
    return max(1, math.floor(keep * tokens + 0.5 + 1e-9))


def projected_tokens(network: LlamaVision, run: Callable) -> tuple[object, list[int]]:
    """A run, and of how many image tokens each cross-attention layer makes keys, and of how many values."""
    sizes = []
    parts = [part for layer in network.language_model.cross_layers
             for part in (layer.cross_attn.k_proj, layer.cross_attn.v_proj)]
    handles = [part.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[1]))
               for part in parts]
    result = run()
    for handle in handles:
        handle.remove()
    return result, sizes
