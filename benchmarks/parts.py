"""The parts of a benchmark: each times ours and transformers in turns and gives rows of the JSON.

The sequences of a batch are questions about one image, which is encoded once. A figure is the median of all
rounds; `ratio` is theirs / ours. The ceiling of encode, project and prefill (with all image tokens) is the
operations of a large bf16 product; the ceiling of decode, which reads the weights of its linear layers and
both caches, is the bytes of a large copy. `ours_bytes` and `peer_bytes`: what a step reads, or what is held.
"""
import statistics
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import in_turns, peak_added, timed
from benchmarks.peer import Peer
from benchmarks.subject import Greedy, Subject, Timed, grid_of
from benchmarks.waterfall import pace
from model.image_tokens import Grid, ImageTokens, Tiles
from program import say
from pruning import Pruner

Key = tuple[str, str]                           # who (a method, or transformers), and how it decodes
Samples = Mapping[Key, list[float]]             # milliseconds of each round
WHOLE, PEER, EAGER, COMPILED, STATIC = "none", "transformers", "eager", "compiled", "static cache, compiled"


@dataclass
class EncodedImages:
    """An image of `count` tiles as each method sees it, encoded; `states` are those of transformers."""
    count: int
    tiles: dict[str, Tiles]
    images: dict[str, ImageTokens]
    states: Tensor | None
    encode: Samples


class Bench:
    """One model, measured part by part; each part gives rows of the JSON."""

    def __init__(self, args: Namespace, subject: Subject, peer: Peer | None, pruners: list[Pruner],
                 ceilings: dict[str, float]):
        self.args, self.subject, self.peer, self.ceilings = args, subject, peer, ceilings
        self.pruners = {WHOLE: pruners[0], **{str(pruner): pruner for pruner in pruners[1:]}}
        self.compiled: dict[str, Callable] = {}

    def run(self, tiles: int, made: dict):
        """All parts for an image of `tiles` tiles."""
        say(f"tiles {tiles}: encode")
        encoded = self.encode_images(tiles)
        if self.args.preset is None:
            made["rows"] += self.images(encoded)
        if self.peer is not None:
            made["equal"].append(self.difference(encoded))
        for batch in self.args.batch:
            for part in self.prompts, self.tokens, self.memory:
                say(f"tiles {tiles}, batch {batch}: {part.__name__}")
                made["rows"] += part(batch, encoded)

    # ----- the parts

    def encode_images(self, tiles: int) -> EncodedImages:
        """Encode the image, timed. Only methods that act before the encoder get an encoding of their own."""
        views = {name: self.subject.tiles(tiles, pruner) for name, pruner in self.pruners.items()}
        whole = views[WHOLE]
        own = {name: view for name, view in views.items()
               if name == WHOLE or not torch.equal(view.grid, whole.grid)}
        jobs: dict[Key, Callable] = {(n, EAGER): partial(self.subject.model.encode, [own[n]]) for n in own}
        if self.peer is not None:
            jobs[PEER, EAGER] = partial(self.peer.encode, whole)
        repeat = self.args.repeat if self.args.preset is None else 1
        samples = in_turns(jobs, repeat, self.subject.device)
        images = {name: self.subject.model.encode([view]) for name, view in own.items()}
        return EncodedImages(tiles, views, {name: images.get(name, images[WHOLE]) for name in views},
                       None if self.peer is None else self.peer.encode(whole), samples)

    def images(self, encoded: EncodedImages) -> list[dict]:
        model, image = self.subject.model, encoded.images[WHOLE]
        flops = {name: model.flops(1, view.grid.tolist())["encode"] for name, view in encoded.tiles.items()}
        rows = self.rows("encode", 1, encoded.count, encoded.encode, flops=flops)
        samples = in_turns({(WHOLE, EAGER): self.subject.project(image)}, self.args.repeat,
                           self.subject.device)
        flops = {WHOLE: self.subject.project_flops(image.features.shape[1])}
        return rows + self.rows("project", 1, encoded.count, samples, flops=flops)

    def prompts(self, batch: int, encoded: EncodedImages) -> list[dict]:
        """prefill, first_token, and the methods' own work beside the prefill of the whole decoder."""
        subject, room = self.subject, self.args.new_tokens
        ids, text = (subject.prompt(batch, self.args.prompt_tokens, image) for image in (True, False))
        clocks = {name: Timed(pruner, subject.device) for name, pruner in self.pruners.items()}
        jobs: dict[Key, Callable] = {
            (name, EAGER): partial(subject.read, ids, encoded.images[name], room, pruner)
            for name, pruner in self.pruners.items()}
        if self.peer is not None:
            jobs[PEER, EAGER] = partial(self.peer.prefill, ids, encoded.states, self.grids(encoded), room)
        samples = in_turns(jobs, self.args.repeat, subject.device)
        grids = encoded.tiles[WHOLE].grid.tolist()
        flops = {WHOLE: batch * subject.model.flops(len(ids[0]), grids)["prefill"]}
        rows = self.rows("prefill", batch, encoded.count, samples, flops=flops)
        if self.args.preset is None:
            both = {key: [a + b for a, b in zip(ms, encoded.encode.get(key, encoded.encode[WHOLE, EAGER]),
                                                strict=True)] for key, ms in samples.items()}
            rows += self.rows("first_token", batch, encoded.count, both)
        if len(self.pruners) > 1:
            rows += self.own_work(batch, encoded, ids, text, clocks)
        return rows

    def own_work(self, batch: int, encoded: EncodedImages, ids: Tensor, text: Tensor,
                 clocks: dict[str, Timed]) -> list[dict]:
        """prune: the hooks of every method in a prefill, and as a share of the whole decoder's prefill, of
        which a slice's is a part, all layers charged for the whole image. A method's own work is taken as it
        is: those that choose once do not choose more often in a deeper model."""
        subject, own = self.subject, {name: [] for name in clocks if name != WHOLE}
        one_row = subject.model.lm_head.weight.new_ones(batch, 1, subject.config.text.hidden_size)
        parts = {"image": partial(subject.read, ids, encoded.images[WHOLE], 1, Pruner()),
                 "text": partial(subject.model.prefill, text, [len(row) for row in text], None, 1),
                 "head": partial(subject.model.lm_head, one_row)}
        samples = in_turns(parts, self.args.repeat, subject.device)
        whole = subject.whole_prefill(*(statistics.median(ms) for ms in samples.values()))
        for turn in range(-1, self.args.repeat):
            for name, ms in own.items():
                clocks[name].ms = 0.0
                subject.read(ids, encoded.images[name], 1, clocks[name])
                if turn >= 0:
                    ms.append(clocks[name].ms)
        rows = self.rows("prune", batch, encoded.count, {(name, EAGER): ms for name, ms in own.items()})
        for row in rows:
            row |= {"whole_prefill_ms": whole, "share_of_prefill": row["ours_ms"] / whole}
        return rows

    def tokens(self, batch: int, encoded: EncodedImages) -> list[dict]:
        """decode, of one token of every row, and beside it the linear layers of a step alone."""
        subject, args = self.subject, self.args
        pieces, each, warm_up, room = pace(args.new_tokens, args.repeat)
        ids, jobs = subject.prompt(batch, args.prompt_tokens), {}
        for name, pruner in self.pruners.items():
            decoders = {EAGER: subject.model.decode}
            if args.compile:
                decoders[COMPILED] = self.compiled.setdefault(name, subject.compiled())
            for how, decode in decoders.items():
                start = subject.read(ids, encoded.images[name], room, pruner)
                jobs[name, how] = Greedy(decode, *start, each, pruner)
        for how in [] if self.peer is None else [EAGER, STATIC] if args.compile else [EAGER]:
            start = self.peer.prefill(ids, encoded.states, self.grids(encoded), room, static=how == STATIC)
            jobs[PEER, how] = Greedy(self.peer.decode, *start, each)
        linears, weights = subject.linears_alone(batch, each)
        first = {key: timed(job, subject.device) / 1000 for key, job in jobs.items()}   # compiles
        rounds = in_turns({**jobs, "linears": linears}, pieces, subject.device, warm_up - 1)
        samples = {key: [piece / each for piece in ms] for key, ms in rounds.items()}
        alone = statistics.median(samples.pop("linears"))
        text = batch * subject.model.kv_bytes(args.prompt_tokens + room // 2, [])["text"]
        read = {key: weights + text + (self.peer.image_kv_bytes(job.cache) if key[0] == PEER
                                       else job.cache.image_bytes()) for key, job in jobs.items()}
        rows = self.rows("decode", batch, encoded.count, samples, held=read)
        for row in rows:
            row |= {"tokens_per_second": batch / row["ours_ms"] * 1000, "linears_ms": alone,
                    "linears_fraction_of_copy": weights / alone * 1000 / self.ceilings["copy_bytes_per_s"]}
            if row["ours"] == COMPILED:
                row["first_call_s"] = first[row["pruner"] or WHOLE, COMPILED]
            if (row["peer"] or "").endswith(STATIC):
                row["peer_first_call_s"] = first[PEER, STATIC]
        return rows

    def memory(self, batch: int, encoded: EncodedImages) -> list[dict]:
        """peak_memory: what a prompt adds to the weights, from its tiles to the second token. image_kv."""
        subject = self.subject
        ids, peaks, held = subject.prompt(batch, self.args.prompt_tokens), {}, {}

        def ours(name: str):
            image = subject.model.encode([encoded.tiles[name]])
            logits, cache = subject.read(ids, image, 2, self.pruners[name])
            Greedy(subject.model.decode, logits, cache, 1, self.pruners[name])()
            held[name, EAGER] = cache.image_bytes()

        def theirs():
            states = self.peer.encode(encoded.tiles[WHOLE])
            logits, cache = self.peer.prefill(ids, states, self.grids(encoded), 2)
            Greedy(self.peer.decode, logits, cache, 1)()
            held[PEER, EAGER] = self.peer.image_kv_bytes(cache)

        jobs = {(name, EAGER): partial(ours, name) for name in self.pruners}
        if self.peer is not None:
            jobs[PEER, EAGER] = theirs
        for key, job in jobs.items():
            peaks[key] = peak_added(job, subject.device)
        return (self.rows("peak_memory", batch, encoded.count, {}, held=peaks)
                + self.rows("image_kv", batch, encoded.count, {}, held=held))

    def difference(self, encoded: EncodedImages) -> dict[str, float]:
        """The largest difference of logits after the prompt and after one token more, both deviations of
        transformers corrected; and the standard deviation of ours, to compare it with."""
        ids, model = self.subject.prompt(1, self.args.prompt_tokens), self.subject.model
        ours, cache = self.subject.read(ids, encoded.images[WHOLE], 2, Pruner())
        ours = torch.cat((ours, model.decode(ours.argmax(-1), cache)))
        with self.peer.corrected():
            states = self.peer.encode(encoded.tiles[WHOLE])
            theirs, kept = self.peer.prefill(ids, states, self.grids(encoded), 2)
            theirs = torch.cat((theirs, self.peer.decode(ours[:1].argmax(-1), kept)))
        return {"tiles": encoded.count, "max_difference": (ours - theirs).abs().max().item(),
                "std": ours.std().item()}

    # ----- rows

    def grids(self, encoded: EncodedImages) -> list[Grid]:
        return [grid_of(self.subject.config.vision, encoded.count)]

    def about(self, batch: int | None, tiles: int | None) -> dict:
        """What a figure is of, apart from the method."""
        return {"shape": self.subject.shape, "layers": self.subject.config.text.num_hidden_layers,
                "dtype": str(self.subject.dtype).removeprefix("torch."), "device": self.subject.device.type,
                "batch": batch, "tiles": tiles}

    def rows(self, component: str, batch: int | None, tiles: int | None, samples: Samples,
             flops: Mapping[str, int] | None = None, held: Mapping[Key, int | None] | None = None
             ) -> list[dict]:
        """A row for each of ours beside each of theirs. Without samples it is bytes that are compared."""
        times, held = {key: statistics.median(ms) for key, ms in samples.items()}, held or {}
        compared, rows = times or held, []
        peers = [key for key in compared if key[0] == PEER] or [None]
        for ours, theirs in ((a, b) for a in compared if a[0] != PEER for b in peers):
            pruner, ms, peer_ms = self.pruners[ours[0]], times.get(ours), times.get(theirs)
            mine, other = compared[ours], compared.get(theirs)
            rows.append({
                "component": component, **self.about(batch, tiles), "method": pruner.name,
                "keep": pruner.keep, "pruner": None if ours[0] == WHOLE else ours[0], "ours": ours[1],
                "ours_ms": ms, "peer_ms": peer_ms,
                "peer": theirs and f"{PEER} {self.peer.version}, {theirs[1]}",
                "ratio": other / mine if mine and other is not None else None,
                "ours_bytes": held.get(ours), "peer_bytes": held.get(theirs),
                "fraction_of_ceiling": self.fraction(ms, (flops or {}).get(ours[0]), held.get(ours))})
        return rows

    def fraction(self, ms: float | None, flops: int | None, read: int | None) -> float | None:
        """Of what this machine can at most: operations or bytes a second; None where neither is known."""
        if ms is None or flops is None and read is None:
            return None
        most = self.ceilings["copy_bytes_per_s" if flops is None else "matmul_flops"]
        return (read if flops is None else flops) / ms * 1000 / most
