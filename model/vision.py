"""The vision encoder: Tiles in, one feature vector a patch out.

An image is up to four tiles, and all of them are one sequence: 32 local and 8 gated global layers attend
across tiles. (Local is Meta's name for them; only gates and position embeddings differ.) The output joins the
final state with the states that entered five of the local layers. Two traps of the original are kept exactly:

* Padding is not inert. Tokens of unused tiles, and the 7 zero tokens that fill each tile up to a multiple of
  8, are seen by real patches; only a padding query looking at a padding key is masked.
* Tapped features are interleaved: channel d of tap k stands at d·5 + k.

All padding tiles of an image are identical at every layer, and so are the zero tokens of a tile. Each is
computed once and its key counted as often as it occurs: the same numbers without a mask, and less than half
the work for one tile. I images, t tiles that are computed, P tokens a tile (class token first), D width.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import VisionConfig
from model.image_tokens import Grid
from model.layers import attend, split_heads, untracked


class VisionEncoder(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = c = config
        self.patch_embedding = nn.Conv2d(c.num_channels, c.hidden_size, c.patch_size, c.patch_size,
                                         bias=False)
        self.class_embedding = small_random(c.hidden_size)
        self.gated_positional_embedding = PositionEmbedding(c)
        self.pre_tile_positional_embedding = TileEmbedding(c)
        self.post_tile_positional_embedding = TileEmbedding(c)
        self.layernorm_pre = nn.LayerNorm(c.hidden_size, eps=c.norm_eps)
        self.layernorm_post = nn.LayerNorm(c.hidden_size, eps=c.norm_eps)
        self.transformer = Stack(c, c.num_hidden_layers, gated=False)
        self.global_transformer = Stack(c, c.num_global_layers, gated=True)
        self.track = untracked

    def forward(self, pixels: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """Encode images of one grid of tiles: pixels [I, max_tiles, 3, S, S] -> what the projector reads,
        [I, N, output_dim], N = real tiles · P.

        Two more states of the same tokens, for pruners that ask for them: the input of the last global layer,
        and the input of that layer's MLP, both [I, N, D]. Tiles beyond rows x columns must be zeros, as the
        image processor leaves them.
        """
        c = self.config
        real = grid[0] * grid[1]
        ratio = c.ratio_id(*grid)
        tiles = real + 1 if real < c.max_num_tiles and self._padding_alike(ratio, real) else c.max_num_tiles
        x = self._embed(pixels[:, :tiles], ratio, real)                                  # [I, t, P, D]
        x = torch.cat((x.flatten(1, 2), x.new_zeros(len(x), tiles, c.hidden_size)), 1)   # [I, t·P + t, D]
        layout = Layout(real, tiles, c, x.device)
        taps = []
        for i, layer in enumerate(self.track(self.transformer.layers)):
            if i in c.intermediate_layers_indices:
                taps.append(x[:, :layout.real])               # the input of the layer, not its output
            x, _ = layer(x, layout)
        post = self.post_tile_positional_embedding(ratio, real, tiles)                   # [t, 1, D]
        x = self.layernorm_post(x) + torch.cat((post.repeat_interleave(c.tokens_per_tile, 0), post))[:, 0]
        *layers, last = self.global_transformer.layers
        for layer in self.track(layers):
            x, _ = layer(x, layout)
        entering = x[:, :layout.real]                                                    # [I, N, D]
        x, attended = last(x, layout, layout.real)            # nothing reads the padding any more
        taps = torch.stack(taps, dim=-1).flatten(2)           # interleaved: channel d of tap k is d·5 + k
        return torch.cat((x, taps), dim=-1), entering, attended

    def _embed(self, pixels: Tensor, ratio: int, real: int) -> Tensor:
        images, tiles = pixels.shape[:2]
        x = self.patch_embedding(pixels.flatten(0, 1)).flatten(2).transpose(1, 2)        # [I·t, P - 1, D]
        x = x.unflatten(0, (images, tiles)) + self.pre_tile_positional_embedding(ratio, real, tiles)
        x = torch.cat((self.class_embedding.expand(images, tiles, 1, -1), x), dim=2)     # [I, t, P, D]
        return self.layernorm_pre(x + self.gated_positional_embedding(ratio, real, tiles))

    def _padding_alike(self, ratio: int, real: int) -> bool:
        """Whether the tables say the same of every unused tile: zeros, unless a fine-tune moved them."""
        tables = (self.pre_tile_positional_embedding.embedding, self.post_tile_positional_embedding.embedding,
                  self.gated_positional_embedding.tile_embedding)
        slots = self.config.max_num_tiles
        unused = (table.weight[ratio].unflatten(0, (slots, -1))[real:] for table in tables)
        return all(bool((rows == rows[0]).all()) for rows in unused)

    def flops(self, grid: tuple[int, int]) -> int:
        """Floating-point operations to encode an image, two for a multiply-add; norms not counted."""
        c = self.config
        real = grid[0] * grid[1]
        tiles = min(real + 1, c.max_num_tiles)
        tokens = tiles * (c.tokens_per_tile + 1)
        seeing = real * c.tokens_per_tile
        keys = c.max_num_tiles * (c.tokens_per_tile + c.pad_tokens)
        layer = (tokens * (8 * c.hidden_size ** 2 + 4 * c.hidden_size * c.intermediate_size)
                 + 4 * c.hidden_size * seeing * (keys + tokens - seeing))
        patches = 2 * tiles * (c.tokens_per_tile - 1) * c.num_channels * c.patch_size ** 2 * c.hidden_size
        padding = 4 * (tokens - seeing) * c.hidden_size * (c.hidden_size + c.intermediate_size + seeing)
        return patches + (c.num_hidden_layers + c.num_global_layers) * layer - padding


class Layout:
    """Which tokens of the encoder's sequence are real, and which tokens each kind of query sees.

    The sequence is [tile 0 | tile 1 | ... | one zero token of each tile]. Real queries see every key as often
    as it occurs in the full sequence of max_tiles padded tiles; padding queries see the real keys only.
    """

    def __init__(self, real_tiles: int, tiles: int, c: VisionConfig, device: torch.device):
        P = c.tokens_per_tile
        slots = [min(slot, tiles - 1) for slot in range(c.max_num_tiles)]
        patches = [slot * P + i for slot in slots for i in range(P)]
        zeros = [tiles * P + slot for slot in slots for _ in range(c.pad_tokens)]
        self.real = real_tiles * P
        self.keys = torch.tensor(patches + zeros, device=device)


class Stack(nn.Module):
    def __init__(self, config: VisionConfig, depth: int, gated: bool):
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config, gated) for _ in range(depth))


class VisionLayer(nn.Module):
    """Pre-norm attention and MLP; in a global layer each is scaled by the tanh of a learned scalar."""

    def __init__(self, c: VisionConfig, gated: bool):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(c.hidden_size, eps=c.norm_eps)
        self.self_attn = VisionAttention(c)
        self.post_attention_layernorm = nn.LayerNorm(c.hidden_size, eps=c.norm_eps)
        self.mlp = VisionMLP(c)
        self.gated = gated
        if gated:
            self.gate_attn = nn.Parameter(torch.full((1,), torch.pi / 4))
            self.gate_ffn = nn.Parameter(torch.full((1,), torch.pi / 4))

    def forward(self, x: Tensor, layout: Layout, tokens: int | None = None) -> tuple[Tensor, Tensor]:
        """x [I, t·P + t, D] -> the same, or its first `tokens` only; and what the MLP was given."""
        h = self.self_attn(self.input_layernorm(x), layout, tokens)
        x = x[:, :tokens] + (self.gate_attn.tanh() * h if self.gated else h)
        attended = self.post_attention_layernorm(x)
        h = self.mlp(attended)
        return x + (self.gate_ffn.tanh() * h if self.gated else h), attended


class VisionAttention(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.heads = c.num_attention_heads
        self.q_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)
        self.o_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor, layout: Layout, tokens: int | None) -> Tensor:
        n = layout.real
        q = split_heads(self.q_proj(x[:, :tokens]), self.heads)                          # [I, H, T, d]
        k = split_heads(self.k_proj(x), self.heads)
        v = split_heads(self.v_proj(x), self.heads)
        real = attend(q[:, :, :n], k.index_select(2, layout.keys), v.index_select(2, layout.keys))
        padding = attend(q[:, :, n:], k[:, :, :n], v[:, :, :n])
        return self.o_proj(torch.cat((real, padding), dim=1))


class VisionMLP(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.fc2 = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class TileEmbedding(nn.Module):
    """One learned vector for each tile of each aspect ratio, behind a tanh gate."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.embedding = nn.Embedding(len(c.supported_aspect_ratios) + 1, c.max_num_tiles * c.hidden_size)
        self.embedding.weight.data.zero_()
        self.gate = nn.Parameter(torch.zeros(1))
        self.shape = c.max_num_tiles, 1, c.hidden_size

    def forward(self, ratio: int, real: int, tiles: int) -> Tensor:
        """[t, 1, D]"""
        return self.gate.tanh() * tile_rows(self.embedding.weight[ratio].view(self.shape), real, tiles)


class PositionEmbedding(nn.Module):
    """A position embedding shared by all tiles, blended by a gate with one for each tile of each aspect
    ratio."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.embedding = small_random(c.tokens_per_tile, c.hidden_size)
        self.tile_embedding = nn.Embedding(len(c.supported_aspect_ratios) + 1,
                                           c.max_num_tiles * c.tokens_per_tile * c.hidden_size)
        self.tile_embedding.weight.data.zero_()
        self.gate = nn.Parameter(torch.zeros(1))
        self.shape = c.max_num_tiles, c.tokens_per_tile, c.hidden_size

    def forward(self, ratio: int, real: int, tiles: int) -> Tensor:
        """[t, P, D]"""
        blend = self.gate.tanh()
        own = tile_rows(self.tile_embedding.weight[ratio].view(self.shape), real, tiles)
        return (1 - blend) * self.embedding + blend * own


def small_random(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).normal_(std=shape[-1] ** -0.5))


def tile_rows(table: Tensor, real: int, tiles: int) -> Tensor:
    """The first rows of a table [max_tiles, ...]; those of unused tiles get no gradient and stay alike."""
    return torch.cat((table[:real], table[real:tiles].detach()))
