"""Layers on several devices, and weights that stay in the CPU's memory.

There is one device here. Two that are the same must change nothing; and layers on the meta device, which
refuses tensors of another one, show that whatever a layer reads is moved to it.
"""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import small_network

from evaluation.exam import make_exam
from generate import Assistant
from model.image_tokens import ImageKV, ImageTokens, Queries
from pruning import METHODS, Pruner, load
from pruning.on_device import OnDevice
from scenes.draw import draw
from weights import load_model
from weights.devices import LAYER, Lent, Placement, bytes_of, lend, move_between, parse_devices, spread
from weights.tokenizer import messages

ROOT = Path(__file__).parents[2]
CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(scope="module")
def assistants() -> list[Assistant]:
    """On one device, on two, and with weights that are left where they are."""
    return [Assistant("tiny", "cpu"), Assistant("tiny", "cpu,cpu"), Assistant("tiny", "cpu", offload=True)]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_answers_alike(assistants, method):
    pruner = load(method) if method == "none" else load(method, keep=0.3)
    scene, questions = make_exam(3)[0]
    turns = [messages(question.text, 1) for question in questions]
    answers = []
    for assistant in assistants:
        image = assistant.encode_images([draw(scene)], pruner, keep_states=True)
        answers.append(assistant.answer(turns, image, 12, pruner=pruner))
    one, two, offloaded = answers
    assert one.tokens == two.tokens == offloaded.tokens and one.kept == two.kept == offloaded.kept


@pytest.mark.parametrize("count", [1, 2, 3])
def test_layers_are_shared_in_order_and_evenly(count):
    model = small_network(0, 1, 2)
    total = bytes_of(model, torch.bfloat16)
    devices = [torch.device("meta", i) for i in range(count)]
    places = spread(model, devices, torch.bfloat16)
    assert places == sorted(places, key=lambda device: device.index)
    sizes = [bytes_of(layer, torch.bfloat16) for layer in model.language_model.layers]
    held = {device: sum(size for size, place in zip(sizes, places, strict=True) if place == device)
            for device in devices}
    held[devices[0]] += total - sum(sizes)
    first = total - sum(sizes)
    for device in devices:
        assert held[device] <= max(total / count, first) + max(sizes)
    assert all(held[device] > 0 for device in devices)


def divided(places: list[torch.device]):
    model = load_model("tiny")
    for layer, device in zip(model.language_model.layers, places, strict=True):
        layer.to(device)
    move_between(model, places)
    return model.language_model.requires_grad_(False)


def test_whatever_a_layer_reads_is_moved_to_it(monkeypatch):
    """The last layers are on the meta device, from which nothing can come back: neither does the norm."""
    model = load_model("tiny").config
    depth = model.text.num_hidden_layers
    decoder = divided([CPU] * (depth // 2) + [META] * (depth - depth // 2))
    decoder.norm.to(META)
    monkeypatch.setattr(torch.Tensor, "all", lambda mask: mask.new_zeros((), device="cpu"))    # has no value
    width = model.text.hidden_size
    image = ImageTokens(torch.zeros(2, 9, width, dtype=torch.bfloat16),
                        torch.zeros(2, 9, 4, dtype=torch.long), torch.ones(2, 9, dtype=torch.bool),
                        bias=torch.zeros(2, 9))
    seen = torch.tensor([[0, 0], [0, 1], [0, 1]]).expand(2, 3, 2)
    cache = decoder.new_cache([3, 2], 9)
    states = decoder(torch.zeros(2, 3, dtype=torch.long), image, seen, cache)
    assert states.device == META and states.shape == (2, 3, width)
    assert {tensor.device for tensor in cache.text_keys} == {CPU, META}
    assert {kv.key.device for kv in cache.image_kv} == {CPU, META}
    assert all(kv.coords.device == kv.bias.device == kv.key.device for kv in cache.image_kv)
    cache.sees_image = torch.ones(2, 1, 1, dtype=torch.bool)
    assert decoder.step(torch.zeros(2, dtype=torch.long), cache).device == META
    assert cache.positions.device == CPU


class Spy(Pruner):
    """Sees everything on one device."""
    name = "spy"

    def __init__(self):
        super().__init__(keep=0.5)
        self.devices = []

    def layer(self, i, queries, image, kv):
        self.devices += [queries.q.device, queries.seen.device, kv.key.device, kv.coords.device]
        return image, kv


def test_a_pruner_finds_everything_on_one_device():
    spy = Spy()
    pruner = OnDevice(spy, META)
    kv = ImageKV(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), torch.zeros(1, 1, 3, 4, dtype=torch.long))
    queries = Queries(torch.zeros(1, 2, 5, 4), torch.zeros(1, 5, 2, dtype=torch.long, device="meta"))
    image, after = pruner.layer(0, queries, None, kv)
    assert set(spy.devices) == {META} and after is kv and image is None


def test_weights_are_lent_for_one_use_and_the_next_ones_are_on_their_way():
    first, second = (torch.nn.Linear(3, 3, bias=False) for _ in range(2))
    a, b = (Lent(linear, META, None) for linear in (first, second))
    a.following, b.following = (b,), (a,)
    assert a(torch.zeros(2, 3, device="meta")).device == META
    assert a.arriving is None and b.arriving["weight"].device == META and first.weight.device == CPU
    assert b(torch.zeros(2, 3, device="meta")).device == META and a.arriving is not None


def test_layers_that_fit_stay_and_the_others_lend_their_weights():
    model = load_model("tiny")
    lend(model, CPU, 2)
    lent = {name.removeprefix(LAYER).partition(".")[0] for name, module in model.named_modules()
            if isinstance(module, Lent)}
    assert lent == {str(i) for i in range(2, len(model.language_model.layers))}


def test_where_parameters_are(monkeypatch):
    monkeypatch.setattr("weights.devices.fitting", lambda model, device, dtype: 2)
    placement = Placement(load_model("tiny"), [META], torch.bfloat16, offload=True)
    assert placement.device_of("lm_head.weight") == META
    assert placement.device_of(LAYER + "1.mlp.up_proj.weight") == META
    assert placement.device_of(LAYER + "2.mlp.up_proj.weight") == CPU
    assert placement.device_of(LAYER + "2.input_layernorm.weight") == META


@pytest.mark.parametrize("devices, words", [("cpu,abacus", "unknown device 'abacus'"), ("cpu,", "unknown"),
                                            ("cpu,cuda:7", "cuda")])
def test_bad_devices_are_one_line(devices, words):
    with pytest.raises(ValueError, match=words):
        parse_devices(devices)


def test_several_devices_are_neither_compiled_nor_offloaded():
    with pytest.raises(ValueError, match="only be compiled where all weights are on one device"):
        Assistant("tiny", "cpu,cpu", compile=True)
    with pytest.raises(ValueError, match="name one device"):
        Assistant("tiny", "cpu,cpu", offload=True)


def test_on_the_command_line():
    command = [sys.executable, "generate.py", "--image", "examples/sign.png", "--device", "cpu,cpu"]
    made = subprocess.run([*command, "--prompt", "What colour is the square?"], cwd=ROOT, capture_output=True,
                          text=True)
    assert made.returncode == 0 and made.stdout == "yellow\n", made.stderr
