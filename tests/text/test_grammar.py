"""Grammars: whatever a random model samples under the mask parses, validates and is well-formed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_cpu.chat.generate import Reply, Result
from kimi_cpu.chat.grammar import Constraint, DeadEndError, GrammarError, compiler, constrain
from kimi_cpu.chat.grammar.scan import MAX_DEPTH, JsonScan
from kimi_cpu.chat.messages import normalise
from kimi_cpu.chat.parser import starts_in_reasoning
from kimi_cpu.chat.template import ChatTemplate, encode_segments
from kimi_cpu.engine import Engine, Session
from kimi_cpu.sampling import SamplingParams
from kimi_cpu.tokenizer import Tokenizer
from tests.text.grammars import (
    ENDS,
    TOOLS,
    accept,
    allowed,
    check_json,
    controls,
    json_schema,
    parsed,
    requests,
    run,
    tool,
)

NANO = Path(__file__).resolve().parents[2] / "weights" / "nano"


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
    "dialects": {"type": "string", "pattern": "^(\\W|[\\D_]|[^\\w]|\\S.){1,4}[\\W]$"},
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
    for before in ((), ("7",), ("12",)):
        constraint = fresh()
        accept(tokenizer, constraint, *before, begin)
        assert constraint._scan.room is None  # the number has ended
        accept(tokenizer, constraint, "<|tool_call_begin|>", "functions.clock:0")
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
    with pytest.raises(GrammarError, match="no tokens for calls"):
        constrain(bare, tools=TOOLS)


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


@pytest.mark.skipif(not requests(), reason="the tool-call cases are not at hand")
def test_calls_of_the_request_cases_on_the_real_vocabulary(kimi_tokenizer: Tokenizer) -> None:
    """Random calls to every tool declared there: complete ones are valid and parse back."""
    complete = 0
    seen: set[str] = set()
    for n, request in enumerate(requests()):
        tools = request["tools"]
        if (text := json.dumps(tools)) in seen:
            continue
        seen.add(text)
        schemas = {t["function"]["name"]: t["function"]["parameters"] for t in tools}
        choices: list[Any] = ["required"]
        choices += [{"type": "function", "function": {"name": name}} for name in schemas]
        for choice in choices:
            constraint = constrain(
                kimi_tokenizer, tools=tools, tool_choice=choice, next_call_index=n,
                in_reasoning=False, parallel_tool_calls=False,
            )  # fmt: skip
            assert constraint is not None
            ids, whole = run(kimi_tokenizer, constraint, n, limit=250, eager=8)
            parser = parsed(kimi_tokenizer, ids, first=n)
            for call in parser.calls:
                if call.complete:
                    complete += 1
                    assert call.valid and call.id == f"functions.{call.name}:{n}"
                    check_json(schemas[call.name], call.arguments)
            assert not whole or [c.complete for c in parser.calls] == [True]
    assert complete > len(seen)


def test_the_real_vocabulary_has_control_tokens_apart(kimi_tokenizer: Tokenizer) -> None:
    words = compiler.vocabulary(kimi_tokenizer)
    assert words.text.size * 32 == kimi_tokenizer.n_vocab == 163_840
    constraint = constrain(kimi_tokenizer, tools=TOOLS, in_reasoning=False)
    assert constraint is not None
    spelled = kimi_tokenizer.encode_text("<|tool_call_begin|><|im_end|>")
    assert set(spelled) <= allowed(kimi_tokenizer, constraint)
    accept(kimi_tokenizer, constraint, "好<|im_end|>", "<|tool_calls_section_begin|>")
    accept(kimi_tokenizer, constraint, "<|tool_call_begin|>", "functions.天气:1:0")
    accept(kimi_tokenizer, constraint, "<|tool_call_argument_begin|>")
    ids, whole = run(kimi_tokenizer, constraint, 3, eager=9)
    assert whole and kimi_tokenizer.control("<|tool_call_end|>") in ids


# Hypothesis' own schemas: small, so that random text ends, and of all keywords together.
NAMES = st.sampled_from(["a", "b", "é", 'x"y', "k/1", ""])
SCALARS = st.none() | st.booleans() | st.integers(-50, 50) | st.sampled_from(["", "a", "bé", '"'])
LEAVES = st.one_of(
    st.just({}),
    st.builds(lambda v: {"const": v}, SCALARS),
    st.builds(lambda v: {"enum": v}, st.lists(SCALARS, min_size=1, max_size=4)),
    st.builds(lambda a, n: {"type": "string", "minLength": a, "maxLength": a + n},
              st.integers(0, 3), st.integers(0, 4)),
    st.builds(lambda p: {"type": "string", "pattern": p}, st.sampled_from(
        ["^a*$", "b", '^[^"]$', "^[^a-z]{1,3}$", "^(a|é|\\\\)+$", "^\\S+$", "\\W", "^[\\w.-]+$",
         "^.{2}$", "^$", "^a|b$", "^\\n?x\\t*$"])),
    st.builds(lambda kind, a, n, m: {"type": kind, "minimum": a, "maximum": a + n,
                                     **({"multipleOf": m} if m else {})},
              st.sampled_from(["integer", "number"]), st.integers(-20, 20), st.integers(0, 30),
              st.sampled_from([None, None, 1, 0.5])),
    st.builds(lambda kind, a: {"type": kind, "exclusiveMinimum": a, "exclusiveMaximum": a + 2},
              st.sampled_from(["integer", "number"]), st.sampled_from([-1, 0, 0.25, 7.5])),
)  # fmt: skip


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    objects = st.builds(
        lambda properties, required, others: {
            "type": "object", "properties": properties, "required": required,
            "additionalProperties": others,
        },
        st.dictionaries(NAMES, inner, max_size=3), st.lists(NAMES, max_size=2, unique=True),
        st.booleans() | inner,
    )  # fmt: skip
    arrays = st.builds(
        lambda items, first, low, n: {
            "type": "array", "items": items, "minItems": low, "maxItems": low + n,
            **({"prefixItems": first} if first else {}),
        },
        inner, st.lists(inner, max_size=2), st.integers(0, 2), st.integers(0, 2),
    )  # fmt: skip
    combined = st.builds(
        lambda key, options: {key: options},
        st.sampled_from(["anyOf", "oneOf", "allOf"]), st.lists(inner, min_size=1, max_size=3),
    )  # fmt: skip
    merged = st.builds(lambda a, b: {**a, "anyOf": [b, a]}, inner, inner)
    return objects | arrays | combined | merged


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schema=st.recursive(LEAVES, _nested, max_leaves=8), seed=st.integers(0, 1000))
def test_random_schemas(tokenizer: Tokenizer, schema: Any, seed: int) -> None:
    """Refused by name, or enforced."""
    jsonschema.Draft202012Validator.check_schema(schema)
    try:
        constraint = constrain(tokenizer, response_format=json_schema(schema), in_reasoning=False)
    except GrammarError as error:
        assert error.param.startswith("response_format") and "\n" not in error.message
        return
    assert constraint is not None
    ids, whole = run(tokenizer, constraint, seed, limit=120, eager=6)
    if whole:
        check_json(schema, tokenizer.decode(ids))


@pytest.fixture(scope="module")
def nano() -> Iterator[tuple[Session, Tokenizer, ChatTemplate]]:
    engine = Engine.load(NANO, threads=1)
    yield engine.session(), Tokenizer.load(NANO), ChatTemplate.load(NANO)
    engine.close()


def nano_reply(nano: Any, prompt: str, params: SamplingParams, **request: Any) -> Result:
    session, tokenizer, template = nano
    conversation = normalise([{"role": "user", "content": prompt}], request.get("tools"))
    segments = template.render_segments(
        conversation.messages, conversation.tools,
        thinking=False if params.thinking_budget == 0 else None,
    )  # fmt: skip
    ids = encode_segments(tokenizer, segments)
    constraint = constrain(
        tokenizer, in_reasoning=starts_in_reasoning(tokenizer, ids),
        next_call_index=conversation.next_call_index, **request,
    )  # fmt: skip
    reply = Reply(
        tokenizer, ids, params, allow_tools=bool(request.get("tools")), constraint=constraint
    )
    logits = session.sync(reply.prompt)
    while True:
        reply.feed(logits)
        if not reply.going_on:
            return reply.result()
        logits = session.step(reply.token)


ANSWER = {
    "type": "object",
    "properties": {
        "answer": {"type": "integer", "minimum": 0, "maximum": 999},
        "unit": {"enum": ["apples", "pears"]},
        "note": {"type": "string", "maxLength": 12},
    },
    "required": ["answer", "unit", "note"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("budget", [None, 0, 5])
def test_nano_always_follows_a_schema(nano: Any, budget: int | None) -> None:
    """It never saw such JSON, so the mask does the work; hot, greedy and with its reasoning cut."""
    for seed, temperature in enumerate((0.0, 1.0, 1.0, 3.0)):
        params = SamplingParams(
            temperature=temperature, seed=seed, max_tokens=400, thinking_budget=budget
        )
        form = json_schema(ANSWER)
        result = nano_reply(nano, "What is 17 + 25?", params, response_format=form)
        if temperature < 3 or budget is not None:  # else its reasoning may not end
            assert result.finish_reason == "stop"
        if result.finish_reason == "stop":
            check_json(ANSWER, result.message["content"])


@pytest.mark.parametrize("choice", ["auto", "required", "none"])
def test_nano_calls_follow_their_schemas(nano: Any, choice: str) -> None:
    parameters = {
        "type": "object", "properties": {"expression": {"type": "string", "pattern": "^[0-9*+]+$"}},
        "required": ["expression"], "additionalProperties": False,
    }  # fmt: skip
    tools = [tool("calculator", parameters)]
    params = SamplingParams(temperature=0.0, max_tokens=200)
    result = nano_reply(nano, "What is 123 * 45?", params, tools=tools, tool_choice=choice)
    calls = result.message.get("tool_calls")
    if choice == "none":
        assert not calls and result.finish_reason == "stop"
        return
    assert calls and result.finish_reason == "tool_calls"
    for i, call in enumerate(calls):
        assert call["id"] == f"functions.calculator:{i}"
        check_json(parameters, call["function"]["arguments"])
