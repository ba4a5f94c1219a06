"""ZipVL: each layer keeps as many image tokens as it takes to hold a share tau of its attention.

    a[j] = sum over probe positions t of A[t, j]        p: the fewest tokens that hold tau · (sum of all a)
    m[j] = a[j] / probe positions that see j            kept: the top p by m

He et al., "ZipVL", arXiv 2410.08584; no code is published. Ours: heads are reduced by their mean, and `keep`
takes the place of tau, which is then found.
See docs/PAPERS.md.
"""
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.image_tokens import ImageKV, ImageTokens, Queries, each_image, visible_tokens
from pruning.attention import attention_received
from pruning.pruner import SelectPerLayer
from pruning.select import budget, highest, missing

RECENT, RANDOM = 64, 64     # probes
ROUNDING = 1e-5             # of the mass that may be missing


@dataclass
class ZipVL(SelectPerLayer):
    """Keeps in each layer as many tokens as hold a share tau of its attention.

    With `keep`, of each image's tokens a layer on average, tau is found instead of given. `seed` is of the
    random probes of long prompts.
    """
    keep: float | int | None = None
    tau: float = 0.975
    when: Literal["prefill", "boundary"] = "prefill"        # boundary: the prompt reads everything
    per: Literal["layer", "kv_head"] = "layer"
    seed: int = 0

    paper = "He et al. 2024, arXiv 2410.08584"

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.tau <= 1:
            raise ValueError(f"{self.name}: tau is {self.tau}, but must be above 0 and at most 1")

    @property
    def keeps_all(self) -> bool:
        return self.tau == 1 if self.keep is None else super().keeps_all

    @property
    def at_once(self) -> bool:
        """Whether each layer is cut before it reads the prompt."""
        return self.keep is None and self.when == "prefill"

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        image, kv = super().layer(i, queries, image, kv)
        return image, kv.take(self.choose([kv])[0]) if self.at_once else kv

    def prefilled(self, image_kv: list[ImageKV]) -> list[ImageKV]:
        return image_kv if self.at_once else super().prefilled(image_kv)

    def score(self, queries: Queries, kv: ImageKV) -> Tensor:
        """The attention that each token receives from the probes, [2, B, K, N]: the sum, and the mean."""
        asked = probes(queries.seen[..., 0] < queries.seen[..., 1], self.seed)          # [B, T]
        received = attention_received(queries, kv, asked, self.per)
        received = received.view(len(asked), -1, kv.key.shape[2])                       # [B, K, N]
        seeing = visible_tokens(queries.seen * asked[..., None], kv).sum(2)             # [B, 1, N]
        return torch.stack((received, received / seeing.clamp(min=1)))

    def choose(self, image_kv: list[ImageKV]) -> list[Tensor]:
        """What the latest layers keep, [B, K, N] bool of each."""
        mass, mean = torch.stack(self.scores[-len(image_kv):], dim=2)                   # [B, C, K, N] each
        images = [there[:, None] for there in each_image(image_kv[0])]                  # [B, 1, 1, N] each
        there = sum(images) > 0
        first = sum(highest(mean, 1, image) for image in images) > 0          # the best of each
        rank = torch.arange(mean.shape[-1], device=mean.device)
        lacking = missing(mass.masked_fill(~there, 0))
        lacking = lacking.masked_fill(rank < first.sum(-1, keepdim=True), 2)
        wanted = (rank < there.sum(-1, keepdim=True)).expand_as(mean)
        if self.keep is None:
            wanted = wanted & (lacking > (1 - self.tau) * (1 + ROUNDING))
        else:
            sets = wanted[0, ..., 0].numel()
            total = sum(budget(self.keep, image.sum((1, 2, 3)), sets) for image in images)
            wanted = highest(lacking.flatten(1), total[:, None], wanted.flatten(1)).view_as(wanted)
        counts = wanted.sum(-1, keepdim=True)
        return [*highest(mean.masked_fill(first, torch.inf), counts, there).unbind(1)]


def probes(looking: Tensor, seed: int) -> Tensor:
    """Of the query positions [B, T] that see an image, the latest and some random ones of the others; all of
    them if they are few. Which are drawn depends on how many there are, and on nothing else of the batch."""
    asked = looking.clone()
    for b, sees in enumerate(looking):
        early = sees.nonzero()[:-RECENT, 0]
        if len(early) > RANDOM:
            generator = torch.Generator().manual_seed(seed)
            left_out = torch.randperm(len(early), generator=generator)[RANDOM:].to(early.device)
            asked[b, early[left_out]] = False
    return asked
