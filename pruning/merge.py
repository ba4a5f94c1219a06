"""Merging image tokens: some stay, and become the mean of those that they stand for.

A mean may count for as many tokens as it stands for: with ln of their number added to its scores, attention
over the means equals attention over the list in which each mean is repeated that often.
B batch, N image tokens, n of them stay, G key/value heads, K = 1 or G sets of tokens, D model width.
"""
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from model.image_tokens import ImageKV, ImageTokens
from pruning.select import single_images

AT_ONCE = 512               # tokens that are read in fp32 at a time
TINY = 1e-30                # less than any norm that counts


def merge_tokens(image: ImageTokens, owner: Tensor, weight: Tensor | None = None,
                 bias: bool = True) -> ImageTokens:
    """Each token that stays as the mean of those that it stands for, with its own coords.

    `owner` [B, N] is the index of the token that stands for each one; those that stay own themselves. The
    mean is weighted by `weight` [B, N], above 0 for one token of each cluster at least; with `bias` ln of
    their number is added to its scores. The object itself is returned if all tokens stay. Raises ValueError
    if an image would lose all its tokens, or the owner of a token does not stay.
    """
    mask, own_bias = (None if each is None else each[:, None] for each in (image.mask, image.bias))
    clusters = Clusters(owner[:, None], mask, own_bias, weight)
    if clusters.all_stay:
        return image
    small = image.take(clusters.stays[:, 0])
    features = clusters.mean(image.features[:, None])[:, 0]                             # [B, n, D]
    return replace(small, features=features, bias=clusters.ln_size()[:, 0] if bias else small.bias)


def merge_kv(kv: ImageKV, owner: Tensor, weight: Tensor | None = None, bias: bool = True) -> ImageKV:
    """The same for keys and values: `owner` is [B, N], or [B, K, N] for a set of its own in every key/value
    head; `weight` [B, N]."""
    clusters = Clusters(owner if owner.ndim == 3 else owner[:, None], kv.mask, kv.bias, weight)
    if clusters.all_stay:
        return kv
    small = kv.take(clusters.stays)
    return replace(small, key=clusters.mean(kv.key), value=clusters.mean(kv.value),
                   bias=clusters.ln_size() if bias else small.bias)


class Clusters:
    """Where the tokens of each set go, `owner` [B, K, N], and with which weight."""

    def __init__(self, owner: Tensor, mask: Tensor | None, bias: Tensor | None, weight: Tensor | None):
        real = torch.ones_like(owner, dtype=torch.bool)                                 # [B, K, N]
        real = real if mask is None else real & mask
        self.stays = real & (owner == torch.arange(owner.shape[-1], device=owner.device))
        self.all_stay = torch.equal(self.stays, real)
        owner = torch.where(real, owner, 0)
        if not (self.stays.gather(-1, owner) | ~real).all():
            raise ValueError("an image token is merged into one that does not stay: the owner of an owner "
                             "must be itself")
        self.index = (self.stays.cumsum(-1) - 1).clamp(min=0).gather(-1, owner)
        self.number = int(self.stays.sum(-1).max())
        # A token with a bias counts for as many already.
        self.count = real.float() if bias is None else torch.where(real, bias.exp(), 0)
        self.weight = self.count if weight is None else torch.where(real, self.count * weight[:, None], 0)

    def mean(self, x: Tensor) -> Tensor:
        """The means of x [B, G, N, d] -> [B, G, n, d]; those of padding are 0."""
        total = x.new_zeros(*x.shape[:2], self.number, x.shape[-1], dtype=torch.float32)
        for part, index, w in zip(*(t.split(AT_ONCE, 2) for t in (x, self.index, self.weight)), strict=True):
            w = w[..., None]
            each = torch.where(w > 0, part.float() * w, 0)          # padding may hold NaN
            total.scatter_add_(2, index[..., None].expand_as(each), each)
        weight = self.sum(self.weight)[..., None]
        return total.div_(torch.where(weight > 0, weight, 1)).to(x.dtype)

    def ln_size(self) -> Tensor:
        """ln of the number of tokens that each one stands for, [B, K, n] fp32; 0 for padding."""
        size = self.sum(self.count)
        return torch.where(size > 0, size, 1).log()

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x [B, K, N] over each cluster, [B, K, n]."""
        return x.new_zeros(*x.shape[:2], self.number).scatter_add_(2, self.index, x)


# ----- which tokens are merged


def joined(kv: ImageKV) -> Tensor:
    """Keys and values side by side, both of the same norm in each head: [B, G, N, 2 d] fp32; 0 at padding."""
    parts = [t.float() for t in (kv.key, kv.value)]
    if kv.mask is not None:
        parts = [torch.where(kv.mask[..., None], t, 0) for t in parts]
    return torch.cat([t / t.norm(dim=(2, 3), keepdim=True).clamp(min=TINY) for t in parts], -1)


def owners(tokens: ImageTokens | ImageKV, x: Tensor, weight: Tensor,
           cluster: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """The token that stands for each one, as `merge_tokens` and `merge_kv` take it, like x without d.

    x [B, N, d] or [B, G, N, d] is what is compared. `cluster(x, weight, tile)` is asked about the n tokens of
    one image in one set, and answers with the number of one of them for each [n].
    """
    sets = x if x.ndim == 4 else x[:, None]
    owner = torch.arange(x.shape[-2], device=x.device).repeat(*sets.shape[:2], 1)       # [B, G or 1, N]
    coords = tokens.coords if tokens.coords.ndim == 3 else tokens.coords[:, 0]
    for b, own in single_images(tokens):
        for g in range(sets.shape[1]):
            compared = sets[b, g] if len(own) == x.shape[-2] else sets[b, g, own]           # without a copy
            owner[b, g, own] = own[cluster(compared, weight[b, own], coords[b, own, 1])]
    return owner.view(x.shape[:-1])
