"""What weights in fewer bits gain: `python benchmark.py --shape 11b --layers 5 --quantize int8,int4`.

The same model in full and in each way, and transformers if it is asked for, answer the same question about an
image in turns, in one process. Prefill and a decoded token are medians. `difference` is how far the logits
after the prompt are from those of the weights in full, relative to them: with random weights, the worst case.
"""
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from benchmarks.measure import in_turns
from benchmarks.parts import COMPILED, EAGER, PEER
from benchmarks.peer import Peer
from benchmarks.same import compiled_beside_plain, graphs_made
from benchmarks.subject import Subject
from benchmarks.waterfall import warm_up_rounds
from model.answer import Answer
from model.llama_vision import LlamaVision
from pruning import Pruner
from weights.quantized_layers import bytes_of, fill, quantized_layers
from weights.skeleton import without_weights

FULL = "in full"
WHOLE = str(Pruner())

Key = tuple[str, str, str]                      # whose weights, how it decodes, which method


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
    copy = without_weights(model.config)
    found = {name: InMemory(tensor) for name, tensor in model.state_dict().items()}
    layers = quantized_layers(copy, found, way, model.device, model.dtype)
    state = {name: stored.tensor for name, stored in found.items() if name not in layers}
    for name, layer in layers.items():
        fill(layer, found[name], model.device, model.device, model.dtype)
        state |= layer.named_buffers(name.removesuffix(".weight"))
    copy.load_state_dict(state, assign=True)
    return copy.eval().requires_grad_(False)


class Quantized:
    """The same model in full and in each way, and transformers in full, to be measured in turns, about an
    image of so many tiles. The first of the `pruners` keeps everything."""

    def __init__(self, subject: Subject, ways: Sequence[str], pruners: Sequence[Pruner], peer: Peer | None,
                 compiled: bool, copy_bytes_per_s: float, tiles: int):
        self.subject = subject
        self.tiles = tiles
        self.subjects = {FULL: subject}
        for way in ways:
            model = quantized_copy(subject.model, way)
            self.subjects[way] = Subject(model, subject.generate, subject.shape, subject.complete)
        self.pruners = {str(pruner): pruner for pruner in pruners}
        self.peer = peer
        self.decoders = {(way, name): each.compiled() for way, each in self.subjects.items()
                         for name in self.pruners if compiled}
        self.copy_bytes_per_s = copy_bytes_per_s
        # By the tower in full, for each method.
        self.images = {name: subject.model.encode([subject.tiles(tiles, pruner)], pruner.keep_states)
                       for name, pruner in self.pruners.items()}
        self.peer_image = None if peer is None else peer.encode(subject.tiles(tiles, Pruner()))

    def measure(self, batch: int, prompt_tokens: int, new_tokens: int, repeat: int) -> list[dict]:
        """A row for the weights in full and in each way, with each method, and for transformers."""
        ids = self.subject.prompt(batch, prompt_tokens)
        jobs: dict[Key, Callable[[], Answer]] = {}
        for way, each in self.subjects.items():
            for name, pruner in self.pruners.items():
                ask = partial(each.answer, ids, self.images[name], new_tokens, pruner)
                jobs[way, EAGER, name] = ask
                if self.decoders:
                    jobs[way, COMPILED, name] = partial(ask, decode=self.decoders[way, name])
        if self.peer is not None:
            jobs[PEER, EAGER, WHOLE] = partial(self.subject.peer_answer, self.peer, ids, self.peer_image,
                                               new_tokens)
        rounds = in_turns(jobs, repeat, warm_up_rounds(new_tokens), f"batch {batch}: answers in turns")
        image = self.images[WHOLE].expand(batch)
        logits = {way: each.model.prefill(ids, [prompt_tokens] * batch, image, 1)[0]
                  for way, each in self.subjects.items()}
        return [{"batch": batch, "tiles": self.tiles, **self.row(job, new_tokens, answers, logits)}
                for job, answers in rounds.items()]

    def row(self, job: Key, new_tokens: int, answers: list[Answer], logits: dict[str, Tensor]) -> dict:
        way, how, name = job
        batch = len(answers[0].tokens)
        held = self.subjects.get(way, self.subject)
        token = statistics.median(answer.ms["decode"] for answer in answers) / new_tokens
        weights = held.linears_alone(batch, 1)[1]
        read = weights + answers[-1].image_kv_bytes + answers[-1].text_kv_bytes
        return {"weights": way, "how": how, "pruner": None if name == WHOLE else name,
                "bytes": bytes_of(held.model), "read_bytes": weights,
                "prefill_ms": statistics.median(answer.ms["prefill"] for answer in answers),
                "token_ms": token, "tokens_per_second": batch / token * 1000,
                "fraction_of_ceiling": read / token * 1000 / self.copy_bytes_per_s,
                "difference": relative(logits[way], logits[FULL]) if way in logits else None}

    def compare(self, batch: int, prompt_tokens: int, new_tokens: int) -> list[dict]:
        """Whether compiled decoding gives what plain decoding gives, and how many graphs there are by now."""
        ids = self.subject.prompt(batch, prompt_tokens)
        graphs = graphs_made()
        rows = []
        for (way, name), decode in self.decoders.items():
            same = compiled_beside_plain(self.subjects[way], ids, self.images[name], new_tokens,
                                         self.pruners[name], decode)
            rows.append({"batch": batch, "tiles": self.tiles, "weights": way,
                         "pruner": None if name == WHOLE else name, "graphs": graphs, **same})
        return rows


def relative(logits: Tensor, full: Tensor) -> float:
    return ((logits - full).norm() / full.norm()).item()
