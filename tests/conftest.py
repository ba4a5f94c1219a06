"""`--pruner FILE.py:CLASS`: the tests that every pruning method must pass, for a method of your own too."""
from functools import partial

import pytest
import torch

from pruning import METHODS, load

torch.set_num_threads(1)            # the networks of these tests are too small to share


def pytest_addoption(parser: pytest.Parser):
    parser.addoption("--pruner", action="append", default=[], metavar="FILE.py:CLASS",
                     help="hold this method too against the tests that every pruner must pass; repeatable")


def pytest_generate_tests(metafunc: pytest.Metafunc):
    """`make` makes each registered or given method, with some of its options; it takes further options."""
    if "make" not in metafunc.fixturenames:
        return
    module = metafunc.module
    cases = {}
    for method in [*METHODS, *metafunc.config.getoption("pruner")]:
        several = module.KEEPS
        if method in module.OPTIONS:
            several = module.KEEPS[:1] + module.OPTIONS[method]
        for options in several:
            options = {**module.ALWAYS.get(method, {}), **options}
            name = " ".join([method, *map(str, options.values())])
            if "keeping_all" in metafunc.function.__name__:             # there, `keep` becomes 1.0 anyway
                options["keep"] = 1.0
            case = pytest.param(partial(load, method, **options), id=name)
            cases.setdefault((method, *options.items()), case)
    metafunc.parametrize("make", cases.values())
