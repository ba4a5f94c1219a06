"""Runs a checkpoint's chat template, which is a stranger's program, within bounded time and memory.

    source ── compile_template ─► jinja2.Template ── render(template, context, Meter(length)) ─► text

Jinja's own sandbox keeps a template away from files and from Python's internals, but a template could still
loop for years or build a text of gigabytes. Here it pays for everything from one `Meter` (meter.py), and an
operation pays for its operands before it runs. Only the functions, methods, filters and tests that are listed
here can run, because only their cost is known beforehand. Nothing is computed while a template is compiled.
"""
import json
import warnings
from collections.abc import Callable
from datetime import datetime
from itertools import chain
from types import BuiltinMethodType, MethodType

import jinja2
from jinja2 import nodes
from jinja2.defaults import DEFAULT_TESTS
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace

from weights.meter import LISTS, METER, MOST_BITS, PAYMENTS, STEP, Meter, add_payments, meter_of

MOST_SOURCE = 60_000        # characters of a template; the official ones have 5,000
MOST_INDENT = 16            # spaces, of JSON
MOST_DATE_FORMAT = 100      # characters


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Methods of text, lists, tuples and dicts. The slow ones may compare each character with each of an argument.
METHODS = _names("strip lstrip rstrip split rsplit splitlines partition rpartition startswith endswith "
                 "removeprefix removesuffix upper lower title capitalize casefold swapcase find rfind index "
                 "rindex count replace join isalnum isalpha isascii isdecimal isdigit islower isnumeric "
                 "isprintable isspace istitle isupper get items keys values copy")
SLOW_METHODS = _names("strip lstrip rstrip rsplit rpartition rfind rindex")

# Filters look at a value, at each of its items, or at all that is in them.
READING = _names("count d default first last length")
LISTING = _names("items list map reject rejectattr reverse select selectattr")
DEEP = _names("abs capitalize dictsort e escape float indent int join lower max min replace round safe sort "
              "string title trim unique upper")
BY_CHARACTER = _names("dictsort join list map max min reject rejectattr select selectattr sort title unique")
BY_ARGUMENT = LISTING | DEEP - _names("abs float int replace")      # they use each argument for each item
SMALL_NUMBERS = _names("indent round")                              # their work grows with the number given

DEEP_TESTS = _names("== eq equalto != ne < lt lessthan > gt greaterthan <= le >= ge in lower upper")
NUMBER_TESTS = _names("odd even divisibleby")                       # they would use a text as a format
UNKNOWN_TESTS = _names("filter test")
PLAIN_JINJA = ImmutableSandboxedEnvironment()                       # its filters and tests pay nothing


def compile_template(source: str) -> jinja2.Template:
    """A template ready for `render`. Raises an Exception of any kind where it is not valid."""
    if len(source) > MOST_SOURCE:
        raise ValueError(f"it has {len(source):,} characters, but may have at most {MOST_SOURCE:,}")
    environment = _Environment()
    tree = add_payments(environment.parse(source))
    tree.set_environment(environment)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # Python's own words about the code that jinja makes
        code = environment.compile(tree)
    return jinja2.Template.from_code(environment, code, environment.make_globals(None))


def render(template: jinja2.Template, context: dict, meter: Meter) -> str:
    """The text that a template writes. Raises an Exception of any kind where it fails."""
    return template.render({**context, METER: meter})


class _Generation(Extension):
    """`{% generation %}` marks the answers in a template; that matters in training only."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.With([], [], body, lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja with the settings that chat templates are written for, and payments."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, finalize=_printed,
                         extensions=["jinja2.ext.loopcontrols", _Generation])
        self.globals = {"range": safe_range, "dict": dict, "namespace": Namespace,
                        "raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.filters = {name: _filter(name) for name in READING | LISTING | DEEP}
        self.filters.update({"tojson": _tojson, **PAYMENTS})
        self.tests = {name: _test(name) for name in DEFAULT_TESTS.keys() - UNKNOWN_TESTS}

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        meter = meter_of(context)
        meter.spend(STEP)
        price = meter.size(left) + meter.size(right)
        if operator == "%" and isinstance(left, str):
            raise SecurityError("it formats text with %, which is not supported: it can use ~ instead")
        if operator == "**" and not (isinstance(right, (int, float)) and abs(right) <= MOST_BITS):
            raise SecurityError(f"it uses a power above {MOST_BITS}")
        if operator == "*" and isinstance(left, (str, *LISTS)) and isinstance(right, int):
            meter.spend(price * max(right, 0))
        if operator == "*" and isinstance(left, int) and isinstance(right, (str, *LISTS)):
            meter.spend(price * max(left, 0))
        return meter.made(super().call_binop(context, operator, left, right))

    def call(self, context: Context, function: object, /, *args: object, **kwargs: object) -> object:
        meter = meter_of(context)
        meter.spend(STEP)
        for argument in chain(args, kwargs.values()):
            meter.weigh_argument(argument)
        owner = function.__self__ if isinstance(function, (BuiltinMethodType, MethodType)) else None
        if isinstance(owner, (str, list, tuple, dict)):
            _pay_method(meter, owner, function.__name__, args)
        elif not (isinstance(function, (Macro, LoopContext, BlockReference, jinja2.Undefined))
                  or isinstance(owner, LoopContext)
                  or any(function is known for known in self.globals.values())):
            name = getattr(function, "__name__", type(function).__name__)
            raise SecurityError(f"it calls {name}, which is not supported")
        return meter.made(super().call(context, function, *args, **kwargs))


def _pay_method(meter: Meter, owner: str | list | tuple | dict, name: str, args: tuple):
    """Pay for a method before it is called."""
    if name not in METHODS:
        raise SecurityError(f"it calls {type(owner).__name__}.{name}, which is not supported")
    price = meter.size(owner)
    if isinstance(owner, (list, tuple)):
        meter.weigh(owner)                      # index and count compare whole items
    if name == "replace":
        _pay_replace(meter, owner, *args[:2])
    elif name == "join" or name in SLOW_METHODS:
        meter.spend(price * max((len(a) for a in args if isinstance(a, (str, *LISTS))), default=0))


def _pay_replace(meter: Meter, text: str, old: object = "", new: object = "", count: object = -1):
    """Pay for what takes the place of `old`."""
    if not isinstance(old, str) or not isinstance(new, str):
        raise TypeError("it replaces something that is not text")
    meter.spend(text.count(old) * len(new))


# ---- filters and tests

def _filter(name: str) -> Callable:
    """One of jinja's filters, paid for."""
    @jinja2.pass_context
    def paid(context: Context, value: object, *args: object, **kwargs: object) -> object:
        meter = meter_of(context)
        _pay_filter(meter, name, value, [*args, *kwargs.values()])
        if name == "replace":
            _pay_replace(meter, str(value), *args, **kwargs)
        return meter.made(PLAIN_JINJA.call_filter(name, value, args, kwargs, context))
    return paid


def _pay_filter(meter: Meter, name: str, value: object, arguments: list):
    """Pay for what a filter reads, and for its work with each item or character and each argument."""
    for argument in arguments:
        meter.weigh_argument(argument)
        if name in SMALL_NUMBERS and isinstance(argument, int) and abs(argument) > MOST_BITS:
            raise TypeError(f"it gives the filter {name} a number above {MOST_BITS}")
    if name in READING:
        meter.spend(STEP)
    elif name in LISTING:
        meter.size(value)
    else:
        meter.weigh(value)
    length = len(value) if isinstance(value, (str, *LISTS)) else 1
    if name in BY_CHARACTER and isinstance(value, str):
        meter.spend(STEP * length)
    if name in BY_ARGUMENT:
        meter.spend(length * sum(len(argument) for argument in arguments if isinstance(argument, str)))
    if name == "indent":
        meter.spend(length * MOST_BITS)


def _test(name: str) -> Callable:
    """One of jinja's tests, paid for."""
    @jinja2.pass_context
    def paid(context: Context, value: object, *args: object) -> bool:
        meter = meter_of(context)
        meter.spend(STEP)
        if name in NUMBER_TESTS and not all(isinstance(number, (int, float)) for number in (value, *args)):
            raise TypeError(f"it asks whether something is {name} that is no number")
        if name in DEEP_TESTS:
            for operand in (value, *args):
                meter.weigh_argument(operand)
        return PLAIN_JINJA.call_test(name, value, args, {}, context)
    return paid


@jinja2.pass_context
def _printed(context: Context, value: object) -> object:
    """Every value on its way into the output."""
    meter_of(context).weigh(value)
    return value


@jinja2.pass_context
def _tojson(context: Context, value: object, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """A value as JSON, which leaves HTML alone, as in transformers."""
    meter = meter_of(context)
    before = meter.left
    meter.weigh(value)
    if not (indent is None or type(indent) is int and 0 <= indent <= MOST_INDENT):
        raise TypeError(f"it indents JSON by more than {MOST_INDENT}")
    if separators is not None and any(len(text) > MOST_INDENT for text in separators):
        raise TypeError(f"it separates JSON with more than {MOST_INDENT} characters")
    meter.spend((before - meter.left) * (indent or 0))
    return meter.made(json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                                 sort_keys=sort_keys))


# ---- functions

def _raise_exception(words: str):
    raise jinja2.TemplateError(words)


@jinja2.pass_context
def _strftime_now(context: Context, form: str) -> str:
    """Today in a format of strftime, or the date that was given instead."""
    if len(form) > MOST_DATE_FORMAT:
        raise ValueError(f"it gives strftime_now a format of over {MOST_DATE_FORMAT} characters")
    given = context.parent.get("date_string")
    return datetime.now().strftime(form) if given is None else given
