"""What decoding needs of everything before it: keys and values of the text, and of the images.

The text's tensors are static buffers: room for the whole answer is allocated at once, in whole BUCKETs, and
`positions`, on the device, says how much of it is filled; the rest is masked. So every decode step is the
same work on the same addresses, and `model/compiled.py` can compile it.
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
class Cache:
    text_keys: list[Tensor]         # per self-attention layer [B, G, capacity, d], rotated
    text_values: list[Tensor]       # per self-attention layer [B, G, capacity, d]
    positions: Tensor               # [B] tokens read so far: the position of the next one, and its slot
    frequencies: Tensor             # [d/2] of the rotary embedding, from `rotary_frequencies`
    sees_image: Tensor | None = None        # [B, 1, 1] whether new tokens see an image; None: all of them do
    queries: list[Tensor] = field(default_factory=list)     # [B, H, 1, d] of the last step, per cross layer
    _image_kv: list[ImageKV] = field(default_factory=list)
    _compacted: list[ImageKV] = field(default_factory=list)

    @property
    def image_kv(self) -> list[ImageKV]:
        """Per cross-attention layer; empty if no sequence sees an image."""
        return self._image_kv

    @image_kv.setter
    def image_kv(self, image_kv: list[ImageKV]):
        """Decode with these from now on. Tokens that are masked in every sequence are dropped."""
        if image_kv is not self._compacted:
            known = {id(kv) for kv in self._compacted}
            self._image_kv = [kv if id(kv) in known else kv.compact(self.sees_image) for kv in image_kv]
            self._compacted = self._image_kv

    def see_from(self, seen: Tensor):
        """New tokens see what one query position of each sequence sees: its images, `seen` [B, 2]. The other
        tokens are masked, and dropped when `image_kv` is assigned."""
        sees_image = seen[:, 0] < seen[:, 1]                                                # [B]
        self.sees_image = None if sees_image.all() else sees_image[:, None, None]
        self._image_kv = [kv.seen_from(seen) for kv in self._image_kv] if sees_image.any() else []

    def text_mask(self) -> Tensor:
        """[B, 1, 1, capacity] True where the next token may look, once it is in its slot."""
        slots = torch.arange(self.text_keys[0].shape[2], device=self.positions.device)
        return (slots <= self.positions[:, None])[:, None, None]

    def kept(self) -> list[list[float]]:
        """Image tokens of each sequence in each cross-attention layer; a mean over key/value heads."""
        if not self._image_kv:
            return [[] for _ in self.positions]
        counts = torch.stack([kv.counts().cpu() for kv in self._image_kv], dim=1)           # [B, layers]
        if self.sees_image is not None:
            counts = counts * self.sees_image[:, 0].cpu()
        return counts.tolist()

    def text_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.text_keys + self.text_values)

    def image_bytes(self) -> int:
        return kv_bytes(self._image_kv)
