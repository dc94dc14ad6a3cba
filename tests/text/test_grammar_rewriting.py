"""Grammars: keywords in other words, and how little is left out where one cannot be enforced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from kimi_cpu.chat.grammar import GrammarError, constrain
from kimi_cpu.chat.grammar import schema as schema_module
from kimi_cpu.chat.grammar.rewriting import MAX_NAMES, rewritten
from kimi_cpu.tokenizer import Tokenizer
from tests.text.grammars import accept, check_json, json_schema, run, tool

BASE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "a": {"type": "integer"},
        "b": {"type": "boolean"},
        "c": {"enum": ["x", "y", 1]},
    },
    "additionalProperties": False,
}

#: Schemas; texts that follow them, and texts that do not.
REWRITTEN: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "names of a pattern": (
        {"type": "object", "propertyNames": {"pattern": "^[a-z]{1,3}$"},
         "additionalProperties": {"type": "integer"}},
        ['{}', '{"ab":1,"xyz":2}'], ['{"abcd":1}', '{"A":1}', '{"ab":"x"}'],
    ),
    "one name": ({"type": "object", "propertyNames": {"const": "k"}}, ['{"k":[]}'], ['{"l":1}']),
    "dependent": (
        {**BASE, "dependentRequired": {"a": ["b", "c"]}},
        ['{}', '{"b":true}', '{"a":1,"b":true,"c":"x"}'], ['{"a":1}', '{"a":1,"c":"x"}'],
    ),
    "dependent on each other": (
        {**BASE, "dependentRequired": {"a": ["b"], "b": ["a"]}},
        ['{"c":"x"}', '{"a":1,"b":true}'], ['{"a":1}', '{"b":true}'],
    ),
    "older": ({**BASE, "dependencies": {"a": ["b"]}}, ['{"a":1,"b":true}'], ['{"a":1}']),
    "dependent schemas": (
        {**BASE,
         "dependentSchemas": {"a": {"properties": {"c": {"const": "y"}}, "required": ["c"]}}},
        ['{"c":"x"}', '{"a":1,"c":"y"}'], ['{"a":1,"c":"x"}', '{"a":1}'],
    ),
    "not both": ({**BASE, "not": {"required": ["a", "b"]}}, ['{"a":1}', '{"b":true}'],
                 ['{"a":1,"b":true}']),
    "not there": ({**BASE, "not": {"required": ["a"]}}, ['{"b":true}'], ['{"a":1}']),
    "not a value": (
        {"type": "object", "properties": {
            "c": {"enum": ["x", "y", 1, True], "not": {"enum": ["x", 1.0]}}},
         "required": ["c"], "additionalProperties": False},
        ['{"c":"y"}', '{"c":true}'], ['{"c":"x"}', '{"c":1}'],
    ),
    "not a type": ({"type": "object", "properties": {"v": {"not": {"type": ["null", "object"]}}},
                    "required": ["v"]}, ['{"v":1}', '{"v":[]}'], ['{"v":null}', '{"v":{}}']),
    "if": (
        {**BASE, "if": {"properties": {"c": {"const": "x"}}, "required": ["c"]},
         "then": {"required": ["a"]}, "else": {"required": ["b"]}},
        ['{"b":true}', '{"a":1,"c":"x"}', '{"b":true,"c":"y"}'], ['{"c":"x"}', '{"c":"y"}', '{}'],
    ),
    "if or absent": (
        {**BASE, "if": {"properties": {"c": {"enum": ["x", "y"]}}}, "then": {"required": ["a"]}},
        ['{"a":1}', '{"c":1}', '{"a":1,"c":"y"}'], ['{}', '{"c":"y"}'],
    ),
    "if a switch is on": (
        {**BASE, "required": ["b"], "if": {"properties": {"b": {"const": True}}},
         "then": {"properties": {"a": {"minimum": 5}}, "required": ["a"]}},
        ['{"b":false}', '{"a":7,"b":true}'], ['{"b":true}', '{"a":3,"b":true}'],
    ),
}  # fmt: skip


def follows(tokenizer: Tokenizer, text: str, **fields: Any) -> bool:
    """Whether a reply may be this text and nothing else."""
    constraint = constrain(tokenizer, in_reasoning=False, **fields)
    assert constraint is not None
    try:
        accept(tokenizer, constraint, text, "<|im_end|>")
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("name", REWRITTEN)
def test_the_same_in_other_words(tokenizer: Tokenizer, name: str) -> None:
    schema, right, wrong = REWRITTEN[name]
    form = json_schema(schema)
    valid = jsonschema.Draft7Validator if name == "older" else jsonschema.Draft202012Validator
    for texts, expected in ((right, True), (wrong, False)):
        for text in texts:
            assert valid(schema).is_valid(json.loads(text)) is expected, text
            assert follows(tokenizer, text, response_format=form) is expected, text
    ended = 0
    for seed in range(25):
        constraint = constrain(tokenizer, response_format=form, in_reasoning=False)
        assert constraint is not None
        ids, whole = run(tokenizer, constraint, seed, limit=150)
        if whole:
            ended += 1
            if name != "older":
                check_json(schema, tokenizer.decode(ids))
    assert ended > 3


@pytest.mark.parametrize(
    "schema",
    [
        {"not": True}, {"not": {"required": 5}}, {"not": {"required": [5]}}, {"not": {"enum": 5}},
        {"enum": 5, "not": {"enum": [5]}}, {"not": {"type": 5}}, {"not": {"type": "integer"}},
        {"not": {"const": 5}}, {"type": "object", "if": 5}, {"type": "object", "if": {}},
        {"type": "object", "properties": 5, "if": {"properties": {"a": {"const": 1}}}},
        {"type": "object", "properties": {"a": 5}, "if": {"properties": {"a": {"const": 1}}}},
        {"type": "object", "properties": {}, "if": {"properties": {"a": 5}}},
        {"type": "object", "properties": {"a": {"enum": [1]}}, "required": True,
         "if": {"properties": {"a": {"const": 1}}}},
        {"dependentRequired": 5}, {"dependentRequired": {}}, {"propertyNames": 5},
        {"propertyNames": {"enum": 5}}, {"propertyNames": {"pattern": "a", "maxLength": 3}},
        {"dependentRequired": {"a": ["b"]}, "allOf": 5},
    ],
)  # fmt: skip
def test_other_uses_stay_as_they_are(schema: dict[str, Any]) -> None:
    assert rewritten(schema).keys() & {
        "not", "if", "dependentRequired", "propertyNames", "allOf",
    }  # fmt: skip


#: What is odd about one property, and whether strict tools refuse it.
ODD: dict[str, dict[str, Any]] = {
    "unique": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    "required as in draft 3": {"type": "integer", "required": True},
    "type": {"type": "any"},
    "no schema": {"items": 5, "type": "array"},
    "lookahead": {"type": "string", "pattern": "^(?=x)"},
    "no pattern": {"type": "string", "pattern": "("},
    "remote": {"$ref": "https://example.org/schema.json"},
    "dangling": {"$ref": "#/definitions/none"},
    "nulls": {"type": "string", "enum": None, "maxLength": None, "pattern": None},
    "pattern of names": {"type": "object", "patternProperties": {"(?=x)": {}},
                         "additionalProperties": False},
    "condition": {"type": "object", "if": {"required": ["x"]}, "then": {"required": ["y"]}},
    "literal": {"const": 2**60},
    "large": {"minimum": 1e300},
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_one_odd_property_does_not_cost_the_others(tokenizer: Tokenizer, name: str) -> None:
    parameters = {
        "type": "object",
        "properties": {"odd": ODD[name], "kind": {"enum": ["file", "folder"]}},
        "required": ["kind"],
        "additionalProperties": False,
    }
    with pytest.raises(GrammarError):
        constrain(tokenizer, tools=[tool("f", parameters)])

    def may_say(text: str) -> bool:
        declared = [tool("f", parameters, strict=False)]
        constraint = constrain(tokenizer, tools=declared, in_reasoning=False)
        assert constraint is not None
        accept(tokenizer, constraint, "<|tool_calls_section_begin|>", "<|tool_call_begin|>")
        accept(tokenizer, constraint, "functions.f:0", "<|tool_call_argument_begin|>")
        try:
            accept(tokenizer, constraint, text, "<|tool_call_end|>")
        except AssertionError:
            return False
        return True

    assert may_say('{"kind":"file"}')
    assert not may_say('{"kind":"files"}') and not may_say("{}") and not may_say('{"other":1}')
    kind = ODD[name].get("type")
    value = {"array": "[1,1]", "string": '"x"', "object": '{"x":1}'}.get(str(kind), "4")
    assert may_say('{"odd":' + value + ',"kind":"folder"}')
    if kind in ("array", "string", "object", "integer"):
        assert not may_say('{"odd":null,"kind":"folder"}')


def test_the_documentation_names_what_cannot_be_enforced() -> None:
    text = (Path(__file__).parents[2] / "docs" / "server.md").read_text("utf-8")
    begin = text.index("### What schemas may say")
    section = text[begin : text.index("\n## ", begin)]
    for keyword in (*schema_module._UNSUPPORTED, *schema_module._FORMATS):
        assert keyword in section, keyword
    assert f"{schema_module.MAX_NODES:,} parts" in section
    assert (
        f"{schema_module.MAX_BYTES >> 10} KB" in section and f"up to {MAX_NAMES} names" in section
    )
