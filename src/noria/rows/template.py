"""Renders a template that nobody trusts: Jinja2's immutable sandbox in which every operation is paid for beforehand.

Loops, calls, texts and lists cost units of one budget, so a template that loops for ever or doubles a text ends after
the same operations on every machine. That needs no signal, no thread and no child process. Knows nothing of chats.
"""

import functools
import json
import re
import time
from collections.abc import Iterable, Mapping
from typing import ClassVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from noria.config import InputError

MAX_SOURCE = 2**16  # characters; the largest that are published have 20,000
BUDGET = 2**28  # characters made and steps taken in one rendering; a conversation of 1 MB costs about 10 million
STEP = 100  # what a step of a loop, a call or an operator costs beside the text that it makes
_ITEM = 50  # what each thing in a list or an object costs
SECONDS = 5.0  # the same once more by the clock, in case an operation is dearer than its price
_LARGEST = 2**20  # integers above this are no argument of a function
_MAX_BITS = 4096  # of an integer

_TEXT = "strip lstrip rstrip split rsplit splitlines startswith endswith replace upper lower title capitalize casefold"
_TEXT += " swapcase join find rfind index rindex count partition rpartition removeprefix removesuffix isdigit isalpha"
_TEXT += " isalnum isspace isupper islower istitle isnumeric isdecimal isascii center ljust rjust zfill expandtabs"
_METHODS = {
    str: frozenset(_TEXT.split()),
    dict: frozenset({"get", "items", "keys", "values", "copy"}),
    list: frozenset({"index", "count", "copy"}),
    tuple: frozenset({"index", "count"}),
    int: frozenset({"bit_length"}),
    float: frozenset({"is_integer"}),
}
_FILTERS = "abs capitalize count d default dictsort e escape first float groupby int items last length list lower"
_FILTERS += " map max min reject rejectattr reverse round safe select selectattr sort string title tojson trim truncate"
_FILTERS += " unique upper wordcount"
_GROWING = frozenset("replace join indent center batch slice sum ljust rjust zfill expandtabs round".split())
_GLOBALS = ("range", "dict", "joiner")


class TemplateError(InputError):
    """A template that cannot be rendered: the message says why."""


class Template:
    """A compiled template. `now` is the date that it is told, always the same. Raises TemplateError."""

    def __init__(self, source: str, now):
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"the chat template has {len(source)} characters, at most {MAX_SOURCE} are read")
        self._environment = _Environment(now)
        with _as_template_error():
            self._environment.refill()
            tree = _Priced(self._environment).visit(self._environment.parse(source))
            self._template = self._environment.from_string(tree)

    def render(self, variables: Mapping) -> str:
        """The text that the template makes of JSON-like variables. Raises TemplateError."""
        self._environment.refill()
        with _as_template_error():
            return self._template.render(variables)


class _as_template_error:
    """Whatever goes wrong in a template is the template's error, in one line."""

    def __enter__(self):
        pass

    def __exit__(self, kind, error, traceback):
        if isinstance(error, Exception) and not isinstance(error, TemplateError):
            line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__} "
            reason = kind + " ".join(str(error).split())[:300]
            raise TemplateError(f"the chat template cannot be rendered{line}: {reason}") from None


class _Names(Namespace):
    """A namespace whose names are plain, and which prints as nothing but itself."""

    def __init__(*args, **kwargs):  # `namespace(self=...)` is right
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name, value):
        _check_name(name)
        Namespace.__setitem__(self, name, value)

    def __repr__(self):
        return "<Namespace>"


def _check_name(name):
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


class _Generation(Extension):
    """`{% generation %}`, which marks what the model is trained on: here only what is inside it."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with a budget. Templates see the functions that transformers gives them."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self, now):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            optimized=False,
            finalize=self._shown,
        )
        self.left, self.deadline = 0, 0.0
        known = self.filters | {"tojson": _tojson}
        self.filters = {name: self._paid(name, known[name]) for name in {*_FILTERS.split(), *_GROWING & set(known)}}
        self.tests = {name: self._paid(name, test, everything=True) for name, test in self.tests.items()}
        self.globals = {name: self.globals[name] for name in _GLOBALS} | {
            "namespace": _Names,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_at(now),
        }

    def refill(self) -> None:
        self.left, self.deadline = BUDGET, time.monotonic() + SECONDS

    def spend(self, cost: float) -> None:
        """Raises TemplateError when the budget is used up."""
        self.left -= cost + STEP
        if self.left < 0 or time.monotonic() > self.deadline:
            raise TemplateError("the chat template was stopped: it takes too many steps or makes too long a text")

    def weighed(self, value):
        """`value`, paid for by all that is inside it: what is shared counts each time, as it does when it is printed."""
        self.spend(self.weight(value))
        return value

    def weight(self, value) -> int:
        if isinstance(value, str):
            return len(value)
        total, left = 0, [value]
        while left:
            one = left.pop()
            if isinstance(one, str):
                total += len(one)
            elif isinstance(one, Mapping):
                left += [*one.keys(), *one.values()]
            elif isinstance(one, list | tuple):
                left += one
            total += _ITEM
            if total + _ITEM * len(left) > self.left:
                raise TemplateError("the chat template was stopped: it makes too large a value")
        return total

    def concat(self, pieces: Iterable[str]) -> str:
        """Joins what a template, a macro or a block gives out."""
        kept = []
        for piece in pieces:
            self.left -= len(piece)
            kept.append(piece)
            if self.left < 0:
                self.spend(0)
        return "".join(kept)

    def joined(self, pieces: list) -> str:
        """The operator `~`."""
        return self.concat(map(str, self.weighed(pieces)))

    def _shown(self, value):
        self.spend(self.weight(value))
        return value

    def is_safe_attribute(self, obj, attr, value) -> bool:
        if isinstance(obj, type):
            return False
        allowed = next((names for kind, names in _METHODS.items() if isinstance(obj, kind)), None)
        return (allowed is None or attr in allowed) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value):
        if getattr(value, "__name__", "") in ("format", "format_map") and isinstance(
            getattr(value, "__self__", None), str
        ):
            raise SecurityError("str.format is not for chat templates: join the pieces with ~")
        return

    def call(self, context, function, /, *args, **kwargs):
        if getattr(function, "__self__", None) is self:
            return function(*args)
        receiver = getattr(function, "__self__", None)
        if isinstance(receiver, str | Mapping | list | tuple):
            self._pay(function.__name__, (receiver, *args), kwargs)
        else:
            self.spend(self.weight([args, kwargs]))
            _check_integers((*args, *kwargs.values()))
        return self._result(super().call(context, function, *args, **kwargs))

    def call_binop(self, context, operator, left, right):
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(1, right) if operator == "**" else left.bit_length() + right.bit_length()
            if operator in ("**", "*") and bits > _MAX_BITS:
                raise TemplateError("the chat template was stopped: it makes too large a number")
            self.spend(0)
        elif operator == "*":
            self.spend((1 + self._factor(left)) * (1 + self._factor(right)))
        elif operator == "%" and isinstance(left, str):
            if len(left) > 1000 or re.search(r"\d{3}|\*", left):
                raise TemplateError("the chat template was stopped: its format is too wide")
            self.spend(len(left) + self.weight(right))
        else:
            self.spend(self.weight(left) + self.weight(right))
        return super().call_binop(context, operator, left, right)

    def _paid(self, name, function, everything=False):
        """A filter or test that is paid for beforehand, and its result afterwards."""
        skipped = 1 if getattr(function, "jinja_pass_arg", None) else 0

        @functools.wraps(function)
        def paid(*args, **kwargs):
            if everything:
                self.spend(self.weight(args[skipped:]))
            if name == "join":
                args = (*args[:skipped], list(args[skipped]), *args[skipped + 1 :])
            self._pay(name, args[skipped:], kwargs)
            return self._result(function(*args, **kwargs))

        return paid

    def _pay(self, name, args, kwargs) -> None:
        """What a method or filter of texts and lists costs: their length, or all lengths multiplied where they grow."""
        args = (*args, *kwargs.values())
        _check_integers(args[1:])
        cost = len(args[0]) if args and hasattr(args[0], "__len__") else 0
        if name in _GROWING:
            cost = 1
            for arg in args:
                cost *= 1 + self._factor(arg)
        self.spend(cost)

    def _factor(self, arg) -> int:
        return abs(int(arg)) if isinstance(arg, int | float) and abs(arg) < 2**62 else self.weight(arg)

    def _result(self, value):
        if isinstance(value, str | Mapping | list | tuple):
            self.spend(self.weight(value))
        return value


class _Priced(NodeTransformer):
    """Puts the budget into a template's tree: where loops turn, and where texts, lists and comparisons are made."""

    def __init__(self, environment: _Environment):
        self._environment = environment

    def _call(self, name: str, *arguments) -> nodes.Call:
        call = nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)
        return call.set_lineno(1).set_environment(self._environment)

    def _weighed(self, node):
        return self._call("weighed", self.generic_visit(node))

    def visit_For(self, node):
        node = self.generic_visit(node)
        step = nodes.ExprStmt(self._call("spend", nodes.Const(0))).set_lineno(node.lineno)
        node.body.insert(0, step.set_environment(self._environment))
        return node

    def visit_Concat(self, node):
        node = self.generic_visit(node)
        return self._call("joined", nodes.List(node.nodes).set_lineno(node.lineno).set_environment(self._environment))

    def visit_List(self, node):
        return self._weighed(node)

    def visit_Dict(self, node):
        return self._weighed(node)

    def visit_Tuple(self, node):
        return self._weighed(node) if node.ctx == "load" else self.generic_visit(node)

    def visit_Getitem(self, node):
        return self._weighed(node) if isinstance(node.arg, nodes.Slice) else self.generic_visit(node)

    def visit_Compare(self, node):
        node = self.generic_visit(node)
        node.expr = self._call("weighed", node.expr)
        for operand in node.ops:
            operand.expr = self._call("weighed", operand.expr)
        return node

    def visit_ScopedEvalContextModifier(self, node):
        raise TemplateError("the chat template has a block autoescape, which is for HTML")


def _check_integers(args: Iterable) -> None:
    for arg in args:
        if isinstance(arg, int) and abs(arg) > _LARGEST:
            raise TemplateError("the chat template was stopped: it calls a function with too large a number")


def _raise_exception(message):
    raise jinja2.TemplateError(str(message))


def _strftime_at(now):
    def strftime_now(format):
        if len(format) > 100 or re.search(r"%\W*\d", format):
            raise TemplateError("the chat template was stopped: its format of the date is too wide")
        return now.strftime(format)

    return strftime_now


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """JSON without the escapes for HTML that Jinja2's own has."""
    if len(str(indent)) > 16 or (isinstance(indent, int) and not 0 <= indent <= 16):
        raise TemplateError("the chat template was stopped: it indents JSON too far")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
