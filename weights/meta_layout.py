"""From Meta's names and layouts to the official ones: what from_meta.py does with each tensor.

    ranks, params ─► convert ─► Converted by official names: `read` makes one parameter
                  ─► config ─► config.json

A large model is cut into ranks, as fairscale's layers hold them: rows of wq, wk, wv, w1, w3, c_fc, of the
embeddings, the head, the patch embedding and the projector; columns of wo, w2 and c_proj; all else is the
same in every rank. What the layouts do differently (Meta's: `multimodal/model.py` of llama-models):

* Cross-attention layers are counted apart, each to run before a self-attention layer; here they are layers.
* Meta rotates neighbouring channels of queries and keys, the official layout those of two halves.
* The eight extra embeddings follow the vocabulary. The patch convolution is a linear layer over a patch.
* Tile embeddings are a grid of tiles; here each aspect ratio has a row with its part of the grid.
"""
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from weights.meta_files import Rank

ROWS = re.compile(r"\b(w[qkv13]|c_fc|_linear|tok_embeddings|learnable_embedding|output|vision_projection)"
                  r"\.(weight|bias)$")
COLUMNS = re.compile(r"\b(wo|w2|c_proj)\.weight$")
UNUSED = re.compile(r"(^|\.)(rope\.freqs|freqs_cis)$")              # tables that no model needs
VOCABULARY, EXTRA = "text_model.tok_embeddings.weight", "text_model.learnable_embedding.weight"
ROTATED = re.compile(r"text_model\.layers\.\d+\.attention\.w([qk])\.weight")
GATE = re.compile(r"[._]gate(_attn|_ffwd|_ffn)?$")
GRID = re.compile(r"gated_positional_embedding$|tile_pos_embed\.embedding$")
TAPS = 3, 7, 15, 23, 30         # local layers whose input the projector reads: in no file of Meta's
VISION_HEADS, PATCH, COLOURS = 16, 14, 3                            # likewise
OFFICIAL = [(re.compile(pattern), words) for pattern, words in (    # one after the other
    (r"^text_model\.norm\b", "language_model.model.norm"),
    (r"^text_model\.output\b", "language_model.lm_head"),
    (r"^text_model\.tok_embeddings\b", "language_model.model.embed_tokens"),
    (r"^vision_model\.vision_projection\b", "multi_modal_projector"),
    (r"^vision_model\.vision_encoder\.", "vision_model."),
    (r"\.conv1\._linear\b", ".patch_embedding"),
    (r"\.gated_positional_embedding$", ".gated_positional_embedding.tile_embedding.weight"),
    (r"\.gated_positional_embedding_gate$", ".gated_positional_embedding.gate"),
    (r"\.positional_embedding$", ".gated_positional_embedding.embedding"),
    (r"_tile_pos_embed\.embedding$", "_tile_positional_embedding.embedding.weight"),
    (r"_tile_pos_embed\.gate$", "_tile_positional_embedding.gate"),
    (r"\.ln_(pre|post)\b", r".layernorm_\1"),
    (r"\.resblocks\b", ".layers"),
    (r"\.cross\.attention\.", ".cross_attn."),                         # `numbered` has marked these layers
    (r"\.cross\.gate_attn$", ".cross_attn_attn_gate"),
    (r"\.cross\.gate_ffwd$", ".cross_attn_mlp_gate"),
    (r"\.cross\.", "."),
    (r"\.(attention|attn)\.w", ".self_attn.w"),
    (r"\.w([qkvo])\.", r".\1_proj."),
    (r"\.feed_forward\.w1\b", ".mlp.gate_proj"),
    (r"\.feed_forward\.w2\b", ".mlp.down_proj"),
    (r"\.feed_forward\.w3\b", ".mlp.up_proj"),
    (r"\.mlp\.c_fc\b", ".mlp.fc1"),
    (r"\.mlp\.c_proj\b", ".mlp.fc2"),
    (r"\.(attention_norm|ln_1)\b", ".input_layernorm"),
    (r"\.(ffn_norm|ln_2)\b", ".post_attention_layernorm"))]


@dataclass
class Converted:
    """A parameter to be made: `make` turns the tensors of its ranks into it, on the meta device too."""
    make: Callable[[list[Tensor]], Tensor]
    ranks: list[Tensor]

    def like(self) -> Tensor:
        """Its shape and dtype, without values."""
        return self.make([tensor.to("meta") for tensor in self.ranks])

    def read(self) -> Tensor:
        return self.make(self.ranks)


def convert(ranks: list[Rank], params: dict) -> dict[str, Converted]:
    """Every parameter of the model by its official name. Sizes are the caller's to check."""
    crosses = cross_layers(params)
    converted = {}
    for name in ranks[0]:
        if UNUSED.search(name) or name == EXTRA:
            continue
        tensors = [rank[name] for rank in ranks]
        if name == VOCABULARY and EXTRA in ranks[0]:
            tensors += [rank[EXTRA] for rank in ranks]          # rows after rows
        converted[official(name, crosses)] = Converted(_maker(name, params), tensors)
    return converted


def official(name: str, crosses: list[int]) -> str:
    """The official name of one of Meta's; unknown ones come out much as they are."""
    name = numbered(name, crosses)
    for pattern, words in OFFICIAL:
        name = pattern.sub(words, name)
    return name


def numbered(name: str, crosses: list[int]) -> str:
    """Self- and cross-attention layers counted together. `crosses[i]` is the self-attention layer that
    cross-attention layer i runs before."""
    match = re.match(r"text_model\.(cross_attention_)?layers\.(\d{1,4})\.(.*)", name)
    if match is None:
        return name
    is_cross, number, rest = match.group(1), int(match.group(2)), match.group(3)
    if not is_cross:
        number += sum(before <= number for before in crosses)
        return f"language_model.model.layers.{number}.{rest}"
    if number >= len(crosses):
        return name
    return f"language_model.model.layers.{crosses[number] + number}.cross.{rest}"


def cross_layers(params: dict) -> list[int]:
    """The self-attention layers that a cross-attention layer runs before: evenly spread from the last one."""
    count = params["vision_num_cross_attention_layers"]
    every = math.ceil(params["n_layers"] / count)
    return list(range(params["n_layers"]))[::-1][::every][:count][::-1]


def ratios(tiles: int) -> list[list[int]]:
    """All (rows, columns) of at most so many tiles, in the order of the tables' rows from 1 on."""
    return [[rows, columns] for rows in range(1, tiles + 1) for columns in range(1, tiles + 1)
            if rows * columns <= tiles]


# ---- tensors


def _maker(name: str, params: dict) -> Callable[[list[Tensor]], Tensor]:
    """What turns the ranks of one of Meta's tensors into the parameter."""
    rotated = ROTATED.fullmatch(name)

    def make(ranks: list[Tensor]) -> Tensor:
        tensor = joined(name, ranks)
        if rotated is not None:
            return halves(tensor, params["n_heads" if rotated.group(1) == "q" else "n_kv_heads"])
        if name.endswith("conv1._linear.weight"):
            return tensor.reshape(-1, COLOURS, PATCH, PATCH)
        if GRID.search(name):
            return table(tensor)
        if GATE.search(name):
            return scalar(name, tensor)
        return tensor
    return make


def joined(name: str, ranks: list[Tensor]) -> Tensor:
    """The whole tensor of its ranks; where all have the same, the first one's."""
    if len(ranks) == 1:
        return ranks[0]
    if ROWS.search(name):
        return torch.cat(ranks)
    if COLUMNS.search(name):
        return torch.cat(ranks, 1)
    return ranks[0]


def halves(weight: Tensor, heads: int) -> Tensor:
    """Queries or keys [H * d, D] whose channels 2i and 2i + 1 are rotated -> channels i and i + d / 2 are."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def table(grid: Tensor) -> Tensor:
    """A grid of embeddings [T, T, P, D] -> a row for each aspect ratio, [1 + ratios, T * P * D].

    Row 0 stands for no image; it and what a ratio does not use are zeros.
    """
    tiles = grid.shape[0]
    rows = [grid.new_zeros(tiles, *grid.shape[2:])]
    for height, width in ratios(tiles):
        row = grid.new_zeros(tiles, *grid.shape[2:])
        row[:height * width] = grid[:height, :width].flatten(0, 1)
        rows.append(row)
    return torch.stack(rows).flatten(1)


def scalar(name: str, gate: Tensor) -> Tensor:
    """A gate as one number [1], also where it was stored once for each channel."""
    gate = gate.reshape(-1)
    if not gate.is_meta and not bool((gate == gate[0]).all()):
        raise ValueError(f"{name} has different numbers for different channels, which no model here can use")
    return gate[:1]


# ---- config.json


def config(params: dict, converted: dict[str, Tensor]) -> dict:
    """config.json in the official layout. `converted` has the shapes that params.json does not tell."""
    def shape(name: str) -> tuple[int, ...]:
        if name not in converted:
            raise ValueError(f"no tensor becomes {name}; files are missing, or this is another model")
        return converted[name].shape

    crosses = cross_layers(params)
    width = shape("vision_model.class_embedding")[0]
    taps = shape("multi_modal_projector.weight")[1] // width - 1
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192} if params.get("use_scaled_rope") else None
    text = {"model_type": "mllama_text_model",
            "vocab_size": params["vocab_size"], "hidden_size": params["dim"],
            "intermediate_size": shape("language_model.model.layers.0.mlp.gate_proj.weight")[0],
            "num_hidden_layers": params["n_layers"] + len(crosses), "num_attention_heads": params["n_heads"],
            "num_key_value_heads": params["n_kv_heads"],
            "cross_attention_layers": [before + i for i, before in enumerate(crosses)],
            "rms_norm_eps": params.get("norm_eps", 1e-5), "rope_theta": params.get("rope_theta", 500000.0),
            "rope_scaling": rope, "max_position_embeddings": 131072, "hidden_act": "silu",
            "tie_word_embeddings": False}
    vision = {"model_type": "mllama_vision_model", "hidden_size": width, "attention_heads": VISION_HEADS,
              "intermediate_size": shape("vision_model.transformer.layers.0.mlp.fc1.weight")[0],
              "num_hidden_layers": _count("vision_model.transformer.layers", converted),
              "num_global_layers": _count("vision_model.global_transformer.layers", converted),
              "image_size": params["vision_chunk_size"], "patch_size": PATCH, "num_channels": COLOURS,
              "max_num_tiles": params["vision_max_num_chunks"],
              "supported_aspect_ratios": ratios(params["vision_max_num_chunks"]),
              "intermediate_layers_indices": list(TAPS[:max(0, taps)]),
              "vision_output_dim": width * (1 + taps),
              "norm_eps": 1e-5, "hidden_act": "gelu"}
    dtype = str(converted["multi_modal_projector.weight"].dtype).removeprefix("torch.")
    return {"architectures": ["MllamaForConditionalGeneration"], "model_type": "mllama", "torch_dtype": dtype,
            "image_token_index": params["vocab_size"], "text_config": text, "vision_config": vision}


def _count(prefix: str, converted: dict[str, Tensor]) -> int:
    """How many layers there are of a stack."""
    within = [name for name in converted if name.startswith(f"{prefix}.")]
    return len({name.removeprefix(prefix).split(".")[1] for name in within})
