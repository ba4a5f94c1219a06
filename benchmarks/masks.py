"""What attention to the image costs with a mask or a bias: part of `python benchmark.py --whole P`.

`model.layers.attend` as the model calls it: with no mask, with one that is True where a query may look, and
with the bias of each image token, which is added to its scores.
"""
import statistics
from functools import partial

import torch

from benchmarks.measure import times_in_turns
from benchmarks.subject import Subject
from model.layers import attend

DTYPES = torch.bfloat16, torch.float32
ROUNDS = 5                              # for each round of other jobs: these are short


def masks(subject: Subject, tiles: list[int], positions: int, repeat: int) -> list[dict]:
    """A row for each dtype, for so many query positions and for one, and for all image tokens of so many
    tiles and a tenth of them: milliseconds, medians."""
    whole = [count * subject.config.vision.tokens_per_tile for count in tiles]
    tokens = sorted({max(1, n // part) for n in whole for part in (1, 10)})
    return [row(subject, dtype, T, N, ROUNDS * repeat)
            for dtype in DTYPES for T in (positions, 1) for N in tokens]


def row(subject: Subject, dtype: torch.dtype, T: int, N: int, repeat: int) -> dict:
    c, device = subject.config.text, subject.device
    generator = torch.Generator(device).manual_seed(0)
    noise = partial(torch.randn, generator=generator, device=device)
    q = noise(1, T, c.num_attention_heads, c.head_dim).to(dtype).transpose(1, 2)        # [1, H, T, d]
    k, v = (noise(1, c.num_key_value_heads, N, c.head_dim).to(dtype) for _ in range(2))
    bias = noise(1, 1, 1, N).to(dtype)
    kinds = {"none": None, "mask": bias < 2, "bias": bias}
    jobs = {kind: partial(attend, q, k, v, mask) for kind, mask in kinds.items()}
    times = times_in_turns(jobs, repeat, device, f"masks: {T} query positions, {N} image tokens")
    return {"dtype": str(dtype).removeprefix("torch."), "positions": T, "tokens": N,
            **{f"{kind}_ms": statistics.median(ms) for kind, ms in times.items()}}
