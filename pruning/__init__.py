"""What to keep of the image: the methods by name, and how to load one, also from a file of your own."""
import importlib.util
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

from pruning.attention import attention_received
from pruning.methods.aircache import AirCache
from pruning.methods.attention_matching import AttentionMatching
from pruning.methods.attention_predictor import AttentionPredictor
from pruning.methods.cdpruner import CDPruner
from pruning.methods.coreset import Coreset
from pruning.methods.csp import CSP
from pruning.methods.divprune import DivPrune
from pruning.methods.downsample import Downsample
from pruning.methods.elastic_cache import ElasticCache
from pruning.methods.fastv import FastV
from pruning.methods.mint import MINT
from pruning.methods.prumerge import PruMerge
from pruning.methods.quecc import QueCC
from pruning.methods.random import Random
from pruning.methods.scope import Scope
from pruning.methods.sgl import SGL
from pruning.methods.spatial import Spatial
from pruning.methods.tome import ToMe
from pruning.methods.topv import TopV
from pruning.methods.trimmed_llama import TrimmedLlama
from pruning.methods.visionzip import VisionZip
from pruning.methods.zipvl import ZipVL
from pruning.options import options
from pruning.pruner import Pruner, SelectOnce, SelectPerLayer, Wrapper, check_pruner, hooks
from pruning.select import top_k_mask
from weights.messages import one_line, quoted

METHODS = {method.name: method for method in (
    Pruner, Coreset, TrimmedLlama, FastV, ElasticCache, CSP, AirCache, ZipVL, TopV, AttentionPredictor, MINT,
    SGL, QueCC, DivPrune, CDPruner, VisionZip, PruMerge, ToMe, Scope, AttentionMatching, Random, Spatial,
    Downsample)}

__all__ = ["METHODS", "Pruner", "SelectOnce", "SelectPerLayer", "Wrapper", "attention_received",
           "check_pruner", "find", "hooks", "load", "options", "top_k_mask"]


def load(method: str, /, **settings) -> Pruner:
    """A pruner by its name, or by "path/to/file.py:Class"; the settings are its options.

    Raises ValueError with one line that lists what there is, for an unknown method, option or value.
    """
    found = find(method)
    unknown = settings.keys() - {field.name for field in fields(found)}
    if unknown:
        known = ", ".join(f"{name}: {what}" for name, what in options(found).items())
        raise ValueError(f"{one_line(method)} has no option {quoted(min(unknown))}; it has {known}")
    return found(**settings)


def find(method: str) -> type[Pruner]:
    """The class that `load` makes a pruner of."""
    path, colon, name = method.rpartition(":")
    if not colon and method in METHODS:
        return METHODS[method]
    if not path.endswith(".py"):
        raise ValueError(f"there is no pruning method {quoted(method)}; choose one of {', '.join(METHODS)}, "
                         "or name a class in a file, as in mine.py:Mine")
    found = vars(run_file(Path(path))).get(name)
    if not (isinstance(found, type) and issubclass(found, Pruner)):
        raise ValueError(f"{one_line(path)} has no class {quoted(name)} that is a Pruner")
    return found


def run_file(path: Path) -> ModuleType:
    """The module in a file, executed again each time."""
    try:
        there = path.is_file()
    except OSError as error:                # a name of 300 letters, or a folder without permission
        raise ValueError(f"{one_line(path)}: {error.strerror}; name a method as in mine.py:Mine") from None
    if not there:
        raise ValueError(f"{one_line(path)}: no such file; name a method as in mine.py:Mine")
    spec = importlib.util.spec_from_file_location(str(path), path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module         # where dataclasses look up annotations
    try:
        spec.loader.exec_module(module)
    except Exception as error:              # it is a program: anything may fail
        raise ValueError(f"{one_line(path)}: cannot be imported: {type(error).__name__}: {one_line(error)}"
                         ) from error
    return module
