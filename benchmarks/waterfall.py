"""What each optimisation of decoding gains, one after the other: `python benchmark.py --waterfall`.

Every bar is the time of one greedy decode step; all are measured in turns. The first is transformers,
eager. The next is this project's eager step with everything put back that its optimisations removed, as
real work in every step: `torch.cat` allocates the text cache again with one token more, in every layer; the
keys and values of every layer, text and image, are repeated for all query heads that share them; the
image's keys and values are those of all tile slots, with a mask, and attention reads them. Then each of
these is left out in turn, the step is compiled, and last the image is pruned. Optimisations of the encoder
and of prefill are not in it.
B batch, G key/value heads, N image tokens.
"""
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import in_turns
from benchmarks.peer import Peer
from benchmarks.subject import Subject
from model.answer import Answer
from model.cache import Cache
from model.image_tokens import ImageKV
from model.llama_vision import LlamaVision
from pruning import Pruner

WARM_UP_STEPS = 3                               # that a CUDA graph needs before it is fast


@dataclass
class PutBack:
    """`model.decode` that also does the work which these optimisations removed."""
    model: LlamaVision
    length: int                                 # text tokens in the cache of each sequence
    grow: bool = False                          # the text cache is allocated again with one token more
    repeat: bool = False                        # keys and values are repeated for all query heads

    def __call__(self, tokens: Tensor, cache: Cache) -> Tensor:
        texts = [t[:, :, :self.length] for t in cache.text_keys + cache.text_values]
        if self.grow:
            texts = [torch.cat((t, t[:, :, -1:]), dim=2) for t in texts]
        if self.repeat:
            text = self.model.config.text
            share = text.num_attention_heads // text.num_key_value_heads
            for t in texts + [t for kv in cache.image_kv for t in (kv.key, kv.value)]:
                t.repeat_interleave(share, dim=1)
        self.length += 1
        return self.model.decode(tokens, cache)


class AllSlots(Pruner):
    """Puts back the keys and values of unused tiles, up to `slots` tokens of each image."""
    keeps_all = False                           # so that its hooks are called

    def __init__(self, slots: int):
        super().__init__()
        self.slots = slots

    def prefilled(self, image_kv: list[ImageKV]) -> list[ImageKV]:
        return [all_slots(kv, self.slots) for kv in image_kv]


def all_slots(kv: ImageKV, slots: int) -> ImageKV:
    """With keys and values of unused tiles, up to `slots` tokens. A bias hides them: a mask drops them."""
    B, _, N, _ = kv.key.shape
    key, value = (F.pad(t, (0, 0, 0, slots - N)) for t in (kv.key, kv.value))       # [B, G, slots, d]
    coords = F.pad(kv.coords, (0, 0, 0, slots - N), value=-1)
    unused = torch.arange(slots, device=key.device) >= N
    bias = torch.zeros(slots, device=key.device).masked_fill(unused, -torch.inf)
    return replace(kv, key=key, value=value, coords=coords, bias=bias.expand(B, 1, -1))     # [B, 1, slots]


def waterfall(subject: Subject, peer: Peer | None, pruner: Pruner, batch: int, tiles: int, prompt_tokens: int,
              new_tokens: int, repeat: int) -> list[dict]:
    """The bars `{step, ms, gain}`: milliseconds of a decode step, and those of the bar before over these."""
    jobs = answers(subject, peer, pruner, batch, tiles, prompt_tokens, new_tokens)
    samples = in_turns(jobs, repeat, warm_up_rounds(new_tokens), "waterfall")
    times = {name: statistics.median(answer.ms["decode"] for answer in samples[name]) / new_tokens
             for name in samples}
    bars = []
    before = None
    for name, ms in times.items():
        bars.append({"step": name, "ms": ms, "gain": None if before is None else before / ms})
        before = ms
    return bars


def answers(subject: Subject, peer: Peer | None, pruner: Pruner, batch: int, tiles: int, prompt_tokens: int,
            new_tokens: int) -> dict[str, Callable[[], Answer]]:
    """The job of each bar."""
    model = subject.model
    view = subject.tiles(tiles, Pruner())
    ids = subject.prompt(batch, prompt_tokens)
    image = model.encode([view])
    slots = subject.config.vision.max_num_tiles * subject.config.vision.tokens_per_tile

    def put_back(pruner: Pruner | None, grow: bool, repeat: bool) -> Answer:
        decode = PutBack(model, prompt_tokens, grow, repeat)
        return subject.answer(ids, image, new_tokens, pruner, decode)

    jobs = {}
    if peer is not None:
        jobs[f"transformers {peer.version}, eager"] = partial(
            subject.peer_answer, peer, ids, peer.encode(view), new_tokens)
    jobs["this project, everything put back"] = partial(put_back, AllSlots(slots), grow=True, repeat=True)
    jobs["keys and values not repeated"] = partial(put_back, AllSlots(slots), grow=True, repeat=False)
    jobs["real tiles only"] = partial(put_back, None, grow=True, repeat=False)
    jobs["static text cache"] = partial(subject.answer, ids, image, new_tokens)
    jobs["compiled"] = partial(subject.answer, ids, image, new_tokens, decode=subject.compiled())
    smaller = model.encode([subject.tiles(tiles, pruner)], pruner.keep_states)
    jobs[f"pruned ({pruner})"] = partial(subject.answer, ids, smaller, new_tokens, pruner, subject.compiled())
    return jobs


def warm_up_rounds(new_tokens: int) -> int:
    """Rounds before those that count: enough for WARM_UP_STEPS decode steps."""
    return -(-WARM_UP_STEPS // new_tokens)
