"""What each method adds, and what it stores and reads of the image: `python benchmark.py --methods all`.

All methods take turns, in a new order in every round, so that what one leaves behind in caches and memory
does not always affect the same one after it. In its round a method answers twice: once as it is, for the
times of prefill and of a decoded token, and once with a clock on its own work (benchmarks/timed.py). The
difference to the same time without a method is what a method costs or gains in total: a second branch that
decoding reads counts there, and not as own work. Each answer has a pruner of its own, so nothing that it
remembers of the image helps. Encoding the image counts for no method. Bytes read are
those that attention reads in a decode step; what a method looks up to choose is own work. If the weights
are random, so are those of a guide and of trained parts.
"""
import json
import statistics
from dataclasses import asdict, fields, replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from benchmarks.subject import Subject, cut, random_model
from benchmarks.timed import Timed
from cli.options import labelled
from cli.terminal import Progress
from model.config import Config
from model.image_tokens import ImageTokens
from pruning import Pruner
from pruning.methods.quecc import Compressor
from weights import save_model, write_tensors

STRIDE = 2              # patches on the side of a region that becomes one token: about a quarter are left
GUIDE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 2}


def methods(subject: Subject, pruners: list[Pruner], batch: int, tiles: int, prompt_tokens: int,
            new_tokens: int, repeat: int, random: bool) -> list[dict]:
    """A row for each: medians of milliseconds, and bytes for one question; `random` if the weights are."""
    labels = labels_of(pruners)
    with TemporaryDirectory() as folder:
        if random:
            pruners = [for_random_weights(pruner, subject.config, Path(folder)) for pruner in pruners]
        keep_states = any(pruner.keep_states for pruner in pruners)
        views = {str(pruner): subject.tiles(tiles, pruner) for pruner in pruners}
        images: dict[str, ImageTokens] = {}
        for name, view in views.items():
            same = next((other for other in images if torch.equal(views[other].pixels, view.pixels)), None)
            images[name] = subject.model.encode([view], keep_states) if same is None else images[same]
        ids = subject.prompt(batch, prompt_tokens)
        rounds: dict[str, list[dict[str, float]]] = {str(pruner): [] for pruner in pruners}
        order = Random(0)
        with Progress("methods", in_file=True) as report:
            for turn in range(repeat + 1):
                for number, pruner in enumerate(order.sample(pruners, len(pruners))):
                    report(turn * len(pruners) + number, (repeat + 1) * len(pruners))
                    measured = one_round(subject, pruner, ids, images[str(pruner)], new_tokens)
                    if turn:                    # the first round warms up
                        rounds[str(pruner)].append(measured)
    return [{"method": label, "keep": pruner.keep, **medians(rounds[str(pruner)])}
            for label, pruner in zip(labels, pruners, strict=True)]


def labels_of(pruners: list[Pruner]) -> list[str]:
    """What to call each: its name, and what differs between several of the same name."""
    return [label for label, _ in labelled([(pruner.name, pruner.options_set()) for pruner in pruners])]


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The median of every figure."""
    return {name: statistics.median(measured[name] for measured in rounds) for name in rounds[0]}


def for_random_weights(pruner: Pruner, config: Config, folder: Path) -> Pruner:
    """With a random guide or compressor that fits the model, if the pruner has one; made in `folder`."""
    names = {field.name for field in fields(pruner)}
    if "guide" in names:
        small = cut(config, config.text.cross_attention_layers[0] + 1)
        small = replace(small, text=replace(small.text, **GUIDE))
        save_model(random_model(small, torch.device("cpu"), torch.bfloat16), folder)
        said = {"model_type": "mllama", "image_token_index": small.image_token_index,
                "text_config": asdict(small.text), "vision_config": asdict(small.vision)}
        said["vision_config"]["attention_heads"] = small.vision.num_attention_heads
        if small.text.rope_scaling is not None:
            said["text_config"]["rope_scaling"]["rope_type"] = "llama3"
        (folder / "config.json").write_text(json.dumps(said), encoding="utf-8")
    if "weights" in names:
        vision = config.vision
        compressor = Compressor(vision.hidden_size, vision.output_dim, config.text.hidden_size, STRIDE)
        tokens = (-(-vision.patches_per_side // STRIDE)) ** 2
        write_tensors(folder / f"quecc_{tokens}.safetensors", compressor.state_dict())
    return replace(pruner, **{name: str(folder) for name in ("guide", "weights") if name in names})


def one_round(subject: Subject, pruner: Pruner, ids: Tensor, image: ImageTokens, new_tokens: int
              ) -> dict[str, float]:
    """Times of one answer, and own work and bytes of another one."""
    answer = subject.answer(ids, image, new_tokens, replace(pruner))
    clock = Timed(replace(pruner), subject.device)
    watched = subject.answer(ids, image, new_tokens, clock)
    return {"own_prefill_ms": clock.ms["prefill"],
            "own_token_ms": clock.ms["decode"] / new_tokens,
            "prefill_ms": answer.ms["prefill"],
            "token_ms": answer.ms["decode"] / new_tokens,
            "stored_bytes": watched.image_kv_stored / len(ids),
            "read_bytes": statistics.mean(clock.read[:new_tokens]) / len(ids)}
