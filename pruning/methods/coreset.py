"""Coreset: clusters of like image tokens become one token each, which counts for as many as it stands for.

    sum over j in C of exp(q k_j) v_j  ~  exp(q k_C + ln |C|) v_C       k_C, v_C: of the mean of the cluster C

Image keys carry no position, so a head reads a set of keys and values, and a smaller weighted set can stand
for it. A token counts in means and costs 1 - question + question · its attention from the prompt, over the
mean. Merging with ln of the size in the scores is ToMe's; clusters cut from Ward's tree and weights are ours.
See docs/CORESET.md and docs/PAPERS.md.
"""
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from model.image_tokens import ImageKV, ImageTokens, Queries
from pruning.attention import attention_received, over_mean
from pruning.clusters import Trees, central, k_centre, project, spaced
from pruning.merge import joined, merge_kv, merge_tokens, owners
from pruning.options import check_least
from pruning.pruner import Reduced, SelectOnce
from pruning.select import num_kept

LEAST = 1e-3                            # weight of a token that the prompt does not look at


@dataclass
class Coreset(SelectOnce):
    """Replaces clusters of like tokens by their means, each of which counts for as many as it stands for.

    `question` is how much attention from the prompt weighs; with 0 one tree serves all questions about an
    image. Features are compared in a random projection to `width` dimensions (0: as they are). With a
    `height` an image needs fewer tokens than `keep` if merging them costs less than this share of the mean
    squared distance of its tokens from their mean.
    """
    keep: float | int = 0.1
    question: float = 0.5
    full_layers: int = 0
    clusters: Literal["ward", "spaced", "k_centre"] = "ward"
    space: Literal["features", "keys_values"] = "features"
    width: int = 64
    within: Literal["image", "tile"] = "image"
    height: float = 0.0
    bias: bool = True

    merges: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        check_least(self, question=0, width=0, height=0)
        if self.question > 1:
            raise ValueError(f"coreset: question is {self.question}, but must be at most 1")
        if self.clusters != "ward" and (self.height or self.within == "tile"):
            raise ValueError(f"coreset: height and within=tile need clusters=ward, not {self.clusters}")
        if self.in_each_head and (self.full_layers or self.early_caches != "trim"):
            raise ValueError("coreset: with space=keys_values and when=boundary all layers are alike: leave "
                             "full_layers and early_caches at their defaults")
        self.trees = Trees()

    @property
    def keeps_all(self) -> bool:
        return super().keeps_all and not self.height

    @property
    def before_decoder(self) -> bool:
        """Whether nothing of the decoder is needed: then no key of a dropped token is ever made."""
        return self.question == self.full_layers == 0 and (self.when, self.space) == ("prefill", "features")

    @property
    def in_each_head(self) -> bool:
        """Whether every layer and key/value head has clusters of its own, after prefill."""
        return (self.when, self.space) == ("boundary", "keys_values")

    def encoded(self, image: ImageTokens, prompts: list[list[int]]) -> ImageTokens:
        self.weight = torch.ones_like(image.features[..., 0], dtype=torch.float32)      # [B, N]
        if not self.before_decoder:
            return image
        self.kept = owners(image, image.features, self.weight, self.cluster)
        return self.reduce(image)

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        return (image, kv) if self.before_decoder else super().layer(i, queries, image, kv)

    def choose(self, queries: Queries, image: ImageTokens, kv: ImageKV) -> Tensor:
        """The token that stands for each one, [B, N] int64."""
        if self.question:
            asked = over_mean(attention_received(queries, kv, per="layer"), image)      # [B, N]
            self.weight = (1 - self.question + self.question * asked).clamp(min=LEAST)
        if self.in_each_head:
            return torch.arange(image.coords.shape[1], device=kv.key.device).expand(len(kv.key), -1)
        x = image.features if self.space == "features" else joined(kv).transpose(1, 2).flatten(2)
        return owners(image, x, self.weight, self.cluster)                              # [B, N]

    def reduce(self, tokens: Reduced) -> Reduced:
        merge = merge_tokens if isinstance(tokens, ImageTokens) else merge_kv
        return merge(tokens, self.kept, self.weight, self.bias)

    def prefilled(self, image_kv: list[ImageKV]) -> list[ImageKV]:
        if not self.in_each_head:
            return super().prefilled(image_kv)
        # [B, G, N] each
        self.owners = [owners(kv, joined(kv), self.weight, self.cluster) for kv in image_kv]
        sets = zip(image_kv, self.owners, strict=True)
        return [merge_kv(kv, owner, self.weight, self.bias) for kv, owner in sets]

    def cluster(self, x: Tensor, weight: Tensor, tile: Tensor) -> Tensor:
        """The number of the token that stands for each token x [n, d] of one image."""
        n = int(num_kept(self.keep, torch.tensor(len(x))))
        if n == len(x) and not self.height:
            return torch.arange(n, device=x.device)
        x = project(x, self.width)
        if self.clusters != "ward":
            return spaced(x, n) if self.clusters == "spaced" else k_centre(x, n)
        tree = self.trees.of(x, weight, tile * (self.within == "tile"))
        if self.height:
            n = tree.clusters(n, self.height * float(x.var(0, correction=0).sum()))
        return central(x, tree.cut(n))
