"""The sizes of the network, as frozen dataclasses with the official defaults.

Everything that differs between the 11B, the 90B, the 448-pixel base models and the bundled checkpoint is
here, so the rest of `model/` never asks which model it is. `weights/config_file.py` reads these values from a
checkpoint's config.json and checks them.
"""
from dataclasses import dataclass, field

EXTRA_EMBEDDINGS = 8       # rows that the embedding has more than the head; the first of them is <|image|>


@dataclass(frozen=True)
class VisionConfig:
    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_attention_heads: int = 16
    num_hidden_layers: int = 32                 # local layers
    num_global_layers: int = 8                  # gated global layers
    image_size: int = 448                       # side of a tile in pixels; the Instruct models write 560
    patch_size: int = 14
    num_channels: int = 3
    max_num_tiles: int = 4
    intermediate_layers_indices: tuple[int, ...] = (3, 7, 15, 23, 30)
    norm_eps: float = 1e-5
    supported_aspect_ratios: tuple[tuple[int, int], ...] = (
        (1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))    # (rows, columns); id = place + 1

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """The patches of a tile and its class token: 1601 at 560 pixels."""
        return self.patches_per_side ** 2 + 1

    @property
    def pad_tokens(self) -> int:
        """Zero tokens that fill a tile up to a multiple of 8 inside the encoder: 7 at 560 pixels."""
        return -self.tokens_per_tile % 8

    @property
    def output_dim(self) -> int:
        """Width of the encoder's output: the final state and every tapped one."""
        return self.hidden_size * (1 + len(self.intermediate_layers_indices))

    def ratio_id(self, rows: int, columns: int) -> int:
        """The row of the tile-embedding tables for a grid of tiles; 0 is unused."""
        if (rows, columns) not in self.supported_aspect_ratios:
            raise ValueError(f"{rows} x {columns} tiles are none of {self.supported_aspect_ratios}")
        return self.supported_aspect_ratios.index((rows, columns)) + 1


@dataclass(frozen=True)
class RopeScaling:
    """The llama3 rule that stretches low frequencies (arXiv 2407.21783)."""
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class TextConfig:
    vocab_size: int = 128256                    # rows of the head
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 40                 # self- and cross-attention layers together
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    cross_attention_layers: tuple[int, ...] = (3, 8, 13, 18, 23, 28, 33, 38)
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None     # None: plain rotary embedding
    max_position_embeddings: int = 131072
    tie_word_embeddings: bool = False
    eos_token_id: tuple[int, ...] = (128001,)
    extra_embeddings: int = EXTRA_EMBEDDINGS    # 0 after transformers' resize_token_embeddings

    @property
    def embedding_rows(self) -> int:
        """Token ids that prompts may hold."""
        return self.vocab_size + self.extra_embeddings

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class Config:
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    image_token_index: int = 128256
