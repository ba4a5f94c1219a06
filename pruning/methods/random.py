"""Random image tokens: the baseline that every method must beat. Chosen where trimmed_llama chooses."""
from dataclasses import dataclass

from torch import Tensor

from pruning.pruner import ImageKV, ImageTokens, Prompts, Queries, SelectOnce, chance, top_k_mask


@dataclass
class Random(SelectOnce):
    """Keeps random tokens: others for every prompt and `seed`, the same ones alone and in a batch."""
    seed: int = 0

    def encoded(self, image: ImageTokens, prompts: Prompts) -> ImageTokens:
        self.scores = chance(self.seed, prompts, image)
        return image

    def choose(self, queries: Queries, image: ImageTokens, kv: ImageKV) -> Tensor:
        return top_k_mask(self.scores, self.keep, image)
