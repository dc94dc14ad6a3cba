"""Tools: the two that the terminal chat runs itself, and files that declare others.

The calculator evaluates arithmetic over Python's `ast` with bounds on length, depth and size, so
that no expression can hang, fill the memory or reach anything but numbers.
"""

from __future__ import annotations

import ast
import datetime as dt
import json
import math
import operator
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kimi_cpu.chat.messages import validate_tools
from kimi_cpu.errors import UsageError, UserError

Number = int | float

CALCULATOR: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}
CLOCK: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "Tell the current date and time.",
        "parameters": {"type": "object", "properties": {}},
    },
}
#: What the terminal chat declares by default and runs itself.
BUILTIN_TOOLS: tuple[dict[str, Any], ...] = (CALCULATOR, CLOCK)

MAX_CHARS = 200
MAX_DEPTH = 40
MAX_DIGITS = 60
MAX_TOOLS_BYTES = 4 << 20

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "ceil": math.ceil,
    "cos": math.cos,
    "exp": math.exp,
    "floor": math.floor,
    "log": math.log,
    "log10": math.log10,
    "log2": math.log2,
    "max": max,
    "min": min,
    "round": round,
    "sin": math.sin,
    "sqrt": math.sqrt,
    "tan": math.tan,
}
_CONSTANTS = {"pi": math.pi, "e": math.e}
_SPELLINGS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "^": "**"})
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


class _Refused(Exception):
    """Why an expression has no value, in a few words for the model and the user."""


def calculate(expression: str) -> str:
    """The value of an arithmetic expression, or `error: WHY`.

    Knows + - * / // % ** (also spelt × ÷ − ^), parentheses, abs ceil cos exp floor log log10 log2
    max min round sin sqrt tan, pi and e. Whole results have no `.0`; others at most 10 digits.
    """
    try:
        return _shown(_evaluate(_parsed(expression), 0))
    except _Refused as error:
        return f"error: {error}"
    except ZeroDivisionError:
        return "error: division by zero"
    except (OverflowError, RecursionError, MemoryError):
        return "error: the numbers are too large"
    except (ValueError, TypeError):
        return "error: not a number"


def clock(now: dt.datetime | None = None) -> str:
    """The local date and time, like `Tuesday 2026-11-24 14:54`."""
    now = now or dt.datetime.now()
    return f"{_WEEKDAYS[now.weekday()]} {now:%Y-%m-%d %H:%M}"


def run_builtin(name: str, arguments: str) -> str | None:
    """The result text of a built-in tool's call; None when the name is not a built-in's.

    arguments: the call's JSON text. What is wrong with it comes back as an `error: ` text, so that
    the model can read it and try again.
    """
    if name == "clock":
        return clock()
    if name != "calculator":
        return None
    try:
        values = json.loads(arguments)
    except (ValueError, RecursionError):
        return "error: the arguments are not valid JSON"
    expression = values.get("expression") if isinstance(values, dict) else None
    if not isinstance(expression, str | int | float):
        return 'error: the arguments must be {"expression": "..."}'
    return calculate(str(expression))


def load_tools(path: str | Path) -> list[dict[str, Any]]:
    """Read and check a JSON file of OpenAI-style tools (a list, or an object with `tools`).

    Raises UsageError when the file cannot be read or is not JSON, UserError naming the tool and
    field when a declaration is malformed.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TOOLS_BYTES + 1)
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be read ({error.strerror or error})", "--tools needs a JSON file."
        ) from None
    if len(data) > MAX_TOOLS_BYTES:
        raise UsageError(f"{path}: is larger than {MAX_TOOLS_BYTES >> 20} MB", "Declare less.")
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path}: is not valid JSON ({error})", "--tools needs a list of OpenAI-style tools."
        ) from None
    if isinstance(value, dict) and "tools" in value:
        value = value["tools"]
    try:
        return validate_tools(value)
    except UserError as error:
        raise UsageError(f"{path}: {error.message}", error.hint) from None


def _parsed(expression: str) -> ast.expr:
    if len(expression) > MAX_CHARS:
        raise _Refused(f"longer than {MAX_CHARS} characters")
    if not expression.strip():
        raise _Refused("empty expression")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(expression.translate(_SPELLINGS).strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _Refused("cannot read the expression") from None


def _evaluate(node: ast.expr, depth: int) -> Number:
    if depth > MAX_DEPTH:
        raise _Refused("nested too deeply")
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _bounded(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, depth + 1)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _evaluate(operand, depth + 1)
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _evaluate(left, depth + 1), _evaluate(right, depth + 1)
            if isinstance(op, ast.Pow):
                return _bounded(_power(a, b))
            if type(op) in _BINARY:
                return _bounded(_BINARY[type(op)](a, b))
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _bounded(_FUNCTIONS[name](*(_evaluate(arg, depth + 1) for arg in args)))
    raise _Refused("only numbers and arithmetic are allowed")


def _power(a: Number, b: Number) -> Number:
    if isinstance(a, int) and isinstance(b, int) and b >= 0:
        if a not in (-1, 0, 1) and a.bit_length() * b > 4 * MAX_DIGITS + 64:
            raise _Refused("the numbers are too large")
        return int(a**b)
    value: Any = float(a) ** float(b)
    if isinstance(value, complex):
        raise _Refused("the result is not a real number")
    return float(value)


def _bounded(value: Any) -> Number:
    if not isinstance(value, int | float):
        raise _Refused("the result is not a real number")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _Refused("the numbers are too large")
        return value
    if abs(value) >= 10**MAX_DIGITS:
        raise _Refused("the numbers are too large")
    return int(value)


def _shown(value: Number) -> str:
    if isinstance(value, float):
        if not (value.is_integer() and abs(value) < 1e15):
            return f"{value:.10g}"
        value = int(value)
    return str(value)
