"""LlamaVision: the whole network, and what it costs.

    Tiles ── encode ─► ImageTokens ─┐
    token ids ─────────────────────┴─ prefill ─► logits of the next token, Cache ── decode ─► logits ...

`forward` is the same network over whole sequences without a cache: for training, and for checking those two.
Shapes: B batch, T text tokens, N image tokens, D model width, V vocabulary.
"""
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from model.cache import Cache
from model.config import Config
from model.decoder import CrossAttentionLayer, Decoder, Moments, SelfAttentionLayer
from model.image_tokens import ImageTokens, Tiles, Vision, visible, visible_images
from model.vision import VisionEncoder


class LlamaVision(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.vision_model = VisionEncoder(config.vision)
        self.multi_modal_projector = nn.Linear(config.vision.output_dim, config.text.hidden_size)
        self.language_model = Decoder(config.text)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)

    def forward(self, input_ids: Tensor, tiles: list[Tiles | None]) -> Tensor:
        """Logits at every position: input_ids [B, T], the images of each row -> [B, T, V] fp32.

        Rows shorter than T are padded on the right with anything that is not an image token. Raises
        ValueError where a row's image tokens and images differ in number.
        """
        return self.read(input_ids, self.encode(tiles))

    def read(self, input_ids: Tensor, image: ImageTokens | None) -> Tensor:
        """`forward` on images that are encoded already."""
        return self.lm_head(self.hidden(input_ids, image)).float()

    def hidden(self, input_ids: Tensor, image: ImageTokens | None) -> Tensor:
        """The states [B, T, D] that `lm_head` turns into logits: for a loss on some positions only."""
        return self.language_model(input_ids, image, self._seen(input_ids, image))

    def encode(self, tiles: list[Tiles | None], vision: bool = False) -> ImageTokens | None:
        """The images of each batch row -> their tokens, real tiles only; None where no row has an image.

        With `vision`, what the encoder knows of them is kept as well.
        """
        held = [row for row in tiles if row is not None]
        if not sum(map(len, held)):
            return None
        pictures = self._encode_images(Tiles.cat(held), vision)                   # states of each
        rest, rows, coords_of = iter(pictures), [], []
        for grids in ([] if row is None else row.grid.tolist() for row in tiles):
            states = zip(*islice(rest, len(grids)), strict=True) if grids else ([s[:0]] for s in pictures[0])
            rows.append([torch.cat(list(state)) for state in states])               # [tokens of the row, ...]
            coords = [(image, *where) for image, grid in enumerate(grids) for where in self._places(*grid)]
            coords_of.append(torch.tensor(coords, dtype=torch.long).view(-1, 4))
        lengths = torch.tensor([len(coords) for coords in coords_of])
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).to(pictures[0][0].device)
        features, *states = (pad_sequence(state, batch_first=True) for state in zip(*rows, strict=True))
        return ImageTokens(features,
                           pad_sequence(coords_of, batch_first=True, padding_value=-1).to(mask.device),
                           None if mask.all() else mask, Vision(tiles, *states) if vision else None)

    def _encode_images(self, tiles: Tiles, vision: bool) -> list[tuple[Tensor, ...]]:
        """Encode and project pictures, those with equal grids together; each -> [tokens, D]; with `vision`
        also what the encoder knows of them."""
        weight, grids = self.multi_modal_projector.weight, [tuple(grid) for grid in tiles.grid.tolist()]
        states = [()] * len(grids)
        for grid in sorted(set(grids)):
            members = [i for i, other in enumerate(grids) if other == grid]
            pixels = tiles.pixels[members].to(weight.device, weight.dtype)
            encoded = self.vision_model.states(pixels, grid)
            projected = self.multi_modal_projector(encoded[0])
            for i, *each in zip(members, projected, *(encoded if vision else ()), strict=True):
                states[i] = tuple(each)
        return states

    def _places(self, rows: int, columns: int) -> list[tuple[int, int, int]]:
        side = self.config.vision.patches_per_side
        tile = [(-1, -1)] + [(r, c) for r in range(side) for c in range(side)]
        return [(t, *where) for t in range(rows * columns) for where in tile]

    def prefill(self, input_ids: Tensor, lengths: list[int], image: ImageTokens | None,
                max_new_tokens: int, pruner: Moments | None = None) -> tuple[Tensor, Cache]:
        """Read prompts [B, T], row b holding `lengths[b]` tokens and padding on its right.

        Returns the logits after each prompt's last token [B, V], and a Cache with room for the new tokens.
        `pruner` may drop image tokens at every cross-attention layer, and once more when all is read.
        """
        device = input_ids.device
        last = torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device) - 1
        seen = self._seen(input_ids, image)
        cache = self.language_model.new_cache(lengths, input_ids.shape[1] + max_new_tokens)
        hidden = self.language_model(input_ids, image, seen, cache, pruner)
        if cache.images:
            self._keep_what_is_seen(cache, seen[last], pruner)
            if pruner is not None:
                cache.hold_texts(pruner.text_cache(-1, cache.texts()))
        return self.lm_head(hidden[last]).float(), cache

    def question(self, input_ids: Tensor, lengths: list[int]) -> Tensor:
        """What the text alone comes to: the prompts of `prefill` without their image tokens -> the states of
        their last tokens, after the last norm, [B, D]."""
        words = [ids[:length][ids[:length] != self.config.image_token_index]
                 for ids, length in zip(input_ids, lengths, strict=True)]
        padded, last = pad_sequence(words, batch_first=True), [len(ids) - 1 for ids in words]
        return self.language_model(padded, None, None)[torch.arange(len(words)), last]

    def decode(self, tokens: Tensor, cache: Cache) -> Tensor:
        """The logits [B, V] after one more token of each row [B]."""
        return self.lm_head(self.language_model.step(tokens, cache)[:, 0]).float()

    def _seen(self, input_ids: Tensor, image: ImageTokens | None) -> Tensor:
        """`visible_images`; ValueError where text and images do not fit together."""
        held = [0] * len(input_ids) if image is None else (image.coords[..., 0].amax(1) + 1).tolist()
        if len(held) != len(input_ids):
            raise ValueError(f"{len(input_ids)} rows of text, but images for {len(held)}: None if without")
        named = (input_ids == self.config.image_token_index).sum(1).tolist()
        for row, (tokens, images) in enumerate(zip(named, held, strict=True)):
            if tokens != images:
                raise ValueError(f"row {row} has {tokens} image tokens in its text but {images} images; "
                                 "give one for each")
        return visible_images(input_ids, self.config.image_token_index)

    def tokens_seen(self, input_ids: Tensor, lengths: list[int], image: ImageTokens) -> list[int]:
        """How many image tokens the last token of each prompt sees, and with it all that is generated."""
        last = torch.tensor(lengths, device=input_ids.device)[:, None, None].expand(-1, 1, 2) - 1
        seen = self._seen(input_ids, image).take_along_dim(last, 1)                       # [B, 1, 2]
        return visible(seen, image).sum((1, 2, 3)).tolist()

    def _keep_what_is_seen(self, cache: Cache, seen: Tensor, pruner: Moments | None):
        """Generated tokens see what the last prompt token saw [B, 2]; the rest is let go, without a loss."""
        sees = seen[:, 0] < seen[:, 1]                                                    # [B]
        cache.rows = None if sees.all() else sees[:, None, None]
        kvs = [kv.seen_by(seen) for kv in cache.images] if sees.any() else []
        cache.hold(pruner.prefilled(kvs) if pruner is not None and kvs else kvs)

    # ----- what it costs

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part; the parts add up to the whole."""
        decoder = self.language_model
        parts = {"vision": self.vision_model, "projector": self.multi_modal_projector,
                 "embedding": decoder.embed_tokens, "lm_head": self.lm_head, "norm": decoder.norm}
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        for name, kind in ("self_attention", SelfAttentionLayer), ("cross_attention", CrossAttentionLayer):
            layers = (layer for layer in decoder.layers if isinstance(layer, kind))
            counts[name] = sum(p.numel() for layer in layers for p in layer.parameters())
        return counts

    def flops(self, prompt_tokens: int, grids: list[tuple[int, int]], new_tokens: int = 1) -> dict[str, int]:
        """Operations to encode pictures of these grids of tiles, to read a prompt, and to decode after it.

        One row, every prompt token seeing every picture. The first new token comes from prefill.
        """
        c, N = self.config, self.image_tokens(grids)
        head, decoder = 2 * c.text.hidden_size * c.text.vocab_size, self.language_model
        projector = 2 * N * c.vision.output_dim * c.text.hidden_size
        steps = range(prompt_tokens, prompt_tokens + new_tokens - 1)
        return {"encode": sum(self.vision_model.flops(grid) for grid in grids) + projector,
                "prefill": decoder.flops(prompt_tokens, 0, N, project_image=True) + head,
                "decode": sum(decoder.flops(1, past, N, project_image=False) + head for past in steps)}

    def kv_bytes(self, tokens: int, grids: list[tuple[int, int]]) -> dict[str, int]:
        """Bytes that the caches of one row take: for `tokens` text tokens, and for pictures of these grids.

        Room for text comes in whole buckets: `rounded_up(tokens)` of them is what is allocated.
        """
        c, cross = self.config.text, len(self.config.text.cross_attention_layers)
        each = 2 * c.num_key_value_heads * c.head_dim * self.lm_head.weight.element_size()
        return {"text": (c.num_hidden_layers - cross) * tokens * each,
                "image": cross * self.image_tokens(grids) * each}

    def image_tokens(self, grids: list[tuple[int, int]]) -> int:
        """Real image tokens of pictures of these grids."""
        return sum(rows * columns for rows, columns in grids) * self.config.vision.tokens_per_tile
