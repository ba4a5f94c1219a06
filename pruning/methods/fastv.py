"""FastV: after a few layers, keep the image tokens that the last query position attends to.

    score[j] = mean over heads h of A[h, last, j] in the last of the first layers       kept: the top keep · N

Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024, arXiv 2403.06764. Ours: layers are
cross-attention layers, and `full_layers` 1 stands for their K = 2 of 32 layers.
See docs/PAPERS.md.
"""
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from model.image_tokens import ImageKV, ImageTokens, Queries
from pruning.attention import attention_received, every_image
from pruning.pruner import SelectOnce
from pruning.select import random_scores, top_k_mask


@dataclass
class FastV(SelectOnce):
    """Keeps what the last query position attends to in the last of the first layers.

    `seed` is of the random ranking with `full_layers` 0.
    """
    early_caches: Literal["trim", "full"] = "full"
    when: Literal["prefill", "boundary", "step"] = "prefill"
    positions: Literal["last", "all"] = "last"
    seed: int = 0
    paper = "Chen et al. 2024, arXiv 2403.06764"

    def encoded(self, image: ImageTokens, prompts: list[list[int]]) -> ImageTokens:
        self.random = random_scores(self.seed, prompts, image)
        return image

    def score(self, queries: Queries, kv: ImageKV) -> Tensor:
        if self.full_layers == 0:
            return self.random
        return attention_received(queries, kv, self.positions, per="layer")

    def prefilled(self, image_kv: list[ImageKV]) -> list[ImageKV]:
        self.stored = image_kv if self.when == "step" else []
        return super().prefilled(image_kv)

    def stepped(self, step: int, queries: list[Tensor], image_kv: list[ImageKV]) -> list[ImageKV]:
        if self.when != "step" or not self.full_layers:
            return image_kv
        kv = self.stored[self.full_layers - 1]
        scores = self.score(every_image(queries[self.full_layers - 1]), kv)
        self.kept = top_k_mask(scores, self.keep, kv)
        return super().prefilled(self.stored)
