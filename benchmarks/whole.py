"""What methods cost and save in the complete model, from a slice of it: `python benchmark.py --whole P,...`.

Encoder layers are alike, and so are the layers of each kind in the decoder: what one more costs is measured,
and counted as often as the complete model has it. Layers after the second cross-attention layer count like
the second, so the slice has to have two. A method's own work is that of its hooks; what it saves in prefill
are keys and values that no layer makes. Its peak memory is that of the tensors in one of its hooks. Each
answer has a pruner of its own, so nothing that it remembers of the image helps.

What a method does may depend on how the image tokens lie. So there are two kinds: `normal`, random numbers
that are all equally unlike each other, and `smooth`, in each tile a random field of `COARSE` x `COARSE`
numbers a channel, enlarged to all patches, and noise. B batch, N image tokens, D model width.
"""
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Allocated, in_turns, timed
from benchmarks.methods import for_random_weights, labels_of
from benchmarks.subject import Subject, depths
from benchmarks.timed import Timed
from cli.terminal import Progress
from model.image_tokens import ImageKV, ImageTokens, Queries
from model.vision import Layout
from pruning import Pruner

COARSE = 6                              # numbers in a row of a smooth field
NOISE = 0.3                             # its standard deviation; that of the field is 1
SHORT = 5                               # how often short jobs are timed in a round: their median counts


class Watched(Timed):
    """Also counts the image tokens that each layer makes keys and values of, those that it attends to, and
    the bytes that it caches."""

    def __init__(self, inner: Pruner, device: torch.device):
        super().__init__(inner, device)
        self.projected: list[int] = []
        self.attended: list[int] = []
        self.cached: list[int] = []

    def layer(self, i: int, queries: Queries, image: ImageTokens, kv: ImageKV) -> tuple[ImageTokens, ImageKV]:
        self.projected.append(kv.key.shape[2])
        image, kv = super().layer(i, queries, image, kv)
        self.attended.append(kv.key.shape[2])
        return image, kv

    def prefilled(self, image_kv: list[ImageKV]) -> list[ImageKV]:
        image_kv = super().prefilled(image_kv)
        self.cached = [kv.key.nbytes + kv.value.nbytes for kv in image_kv]
        return image_kv


class Peak(Watched):
    """Instead of the time that hooks take, the most bytes of tensors that one of them makes at a time."""
    bytes = 0

    def _time(self, part: str, hook: Callable):
        with Allocated() as allocated:
            result = hook()
        self.bytes = max(self.bytes, allocated.peak)
        return result


def whole(subject: Subject, pruners: list[Pruner], tiles: list[int], prompt_tokens: int, new_tokens: int,
          repeat: int, random: bool) -> list[dict]:
    """A row for each number of tiles, each kind of image tokens and each method; the first prunes nothing.

    Raises ValueError if the slice has too few layers.
    """
    if depths(subject.config)[0] < min(2, depths(subject.complete)[0]):
        raise ValueError("--whole: the slice has one cross-attention layer; it needs two (--layers 9)")
    labels = labels_of(pruners)
    rows = []
    with TemporaryDirectory() as folder:
        if random:
            pruners = [for_random_weights(pruner, subject.config, Path(folder)) for pruner in pruners]
        for count in tiles:
            encode = complete_encode(subject, count, repeat)
            view = subject.tiles(count, Pruner())
            image = subject.model.encode([view], any(pruner.keep_states for pruner in pruners))
            for kind, features in ("normal", normal(image)), ("smooth", smooth(image)):
                parts = Parts(subject, replace(image, features=features), prompt_tokens, new_tokens)
                made = parts.rows(pruners, repeat, f"tiles {count}, {kind}")
                rows += [{"tiles": count, "features": kind, "method": label, "encode_ms": encode, **row}
                         for label, row in zip(labels, made, strict=True)]
    return rows


def complete_encode(subject: Subject, tiles: int, repeat: int) -> float:
    """Milliseconds that the complete encoder and projector take for an image of so many tiles."""
    model, c, complete = subject.model, subject.config.vision, subject.complete.vision
    encoder = model.vision_model
    slots = min(tiles + 1, c.max_num_tiles)
    layout = Layout(tiles, slots, c, subject.device)
    x = encoder.class_embedding.new_ones(1, slots * (c.tokens_per_tile + 1), c.hidden_size)
    states = x.new_ones(1, tiles * c.tokens_per_tile, c.output_dim)
    jobs = {"encode": partial(model.encode, [subject.tiles(tiles, Pruner())]),
            "layer": partial(encoder.transformer.layers[0], x, layout),
            "projector": partial(model.multi_modal_projector, states)}
    results = in_turns({name: partial(timed, job, subject.device) for name, job in jobs.items()}, repeat,
                       what=f"tiles {tiles}: encode")
    missing = (complete.num_hidden_layers + complete.num_global_layers
               - c.num_hidden_layers - c.num_global_layers)
    wider = complete.output_dim / c.output_dim - 1
    return ms(results["encode"]) + missing * ms(results["layer"]) + wider * ms(results["projector"])


class Parts:
    """Prefill and decode of one question about one image, in the slice."""

    def __init__(self, subject: Subject, image: ImageTokens, prompt_tokens: int, new_tokens: int):
        self.subject = subject
        self.image = image
        self.tokens = image.features.shape[1]
        self.new_tokens = new_tokens
        self.ids = subject.prompt(1, prompt_tokens)
        self.text = subject.prompt(1, prompt_tokens, image=False)

    def rows(self, pruners: list[Pruner], repeat: int, where: str) -> list[dict]:
        """What `whole` says of each pruner."""
        first = []
        with Progress(f"{where}: peak memory", in_file=True) as report:
            for number, pruner in enumerate(pruners):
                report(number, len(pruners))
                first.append(Peak(replace(pruner), self.subject.device))
                self.answer(first[-1], 1)
        jobs: dict = {("keys_values", n): self.keys_values(n)
                      for n in sorted({n for clock in first for n in clock.projected})}
        jobs["text"] = lambda: self.subject.answer(self.text, None, self.new_tokens).ms
        jobs["head"] = self.head()
        jobs |= {number: partial(self.measured, pruner) for number, pruner in enumerate(pruners)}
        results = in_turns(jobs, repeat, warm_up=0, what=where)
        return [self.row(pruner, first[number], results, number) for number, pruner in enumerate(pruners)]

    def answer(self, clock: Watched, new_tokens: int) -> dict[str, float]:
        """The times of an answer."""
        return self.subject.answer(self.ids, self.image, new_tokens, clock).ms

    def measured(self, pruner: Pruner) -> dict[str, float]:
        """The times of an answer, and of the own work in it."""
        clock = Watched(replace(pruner), self.subject.device)
        return {**self.answer(clock, self.new_tokens), "own": clock.ms["prefill"]}

    def keys_values(self, n: int) -> Callable[[], float]:
        """A job: the keys and values of n tokens in one layer."""
        image = ImageTokens(self.image.features[:, :n], self.image.coords[:, :n])
        layer = self.subject.model.language_model.cross_layers[0]
        return partial(often, partial(layer.keys_values, image), self.subject.device)

    def head(self) -> Callable[[], float]:
        """A job: the logits of one token."""
        head = self.subject.model.lm_head
        one = torch.ones(1, 1, head.in_features, dtype=self.subject.dtype, device=self.subject.device)
        return partial(often, partial(head, one), self.subject.device)

    def row(self, pruner: Pruner, clock: Peak, results: dict, number: int) -> dict:
        """Medians; of prefill and of a decoded token put together for the complete decoder."""
        layers = depths(self.subject.complete)[0]
        one_layer = {n: ms(results["keys_values", n]) for n in clock.projected + [self.tokens]}
        saved = sum(one_layer[self.tokens] - one_layer[n] for n in deeper(clock.projected, layers))
        head = ms(results["head"])
        token, text = (ms(results[name], "decode") / self.new_tokens for name in (number, "text"))
        prefill, text_prefill = (ms(results[name], "prefill") for name in (0, "text"))
        prefill = self.subject.complete_prefill(prefill, text_prefill, head)
        own = ms(results[number], "own")
        return {"keep": pruner.keep, "own_ms": own, "saved_ms": saved, "own_bytes": clock.bytes,
                "full_prefill_ms": prefill, "prefill_ms": prefill + own - saved,
                "token_ms": self.subject.complete_prefill(token, text, head),
                "image_kv_bytes": sum(deeper(clock.cached, layers)),
                "slice_prefill_ms": ms(results[number], "prefill")}


def often(job: Callable, device: torch.device) -> float:
    """Milliseconds of a short job."""
    return statistics.median(timed(job, device) for _ in range(SHORT))


def ms(results: list, part: str | None = None) -> float:
    """The median of milliseconds, or of one part of them."""
    return statistics.median(each if part is None else each[part] for each in results)


def deeper(each: list[int], layers: int) -> list[int]:
    """What holds of each of the first layers, of all `layers`: later ones are like the last."""
    return each + each[-1:] * (layers - len(each))


# ----- image tokens


def normal(image: ImageTokens) -> Tensor:
    """Features [B, N, D] that are random numbers, independent of each other."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(image.features.shape, generator=generator).to(image.features)


def smooth(image: ImageTokens) -> Tensor:
    """Features [B, N, D] that change slowly over each tile, with noise; those of class tokens are noise."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(image.features.shape, generator=generator) * NOISE
    row, column = image.coords[0, :, 2], image.coords[0, :, 3]
    side = int(row.max()) + 1
    for tile in range(int(image.coords[0, :, 1].max()) + 1):
        field = torch.randn(1, features.shape[2], COARSE, COARSE, generator=generator)
        field = F.interpolate(field, size=(side, side), mode="bicubic")[0]              # [D, side, side]
        own = ((image.coords[0, :, 1] == tile) & (row >= 0)).nonzero()[:, 0].cpu()
        features[:, own] += (field / field.std())[:, row[own].cpu(), column[own].cpu()].T
    return features.to(image.features)
