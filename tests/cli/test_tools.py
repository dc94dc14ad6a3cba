"""The calculator, the clock, and files that declare tools."""

from __future__ import annotations

import datetime as dt
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_cpu.chat.tools import BUILTIN_TOOLS, calculate, clock, load_tools, run_builtin
from kimi_cpu.errors import UsageError


def test_declared_json_is_what_the_model_was_trained_on():
    assert json.dumps(BUILTIN_TOOLS, sort_keys=True, separators=(",", ":")) == (
        '[{"function":{"description":"Evaluate an arithmetic expression.","name":"calculator",'
        '"parameters":{"properties":{"expression":{"type":"string"}},"required":["expression"],'
        '"type":"object"}},"type":"function"},{"function":{"description":"Tell the current date '
        'and time.","name":"clock","parameters":{"properties":{},"type":"object"}},'
        '"type":"function"}]'
    )


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("17*23", "391"),
        ("17 × 23 − 1", "390"),
        ("6/2", "3"),
        ("1/3", "0.3333333333"),
        ("0.1+0.2", "0.3"),
        ("-2**2", "-4"),
        ("2^10", "1024"),
        ("7 // 2 + 7 % 2", "4"),
        ("(1 + 2) * -3", "-9"),
        ("sqrt(16) + abs(-1)", "5"),
        ("round(2*pi, 3)", "6.283"),
        ("1e3", "1000"),
        ("12345678901234567890 + 1", "12345678901234567891"),
        ("2**-1", "0.5"),
        ("1e20 * 3", "3e+20"),
        ("1/0", "error: division by zero"),
        ("5 % 0", "error: division by zero"),
        ("9**9**9", "error: the numbers are too large"),
        ("9e999", "error: the numbers are too large"),
        ("(-8)**0.5", "error: the result is not a real number"),
        ("sqrt(-1)", "error: not a number"),
        ("sqrt()", "error: not a number"),
        ("2 +", "error: cannot read the expression"),
        ("", "error: empty expression"),
        ("1" * 201, "error: longer than 200 characters"),
        ("+" * 90 + "1", "error: nested too deeply"),
        ("'a'*9", "error: only numbers and arithmetic are allowed"),
        ("True", "error: only numbers and arithmetic are allowed"),
        ("1j", "error: only numbers and arithmetic are allowed"),
        ("__import__('os')", "error: only numbers and arithmetic are allowed"),
        ("(1).real", "error: only numbers and arithmetic are allowed"),
        ("[1][0]", "error: only numbers and arithmetic are allowed"),
        ("1 if 1 else 2", "error: only numbers and arithmetic are allowed"),
        ("max(1, *[2])", "error: only numbers and arithmetic are allowed"),
        ("(lambda: 1)()", "error: only numbers and arithmetic are allowed"),
        ("1\x00", "error: cannot read the expression"),
        ("round(5, 10**50)", "5"),
    ],
)
def test_calculator(expression, result):
    assert calculate(expression) == result


@settings(max_examples=150, deadline=None)
@given(st.text("0123456789.+-*/%()^ esqrtlogpi,×", max_size=60))
def test_the_calculator_always_answers_quickly(expression):
    start = time.perf_counter()
    result = calculate(expression)
    assert result and len(result) < 100 and time.perf_counter() - start < 0.5


def test_clock():
    assert clock(dt.datetime(2026, 11, 24, 14, 54)) == "Tuesday 2026-11-24 14:54"


def test_run_builtin():
    assert run_builtin("calculator", '{"expression": "1+1"}') == "2"
    assert run_builtin("calculator", '{"expression": 5}') == "5"
    for arguments in ("", "{", "[]", "{}", '{"expression": null}', "[" * 100000):
        text = run_builtin("calculator", arguments)
        assert text is not None and text.startswith("error: ")
    assert run_builtin("clock", "nonsense") == clock()
    assert run_builtin("shell", "{}") is None


def test_load_tools(tmp_path):
    path = tmp_path / "t.json"
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for value in ([tool], {"tools": [tool]}):
        path.write_text(json.dumps(value))
        assert load_tools(path) == [tool]
    for text, why in (
        ("{", "not valid JSON"), ("3", "not a list"), ('[{"type": "function"}]', "function"),
        (json.dumps([tool, tool]), "declared already"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(UsageError, match=why) as caught:
            load_tools(path)
        assert str(path) in caught.value.message
    with pytest.raises(UsageError, match="cannot be read"):
        load_tools(tmp_path)
