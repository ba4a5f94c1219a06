"""Options of a pruning method: the fields of its dataclass, and the check of their values."""
import math
import types
import typing
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from weights.messages import quoted

MOST = 2 ** 53              # whole numbers up to this one are exact wherever they go


@dataclass
class Options:
    """A dataclass whose fields are checked against their types when it is made: ValueError with one line."""
    name: ClassVar[str] = ""

    def __init_subclass__(cls):
        cls.name = vars(cls).get("name", cls.__name__.lower())

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in fields(self):
            value = getattr(self, field.name)
            if not fits(value, hints[field.name]):
                raise ValueError(f"{self.name}: {field.name} is {quoted(value)}, but must be "
                                 f"{in_words(hints[field.name])}")

    def options_set(self) -> dict[str, object]:
        """The options, other than `keep`, that are not at their default."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        defaults = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in values.items() if name != "keep" and value != defaults[name]}


def check_share(pruner: Options, option: str):
    """Raise ValueError if an option is neither a fraction of the image tokens nor a number of them."""
    value = getattr(pruner, option)
    good = 0 < value <= 1 if isinstance(value, float) else value >= 1
    if not good:
        raise ValueError(f"{pruner.name}: {option} is {quoted(value)}, but must be a fraction above 0 and at "
                         "most 1.0, or a whole number of image tokens, at least 1")


def check_least(pruner: Options, **least: float):
    """Raise ValueError if one of these options is below its least value."""
    for option, low in least.items():
        value = getattr(pruner, option)
        if value < low:
            raise ValueError(f"{pruner.name}: {option} is {quoted(value)}, but must be at least {low}")


def options(method: type[Options]) -> dict[str, str]:
    """Each option of a method, and in words what it may be."""
    hints = typing.get_type_hints(method)
    return {field.name: f"{in_words(hints[field.name])} (default {field.default})"
            for field in fields(method)}


def fits(value: object, hint: type) -> bool:
    """Whether an option of this type may have this value."""
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in typing.get_args(hint))
    if hint is float and type(value) is float:
        return math.isfinite(value)
    if hint in (float, int) and type(value) is int:
        return abs(value) <= MOST
    return type(value) is hint


def in_words(hint: type) -> str:
    """A type for people: "a number or none"."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(str, parts))
    if parts:
        return " or ".join(map(in_words, parts))
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "none"}
    return names.get(hint, str(hint))
