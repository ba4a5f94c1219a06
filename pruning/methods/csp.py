"""CSP, Cross-Self Pruning: rank by the last query positions, with n added to the denominator of the softmax.

    A'[h, t, j] = exp o[h, t, j] / (n + sum over i of exp o[h, t, i])       o: scores before the softmax
    S[g, j] = sum over the last t of the mean over heads h of g             kept: the top keep · N by S, per g

Pei et al., "Cross-Self KV Cache Pruning for Efficient Vision-Language Inference", arXiv 2412.04652. Their
balance of text and image in one cache cannot carry over: here they are in different caches. Ours: `decode_n`.
See docs/PAPERS.md.
"""
import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.image_tokens import ImageKV, ImageTokens, Queries
from pruning.attention import attention_received
from pruning.options import check_least, check_share
from pruning.pruner import SelectPerLayer
from pruning.select import num_kept


@dataclass
class CSP(SelectPerLayer):
    """Keeps what the last query positions attend to; those with more evidence count more. Each key/value head
    has a set of its own.

    `observed` are the last query positions: a share of all tokens, text and image, or a number.
    """
    keep: float | int = 0.2
    observed: float | int = 0.1
    n: float = 1.0
    per: Literal["kv_head", "layer"] = "kv_head"
    decode_n: float = 0.0

    name = "csp"
    paper = "Pei et al. 2024, arXiv 2412.04652"

    def __post_init__(self):
        super().__post_init__()
        check_share(self, "observed")
        check_least(self, n=0, decode_n=0)

    @property
    def keeps_all(self) -> bool:
        return super().keeps_all and not self.decode_n

    def encoded(self, image: ImageTokens, prompts: list[list[int]]) -> ImageTokens:
        real = torch.ones_like(image.coords[..., 0]) if image.mask is None else image.mask
        text = torch.tensor([len(ids) for ids in prompts], device=real.device)
        self.asking = num_kept(self.observed, real.sum(1) + text)                       # [B]
        return image

    def score(self, queries: Queries, kv: ImageKV) -> Tensor:
        sees = queries.seen[..., 0] < queries.seen[..., 1]                              # [B, T]
        from_the_end = sees.flip(1).cumsum(1).flip(1)
        last = sees & (from_the_end <= self.asking[:, None])
        return attention_received(queries, kv, last, self.per, partial(nsoftmax, n=self.n))

    def prefilled(self, image_kv: list[ImageKV]) -> list[ImageKV]:
        image_kv = super().prefilled(image_kv)
        return [with_null_key(kv, self.decode_n) for kv in image_kv] if self.decode_n else image_kv


def nsoftmax(scores: Tensor, n: float) -> Tensor:
    """exp scores / (n + their sum), over the last dimension."""
    return F.pad(scores, (0, 1), value=math.log(n)).softmax(-1)[..., :-1] if n else scores.softmax(-1)


def with_null_key(kv: ImageKV, n: float) -> ImageKV:
    """With one more entry that adds n to the denominator of a softmax and nothing to what comes of it."""
    coords = torch.cat((kv.coords[:, :, :1, :2], torch.full_like(kv.coords[:, :, :1, 2:], -2)), -1)
    bias = kv.key.new_zeros(kv.coords.shape[:3], dtype=torch.float32)
    return ImageKV(F.pad(kv.key, (0, 0, 0, 1)), F.pad(kv.value, (0, 0, 0, 1)),
                   torch.cat((kv.coords, coords), 2),
                   None if kv.mask is None else F.pad(kv.mask, (0, 1), value=True),
                   F.pad(bias, (0, 1), value=math.log(n)))
