"""A chat template pays for what it does: the meter, and payments that are added to its syntax.

`Meter` counts units down: a character costs 1, a step or an item of a list costs STEP. `add_payments`
rewrites a parsed template: every round of a loop, every call of a macro and all output pay, and so do the
expressions that jinja's environment cannot intercept: comparisons, `~`, slices, and lists written out.
The payments are filters whose names no template can spell. sandbox.py adds those of operators, calls, filters
and tests.
"""
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from itertools import chain, islice

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.visitor import NodeTransformer

WORK = 2 ** 25              # units for any conversation: a million steps, which take about two seconds
WORK_PER_CHARACTER = 256    # and more for a long one: an official template looks at each character on its own
STEP = 32                   # units for a step or an item, which take about as long as 32 characters
MOST_DEPTH = 32             # levels of lists within lists
MOST_BITS = 64              # of whole numbers
METER = "~meter"            # the name of the meter in the context; no template can spell it

LISTS = list, tuple, dict, range
SCALARS = int, float, type(None), jinja2.Undefined
VIEWS = Iterator, KeysView, ValuesView, ItemsView


class Meter:
    """What a template may still spend. Every method raises TemplateError when nothing is left."""

    def __init__(self, characters: int):
        """For a conversation of so many characters."""
        self.units = WORK + WORK_PER_CHARACTER * characters
        self.left = self.units

    def spend(self, units: int):
        """Pay a number of units."""
        self.left -= units
        if self.left < 0:
            raise jinja2.TemplateError(f"it takes more than {self.units // STEP:,} steps, or makes too much "
                                       "text")

    def size(self, value: object) -> int:
        """Pay for a value, but not for what is in its items. Returns the price."""
        price = STEP
        if isinstance(value, str):
            price = len(value)
        elif isinstance(value, LISTS):
            price = STEP * len(value)
        self.spend(price)
        return price

    def weigh(self, value: object, depth: int = 0):
        """Pay for all of a value, with its items and theirs. Raises TypeError unless it is plain data."""
        if isinstance(value, SCALARS):
            self.spend(STEP)
            check_number(value)
            return
        if not isinstance(value, (str, *LISTS)):
            raise TypeError(f"it uses a {type(value).__name__} as if it were text")
        self.spend(STEP)
        self.size(value)
        if isinstance(value, (list, tuple, dict)):
            if depth == MOST_DEPTH:
                raise TypeError(f"it puts lists into lists, more than {MOST_DEPTH} levels deep")
            for item in chain(value, value.values() if isinstance(value, dict) else ()):
                self.weigh(item, depth + 1)

    def weigh_argument(self, value: object):
        """The same for a value that may also be a namespace, a macro or a loop, which is passed on unread."""
        if isinstance(value, (str, *LISTS, *SCALARS)):
            self.weigh(value)
        else:
            self.spend(STEP)

    def made(self, result: object) -> object:
        """Pay for the result of an operation. What would be computed later becomes a list now."""
        if isinstance(result, VIEWS):
            result = list(islice(result, self.left // STEP + 1))
        self.size(result)
        check_number(result)
        return result


def meter_of(context: Context) -> Meter:
    """The meter of the rendering that a context belongs to."""
    return context.parent[METER]


def check_number(value: object):
    """Raise TypeError for a whole number that arithmetic would be slow with."""
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise TypeError(f"it computes a whole number of more than {MOST_BITS} bits")


# ---- the payments, as filters

@jinja2.pass_context
def _spend(context: Context, units: int):
    meter_of(context).spend(max(units, 0))


@jinja2.pass_context
def _step(context: Context, value: object) -> object:
    meter_of(context).spend(STEP)
    return value


@jinja2.pass_context
def _size(context: Context, value: object) -> object:
    meter_of(context).size(value)
    return value


@jinja2.pass_context
def _weigh(context: Context, value: object) -> object:
    meter_of(context).weigh_argument(value)
    return value


@jinja2.pass_context
def _concat(context: Context, values: list) -> str:
    meter_of(context).weigh(values)
    return "".join(map(str, values))


PAYMENTS = {"~spend": _spend, "~step": _step, "~size": _size, "~weigh": _weigh, "~concat": _concat}


# ---- where they are added

def add_payments(template: nodes.Template) -> nodes.Template:
    """The parsed template with its payments. Raises ValueError where a text in it is not valid Unicode."""
    return _Payments().visit(template)


class _Payments(NodeTransformer):
    """Visits every node of a template; children first."""

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if isinstance(node.value, str) and any("\ud800" <= c <= "\udfff" for c in node.value):
            raise ValueError("it has a text that is not valid Unicode")     # and could be taken for a mark
        return node

    def visit_Output(self, node: nodes.Output) -> list[nodes.Node]:
        self.generic_visit(node)
        length = sum(len(child.data) for child in node.nodes if isinstance(child, nodes.TemplateData))
        return [_payment(node, STEP + length), node]

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        if node.test is not None:               # of "for ... if test": it also runs where the body does not
            node.test = _paid(node.test, "~step")
        return _with_payment(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return _with_payment(self.generic_visit(node))

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return _with_payment(self.generic_visit(node))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _paid(node.expr, "~weigh")
        for operand in node.ops:
            operand.expr = _paid(operand.expr, "~weigh")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _paid(nodes.List(node.nodes, lineno=node.lineno), "~concat")

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return _paid(self.generic_visit(node), "~weigh")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return _paid(self.generic_visit(node), "~weigh")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _paid(node, "~weigh") if node.ctx == "load" else node        # others are assigned to

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _paid(node, "~size") if isinstance(node.arg, nodes.Slice) else node


def _paid(node: nodes.Expr, name: str) -> nodes.Filter:
    """The expression with a payment around it."""
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _payment(near: nodes.Node, units: int) -> nodes.Node:
    """A statement that pays so many units."""
    return nodes.ExprStmt(_paid(nodes.Const(units, lineno=near.lineno), "~spend"), lineno=near.lineno)


def _with_payment(node: nodes.Node) -> nodes.Node:
    """The same loop or macro; it pays for a step each time that its body begins."""
    node.body.insert(0, _payment(node, STEP))
    return node
