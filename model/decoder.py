"""The language model: Llama 3.1 layers, and between them gated cross-attention layers that look at the image.

A cross-attention layer makes its keys and values from the ImageTokens that the encoder left, layer by layer
during prefill, and keeps them for decoding as ImageKV. Image keys carry no position: dropping one is exactly
masking it. Text rows that see no image (everything before the first one) skip these layers exactly.
B batch, T text tokens, N image tokens, H query heads, G key/value heads, d head width, D model width.
"""
from typing import Protocol

import torch
from torch import Tensor, nn

from model.cache import Cache, TextKV, rounded_up
from model.config import EXTRA_EMBEDDINGS, TextConfig
from model.image_tokens import ImageKV, ImageTokens, Queries, Sight, sight
from model.layers import RMSNorm, SwiGLU, attend, rotary_angles, rotary_frequencies, rotate, split_heads


class Moments(Protocol):
    """What reading a prompt calls of a pruner: the second and third of the hooks in `pruning/pruner.py`."""

    def text_layer(self, i: int, q: Tensor, key: Tensor, lengths: Tensor) -> None: ...

    def layer(self, i: int, queries: Queries, image: ImageTokens,
              kv: ImageKV) -> tuple[ImageTokens, ImageKV]: ...

    def prefilled(self, kvs: list[ImageKV]) -> list[ImageKV]: ...

    def text_cache(self, step: int, texts: list[TextKV]) -> list[TextKV]: ...


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

    def new_cache(self, lengths: list[int], capacity: int) -> Cache:
        """Room for `capacity` tokens in each row, for prompts of these lengths."""
        c, like = self.config, self.norm.weight
        shape = len(lengths), c.num_key_value_heads, rounded_up(capacity), c.head_dim
        depth = sum(isinstance(layer, SelfAttentionLayer) for layer in self.layers)
        keys, values = ([like.new_zeros(shape) for _ in range(depth)] for _ in range(2))
        positions = torch.tensor(lengths, device=like.device)
        return Cache(keys, values, positions, positions.clone(), rotary_frequencies(c, like.device))

    def forward(self, input_ids: Tensor, image: ImageTokens | None, seen: Tensor | None,
                cache: Cache | None = None, pruner: Moments | None = None) -> Tensor:
        """A whole sequence [B, T] -> hidden states [B, T, D] after the last norm; fills `cache` where one
        is given. `seen` [B, T, 2] are the images that each row sees, if any; `pruner` needs a cache.

        Shorter rows are padded on the right: what stands there is never seen by the tokens before it.
        """
        x = self.embed_tokens(input_ids)
        positions = torch.arange(x.shape[1], device=x.device)[None]
        angles = rotary_angles(positions, rotary_frequencies(self.config, x.device))
        seeing = None if image is None else sight(seen)
        gaze = None if seeing is None else Gaze(seeing, image, cache, pruner)
        depth = 0
        for layer in self.layers:
            if isinstance(layer, SelfAttentionLayer):
                x, q, k, v = layer(x, angles)
                if gaze is not None and pruner is not None:
                    pruner.text_layer(depth, q, k, cache.positions)
                if cache is not None:
                    cache.keys[depth][:, :, :k.shape[2]] = k
                    cache.values[depth][:, :, :v.shape[2]] = v
                depth += 1
            elif gaze is not None:
                x = gaze(layer, x)
        return self.norm(x)

    def step(self, tokens: Tensor, cache: Cache) -> Tensor:
        """One more token for each row [B] -> hidden states [B, 1, D]; `cache` grows by one."""
        x = self.embed_tokens(tokens[:, None])
        angles, mask = rotary_angles(cache.positions[:, None], cache.frequencies), cache.text_mask()
        slots = torch.arange(len(tokens), device=x.device), cache.filled
        texts, images = iter(zip(cache.keys, cache.values, strict=True)), iter(cache.images)
        cache.queries = []
        for layer in self.layers:
            if isinstance(layer, SelfAttentionLayer):
                x = layer.step(x, angles, *next(texts), slots, mask)
            elif cache.images:
                q, kv = layer.queries(x), next(images)
                cache.queries.append(q)
                x = layer(x, q, kv, cache.rows, kv.scores_mask())
        cache.positions += 1
        cache.filled += 1
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


class Gaze:
    """Takes text through the cross-attention layers, one after the other; a pruner may act at each."""

    def __init__(self, seeing: Sight, image: ImageTokens, cache: Cache | None, pruner: Moments | None):
        self.seeing, self.image, self.cache, self.pruner = seeing, image, cache, pruner
        self.mask, self.ordinal = seeing.mask(image), 0

    def __call__(self, layer: "CrossAttentionLayer", x: Tensor) -> Tensor:
        """Rows of x [B, T, D] that see no image come back unchanged."""
        blind, x = x[:, :self.seeing.start], x[:, self.seeing.start:]
        q, kv, mask = layer.queries(x), layer.cross_attn.keys_values(self.image), self.mask
        if self.pruner is not None:
            image, used = self.pruner.layer(self.ordinal, self._asked(layer, q, x), self.image, kv)
            if used is not kv:
                kv, mask = used, self.seeing.mask(used)
            if image is not self.image:                 # what the next layers make their keys and values of
                self.image, self.mask = image, self.seeing.mask(image)
        if self.cache is not None:
            self.cache.images.append(kv)
        self.ordinal += 1
        x = layer(x, q, kv, self.seeing.rows, mask)
        return torch.cat((blind, x), dim=1) if self.seeing.start else x

    def _asked(self, layer: "CrossAttentionLayer", q: Tensor, x: Tensor) -> Queries:
        """Padding on the right of shorter prompts asks nothing."""
        seen, start = self.seeing.seen, self.seeing.start
        real = torch.arange(start, start + seen.shape[1], device=seen.device) < self.cache.positions[:, None]
        return Queries(q, seen * real[..., None], x, layer.cross_attn_attn_gate.tanh(),
                       layer.cross_attn.o_proj.weight)


class SelfAttentionLayer(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = SelfAttention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = SwiGLU(c)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Causal over x [B, T, D]; returns the new x, queries [B, H, T, d], keys and values [B, G, T, d]."""
        q, k, v = self.self_attn.project(self.input_layernorm(x), angles)
        x = x + self.self_attn.o_proj(attend(q, k, v, causal=True))
        return x + self.mlp(self.post_attention_layernorm(x)), q, k, v

    def step(self, x: Tensor, angles: tuple[Tensor, Tensor], keys: Tensor, values: Tensor,
             slots: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """One token x [B, 1, D] over the cache [B, G, capacity, d], which it enters first: at slot `slots[1]`
        of batch row `slots[0]`."""
        q, k, v = self.self_attn.project(self.input_layernorm(x), angles)
        row, slot = slots
        keys[row, :, slot], values[row, :, slot] = k[:, :, 0], v[:, :, 0]
        x = x + self.self_attn.o_proj(attend(q, keys, values, mask))
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

    def queries(self, x: Tensor) -> Tensor:
        """Text [B, T, D] -> [B, H, T, d]."""
        return self.cross_attn.queries(self.input_layernorm(x))

    def forward(self, x: Tensor, q: Tensor, kv: ImageKV, rows: Tensor | None, mask: Tensor | None) -> Tensor:
        """x [B, T, D] and its queries; `rows` and `mask` as in Sight."""
        h = self.cross_attn(q, kv, mask)
        x = x + self.cross_attn_attn_gate.tanh() * (h if rows is None else h * rows)
        h = self.mlp(self.post_attention_layernorm(x))
        return x + self.cross_attn_mlp_gate.tanh() * (h if rows is None else h * rows)


class CrossAttention(Projections):
    """Queries from text, keys and values from the image; both normalised per head, without a position."""

    def __init__(self, c: TextConfig):
        super().__init__(c)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)

    def queries(self, x: Tensor) -> Tensor:
        return self.q_norm(split_heads(self.q_proj(x), self.heads))

    def keys_values(self, image: ImageTokens) -> ImageKV:
        key = self.k_norm(split_heads(self.k_proj(image.features), self.kv_heads))
        value = split_heads(self.v_proj(image.features), self.kv_heads)
        return ImageKV(key, value, image.coords[:, None], None if image.mask is None else image.mask[:, None])

    def forward(self, q: Tensor, kv: ImageKV, mask: Tensor | None) -> Tensor:
        return self.o_proj(attend(q, kv.key, kv.value, mask))
