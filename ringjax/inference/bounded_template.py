"""Jinja for templates that are not trusted: text can be made of messages, in bounded time and memory, and nothing else.

Jinja's sandbox keeps a template from Python's objects. It does not keep one from loops in loops, from doubling a string
forty times or from padding it to a gigabyte. Here every value that is made, compared or written is paid for:

    a character 1    an item, a call or a turn of a loop 64    all that a rendering may take: WORK

Filters and methods are those of a list; whatever else is there would have to be charged too.
"""

import contextvars
import re
from collections.abc import Iterable, Iterator
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

WORK = 1 << 27
"""Characters that a rendering may make, about a second's work; a context of 1M tokens has 2^22."""
MOST_TEMPLATE = 1 << 17
"""Characters of a template; Llama 3.1's with tools has 2^12."""
_STEP = 64
_LARGEST = 1 << 63
_FILTERS = frozenset(
    (
        "abs",
        "capitalize",
        "count",
        "d",
        "default",
        "dictsort",
        "e",
        "escape",
        "first",
        "float",
        "indent",
        "int",
        "items",
        "join",
        "last",
        "length",
        "list",
        "lower",
        "map",
        "max",
        "min",
        "reject",
        "rejectattr",
        "replace",
        "reverse",
        "round",
        "safe",
        "select",
        "selectattr",
        "sort",
        "string",
        "sum",
        "title",
        "tojson",
        "trim",
        "unique",
        "upper",
    )
)
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        (
            "capitalize",
            "casefold",
            "count",
            "endswith",
            "find",
            "index",
            "isalnum",
            "isalpha",
            "isascii",
            "isdecimal",
            "isdigit",
            "islower",
            "isnumeric",
            "isspace",
            "istitle",
            "isupper",
            "join",
            "lower",
            "lstrip",
            "partition",
            "removeprefix",
            "removesuffix",
            "replace",
            "rfind",
            "rindex",
            "rpartition",
            "rsplit",
            "rstrip",
            "split",
            "splitlines",
            "startswith",
            "strip",
            "swapcase",
            "title",
            "upper",
        )
    ),
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
}
# Filters that look at no part of their value, and those that look at its items but not into them.
_CONSTANT = frozenset(("count", "d", "default", "first", "last", "length"))
_SHALLOW = frozenset(("items", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr"))
_COMPARES = frozenset((
    "!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in", "le", "lessthan", "lt", "ne",
))  # fmt: skip
_WIDE = re.compile(r"%[^%a-zA-Z]*(\d{3,}|\*)")

_left: contextvars.ContextVar[list[int]] = contextvars.ContextVar("left")


def render(template: jinja2.Template, **variables: Any) -> str:
    """The text of a template of `BoundedEnvironment`.

    Raises jinja2.TemplateError where it refuses, or does what a template must not; or what Python raises for its
    mistakes (TypeError, ValueError, RecursionError, …).
    """
    token = _left.set([WORK])
    try:
        return template.render(**variables)
    finally:
        _left.reset(token)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox with an account."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options: Any):
        # Nothing is worked out before there is an account.
        super().__init__(optimized=False, finalize=_written, **options)
        self.filters = {name: _charged_filter(name, self.filters[name]) for name in _FILTERS}
        self.filters |= {name: jinja2.pass_context(of) for name, of in _OWN_FILTERS.items()}
        self.tests = {name: _charged_test(name, of) for name, of in self.tests.items()}
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > MOST_TEMPLATE:
            raise jinja2.TemplateSyntaxError(f"{len(source)} characters, more than {MOST_TEMPLATE}", 1)
        return _with_account(super()._parse(source, name, filename))

    def call_binop(self, context, operator: str, left: Any, right: Any) -> Any:
        _check_operands(operator, left, right)
        return _made(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        kind = next((kind for kind in (str, dict, list, tuple, int, float, bytes) if isinstance(obj, kind)), None)
        if kind is not None and attr not in _METHODS.get(kind, ()):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def getitem(self, obj: Any, argument: Any) -> Any:
        # The hash of a tuple is made of all that it holds.
        return super().getitem(obj, _charge(argument) if isinstance(argument, tuple) else argument)

    def call(__self, __context, __obj, *args, **kwargs):  # noqa: B902 - as Jinja calls it
        of = getattr(__obj, "__self__", None)
        if not isinstance(__obj, (Macro, LoopContext)) and __obj is not Namespace:
            _charge([*args, *kwargs.values()])
        if isinstance(of, (list, tuple)):
            _charge(of)
        if isinstance(of, str):
            _spend(len(of))
            if __obj.__name__ == "replace":
                _check_replacement(of, *args)
            if __obj.__name__ == "join":
                args = (_check_joined(of, *args),)
        _spend(_STEP)
        return _made(super().call(__context, __obj, *args, **kwargs))


# --- the account ----------------------------------------------------------------------------------------------------


def _spend(work: int) -> None:
    left = _left.get()
    left[0] -= work
    if left[0] < 0:
        raise jinja2.TemplateRuntimeError(f"it takes more work than {WORK} characters of text; it loops, or grows")


def _charge(value: Any, text: bool = False) -> Any:
    """The value, all of whose parts are paid for; `text`: it is about to become text, which only plain values can."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            _spend(len(one) + 1)
        elif isinstance(one, dict):
            _spend(_STEP * (len(one) + 1))
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, (list, tuple, set, frozenset)):
            _spend(_STEP * (len(one) + 1))
            waiting += one
        elif isinstance(one, int) and not -_LARGEST <= one <= _LARGEST:
            raise jinja2.TemplateRuntimeError("it makes a number beyond 64 bits")
        elif text and not (one is None or isinstance(one, (int, float, Undefined)) or hasattr(one, "__html__")):
            raise jinja2.TemplateRuntimeError(f"it writes a {type(one).__name__}, which has no text")
        else:
            _spend(1)
    return value


def _made(value: Any) -> Any:
    """A value that was just made, paid for, but not what it holds: that was made before. Iterators become lists."""
    value = list(_counted(None, value)) if isinstance(value, Iterator) else value
    if isinstance(value, int) and not -_LARGEST <= value <= _LARGEST:
        raise jinja2.TemplateRuntimeError("it makes a number beyond 64 bits")
    if isinstance(value, str):
        _spend(len(value) + 1)
    elif isinstance(value, (dict, list, tuple, set, frozenset)):
        _spend(_STEP * (len(value) + 1))
    return value


def _written(value: Any) -> Any:
    """What is about to be written."""
    return _charge(value, text=True)


def _counted(_, items: Iterable) -> Iterator:
    """The items of a loop; each is a step."""
    for item in items:
        _spend(_STEP)
        yield item


def _check_operands(operator: str, left: Any, right: Any) -> None:
    if operator == "**":
        raise jinja2.TemplateRuntimeError("** is not allowed")
    if operator == "%" and isinstance(left, str):
        _charge([left, right], text=True)
    for operand in (left, right):
        _made(operand)
    if operator == "*":
        sizes, times = [len(x) for x in (left, right) if isinstance(x, (str, list, tuple))], (left, right)
        _spend(max(0, *sizes, 0) * _STEP * max([0, *(x for x in times if isinstance(x, int))]) if sizes else 0)
    if operator == "%" and isinstance(left, str) and _WIDE.search(left):
        raise jinja2.TemplateRuntimeError("it formats to a width of over 99")


def _check_replacement(text: str, old: str = "", new: str = "", *_, **__) -> None:
    """A short text with a long replacement may become a very long one."""
    if isinstance(old, str) and isinstance(new, str):
        _spend((text.count(old) if old else len(text) + 1) * len(new))


def _check_joined(separator: str, items: Iterable = ()) -> list:
    items = _charge(_made(items), text=True)
    if isinstance(items, (list, tuple, str)):
        _spend(len(separator) * len(items))
    return items


# --- filters and tests that pay --------------------------------------------------------------------------------------


def _charged_filter(name: str, of):
    kind = getattr(of, "jinja_pass_arg", None)
    environment_first = kind is not None

    @jinja2.pass_context
    def paid(context, value, *args, **kwargs):
        if name in _CONSTANT:
            _spend(_STEP)
            return of(*((_first_argument(kind, context),) if environment_first else ()), value, *args, **kwargs)
        value = _made(value)
        if name not in _SHALLOW:
            _charge(value, text=name in ("join", "string", "tojson", "indent", "e", "escape"))
        for one in (*args, *kwargs.values()):
            _charge(one)
        if name == "replace":
            _check_replacement(str(value), *args)
        if name == "join":
            separator = args[0] if args else kwargs.get("d", "")
            _check_joined(separator if isinstance(separator, str) else "", value)
        if name in ("indent", "tojson"):
            _check_indent(name, value, args, kwargs)
        first = (_first_argument(kind, context),) if environment_first else ()
        return _made(of(*first, value, *args, **kwargs))

    return paid


def _first_argument(kind, context):
    """What Jinja passes a filter before the value."""
    if kind.name == "context":
        return context
    return context.eval_ctx if kind.name == "eval_context" else context.environment


def _check_indent(name: str, value: Any, args: tuple, kwargs: dict) -> None:
    """No wide margin, and what it takes before each line or item."""
    widths = [one for one in (*args, *kwargs.values()) if not isinstance(one, bool)]
    if any(isinstance(one, str) and len(one) > 100 or isinstance(one, int) and one > 100 for one in widths):
        raise jinja2.TemplateRuntimeError(f"{name} by over 100")
    if widths and isinstance(value, str):
        _spend(100 * value.count("\n"))
    elif widths:
        _spend(100 * _STEP)


def _charged_test(name: str, of):
    kind = getattr(of, "jinja_pass_arg", None)

    @jinja2.pass_context
    def paid(context, *args):
        for one in args:
            _charge(one) if name in _COMPARES else _spend(len(one) if isinstance(one, str) else 1)
        return of(*((_first_argument(kind, context),) if kind is not None else ()), *args)

    return paid


def _concatenated(context, parts: list) -> str:
    """`a ~ b`."""
    _charge(parts, text=True)
    return "".join(map(str, parts))


# Filters that no template can name: put in where its tree makes, compares or walks values.
_OWN_FILTERS = {
    " counted": _counted,
    " concatenated": _concatenated,
    " charged": lambda context, value: _charge(_made(value)),
    " made": lambda context, value: _made(value),
}
_REFUSED = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)


def _with_account(tree: nodes.Template) -> nodes.Template:
    """The tree with everything charged that is neither a call, an operator, a filter nor a test."""
    for node in tree.find_all(_REFUSED):
        raise jinja2.TemplateSyntaxError(
            f"{type(node).__name__.lower()} is not allowed: a template has no other files", node.lineno
        )
    return _Accountant().visit(tree)


class _Accountant(jinja2.visitor.NodeTransformer):
    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, " counted")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), " concatenated")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = _filtered(node.expr, " charged")
        for operand in node.ops:
            operand.expr = _filtered(operand.expr, " charged")
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered(node, " made") if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Filter:
        self.generic_visit(node)
        return _filtered(node, " made")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Filter:
        self.generic_visit(node)
        for pair in node.items:
            pair.key = _filtered(pair.key, " charged")  # of which a hash is made
        return _filtered(node, " made")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered(node, " made") if node.ctx == "load" else node


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
