"""AttentionPredictor: read, at each step, the parts of the image that attention is expected to go to next.

Attention over decode steps is taken as a time series: from the rows of the last steps a small network, one
for all layers and heads, predicts the next row, and only the blocks that it ranks highest are read. Nothing
is dropped for good: what is saved is reading, not memory.

Qingyue Yang, Jie Wang, Xing Li, Zhihai Wang, Chen Chen, Lei Chen, Xianzhi Yu, Wulong Liu, Jianye Hao,
Mingxuan Yuan, et al.: "AttentionPredictor: Temporal Pattern Matters for Efficient LLM Inference", NeurIPS
2025, arXiv 2502.04077. Read against the authors' code (MIRALab-USTC/LLM-AttentionPredictor), which is a
simulation that masks; of the paper we know the abstract.

Theirs: the softmax row of a head, its maximum in every block of 16 tokens; a history of the last 64 rows, at
first of the prompt's; a network (4,833 parameters) of two convolutions over history and blocks, a mean over
time, and a mix of channels; the best blocks of its answer, as many as fit into the budget beside the tokens
that are always read. The row of a step is what was read, normalised over that alone; every `calibrate`-th one
is that of the whole image. A step's own row never has a say in what it reads. The first layers read all.

Here: the sequence is the image, which neither grows nor has positions, so no blocks are added, no last ones
are always read, and no pattern can move along; what can recur is a look back. Always read are the class
tokens, which belong to no block. A block never spans two tiles, whose last one may be shorter; in `layout`
"square", ours, blocks are squares of patches. Of several images each has the budget `keep` for itself, in
every predicted layer: class tokens, then whole blocks in the order of the prediction until one does not fit,
so never more than `keep`, and class tokens alone where it holds no block. A history grows to `window` rows
where the prompt is shorter (theirs stays short); it has the prompt's rows that see what the last one sees.
The tokens are really gathered, one set a key/value head: the mean prediction of its query heads. A set for
each query head, as theirs, would need a mask and read everything; it is not built.

The authors' network was trained on self-attention with rotary positions, so it is not used. Their loss and
data are not published: ours has learned, by squared error, from the bundled checkpoint's cross-attention
(`python -m scenes.train_attention_predictor`; figures beside the weights). That it serves other checkpoints
is unverified. `predictor` "last" and "mean" need no training: the newest row, which between two calibrated
rows finds again what it has just read, and the mean of all. The network multiplies 4,752 times for each head,
row and block, which is more work than it saves on an image in fast memory.

`offload` stands for their prefetching: on a GPU the keys and values of the whole image lie in the CPU's
memory, and a layer's blocks are copied while those of the next are predicted. On a CPU it does nothing. It
has not been run on a GPU. Their code runs no network for fewer than three blocks; ours does.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from model.image_tokens import compact
from pruning.attention import attention_received, row_weights
from pruning.pruner import ImageKV, ImageTokens, Pruner, Queries, each_image, num_kept
from weights import LEARNED

WEIGHTS = LEARNED / "attention_predictor.safetensors"


class Network(nn.Module):
    """The next row of attention from those before it; H query heads, h rows, n blocks."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 32, 3, padding=1)
        self.mix = nn.Conv1d(32, 1, 1)

    def forward(self, history: Tensor, there: Tensor) -> Tensor:
        """history [B, H, h, n] -> [B, H, n]; `there` [B, h, n] is False in padding, which is as good as the
        edge."""
        inside = there[:, None].expand(history.shape).flatten(0, 1)[:, None].float()        # [B·H, 1, h, n]
        x = self.first(history.flatten(0, 1)[:, None] * inside).relu() * inside
        x = self.second(x).relu() * inside
        mean = x.sum(2) / inside.sum(2).clamp(min=1)                                        # over time
        return self.mix(mean)[:, 0].unflatten(0, history.shape[:2])


@dataclass
class AttentionPredictor(Pruner):
    """Reads in every step the blocks that a small network expects each head to look at; drops nothing.

    `keep` counts what a step reads of an image in a predicted layer, class tokens included. The first
    `skip_layers` cross-attention layers read it all.
    """
    keep: float | int = 0.25
    block: int = 16                                 # patches
    layout: Literal["raster", "square"] = "raster"
    predictor: Literal["cnn", "last", "mean"] = "cnn"
    calibrate: int = 5                              # steps from one row of the whole image to the next
    skip_layers: int = 1
    window: int = 64                                # rows of history
    offload: bool = False

    name, unit = "attention_predictor", "read a step"
    paper = "Yang et al. 2025, arXiv 2502.04077"

    def __post_init__(self):
        super().__post_init__()
        for option, least in ("block", 1), ("calibrate", 1), ("skip_layers", 0), ("window", 1):
            if (value := getattr(self, option)) < least:
                raise ValueError(f"{self.name}: {option} is {value}, but must be at least {least}")
        if self.layout == "square" and math.isqrt(self.block) ** 2 != self.block:
            raise ValueError(f"{self.name}: block is {self.block}, but must be a square number for squares")
        if self.predictor == "cnn":
            self.network = Network().requires_grad_(False)
            self.network.load_state_dict(load_file(WEIGHTS))

    # ----- the history of the prompt

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        if i == 0:
            self.history, self.whole = [], []
        if i >= self.skip_layers:
            self.history.append(self.prompt_rows(queries, kv.seen_by(queries.seen.amax(1))))
        return image, kv

    def prompt_rows(self, queries: Queries, kv: ImageKV) -> Tensor:
        """The last rows that see images of the last row, pooled: [B, H, h, n], the newest last."""
        seen, (B, H) = queries.seen, queries.q.shape[:2]
        asked = seen[..., 1] > seen[..., :1].amax(1)                        # images are numbered as they come
        after = asked.sum(1, keepdim=True) - asked.cumsum(1)
        self.rows = asked.sum(1).clamp(max=self.window)                     # [B] of the history
        block, blocks = self.blocks(kv)
        history = queries.q.new_zeros(B, H, max(1, int(self.rows.max())), blocks, dtype=torch.float32)
        for row in range(B):
            for which, weights in row_weights(queries, kv, row, asked[row] & (after[row] < self.window)):
                history[row, :, -1 - after[row, which]] = pool(weights, block[row], blocks)
        return history

    def blocks(self, kv: ImageKV) -> tuple[Tensor, int]:
        """The block of each token [B, N], counted over the tiles of a batch row, and how many there are. That
        number stands for no block: class tokens, and what is masked."""
        coords = kv.coords[:, 0]
        there = torch.ones_like(coords[..., 0], dtype=torch.bool) if kv.mask is None else kv.mask[:, 0]
        side, edge, (y, x) = int(coords[..., 3].max()) + 1, math.isqrt(self.block), coords[..., 2:].unbind(-1)
        square = y // edge * -(-side // edge) + x // edge
        inside = (y * side + x) // self.block if self.layout == "raster" else square
        begins = (coords[..., :2] != coords[..., :2].roll(1, 1)).any(-1)
        begins[:, 0] = True
        tile, patch = (begins & there).cumsum(1) - 1, there & (y >= 0)
        block = tile * (int(inside.max()) + 1) + inside
        blocks = int(block.masked_fill(~patch, -1).max()) + 1
        return block.masked_fill(~patch, blocks), blocks

    # ----- from step to step

    def prefilled(self, kvs: list[ImageKV]) -> list[ImageKV]:
        if self.skip_layers >= len(kvs):
            raise ValueError(f"{self.name}: skip_layers is {self.skip_layers}, but must be less than "
                             f"{len(kvs)}, the number of cross-attention layers")
        self.whole = [kv.settle(None) for kv in kvs[self.skip_layers:]]
        self.lay_out(self.whole[0])
        self.device, self.stream = self.block_of.device, None
        if self.offload and self.device.type == "cuda":
            self.stream = torch.cuda.Stream(self.device)
            self.whole = [moved(kv, lambda tensor: tensor.cpu().pin_memory()) for kv in self.whole]
        return kvs[:self.skip_layers] + self.select()

    def lay_out(self, kv: ImageKV):
        """What no step changes: which token is in which block, and the budget of every image."""
        self.block_of, blocks = self.blocks(kv)                                                 # [B, N]
        size = self.block_of.new_zeros(len(self.block_of), blocks + 1)
        self.size = size.scatter_add(1, self.block_of, torch.ones_like(self.block_of))[:, :blocks]
        self.budgets = []           # of every image: class tokens read [B, N], its blocks [B, n], room [B, 1]
        for there in each_image(kv):
            there, budget = there[:, 0], num_kept(self.keep, there[:, 0].sum(1, keepdim=True))
            classes, block = there & (self.block_of == blocks), self.block_of.masked_fill(~there, blocks)
            ours = torch.zeros_like(size, dtype=torch.bool).scatter(1, block, True)[:, :blocks]
            room = budget - classes.sum(1, keepdim=True)
            self.budgets.append((classes & (classes.cumsum(1) <= budget), ours, room))

    def select(self) -> list[ImageKV]:
        """What the next step reads of the image, in each predicted layer."""
        kvs, self.read = [], []                                     # the block of each token read, [B, G, m]
        for kv, history in zip(self.whole, self.history, strict=True):
            row = self.predict(history).unflatten(1, (kv.key.shape[1], -1)).mean(2)             # [B, G, n]
            kept = self.chosen(row)
            order, mask = compact(kept)
            block = self.block_of[:, None].take_along_dim(order, 2)
            self.read.append(block if mask is None else block.masked_fill(~mask, row.shape[-1]))
            kvs.append(self.fetch(kv, kept))
        self.await_copies()
        return kvs

    def predict(self, history: Tensor) -> Tensor:
        """History [B, H, h, n] -> the next row [B, H, n], or at least its ranking."""
        if self.predictor != "cnn":
            return history[:, :, -1] if self.predictor == "last" else history.sum(2)
        rows = torch.arange(history.shape[2], 0, -1, device=history.device) <= self.rows[:, None]   # [B, h]
        return self.network.to(history.device)(history, rows[:, :, None] & (self.size > 0)[:, None])

    def chosen(self, row: Tensor) -> Tensor:
        """Predicted rows [B, G, n] -> the tokens to read [B, G, N] bool."""
        kept = torch.zeros_like(self.block_of, dtype=torch.bool)[:, None].repeat(1, row.shape[1], 1)
        for classes, ours, room in self.budgets:
            order = row.masked_fill(~ours[:, None], -math.inf).argsort(dim=-1, descending=True, stable=True)
            fits = self.size[:, None].take_along_dim(order, 2).cumsum(2) <= room[:, None]
            # One more, of what is in no block: it is not chosen.
            best = kept.new_zeros(*row.shape[:2], row.shape[2] + 1)
            best = best.scatter(2, order, fits & ours[:, None].take_along_dim(order, 2))
            kept |= classes[:, None] | best.take_along_dim(self.block_of[:, None], 2)
        return kept

    def stepped(self, step: int, queries: list[Tensor], kvs: list[ImageKV]) -> list[ImageKV]:
        every_image = torch.tensor([0, 1 << 30], device=self.device).expand(len(self.rows), 1, 2)
        for c, history in enumerate(self.history):
            q, read, block = queries[self.skip_layers + c], kvs[self.skip_layers + c], self.read[c]
            if (step + 1) % self.calibrate == 0:
                read, block = self.fetch(self.whole[c]), self.block_of[:, None]
                self.await_copies()
            weights = attention_received(Queries(q, every_image), read)[..., :block.shape[2]]  # padded if compiled
            row = pool(weights, block.repeat_interleave(q.shape[1] // block.shape[1], 1), history.shape[3])
            self.history[c] = torch.cat((history, row[:, :, None]), 2)[:, :, -self.window:]
        self.rows = (self.rows + 1).clamp(max=self.window)
        return kvs[:self.skip_layers] + self.select()

    # ----- the whole image in the CPU's memory, beside a GPU

    def fetch(self, kv: ImageKV, kept: Tensor | None = None) -> ImageKV:
        """What is kept of it, or all, where the model is; copies may be under way until `await_copies`."""
        kv = kv if kept is None else kv.take(kept.to(kv.key.device))
        return kv if self.stream is None else moved(kv, self.copy)

    def copy(self, tensor: Tensor) -> Tensor:
        """From locked memory, which the GPU reads by itself while it and the program do other things."""
        with torch.cuda.stream(self.stream):
            arriving = tensor.pin_memory().to(self.device, non_blocking=True)
        # Or its memory might be given away while the model still reads it.
        arriving.record_stream(torch.cuda.current_stream(self.device))
        return arriving

    def await_copies(self):
        """The model's next work starts when all copies have arrived; the program goes on at once."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)


def pool(weights: Tensor, block: Tensor, blocks: int) -> Tensor:
    """The maximum in each block: weights [..., N] and the block of each token [..., N] -> [..., n]; 0 where
    nothing of a block was read."""
    pooled = weights.new_zeros(*weights.shape[:-1], blocks + 1)
    return pooled.scatter_reduce(-1, block.expand_as(weights), weights, "amax")[..., :blocks]


def moved(kv: ImageKV, move: Callable[[Tensor], Tensor]) -> ImageKV:
    """The same with all its tensors elsewhere."""
    return replace(kv, **{part: move(held) for part, held in vars(kv).items() if held is not None})
