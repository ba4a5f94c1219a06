"""What is held of the images between encoder and decoder, and which text rows see it.

ImageTokens leave the encoder; every cross-attention layer makes its ImageKV of them. Image keys carry no
position, so dropping a token is exactly masking it: `take` drops, and the smaller set serves like the whole.
Batch rows that keep fewer than the longest are padded and masked. B batch, T text tokens, N image tokens,
H query heads, G key/value heads, K = 1 or G (sets that the heads share, or one a head), d head width.
"""
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Grid = tuple[int, int]                          # rows, columns


@dataclass
class Tiles:
    pixels: Tensor                              # [I, T, 3, S, S]; 0.0 in the slots without a tile
    grid: Tensor                                # [I, 2] int64: rows, columns

    def __len__(self) -> int:
        return len(self.grid)

    @property
    def real(self) -> Tensor:
        """How many tiles of each image are real, [I] int64."""
        return self.grid.prod(-1)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Tiles":
        """The same tiles on another device, the pixels in another floating-point type."""
        return Tiles(self.pixels.to(device=device, dtype=dtype), self.grid.to(device=device))

    @staticmethod
    def cat(parts: list["Tiles"]) -> "Tiles":
        """One Tiles of all the images of several, in order."""
        return Tiles(torch.cat([p.pixels for p in parts]), torch.cat([p.grid for p in parts]))


def visible_images(input_ids: Tensor, image_token_index: int) -> Tensor:
    """The range of images that each text row sees, [B, T, 2] = first, last + 1; equal where it sees none.

    A row sees the latest image before it (its own, at an `<|image|>` token) together with the images directly
    in front of that one: consecutive images are one group. Source: Meta's `chat_format.py`, vision masks.
    """
    is_image = input_ids == image_token_index                               # [B, T]
    stop = is_image.cumsum(1)
    opens = is_image & ~torch.nn.functional.pad(is_image, (1, -1))          # the first image of each group
    start = torch.where(opens, stop - 1, 0).cummax(1).values
    return torch.stack((start, stop), dim=-1)


@dataclass
class Vision:
    """What the vision encoder knows of image tokens; kept for pruners that ask for it. Zeros where a row has
    fewer tokens."""
    tiles: list[Tiles | None]       # of each batch row, as the encoder read them
    features: Tensor                # [B, N, F] what the projector reads: the final state, then the taps
    entering: Tensor                # [B, N, E] what entered the last global layer, ...
    leaving: Tensor                 # [B, N, E] ... and what its MLP was given: that after attention, normed

    def expand(self, batch: int) -> "Vision":
        states = (state.expand(batch, -1, -1) for state in (self.features, self.entering, self.leaving))
        return Vision(self.tiles * batch, *states)

    def rows(self, which: list[int]) -> "Vision":
        return Vision([self.tiles[row] for row in which], self.features[which], self.entering[which],
                      self.leaving[which])


@dataclass
class ImageTokens:
    """What the encoder leaves of the images of each batch row: real tiles only."""
    features: Tensor                # [B, N, D] after the projector; zeros where a row has fewer
    coords: Tensor                   # [B, N, 4] image, tile, row, column; a class token has row and column -1
    mask: Tensor | None = None      # [B, N] True where there is a token; None = everywhere
    vision: Vision | None = None    # only of the tokens as they were encoded, and only where asked for

    def rows(self, which: list[int]) -> "ImageTokens":
        """Some batch rows, in this order; [0, 0] for one image and two prompts."""
        return ImageTokens(self.features[which], self.coords[which],
                           None if self.mask is None else self.mask[which],
                           None if self.vision is None else self.vision.rows(which))

    def expand(self, batch: int) -> "ImageTokens":
        """The same image for every row of a batch, without a copy."""
        mask = None if self.mask is None else self.mask.expand(batch, -1)
        return ImageTokens(self.features.expand(batch, -1, -1), self.coords.expand(batch, -1, -1), mask,
                           None if self.vision is None else self.vision.expand(batch))

    def take(self, kept: Tensor) -> "ImageTokens":
        """The tokens where `kept` [B, N] is True, in their order; itself where that is all of them.

        Raises ValueError where nothing would be left of an image.
        """
        kept = held(self, kept)
        if kept.all():
            return self
        order, mask = compact(kept)
        row = torch.arange(len(order), device=order.device)[:, None]
        return ImageTokens(self.features[row, order], self.coords[row, order], mask)


@dataclass
class ImageKV:
    """Keys and values of one cross-attention layer, one per key/value head, never repeated."""
    key: Tensor                     # [B, G, N, d]
    value: Tensor                   # [B, G, N, d]
    coords: Tensor                   # [B, K, N, 4] as in ImageTokens
    mask: Tensor | None = None      # [B, K, N] True where there is a token; None = everywhere
    bias: Tensor | None = None      # [B, K, N] fp32, added to the scores in decoding; None = nothing

    def take(self, kept: Tensor) -> "ImageKV":
        """The tokens where `kept` is True, in their order; itself where that is all of them.

        `kept` is [B, N], or [B, K, N] for a set of its own in every key/value head. Raises ValueError where
        nothing would be left of an image.
        """
        kept = held(self, kept if kept.ndim == 3 else kept[:, None])                   # [B, K, N]
        if kept.all():
            return self
        order, mask = compact(kept)                                                     # [B, K, n]
        row = torch.arange(len(order), device=order.device)[:, None, None]
        head = torch.arange(self.key.shape[1], device=order.device)[:, None]
        coords = self.coords.expand(-1, order.shape[1], -1, -1).take_along_dim(order[..., None], 2)
        bias = None if self.bias is None else self.bias.expand(order.shape[:2] + self.bias.shape[2:]
                                                               ).take_along_dim(order, 2)
        return ImageKV(self.key[row, head, order], self.value[row, head, order], coords, mask, bias)

    def scores_mask(self) -> Tensor | None:
        """For the one text row of a decode step, [B, K, 1, N]: where it may look, or what is added to its
        scores."""
        if self.bias is None:
            return None if self.mask is None else self.mask[:, :, None]
        bias = self.bias if self.mask is None else self.bias.masked_fill(~self.mask, -torch.inf)
        return bias[:, :, None].to(self.key.dtype)

    def counts(self) -> Tensor:
        """Tokens held for each batch row [B] fp32, a mean over key/value heads."""
        B, _, N, _ = self.key.shape
        return torch.full((B,), float(N)) if self.mask is None else self.mask.sum(-1).float().mean(-1)

    def seen_by(self, seen: Tensor) -> "ImageKV":
        """With only those tokens unmasked that a text row of each batch row sees: images `seen` [B, 2]."""
        mask = visible(seen[:, None], self)[:, :, 0]
        return self if mask.all() else replace(self, mask=mask)

    def settle(self, rows: Tensor | None) -> "ImageKV":
        """Without what is masked in every batch row. Where `rows` [B, 1, 1] is False no image is seen, and no
        mask is left: a finite softmax is needed there too, though its result is thrown away."""
        if self.mask is None:
            return self
        kv = self.take(self.mask)
        mask = kv.mask if rows is None or kv.mask is None else kv.mask | ~rows
        return replace(kv, mask=None if mask is None or mask.all() else mask)


def kv_bytes(kvs: list[ImageKV]) -> int:
    """What they take, where several share a tensor only once."""
    return sum({t.data_ptr(): t.nbytes for kv in kvs for t in (kv.key, kv.value)}.values())


def each_image(tokens: ImageTokens | ImageKV) -> Iterator[Tensor]:
    """For one image after the other, where its tokens are: [B, N], or [B, K, N], without padding."""
    which = tokens.coords[..., 0]
    for image in range(int(which.max()) + 1):
        yield which == image if tokens.mask is None else (which == image) & tokens.mask


def held(tokens: ImageTokens | ImageKV, kept: Tensor) -> Tensor:
    """`kept` without the padding; ValueError where it leaves nothing of an image."""
    kept = kept if tokens.mask is None else kept & tokens.mask
    for image, there in enumerate(each_image(tokens)):
        gone = there.any(-1) & ~(there & kept).any(-1)
        if gone.any():
            raise ValueError(f"the pruner keeps no token of image {image} in batch row "
                             f"{int(gone.nonzero()[0, 0])}: keep at least one of every image")
    return kept


def compact(kept: Tensor) -> tuple[Tensor, Tensor | None]:
    """What is kept [..., N] -> its indices [..., n] in ascending order, and a mask where some have fewer.

    Padding repeats a kept token: one that was dropped may hold anything, and nothing may depend on it.
    """
    counts = kept.sum(-1, keepdim=True)
    order = kept.int().argsort(dim=-1, descending=True, stable=True)[..., :int(counts.max())]
    mask = torch.arange(order.shape[-1], device=kept.device) < counts
    return torch.where(mask, order, order[..., :1]), None if mask.all() else mask


def visible(seen: Tensor, tokens: ImageTokens | ImageKV) -> Tensor:
    """Which text rows see which tokens: the images each row sees [B, T, 2] -> [B, K, T, N], K = 1 for
    ImageTokens."""
    coords, mask = tokens.coords, tokens.mask
    if isinstance(tokens, ImageTokens):
        coords, mask = coords[:, None], None if mask is None else mask[:, None]
    which = coords[..., 0][:, :, None]                                                   # [B, K, 1, N]
    inside = (which >= seen[:, None, :, :1]) & (which < seen[:, None, :, 1:])           # [B, K, T, N]
    return inside if mask is None else inside & mask[:, :, None]


@dataclass
class Queries:
    """What text asks of the image at one cross-attention layer, from the first row that sees one."""
    q: Tensor                       # [B, H, T, d] normalised, not yet scaled by d ** -0.5
    seen: Tensor                    # [B, T, 2] first image a row sees, last + 1; equal: none, or padding
    x: Tensor | None = None         # [B, T, D] the hidden states that enter the layer
    gate: Tensor | None = None      # [1] tanh of the gate of its attention
    o_proj: Tensor | None = None    # [D, H·d] what the heads' outputs are multiplied by before the gate


@dataclass
class Sight:
    """Which text rows see an image, in the cheapest form that says it."""
    start: int                      # rows before this one see no image in any batch row, and are left out
    seen: Tensor                    # [B, T - start, 2] the images that each row sees
    rows: Tensor | None             # [B, T - start, 1] True where a row sees an image; None = all of them do

    def mask(self, tokens: ImageTokens | ImageKV) -> Tensor | None:
        """[B, K, T - start, N] True where a row sees a token; None = everywhere."""
        mask = visible(self.seen, tokens)
        if self.rows is not None:       # needs a finite softmax all the same; its result is thrown away
            mask = mask | ~self.rows[:, None]
        return None if mask.all() else mask


def sight(seen: Tensor) -> Sight | None:
    """From the images that each row sees (`visible_images` [B, T, 2]); None where no row sees any."""
    rows = seen[..., 0] < seen[..., 1]                                                  # [B, T]
    if not rows.any():
        return None
    start = int(rows.any(0).int().argmax())
    rows = rows[:, start:, None]
    return Sight(start, seen[:, start:], None if rows.all() else rows)
