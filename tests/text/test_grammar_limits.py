"""Grammars: what is refused, what costs too much, and what is left out when not strict."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from kimi_cpu.chat.grammar import GrammarError, compiler, constrain
from kimi_cpu.chat.grammar.patterns import adapted
from kimi_cpu.chat.grammar.schema import prepare
from kimi_cpu.tokenizer import Tokenizer
from tests.text.grammars import TOOLS, accept, check_json, json_schema, run, tool


def nested(depth: int, wrap: Any, inner: Any = None) -> Any:
    for _ in range(depth):
        inner = wrap(inner if inner is not None else {})
    return inner


def many(n: int) -> dict[str, Any]:
    return {f"p{i}": {"type": "string"} for i in range(n)}


REFUSED: dict[str, tuple[Any, str]] = {
    "uniqueItems": ({"properties": {"a": {"uniqueItems": True}}}, r"a: the keyword 'uniqueItems'"),
    "not": ({"not": {"pattern": "a"}}, "the keyword 'not'"),
    "if": ({"if": {}, "then": {}}, "the keyword 'if'"),
    "contains": ({"items": {"contains": {}}}, "items: the keyword 'contains'"),
    "names": ({"propertyNames": {"minLength": 3}}, "the keyword 'propertyNames'"),
    "dependents": ({"dependentRequired": {c: ["x"] for c in "abcde"}}, "'dependentRequired'"),
    "overlap": ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    "minProperties": ({"minProperties": 3, "required": ["a"]}, "'minProperties' is supported up"),
    "remote": ({"$ref": "http://localhost/x"}, r"\$ref: 'http://localhost/x' is no JSON pointer"),
    "file": ({"items": {"$ref": "file:///etc/passwd"}}, "no JSON pointer within"),
    "dangling": ({"$ref": "#/$defs/x"}, "does not exist"),
    "loop": ({"$ref": "#"}, "nothing can be written"),
    "false": (False, "[Uu]nsatisfiable"),
    "contradiction": ({"type": "integer", "minimum": 3, "maximum": 2}, "[Uu]nsatisfiable"),
    "no schema": ([1], "not a JSON schema"),
    "no schema within": ({"properties": {"a": 3}}, "properties.a: is not a JSON schema"),
    "type": ({"type": "strin"}, "'strin' is no type"),
    "enum": ({"enum": []}, "enum: is empty"),
    "count": ({"minItems": -1}, "minItems: is below 0"),
    "huge count": ({"minItems": 10**9}, "minItems: is larger"),
    "bound": ({"minimum": "3"}, "minimum: is not a number"),
    "multiple": ({"type": "integer", "multipleOf": 99_999_999}, "multipleOf: has more than 1,000"),
    "fine multiple": ({"multipleOf": 12.34567}, "multipleOf: has more than 1,000"),
    "multiples": ({"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}, "too many remainders"),
    "infinite": ({"maximum": float("inf")}, "maximum: is not a finite"),
    "nan": ({"const": float("nan")}, "const: is not a finite"),
    "large literal": ({"enum": [2**53 + 1]}, "too large for a literal"),
    "large number": ({"const": 10**400}, "const: is too large"),
    "surrogate": ({"const": "\ud800"}, "surrogate"),
    "control": ({"enum": ["a\x00"]}, "control character"),
    "long": ({"const": "x" * 5000}, "longer than 4,096"),
    "lookahead": ({"pattern": "^(?!a)"}, "pattern: lookaround"),
    "sets": ({"pattern": "[a&&b]"}, "set operations"),
    "no regex": ({"pattern": "("}, "regex parse error"),
    "parens": ({"pattern": "(" * 999 + ")" * 999}, "regex|nest"),
    "patterns": ({"allOf": [{"pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(15)]},
                 "more than 8 patterns"),
    "pattern chain": ({"$ref": "#/$defs/d0", "$defs": {f"d{i}": {
        "pattern": f"(a|b)*a(a|b){{{i}}}", "$ref": f"#/$defs/d{i + 1}"} for i in range(15)}},
        "more than 8 patterns"),
    "deep": (nested(100, lambda x: {"items": x}), "deeper than 64"),
    "deeper": (nested(50_000, lambda x: {"items": x}), "deeper than 64"),
    "deep literal": ({"const": nested(50_000, lambda x: [x])}, "deeper than 64"),
    "doubled": (nested(30, lambda x: {"anyOf": [x, {"items": x}]}), "more than 10,000 parts"),
    "inlined": ({"$defs": {f"d{i}": {"oneOf": [{"$ref": f"#/$defs/d{i + 1}"},
                 {"$ref": f"#/$defs/d{i + 2}"}]} for i in range(60)}}, "more than 10,000 parts"),
    "product": ({"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(9)]}
                           for i in range(9)]}, "too large"),
    "wide": ({"properties": many(1001)}, "more than 1,000 members"),
    "long enum": ({"enum": list(range(20_000))}, "more than 10,000 parts"),
    "bytes": ({"enum": ["x" * 4000 + str(i) for i in range(70)]}, "larger than 256 KB"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_and_soon(tokenizer: Tokenizer, name: str) -> None:
    schema, message = REFUSED[name]
    compiler.vocabulary(tokenizer)
    start = time.process_time()
    with pytest.raises(GrammarError, match=message) as caught:
        constrain(tokenizer, response_format=json_schema(schema))
    assert time.process_time() - start < 2
    assert caught.value.param.startswith("response_format.json_schema.schema")
    assert "\n" not in caught.value.message and len(caught.value.message) < 500


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^(([a-z]{1,100}){1,100}){1,100}$"},
        {"type": "string", "pattern": "((a{1000}){1000}){1000}"},
        {"type": "string", "pattern": ".*a.{40}"},
        {"type": "string", "maxLength": 10**400},
        {"type": "array", "minItems": 100_000, "maxItems": 10**9},
        {"type": "object", "properties": many(1000)},
        {"type": "object", "required": [f"p{i}" for i in range(1000)]},
        {"type": "integer", "multipleOf": 997, "minimum": 3},
        {"type": "number", "multipleOf": 1e-15, "maximum": 3},
        {"type": "number", "multipleOf": 1e-300},
        {"type": "number", "multipleOf": 9.99, "minimum": 0.5, "maximum": 1e6},
        nested(60, lambda x: {"additionalProperties": x}),
        nested(12, lambda x: {"type": "array", "prefixItems": [x, x], "minItems": 2}),
    ],
    ids=range(13),
)
def test_costly_schemas_stay_within_limits(tokenizer: Tokenizer, schema: Any) -> None:
    """Refused, cut or enforced; in bounded time."""
    compiler.vocabulary(tokenizer)
    start = time.process_time()
    try:
        constraint = constrain(tokenizer, response_format=json_schema(schema), in_reasoning=False)
    except GrammarError:
        return
    finally:
        assert time.process_time() - start < 5
    assert constraint is not None
    ids, whole = run(tokenizer, constraint, 1, limit=100)
    assert time.process_time() - start < 20
    if whole:
        check_json(schema, tokenizer.decode(ids))


@pytest.mark.parametrize("member", [{"type": "string"}, {"type": "integer"}, {}], ids=range(3))
def test_an_object_of_many_properties_can_be_finished(
    kimi_tokenizer: Tokenizer, member: Any
) -> None:
    schema = {"type": "object", "properties": dict.fromkeys(many(1000), member)}
    matcher = compiler.vocabulary(kimi_tokenizer).json(prepare(schema, "x"), "x")
    value = 17 if member == {"type": "integer"} else "a, b"
    for token in kimi_tokenizer.encode_text(json.dumps({f"p{i}": value for i in (0, 3, 500)})):
        matcher.compute_bitmask()
        assert matcher.consume_token(token), matcher.get_error()
    matcher.compute_bitmask()
    assert matcher.is_accepting(), matcher.get_error()


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("tool_choice", {"tool_choice": "sometimes", "tools": TOOLS}),
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice", {"tool_choice": {"type": "custom"}, "tools": TOOLS}),
        ("tool_choice.function.name", {"tool_choice": {"type": "function", "function":
         {"name": "other"}}, "tools": TOOLS}),
        ("response_format.type", {"response_format": "json"}),
        ("response_format.type", {"response_format": {"type": "xml"}}),
        ("response_format.json_schema.schema", {"response_format": {"type": "json_schema"}}),
        ("response_format.json_schema.schema", {"response_format": {"type": "json_schema",
                                                "json_schema": {"name": "x"}}}),
        ("tools[1].function.parameters", {"tools": [tool("a"), tool("b", {"type": "array"})]}),
        ("tools[0].function.parameters.properties.x",
         {"tools": [tool("a", {"properties": {"x": {"not": {}}}})]}),
        ("tools", {"tools": [tool(f"t{i}") for i in range(600)]}),
    ],
)  # fmt: skip
def test_errors_name_the_field(tokenizer: Tokenizer, field: str, fields: Any) -> None:
    with pytest.raises(GrammarError) as caught:
        constrain(tokenizer, **fields)
    assert caught.value.param == field and caught.value.message.startswith(field)


def test_what_is_not_strict_leaves_out_what_cannot_be_enforced(tokenizer: Tokenizer) -> None:
    schema = {
        "type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"},
        "uniqueItems": True}, "b": {"type": "string", "pattern": "^(?=x)"},
        "c": {"oneOf": [{"type": "integer"}, {"type": "number"}]}},
        "additionalProperties": False,
    }  # fmt: skip
    for parameters, good, bad in (
        (schema, '{"a": [1, 1],"b":"y","c":1}', '{"a":["x"]}'),
        ({"properties": many(2000)}, '{"x":1}', "[1]"),
    ):
        with pytest.raises(GrammarError):
            constrain(tokenizer, tools=[tool("f", parameters)])
        lenient = [tool("f", parameters, strict=False)]
        for text, fits in ((good, True), (bad, False)):
            constraint = constrain(tokenizer, tools=lenient, in_reasoning=False)
            assert constraint is not None
            accept(tokenizer, constraint, "<|tool_calls_section_begin|>", "<|tool_call_begin|>")
            accept(tokenizer, constraint, "functions.f:0", "<|tool_call_argument_begin|>")
            if fits:
                accept(tokenizer, constraint, text, "<|tool_call_end|>")
            else:
                with pytest.raises(AssertionError, match="stops at"):
                    accept(tokenizer, constraint, text)


def test_the_cache_is_bounded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    words = compiler.Vocabulary(tokenizer)
    monkeypatch.setattr(compiler, "CACHE_ENTRIES", 5)
    for i in range(12):
        words.json(prepare({"const": i}, "x"), "x")
    assert len(words._cache) == 5 and words._cached_chars == sum(map(len, words._cache))
    monkeypatch.setattr(compiler, "CACHE_CHARS", 300)
    words.json(prepare({"const": "x" * 250}, "x"), "x")
    assert len(words._cache) == 2 and words._cached_chars <= 300
    words.json(prepare({"const": "x" * 900}, "x"), "x")
    assert len(words._cache) == 0


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("^[a-z]+$", "^[a-z]+$"),
        ('[^"]', '[^"\\x01]'),
        ("[^\\]x]\\[^", "[^\\]x\\x01]\\[^"),
        ("\\P{L}a", "[^\\p{L}\\x01]a"),
        ("(?:a|b)(?<n>c)(?i)d", "(?:a|b)(?<n>c)(?i)d"),
        ("a\\+\\++", "a\\+\\++"),
        ("[^\\x00-\\x1f]", "[^\\x00-\\x1f\\x01]"), ("\\p{Han}", "\\p{Han}"),
        ("\\x01", None), ("[\\x00-!]", None), ("\\u{1}", None), ("\x01", None),
        ("\\p{Cc}", None), ("\\pC", None), ("[a\\P{L}]", "[a[^\\p{L}\\x01]]"),
        ("\\D", "[^\\p{Nd}\\x01]"), ("[\\D]", "[[^\\p{Nd}\\x01]]"), ("[^\\d]", "[^\\p{Nd}\\x01]"),
        ("[^\\D]", "[^\\D\\x01]"), ("\\w\\d", "\\w\\d"), (".", "[^\\n\\r\\u{2028}\\u{2029}\\x01]"),
        ("[.]\\.", "[.]\\."), ("\\\\W", "\\\\W"),
        ("(?x) a", None), ("(?s-i:a)", None), ("a++", None), ("a{2}+", None), ("[]a]", None),
        ("[[:alpha:]]", None), ("[a--b]", None), ("[a~~b]", None), ("[a", None), ("a\\", None),
    ],
)  # fmt: skip
def test_patterns(pattern: str, expected: str | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match="pattern"):
            adapted(pattern)
    else:
        assert adapted(pattern) == expected
