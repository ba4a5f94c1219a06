"""AirCache: after prefill, each layer keeps the image tokens that a few important text tokens look at.

Kai Huang, Hao Zou, Bochen Wang, Ye Xi et al.: "AirCache: Activating Inter-modal Relevancy KV Cache
Compression for Efficient Large Vision-Language Model Inference", ICCV 2025, arXiv 2503.23956.

Text tokens disagree about the image, so only an elite of them judges it; and layers differ in how much of it
they need. With a_t the text self-attention of the last text token, in each of C layers with N image tokens:

    elite       E = {t: a_t >= alpha * max a}
    importance  I_j = mean over t in E, and over heads, of the attention of t on j
    skewness    k = N / ((N - 1)(N - 2)) * sum over j of ((I_j - mean I) / std I)^3, std with N - 1
    strength    s: how much the layer uses the image
    kept        the (s / mean s + k / mean k) / 2 * keep * N tokens with the highest I; means over layers

The paper's: the formulas, alpha 0.9, and that all layers are cut once, when all have been read. No code is
published, and the formulas are known to us from notes on the paper alone. The mean over heads, and dividing
by means over layers, which the notes call normalising, are inferred.

What cannot carry over: theirs is one softmax over image and elite text, and s the share of it that falls on
the image. In cross-attention this share is always 1. Ours in its place, `strength="gated_output"`, is the
mean over E of |tanh(gate) W_o o| / |x|: what attention adds to a text row, against what that was. "none" goes
by skewness alone, as the paper tried too. a_t is from the self-attention layer just before; where there is
none, every row judges. Negative skewness counts as 0; where all layers have 0, they are equal.

Ours: judges see all that the last row sees, so no row before the image is one; each image has a budget of its
own, shared out over the layers to the token, with at least one for each. Not built: barring special tokens
from the elite. No figure is published for this model.
"""
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.image_tokens import each_image
from pruning.attention import row_weights
from pruning.pruner import ImageKV, ImageTokens, Prompts, Queries, SelectPerLayer
from pruning.select import allocated, highest, normalised, skewness


@dataclass
class AirCache(SelectPerLayer):
    """Keeps what a few important text tokens look at, and more in layers that rely on the image.

    `keep` is a mean over the layers. The higher `alpha`, the fewer text tokens judge; with 0 all of them do.
    """
    keep: float | int = 0.1
    alpha: float = 0.9
    strength: Literal["gated_output", "none"] = "gated_output"

    paper = "Huang et al. 2025, arXiv 2503.23956"
    text = None             # [B, T] the last token's self-attention in the layer just before, if there is one

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"{self.name}: alpha is {self.alpha}, but must be from 0 to 1")

    def encoded(self, image: ImageTokens, prompts: Prompts) -> ImageTokens:
        self.text = None
        return image

    def text_layer(self, i: int, q: Tensor, key: Tensor, lengths: Tensor):
        last = q[torch.arange(len(q), device=q.device), :, lengths - 1].float()         # [B, H, d]
        scores = last.unflatten(1, (key.shape[1], -1)) @ key.float().transpose(-1, -2)  # [B, G, H/G, T]
        padding = torch.arange(key.shape[2], device=q.device) >= lengths[:, None, None, None]
        self.text = (scores * q.shape[-1] ** -0.5).masked_fill(padding, -torch.inf).softmax(-1).mean((1, 2))

    def elite(self, queries: Queries) -> Tensor:
        """The text rows that judge the image, [B, T] bool; none where a batch row has no image."""
        stop = queries.seen[..., 1]
        judges = (queries.seen[..., 0] < stop) & (stop == stop.amax(1, keepdim=True))
        text = judges.float() if self.text is None else self.text[:, -stop.shape[1]:] * judges
        return judges & (text >= self.alpha * text.amax(1, keepdim=True))

    def score(self, i: int, queries: Queries, kv: ImageKV) -> Tensor:
        elite, self.text = self.elite(queries), None
        importance = kv.key.new_zeros(len(elite), kv.key.shape[2], dtype=torch.float32)
        strength = importance.new_zeros(len(elite))
        for row, asked in enumerate(elite):
            for rows, weights in row_weights(queries, kv, row, asked):
                importance[row] += weights.mean(0).sum(0)
                if self.strength == "gated_output":
                    strength[row] += added(queries, kv, row, rows, weights).sum()
        judges = elite.sum(1).clamp(min=1)
        self.strengths = [*(self.strengths if i else []), strength / judges]
        return importance / judges[:, None]

    def chosen(self, kvs: list[ImageKV]) -> list[Tensor]:
        kept = [torch.zeros_like(score, dtype=torch.bool) for score in self.scores]
        strength = normalised(torch.stack(self.strengths, dim=1))                       # [B, C]
        for there in (image[:, 0] for image in each_image(kvs[0])):                     # [B, N]
            skew = torch.stack([skewness(score, there) for score in self.scores], dim=1).clamp(min=0)
            weights = normalised(skew) + strength if self.strength == "gated_output" else normalised(skew)
            counts = allocated(weights, self.keep, there.sum(1))                        # [B, C]
            for layer, score in enumerate(self.scores):
                kept[layer] |= highest(score, counts[:, layer:layer + 1], there)
        return kept


def added(queries: Queries, kv: ImageKV, row: int, rows: Tensor, weights: Tensor) -> Tensor:
    """How long what attention adds to some text rows [t] of a batch row is, against what it is added to."""
    read = weights.unflatten(0, (kv.value.shape[1], -1)).flatten(1, 2) @ kv.value[row].float()
    read = read.view(*weights.shape[:2], -1).transpose(0, 1).flatten(1).to(queries.o_proj.dtype)    # [t, H d]
    update = queries.gate * (read @ queries.o_proj.T)
    return update.float().norm(dim=-1) / queries.x[row, rows].float().norm(dim=-1)
