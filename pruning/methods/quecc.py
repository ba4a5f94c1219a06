"""QueCC: a trained compressor merges each tile into a few tokens, and the question has a say in them.

    Q = Conv_k(MLP(X + LN(W e)))        O = Attention(Q, MLP(M), MLP(M)), each cell to its own k x k patches
    token = mean of the cell's tokens + W_out O

Li et al., "Inference Optimal VLMs Need Only One Visual Token but Larger Models", ICLR 2025, arXiv 2411.03312.
X and M are states of the encoder, e is the question read as text alone. Ours: the last line; projector and
language model stay frozen, and the weights are distilled (`python -m scenes.train_quecc`).
See docs/PAPERS.md.
"""
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.image_tokens import EncoderStates, ImageTokens
from model.llama_vision import LlamaVision
from pruning.pruner import Pruner
from weights import LEARNED
from weights.messages import named, one_line
from weights.safetensors_file import read_tensors

HEAD = 64           # width of an attention head, as in the vision encoder; the paper's have 128


@dataclass
class QueCC(Pruner):
    """Merges each tile into a few tokens, with a trained compressor that has read the question.

    `keep` is a share, or a number, of a tile's tokens, and the largest grid within it is taken, or else the
    smallest there is. `weights` are "trained", those for the bundled checkpoint; or a folder with those that
    `python -m scenes.train_quecc` has trained for another; or "pool", plain averages, of any grid.
    """
    keep: float | int = 0.5
    weights: str = "trained"

    name = "quecc"
    unit = "of each tile"
    paper = "Li et al. 2025, arXiv 2411.03312"
    merges: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.weights not in ("trained", "pool") and not Path(self.weights).is_dir():
            raise ValueError(f"quecc: weights is {self.weights!r}, but must be trained, pool, or a folder of "
                             "trained weights")

    @property
    def keep_states(self) -> bool:
        return self.weights != "pool"

    def begin(self, model: LlamaVision):
        self.model = model

    def encoded(self, image: ImageTokens, prompts: list[list[int]]) -> ImageTokens:
        side = int(image.coords[..., 2].max()) + 1
        most = self.keep if isinstance(self.keep, int) else self.keep * (side ** 2 + 1) + 1e-6
        if most >= side ** 2 + 1:
            return image
        if self.weights == "pool":
            return compress(image, -(-side // largest(pooled_grids(side), most)))
        folder = LEARNED if self.weights == "trained" else Path(self.weights)
        found = {math.isqrt(int(tokens)): path for path in folder.glob("quecc_*.safetensors")
                 if (tokens := path.stem.removeprefix("quecc_")).isdigit()}
        if not found:
            raise ValueError(f"quecc: no quecc_*.safetensors in {folder}; use weights=pool, or train some")
        grid = largest(found, most)
        compressor = load_compressor(found[grid], image.features.device)
        compressor.check(found[grid], -(-side // grid), image)
        return compress(image, compressor.stride, compressor, question_states(self.model, prompts))


def question_states(model: LlamaVision, prompts: list[list[int]]) -> Tensor:
    """What the text alone says: the final state of the last token of each prompt, which is read without its
    image tokens, [B, D]."""
    words = [[token for token in ids if token != model.config.image_token_index] for ids in prompts]
    padded, lengths = model.pad_right(words)
    last = torch.tensor(lengths) - 1
    return model.language_model(padded, None, None)[torch.arange(len(words)), last]


def pooled_grids(side: int) -> set[int]:
    """All g for which a tile falls into g x g regions of equal size, the last ones perhaps smaller."""
    return {-(-side // stride) for stride in range(1, side + 1)}


def largest(grids: set[int] | dict[int, Path], most: float) -> int:
    """The largest grid that gives a tile at most so many tokens, or else the smallest."""
    return max((grid for grid in grids if grid ** 2 + 1 <= most), default=min(grids))


def compress(image: ImageTokens, stride: int, compressor: "Compressor | None" = None,
             question: Tensor | None = None) -> ImageTokens:
    """Every region of stride x stride patches becomes one token. `question` [B, D]; without a compressor, or
    with an untrained one, a token is the region's mean."""
    side = int(image.coords[..., 2].max()) + 1
    size = side ** 2 + 1
    starts = torch.arange(0, side, stride, device=image.coords.device)
    first = torch.cat((starts[:1], 1 + (starts[:, None] * side + starts).flatten()))     # of the old tokens
    tiles = image.features.unflatten(1, (-1, size))                                     # [B, tiles, size, D]
    coords = image.coords.unflatten(1, (-1, size))
    mask = None if image.mask is None else image.mask.unflatten(1, (-1, size))[..., first]
    real = coords[..., 0, 0] >= 0 if mask is None else mask[..., 0]                      # [B, tiles]
    tokens = means(tiles[real][:, 1:].float(), stride)
    if compressor is not None:
        states = image.states.features.unflatten(1, (-1, size))[real][:, 1:].float()
        tokens = tokens + compressor(states, question[real.nonzero()[:, 0]].float())
    new = tiles.new_zeros(*real.shape, len(first), tiles.shape[-1])
    new[real] = torch.cat((tiles[real][:, :1], tokens.to(tiles.dtype)), dim=1)
    return ImageTokens(new.flatten(1, 2), coords[:, :, first].flatten(1, 2),
                       None if mask is None else mask.flatten(1))


def regions(patches: Tensor, stride: int) -> Tensor:
    """The patches of each region, rows first: [R, side², C] -> [R, g², stride², C]; zeros beyond the tile."""
    side = math.isqrt(patches.shape[1])
    lack = -side % stride
    square = F.pad(patches.unflatten(1, (side, side)), (0, 0, 0, lack, 0, lack))
    return rearrange(square, "r (h k) (w l) c -> r (h w) (k l) c", k=stride, l=stride)


def means(patches: Tensor, stride: int) -> Tensor:
    """The mean of each region, [R, side², C] -> [R, g², C]."""
    return regions(patches, stride).sum(2) / regions(torch.ones_like(patches[:1, :, :1]), stride).sum(2)


class Compressor(nn.Module):
    """What is trained: adds to the mean of each region what the question asks of it. In fp32 throughout."""

    def __init__(self, width: int, states: int, text: int, stride: int):
        super().__init__()
        self.stride = stride
        self.question = nn.Sequential(nn.Linear(text, width), nn.LayerNorm(width, 1e-6))
        self.query, self.key, self.value = (
            nn.Sequential(nn.Linear(wide, width), nn.GELU(), nn.Linear(width, width),
                          nn.LayerNorm(width, 1e-6)) for wide in (width, states, states))
        self.shrink = nn.Conv2d(width, width, stride, stride, groups=width)
        self.attention = nn.MultiheadAttention(width, max(1, width // HEAD), batch_first=True)
        self.out = nn.Linear(width, text)
        nn.init.constant_(self.shrink.weight, stride ** -2)         # starts as an average, ...
        nn.init.zeros_(self.out.weight)                             # ... and adds nothing at first
        nn.init.zeros_(self.out.bias)

    def forward(self, states: Tensor, question: Tensor) -> Tensor:
        """states [R, side², F], the final one first, and the question of each tile [R, D] -> [R, g², D]."""
        final = states[..., :self.shrink.in_channels]
        asked = regions(self.query(final + self.question(question)[:, None]), self.stride)
        squares = asked.flatten(0, 1).transpose(1, 2).unflatten(2, (self.stride, self.stride))
        key, value = (regions(part(states), self.stride).flatten(0, 1) for part in (self.key, self.value))
        empty = regions(torch.ones_like(states[:1, :, :1]), self.stride)[..., 0] == 0      # [1, g², stride²]
        hidden = empty.repeat(len(states), 1, 1).flatten(0, 1).repeat_interleave(self.attention.num_heads, 0)
        found, _ = self.attention(self.shrink(squares).flatten(1)[:, None], key, value, need_weights=False,
                                  attn_mask=hidden[:, None])    # as a key_padding_mask it imports for seconds
        return self.out(found[:, 0]).unflatten(0, (len(states), -1))

    def check(self, path: Path, stride: int, image: ImageTokens):
        """Raise ValueError where it was trained for features of another kind."""
        ours = self.shrink.in_channels, self.key[0].in_features, self.out.out_features, self.stride
        states: EncoderStates = image.states
        theirs = states.entering.shape[-1], states.features.shape[-1], image.features.shape[-1], stride
        if ours != theirs:
            raise ValueError(f"quecc: {path.name} was trained for another model (widths and stride {ours}, "
                             f"here {theirs}): train one for it with python -m scenes.train_quecc, or use "
                             "weights=pool")


@lru_cache
def load_compressor(path: Path, device: torch.device) -> Compressor:
    """A trained one, from a file. Raises ValueError with one line where it holds something else."""
    try:
        state = read_tensors(path, device)
        sizes = [*state["out.weight"].shape, *state["key.0.weight"].shape, *state["shrink.weight"].shape]
        text, width, _, states, *_, stride = sizes
        if min(sizes) < 1 or width % max(1, width // HEAD):
            raise ValueError(f"its sizes are {sizes}")
        with torch.device("meta"):
            compressor = Compressor(width, states, text, stride)
        compressor.load_state_dict(state, assign=True)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"quecc: {named(path)}: no weights of this method ({one_line(error)})") from None
    return compressor.requires_grad_(False).eval()
