"""Whether the compiled decode step gives what the plain one gives, and how many graphs were made.

Both read the same prompts and then the same tokens, those that the plain step finds likeliest, so that one
different token cannot make all later ones differ.
B sequences, V vocabulary.
"""
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.subject import Decode, Subject
from model.image_tokens import ImageTokens
from pruning import Pruner


class Recorder:
    """A sampler that keeps all logits. It gives the likeliest tokens, or those of a `script`."""

    def __init__(self, script: list[Tensor] | None = None):
        self.script = script
        self.logits: list[Tensor] = []          # of each step [B, V]

    def __call__(self, logits: Tensor) -> Tensor:
        self.logits.append(logits.clone())      # a CUDA graph writes the next ones in the same place
        return logits.argmax(-1) if self.script is None else self.script[len(self.logits) - 1]


def graphs_made() -> int:
    """Graphs that were compiled so far in this process."""
    return counters["stats"]["unique_graphs"]


def compiled_beside_plain(subject: Subject, ids: Tensor, image: ImageTokens, new_tokens: int, pruner: Pruner,
                          compiled: Decode) -> dict[str, float | int]:
    """How far the logits of both are apart, beside their standard deviation, and in how many of the decoded
    tokens they agree."""
    plain = Recorder()
    subject.answer(ids, image, new_tokens, pruner, sample=plain)
    tokens = [logits.argmax(-1) for logits in plain.logits]
    other = Recorder(tokens)
    subject.answer(ids, image, new_tokens, pruner, compiled, sample=other)
    pairs = list(zip(plain.logits, other.logits, strict=True))[1:]          # the first ones come from prefill
    return {"max_difference": max((a - b).abs().max().item() for a, b in pairs),
            "std": plain.logits[-1].std().item(),
            "equal_tokens": sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs),
            "tokens": len(pairs) * len(ids)}
