"""What each lever of decoding gains, one after the other: `python benchmark.py --waterfall`.

Every bar is a measured time of one greedy step; all are timed in turns. The first is transformers, eager. The
next is this project's plain step with everything put back that its levers removed, as real work in every
step: `torch.cat` makes the text cache anew with one token more, in every layer; the keys and values of every
layer, text and image, are repeated for all query heads that share them; the image's keys and values are those
of all tile slots, with a mask, and attention reads them. Then each of these is left out in turn, the step is
compiled, and last the image is pruned. Not in it: the levers of the encoder and of prefill.
B batch, G key/value heads, N image tokens.
"""
import statistics
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import in_turns
from benchmarks.peer import Peer
from benchmarks.subject import Greedy, Subject, grid_of
from model.cache import Cache
from model.image_tokens import ImageKV
from model.llama_vision import LlamaVision
from pruning import Pruner


@dataclass
class PutBack:
    """`model.decode` that also does what a step without these levers would."""
    model: LlamaVision
    held: int                                   # text tokens in the cache, for each row
    grow: bool = False                          # the text cache is made anew with one token more
    repeat: bool = False                        # keys and values are repeated for all query heads

    def __call__(self, tokens: Tensor, cache: Cache) -> Tensor:
        texts = [t[:, :, :self.held] for t in cache.keys + cache.values]
        if self.grow:
            texts = [torch.cat((t, t[:, :, -1:]), dim=2) for t in texts]
        if self.repeat:
            text = self.model.config.text
            share = text.num_attention_heads // text.num_key_value_heads
            for t in texts + [t for kv in cache.image_kv for t in (kv.key, kv.value)]:
                t.repeat_interleave(share, dim=1)
        self.held += 1
        return self.model.decode(tokens, cache)


def all_slots(kv: ImageKV, slots: int) -> ImageKV:
    """With masked keys and values of unused tiles, up to `slots` tokens."""
    B, _, N, _ = kv.key.shape
    key, value = (F.pad(t, (0, 0, 0, slots - N)) for t in (kv.key, kv.value))
    real = torch.arange(slots, device=key.device) < N
    return replace(kv, key=key, value=value, mask=real.expand(B, 1, -1))


def waterfall(subject: Subject, peer: Peer | None, pruner: Pruner, batch: int, tiles: int, prompt_tokens: int,
              new_tokens: int, repeat: int) -> list[dict]:
    """The bars `{step, ms, gain}`: milliseconds of a decoded token (of each row), and how many times as fast
    as the bar before."""
    model, views = subject.model, subject.tiles(tiles, Pruner())
    ids, image = subject.prompt(batch, prompt_tokens), model.encode([views])
    slots = subject.config.vision.max_num_tiles * subject.config.vision.tokens_per_tile
    pieces, each, warm_up, room = pace(new_tokens, repeat)
    whole, jobs = Pruner(), {}
    if peer is not None:
        logits, cache = peer.prefill(ids, peer.encode(views), [grid_of(subject.config.vision, tiles)], room)
        jobs[f"transformers {peer.version}, eager"] = Greedy(peer.decode, logits, cache, each)
    for name, padded, lever in (
            ("this project, everything put back", True, PutBack(model, prompt_tokens, True, repeat=True)),
            ("keys and values not repeated", True, PutBack(model, prompt_tokens, True)),
            ("real tiles only", False, PutBack(model, prompt_tokens, True)),
            ("static text cache", False, model.decode)):
        logits, cache = subject.read(ids, image, room, whole)
        if padded:
            cache.image_kv = [all_slots(kv, slots) for kv in cache.image_kv]
        jobs[name] = Greedy(lever, logits, cache, each)
    for name, keeps in ("compiled", whole), (f"pruned ({pruner})", pruner):
        logits, cache = subject.read(ids, model.encode([subject.tiles(tiles, keeps)]), room, keeps)
        jobs[name] = Greedy(subject.compiled(), logits, cache, each, keeps)
    samples = in_turns(jobs, pieces, subject.device, warm_up)
    times = {name: statistics.median(ms) / each for name, ms in samples.items()}
    before = [None, *times.values()]
    return [{"step": name, "ms": ms, "gain": None if last is None else last / ms}
            for (name, ms), last in zip(times.items(), before, strict=False)]


def pace(new_tokens: int, repeat: int) -> tuple[int, int, int, int]:
    """How decoding is timed: in `repeat` pieces of tokens, or one token each where there are too few; the
    pieces before that to warm up, with three tokens at least, as CUDA graphs need; and room for all."""
    pieces = min(repeat, new_tokens)
    each = new_tokens // pieces
    warm_up = -(-3 // each)
    return pieces, each, warm_up, (pieces + warm_up) * each
