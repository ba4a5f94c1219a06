"""The language model: Llama 3.1 layers, and between them gated cross-attention layers that look at the image.

A cross-attention layer makes its keys and values from the ImageTokens that the encoder left, layer by layer
during prefill, and keeps them for decoding as ImageKV. Image keys carry no position: dropping one is exactly
masking it. Text rows that see no image (everything before the first one) skip these layers exactly.
B batch, T text tokens, N image tokens, H query heads, G key/value heads, d head width, D model width.
"""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import EXTRA_EMBEDDINGS, TextConfig
from model.layers import RMSNorm, SwiGLU, attend, rotary_angles, rotate, split_heads


@dataclass
class ImageTokens:
    """What the encoder leaves of the images of each batch row: real tiles only."""
    features: Tensor                # [B, N, D] after the projector; zeros where a row has fewer
    place: Tensor                   # [B, N, 4] image, tile, row, column; a class token has row and column -1
    mask: Tensor | None = None      # [B, N] True where there is a token; None = everywhere

    def expand(self, batch: int) -> "ImageTokens":
        """The same image for every row of a batch, without a copy."""
        mask = None if self.mask is None else self.mask.expand(batch, -1)
        return ImageTokens(self.features.expand(batch, -1, -1), self.place.expand(batch, -1, -1), mask)


@dataclass
class ImageKV:
    """Keys and values of one cross-attention layer, one per key/value head, never repeated."""
    key: Tensor                     # [B, G, N, d]
    value: Tensor                   # [B, G, N, d]

    def take(self, columns: Tensor) -> "ImageKV":
        """The image tokens where `columns` [N] is True."""
        return ImageKV(self.key[:, :, columns], self.value[:, :, columns])


@dataclass
class Sight:
    """Which text rows see which image tokens, in the cheapest form that says it."""
    start: int                      # rows before this one see no image in any batch row, and are left out
    rows: Tensor | None             # [B, T - start, 1] True where a row sees an image; None = all of them do
    mask: Tensor | None             # [B, 1, T - start, N] True where a row sees a token; None = everywhere


def sight(seen: Tensor, image: ImageTokens) -> Sight | None:
    """From the images that each row sees (`visible_images` [B, T, 2]); None where no row sees any."""
    which = image.place[:, None, :, 0]                                              # [B, 1, N]
    mask = (which >= seen[..., :1]) & (which < seen[..., 1:])                       # [B, T, N]
    if image.mask is not None:
        mask = mask & image.mask[:, None]
    rows = mask.any(-1)                                                             # [B, T]
    if not rows.any():
        return None
    start = int(rows.any(0).int().argmax())
    rows, mask = rows[:, start:, None], mask[:, start:]
    mask = mask | ~rows            # a row that sees nothing needs a finite softmax; its result is thrown away
    return Sight(start, None if rows.all() else rows, None if mask.all() else mask[:, None])


@dataclass
class Cache:
    """What decoding needs of everything before it."""
    keys: list[Tensor]              # per self-attention layer [B, G, capacity, d], allocated once
    values: list[Tensor]
    lengths: list[int]              # tokens held for each batch row; they differ where prompts do
    images: list[ImageKV]           # per cross-attention layer
    sight: Sight | None = None      # what generated tokens see: what the last prompt token saw

    def text_bytes(self) -> int:
        return sum(t.nbytes for t in self.keys + self.values)

    def image_bytes(self) -> int:
        return sum(kv.key.nbytes + kv.value.nbytes for kv in self.images)


class Decoder(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size + EXTRA_EMBEDDINGS, config.hidden_size)
        self.layers = nn.ModuleList(
            CrossAttentionLayer(config) if i in config.cross_attention_layers else SelfAttentionLayer(config)
            for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def cross_layers(self) -> list["CrossAttentionLayer"]:
        """The layers that look at the image, by their ordinal."""
        return [layer for layer in self.layers if isinstance(layer, CrossAttentionLayer)]

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """Room for `capacity` tokens in each of `batch` rows."""
        c, like = self.config, self.norm.weight
        shape = batch, c.num_key_value_heads, capacity, c.head_dim
        depth = sum(isinstance(layer, SelfAttentionLayer) for layer in self.layers)
        keys, values = ([like.new_zeros(shape) for _ in range(depth)] for _ in range(2))
        return Cache(keys, values, lengths=[0] * batch, images=[])

    def forward(self, input_ids: Tensor, image: ImageTokens | None, seeing: Sight | None,
                cache: Cache | None = None) -> Tensor:
        """A whole sequence [B, T] -> hidden states [B, T, D] after the last norm; fills `cache` where one
        is given.

        Shorter rows are padded on the right: what stands there is never seen by the tokens before it.
        """
        x = self.embed_tokens(input_ids)
        positions = torch.arange(x.shape[1], device=x.device)[None]
        angles = rotary_angles(positions, self.config)
        depth = 0
        for layer in self.layers:
            if isinstance(layer, CrossAttentionLayer):
                if seeing is None:
                    continue
                kv = layer.cross_attn.keys_values(image.features)
                x = layer(x, kv, seeing)
                if cache is not None:
                    cache.images.append(kv)
            else:
                x, k, v = layer(x, angles)
                if cache is not None:
                    cache.keys[depth][:, :, :k.shape[2]] = k
                    cache.values[depth][:, :, :v.shape[2]] = v
                depth += 1
        return self.norm(x)

    def step(self, tokens: Tensor, cache: Cache) -> Tensor:
        """One more token for each row [B] -> hidden states [B, 1, D]; `cache` grows by one."""
        x = self.embed_tokens(tokens[:, None])
        positions = torch.tensor(cache.lengths, device=x.device)
        angles = rotary_angles(positions[:, None], self.config)
        past = Past(positions, max(cache.lengths) + 1, ragged=len(set(cache.lengths)) > 1)
        texts, images = iter(zip(cache.keys, cache.values, strict=True)), iter(cache.images)
        for layer in self.layers:
            if isinstance(layer, SelfAttentionLayer):
                x = layer.step(x, angles, *next(texts), past)
            elif cache.sight is not None:
                x = layer(x, next(images), cache.sight)
        cache.lengths = [n + 1 for n in cache.lengths]
        return self.norm(x)

    def flops(self, tokens: int, past: int, image_tokens: int, project_image: bool) -> int:
        """Floating-point operations for `tokens` new tokens after `past` ones, two for a multiply-add.

        All of them count as seeing the image; `project_image` adds making its keys and values (prefill).
        Norms, activations and the output head are left out.
        """
        c, cross = self.config, len(self.config.cross_attention_layers)
        kv_width = c.num_key_value_heads * c.head_dim
        q_o_and_mlp = tokens * (4 * c.hidden_size ** 2 + 6 * c.hidden_size * c.intermediate_size)
        pairs = tokens * past + tokens * (tokens + 1) // 2                          # causal
        text = q_o_and_mlp + tokens * 4 * c.hidden_size * kv_width + 4 * c.hidden_size * pairs
        image = q_o_and_mlp + 4 * c.hidden_size * tokens * image_tokens
        if project_image:
            image += image_tokens * 4 * c.hidden_size * kv_width
        return (c.num_hidden_layers - cross) * text + (cross * image if image_tokens else 0)


class Past:
    """Where the new token of each row goes in the text cache, and what it sees there."""

    def __init__(self, positions: Tensor, longest: int, ragged: bool):
        self.longest = longest
        self.slots = torch.arange(len(positions), device=positions.device), positions
        seen = torch.arange(longest, device=positions.device) <= positions[:, None]
        self.mask = seen[:, None, None] if ragged else None                         # [B, 1, 1, longest]


class SelfAttentionLayer(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = SelfAttention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = SwiGLU(c)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Causal over x [B, T, D]; returns the new x and its keys and values [B, G, T, d]."""
        q, k, v = self.self_attn.project(self.input_layernorm(x), angles)
        x = x + self.self_attn.o_proj(attend(q, k, v, causal=True))
        return x + self.mlp(self.post_attention_layernorm(x)), k, v

    def step(self, x: Tensor, angles: tuple[Tensor, Tensor], keys: Tensor, values: Tensor,
             past: Past) -> Tensor:
        """One token x [B, 1, D] over the cache, which it enters first."""
        q, k, v = self.self_attn.project(self.input_layernorm(x), angles)
        row, slot = past.slots
        keys[row, :, slot], values[row, :, slot] = k[:, :, 0], v[:, :, 0]
        h = attend(q, keys[:, :, :past.longest], values[:, :, :past.longest], past.mask)
        x = x + self.self_attn.o_proj(h)
        return x + self.mlp(self.post_attention_layernorm(x))


class Projections(nn.Module):
    """Into queries of every head, keys and values of the fewer key/value heads, and back."""

    def __init__(self, c: TextConfig):
        super().__init__()
        self.heads, self.kv_heads = c.num_attention_heads, c.num_key_value_heads
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)


class SelfAttention(Projections):
    def project(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        q = rotate(split_heads(self.q_proj(x), self.heads), angles)
        k = rotate(split_heads(self.k_proj(x), self.kv_heads), angles)
        return q, k, split_heads(self.v_proj(x), self.kv_heads)


class CrossAttentionLayer(nn.Module):
    """Text looks at the image. Attention and MLP are each scaled by the tanh of a learned scalar."""

    def __init__(self, c: TextConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.cross_attn = CrossAttention(c)
        self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1))
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = SwiGLU(c)
        self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, kv: ImageKV, seeing: Sight) -> Tensor:
        """Rows of x [B, T, D] that see no image come back unchanged."""
        blind, x = x[:, :seeing.start], x[:, seeing.start:]
        h = self.cross_attn(self.input_layernorm(x), kv, seeing.mask)
        x = x + self.cross_attn_attn_gate.tanh() * (h if seeing.rows is None else h * seeing.rows)
        h = self.mlp(self.post_attention_layernorm(x))
        x = x + self.cross_attn_mlp_gate.tanh() * (h if seeing.rows is None else h * seeing.rows)
        return torch.cat((blind, x), dim=1) if seeing.start else x


class CrossAttention(Projections):
    """Queries from text, keys and values from the image; both normalised per head, without a position."""

    def __init__(self, c: TextConfig):
        super().__init__(c)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)

    def keys_values(self, features: Tensor) -> ImageKV:
        """[B, N, D] -> keys and values [B, G, N, d]."""
        key = self.k_norm(split_heads(self.k_proj(features), self.kv_heads))
        return ImageKV(key, split_heads(self.v_proj(features), self.kv_heads))

    def forward(self, x: Tensor, kv: ImageKV, mask: Tensor | None) -> Tensor:
        q = self.q_norm(split_heads(self.q_proj(x), self.heads))
        return self.o_proj(attend(q, kv.key, kv.value, mask))
