"""The last step of the data flow: logits become the next token, and the token comes to the host."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Sampler:
    """Greedy at temperature 0; else it draws from the `top_k` likeliest tokens (0: from all of them), without
    those that Meta's top-p rule leaves out: a token goes if likelier ones together have more than `top_p`.

    Every sequence draws from its own generator, seeded alike, so a batch gives what each prompt gives alone.
    A `repetition_penalty` above 1 makes tokens of the prompt and of the answer less likely: see `after`.
    """
    temperature: float = 0.0
    top_p: float = 0.9
    seed: int = 0
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}, but must be 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p is {self.top_p}, but must be above 0 and at most 1")
        if not 0 <= self.top_k < 2 ** 63:
            raise ValueError(f"top-k is {self.top_k}, but must be a number of tokens, or 0 for all")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise ValueError(f"repetition-penalty is {self.repetition_penalty}, but must be 1 (none), up to "
                             "100 for fewer repetitions or down to 0.01 for more")
        if not -2 ** 63 <= self.seed < 2 ** 63:
            raise ValueError(f"seed is {self.seed}, but must be a number of 64 bits")
        self.generators: list[torch.Generator] = []

    def after(self, prompts: list[list[int]]) -> Callable[[Tensor], Tensor]:
        """What samples the answers to these prompts, one call for each step; for one call of `generate`."""
        return self if self.repetition_penalty == 1 else Penalised(self, prompts)

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits [B, V] -> tokens [B]. Raises ValueError if there is a penalty: `after` knows the prompts."""
        if self.repetition_penalty != 1:
            raise ValueError("a repetition penalty needs the prompts: pass sampler.after(prompts)")
        return self.draw(logits)

    def draw(self, logits: Tensor) -> Tensor:
        """Logits [B, V], after any penalty -> tokens [B]."""
        if self.temperature == 0:
            return logits.argmax(-1)
        while len(self.generators) < len(logits):
            self.generators.append(torch.Generator().manual_seed(self.seed))
        draws = torch.stack([torch.rand(1, generator=g) for g in self.generators[:len(logits)]])     # [B, 1]
        below = logits - logits.amax(-1, keepdim=True)      # at most 0, so that no temperature overflows
        scores = below / max(self.temperature, 1e-30)
        if 0 < self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k).values[:, -1:]                              # [B, 1]
            scores = scores.masked_fill(scores < least, -torch.inf)
        p, order = scores.softmax(-1).sort(descending=True, stable=True)
        mass = p.masked_fill(p.cumsum(-1) - p > self.top_p, 0).cumsum(-1)
        place = torch.searchsorted(mass, draws.to(mass.device) * mass[:, -1:], right=True)
        return order.gather(-1, place.clamp(max=order.shape[-1] - 1))[:, 0]


class Penalised:
    """A sampler for the answers to some prompts, with the repetition penalty of CTRL (Keskar et al. 2019,
    arXiv 1909.05858): the logit of a token that occurred is divided by it if above 0, else multiplied.

    A token counts once, however often it occurred, and only in its own sequence; one without a logit, as
    `<|image|>`, does not count.
    """

    def __init__(self, sampler: Sampler, prompts: list[list[int]]):
        self.sampler = sampler
        self.prompts = prompts
        self.occurred: Tensor | None = None                 # [B, V] bool

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits [B, V] -> tokens [B]."""
        if self.occurred is None:
            self.occurred = torch.zeros(logits.shape, dtype=torch.bool)
            for sequence, prompt in zip(self.occurred, self.prompts, strict=True):
                sequence[[token for token in prompt if token < len(sequence)]] = True
            self.occurred = self.occurred.to(logits.device)
        penalty = self.sampler.repetition_penalty
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        tokens = self.sampler.draw(torch.where(self.occurred, penalised, logits))
        self.occurred.scatter_(1, tokens[:, None], True)
        return tokens


GREEDY = Sampler()
NOT_FINITE = -1             # stands for a token whose logits are not finite


def limits_of(max_new_tokens: int | Sequence[int], sequences: int) -> list[int]:
    """How many tokens each answer of a batch may have, from one number for all or one for each, [B].

    Raises ValueError if there are more or fewer numbers than sequences.
    """
    if not isinstance(max_new_tokens, (list, tuple)):
        return [max_new_tokens] * sequences
    if len(max_new_tokens) != sequences:
        raise ValueError(f"max_new_tokens has {len(max_new_tokens)} numbers for {sequences} prompts: give "
                         "one for each, or one for all")
    return list(max_new_tokens)


class Transcript:
    """The answers as they grow: new tokens come to the host, are checked, recorded and handed to `emit`,
    which ends an answer if it returns True. An answer ends, too, when it has as many tokens as its limit.

    On a GPU the tokens of a step are read when the next step has been started, so that it never waits for
    them. `tokens` has the answers without their stop tokens; `decoded` counts the tokens that decode steps
    made, stop tokens included.
    """

    def __init__(self, sequences: int, stop_ids: tuple[int, ...], emit: Callable[[int, int], bool | None],
                 device: torch.device, limits: Sequence[int] | None = None):
        self.tokens: list[list[int]] = [[] for _ in range(sequences)]
        self.decoded = 0
        self.running = set(range(sequences))
        self.limits = limits
        self.stop_ids = stop_ids
        self.emit = emit
        self._lag = 1 if device.type == "cuda" else 0
        self._steps = 0
        self._arriving: list[tuple[Tensor, torch.cuda.Event | None]] = []

    @property
    def ended(self) -> bool:
        """Whether every answer is known to have ended."""
        return not self.running

    def push(self, tokens: Tensor, logits: Tensor):
        """The next token of every sequence [B], and the logits [B, V] that it was sampled from.

        Raises ValueError if those of an answer that goes on are not finite.
        """
        finite = logits.isfinite().all(-1)
        marked = torch.where(finite, tokens.to(finite.device), NOT_FINITE)
        host = marked.to("cpu", non_blocking=True)
        event = torch.cuda.Event() if marked.is_cuda else None
        if event:
            event.record()
        self._arriving.append((host, event))
        while len(self._arriving) > self._lag:
            self._read(*self._arriving.pop(0))

    def finish(self) -> "Transcript":
        """Read what is still on its way."""
        for host, event in self._arriving:
            self._read(host, event)
        self._arriving = []
        return self

    def _read(self, host: Tensor, event: "torch.cuda.Event | None"):
        if event:
            event.synchronize()
        self.decoded += len(self.running) if self._steps else 0         # the first tokens come from prefill
        self._steps += 1
        for sequence, token in enumerate(host.tolist()):
            if sequence not in self.running:
                continue
            if token == NOT_FINITE:
                raise ValueError("the model's logits are not finite: fp16 overflows where bf16 and fp32 do "
                                 "not (choose another dtype), or its weights hold NaN or infinity")
            if token in self.stop_ids:
                self.running.remove(sequence)
            else:
                self.tokens[sequence].append(token)
                ends = self.emit(sequence, token) is True
                if ends or self.limits and len(self.tokens[sequence]) >= self.limits[sequence]:
                    self.running.remove(sequence)
