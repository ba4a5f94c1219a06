"""ToMe: merge the image tokens that are most alike, and let each count as often as the tokens it is made of.

    A, B alternate; a in A joins the b in B with the highest cos(a, b), the r best pairs first
    merged = mean of its tokens        scores + ln(size)

In rounds, each of at most half of the tokens. Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023,
arXiv 2210.09461. Ours: all of them before the decoder, by the features that it reads, where theirs are one in
every layer of the encoder. See docs/PAPERS.md.
"""
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from model.image_tokens import ImageTokens
from pruning.merge import merge_tokens, owners
from pruning.pruner import Pruner
from pruning.select import num_kept


@dataclass
class ToMe(Pruner):
    """Merges the tokens of each image that are most alike."""
    keep: float | int = 0.5
    prop_attn: bool = True                          # a merged token's score gets ln of its size

    paper = "Bolya et al. 2023, arXiv 2210.09461"
    merges: ClassVar[bool] = True

    def encoded(self, image: ImageTokens, prompts: list[list[int]]) -> ImageTokens:
        weight = torch.ones_like(image.features[..., 0])
        owner = owners(image, image.features, weight, self.cluster)                     # [B, N]
        self.owners = [owner]
        return merge_tokens(image, owner, bias=self.prop_attn)

    def cluster(self, x: Tensor, weight: Tensor, tile: Tensor) -> Tensor:
        """The number of the token that stands for each token x [n, D] of one image."""
        return match(x, int(num_kept(self.keep, torch.tensor(len(x)))))


def match(features: Tensor, n: int) -> Tensor:
    """Bipartite soft matching until `n` of the tokens [N, D] are left: the one that stands for each, [N]."""
    sums = features.float()                         # over what a token stands for; it points as the mean does
    itself = torch.arange(len(features), device=features.device)
    owner = itself
    left = itself                                   # those that are left, in the order of the next round
    while len(left) > n:
        r = min(len(left) // 2, len(left) - n)
        a = left[::2]
        b = left[1::2]
        alike = F.normalize(sums[a], dim=-1) @ F.normalize(sums[b], dim=-1).T           # [A, B]
        highest, nearest = alike.max(1)
        order = highest.argsort(descending=True, stable=True)
        merged = a[order[:r]]
        into = b[nearest[order[:r]]]
        sums = sums.index_add(0, into, sums[merged])
        owner = itself.index_put((merged,), into)[owner]
        left = torch.cat((a[order[r:].sort().values], b))
    return owner
