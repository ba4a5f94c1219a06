"""What every rank checks for test_over_ranks.py: each method over the ranks, beside the method alone."""
from dataclasses import dataclass, field
from pathlib import Path

import torch
from helpers import close, random_tiles
from torch import Tensor

from generate import generate
from model.answer import Answer
from model.cache import Cache
from model.image_tokens import ImageKV
from model.llama_vision import LlamaVision
from pruning import Pruner, load
from pruning.over_ranks import over_ranks
from weights import load_model
from weights.ranks import Ranks, join, leave

FP32 = 1e-4
STEPS = 3
Sets = list[list[set]]                      # of every sequence that sees an image, and of every KV head


@dataclass
class Watched:
    """One call of generate(): its logits [steps, B, V], and what every layer kept at each step."""
    answer: Answer
    logits: list[Tensor] = field(default_factory=list)
    kept: list[list[Sets]] = field(default_factory=list)


def every_method(folder: Path, cases: list[tuple[str, dict]], prompts: list[list[int]], grids: list):
    ranks = join("cpu")
    models = load_model(folder), load_model(folder, ranks=ranks)
    vision = models[0].config.vision
    tiles = [random_tiles(own, vision, seed=b) if own else None for b, own in enumerate(grids)]
    images = [model.encode(tiles, keep_states=True) for model in models]
    for method, options in cases:
        alone = watched(models[0], load(method, **options), Ranks(), prompts, images[0], STEPS)
        shared = watched(models[1], load(method, **options), ranks, prompts, images[1], STEPS)
        compare(alone, shared, ranks, f"{method} {options}", load(method, **options).merges)
    leave()


def watched(model: LlamaVision, pruner: Pruner, ranks: Ranks, prompts: list[list[int]], image,
            steps: int) -> Watched:
    seen = Watched(None)

    def sample(logits: Tensor) -> Tensor:
        seen.logits.append(logits)
        return logits.argmax(-1)

    def decode(tokens: Tensor, cache: Cache) -> Tensor:
        looking = torch.ones_like(tokens) if cache.sees_image is None else cache.sees_image.flatten()
        seen.kept.append([[sets(kv, b) for b in looking.nonzero()[:, 0].tolist()] for kv in cache.image_kv])
        return model.decode(tokens, cache)
    pruner = over_ranks(pruner, ranks)
    seen.answer = pruner.around(generate)(model, prompts, image, steps, (), sample, lambda b, token: None,
                                          pruner, decode)
    return seen


def sets(kv: ImageKV, b: int) -> list[set]:
    """The coords of the tokens that each KV head of sequence b sees."""
    heads = kv.key.shape[1]
    mask = torch.ones(kv.key.shape[:3], dtype=torch.bool) if kv.mask is None else kv.mask
    coords, mask = kv.coords[b].expand(heads, -1, -1), mask[b].expand(heads, -1)
    return [{tuple(place) for place in own[real].tolist()} for own, real in zip(coords, mask, strict=True)]


def compare(alone: Watched, shared: Watched, ranks: Ranks, name: str, merges: bool):
    """The same tokens and logits, and what is kept; but which of several tokens gives a merged one its coords
    may be decided by rounding."""
    assert shared.answer.tokens == alone.answer.tokens, name
    assert shared.answer.kept == alone.answer.kept, name
    assert shared.answer.early == alone.answer.early, name
    close(torch.stack(shared.logits), torch.stack(alone.logits), FP32)
    for ours, theirs in zip(shared.kept, alone.kept, strict=True):              # of each step
        for layer, whole in zip(ours, theirs, strict=True):
            heads = ranks.part(torch.arange(len(whole[0])), 0).tolist()
            assert merges or layer == [[each[h] for h in heads] for each in whole], name
    # Heads of one rank are padded to the longest of them, not to the longest of all.
    assert 0 < sum(ranks.each(shared.answer.image_kv_bytes)) <= alone.answer.image_kv_bytes, name
