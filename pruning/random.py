"""Random image tokens: the baseline that every method must beat. Chosen where trimmed_llama chooses."""
from dataclasses import dataclass

import torch

from pruning.pruner import ImageKV, ImageTokens, OneChoice, Prompts, Queries, top


@dataclass
class Random(OneChoice):
    """Keeps random tokens: others for every prompt and `seed`, the same ones alone and in a batch."""
    seed: int = 0

    def encoded(self, image: ImageTokens, prompts: Prompts) -> ImageTokens:
        draws = [torch.Generator().manual_seed(hash((self.seed, *ids))) for ids in prompts.ids]
        self.scores = torch.stack([torch.rand(image.place.shape[1], generator=draw) for draw in draws])
        return image

    def choose(self, queries: Queries, image: ImageTokens, kv: ImageKV) -> torch.Tensor:
        return top(self.scores.to(image.place.device), self.keep, image)
