"""LlamaVision: the whole network, and what it costs.

    Tiles ── encode ─► ImageTokens ─┐
    token ids ─────────────────────┴─ prefill ─► logits of the next token, Cache ── decode ─► logits ...

`forward` is the same network over whole sequences without a cache: for training, and for checking those two.
Shapes: B batch, T text tokens, N image tokens, D model width, V vocabulary.
"""
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from model.cache import Cache
from model.config import Config
from model.decoder import CrossAttentionLayer, Decoder, LayerHook, SelfAttentionLayer
from model.image_tokens import EncoderStates, ImageTokens, Tiles, visible_images, visible_tokens
from model.sampling import limits_of
from model.vision import VisionEncoder


class LlamaVision(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.vision_model = VisionEncoder(config.vision)
        self.multi_modal_projector = nn.Linear(config.vision.output_dim, config.text.hidden_size)
        self.language_model = Decoder(config.text)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        """Where prompts and images go in."""
        return self.language_model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of all activations and caches, whatever the linear layers store."""
        return self.language_model.embed_tokens.weight.dtype

    def forward(self, input_ids: Tensor, tiles: list[Tiles | None]) -> Tensor:
        """Logits at every position: input_ids [B, T], the images of each sequence -> [B, T, V] fp32.

        Sequences shorter than T are padded on the right with anything that is not an image token. Raises
        ValueError if the image tokens of a sequence and its images differ in number.
        """
        return self.read(input_ids, self.encode(tiles))

    def read(self, input_ids: Tensor, image: ImageTokens | None) -> Tensor:
        """`forward` on images that are encoded already."""
        return self.lm_head(self.hidden(input_ids, image)).float()

    def hidden(self, input_ids: Tensor, image: ImageTokens | None) -> Tensor:
        """The states [B, T, D] that `lm_head` turns into logits: for a loss on some positions only."""
        return self.language_model(input_ids, image, self.visible_images(input_ids, image))

    def encode(self, tiles: list[Tiles | None], keep_states: bool = False) -> ImageTokens | None:
        """The images of each sequence -> their tokens, without padding tiles; None if there is no image.

        With `keep_states` they keep `EncoderStates`.
        """
        grids = [[] if each is None else each.grid.tolist() for each in tiles]
        counts = [len(each) for each in grids]
        if not sum(counts):
            return None
        images = Tiles.cat([each for each in tiles if each is not None])
        features, *states = [side_by_side(each, counts) for each in self._encode_images(images, keep_states)]
        coords = [self._coords(i, *grid) for each in grids for i, grid in enumerate(each)]
        coords = side_by_side(coords, counts, padding=-1).to(features.device)           # [B, N, 4]
        mask = coords[..., 0] >= 0
        return ImageTokens(features, coords, None if mask.all() else mask,
                           EncoderStates(tiles, *states) if keep_states else None)

    def _encode_images(self, tiles: Tiles, keep_states: bool) -> list[list[Tensor]]:
        """Features of every image [n, D], and lists of its other states; equal grids are encoded together."""
        grids = [tuple(grid) for grid in tiles.grid.tolist()]
        outputs: list[list[Tensor]] = [[None] * len(grids) for _ in range(4 if keep_states else 1)]
        for grid in sorted(set(grids)):
            members = [i for i, other in enumerate(grids) if other == grid]
            pixels = tiles.pixels[members].to(self.device, self.dtype)
            states = self.vision_model(pixels, grid)
            projected = self.multi_modal_projector(states[0])
            for output, encoded in zip(outputs, (projected, *states), strict=False):
                for i, image in zip(members, encoded, strict=True):
                    output[i] = image
        return outputs

    def _coords(self, image: int, rows: int, columns: int) -> Tensor:
        """Image, tile, patch row and patch column of the tokens of one image, [n, 4]."""
        side = self.config.vision.patches_per_side
        class_token = [(-1, -1)]
        patches = [(row, column) for row in range(side) for column in range(side)]
        return torch.tensor([(image, tile, *where) for tile in range(rows * columns)
                             for where in class_token + patches])

    def prefill(self, input_ids: Tensor, lengths: list[int], image: ImageTokens | None,
                max_new_tokens: int, pruner: LayerHook | None = None) -> tuple[Tensor, Cache]:
        """Read prompts [B, T]; sequence b has `lengths[b]` tokens and padding on its right.

        Returns the logits after each prompt's last token [B, V] fp32, and a Cache with room for the new
        tokens, which see what the last prompt token sees. `pruner` may drop image tokens at every
        cross-attention layer. Raises ValueError if image tokens and images differ in number.
        """
        device = input_ids.device
        last = torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device) - 1
        seen = self.visible_images(input_ids, image)                                    # [B, T, 2]
        cache = self.language_model.new_cache(lengths, input_ids.shape[1] + max_new_tokens)
        hidden = self.language_model(input_ids, image, seen, cache, pruner)             # [B, T, D]
        cache.see_from(seen[last])
        return self.lm_head(hidden[last]).float(), cache

    def decode(self, tokens: Tensor, cache: Cache) -> Tensor:
        """The logits [B, V] fp32 after one more token of each sequence [B]."""
        return self.lm_head(self.language_model.step(tokens, cache)[:, 0]).float()

    def visible_images(self, input_ids: Tensor, image: ImageTokens | None) -> Tensor:
        """The images that each position sees, [B, T, 2]; ValueError if text and images do not fit."""
        B = len(input_ids)
        images = [0] * B if image is None else (image.coords[..., 0].amax(1) + 1).tolist()
        if len(images) != B:
            raise ValueError(f"{B} sequences of text, but images for {len(images)}: give one list for each")
        named = (input_ids == self.config.image_token_index).sum(1).tolist()
        for b in range(B):
            if named[b] != images[b]:
                raise ValueError(f"sequence {b} has {named[b]} image tokens in its text but {images[b]} "
                                 "images: give one for each")
        return visible_images(input_ids, self.config.image_token_index)

    def check_prompts(self, prompts: list[list[int]], max_new_tokens: int | Sequence[int]):
        """Raise ValueError for prompts that cannot be answered; new tokens are as in `limits_of`."""
        if self.device.type == "meta":
            raise ValueError("the model is on the meta device, which holds no weights: load it elsewhere")
        if not prompts:
            raise ValueError("there is no prompt: give at least one")
        known = self.config.text.embedding_rows
        limits = limits_of(max_new_tokens, len(prompts))
        for b, ids in enumerate(prompts):
            if not ids:
                raise ValueError(f"prompt {b} is empty: give it at least one token")
            for token in ids:
                if type(token) is not int or not 0 <= token < known:
                    raise ValueError(f"prompt {b} holds something else than token ids, whole numbers "
                                     f"from 0 to {known - 1}")
            check_length(len(ids), limits[b], self.config.text.max_position_embeddings)

    def pad_right(self, prompts: list[list[int]]) -> tuple[Tensor, list[int]]:
        """Token ids of several lengths -> [B, T] on the model's device, and the lengths.

        Nothing ever sees the padding; it only must not look like an image.
        """
        lengths = [len(ids) for ids in prompts]
        padding = 1 if self.config.image_token_index == 0 else 0
        padded = [ids + [padding] * (max(lengths) - len(ids)) for ids in prompts]
        return torch.tensor(padded, device=self.device), lengths

    def tokens_seen(self, input_ids: Tensor, lengths: list[int], image: ImageTokens | None) -> list[int]:
        """How many image tokens the last token of each prompt sees, and with it all generated tokens."""
        if image is None:
            return [0] * len(lengths)
        last = torch.tensor(lengths, device=input_ids.device)[:, None, None].expand(-1, 1, 2) - 1
        seen = self.visible_images(input_ids, image).take_along_dim(last, 1)            # [B, 1, 2]
        return visible_tokens(seen, image).sum((1, 2, 3)).tolist()

    # ----- what it costs

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part; their sum is all of them. Weights in 8 or 4 bits are none."""
        decoder = self.language_model
        parts = {"vision": self.vision_model, "projector": self.multi_modal_projector,
                 "embedding": decoder.embed_tokens, "lm_head": self.lm_head, "norm": decoder.norm}
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        for name, kind in ("self_attention", SelfAttentionLayer), ("cross_attention", CrossAttentionLayer):
            layers = (layer for layer in decoder.layers if isinstance(layer, kind))
            counts[name] = sum(p.numel() for layer in layers for p in layer.parameters())
        return counts

    def flops(self, prompt_tokens: int, grids: list[tuple[int, int]], new_tokens: int = 1) -> dict[str, int]:
        """Operations to encode images of these grids of tiles, to read a prompt, and to decode after it.

        One sequence, every prompt token seeing every image. The first new token comes from prefill.
        """
        c = self.config
        N = self.image_tokens(grids)
        projector = 2 * N * c.vision.output_dim * c.text.hidden_size
        image = [N] * len(c.text.cross_attention_layers) if N else []
        steps = range(prompt_tokens, prompt_tokens + new_tokens - 1)
        return {"encode": sum(self.vision_model.flops(grid) for grid in grids) + projector,
                "prefill": self.decoder_flops(prompt_tokens, 0, image, image),
                "decode": sum(self.decoder_flops(1, past, image, []) for past in steps)}

    def decoder_flops(self, tokens: int, past: int, attended: list[int], projected: list[int]) -> int:
        """Operations of the decoder and the logits of one token, as `Decoder.flops` counts them: also where a
        pruner leaves each cross-attention layer fewer image tokens. Its own work is not among them."""
        head = 2 * self.config.text.hidden_size * self.config.text.vocab_size
        return self.language_model.flops(tokens, past, attended, projected) + head

    def kv_bytes(self, tokens: int, grids: list[tuple[int, int]]) -> dict[str, int]:
        """Bytes that the caches of one sequence take: for `tokens` text tokens, and images of these grids.

        Room for text comes in whole buckets: `rounded_up(tokens)` of them is what is allocated.
        """
        c = self.config.text
        cross = len(c.cross_attention_layers)
        each = 2 * c.num_key_value_heads * c.head_dim * self.dtype.itemsize
        return {"text": (c.num_hidden_layers - cross) * tokens * each,
                "image": cross * self.image_tokens(grids) * each}

    def image_tokens(self, grids: list[tuple[int, int]]) -> int:
        """Real image tokens of images of these grids."""
        return sum(rows * columns for rows, columns in grids) * self.config.vision.tokens_per_tile


def side_by_side(images: list[Tensor], counts: list[int], padding: float = 0) -> Tensor:
    """States of single images [n, width] -> of the images of each sequence, `counts[b]` of them one after the
    other, padded to the longest: [B, N, width]."""
    sequences = []
    first = 0
    for count in counts:
        own = images[first:first + count]
        sequences.append(torch.cat(own) if own else images[0][:0])
        first += count
    return pad_sequence(sequences, batch_first=True, padding_value=padding)


def check_length(prompt_tokens: int, max_new_tokens: int, max_position_embeddings: int):
    """Raise ValueError if a prompt and the new tokens asked for do not fit into the model's context."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, but must be at least 1")
    total = prompt_tokens + max_new_tokens
    if total > max_position_embeddings:
        raise ValueError(f"{prompt_tokens} prompt tokens and {max_new_tokens} new ones make {total}, but the "
                         f"context holds {max_position_embeddings}: shorten the prompt or ask for fewer")
