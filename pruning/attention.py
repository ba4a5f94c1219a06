"""The attention that a method wants to look at, computed from queries and keys in fp32.

The model never makes attention weights. These functions make them for the rows asked for, a few rows at a
time, so that little memory is needed. Rows that see no image, and padding, are never among them; a softmax is
over the image tokens that its row sees. H query heads, G key/value heads, T text rows, N image tokens.
"""
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from model.image_tokens import ImageKV, Queries, visible

CHUNK_BYTES = 32 * 2 ** 20          # of the weights of the rows that are made at once


def rows_at_once(heads: int, tokens: int) -> int:
    """How many text rows' weights [heads, tokens] in fp32 fit into a chunk; at least one."""
    return max(1, CHUNK_BYTES // (heads * tokens * 4))


def peak_bytes(heads: int, kv_heads: int, tokens: int, width: int) -> int:
    """The most that `column_mass` holds at a time beside its arguments, for a prompt of any length: the keys
    in fp32, the logits and the weights of a chunk, and the sums."""
    chunk = rows_at_once(heads, tokens) * heads * (tokens + width) * 4
    return kv_heads * tokens * width * 4 + 2 * chunk + heads * tokens * 4


def logits(q: Tensor, key: Tensor) -> Tensor:
    """Scores before the softmax: q [H, T, d], key [G, N, d] -> [H, T, N] fp32."""
    groups = (q.float() * q.shape[-1] ** -0.5).unflatten(0, (len(key), -1)).flatten(1, 2)     # [G, H/G·T, d]
    return (groups @ key.float().transpose(-1, -2)).view(len(q), -1, key.shape[1])


def row_weights(queries: Queries, kv: ImageKV, row: int, asked: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Attention weights of one batch row, chunk by chunk: text rows [t], and their weights [H, t, N].

    `asked` [T] is True for the text rows wanted; those that see no image are left out.
    """
    seen, q, key = queries.seen[row], queries.q[row], kv.key[row].float()
    one = replace(kv, coords=kv.coords[row:row + 1], mask=None if kv.mask is None else kv.mask[row:row + 1])
    wanted = (asked & (seen[:, 0] < seen[:, 1])).nonzero()[:, 0]
    for rows in wanted.split(rows_at_once(len(q), key.shape[1])) if len(wanted) else ():
        scores = logits(q[:, rows], key)
        sees = visible(seen[None, rows], one)[0]                                        # [K, t, N]
        if not sees.all():
            scores.masked_fill_(~sees.repeat_interleave(len(q) // len(sees), 0), -math.inf)
        yield rows, scores.softmax(-1)


def attention_received(queries: Queries, kv: ImageKV, rows: Literal["all", "last"] = "all",
                heads: Literal["query", "kv", "layer"] = "query") -> Tensor:
    """How much attention each image token gets, summed over text rows, in fp32.

    Of `all` rows that see it, or of the `last` one alone. By query head [B, H, N], by key/value head
    [B, G, N] (the mean of its query heads), or by layer [B, N] (the mean of all).
    """
    B, H, T, _ = queries.q.shape
    mass = queries.q.new_zeros(B, H, kv.key.shape[2], dtype=torch.float32)
    everywhere = torch.ones(T, dtype=torch.bool, device=mass.device)
    for row in range(B):
        lasts = last_rows(queries, kv, row) if rows == "last" else None                 # [K, N]
        asked = everywhere if lasts is None else torch.isin(everywhere.nonzero()[:, 0], lasts)
        for which, weights in row_weights(queries, kv, row, asked):
            if lasts is not None:
                weights *= (which[:, None] == lasts[:, None]).repeat_interleave(H // len(lasts), 0)
            mass[row] += weights.sum(1)
            del weights                     # before the next chunk is made
    if heads == "query":
        return mass
    return mass.mean(1) if heads == "layer" else mass.unflatten(1, (kv.key.shape[1], -1)).mean(2)


def last_rows(queries: Queries, kv: ImageKV, row: int) -> Tensor:
    """The last text row of a batch row that sees each image token, [K, N]; -1 where none does."""
    seen, image = queries.seen[row], kv.coords[row, :, None, :, 0]                       # [T, 2], [K, 1, N]
    rows = torch.arange(len(seen), device=seen.device)[:, None]
    return torch.where((image >= seen[:, :1]) & (image < seen[:, 1:]), rows, -1).amax(1)
