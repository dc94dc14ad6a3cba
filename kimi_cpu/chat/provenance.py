"""Which characters of a rendered conversation the template itself wrote.

A chat template lays out turns with control tokens such as `<|im_end|>`; a message may spell the
same thing. To keep the two apart, the template is compiled with its own text written in *marked*
characters: every character that occurs in a control token's name has a marked twin, a lone
surrogate code point, and whatever the template's source holds literally (text between tags,
string constants) is translated to twins. Message data holds no surrogates (they are replaced
before rendering; valid text has none), so after rendering a control token is exactly a run of
twins that spells its name: it cannot be forged, completed or split by data, wherever the pieces
lie and whatever filters, macros, JSON or concatenation they went through.

Twins stand one to one for characters, so lengths and positions stay what they were. String
constants keep their plain value for every comparison, lookup and search, and show their twins only
when they are printed or joined (`Literal`). A template that still sees a difference is noticed by
the caller, who renders it plainly too and compares.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

_FIRST_TWIN, _N_TWINS = 0xD800, 0x800
_TWINS = re.compile("[\ud800-\udfff]+")

# What formatting reads in a format string, and therefore has to stay plain in it.
_PERCENT = re.compile(r"%(\([^)]*\))?[^a-zA-Z%]*[a-zA-Z%]")
_BRACES = re.compile(r"\{[^{}]*\}")

# What a template may take, far above any real conversation: it comes with the checkpoint, from
# wherever that came. Jinja's own limit for range() is 100,000.
MAX_SECONDS = 20.0
MAX_CHARS = 256 << 20
MAX_POWER = 64

deadline: ContextVar[float] = ContextVar("deadline")


class Marks:
    """The twins of the characters in `names`, the control tokens' spellings."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = sorted(set(names), key=lambda name: (-len(name), name))
        characters = sorted(set("".join(self.names)))
        if len(characters) > _N_TWINS:
            raise ValueError(f"control tokens use more than {_N_TWINS} different characters")
        self._to_twin = {ord(c): _FIRST_TWIN + i for i, c in enumerate(characters)}
        self._to_plain = {twin: c for c, twin in self._to_twin.items()}
        spellings = (re.escape(self.mark(name)) for name in self.names)
        self._control = re.compile("(" + "|".join(spellings) + ")") if self.names else None

    def mark(self, text: str) -> str:
        """The template's own text, in twins."""
        return text.translate(self._to_twin)

    def unmark(self, text: str) -> str:
        """The text as it reads."""
        # Stretch by stretch: most of a long conversation is data, and has no twins.
        return _TWINS.sub(lambda twins: twins[0].translate(self._to_plain), text)

    def split(self, marked: str) -> list[tuple[str, bool]]:
        """(text, is_control) pieces of a marked rendering; no two texts adjoin, none is empty."""
        if self._control is None:
            pieces = [marked]
        else:
            pieces = self._control.split(marked)  # texts at even places, controls at odd ones
        return [(self.unmark(p), i % 2 == 1) for i, p in enumerate(pieces) if p]


class Literal(str):
    """A string with the template's own characters in it: plain to look at, marked in print.

    Jinja's sandbox makes one without marks, `Literal(text)`, of what `format` returns.
    """

    marked: str | None = None
    marks: Marks | None = None

    @staticmethod
    def of(marks: Marks, marked: str) -> str:
        """`marked` with its plain value; an ordinary string if nothing in it is marked."""
        plain = marks.unmark(marked)
        if plain == marked:
            return marked
        literal = Literal(plain)
        literal.marked = marked
        literal.marks = marks
        return literal

    def __str__(self) -> str:
        return str.__str__(self) if self.marked is None else self.marked

    def as_format(self, fields: re.Pattern[str]) -> str:
        """The marked value with the fields of a format string in it left plain."""
        characters = list(str(self))
        for match in fields.finditer(str.__str__(self)):
            characters[match.start() : match.end()] = match.group()
        return "".join(characters)

    def __mod__(self, args: Any) -> str:
        text = self.as_format(_PERCENT) % args
        return Literal.of(self.marks, text) if self.marks else text

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def __radd__(self, other: str) -> str:
        joined = str(other) + str(self)
        return Literal.of(self.marks, joined) if self.marks else joined


def _keeping_marks(name: str) -> Callable[..., Any]:
    """The string method `name`, done on the marked value wherever that reads the same."""
    method = getattr(str, name)

    def call(self: Literal, *args: Any) -> Any:
        plain = method(str.__str__(self), *args)
        if not isinstance(plain, str) or self.marks is None or self.marked is None:
            return plain
        marked = method(self.marked, *[str(a) if isinstance(a, Literal) else a for a in args])
        if self.marks.unmark(marked) != self.marks.unmark(plain):
            return plain
        return Literal.of(self.marks, marked)

    return call


# `format` stays the built-in method: the sandbox recognises it by that (see wrap_str_format).
for _name in (
    *("__add__", "__mul__", "__rmul__", "__getitem__"),
    *("strip", "lstrip", "rstrip", "join", "replace", "removeprefix", "removesuffix"),
    *("center", "ljust", "rjust"),
):
    setattr(Literal, _name, _keeping_marks(_name))


class _Marker(NodeTransformer):
    """Rewrites a parsed template: its text in twins, its constants as literals (if `marks`)."""

    def __init__(self, marks: Marks | None, literals: list[str]) -> None:
        self._marks = marks
        self._literals = literals

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        if self._marks:
            node.data = self._marks.mark(node.data)
        return node

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if not self._marks or not isinstance(node.value, str):
            return node
        literal = Literal.of(self._marks, self._marks.mark(node.value))
        if not isinstance(literal, Literal):
            return node
        self._literals.append(literal)
        table = nodes.EnvironmentAttribute("literals", lineno=node.lineno)
        index = nodes.Const(len(self._literals) - 1, lineno=node.lineno)
        return nodes.Getitem(table, index, "load", lineno=node.lineno)

    # Constants that only look something up or are compared never reach the output.

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        node.node = self.visit(node.node)
        if not isinstance(node.arg, nodes.Const):
            node.arg = self.visit(node.arg)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        if not isinstance(node.expr, nodes.Const):
            node.expr = self.visit(node.expr)
        for operand in node.ops:
            if not isinstance(operand.expr, nodes.Const):
                operand.expr = self.visit(operand.expr)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        if not isinstance(node.key, nodes.Const):
            node.key = self.visit(node.key)
        node.value = self.visit(node.value)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return _call("join_parts", [parts], node.lineno)

    # Every turn of a loop and every call of a macro looks at the clock.

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("tick", [], node.lineno), lineno=node.lineno))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("tick", [], node.lineno), lineno=node.lineno))
        return node


def _call(attribute: str, args: list[nodes.Expr], lineno: int) -> nodes.Call:
    function = nodes.EnvironmentAttribute(attribute, lineno=lineno)
    return nodes.Call(function, args, [], None, None, lineno=lineno)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox set up as transformers set it up, with `marks` or plain, and with limits.

    Raises SecurityError from within a rendering that takes too long or grows too large.
    """

    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self, marks: Marks | None) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        self.marks = marks
        self.literals: list[str] = []
        self.concat = self.join_parts  # type: ignore[method-assign]
        for name in ("lipsum", "cycler", "joiner"):
            del self.globals[name]
        del self.filters["random"]  # two renderings of one conversation are the same

    def compile_source(self, source: str, name: str) -> Any:
        """A template ready to render; raises jinja2.TemplateSyntaxError."""
        tree = _Marker(self.marks, self.literals).visit(self.parse(source, name))
        code = self.compile(tree, name, name)
        return self.template_class.from_code(self, code, self.make_globals(None))

    def join_parts(self, parts: Iterable[Any]) -> str:
        """What macros, set blocks, `~` and the whole rendering are put together with."""
        size = 0
        texts = []
        for part in parts:
            texts.append(str(part))
            size += len(texts[-1])
            _check_size(size)
        joined = "".join(texts)
        return Literal.of(self.marks, joined) if self.marks else joined

    def tick(self) -> None:
        """Called by every turn of every loop."""
        if time.monotonic() > deadline.get():
            raise SecurityError(f"takes more than {MAX_SECONDS:.0f} seconds")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        owner = getattr(value, "__self__", None)
        if not isinstance(owner, Literal) or not self.marks:
            return super().wrap_str_format(value)
        method = getattr(owner.as_format(_BRACES), value.__name__, None)
        wrapped = super().wrap_str_format(method)
        if wrapped is None:
            return None
        marks, inner = self.marks, wrapped
        return lambda *args, **kwargs: Literal.of(marks, inner(*args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            if abs(left) > 2**MAX_POWER or abs(right) > MAX_POWER:
                raise SecurityError("raises numbers to powers that are too high")
        elif operator == "*":
            for sequence, count in ((left, right), (right, left)):
                if isinstance(sequence, (str, list, tuple)) and isinstance(count, int):
                    _check_size(len(sequence) * max(count, 0))
        elif hasattr(left, "__len__") and hasattr(right, "__len__"):
            _check_size(len(left) + len(right))
        return super().call_binop(context, operator, left, right)


def _check_size(size: int) -> None:
    if size > MAX_CHARS:
        raise SecurityError(f"makes more than {MAX_CHARS >> 20} million characters")
