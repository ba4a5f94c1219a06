"""The hooks of a pruner: which ones a method overrides, what a Wrapper passes on; the shortest methods."""
from dataclasses import dataclass

import pytest
import torch
from helpers import I, kept_sets, random_image, small_network
from reference import forced

from pruning import METHODS, Pruner, SelectOnce, SelectPerLayer, Wrapper, hooks, load
from pruning.methods.csp import CSP
from pruning.methods.fastv import FastV
from pruning.pruner import HOOKS
from pruning.recorder import Recorder

PROMPT = [5, 6, I, 7, 8, 9]
OVERRIDDEN = {
    "none": [], "coreset": ["encoded", "layer", "prefilled"], "trimmed_llama": ["layer", "prefilled"],
    "fastv": ["encoded", "layer", "prefilled", "stepped"], "elastic_cache": ["layer", "prefilled"],
    "csp": ["encoded", "layer", "prefilled"], "aircache": ["begin", "layer", "prefilled"],
    "zipvl": ["layer", "prefilled"], "topv": ["encoded"],
    "attention_predictor": ["layer", "prefilled", "stepped"],
    "mint": ["begin", "layer", "prefilled", "stepped", "logits", "around"],
    "sgl": ["begin", "encoded", "layer", "prefilled", "around"], "quecc": ["begin", "encoded"],
    "divprune": ["layer", "prefilled"], "cdpruner": ["layer", "prefilled"],
    "visionzip": ["begin", "encoded"], "prumerge": ["begin", "encoded"],
    "tome": ["encoded"], "scope": ["begin", "layer", "prefilled"],
    "attention_matching": ["begin", "layer", "prefilled"],
    "random": ["encoded", "layer", "prefilled"], "spatial": ["layer", "prefilled"],
    "downsample": ["preprocess"]}


def test_the_hooks_in_the_order_in_which_they_are_called():
    assert HOOKS == ["begin", "preprocess", "encoded", "layer", "prefilled", "stepped", "logits", "around"]


@pytest.mark.parametrize("method", METHODS)
def test_the_hooks_that_a_method_overrides(method):
    assert hooks(METHODS[method]) == OVERRIDDEN[method]


def test_inherited_hooks_count_and_other_functions_do_not():
    class Child(METHODS["topv"]):
        def logits(self, logits):
            return logits

        def choose_well(self):
            return self.keep
    assert hooks(Child) == ["encoded", "logits"]
    assert hooks(SelectOnce) == hooks(SelectPerLayer) == ["layer", "prefilled"] and hooks(Wrapper) == HOOKS


# ----- a pruner around another one


class Spy(Pruner):
    """Returns an object of its own from every hook, and remembers what it was called with."""

    def __init__(self):
        self.keep = 0.5
        self.called = []
        self.returns = {}


def spying(hook: str):
    def method(self, *arguments):
        self.called.append((hook, arguments))
        return self.returns[hook]
    return method


for _hook in HOOKS:
    setattr(Spy, _hook, spying(_hook))


@pytest.mark.parametrize("wrapper", [Wrapper, Recorder])
def test_every_hook_is_passed_on(wrapper):
    """With the same arguments, and what it returns is returned."""
    image = random_image(10)
    kv = small_network(1).language_model.cross_layers[0].keys_values(image)
    given = {"begin": (object(),), "preprocess": ([], object()), "encoded": (image, [[0]]),
             "layer": (0, object(), image, kv), "prefilled": ([kv],), "stepped": (3, [], [kv]),
             "logits": (torch.zeros(1),), "around": (object(),)}
    spy = Spy()
    spy.returns = {"begin": None, "preprocess": object(), "encoded": image, "layer": (image, kv),
                   "prefilled": [kv], "stepped": [kv], "logits": torch.ones(1), "around": object()}
    assert list(given) == list(spy.returns) == HOOKS
    around = wrapper(spy)
    for hook in HOOKS:
        assert getattr(around, hook)(*given[hook]) is spy.returns[hook]
        name, arguments = spy.called.pop()
        assert name == hook and all(a is b for a, b in zip(arguments, given[hook], strict=True))
        assert spy.called == []                         # once


@pytest.mark.parametrize("wrapper", [Wrapper, Recorder])
@pytest.mark.parametrize("method", METHODS)
def test_a_wrapper_says_of_itself_what_its_pruner_says(wrapper, method):
    inner = load(method, keep=0.3)
    around = wrapper(inner)
    for name in "keep_states", "merges", "stored", "owners":
        assert getattr(around, name) == getattr(inner, name)
    assert str(around) == str(inner) and around.keep == inner.keep and not around.keeps_all
    inner.stored, inner.owners = ["changes with every step"], ["known after hook 1"]
    assert around.stored is inner.stored and around.owners is inner.owners


def test_a_wrapper_changes_no_answer():
    """Not even one whose pruner keeps everything."""
    network, image = small_network(2, 2, 3), random_image(14)
    for method, options in (("fastv", {"keep": 0.3, "when": "step"}), ("mint", {"keep": 3}),
                            ("none", {"keep": 1.0})):
        plain = forced(network, [PROMPT], image, load(method, **options), steps=4)
        wrapped = forced(network, [PROMPT], image, Wrapper(load(method, **options)), steps=4)
        assert torch.equal(plain.logits, wrapped.logits) and plain.answer.kept == wrapped.answer.kept


# ----- the shortest methods


@pytest.mark.parametrize("lines, same", [
    (["from pruning import SelectOnce, attention_received", "class Mine(SelectOnce):",
      "    def score(self, queries, kv):", "        return attention_received(queries, kv, per='layer')"],
     FastV(0.3, positions="all", early_caches="trim")),
    (["from pruning import SelectPerLayer, attention_received", "class Mine(SelectPerLayer):",
      "    def score(self, queries, kv):", "        return attention_received(queries, kv, per='kv_head')"],
     CSP(0.3, n=0.0, observed=1.0))], ids=["SelectOnce", "SelectPerLayer"])
def test_a_method_of_three_lines(lines, same, tmp_path):
    """From a file; it chooses what the registered method does that scores like it."""
    path = tmp_path / "mine.py"
    path.write_text("\n".join(lines))
    mine = load(f"{path}:Mine", keep=0.3)
    assert mine.name == "mine" and str(mine).startswith("mine, keep 0.3")
    network, image = small_network(1, 2, 3), random_image(14)
    ours, theirs = (forced(network, [PROMPT], image, pruner, steps=3) for pruner in (mine, same))
    assert torch.equal(ours.logits, theirs.logits) and ours.answer.kept == theirs.answer.kept
    sets = [kept_sets(kv, image) for kv in ours.held[0]]
    assert sets == [kept_sets(kv, image) for kv in theirs.held[0]] and min(map(len, sets[-1])) == 4


@pytest.mark.parametrize("base", [SelectOnce, SelectPerLayer])
def test_a_method_without_a_score_says_so(base):
    @dataclass
    class Unfinished(base):
        keep: float = 0.3
    with pytest.raises(NotImplementedError, match=r"^Unfinished needs a method score\(self, queries, kv\)$"):
        forced(small_network(1), [PROMPT], random_image(10), Unfinished())
