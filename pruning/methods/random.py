"""Random image tokens: the baseline that every method must beat, chosen where trimmed_llama chooses.

See docs/PAPERS.md.
"""
from dataclasses import dataclass

from torch import Tensor

from model.image_tokens import ImageKV, ImageTokens, Queries
from pruning.pruner import SelectOnce
from pruning.select import random_scores


@dataclass
class Random(SelectOnce):
    """Keeps random tokens: others for every prompt and `seed`, the same ones alone and in a batch."""
    seed: int = 0

    def encoded(self, image: ImageTokens, prompts: list[list[int]]) -> ImageTokens:
        self.random = random_scores(self.seed, prompts, image)
        return image

    def score(self, queries: Queries, kv: ImageKV) -> Tensor:
        return self.random
