"""What decoding needs of everything before it: keys and values of the text, and of the images.

Its tensors stay where they are and keep their shape while tokens are decoded: room for the text is taken at
once, in whole BUCKETs, and `positions`, on the device, say how much of it is filled; the rest is masked. So a
step is the same work every time, and `model/compiled.py` can compile it.
B batch, H query heads, G key/value heads, d head width.
"""
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.image_tokens import ImageKV, kv_bytes

BUCKET = 64


def rounded_up(tokens: int, bucket: int = BUCKET) -> int:
    """Room for so many tokens, in whole buckets."""
    return -(-tokens // bucket) * bucket


@dataclass
class TextKV:
    """Keys and values of one self-attention layer; in a batch row the first of its `lengths` are filled."""
    key: Tensor                     # [B, G, capacity, d] rotated
    value: Tensor                   # [B, G, capacity, d]
    lengths: Tensor                 # [B]


@dataclass
class Cache:
    keys: list[Tensor]              # per self-attention layer [B, G, capacity, d], allocated once
    values: list[Tensor]
    positions: Tensor               # [B] tokens read of each batch row: the next one's place in the text
    filled: Tensor                  # [B] of these held, fewer where some were let go: its slot
    frequencies: Tensor             # [d/2] of the rotation, from `rotary_frequencies`
    images: list[ImageKV] = field(default_factory=list)     # per cross-attention layer; none: nobody sees any
    rows: Tensor | None = None      # [B, 1, 1] True where generated tokens see an image; None = everywhere
    queries: list[Tensor] = field(default_factory=list)     # [B, H, 1, d] of the last step, like `images`

    def text_mask(self) -> Tensor:
        """[B, 1, 1, capacity] True where the next token, once entered, may look."""
        slots = torch.arange(self.keys[0].shape[2], device=self.filled.device)
        return (slots <= self.filled[:, None])[:, None, None]

    def texts(self) -> list["TextKV"]:
        """What is held of the text, per self-attention layer: the tensors themselves, without a copy."""
        return [TextKV(*layer, self.filled) for layer in zip(self.keys, self.values, strict=True)]

    def hold_texts(self, texts: list["TextKV"]):
        """Decode with these from now on: fewer entries of each batch row, the same number in all layers."""
        if texts and texts[0].key is not self.keys[0]:
            for key, value, text in zip(self.keys, self.values, texts, strict=True):
                key[:, :, :text.key.shape[2]], value[:, :, :text.value.shape[2]] = text.key, text.value
            self.filled.copy_(texts[0].lengths)

    def hold(self, kvs: list[ImageKV]):
        """Decode with these from now on; tokens that are masked everywhere are let go."""
        if kvs is not self.images:
            self.images = [kv.settle(self.rows) for kv in kvs]

    def kept(self) -> list[list[float]]:
        """Image tokens held for each batch row, per cross-attention layer; a mean over key/value heads."""
        rows = torch.ones(len(self.positions)) if self.rows is None else self.rows.flatten().cpu().float()
        counts = [kv.counts().cpu() * rows for kv in self.images]
        return torch.stack(counts, dim=1).tolist() if counts else [[] for _ in self.positions]

    def text_bytes(self) -> int:
        return sum(t.nbytes for t in self.keys + self.values)

    def image_bytes(self) -> int:
        return kv_bytes(self.images)
