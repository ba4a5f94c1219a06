"""The images between the encoder and the decoder: their tiles, their tokens, their keys and values.

    Tiles ── vision.py ─► ImageTokens ── a cross-attention layer ─► ImageKV ── a pruner ─► fewer of them

Image keys carry no position, so dropping a token is exactly masking it: `take` drops, and attention over the
smaller set is the same as attention over all tokens with the others masked. Sequences that keep fewer tokens
than the longest one are padded and masked. B batch, T text tokens, I images, N image tokens, H query heads,
G key/value heads, K = 1 or G (one set of tokens for all heads, or one for each key/value head), d head width.
"""
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Grid = tuple[int, int]                          # rows, columns of tiles


@dataclass
class Tiles:
    """Preprocessed images, each cut into up to S tiles of the same size."""
    pixels: Tensor                              # [I, S, 3, height, width]; 0.0 in the slots without a tile
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
        """One Tiles with all the images of several, in order."""
        return Tiles(torch.cat([p.pixels for p in parts]), torch.cat([p.grid for p in parts]))


@dataclass
class EncoderStates:
    """What the vision encoder computed on the way to the image tokens: kept only for pruners that need it."""
    tiles: list[Tiles | None]                   # of each sequence, as the encoder read them
    features: Tensor                            # [B, N, F] what the projector reads: final state, then taps
    entering: Tensor                            # [B, N, E] input of the last global layer
    attended: Tensor                            # [B, N, E] input of that layer's MLP: after attention, normed

    def select(self, sequences: list[int]) -> "EncoderStates":
        return EncoderStates([self.tiles[b] for b in sequences], self.features[sequences],
                             self.entering[sequences], self.attended[sequences])

    def join(self, later: "EncoderStates") -> "EncoderStates":
        return EncoderStates([Tiles.cat([a, b]) for a, b in zip(self.tiles, later.tiles, strict=True)],
                             torch.cat((self.features, later.features), 1),
                             torch.cat((self.entering, later.entering), 1),
                             torch.cat((self.attended, later.attended), 1))

    def expand(self, batch: int) -> "EncoderStates":
        return EncoderStates(self.tiles * batch, self.features.expand(batch, -1, -1),
                             self.entering.expand(batch, -1, -1), self.attended.expand(batch, -1, -1))


@dataclass
class ImageTokens:
    """The encoded images of each sequence, without padding tiles."""
    features: Tensor                            # [B, N, D] after the projector; zeros where there is no token
    coords: Tensor                              # [B, N, 4] image, tile, patch row, patch column; the class
    #                                             token of a tile has patch row and column -1
    mask: Tensor | None = None                  # [B, N] True where there is a token; None: everywhere
    states: EncoderStates | None = None         # of the tokens as they were encoded, where asked for
    bias: Tensor | None = None                  # [B, N] fp32, added to the scores in every layer; None: 0

    def select(self, sequences: list[int]) -> "ImageTokens | None":
        """The images of some sequences, in this order; [0, 0] gives one image to two prompts. None if these
        sequences have no image."""
        coords = self.coords[sequences]
        if not (coords[..., 0] >= 0).any():
            return None
        return ImageTokens(self.features[sequences], coords,
                           None if self.mask is None else self.mask[sequences],
                           None if self.states is None else self.states.select(sequences),
                           None if self.bias is None else self.bias[sequences])

    def expand(self, batch: int) -> "ImageTokens":
        """The same images for every sequence of a batch, without a copy."""
        return ImageTokens(self.features.expand(batch, -1, -1), self.coords.expand(batch, -1, -1),
                           None if self.mask is None else self.mask.expand(batch, -1),
                           None if self.states is None else self.states.expand(batch),
                           None if self.bias is None else self.bias.expand(batch, -1))

    def join(self, later: "ImageTokens") -> "ImageTokens":
        """These images and after them the `later` ones, of sequences that all have both, without padding, as
        the encoder leaves them. The result is that of encoding all at once, with states if both have them."""
        first = self.coords[..., :1].amax(1, keepdim=True) + 1                          # [B, 1, 1]
        moved = torch.cat((later.coords[..., :1] + first, later.coords[..., 1:]), -1)
        states = None
        if self.states is not None and later.states is not None:
            states = self.states.join(later.states)
        return ImageTokens(torch.cat((self.features, later.features), 1), torch.cat((self.coords, moved), 1),
                           states=states)

    def take(self, kept: Tensor) -> "ImageTokens":
        """The tokens where `kept` [B, N] is True, in their order; the object itself if that is all of them.

        Raises ValueError if an image would lose all its tokens.
        """
        kept = without_padding(self, kept)
        if kept.all():
            return self
        order, mask = kept_indices(kept)                                                # [B, n]
        sequence = torch.arange(len(order), device=order.device)[:, None]               # [B, 1]
        return ImageTokens(self.features[sequence, order], self.coords[sequence, order], mask,
                           bias=None if self.bias is None else self.bias[sequence, order])


@dataclass
class ImageKV:
    """Image keys and values of one cross-attention layer, one per key/value head, never repeated."""
    key: Tensor                                 # [B, G, N, d] normalised
    value: Tensor                               # [B, G, N, d]
    coords: Tensor                              # [B, K, N, 4] as in ImageTokens
    mask: Tensor | None = None                  # [B, K, N] True where there is a token; None: everywhere
    bias: Tensor | None = None                  # [B, K, N] fp32, added to the scores; None: 0

    def take(self, kept: Tensor) -> "ImageKV":
        """The tokens where `kept` is True, in their order; the object itself if that is all of them.

        `kept` is [B, N], or [B, K, N] for a set of its own in every key/value head. Raises ValueError if an
        image would lose all its tokens.
        """
        kept = without_padding(self, kept if kept.ndim == 3 else kept[:, None])         # [B, K, N]
        if kept.all():
            return self
        order, mask = kept_indices(kept)                                                # [B, K, n]
        sets = order.shape[1]
        sequence = torch.arange(len(order), device=order.device)[:, None, None]         # [B, 1, 1]
        head = torch.arange(self.key.shape[1], device=order.device)[:, None]            # [G, 1]
        coords = self.coords.expand(-1, sets, -1, -1).take_along_dim(order[..., None], 2)
        bias = None if self.bias is None else self.bias.expand(-1, sets, -1).take_along_dim(order, 2)
        return ImageKV(self.key[sequence, head, order], self.value[sequence, head, order], coords, mask, bias)

    def sequence(self, b: int) -> "ImageKV":
        """Those of one sequence, as a batch of one."""
        mask, bias = (None if each is None else each[b:b + 1] for each in (self.mask, self.bias))
        return ImageKV(self.key[b:b + 1], self.value[b:b + 1], self.coords[b:b + 1], mask, bias)

    def decode_mask(self) -> Tensor | None:
        """[B, K, 1, N] for the one query position of a decode step: where it may look (bool), or what is
        added to its scores if there is a bias."""
        mask = None if self.mask is None else self.mask[:, :, None]
        return mask if self.bias is None else biased(mask, self)

    def counts(self) -> Tensor:
        """Tokens of each sequence, [B] fp32; a mean over key/value heads."""
        B, _, N, _ = self.key.shape
        return torch.full((B,), float(N)) if self.mask is None else self.mask.sum(-1).float().mean(-1)

    def seen_from(self, seen: Tensor) -> "ImageKV":
        """The same with only those tokens unmasked that one query position of each sequence sees: `seen`
        [B, 2] as in `visible_images`."""
        mask = visible_tokens(seen[:, None], self)[:, :, 0]                             # [B, K, N]
        return self if mask.all() else replace(self, mask=mask)

    def compact(self, sees_image: Tensor | None) -> "ImageKV":
        """Without the tokens that are masked in every sequence.

        Sequences where `sees_image` [B, 1, 1] is False get no mask: their softmax has to be finite, though
        its result is not used.
        """
        if self.mask is None:
            return self
        kv = self.take(self.mask)
        mask = kv.mask if sees_image is None or kv.mask is None else kv.mask | ~sees_image.to(kv.mask.device)
        return replace(kv, mask=None if mask is None or mask.all() else mask)


@dataclass
class Queries:
    """What the text asks of the images at one cross-attention layer, for pruners."""
    q: Tensor                                   # [B, H, T, d] normalised, not yet scaled by d ** -0.5
    seen: Tensor                                # [B, T, 2] images that each position sees, as a range of
    #                                             first, last + 1; empty for text without an image and padding
    x: Tensor | None = None                     # [B, T, D] hidden states that enter the layer
    text_q: Tensor | None = None                # [B, H, T, d] rotated queries and ...
    text_k: Tensor | None = None                # [B, G, T, d] ... keys of the self-attention layer before it


def kv_bytes(image_kv: list[ImageKV]) -> int:
    """Bytes of keys and values; a tensor that several layers share counts once."""
    tensors = [tensor for kv in image_kv for tensor in (kv.key, kv.value)]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


# ----- which query positions see which images, and which tokens


def visible_images(input_ids: Tensor, image_token_index: int) -> Tensor:
    """The range of images that each position of the text sees, [B, T] -> [B, T, 2] = first, last + 1.

    A position sees the latest image before it (an `<|image|>` token sees its own) together with the images
    directly in front of that one: consecutive images are one group. The range is empty before the first
    image. Source: Meta's `chat_format.py`, `create_vision_mask`.
    """
    is_image = input_ids == image_token_index                                           # [B, T]
    stop = is_image.cumsum(1)
    previous = torch.nn.functional.pad(is_image, (1, -1))
    opens = is_image & ~previous                                    # the first image of each group
    start = torch.where(opens, stop - 1, 0).cummax(1).values
    return torch.stack((start, stop), dim=-1)


def visible_tokens(seen: Tensor, tokens: ImageTokens | ImageKV) -> Tensor:
    """Which query positions see which tokens: `seen` [B, T, 2] -> [B, K, T, N]; K = 1 for ImageTokens."""
    image = tokens.coords[..., 0]
    mask = tokens.mask
    if isinstance(tokens, ImageTokens):
        image = image[:, None]
        mask = None if mask is None else mask[:, None]
    image = image[:, :, None]                                                           # [B, K, 1, N]
    seen = seen.to(tokens.coords.device)
    first = seen[:, None, :, :1]                                                        # [B, 1, T, 1]
    stop = seen[:, None, :, 1:]
    inside = (image >= first) & (image < stop)                                          # [B, K, T, N]
    return inside if mask is None else inside & mask[:, :, None]


def attention_mask(seen: Tensor, kv: ImageKV) -> Tensor | None:
    """[B, K, T, N] True where a query position attends to a token; None if all of them attend to all. If
    there is a bias, what is added to the scores: T is 1 where it is the same for all positions.

    Positions that see no image get no mask: their softmax has to be finite, though its result is not used.
    """
    seen = seen.to(kv.coords.device)
    sees_image = seen[..., 0] < seen[..., 1]                                            # [B, T]
    mask = visible_tokens(seen, kv) | ~sees_image[:, None, :, None]
    mask = None if mask.all() else mask
    return mask if kv.bias is None else biased(mask, kv)


def biased(mask: Tensor | None, kv: ImageKV) -> Tensor:
    """A mask [B, K, T, N] as something to add to the scores: the bias of a token, or -inf where the mask is
    False."""
    bias = kv.bias[:, :, None].to(kv.key.dtype)                                         # [B, K, 1, N]
    return bias if mask is None else torch.where(mask, bias, -torch.inf)


# ----- dropping


def each_image(tokens: ImageTokens | ImageKV) -> Iterator[Tensor]:
    """For one image after the other, where its tokens are: [B, N], or [B, K, N], without padding."""
    image = tokens.coords[..., 0]
    for i in range(int(image.max()) + 1):
        yield image == i if tokens.mask is None else (image == i) & tokens.mask


def without_padding(tokens: ImageTokens | ImageKV, kept: Tensor) -> Tensor:
    """`kept` without the padding. Raises ValueError if an image would lose all its tokens."""
    kept = kept if tokens.mask is None else kept & tokens.mask
    for i, there in enumerate(each_image(tokens)):
        lost = there.any(-1) & ~(there & kept).any(-1)
        if lost.any():
            raise ValueError(f"the pruner keeps no token of image {i} in sequence "
                             f"{int(lost.nonzero()[0, 0])}: keep at least one of every image")
    return kept


def kept_indices(kept: Tensor) -> tuple[Tensor, Tensor | None]:
    """kept [..., N] -> the indices of its tokens [..., n], ascending, and a mask if some sets have fewer.

    Padding repeats a kept token: a dropped one may hold anything, and nothing may depend on it.
    """
    counts = kept.sum(-1, keepdim=True)
    order = kept.int().argsort(dim=-1, descending=True, stable=True)[..., :int(counts.max())]
    mask = torch.arange(order.shape[-1], device=kept.device) < counts
    return torch.where(mask, order, order[..., :1]), None if mask.all() else mask
