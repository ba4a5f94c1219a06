"""Attention weights that a pruner wants to look at, computed from queries and keys in fp32.

The model itself never makes attention weights: fused kernels do without. These functions make them for the
query positions asked for, a few at a time, so that little memory is needed. Positions that see no image, and
padding, are never among them; a softmax is over the image tokens that its position sees, with their bias.
H query heads, G key/value heads, T text tokens, N image tokens, d head width.
"""
import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from model.image_tokens import ImageKV, ImageTokens, Queries, each_image, visible_tokens

CHUNK_BYTES = 16 * 2 ** 20          # of the weights that are made at once


def attention_received(queries: Queries, kv: ImageKV, positions: Literal["all", "last"] | Tensor = "all",
                       per: Literal["head", "kv_head", "layer"] = "head",
                       softmax: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """How much attention each image token receives, summed over query positions, in fp32.

    From `all` positions that see it, from the `last` one of these, or from those where a mask [B, T] is True.
    Per query head [B, H, N]; per key/value head [B, G, N], the mean of its query heads; or per layer [B, N],
    the mean of all heads. `softmax` turns scores [H, t, N] into weights, if not the ordinary one does.
    """
    B, H, T, _ = queries.q.shape
    received = queries.q.new_zeros(B, H, kv.key.shape[2], dtype=torch.float32)
    everywhere = torch.ones(T, dtype=torch.bool, device=received.device)
    for b in range(B):
        last = last_positions(queries, kv, b) if positions == "last" else None          # [K, N]
        if last is not None:
            asked = torch.isin(everywhere.nonzero()[:, 0], last)                        # [T]
        else:
            asked = everywhere if positions == "all" else positions[b]
        for which, weights in attention_weights(queries, kv, b, asked, softmax):
            if last is not None:
                weights *= (which[:, None] == last[:, None]).repeat_interleave(H // len(last), 0)
            received[b] += weights.sum(1)
            del weights                     # before the next chunk is made
    if per == "head":
        return received
    return received.mean(1) if per == "layer" else received.unflatten(1, (kv.key.shape[1], -1)).mean(2)


def over_mean(received: Tensor, image: ImageTokens) -> Tensor:
    """What each token receives [B, N] over the mean in its image; 1 for an image that receives nothing, and
    at padding."""
    over = torch.ones_like(received)
    for there in each_image(image):
        mean = (received * there).sum(-1, keepdim=True) / there.sum(-1, keepdim=True)   # [B, 1]
        over = torch.where(there & (mean > 0), received / mean, over)
    return over


def attention_weights(queries: Queries, kv: ImageKV, b: int, asked: Tensor,
                      softmax: Callable[[Tensor], Tensor] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Attention weights of sequence b, chunk by chunk: query positions [t], and their weights [H, t, N].

    `asked` [T] is True at the positions wanted; those that see no image are left out.
    """
    seen = queries.seen[b]                                                              # [T, 2]
    q = queries.q[b]                                                                    # [H, T, d]
    key = kv.key[b].float()                                                             # [G, N, d]
    H, N = len(q), key.shape[1]
    own = kv.sequence(b)
    wanted = (asked & (seen[:, 0] < seen[:, 1])).nonzero()[:, 0]
    if not len(wanted):
        return
    for which in wanted.split(positions_at_once(H, N)):
        scores = attention_scores(q[:, which], key)                                     # [H, t, N]
        if own.bias is not None:
            scores += own.bias[0].repeat_interleave(H // own.bias.shape[1], 0)[:, None]
        sees = visible_tokens(seen[None, which], own)[0]                                # [K, t, N]
        if not sees.all():
            scores.masked_fill_(~sees.repeat_interleave(H // len(sees), 0), -math.inf)
        yield which, scores.softmax(-1) if softmax is None else softmax(scores)


def attention_scores(q: Tensor, key: Tensor) -> Tensor:
    """Scores before the softmax: q [H, t, d], key [G, N, d] -> [H, t, N] fp32."""
    scaled = q.float() * q.shape[-1] ** -0.5
    groups = scaled.unflatten(0, (len(key), -1)).flatten(1, 2)                          # [G, H/G·t, d]
    return (groups @ key.float().transpose(-1, -2)).view(len(q), -1, key.shape[1])


def last_positions(queries: Queries, kv: ImageKV, b: int) -> Tensor:
    """The last query position of sequence b that sees each image token, [K, N]; -1 where none does."""
    seen = queries.seen[b]                                                              # [T, 2]
    image = kv.coords[b, :, None, :, 0]                                                 # [K, 1, N]
    positions = torch.arange(len(seen), device=seen.device)[:, None]                    # [T, 1]
    sees = (image >= seen[:, :1]) & (image < seen[:, 1:])                               # [K, T, N]
    return torch.where(sees, positions, -1).amax(1)


def every_image(queries: Tensor) -> Queries:
    """Queries of a decode step [B, H, 1, d], which see all the tokens that are cached."""
    seen = torch.tensor([0, 2 ** 30], device=queries.device)
    return Queries(queries, seen.expand(len(queries), 1, 2))


def positions_at_once(heads: int, tokens: int) -> int:
    """For how many query positions weights [heads, tokens] in fp32 fit into a chunk; at least one."""
    return max(1, CHUNK_BYTES // (heads * tokens * 4))


def peak_bytes(heads: int, kv_heads: int, tokens: int, width: int) -> int:
    """The most that `attention_received` holds at a time beside its arguments, for a prompt of any length:
    the keys in fp32, scores and weights of a chunk, and the sums."""
    chunk = positions_at_once(heads, tokens) * heads * (tokens + width) * 4
    return kv_heads * tokens * width * 4 + 2 * chunk + 2 * heads * tokens * 4
