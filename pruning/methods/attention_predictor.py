"""AttentionPredictor: read, at each step, the parts of the image that attention is expected to go to next.

    next row = network(the last `window` rows of attention, each pooled by the maximum in every block)

Yang et al., "AttentionPredictor", NeurIPS 2025, arXiv 2502.04077. Nothing is dropped: reading is saved, not
memory. Ours: blocks inside tiles, class tokens always read, one set for each key/value head, and a network
trained on the bundled checkpoint. What `offload` gains on a GPU has not been measured.
See docs/PAPERS.md.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from model.image_tokens import ImageKV, ImageTokens, Queries, each_image, kept_indices
from pruning.attention import attention_received, attention_weights, every_image
from pruning.options import check_least
from pruning.pruner import Pruner
from pruning.select import num_kept
from weights import LEARNED
from weights.messages import named, one_line
from weights.safetensors_file import read_tensors

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


def load_network(path: Path) -> Network:
    """A trained one, from a file. Raises ValueError with one line where it holds something else."""
    network = Network().requires_grad_(False)
    try:
        network.load_state_dict(read_tensors(path))
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{named(path)}: no weights of attention_predictor ({one_line(error)})") from None
    return network


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

    name = "attention_predictor"
    unit = "read a step"
    paper = "Yang et al. 2025, arXiv 2502.04077"

    def __post_init__(self):
        super().__post_init__()
        check_least(self, block=1, calibrate=1, skip_layers=0, window=1)
        if self.layout == "square" and math.isqrt(self.block) ** 2 != self.block:
            raise ValueError(f"{self.name}: block is {self.block}, but must be a square number for squares")
        if self.predictor == "cnn":
            self.network = load_network(WEIGHTS)

    # ----- the history of the prompt

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        if i == 0:
            self.history = []
            self.stored = []
        if i >= self.skip_layers:
            self.history.append(self.prompt_history(queries, kv.seen_from(queries.seen.amax(1))))
        return image, kv

    def prompt_history(self, queries: Queries, kv: ImageKV) -> Tensor:
        """Attention of the last query positions that see the images of the last one, pooled over blocks:
        [B, H, h, n], the newest last."""
        seen = queries.seen
        B, H = queries.q.shape[:2]
        asked = seen[..., 1] > seen[..., :1].amax(1)            # [B, T]; images are numbered as they come
        after = asked.sum(1, keepdim=True) - asked.cumsum(1)
        self.length = asked.sum(1).clamp(max=self.window)       # [B] of the history
        block, blocks = self.blocks(kv)
        history = queries.q.new_zeros(B, H, max(1, int(self.length.max())), blocks, dtype=torch.float32)
        for b in range(B):
            recent = asked[b] & (after[b] < self.window)
            for which, weights in attention_weights(queries, kv, b, recent):
                history[b, :, -1 - after[b, which]] = pool(weights, block[b], blocks)
        return history

    def blocks(self, kv: ImageKV) -> tuple[Tensor, int]:
        """The block of each token [B, N], counted over the tiles of a sequence, and the number of blocks.
        That number stands for no block: class tokens, and what is masked."""
        coords = kv.coords[:, 0]                                                                # [B, N, 4]
        y, x = coords[..., 2:].unbind(-1)
        side = int(coords[..., 3].max()) + 1
        if self.layout == "raster":
            inside = (y * side + x) // self.block
        else:
            edge = math.isqrt(self.block)
            inside = y // edge * -(-side // edge) + x // edge
        there = torch.ones_like(y, dtype=torch.bool) if kv.mask is None else kv.mask[:, 0]
        begins = (coords[..., :2] != coords[..., :2].roll(1, 1)).any(-1)
        begins[:, 0] = True
        tile = (begins & there).cumsum(1) - 1
        patch = there & (y >= 0)
        block = tile * (int(inside.max()) + 1) + inside
        blocks = int(block.masked_fill(~patch, -1).max()) + 1
        return block.masked_fill(~patch, blocks), blocks

    # ----- from step to step

    def prefilled(self, image_kv: list[ImageKV]) -> list[ImageKV]:
        if self.skip_layers >= len(image_kv):
            raise ValueError(f"{self.name}: skip_layers is {self.skip_layers}, but must be less than "
                             f"{len(image_kv)}, the number of cross-attention layers")
        self.stored = [kv.compact(None) for kv in image_kv[self.skip_layers:]]
        self.lay_out(self.stored[0])
        self.device = self.block_of.device
        self.stream = None
        if self.offload and self.device.type == "cuda":
            self.stream = torch.cuda.Stream(self.device)
            self.stored = [moved(kv, lambda tensor: tensor.cpu().pin_memory()) for kv in self.stored]
        return image_kv[:self.skip_layers] + self.select()

    def lay_out(self, kv: ImageKV):
        """What no step changes: which token is in which block, and the budget of every image."""
        self.block_of, blocks = self.blocks(kv)                                                 # [B, N]
        size = self.block_of.new_zeros(len(self.block_of), blocks + 1)
        self.size = size.scatter_add(1, self.block_of, torch.ones_like(self.block_of))[:, :blocks]
        self.budgets = []           # of every image: class tokens read [B, N], its blocks [B, n], room [B, 1]
        for there in each_image(kv):
            there = there[:, 0]                                                                 # [B, N]
            budget = num_kept(self.keep, there.sum(1, keepdim=True))
            classes = there & (self.block_of == blocks)
            block = self.block_of.masked_fill(~there, blocks)
            ours = torch.zeros_like(size, dtype=torch.bool).scatter(1, block, True)[:, :blocks]
            room = budget - classes.sum(1, keepdim=True)
            self.budgets.append((classes & (classes.cumsum(1) <= budget), ours, room))

    def select(self) -> list[ImageKV]:
        """What the next step reads of the image, in each predicted layer."""
        image_kv = []
        self.read = []                                              # the block of each token read, [B, G, m]
        for kv, history in zip(self.stored, self.history, strict=True):
            expected = self.predict(history).unflatten(1, (kv.key.shape[1], -1)).mean(2)        # [B, G, n]
            kept = self.chosen(expected)
            order, mask = kept_indices(kept)
            block = self.block_of[:, None].take_along_dim(order, 2)
            self.read.append(block if mask is None else block.masked_fill(~mask, expected.shape[-1]))
            image_kv.append(self.fetch(kv, kept))
        self.await_copies()
        return image_kv

    def predict(self, history: Tensor) -> Tensor:
        """History [B, H, h, n] -> the attention expected next [B, H, n], or at least its ranking."""
        if self.predictor != "cnn":
            return history[:, :, -1] if self.predictor == "last" else history.sum(2)
        age = torch.arange(history.shape[2], 0, -1, device=history.device)
        there = (age <= self.length[:, None])[:, :, None] & (self.size > 0)[:, None]            # [B, h, n]
        return self.network.to(history.device)(history, there)

    def chosen(self, expected: Tensor) -> Tensor:
        """Expected attention [B, G, n] -> the tokens to read [B, G, N] bool."""
        B, G, n = expected.shape
        kept = torch.zeros_like(self.block_of, dtype=torch.bool)[:, None].repeat(1, G, 1)
        for classes, ours, room in self.budgets:
            ranked = expected.masked_fill(~ours[:, None], -math.inf)
            order = ranked.argsort(dim=-1, descending=True, stable=True)
            fits = self.size[:, None].take_along_dim(order, 2).cumsum(2) <= room[:, None]
            best = kept.new_zeros(B, G, n + 1)                      # the last one stands for no block
            best = best.scatter(2, order, fits & ours[:, None].take_along_dim(order, 2))
            kept |= classes[:, None] | best.take_along_dim(self.block_of[:, None], 2)
        return kept

    def stepped(self, step: int, queries: list[Tensor], image_kv: list[ImageKV]) -> list[ImageKV]:
        for c, history in enumerate(self.history):
            q = queries[self.skip_layers + c]
            read, block = image_kv[self.skip_layers + c], self.read[c]
            if (step + 1) % self.calibrate == 0:
                read, block = self.fetch(self.stored[c]), self.block_of[:, None]
                self.await_copies()
            # A compiled step pads what it reads; the padding comes last.
            weights = attention_received(every_image(q), read)[..., :block.shape[2]]            # [B, H, m]
            block = block.repeat_interleave(q.shape[1] // block.shape[1], 1)
            newest = pool(weights, block, history.shape[3])                                     # [B, H, n]
            self.history[c] = torch.cat((history, newest[:, :, None]), 2)[:, :, -self.window:]
        self.length = (self.length + 1).clamp(max=self.window)
        return image_kv[:self.skip_layers] + self.select()

    # ----- the whole image in the CPU's memory, beside a GPU

    def fetch(self, kv: ImageKV, kept: Tensor | None = None) -> ImageKV:
        """What is kept of it, or all, where the model is; copies may be under way until `await_copies`."""
        kv = kv if kept is None else kv.take(kept.to(kv.key.device))
        return kv if self.stream is None else moved(kv, self.copy)

    def copy(self, tensor: Tensor) -> Tensor:
        """From locked memory, which the GPU reads by itself while it and the program do other things."""
        with torch.cuda.stream(self.stream):
            arriving = tensor.pin_memory().to(self.device, non_blocking=True)
        # Without this its memory might be used again while the model still reads it.
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
