"""Trimmed Llama: keep what the heads of the first cross-attention layer attend to.

    p[h, j] = sum over query positions t of A[h, t, j]      kept: the union over heads h of the top keep · N

Lee et al., "Efficient LLaMA-3.2-Vision by Trimming Cross-attended Visual Features", arXiv 2504.00557. The
first layer attends to all tokens in prefill; later layers make keys and values of the kept tokens only. Ours:
the cache of the first layer is trimmed too, each image has its own choice, `per`, `budget`.
See docs/PAPERS.md.
"""
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from model.image_tokens import ImageKV, ImageTokens, Queries
from pruning.attention import attention_received
from pruning.options import check_share
from pruning.pruner import SelectOnce
from pruning.select import top_k_mask


@dataclass
class TrimmedLlama(SelectOnce):
    """Keeps the union of what each head of the first layer attends to most.

    `keep` is the paper's K_ratio: the share, or number, of image tokens that every head may vote for.
    """
    keep: float | int = 0.25
    per: Literal["head", "kv_head"] = "head"
    budget: float | int | None = None

    name = "trimmed_llama"
    unit = "per head"
    paper = "Lee et al. 2025, arXiv 2504.00557"

    def __post_init__(self):
        super().__post_init__()
        if self.budget is not None:
            check_share(self, "budget")

    @property
    def keeps_all(self) -> bool:
        return super().keeps_all and self.budget is None

    def choose(self, queries: Queries, image: ImageTokens, kv: ImageKV) -> Tensor:
        received = attention_received(queries, kv, per=self.per)                        # [B, H or G, N]
        kept = top_k_mask(received, self.keep, image).any(1)
        if self.budget is None:
            return kept
        return kept & top_k_mask(received.amax(1).masked_fill(~kept, -1), self.budget, image)


def flops_reduction(text: int, image: int, kept: float, width: int = 4096, mlp: int = 14336,
                    self_layers: int = 32, cross_layers: int = 8) -> float:
    """The share of the decoder's operations that the paper's Appendix A.3 says is saved in prefill.

    `text` and `image` tokens, of which a share `kept` stays. Optimistic: it charges keys and values for every
    query head, where this model has a quarter as many; compare `LlamaVision.flops`.
    """
    def cross(n: float) -> float:
        return 2 * text * width ** 2 + 2 * n * width ** 2 + 2 * text * n * width + 2 * text * width * mlp

    own = self_layers * (4 * text * width ** 2 + 2 * text ** 2 * width + 2 * text * width * mlp)
    pruned = own + cross(image) + (cross_layers - 1) * cross(kept * image)
    return 1 - pruned / (own + cross_layers * cross(image))
