"""PruMerge: keep what the encoder's class tokens attend to most, each token merged with those most like it.

    a[j] = attention that class tokens give to token j      kept: the highest a[j], and patches evenly spaced
    y[i] = (y[i] + sum of a[j] · y[j]) / (1 + sum of a[j])  over the `neighbours` j with the most similar keys

Shang et al., "LLaVA-PruMerge", ICCV 2025, arXiv 2403.15388. With a `threshold` of 1.5 as many of the highest
are kept as lie above Q3 + 1.5 · (Q3 - Q1). Ours: the encoder's last global layer is asked, all tiles of an
image share a budget, the denominator, and no patch is chosen twice.
See docs/PAPERS.md.
"""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from model.image_tokens import ImageTokens
from model.llama_vision import LlamaVision
from pruning.encoder_attention import class_attention
from pruning.options import check_least
from pruning.pruner import Pruner
from pruning.select import num_kept, single_images


@dataclass
class PruMerge(Pruner):
    """Keeps what the encoder's class tokens attend to most, each token merged with those most like it."""
    keep: float | int = 0.25
    threshold: float | None = None                  # keep what stands out by so many quartile distances
    spread: float = 0.75                            # share of the kept tokens that is evenly spaced
    neighbours: int = 32                            # that a kept token is merged with
    paper = "Shang et al. 2024, arXiv 2403.15388"
    keep_states = True
    merges = True

    def __post_init__(self):
        super().__post_init__()
        check_least(self, spread=0, neighbours=0)
        if self.spread >= 1:
            raise ValueError(f"{self.name}: spread is {self.spread}, but must be below 1")

    @property
    def keeps_all(self) -> bool:
        return super().keeps_all and self.threshold is None

    def begin(self, model: LlamaVision):
        self.encoder_layer = model.vision_model.global_transformer.layers[-1]

    def encoded(self, image: ImageTokens, prompts: list[list[int]]) -> ImageTokens:
        kept = torch.zeros_like(image.coords[..., 0], dtype=torch.bool)
        features = image.features.clone()
        for b, own in single_images(image):
            is_class = image.coords[b, own, 2] < 0
            received, key = class_attention(self.encoder_layer, image.states.entering[b, own], is_class, 1)
            chosen = self.choose(received, is_class)
            kept[b, own[chosen]] = True
            if len(chosen) < len(own):
                weights = merging_weights(received, key[0], chosen, self.neighbours)
                features[b, own[chosen]] = (weights @ image.features[b, own].float()).to(features.dtype)
        return replace(image, features=features).take(kept)

    def choose(self, received: Tensor, is_class: Tensor) -> Tensor:
        """The tokens of one image that are kept, as their indices; class tokens only if no patch is left."""
        patches = received[~is_class]
        n = int(num_kept(self.keep, torch.tensor(len(received))))
        if self.threshold is not None:
            lower, upper = patches.quantile(0.25), patches.quantile(0.75)
            most = int((patches > upper + self.threshold * (upper - lower)).sum().clamp(min=1))
            n = min(round(most / (1 - self.spread)), len(patches))
        order = received.masked_fill(is_class, -1).argsort(descending=True, stable=True)
        most = n - int(n * self.spread)
        rest = order[most:max(n, len(patches))].sort().values
        even = (torch.arange(n - most, device=rest.device) * len(rest) + len(rest) // 2) // max(n - most, 1)
        return torch.cat((order[:most], rest[even]))


def merging_weights(received: Tensor, key: Tensor, chosen: Tensor, neighbours: int) -> Tensor:
    """How much of every token of one image each chosen one is made of, [chosen, n]; rows sum to 1."""
    key = F.normalize(key, dim=-1)                                                      # [n, d]
    similar = (key[chosen] @ key.T).scatter_(1, chosen[:, None], -torch.inf)
    near = similar.topk(min(neighbours, len(key) - 1), dim=1).indices
    weights = torch.zeros_like(similar).scatter_(1, near, received[near]).scatter_(1, chosen[:, None], 1)
    return weights / weights.sum(1, keepdim=True)
