"""The language model: Llama 3.1 layers, and between them gated cross-attention layers that look at the image.

A cross-attention layer makes its keys and values from the ImageTokens, layer by layer during prefill, and the
cache keeps them for decoding. Image keys carry no position, so dropping one is exactly masking it. Positions
of the text that see no image (everything before the first one) skip these layers exactly.
B batch, T text tokens, N image tokens, H query heads, G key/value heads, d head width, D model width.
"""
from typing import Protocol

import torch
from torch import Tensor, nn

from model.cache import Cache, rounded_up
from model.config import TextConfig
from model.image_tokens import ImageKV, ImageTokens, Queries, attention_mask
from model.layers import (
    RMSNorm,
    SwiGLU,
    attend,
    rotary_angles,
    rotary_frequencies,
    rotate,
    split_heads,
    untracked,
)


class LayerHook(Protocol):
    """What prefill calls at every cross-attention layer: hook 2 of `pruning/pruner.py`."""

    def layer(self, i: int, queries: Queries, image: ImageTokens,
              kv: ImageKV) -> tuple[ImageTokens, ImageKV]: ...


class Decoder(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.embedding_rows, config.hidden_size)
        self.layers = nn.ModuleList(
            CrossAttentionLayer(config) if i in config.cross_attention_layers else SelfAttentionLayer(config)
            for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.track = untracked

    @property
    def cross_layers(self) -> list["CrossAttentionLayer"]:
        """The layers that look at the image, by their ordinal."""
        return [layer for layer in self.layers if isinstance(layer, CrossAttentionLayer)]

    def new_cache(self, lengths: list[int], capacity: int) -> Cache:
        """Room for `capacity` tokens in each sequence, for prompts of these lengths."""
        c = self.config
        layers = [layer for layer in self.layers if isinstance(layer, SelfAttentionLayer)]
        room = rounded_up(capacity)
        keys, values = ([layer.input_layernorm.weight.new_zeros(len(lengths), layer.self_attn.kv_heads, room,
                                                                c.head_dim) for layer in layers]
                        for _ in range(2))
        device = self.embed_tokens.weight.device
        positions = torch.tensor(lengths, device=device)
        return Cache(keys, values, positions, rotary_frequencies(c, device))

    def forward(self, input_ids: Tensor, image: ImageTokens | None, seen: Tensor | None,
                cache: Cache | None = None, pruner: LayerHook | None = None) -> Tensor:
        """Whole sequences [B, T] -> hidden states [B, T, D] after the last norm.

        `seen` [B, T, 2] are the images that each position sees (`visible_images`). A `cache` is filled, if
        one is given; a `pruner` needs one. Shorter sequences are padded on the right: the tokens before the
        padding never see it.
        """
        x = self.embed_tokens(input_ids)                                                # [B, T, D]
        T = x.shape[1]
        positions = torch.arange(T, device=x.device)[None]
        angles = rotary_angles(positions, rotary_frequencies(self.config, x.device))
        if image is not None:
            sees_image = seen[..., :1] < seen[..., 1:]                                  # [B, T, 1]
        if pruner is not None and image is not None:
            asking = seen * (positions < cache.positions[:, None])[..., None]           # padding asks nothing
        i_self = i_cross = 0
        text_q = text_k = None
        for layer in self.track(self.layers):
            if isinstance(layer, SelfAttentionLayer):
                x, text_q, text_k, text_v = layer(x, angles)
                if cache is not None:
                    cache.text_keys[i_self][:, :, :T] = text_k
                    cache.text_values[i_self][:, :, :T] = text_v
                i_self += 1
            elif image is not None:
                q = layer.queries(x)                                                    # [B, H, T, d]
                kv = layer.keys_values(image)                                           # [B, G, N, d]
                if pruner is not None:
                    queries = Queries(q, asking, x, text_q, text_k)
                    image, kv = pruner.layer(i_cross, queries, image, kv)               # hook 2
                x = layer(x, q, kv, sees_image, attention_mask(seen, kv))
                if cache is not None:
                    cache.image_kv.append(kv)
                text_q = text_k = None
                i_cross += 1
        return self.norm(x)

    def step(self, tokens: Tensor, cache: Cache) -> Tensor:
        """One more token of each sequence [B] -> hidden states [B, 1, D]; `cache` grows by one."""
        x = self.embed_tokens(tokens[:, None])                                          # [B, 1, D]
        angles = rotary_angles(cache.positions[:, None], cache.frequencies)
        mask = cache.text_mask()                                                        # [B, 1, 1, capacity]
        slots = torch.arange(len(tokens), device=x.device), cache.positions
        i_self = i_cross = 0
        cache.queries = []
        for layer in self.layers:
            if isinstance(layer, SelfAttentionLayer):
                x = layer.step(x, angles, cache.text_keys[i_self], cache.text_values[i_self], slots, mask)
                i_self += 1
            elif cache.image_kv:
                q = layer.queries(x)                                                    # [B, H, 1, d]
                kv = cache.image_kv[i_cross]
                x = layer(x, q, kv, cache.sees_image, kv.decode_mask())
                cache.queries.append(q)
                i_cross += 1
        cache.positions += 1
        return self.norm(x)

    def flops(self, tokens: int, past: int, attended: list[int], projected: list[int]) -> int:
        """Floating-point operations for `tokens` new tokens after `past` ones, two for a multiply-add.

        `attended` are the image tokens that each cross-attention layer attends to, and all new tokens count
        as seeing them; `projected` those that it makes keys and values of (prefill). Without an image both
        are empty. Norms, activations and the output head are left out.
        """
        c = self.config
        kv_width = c.num_key_value_heads * c.head_dim
        q_o_and_mlp = tokens * (4 * c.hidden_size ** 2 + 6 * c.hidden_size * c.intermediate_size)
        pairs = tokens * past + tokens * (tokens + 1) // 2                          # causal
        text = q_o_and_mlp + tokens * 4 * c.hidden_size * kv_width + 4 * c.hidden_size * pairs
        image = len(attended) * q_o_and_mlp + 4 * c.hidden_size * tokens * sum(attended)
        image += sum(projected) * 4 * c.hidden_size * kv_width
        return (c.num_hidden_layers - len(c.cross_attention_layers)) * text + image


class SelfAttentionLayer(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = SelfAttention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = SwiGLU(c)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Causal attention over x [B, T, D] -> the new x; queries [B, H, T, d]; keys, values [B, G, T, d]."""
        q, k, v = self.self_attn.project(self.input_layernorm(x), angles)
        x = x + self.self_attn.o_proj(attend(q, k, v, causal=True))
        return x + self.mlp(self.post_attention_layernorm(x)), q, k, v

    def step(self, x: Tensor, angles: tuple[Tensor, Tensor], keys: Tensor, values: Tensor,
             slots: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """One token x [B, 1, D] over the cached `keys` and `values` [B, G, capacity, d], into which its own
        are written first: `slots` are the sequences [B] and the slot of each [B]."""
        q, k, v = self.self_attn.project(self.input_layernorm(x), angles)
        sequence, slot = slots
        keys[sequence, :, slot] = k[:, :, 0]
        values[sequence, :, slot] = v[:, :, 0]
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
        q_and_k = torch.cat((self.q_proj(x), self.k_proj(x)), dim=-1)
        q_and_k = rotate(split_heads(q_and_k, self.heads + self.kv_heads), angles)
        q, k = q_and_k.split((self.heads, self.kv_heads), dim=1)
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

    def keys_values(self, image: ImageTokens) -> ImageKV:
        """Image tokens [B, N, D] -> keys and values [B, G, N, d]."""
        return self.cross_attn.keys_values(image)

    def forward(self, x: Tensor, q: Tensor, kv: ImageKV, sees_image: Tensor | None,
                mask: Tensor | None) -> Tensor:
        """x [B, T, D] and its queries q [B, H, T, d] -> [B, T, D].

        Positions where `sees_image` [B, T, 1] is False come out unchanged (None: all of them see one); `mask`
        [B, K, T, N] as `attend` takes it.
        """
        h = self.cross_attn(q, kv, mask)                                                # [B, T, D]
        x = x + self.cross_attn_attn_gate.tanh() * (h if sees_image is None else h * sees_image)
        h = self.mlp(self.post_attention_layernorm(x))
        return x + self.cross_attn_mlp_gate.tanh() * (h if sees_image is None else h * sees_image)


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
        mask, bias = (None if each is None else each[:, None] for each in (image.mask, image.bias))
        return ImageKV(key, value, image.coords[:, None], mask, bias)

    def forward(self, q: Tensor, kv: ImageKV, mask: Tensor | None) -> Tensor:
        return self.o_proj(attend(q, kv.key, kv.value, mask))
