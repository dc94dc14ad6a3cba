"""Grammars: whatever a random model samples under the mask parses, validates and is well-formed."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest

from kimi_cpu.chat.grammar import Constraint, DeadEndError, constrain
from kimi_cpu.chat.parser import StreamParser
from kimi_cpu.sampling import Sampler, SamplingParams
from kimi_cpu.tokenizer import Tokenizer

ENDS = ("<|im_end|>", "[EOS]")


def tool(name: str, parameters: Any = None, **fields: Any) -> dict[str, Any]:
    function = {"name": name, **({} if parameters is None else {"parameters": parameters})}
    return {"type": "function", "function": {**function, **fields}}


def json_schema(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **fields}}


def allowed(tokenizer: Tokenizer, constraint: Constraint) -> set[int]:
    bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")
    assert not bits[tokenizer.n_vocab :].any()
    return set(np.flatnonzero(bits).tolist())


def controls(tokenizer: Tokenizer, constraint: Constraint) -> set[str]:
    """The control tokens that may come next."""
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    return {names[i] for i in allowed(tokenizer, constraint) if i in names}


def accept(tokenizer: Tokenizer, constraint: Constraint, *parts: str) -> None:
    """Control tokens, and texts in the longest tokens that are allowed."""
    for part in parts:
        if part in tokenizer.special_tokens:
            assert tokenizer.control(part) in allowed(tokenizer, constraint), part
            constraint.accept(tokenizer.control(part))
            continue
        rest = part.encode()
        while rest:
            texts = {i: tokenizer.token_bytes(i) for i in allowed(tokenizer, constraint)
                     if i < tokenizer.n_ranks}  # fmt: skip
            fitting = [i for i, text in texts.items() if rest.startswith(text)]
            assert fitting, f"{part!r} stops at {rest!r}"
            best = max(fitting, key=lambda i: len(texts[i]))
            constraint.accept(best)
            rest = rest[len(texts[best]) :]


class RandomModel:
    """Logits by chance. It likes what closes things, so that texts end."""

    def __init__(self, tokenizer: Tokenizer, seed: int, eager: float = 4.0) -> None:
        self._rng = np.random.default_rng(seed)
        self._bias = np.zeros(tokenizer.n_vocab, np.float32)
        self._bias[tokenizer.n_ranks :] = eager
        for i in range(tokenizer.n_ranks):
            data = tokenizer.token_bytes(i)
            if len(data) <= 3 and set(data) <= set(b'"]},:'):
                self._bias[i] = eager

    def __call__(self) -> np.ndarray:
        return self._rng.standard_normal(self._bias.size, np.float32) + self._bias


def run(
    tokenizer: Tokenizer, constraint: Constraint, seed: int, limit: int = 300, eager: float = 4.0
) -> tuple[list[int], bool]:
    """The ids a random model writes under the constraint, and whether it ended the reply."""
    model, sampler = RandomModel(tokenizer, seed, eager), Sampler(SamplingParams(seed=seed))
    ends = {tokenizer.control(name) for name in ENDS}
    ids: list[int] = []
    while len(ids) < limit:
        try:
            token = sampler.sample(model(), constraint.mask())
        except DeadEndError:
            return ids, False
        constraint.accept(token)
        if token in ends:
            assert constraint.may_stop
            return ids, True
        ids.append(token)
    return ids, False


def parsed(tokenizer: Tokenizer, ids: list[int], in_reasoning: bool = False, first: int = 0):
    parser = StreamParser(tokenizer, in_reasoning=in_reasoning, next_call_index=first)
    for i in ids:
        parser.push(i)
    parser.finish()
    return parser


def check_json(schema: Any, text: str) -> None:
    def no_constant(name: str) -> None:
        raise AssertionError(name)

    value = json.loads(text, parse_constant=no_constant)
    json.dumps(value, allow_nan=False).encode()  # no infinity, no half surrogates
    jsonschema.Draft202012Validator(schema).validate(value)


SCHEMAS: dict[str, Any] = {
    "empty": {},
    "true": True,
    "object": {"type": "object"},
    "closed": {"type": "object", "properties": {"a": {"type": "string"}},
               "required": ["a"], "additionalProperties": False},
    "open": {"type": "object", "properties": {"a": {"type": "integer"}, "b/\"": {"const": 1}}},
    "names": {"type": "object", "required": ["é", "\n", "汉字"]},
    "map": {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1,
            "maxProperties": 2},
    "pattern names": {"type": "object", "patternProperties": {"^x-": {"type": "null"}},
                      "additionalProperties": {"type": "boolean"}},
    "record": {"type": "object", "propertyNames": {"enum": ["r", "g"]},
               "additionalProperties": {"type": "integer"}, "required": ["g"]},
    "enum": {"enum": ["a", "aa", "🙂", 'q"\\', None, True, 1.5, 0.1, -3, {"k": ["v"]}, []]},
    "const": {"const": {"b": [1, 2.0, "x"], "a": None}},
    "any": {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "integer", "minimum": 0},
                      {"type": "array", "items": {"type": "null"}}]},
    "one": {"oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}], "$defs": {
        "A": {"type": "object", "properties": {"k": {"const": "a"}, "v": {"type": "integer"}},
              "required": ["k", "v"]},
        "B": {"type": "object", "properties": {"k": {"const": "b"}}, "required": ["k"]}}},
    "all": {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}},
                      {"required": ["a"], "properties": {"a": {"minimum": 5, "maximum": 9}}}]},
    "tree": {"type": "object", "properties": {"v": {"type": "integer"},
             "c": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}}, "required": ["v"],
             "additionalProperties": False},
    "array": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "string"}],
              "items": False, "minItems": 1},
    "length": {"type": "string", "minLength": 2, "maxLength": 5},
    "pattern": {"type": "string", "pattern": "^[a-z]{2,4}-\\d+$"},
    "search": {"type": "string", "pattern": "a.c", "maxLength": 20},
    "words": {"type": "string", "pattern": "^\\w+(\\s\\w+)*$"},
    "han": {"type": "string", "pattern": "^[汉字é🙂]+$"},
    "negated": {"type": "string", "pattern": '^[^"a-y]*$'},
    "date": {"type": "string", "format": "date"},
    "uuid": {"type": "string", "format": "uuid"},
    "unknown format": {"type": "string", "format": "whatever"},
    "integer": {"type": "integer"},
    "bounds": {"type": "integer", "minimum": -5, "exclusiveMaximum": 1000},
    "wide": {"type": "integer", "minimum": -(2**63), "maximum": 2**64},
    "beyond doubles": {"type": "integer", "minimum": 2**53 + 1, "maximum": 2**53 + 200},
    "number": {"type": "number"},
    "fraction": {"type": "number", "minimum": 0, "maximum": 1},
    "exclusive": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "draft 4": {"$schema": "http://json-schema.org/draft-04/schema#", "type": "integer",
                "minimum": 3, "maximum": 7},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 1},
    "halves": {"type": "number", "multipleOf": 0.5, "minimum": -3, "maximum": 3},
    "types": {"type": ["string", "null", "boolean"], "maxLength": 4},
    "no type": {"minLength": 2, "minimum": 3, "required": ["a"], "minItems": 1},
    "ignored": {"type": "integer", "title": "t", "x-y": {"not": 3}, "nullable": True,
                "deprecated": True, "examples": [{}], "x-guidance": {"lenient": True}},
    "neutral": {"type": "array", "uniqueItems": False, "items": {"not": False, "type": "null"}},
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_content_validates(tokenizer: Tokenizer, name: str) -> None:
    schema = SCHEMAS[name]
    ended = 0
    for seed in range(25):
        constraint = constrain(tokenizer, response_format=json_schema(schema), in_reasoning=False)
        assert constraint is not None
        ids, whole = run(tokenizer, constraint, seed, eager=(0, 2, 4, 8)[seed % 4])
        if whole:
            ended += 1
            check_json(schema, tokenizer.decode(ids))
    assert ended >= 5


TOOLS = [
    tool("get_weather", {"type": "object", "properties": {"city": {"type": "string"}},
                         "required": ["city"], "additionalProperties": False}),
    tool("fs.read-file", {"properties": {"path": {"type": "string", "minLength": 1}}}),
    tool("clock"),
    tool("天气:1", {"type": "object"}),
]  # fmt: skip


def test_a_reply_in_kimis_wire_format(tokenizer: Tokenizer) -> None:
    constraint = constrain(tokenizer, tools=TOOLS, next_call_index=3)
    assert constraint is not None
    start = {"<think>", "</think>", "<|tool_calls_section_begin|>", *ENDS}
    assert controls(tokenizer, constraint) == start and constraint.may_stop
    accept(tokenizer, constraint, "<think>", "any text {")
    assert controls(tokenizer, constraint) == start - {"<think>"}
    accept(tokenizer, constraint, "</think>", "Let me see.")
    assert controls(tokenizer, constraint) == {"<|tool_calls_section_begin|>", *ENDS}
    texts = set(range(tokenizer.n_ranks))
    assert texts <= allowed(tokenizer, constraint)
    accept(tokenizer, constraint, "<|tool_calls_section_begin|>")
    assert allowed(tokenizer, constraint) == {tokenizer.control("<|tool_call_begin|>")}
    assert not constraint.may_stop
    accept(tokenizer, constraint, "<|tool_call_begin|>", "functions.fs.read-file:")
    assert allowed(tokenizer, constraint) == {tokenizer.encode_text("3")[0]}
    accept(tokenizer, constraint, "3")
    assert allowed(tokenizer, constraint) == {tokenizer.control("<|tool_call_argument_begin|>")}
    accept(tokenizer, constraint, "<|tool_call_argument_begin|>", '{"path": "a')
    assert controls(tokenizer, constraint) == set()
    accept(tokenizer, constraint, '"}')
    assert allowed(tokenizer, constraint) == {tokenizer.control("<|tool_call_end|>")}
    accept(tokenizer, constraint, "<|tool_call_end|>")
    between = {"<|tool_call_begin|>", "<|tool_calls_section_end|>"}
    assert controls(tokenizer, constraint) == between
    accept(tokenizer, constraint, "<|tool_call_begin|>", "functions.天气:1:4")
    accept(tokenizer, constraint, "<|tool_call_argument_begin|>", '{"x":[1]}', "<|tool_call_end|>")
    accept(tokenizer, constraint, "<|tool_call_begin|>", "functions.clock:5")
    accept(tokenizer, constraint, "<|tool_call_argument_begin|>", "{}")
    assert allowed(tokenizer, constraint) == {tokenizer.control("<|tool_call_end|>")}
    accept(tokenizer, constraint, "<|tool_call_end|>", "<|tool_calls_section_end|>")
    assert controls(tokenizer, constraint) == set(ENDS)
    assert allowed(tokenizer, constraint) == {tokenizer.control(n) for n in ENDS}
    assert constraint.may_stop
    accept(tokenizer, constraint, "<|im_end|>")


@pytest.mark.parametrize("seed", range(30))
def test_random_calls(tokenizer: Tokenizer, seed: int) -> None:
    schemas = {n: s for n, s in SCHEMAS.items() if n in ("closed", "open", "tree", "map", "all")}
    tools = [tool(name, schema) for name, schema in schemas.items()]
    constraint = constrain(tokenizer, tools=tools, next_call_index=7)
    assert constraint is not None
    ids, whole = run(tokenizer, constraint, seed, limit=600, eager=5)
    parser = parsed(tokenizer, ids, in_reasoning=True, first=7)
    for i, call in enumerate(parser.calls):
        if call.complete:
            assert call.id == f"functions.{call.name}:{7 + i}" and call.valid
            check_json(schemas[call.name], call.arguments)
    assert not whole or all(call.complete for call in parser.calls)
