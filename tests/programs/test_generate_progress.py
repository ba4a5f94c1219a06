"""Long work says how far it is: loading, encoding, reading the prompt; and nothing where nobody watches."""
import os
import pty
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from generate_helpers import drawn

from generate import Assistant
from model.layers import untracked
from weights.progress import Tracker, tracked
from weights.tokenizer import messages

ROOT = Path(__file__).parents[2]
SLOW = """
import sys, time
import generate, model.vision, model.decoder
from cli import terminal
terminal.PATIENCE = terminal.INTERVAL = 0.05
for kind in model.vision.VisionLayer, model.decoder.SelfAttentionLayer:
    def slowly(self, *args, forward=kind.forward):
        time.sleep(0.15)
        return forward(self, *args)
    kind.forward = slowly
sys.argv = ["generate.py", "--image", "examples/wide.png", "--prompt", "What does the sign say?"]
generate.main()
"""


class Events:
    """A Progress that remembers."""

    def __init__(self):
        self.all: list[tuple[str, int, int]] = []
        self.open: list[str] = []

    @contextmanager
    def __call__(self, what, number=str):
        self.open.append(what)
        try:
            yield lambda done, total: self.all.append((what, done, total))
        finally:
            self.open.remove(what)

    def of(self, word: str) -> list[tuple[int, int]]:
        return [(done, total) for what, done, total in self.all if word in what]


def test_all_work_is_reported_to_its_end_and_changes_nothing():
    events = Events()
    watched, plain = Assistant("tiny", progress=events), Assistant("tiny")
    parameters = sum(p.nbytes for p in plain.model.parameters())
    assert events.of("loading")[-1] == (parameters, parameters)
    images = [drawn(120, 60), drawn(60, 60), drawn(61, 121)]            # three grids of tiles
    encoded = watched.encode_images(images)
    c = plain.model.config
    layers = c.vision.num_hidden_layers + c.vision.num_global_layers - 1
    count = sum(rows * columns for rows, columns in encoded.tiles.grid.tolist())
    assert events.of(f"encoding {count} tiles") == [(i + 1, 3 * layers) for i in range(3 * layers)]
    asked = [messages("What is this?", 3)], encoded, 3
    answer = watched.answer(*asked)
    depth = c.text.num_hidden_layers
    assert events.of("prompt") == [(i + 1, depth) for i in range(depth)] and not events.open
    assert answer.tokens == plain.answer(*asked).tokens
    assert watched.model.vision_model.track is watched.model.language_model.track is untracked


def test_quantising_is_called_so():
    events = Events()
    model = Assistant("tiny", quantize="int4", progress=events).model
    done, total = events.of("quantising")[-1]
    assert done == total > sum(tensor.nbytes for tensor in model.state_dict().values())
    assert not events.of("loading")


def test_work_that_fails_is_no_longer_tracked():
    model = Assistant("tiny").model.vision_model
    with pytest.raises(RuntimeError), tracked(model, 3, Events(), "encoding"):
        raise RuntimeError
    assert model.track is untracked


def test_work_that_is_done_twice_is_reported_from_its_start():
    reports = []
    track = Tracker(lambda done, total: reports.append(done), 2)
    layers = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    assert list(track(layers)) == list(track(layers)) == list(layers)
    assert reports == [1, 2, 1, 2]


def test_a_terminal_shows_it():
    master, terminal = pty.openpty()
    command = [sys.executable, "-c", SLOW]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=terminal, text=True,
                          env=os.environ | {"TERM": "xterm"})
    os.close(terminal)
    shown = os.read(master, 100_000).decode()
    os.close(master)
    assert done.stdout == "111\n"
    assert re.search(r"encoding \d tiles, layer \d+ of \d+, \d:\d\d left", shown)
    assert re.search(r"reading the prompt, layer \d of 7, \d:\d\d left", shown)
