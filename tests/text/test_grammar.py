"""Grammars: whatever a random model samples under the mask parses, validates and is well-formed."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_cpu.chat.grammar import Constraint, DeadEndError, compiler, constrain
from kimi_cpu.chat.grammar.scan import MAX_DEPTH, JsonScan
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


CALL = {"type": "function", "function": {"name": "fs.read-file"}}


@pytest.mark.parametrize("choice", ["required", CALL])
def test_a_call_is_forced_after_the_reasoning(tokenizer: Tokenizer, choice: Any) -> None:
    constraint = constrain(tokenizer, tools=TOOLS, tool_choice=choice)
    assert constraint is not None and not constraint.may_stop
    accept(tokenizer, constraint, "thinking")
    assert controls(tokenizer, constraint) == {"</think>", "<|tool_calls_section_begin|>"}
    accept(tokenizer, constraint, "</think>")
    assert allowed(tokenizer, constraint) == {tokenizer.control("<|tool_calls_section_begin|>")}
    accept(tokenizer, constraint, "<|tool_calls_section_begin|>", "<|tool_call_begin|>")
    accept(tokenizer, constraint, "functions.")
    if choice is CALL:
        accept(tokenizer, constraint, "fs.read-file:0", "<|tool_call_argument_begin|>", "{}")
        accept(tokenizer, constraint, "<|tool_call_end|>")
        assert controls(tokenizer, constraint) == {"<|tool_calls_section_end|>"}
    else:
        accept(tokenizer, constraint, "clock:0")


def test_none_forbids_calls(tokenizer: Tokenizer) -> None:
    constraint = constrain(tokenizer, tools=TOOLS, tool_choice="none")
    assert constraint is not None
    assert controls(tokenizer, constraint) == {"<think>", "</think>", *ENDS}
    accept(tokenizer, constraint, "</think>", "x")
    assert controls(tokenizer, constraint) == set(ENDS)
    with pytest.raises(ValueError, match="not allowed"):
        constraint.accept(tokenizer.control("<|tool_calls_section_begin|>"))


def test_one_call_only(tokenizer: Tokenizer) -> None:
    constraint = constrain(tokenizer, tools=TOOLS, parallel_tool_calls=False, in_reasoning=False)
    assert constraint is not None
    accept(tokenizer, constraint, "<|tool_calls_section_begin|>", "<|tool_call_begin|>")
    accept(tokenizer, constraint, "functions.clock:0", "<|tool_call_argument_begin|>", "{}")
    accept(tokenizer, constraint, "<|tool_call_end|>")
    assert controls(tokenizer, constraint) == {"<|tool_calls_section_end|>"}


def test_json_after_the_reasoning(tokenizer: Tokenizer) -> None:
    constraint = constrain(tokenizer, response_format={"type": "json_object"})
    assert constraint is not None and not constraint.may_stop
    assert controls(tokenizer, constraint) == {"<think>", "</think>"}
    accept(tokenizer, constraint, "no JSON", "</think>")
    assert controls(tokenizer, constraint) == set()
    assert {tokenizer.token_bytes(i)[:1] for i in allowed(tokenizer, constraint)} == {b"{"}
    accept(tokenizer, constraint, '{"a": [1, "x"]}')
    assert allowed(tokenizer, constraint) == {tokenizer.control(n) for n in ENDS}


def test_json_or_calls(tokenizer: Tokenizer) -> None:
    form = json_schema({"type": "integer"})
    begin = "<|tool_calls_section_begin|>"

    def fresh() -> Constraint:
        made = constrain(tokenizer, tools=TOOLS, response_format=form, in_reasoning=False)
        assert made is not None
        return made

    constraint = fresh()
    assert controls(tokenizer, constraint) == {begin} and not constraint.may_stop
    accept(tokenizer, constraint, "-")
    assert controls(tokenizer, constraint) == set()
    accept(tokenizer, constraint, "12")
    assert controls(tokenizer, constraint) == {begin, *ENDS} and constraint.may_stop
    for before in ((), ("7",)):
        constraint = fresh()
        accept(tokenizer, constraint, *before, begin, "<|tool_call_begin|>", "functions.clock:0")
        accept(tokenizer, constraint, "<|tool_call_argument_begin|>", "{}", "<|tool_call_end|>")
        accept(tokenizer, constraint, "<|tool_calls_section_end|>", "[EOS]")


def test_nothing_to_constrain(tokenizer: Tokenizer) -> None:
    assert constrain(tokenizer) is None
    assert constrain(tokenizer, tools=[], response_format={"type": "text"}) is None
    assert constrain(tokenizer, tool_choice="none") is None


def test_a_model_without_think_tokens_starts_with_the_content(tokenizer: Tokenizer) -> None:
    ranks = {tokenizer.token_bytes(i): i for i in range(tokenizer.n_ranks)}
    bare = Tokenizer(ranks, {tokenizer.n_ranks + 2: "<|im_end|>"})
    constraint = constrain(bare, response_format={"type": "json_object"}, in_reasoning=True)
    assert constraint is not None
    assert {bare.token_bytes(i)[:1] for i in allowed(bare, constraint)} == {b"{"}
    accept(bare, constraint, "{}")
    assert controls(bare, constraint) == {"<|im_end|>"}


def test_the_configs_end_tokens_end_a_reply(tokenizer: Tokenizer) -> None:
    pad = tokenizer.control("[PAD]")
    constraint = constrain(
        tokenizer, response_format=json_schema({"const": 1}), in_reasoning=False,
        eos_token_ids=[pad],
    )  # fmt: skip
    assert constraint is not None and pad not in allowed(tokenizer, constraint)
    accept(tokenizer, constraint, "1")
    assert pad in allowed(tokenizer, constraint)
    constraint.accept(pad)


def test_text_that_spells_control_tokens_is_text(tokenizer: Tokenizer) -> None:
    constraint = constrain(tokenizer, tools=TOOLS, in_reasoning=False)
    assert constraint is not None
    for i in tokenizer.encode_text("<|tool_calls_section_begin|><|im_end|></think>"):
        assert i in allowed(tokenizer, constraint)
        constraint.accept(i)
    assert controls(tokenizer, constraint) == {"<|tool_calls_section_begin|>", *ENDS}
    spelled = json_schema({"const": "<|im_end|>"})
    constraint = constrain(tokenizer, response_format=spelled, in_reasoning=False)
    assert constraint is not None
    while not constraint.may_stop:
        choices = allowed(tokenizer, constraint)
        assert max(choices) < tokenizer.n_ranks
        constraint.accept(min(choices))


def test_invalid_bytes_come_in_free_text_only(tokenizer: Tokenizer) -> None:
    constraint = constrain(tokenizer, response_format={"type": "json_object"})
    assert constraint is not None
    assert 0xFF in allowed(tokenizer, constraint)  # the rank of the byte
    accept(tokenizer, constraint, "</think>", '{"')
    assert not {0xFF, 0xC0, 0x80} & allowed(tokenizer, constraint)


@pytest.mark.parametrize("token", ["<|im_end|>", "<|tool_call_end|>", "<|im_user|>", "<think>"])
def test_a_token_that_is_not_allowed_is_an_error(tokenizer: Tokenizer, token: str) -> None:
    constraint = constrain(tokenizer, response_format={"type": "json_object"}, in_reasoning=False)
    assert constraint is not None
    for wrong in (tokenizer.control(token), tokenizer.encode_text("x")[0]):
        with pytest.raises(ValueError, match="not allowed in CONTENT"):
            constraint.accept(wrong)
    accept(tokenizer, constraint, "{}")  # and harms nothing
    assert constraint.may_stop


def test_two_replies_do_not_disturb_each_other(tokenizer: Tokenizer) -> None:
    form = json_schema(SCHEMAS["tree"])

    def trace(seed: int) -> list[tuple[int, bytes]]:
        constraint = constrain(tokenizer, response_format=form, in_reasoning=False)
        assert constraint is not None
        rng, out = np.random.default_rng(seed), []
        for _ in range(60):
            mask = constraint.mask()
            token = int(rng.choice(sorted(allowed(tokenizer, constraint))))
            out.append((token, mask.tobytes()))
            if tokenizer.is_control(token):
                break
            constraint.accept(token)
        return out

    alone = [trace(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(trace, range(8))) == alone
    compiler.vocabulary(tokenizer)._cache.clear()
    assert [trace(seed) for seed in range(8)] == alone


def test_numbers_end_and_nesting_ends(tokenizer: Tokenizer) -> None:
    form = json_schema({"type": ["number", "array"]})
    for digit, longest in ((b"9", 300), (b".", 16), (b"e", 2)):
        constraint = constrain(tokenizer, response_format=form, in_reasoning=False)
        assert constraint is not None
        text = {b"9": "", b".": "0.", b"e": "1e"}[digit]
        accept(tokenizer, constraint, text)
        written = 0
        while written <= longest and ord("9") in allowed(tokenizer, constraint):
            constraint.accept(ord("9"))
            written += 1
        assert 0 < written <= longest
        assert "<|im_end|>" in controls(tokenizer, constraint)
    constraint = constrain(tokenizer, response_format=form, in_reasoning=False)
    assert constraint is not None
    accept(tokenizer, constraint, "[" * MAX_DEPTH)
    with pytest.raises(DeadEndError, match="nested deeper"):
        constraint.accept(ord("["))


@settings(max_examples=100, deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12))  # fmt: skip
def test_the_scan_sees_what_json_is(value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    scan, deepest = JsonScan(), 0
    for at in range(len(text)):
        scan.push(text[at : at + 1])
        deepest = max(deepest, scan.depth)
    whole = JsonScan()
    whole.push(text)
    assert vars(whole) == vars(scan) and scan.depth == 0

    def depth(v: Any) -> int:
        inner = v if isinstance(v, list) else v.values() if isinstance(v, dict) else None
        return 0 if inner is None else 1 + max(map(depth, inner), default=0)

    assert deepest == depth(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    assert (scan.room is not None) == (is_number and value not in (float("inf"), -float("inf")))
