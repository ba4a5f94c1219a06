"""FastV: after a few layers, keep the image tokens that the last text row looks at.

Liang Chen, Haozhe Zhao, Tianyu Liu, Shuai Bai, Junyang Lin, Chang Zhou, Baobao Chang: "An Image is Worth 1/2
Tokens After Layer 2", ECCV 2024, arXiv 2403.06764. Read against the authors' code (pkunlp-icler/FastV).

Theirs: the mean over heads of one layer's attention, top-n, one set for all later layers, the first layers
whole. `rows="last"` is what their code does, `"all"` what their text says. `when="step"` chooses anew after
every decoded token, as their code without a cache does; it saves no memory.

Ours, because images have no rows in this decoder: layers are cross-attention layers, and `full_layers` = 1
stands for their K = 2 of 32; 0 ranks at random, as their K = 0. Several images: each is ranked by the last
row that sees it. `early_caches="trim"` cuts the first layers too after prefill.
"""
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pruning.attention import attention_received
from pruning.pruner import ImageKV, ImageTokens, Prompts, Queries, SelectOnce, chance, top_k_mask


@dataclass
class FastV(SelectOnce):
    """Keeps what the last text row attends to in the last of the first layers.

    `seed` is of the random ranking with `full_layers` 0.
    """
    early_caches: Literal["trim", "full"] = "full"
    when: Literal["prefill", "boundary", "step"] = "prefill"
    rows: Literal["last", "all"] = "last"
    seed: int = 0
    paper = "Chen et al. 2024, arXiv 2403.06764"

    def encoded(self, image: ImageTokens, prompts: Prompts) -> ImageTokens:
        self.scores = chance(self.seed, prompts, image)
        return image

    def choose(self, queries: Queries, image: ImageTokens | ImageKV, kv: ImageKV) -> Tensor:
        scores = attention_received(queries, kv, self.rows, heads="layer") if self.full_layers else self.scores
        return top_k_mask(scores, self.keep, image)

    def prefilled(self, kvs: list[ImageKV]) -> list[ImageKV]:
        self.whole = kvs if self.when == "step" else []
        return super().prefilled(kvs)

    def stepped(self, step: int, queries: list[Tensor], kvs: list[ImageKV]) -> list[ImageKV]:
        if self.when != "step" or not self.full_layers:
            return kvs
        kv, q = self.whole[self.full_layers - 1], queries[self.full_layers - 1]
        every_image = torch.tensor([0, int(kv.coords.max()) + 1], device=q.device).expand(len(q), 1, 2)
        self.kept = self.choose(Queries(q, every_image), kv, kv)
        return super().prefilled(self.whole)
