"""What every method adds, and what it holds and reads of the image: `python benchmark.py --methods all`.

All methods take turns, in another order every round, so that what one leaves behind in caches and memory does
not always meet the same neighbour. A round of one is a prompt and some decoded tokens, twice: timed from
outside, and with the clock on its own hooks, which on a GPU drains the queue each time. So own work is what
its hooks take, and the difference to the whole image is what it costs or gains all in all: a second branch
that decoding reads is in the latter alone. Encoding the image counts for nobody. Bytes read are those that
attention reads at a step; what a method looks up itself to choose is its own work. Where weights are random,
so are those of a guide and of what is trained.
"""
import json
import statistics
from dataclasses import asdict, fields, replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from benchmarks.subject import Greedy, Subject, Timed, cut, random_model
from model.cache import Cache
from model.clock import Clock
from model.config import Config
from model.image_tokens import ImageTokens, kv_bytes
from program import say
from pruning import Pruner
from pruning.methods.quecc import Compressor
from weights import save_model, write_tensors

STRIDE = 2              # patches along a region that is compressed: about a quarter of the tokens are left
GUIDE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 2}


def methods(subject: Subject, pruners: list[Pruner], batch: int, tiles: int, prompt_tokens: int,
            new_tokens: int, repeat: int, random: bool) -> list[dict]:
    """A row for each: medians in milliseconds, and bytes for one question; `random` are the weights."""
    with TemporaryDirectory() as folder:
        if random:
            pruners = [for_random_weights(pruner, subject.config, Path(folder)) for pruner in pruners]
        views = {str(pruner): subject.tiles(tiles, pruner) for pruner in pruners}
        vision = any(pruner.keep_states for pruner in pruners)
        images = {name: subject.model.encode([view], vision) for name, view in views.items()}
        ids, samples = subject.prompt(batch, prompt_tokens), {str(pruner): [] for pruner in pruners}
        order = Random(0)
        for turn in range(-1, repeat):
            for pruner in order.sample(pruners, len(pruners)):
                say(f"round {turn + 2} of {repeat + 1}: {pruner}")
                measured = once(subject, pruner, ids, images[str(pruner)], new_tokens)
                if turn >= 0:
                    samples[str(pruner)].append(measured)
    return [{"method": pruner.name, "keep": pruner.keep} | {
        name: statistics.median(each[name] for each in samples[str(pruner)])
        for name in samples[str(pruner)][0]} for pruner in pruners]


def for_random_weights(pruner: Pruner, config: Config, folder: Path) -> Pruner:
    """With a guide, or a compressor, that fits in place of the bundled one, if it has any; in the folder."""
    names = {field.name for field in fields(pruner)}
    if "guide" in names:
        small = cut(config, config.text.cross_attention_layers[0] + 1)
        small = replace(small, text=replace(small.text, **GUIDE))
        save_model(random_model(small, torch.device("cpu"), torch.bfloat16), folder)
        said = {"model_type": "mllama", "image_token_index": small.image_token_index,
                "text_config": asdict(small.text), "vision_config": asdict(small.vision)}
        said["vision_config"]["attention_heads"] = small.vision.num_attention_heads
        (folder / "config.json").write_text(json.dumps(said), encoding="utf-8")
    if "weights" in names:
        vision = config.vision
        compressor = Compressor(vision.hidden_size, vision.output_dim, config.text.hidden_size, STRIDE)
        tokens = (-(-vision.patches_per_side // STRIDE)) ** 2
        write_tensors(folder / f"quecc_{tokens}.safetensors", compressor.state_dict())
    return replace(pruner, **{name: str(folder) for name in ("guide", "weights") if name in names})


def read_bytes(cache: Cache) -> float:
    """Of the image keys and values that a step's attention reads: padding does not count."""
    return sum(float(kv.counts().sum()) * (kv.key.nbytes + kv.value.nbytes) / kv.key[:, 0, :, 0].numel()
               for kv in cache.image_kv)


def once(subject: Subject, pruner: Pruner, ids: Tensor, image: ImageTokens, new_tokens: int
         ) -> dict[str, float]:
    """One round of a method."""
    clock = Clock(subject.device)
    start = subject.read(ids, image, new_tokens, pruner)
    prefill = clock.lap()
    Greedy(subject.model.decode, *start, new_tokens, pruner)()
    token = clock.lap() / new_tokens
    timed = Timed(pruner, subject.device)
    logits, cache = subject.read(ids, image, new_tokens, timed)
    own, stored = timed.ms, kv_bytes(cache.image_kv + pruner.stored)
    timed.ms, read = 0.0, []
    greedy = Greedy(subject.model.decode, logits, cache, 1, timed)
    for _ in range(new_tokens):
        read.append(read_bytes(cache))
        greedy()
    return {"own_prefill_ms": own, "own_token_ms": timed.ms / new_tokens, "prefill_ms": prefill,
            "token_ms": token, "stored_bytes": stored / len(ids),
            "read_bytes": statistics.mean(read) / len(ids)}
