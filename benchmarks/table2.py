"""Table 2 of arXiv 2504.00557, the decoder's first token, from a slice: `--preset table2 --layers N`.

Prefill of a batch is put together for the complete decoder from pieces. Each piece is timed at this batch's
size, on layers of the slice, and counts as often as the complete decoder (of 11B: 32 and 8 layers) has it:

    once            the model's `prefill` without any layer: embedding, masks, last norm, logits
    text cache      room for keys and values of the text            for every self-attention layer
    self-attention  a layer over the prompt, writing its cache      for every self-attention layer
    keys_values n   keys and values of n image tokens               for every cross-attention layer that makes
                                                                    so many
    attention n     queries, attention to n image tokens, MLP       for every cross-attention layer that
                                                                    attends to so many
    own work        a method's hooks, called as often as the complete decoder calls them

The hooks decide which n a layer has: after `random` and `trimmed_llama` the first layer makes keys and values
of all tokens and attends to all, the other seven to those kept; `coreset` makes them of all tokens in the
first layer and attends to merged ones everywhere. Pieces of the same size are timed once a round, for all
methods; attention with a mask or a bias is another piece than without. A figure is made of the medians of its
pieces. Rounds end when SECONDS are over: the first one warms up, and counts only if there is no other. Beside
the time that passes stands that of the processor, which other programs on the machine hardly change.

At the smallest batch the sum is checked: the unpruned prefill also runs through a decoder of full depth, made
of the slice's layers again and again.
B batch, T text tokens, N image tokens, D model width.
"""
import os
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from benchmarks.measure import with_time
from benchmarks.subject import Subject, depths
from benchmarks.whole import Watched
from cli.terminal import Progress
from model.config import TextConfig
from model.decoder import CrossAttentionLayer
from model.image_tokens import ImageKV, ImageTokens, Queries, attention_mask
from model.layers import rotary_angles, rotary_frequencies
from model.llama_vision import LlamaVision
from pruning import Pruner, hooks
from pruning.methods.trimmed_llama import flops_reduction
from weights.skeleton import without_weights

SECONDS = 45                            # for the rounds of one batch

Piece = tuple[str | int | bool, ...]
Times = tuple[float, float]             # milliseconds that pass, and those of the processor


def both_times(job: Callable, device: torch.device):
    """The times of a job, and what it returns."""
    began = time.process_time()
    ms, result = with_time(job, device)
    return (ms, (time.process_time() - began) * 1000), result


class OwnWork(Watched):
    """Also counts the milliseconds of the processor in all hooks."""
    cpu_ms = 0.0

    def _time(self, part: str, hook: Callable):
        (ms, cpu_ms), result = both_times(hook, self.device)
        self.ms[part] += ms
        self.cpu_ms += cpu_ms
        return result


class Prefill:
    """The pieces of one batch's prefill, and what they have taken so far."""

    def __init__(self, subject: Subject, image: ImageTokens, batch: int, prompt_tokens: int):
        self.subject = subject
        self.one = image
        self.image = image.expand(batch)                                                # [B, N, D]
        self.ids = subject.prompt(batch, prompt_tokens)                                 # [B, T]
        self.prompts = self.ids.tolist()
        self.lengths = [prompt_tokens] * batch
        decoder = subject.model.language_model
        self.cross = decoder.cross_layers[0]
        self.own = next(layer for layer in decoder.layers if not isinstance(layer, CrossAttentionLayer))
        no_layers = replace(subject.config.text, num_hidden_layers=0, cross_attention_layers=())
        self.bare = of_depth(subject.model, no_layers)
        self.deep = of_depth(subject.model, subject.complete.text)
        positions = torch.arange(prompt_tokens, device=subject.device)[None]
        self.angles = rotary_angles(positions, rotary_frequencies(subject.config.text, subject.device))
        self.seen = subject.model.visible_images(self.ids, self.image)                  # [B, T, 2]
        self.cache = self.text_cache()
        self.x = decoder.embed_tokens(self.ids)                                         # [B, T, D]
        _, text_q, text_k, _ = self.own(self.x, self.angles)
        q = self.cross.queries(self.x)                                                  # [B, H, T, d]
        self.queries = Queries(q, self.seen, self.x, text_q, text_k)
        self.samples: dict[Piece, list[Times]] = defaultdict(list)
        self.pieces: dict[str, Counter[Piece]] = {}     # of each method: how often it has each piece
        self.counted: dict[str, dict] = {}              # of each method: see `operations`
        self.keys: dict[int, ImageKV] = {}              # of so many image tokens, in this round

    def round(self, pruners: list[Pruner]):
        """Time every piece once."""
        self.time(("once",), partial(self.bare.prefill, self.ids, self.lengths, self.image, 1, Pruner()))
        self.time(("text cache",), self.text_cache)
        self.time(("self-attention",), self.self_attention)
        done: set[Piece] = set()                        # in this round
        for pruner in pruners:
            self.walk(pruner, done)
        self.keys = {}

    def walk(self, pruner: Pruner, done: set[Piece]):
        """Go through the complete decoder's cross-attention layers, and time what has not been `done`."""
        name = str(pruner)
        clock = OwnWork(replace(pruner), self.subject.device)
        clock.begin(self.subject.model)
        image = clock.encoded(self.image, self.prompts)
        cross, own = depths(self.subject.complete)
        pieces = Counter({("once",): 1, ("self-attention",): own, ("own work", name): 1,
                          ("text cache",): own / depths(self.subject.config)[1]})
        image_kv = []
        for i in range(cross):
            pieces["keys_values", image.features.shape[1]] += 1
            kv = self.keys_values(image)
            image, kv = clock.layer(i, self.queries, image, kv)
            piece = "attention", kv.key.shape[2], kv.mask is not None, kv.bias is not None
            pieces[piece] += 1
            if piece not in done:
                self.time(piece, partial(self.attention, kv))
                done.add(piece)
            image_kv.append(kv)
        clock.prefilled(image_kv)
        self.samples["own work", name].append((clock.ms["prefill"], clock.cpu_ms))
        self.pieces[name] = pieces
        self.counted[name] = operations(self.deep, self.ids.shape[1], clock, self.image.features.shape[1])

    def time(self, piece: Piece, job: Callable):
        times, result = both_times(job, self.subject.device)
        self.samples[piece].append(times)
        return result

    def text_cache(self):
        """Room for the text, in every self-attention layer of the slice."""
        return self.subject.model.language_model.new_cache(self.lengths, self.ids.shape[1] + 1)

    def self_attention(self):
        """A layer over the prompt, and writing its cache."""
        _, _, key, value = self.own(self.x, self.angles)
        T = self.ids.shape[1]
        self.cache.text_keys[0][:, :, :T] = key
        self.cache.text_values[0][:, :, :T] = value

    def keys_values(self, image: ImageTokens) -> ImageKV:
        """Keys and values of these tokens; or those of another image of as many, which are there already.

        They are what hooks and attention get: only the first layer's hook looks at them, and those are real.
        """
        n = image.features.shape[1]
        if n not in self.keys:
            every = self.image.features.shape[1]
            self.keys = {every: self.keys[every]} if every in self.keys else {}         # what fits in memory
            self.keys[n] = self.time(("keys_values", n), partial(self.cross.keys_values, image))
        kv = self.keys[n]
        mask, bias = (None if each is None else each[:, None] for each in (image.mask, image.bias))
        return ImageKV(kv.key, kv.value, image.coords[:, None], mask, bias)

    def attention(self, kv: ImageKV):
        """What a cross-attention layer does beside making keys and values."""
        sees_image = self.seen[..., :1] < self.seen[..., 1:]                            # [B, T, 1]
        return self.cross(self.x, self.cross.queries(self.x), kv, sees_image, attention_mask(self.seen, kv))

    def through(self) -> float:
        """Milliseconds of the unpruned prefill through a decoder of full depth."""
        return replace(self.subject, model=self.deep).answer(self.ids, self.one, 0).ms["prefill"]

    def row(self, pruner: Pruner) -> dict:
        """What a line of the table is made of."""
        name = str(pruner)
        ms, cpu_ms = ({piece: statistics.median(times[which] for times in self.samples[piece])
                       for piece in self.pieces[name]} for which in (0, 1))
        return {"batch": len(self.lengths), "method": pruner.name, "keep": pruner.keep,
                "ms": sum(ms[piece] * times for piece, times in self.pieces[name].items()),
                "cpu_ms": sum(cpu_ms[piece] * times for piece, times in self.pieces[name].items()),
                "own_ms": ms["own work", name], "rounds": len(self.samples["own work", name]),
                "pieces": [{"piece": " ".join(map(str, piece)), "times": times, "ms": ms[piece],
                            "cpu_ms": cpu_ms[piece]}
                           for piece, times in self.pieces[name].items()],
                **self.counted[name]}


def of_depth(model: LlamaVision, text: TextConfig) -> LlamaVision:
    """The model with a decoder of another depth: layers of each kind serve again and again, in turns."""
    other = without_weights(replace(model.config, text=text))
    decoder = model.language_model
    cross = decoder.cross_layers
    own = [layer for layer in decoder.layers if not isinstance(layer, CrossAttentionLayer)]
    other.language_model.layers = nn.ModuleList(
        cross[i % len(cross)] if i in text.cross_attention_layers else own[i % len(own)]
        for i in range(text.num_hidden_layers))
    other.language_model.embed_tokens = decoder.embed_tokens
    other.language_model.norm = decoder.norm
    other.lm_head = model.lm_head
    return other


def operations(model: LlamaVision, prompt_tokens: int, clock: Watched, image_tokens: int) -> dict:
    """The share of image tokens that is kept, the operations of a sequence's prefill, and what the formula in
    Appendix A.3 of the paper says is saved of them."""
    text = model.config.text
    cross, own = depths(model.config)
    kept = clock.attended[-1] / image_tokens
    return {"kept": kept, "projected": clock.projected, "attended": clock.attended,
            "operations": model.decoder_flops(prompt_tokens, 0, clock.attended, clock.projected),
            "formula_saves": flops_reduction(prompt_tokens, image_tokens, kept, text.hidden_size,
                                             text.intermediate_size, own, cross)}


def put_together(subject: Subject, pruners: list[Pruner], batches: list[int], tiles: int, prompt_tokens: int,
                 repeat: int, made: dict, save: Callable[[dict], None]):
    """Add the rows of every batch to `made`, the unpruned decoder first, and save them."""
    for pruner in pruners:
        if pruner.keep_states or {"preprocess", "around"} & {*hooks(type(pruner))}:
            raise ValueError(f"--preset table2 of a slice: {pruner.name} does more than hooks in prefill; "
                             "leave it out, or leave out --layers")
    began = time.perf_counter()
    before = load()
    image = subject.model.encode([subject.tiles(tiles, Pruner())])
    for batch in batches:
        prefill = Prefill(subject, image, batch, prompt_tokens)
        started = time.perf_counter()
        with Progress(f"batch {batch}", in_file=True) as report:
            for turn in range(repeat + 1):
                report(turn, repeat + 1)
                prefill.round(pruners)
                if time.perf_counter() - started > SECONDS:
                    break
                if turn == 0:
                    prefill.samples.clear()
        made["table2"] += [prefill.row(pruner) for pruner in pruners]
        made["seconds"], made["load"] = time.perf_counter() - began, [before, load()]
        save(made)
    check(subject, image, min(batches), prompt_tokens, made)
    made["seconds"], made["load"] = time.perf_counter() - began, [before, load()]


def check(subject: Subject, image: ImageTokens, batch: int, prompt_tokens: int, made: dict):
    """Add the time of the unpruned prefill through a decoder of full depth to its row."""
    with Progress(f"batch {batch}: full depth", in_file=True):
        through_ms = Prefill(subject, image, batch, prompt_tokens).through()
    row = next(row for row in made["table2"] if row["batch"] == batch)
    made["table2"][made["table2"].index(row)] = {**row, "through_ms": through_ms}


def load() -> float | None:
    """How many threads have run or waited for a processor in the last minute, if the system tells."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def of_complete(subject: Subject, pruners: list[Pruner], tiles: int, prompt_tokens: int) -> list[dict]:
    """The operations of every method in a complete model, whose times are rows of the benchmark."""
    rows = []
    for pruner in pruners:
        image = subject.model.encode([subject.tiles(tiles, pruner)], pruner.keep_states)
        clock = Watched(replace(pruner), subject.device)
        subject.answer(subject.prompt(1, prompt_tokens), image, 0, clock)
        counted = operations(subject.model, prompt_tokens, clock, image.features.shape[1])
        rows.append({"tiles": tiles, "method": pruner.name, "keep": pruner.keep, **counted})
    return rows
