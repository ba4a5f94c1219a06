"""The options of a method: their names, types and values, from Python and from the command line."""
import math
from dataclasses import fields
from typing import Literal

import pytest
from helpers import refused

from cli.options import catalogue, parse_option
from pruning import METHODS, find, load, options
from pruning.options import fits


@pytest.mark.parametrize("method", METHODS)
def test_registered_methods(method):
    pruner = load(method)
    assert type(pruner) is find(method) is METHODS[method] and pruner.name == method
    assert set(options(METHODS[method])) >= {"keep"} and method in catalogue()
    with refused(parts=["'nonsense'", *options(METHODS[method])], longest=600):     # it lists them all
        load(method, nonsense=1)
    nothing = [None] if METHODS[method].keep is not None else []       # who may do without finds a number
    for keep in 0, 0.0, -1, 1.5, -0.5, True, "half", float("nan"), float("inf"), [0.5], *nothing:
        with refused(parts=[method, "keep", repr(keep)]):
            load(method, keep=keep)


@pytest.mark.parametrize("method, settings, parts", [
    ("fastvv", {}, ["'fastvv'", *METHODS, "mine.py:Mine"]), ("", {}, [*METHODS]), ("Pruner", {}, [*METHODS]),
    ("fastv", {"positions": "first"}, ["fastv", "positions", "'first'", "last", "all"]),
    ("fastv", {"full_layers": 1.5}, ["full_layers", "1.5", "whole number"]),
    ("fastv", {"seed": "x"}, ["seed", "'x'"]),
    ("trimmed_llama", {"per": "layer"}, ["'layer'", "head", "kv_head"]),
    ("trimmed_llama", {"budget": "all"}, ["budget", "'all'", "none"]),
    ("trimmed_llama", {"early_caches": True}, ["early_caches", "True", "trim", "full"]),
    ("random", {"when": "later"}, ["when", "'later'", "prefill", "boundary"]),
    ("downsample", {"keep": 3}, ["downsample", "3", "fraction"])], ids=str)
def test_what_is_unknown_gets_one_line(method, settings, parts):
    with refused(parts=parts):
        load(method, **settings)


BAD_VALUES = [int(1e25), 10 ** 401, math.nan, math.inf, -1, "x", None]
ALLOWED = {"seed": [-1], "guide": ["x"], "threshold": [-1, None], "budget": [None], "theta": [None]}
OPTIONS = [(method, field.name) for method in METHODS for field in fields(METHODS[method])]


@pytest.mark.parametrize("method, option", OPTIONS, ids=map(" ".join, OPTIONS))
def test_bad_values(method, option):
    """A value that an option does not allow gets one short line that names the option."""
    allowed = [None] if (method, option) == ("zipvl", "keep") else ALLOWED.get(option, [])
    for value in BAD_VALUES:
        if value in allowed:
            load(method, **{option: value})
        else:
            with refused(f"^{method}: {option} is .*, but must be "):
                load(method, **{option: value})


@pytest.mark.parametrize("text, expected", [
    ("keep=0.5", ("keep", 0.5)), ("keep=3", ("keep", 3)), ("a=TRUE", ("a", True)), ("a=false", ("a", False)),
    ("a=None", ("a", None)), ("per=layer", ("per", "layer")), ("a=1e-3", ("a", 0.001)),
    ("a=x=y", ("a", "x=y")), ("a=-2", ("a", -2)), ("a=", ("a", ""))])
def test_parse_option(text, expected):
    name, value = parse_option(text)
    assert (name, value) == expected and type(value) is type(expected[1])


@pytest.mark.parametrize("text", ["keep", "=3", "", "="])
def test_an_option_that_is_none(text):
    with refused(parts=[repr(text), "option=value"]):
        parse_option(text)


def test_fits():
    good = [(1, int), (1, float), (0.5, float), (True, bool), ("x", str), (None, int | None),
            (2, float | int), ("a", Literal["a", "b"])]
    bad = [(True, int), (1, bool), (True, float), (0.5, int), (None, int), (float("nan"), float), (1, str),
           ("c", Literal["a", "b"])]
    assert all(fits(*pair) for pair in good) and not any(fits(*pair) for pair in bad)
