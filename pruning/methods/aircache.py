"""AirCache: after prefill, each layer keeps the image tokens that a few important text tokens attend to.

    elite E = {t : a[t] >= alpha · max a}, a = self-attention of the last text token
    I[j]    = mean over t in E and heads h of A[h, t, j]
    kept    = the top (strength / its mean + skewness of I / its mean) / 2 · keep · N by I, means over layers

Huang et al., "AirCache", ICCV 2025, arXiv 2503.23956; known from notes, no code is published. Their strength
cannot carry over, because cross-attention always sums to 1; `gated_output` is ours.
See docs/PAPERS.md.
"""
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.image_tokens import ImageKV, Queries, each_image
from model.llama_vision import LlamaVision
from pruning.attention import attention_weights
from pruning.pruner import SelectPerLayer
from pruning.select import allocated, highest, normalised, skewness


@dataclass
class AirCache(SelectPerLayer):
    """Keeps what a few important text tokens attend to, and more in layers that rely on the image.

    `keep` is a mean over the layers. The higher `alpha`, the fewer text tokens judge; with 0 all of them do.
    """
    keep: float | int = 0.1
    alpha: float = 0.9
    strength: Literal["gated_output", "none"] = "gated_output"

    paper = "Huang et al. 2025, arXiv 2503.23956"

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"{self.name}: alpha is {self.alpha}, but must be from 0 to 1")

    def begin(self, model: LlamaVision):
        self.layers = model.language_model.cross_layers

    def score(self, queries: Queries, kv: ImageKV) -> Tensor:
        elite = elite_positions(queries, self.alpha)                                    # [B, T]
        importance = kv.key.new_zeros(len(elite), kv.key.shape[2], dtype=torch.float32)
        strength = importance.new_zeros(len(elite))
        for b, asked in enumerate(elite):
            for which, weights in attention_weights(queries, kv, b, asked):
                importance[b] += weights.mean(0).sum(0)
                if self.strength == "gated_output":
                    strength[b] += self.added(queries, kv, b, which, weights).sum()
        judges = elite.sum(1).clamp(min=1)
        if not self.scores:                                                             # the first layer
            self.strengths = []
        self.strengths.append(strength / judges)
        return importance / judges[:, None]

    def added(self, queries: Queries, kv: ImageKV, b: int, which: Tensor, weights: Tensor) -> Tensor:
        """The norm of what attention adds to some query positions [t], against the norm of what they were."""
        layer = self.layers[len(self.scores)]
        read = weights.unflatten(0, (kv.value.shape[1], -1)).flatten(1, 2) @ kv.value[b].float()
        read = read.view(*weights.shape[:2], -1).transpose(0, 1).flatten(1)                     # [t, H·d]
        update = layer.cross_attn.o_proj(read.to(kv.value.dtype))                       # [t, D]
        update = update * layer.cross_attn_attn_gate.tanh().to(update.device)
        return update.float().norm(dim=-1) / queries.x[b, which].float().norm(dim=-1)

    def choose(self, image_kv: list[ImageKV]) -> list[Tensor]:
        kept = [torch.zeros_like(score, dtype=torch.bool) for score in self.scores]
        strength = normalised(torch.stack(self.strengths, dim=1))                       # [B, C]
        for there in each_image(image_kv[0]):
            there = there[:, 0]                                                         # [B, N]
            skew = torch.stack([skewness(score, there) for score in self.scores], dim=1).clamp(min=0)
            weights = normalised(skew) + strength if self.strength == "gated_output" else normalised(skew)
            counts = allocated(weights, self.keep, there.sum(1))                        # [B, C]
            for i, score in enumerate(self.scores):
                kept[i] |= highest(score, counts[:, i:i + 1], there)
        return kept


def elite_positions(queries: Queries, alpha: float) -> Tensor:
    """The query positions that judge the image, [B, T] bool; none in a sequence without an image."""
    start, stop = queries.seen.unbind(-1)                                               # [B, T] each
    judges = (start < stop) & (stop == stop.amax(1, keepdim=True))
    text = judges.float() if queries.text_q is None else judges * attention_of_the_last(queries)
    return judges & (text >= alpha * text.amax(1, keepdim=True))


def attention_of_the_last(queries: Queries) -> Tensor:
    """What the last text token attends to in the self-attention layer before, mean over heads: [B, T]."""
    q, key = queries.text_q, queries.text_k
    positions = torch.arange(q.shape[2], device=q.device)
    sees_image = queries.seen[..., 0] < queries.seen[..., 1]
    last = torch.where(sees_image, positions, 0).amax(1)                                # [B]
    asking = q[torch.arange(len(q), device=q.device), :, last].float()                  # [B, H, d]
    scores = asking.unflatten(1, (key.shape[1], -1)) @ key.float().transpose(-1, -2)    # [B, G, H/G, T]
    padding = positions > last[:, None, None, None]
    return (scores * q.shape[-1] ** -0.5).masked_fill(padding, -torch.inf).softmax(-1).mean((1, 2))
