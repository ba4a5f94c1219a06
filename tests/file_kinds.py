"""The kinds of files that `mutate.py` damages: good ones to start from, and the programs' way to read each.

A reader gets a folder, reads it as the programs do, and uses what was read. What comes out must be usable:
that is asserted here.
"""
import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from good_files import (
    EXAM,
    GATES,
    RECORDS,
    SETTINGS,
    TINY,
    Files,
    adapter_files,
    checkpoint_files,
    evaluation_files,
    image_files,
    learned_files,
    meta_files,
    quantized_files,
    settings_files,
    text_files,
)
from PIL import Image

from evaluation.plot import plot, table
from evaluation.scoring import figures
from evaluation.store import Store
from generate import generate
from model.image_tokens import ImageTokens
from model.llama_vision import LlamaVision
from pruning.methods.attention_predictor import load_network
from pruning.methods.quecc import QueCC
from weights import load_model, read_config
from weights.from_meta import from_meta
from weights.image_file import MAX_MEMORY, open_image
from weights.images import ImageProcessor
from weights.tokenizer import ChatTokenizer, Detokenizer

CONFIG = read_config(TINY)
CONVERSATIONS = [
    [{"role": "user", "content": "What is this? " * 200}],
    [{"role": "system", "content": " Be brief. "},
     {"role": "user", "content": "Grüße, 你好 👋🏽\n\n<|eot_id|>"},
     {"role": "assistant", "content": "A  star."},
     {"role": "user", "content": "Why?"}],
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is it? {{ 1 }}"}]}]]


@dataclass
class Kind:
    """`share` is its part of all files; `memory` is what reading one may take at most, in bytes."""
    share: float
    make_folders: Callable[[], list[Files]]
    read: Callable[[Path], None]
    memory: int = 2 ** 30


def read_image(folder: Path):
    image = open_image(folder / "image")
    tiles = ImageProcessor(CONFIG.vision.image_size)([image])
    assert tiles.pixels.isfinite().all()


def read_settings(folder: Path):
    processor = ImageProcessor.from_folder(folder, CONFIG.vision)
    tiles = processor([Image.new("RGB", (200, 30), "green")])
    assert tiles.pixels.isfinite().all()
    assert tiles.grid.tolist() in [[list(grid)] for grid in CONFIG.vision.supported_aspect_ratios]


def read_checkpoint(folder: Path):
    model = load_model(folder)
    vision = model.config.vision
    processor = ImageProcessor(vision.image_size, vision.max_num_tiles, vision.supported_aspect_ratios)
    with torch.inference_mode():
        image = model.encode([processor([Image.new("RGB", (30, 20))])])
    prompt = [model.config.image_token_index, 3, 4]
    answer = generate(model, [prompt], image, 2, model.config.text.eos_token_id)
    assert len(answer.tokens) == 1


def read_adapter(folder: Path):
    model = load_model(TINY, adapters=[folder])
    answer = generate(model, [[3, 4, 5]], None, 2, model.config.text.eos_token_id)
    assert len(answer.tokens) == 1


def read_meta(folder: Path):
    """Converted, and read like any other checkpoint. What it says of its progress is not a finding."""
    with contextlib.redirect_stderr(io.StringIO()):
        out = from_meta(folder, folder / "out")
    load_model(out)


def read_text_side(folder: Path):
    """Each conversation may be refused by itself; ids that decode must do so in every way."""
    tokenizer = ChatTokenizer.from_folder(folder, CONFIG)
    ids = [0, 1, 255, 256, 300, 639, 640, 641, 10 ** 9]
    refusal = None
    for conversation in CONVERSATIONS:
        try:
            ids += tokenizer.encode(conversation)[:200]
        except ValueError as error:
            refusal = error
    text = tokenizer.decode(ids)
    parts = Detokenizer(tokenizer)
    assert "".join(map(parts.push, ids)) + parts.flush() == text
    if refusal is not None:
        raise refusal


def read_evaluation(folder: Path):
    """What `evaluate.py --json out.json --plot ...` does with them: read the figures, or go on and write."""
    store = Store(folder / "out.json", SETTINGS)
    made = store.finished()
    if made is None:
        with store:
            store.check(EXAM, len(SETTINGS["rows"]), len(GATES))
            for record in RECORDS[len(store.records):]:
                store.add(record)
            store.finish(figures(SETTINGS, EXAM, store.records, GATES))
        made = store.finished()
        assert made is not None
    assert "random" in table(made)
    plot(made, folder / "plot.svg")


def read_learned(folder: Path):
    predictor = folder / "attention_predictor.safetensors"
    if predictor.exists():
        network = load_network(predictor)
        network(torch.rand(1, 4, 3, 5), torch.ones(1, 3, 5, dtype=torch.bool))
        return
    method = QueCC(keep=17, weights=str(folder))
    method.begin(tiny_model())
    with torch.inference_mode():
        method.encoded(tiny_image(), [[CONFIG.image_token_index, 5, 6]])


@cache
def tiny_model() -> LlamaVision:
    return load_model(TINY)


@cache
def tiny_image() -> ImageTokens:
    """An encoded image of one tile, with the encoder's states."""
    tiles = ImageProcessor(CONFIG.vision.image_size)([Image.new("RGB", (100, 100), "red")])
    with torch.inference_mode():
        return tiny_model().encode([tiles], keep_states=True)


KINDS = {
    "images": Kind(0.25, image_files, read_image, memory=MAX_MEMORY + 2 ** 28),
    "settings": Kind(0.08, settings_files, read_settings),
    "checkpoint": Kind(0.15, checkpoint_files, read_checkpoint),
    "quantized": Kind(0.1, quantized_files, read_checkpoint),
    "meta": Kind(0.05, meta_files, read_meta),
    "adapter": Kind(0.1, adapter_files, read_adapter),
    "text": Kind(0.15, text_files, read_text_side),
    "evaluation": Kind(0.07, evaluation_files, read_evaluation),
    "learned": Kind(0.05, learned_files, read_learned),
}
