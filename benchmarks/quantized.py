"""What weights in fewer bits gain: `python benchmark.py --shape 11b --layers 5 --quantize int8,int4`.

The same model in full and in each way, and transformers if it is asked for, answer the same question about an
image in turns, in one process. Prefill and a decoded token are medians. `difference` is how far the logits
after the prompt are from those of the weights in full, relative to them: with random weights, the worst case.
"""
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import in_turns
from benchmarks.peer import Peer
from benchmarks.subject import Subject
from benchmarks.waterfall import warm_up_rounds
from model.answer import Answer
from model.llama_vision import LlamaVision
from pruning import Pruner
from weights.quantized_layers import fill, quantized_layers

FULL = "in full"


@dataclass
class InMemory:
    """What a quantised layer is made from: a parameter of a model."""
    tensor: Tensor
    layer = None

    def read(self) -> Tensor:
        return self.tensor

    def codes(self) -> None:
        """Nothing is stored in fewer bits."""

    def forget(self):
        """It stays where it is."""


def quantized_copy(model: LlamaVision, way: str) -> LlamaVision:
    """The same model with its linear layers in fewer bits; all other weights are shared."""
    with torch.device("meta"):
        copy = LlamaVision(model.config)
    found = {name: InMemory(tensor) for name, tensor in model.state_dict().items()}
    layers = quantized_layers(copy, found, way, model.device, model.dtype)
    state = {name: stored.tensor for name, stored in found.items() if name not in layers}
    for name, layer in layers.items():
        fill(layer, found[name], model.device, model.device, model.dtype)
        state |= layer.named_buffers(name.removesuffix(".weight"))
    copy.load_state_dict(state, assign=True)
    return copy.eval().requires_grad_(False)


def quantized(subject: Subject, ways: Sequence[str], peer: Peer | None, compiled: bool, batch: int,
              tiles: int, prompt_tokens: int, new_tokens: int, repeat: int) -> list[dict]:
    """A row for the weights in full, for each way, and for transformers in full."""
    model = subject.model
    subjects = {FULL: subject}
    for way in ways:
        subjects[way] = Subject(quantized_copy(model, way), subject.generate, subject.shape, subject.complete)
    ids = subject.prompt(batch, prompt_tokens)
    view = subject.tiles(tiles, Pruner())
    image = model.encode([view])                        # by the tower in full
    jobs: dict[tuple[str, str], Callable[[], Answer]] = {}
    for way, each in subjects.items():
        ask = partial(each.answer, ids, image, new_tokens)
        jobs[way, "eager"] = ask
        if compiled:
            jobs[way, "compiled"] = partial(ask, decode=each.compiled())
    if peer is not None:
        jobs["transformers", "eager"] = partial(subject.peer_answer, peer, ids, peer.encode(view), new_tokens)
    rounds = in_turns(jobs, repeat, warm_up_rounds(new_tokens), "answers in turns")
    times = {job: {part: statistics.median(answer.ms[part] for answer in answers)
                   for part in ("prefill", "decode")} for job, answers in rounds.items()}
    logits = {way: each.model.prefill(ids, [prompt_tokens] * batch, image.expand(batch), 1)[0]
              for way, each in subjects.items()}
    rows = []
    for way, how in jobs:
        held = subjects.get(way, subject)
        rows.append({
            "weights": way, "how": how, "bytes": bytes_of(held.model),
            "read_bytes": held.linears_alone(batch, 1)[1],
            "prefill_ms": times[way, how]["prefill"], "token_ms": times[way, how]["decode"] / new_tokens,
            "difference": relative(logits[way], logits[FULL]) if way in logits else None})
    return rows


def bytes_of(model: LlamaVision) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def relative(logits: Tensor, full: Tensor) -> float:
    return ((logits - full).norm() / full.norm()).item()
