"""The parts of a benchmark: each times ours and transformers in turns, and gives rows of the JSON.

The sequences of a batch are questions about one image, which is encoded once. Prefill and decode of both
are timed by `generate`, each round a complete answer. A figure is the median of all rounds; `ratio` is
theirs / ours. The ceiling of encode, project and prefill (with all image tokens) is the operations of a
large bf16 product; the ceiling of decode, which reads the weights of its linear layers and both caches, is
the bytes of a large copy. `ours_bytes` and `peer_bytes` are what a decode step reads, or what is stored.
"""
import statistics
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import in_turns, peak_added, timed, times_in_turns
from benchmarks.peer import Peer, PeerImage
from benchmarks.same import compiled_beside_plain, graphs_made
from benchmarks.subject import Decode, Subject
from benchmarks.timed import Timed
from benchmarks.waterfall import warm_up_rounds
from cli.terminal import Progress
from model.answer import Answer
from model.image_tokens import ImageTokens, Tiles
from pruning import Pruner

Key = tuple[str, str]                           # who (a method, or transformers), and how it decodes
Samples = Mapping[Key, list[float]]             # milliseconds of each round
FULL, PEER, EAGER, COMPILED, STATIC = "none", "transformers", "eager", "compiled", "static cache, compiled"


@dataclass
class Encoded:
    """An image of `count` tiles: what the methods make of it, and transformers."""
    count: int
    tiles: dict[str, Tiles]                     # by method
    images: dict[str, ImageTokens]              # by method
    peer: PeerImage | None
    samples: Samples                            # of encoding

    def where(self, batch: int) -> str:
        """Of which measurement people read the progress."""
        return f"tiles {self.count}, batch {batch}"


class Bench:
    """One model, measured part by part. `peers` are transformers, by how they decode; {} is without them."""

    def __init__(self, args: Namespace, subject: Subject, peers: dict[str, Peer], pruners: list[Pruner],
                 ceilings: dict[str, float]):
        self.args = args
        self.subject = subject
        self.peers = peers
        self.pruners = {FULL: pruners[0], **{str(pruner): pruner for pruner in pruners[1:]}}
        self.ceilings = ceilings
        self.decoders: dict[str, dict[str, Decode | None]] = {name: {EAGER: None} for name in self.pruners}
        if args.compile:
            for decoders in self.decoders.values():
                decoders[COMPILED] = subject.compiled()

    def run(self, tiles: int, made: dict, save: Callable[[dict], None]):
        """All parts, for an image of so many tiles; `save` what is known after every batch."""
        encoded = self.encode_images(tiles)
        if self.args.preset is None:
            made["rows"] += self.encoding(encoded)
        if self.peers:
            made["equal"].append(self.difference(encoded))
        for batch in self.args.batch:
            before = graphs_made()
            made["rows"] += self.answers(batch, encoded) + self.memory(batch, encoded)
            if self.args.compile:
                made["compiled"] += self.compiled(batch, encoded, graphs_made() - before)
            save(made)

    # ----- the parts

    def encode_images(self, tiles: int) -> Encoded:
        """Encode the image, timed. A method has its own encoding if it acts before the encoder, or needs
        the encoder's states."""
        model = self.subject.model
        views = {name: self.subject.tiles(tiles, pruner) for name, pruner in self.pruners.items()}
        full = views[FULL]
        own = [name for name, pruner in self.pruners.items()
               if name == FULL or pruner.keep_states or not torch.equal(views[name].grid, full.grid)]
        jobs: dict[Key, Callable] = {}
        for name in own:
            jobs[name, EAGER] = partial(model.encode, [views[name]], self.pruners[name].keep_states)
        if self.peers:
            jobs[PEER, EAGER] = partial(self.peers[EAGER].encode, full)
        repeat = self.args.repeat if self.args.preset is None else 1
        samples = times_in_turns(jobs, repeat, self.subject.device, f"tiles {tiles}: encode")
        images = {name: jobs[name, EAGER]() for name in own}
        return Encoded(tiles, views, {name: images.get(name, images[FULL]) for name in views},
                       jobs[PEER, EAGER]() if self.peers else None, samples)

    def encoding(self, encoded: Encoded) -> list[dict]:
        """Rows of encode and project."""
        model = self.subject.model
        image = encoded.images[FULL]
        flops = {name: model.flops(1, view.grid.tolist())["encode"] for name, view in encoded.tiles.items()}
        rows = self.rows("encode", 1, encoded.count, encoded.samples, flops=flops)
        samples = times_in_turns({(FULL, EAGER): self.subject.project(image)}, self.args.repeat,
                                 self.subject.device, f"tiles {encoded.count}: project")
        flops = {FULL: self.subject.project_flops(image.features.shape[1])}
        return rows + self.rows("project", 1, encoded.count, samples, flops=flops)

    def compiled(self, batch: int, encoded: Encoded, graphs: int) -> list[dict]:
        """Whether compiled decoding gives what plain decoding gives; `graphs` were made for all methods."""
        ids = self.subject.prompt(batch, self.args.prompt_tokens)
        rows = []
        with Progress(f"{encoded.where(batch)}: compiled beside plain", in_file=True):
            for name, pruner in self.pruners.items():
                same = compiled_beside_plain(self.subject, ids, encoded.images[name], self.args.new_tokens,
                                             pruner, self.decoders[name][COMPILED])
                rows.append({"batch": batch, "tiles": encoded.count, "graphs": graphs,
                             "pruner": None if name == FULL else name, **same})
        return rows

    def answers(self, batch: int, encoded: Encoded) -> list[dict]:
        """Rows of prefill, first_token, prune and decode."""
        args = self.args
        subject = self.subject
        ids = subject.prompt(batch, args.prompt_tokens)
        jobs = self.answer_jobs(ids, encoded)
        with Progress(f"{encoded.where(batch)}: first answers", in_file=True):          # compiles
            first = {key: job().ms["decode"] / 1000 for key, job in jobs.items()}
        linears, weights = subject.linears_alone(batch, args.new_tokens)
        rounds = in_turns({**jobs, "linears": partial(timed, linears, subject.device)}, args.repeat,
                          warm_up_rounds(args.new_tokens) - 1, f"{encoded.where(batch)}: answers")
        alone = statistics.median(rounds.pop("linears")) / args.new_tokens
        rows = self.prefill(batch, encoded, rounds)
        if len(self.pruners) > 1:
            rows += self.own_work(batch, encoded, ids)
        return rows + self.decode(batch, encoded, rounds, first, alone, weights)

    def answer_jobs(self, ids: Tensor, encoded: Encoded) -> dict[Key, Callable[[], Answer]]:
        """An answer of every method and of transformers, decoded in every way."""
        subject = self.subject
        new_tokens = self.args.new_tokens
        jobs: dict[Key, Callable[[], Answer]] = {}
        for name, pruner in self.pruners.items():
            image = encoded.images[name]
            for how, decode in self.decoders[name].items():
                jobs[name, how] = partial(subject.answer, ids, image, new_tokens, pruner, decode)
        for how, peer in self.peers.items():
            jobs[PEER, how] = partial(subject.peer_answer, peer, ids, encoded.peer, new_tokens)
        return jobs

    def prefill(self, batch: int, encoded: Encoded, rounds: Mapping[Key, list[Answer]]) -> list[dict]:
        """Rows of prefill, and of first_token, which is encode and prefill."""
        samples = {key: [answer.ms["prefill"] for answer in answers]
                   for key, answers in rounds.items() if key[1] == EAGER}
        grids = encoded.tiles[FULL].grid.tolist()
        flops = {FULL: batch * self.subject.model.flops(self.args.prompt_tokens, grids)["prefill"]}
        rows = self.rows("prefill", batch, encoded.count, samples, flops=flops)
        if self.args.preset is None:
            both = {}
            for key, prefill in samples.items():
                encode = encoded.samples.get(key, encoded.samples[FULL, EAGER])
                both[key] = [a + b for a, b in zip(encode, prefill, strict=True)]
            rows += self.rows("first_token", batch, encoded.count, both)
        return rows

    def own_work(self, batch: int, encoded: Encoded, ids: Tensor) -> list[dict]:
        """Rows of prune: every method's own work in prefill, and its share of the complete decoder's prefill.

        The model may be a slice of that decoder. A method's own work is taken as it is: methods that choose
        once do not choose more often in a deeper model.
        """
        subject = self.subject
        text = subject.prompt(batch, self.args.prompt_tokens, image=False)
        one_token = torch.ones(batch, 1, subject.config.text.hidden_size, dtype=subject.dtype,
                               device=subject.device)
        head = partial(subject.model.lm_head, one_token)
        jobs = {"image": lambda: subject.answer(ids, encoded.images[FULL], 0).ms["prefill"],
                "text": lambda: subject.answer(text, None, 0).ms["prefill"],
                "head": partial(timed, head, subject.device)}
        for name in self.pruners:
            if name != FULL:
                jobs[name, EAGER] = partial(self.own_prefill_ms, name, encoded, ids)
        samples = in_turns(jobs, self.args.repeat, what=f"{encoded.where(batch)}: own work")
        whole = subject.complete_prefill(*(statistics.median(samples.pop(part))
                                           for part in ("image", "text", "head")))
        rows = self.rows("prune", batch, encoded.count, samples)
        for row in rows:
            row |= {"whole_prefill_ms": whole, "share_of_prefill": row["ours_ms"] / whole}
        return rows

    def own_prefill_ms(self, name: str, encoded: Encoded, ids: Tensor) -> float:
        """Milliseconds of a method's own work in one prefill."""
        clock = Timed(self.pruners[name], self.subject.device)
        self.subject.answer(ids, encoded.images[name], 0, clock)
        return clock.ms["prefill"]

    def decode(self, batch: int, encoded: Encoded, rounds: Mapping[Key, list[Answer]],
               first: Mapping[Key, float], alone: float, weights: int) -> list[dict]:
        """Rows of decode: of one token of every sequence, beside the linear layers of a step alone."""
        args = self.args
        samples = {key: [answer.ms["decode"] / args.new_tokens for answer in answers]
                   for key, answers in rounds.items()}
        text = batch * self.subject.model.kv_bytes(args.prompt_tokens + args.new_tokens // 2, [])["text"]
        read = {key: weights + text + answers[-1].image_kv_bytes for key, answers in rounds.items()}
        rows = self.rows("decode", batch, encoded.count, samples, stored=read)
        for row in rows:
            row |= {"tokens_per_second": batch / row["ours_ms"] * 1000, "linears_ms": alone,
                    "linears_fraction_of_copy": weights / alone * 1000 / self.ceilings["copy_bytes_per_s"]}
            if row["ours"] == COMPILED:
                row["first_call_s"] = first[row["pruner"] or FULL, COMPILED]
            if (row["peer"] or "").endswith(STATIC):
                row["peer_first_call_s"] = first[PEER, STATIC]
        return rows

    def memory(self, batch: int, encoded: Encoded) -> list[dict]:
        """Rows of peak_memory, which is what a question adds to the weights, from its tiles to the second
        token, and of image_kv."""
        subject = self.subject
        ids = subject.prompt(batch, self.args.prompt_tokens)
        peaks: dict[Key, int | None] = {}
        stored: dict[Key, int] = {}

        def ours(name: str):
            pruner = self.pruners[name]
            image = subject.model.encode([encoded.tiles[name]], pruner.keep_states)
            stored[name, EAGER] = subject.answer(ids, image, 1, pruner).image_kv_bytes

        def theirs():
            peer = self.peers[EAGER]
            image = peer.encode(encoded.tiles[FULL])
            stored[PEER, EAGER] = subject.peer_answer(peer, ids, image, 1).image_kv_bytes

        jobs = {(name, EAGER): partial(ours, name) for name in self.pruners}
        if self.peers:
            jobs[PEER, EAGER] = theirs
        with Progress(f"{encoded.where(batch)}: memory", in_file=True):
            for key, job in jobs.items():
                peaks[key] = peak_added(job, subject.device)
        return (self.rows("peak_memory", batch, encoded.count, {}, stored=peaks)
                + self.rows("image_kv", batch, encoded.count, {}, stored=stored))

    def difference(self, encoded: Encoded) -> dict[str, float]:
        """The largest difference of logits after the prompt and after one token more, with both deviations of
        transformers corrected; and the standard deviation of ours, to compare it with."""
        ids = self.subject.prompt(1, self.args.prompt_tokens)
        peer = self.peers[EAGER]
        token = self.subject.prompt(1, 1, image=False)[0]                               # [1]
        ours = two_logits(self.subject.model, ids, encoded.images[FULL], token)
        with Progress(f"tiles {encoded.count}: equal logits", in_file=True), peer.corrected():
            theirs = two_logits(peer, ids, peer.encode(encoded.tiles[FULL]), token)
        return {"tiles": encoded.count, "max_difference": (ours - theirs).abs().max().item(),
                "std": ours.std().item()}

    # ----- rows

    def about(self, batch: int | None, tiles: int | None) -> dict:
        """What a figure is of, apart from the method."""
        return {"shape": self.subject.shape, "layers": self.subject.config.text.num_hidden_layers,
                "dtype": str(self.subject.dtype).removeprefix("torch."), "device": self.subject.device.type,
                "batch": batch, "tiles": tiles}

    def rows(self, component: str, batch: int | None, tiles: int | None, samples: Samples,
             flops: Mapping[str, int] | None = None, stored: Mapping[Key, int | None] | None = None
             ) -> list[dict]:
        """A row for each of ours beside each of theirs. Without samples it is bytes that are compared."""
        times = {key: statistics.median(ms) for key, ms in samples.items()}
        stored = stored or {}
        compared = times or stored
        rows = []
        for ours in (key for key in compared if key[0] != PEER):
            for theirs in [key for key in compared if key[0] == PEER] or [None]:
                pruner = self.pruners[ours[0]]
                mine = compared[ours]
                other = compared.get(theirs)
                rows.append({
                    "component": component, **self.about(batch, tiles), "method": pruner.name,
                    "keep": pruner.keep, "pruner": None if ours[0] == FULL else ours[0], "ours": ours[1],
                    "ours_ms": times.get(ours), "peer_ms": times.get(theirs),
                    "peer": theirs and f"{PEER} {self.peers[EAGER].version}, {theirs[1]}",
                    "ratio": other / mine if mine and other is not None else None,
                    "ours_bytes": stored.get(ours), "peer_bytes": stored.get(theirs),
                    "fraction_of_ceiling": self.fraction(times.get(ours), (flops or {}).get(ours[0]),
                                                         stored.get(ours))})
        return rows

    def fraction(self, ms: float | None, flops: int | None, read: int | None) -> float | None:
        """The share of this machine's ceiling, of operations or else of bytes; None if neither is known."""
        if ms is None or flops is None and read is None:
            return None
        if flops is None:
            return read / ms * 1000 / self.ceilings["copy_bytes_per_s"]
        return flops / ms * 1000 / self.ceilings["matmul_flops"]


def two_logits(model, ids: Tensor, image: ImageTokens | PeerImage, token: Tensor) -> Tensor:
    """The logits [2, V] after a prompt [1, T], and after one token more, of a LlamaVision or a Peer."""
    logits, cache = model.prefill(ids, [ids.shape[1]], image, 2)
    return torch.cat((logits, model.decode(token, cache)))
