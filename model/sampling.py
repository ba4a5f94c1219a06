"""The last step of the data flow: logits become the next token, and the token comes to the host."""
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Sampler:
    """Greedy at temperature 0; else Meta's top-p rule: a token goes if likelier ones hold more than `top_p`.

    Every row draws from its own generator, seeded alike, so that a batch gives what each prompt gives alone.
    """
    temperature: float = 0.0
    top_p: float = 0.9
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}, but must be 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p is {self.top_p}, but must be above 0 and at most 1")
        if not -2 ** 63 <= self.seed < 2 ** 63:
            raise ValueError(f"seed is {self.seed}, but must be a number of 64 bits")
        self.generators: list[torch.Generator] = []

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits [B, V] -> tokens [B]."""
        if self.temperature == 0:
            return logits.argmax(-1)
        while len(self.generators) < len(logits):
            self.generators.append(torch.Generator().manual_seed(self.seed))
        draws = torch.stack([torch.rand(1, generator=g) for g in self.generators[:len(logits)]])     # [B, 1]
        below = logits - logits.amax(-1, keepdim=True)      # at most 0, so that no temperature overflows
        p, order = (below / max(self.temperature, 1e-30)).softmax(-1).sort(descending=True, stable=True)
        mass = p.masked_fill(p.cumsum(-1) - p > self.top_p, 0).cumsum(-1)
        place = torch.searchsorted(mass, draws.to(mass.device) * mass[:, -1:], right=True)
        return order.gather(-1, place.clamp(max=order.shape[-1] - 1))[:, 0]


GREEDY = Sampler()


class Arriving:
    """Tokens [B] on their way from the device, copied as soon as they are there."""

    def __init__(self, tokens: Tensor):
        self.tokens = tokens.to("cpu", non_blocking=True)
        self.there = torch.cuda.Event() if tokens.is_cuda else None
        if self.there:
            self.there.record()

    def read(self) -> list[int]:
        """Waits for them, but not for what the device was given to do since."""
        if self.there:
            self.there.synchronize()
        return self.tokens.tolist()


def one_ahead(steps: Iterator[Arriving]) -> Iterator[Arriving]:
    """The same steps, each when the next one has been started: a GPU works on while its tokens are read."""
    before = next(steps)
    for step in steps:
        yield before
        before = step
    yield before
