"""The streaming parser: every shape a reply takes, and none that breaks it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_cpu.chat.messages import normalise
from kimi_cpu.chat.parser import (
    Content,
    Event,
    Reasoning,
    StreamParser,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    starts_in_reasoning,
)
from kimi_cpu.tokenizer import Tokenizer

SECTION, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGUMENTS, CALL_END = (
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
)


def encode(tokenizer: Tokenizer, reply: str) -> list[int]:
    """Ids of a reply whose control tokens are spelled out."""
    ids: list[int] = []
    for part in re.split("(" + "|".join(map(re.escape, tokenizer.special_tokens)) + ")", reply):
        if part in tokenizer.special_tokens:
            ids.append(tokenizer.control(part))
        else:
            ids += tokenizer.encode_text(part)
    return ids


def run(parser: StreamParser, ids: list[int]) -> list[Event]:
    events = [event for token_id in ids for event in parser.push(token_id)]
    return events + parser.finish()


def merged(events: list[Event]) -> list[Event]:
    """Neighbouring pieces of one text put together."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        match event, last:
            case (Reasoning(), Reasoning()) | (Content(), Content()):
                result[-1] = type(event)(last.text + event.text)
            case ToolCallArguments(), ToolCallArguments():
                result[-1] = ToolCallArguments(event.index, last.text + event.text)
            case _:
                result.append(event)
    return result


def parse(tokenizer: Tokenizer, reply: str, **kwargs: Any) -> tuple[StreamParser, list[Event]]:
    parser = StreamParser(tokenizer, **kwargs)
    return parser, merged(run(parser, encode(tokenizer, reply)))


def call(call_id: str, arguments: str) -> str:
    return f"{CALL}{call_id}{ARGUMENTS}{arguments}{CALL_END}"


def as_tuple(parser: StreamParser) -> tuple[Any, Any, list[tuple[str, str, str]]]:
    message = parser.message()
    assert message["role"] == "assistant"
    calls = [
        (c["id"], c["function"]["name"], c["function"]["arguments"])
        for c in message["tool_calls"] or []
    ]
    return message["reasoning_content"], message["content"], calls


A = "functions.a:0"


@pytest.mark.parametrize(
    ("reply", "expected", "incomplete"),
    [
        # (reasoning, content, calls), with thinking on
        ("<think>hm</think>Hello 🙂", ("hm", "Hello 🙂", []), None),
        ("hm</think>Hello", ("hm", "Hello", []), None),  # <think> is missing
        ("hm", ("hm", None, []), "reasoning"),  # so is </think>
        ("", (None, None, []), "reasoning"),
        ("<think></think>Hello", (None, "Hello", []), None),
        ("<think>a<think>b</think>c</think>d", ("ab", "cd", []), None),
        ("a</think>b<think>c</think>d<|im_end|>", ("ac", "bd", []), None),
        ("a</think>b[EOS]<|im_user|>c<|reserved_token_300|>", ("a", "bc", []), None),
        (f"a</think>b{SECTION}{call(A, '{}')}{SECTION_END}", ("a", "b", [(A, "a", "{}")]), None),
        # a section opened within the reasoning
        (f"a{SECTION}{call(A, '{}')}{SECTION_END}", ("a", None, [(A, "a", "{}")]), None),
        # two calls, blanks between them, text after them
        (
            f"</think>{SECTION}{call(A, '{}')}\n {call('functions.b.c-d:1', '[')}\n{SECTION_END}x",
            (None, "x", [(A, "a", "{}"), ("functions.b.c-d:1", "b.c-d", "[")]),
            None,
        ),
        # tokens missing: the section's, a call's end, the arguments', everything
        (f"</think>{call(A, '{}')}", (None, None, [(A, "a", "{}")]), None),
        (
            f"</think>{SECTION}{CALL}{A}{ARGUMENTS}1{CALL}b:1{ARGUMENTS}2{SECTION_END}",
            (None, None, [(A, "a", "1"), ("functions.b:1", "b", "2")]),
            None,
        ),
        (f"</think>{SECTION}{CALL}{A}{CALL_END}", (None, None, [(A, "a", "")]), None),
        (f"</think>{SECTION}{CALL}{CALL}{CALL_END}{SECTION_END}x", (None, "x", []), None),
        (f"</think>{SECTION} stray words\n{SECTION_END}", (None, "stray words\n", []), None),
        # tokens where they mean nothing
        (f"a{SECTION_END}b{CALL_END}c{ARGUMENTS}d</think>e{CALL_END}", ("abcd", "e", []), None),
        (
            f"</think>{SECTION}{SECTION}{call(A, '{}')}{SECTION}",
            (None, None, [(A, "a", "{}")]),
            None,
        ),
        (
            f"{SECTION}{CALL}fun<think>ctions.a:0{ARGUMENTS}{{</think>{SECTION}}}{CALL_END}",
            (None, None, [(A, "a", "{}")]),
            None,
        ),
        # stopped within
        (f"a</think>b{SECTION}", ("a", "b", []), None),
        (f"a{SECTION}{CALL}functions.a", ("a", None, []), "tool call"),
        (f"a{SECTION}{CALL}{A}{ARGUMENTS}", ("a", None, [(A, "a", "")]), "tool call"),
        (f"a{SECTION}{CALL}{A}{ARGUMENTS}{{", ("a", None, [(A, "a", "{")]), "tool call"),
    ],
)
def test_replies(tokenizer: Tokenizer, reply: str, expected: Any, incomplete: str | None) -> None:
    parser, events = parse(tokenizer, reply)
    assert as_tuple(parser) == expected
    assert parser.incomplete == incomplete
    check_events(parser, events)


def check_events(parser: StreamParser, events: list[Event]) -> None:
    """The events say what message() says, calls in order and nothing of a call outside of it."""
    message = parser.message()
    reasoning = "".join(e.text for e in events if isinstance(e, Reasoning))
    content = "".join(e.text for e in events if isinstance(e, Content))
    assert (reasoning or None, content or None) == (
        message["reasoning_content"],
        message["content"],
    )
    open_call: int | None = None
    arguments: list[str] = []
    for event in events:
        if isinstance(event, ToolCallStart):
            assert open_call is None and event.index == len(arguments)
            open_call = event.index
            arguments.append("")
            assert (event.id, event.name) == (
                parser.calls[open_call].id,
                parser.calls[open_call].name,
            )
        elif isinstance(event, ToolCallArguments):
            assert event.index == open_call
            arguments[open_call] += event.text
        elif isinstance(event, ToolCallEnd):
            assert event.index == open_call
            assert event.complete == parser.calls[open_call].complete
            assert event.valid == parser.calls[open_call].valid
            open_call = None
        else:
            assert open_call is None and event.text
    assert open_call is None
    assert arguments == [c.arguments for c in parser.calls]
    assert arguments == [c["function"]["arguments"] for c in message["tool_calls"] or []]
    assert len({c.id for c in parser.calls}) == len(parser.calls)


def test_thinking_off(tokenizer: Tokenizer) -> None:
    assert as_tuple(parse(tokenizer, "Hello", in_reasoning=False)[0]) == (None, "Hello", [])
    parser, _ = parse(tokenizer, "<think>a</think>b", in_reasoning=False)
    assert as_tuple(parser) == ("a", "b", [])
    assert parse(tokenizer, "Hello", in_reasoning=False)[0].incomplete is None


def test_a_model_without_think_tokens_never_reasons(tokenizer: Tokenizer) -> None:
    ranks = {tokenizer.token_bytes(i): i for i in range(tokenizer.n_ranks)}
    bare = Tokenizer(ranks, {tokenizer.n_ranks: "<|im_end|>"})
    assert as_tuple(parse(bare, "Hello </think>")[0]) == (None, "Hello </think>", [])
    assert not starts_in_reasoning(bare, bare.encode_text("x"))


def test_where_a_reply_starts(tokenizer: Tokenizer) -> None:
    prompt = (
        "<|im_user|>user<|im_middle|>hi</think><|im_end|><|im_assistant|>assistant<|im_middle|>"
    )
    assert starts_in_reasoning(tokenizer, encode(tokenizer, prompt))
    assert starts_in_reasoning(tokenizer, encode(tokenizer, prompt + "<think>"))
    assert not starts_in_reasoning(tokenizer, encode(tokenizer, prompt + "<think></think>"))
    assert not starts_in_reasoning(tokenizer, encode(tokenizer, prompt + "<think></think>Sure"))
    spelled = tokenizer.encode_text("<think></think>")
    assert starts_in_reasoning(tokenizer, encode(tokenizer, prompt) + spelled)
    assert starts_in_reasoning(tokenizer, [])


@pytest.mark.parametrize(
    ("header", "name", "call_id"),
    [
        ("functions.get_weather:0", "get_weather", "functions.get_weather:0"),
        (" functions.fs.read-file:12\n", "fs.read-file", "functions.fs.read-file:12"),
        ("functions.a:b:3", "a:b", "functions.a:b:3"),
        ("search:4", "search", "functions.search:4"),
        ("search", "search", "functions.search:7"),
        ("functions.search", "search", "functions.search:7"),
        ("functions.search:", "search:", "functions.search::7"),
        ("functions.:0", "", "functions.:0"),
        ("call_8f3a", "call_8f3a", "functions.call_8f3a:7"),
        ("天气:1", "天气", "functions.天气:1"),
        ("f:99999999999999999999", "f:99999999999999999999", "functions.f:99999999999999999999:7"),
    ],
)
def test_headers(tokenizer: Tokenizer, header: str, name: str, call_id: str) -> None:
    reply = f"</think>{SECTION}{call(header, '{}')}"
    parser, events = parse(tokenizer, reply, next_call_index=7)
    assert events[0] == ToolCallStart(0, call_id, name)
    assert parser.calls[0].valid == bool(name)


def test_an_id_used_twice_becomes_two(tokenizer: Tokenizer) -> None:
    parser, _ = parse(tokenizer, f"{SECTION}{call(A, '{}')}{call(A, '{}')}{call('a', '{}')}")
    assert [c.id for c in parser.calls] == [A, "functions.a:1", "functions.a:2"]


@pytest.mark.parametrize(
    ("arguments", "valid"),
    [
        ('{"a": 1}', True),
        (' {"a": "天 🙂"}\n', True),
        ("", False),
        ("[1]", False),
        ('{"a": ', False),
        ("{" * 100 + "[" * 100_000, False),
        ('{"a": 1} and more', False),
    ],
)
def test_arguments_are_verbatim_and_flagged(
    tokenizer: Tokenizer, arguments: str, valid: bool
) -> None:
    parser, events = parse(tokenizer, f"</think>{SECTION}{call(A, arguments)}")
    assert parser.calls[0].arguments == arguments
    assert events[-1] == ToolCallEnd(0, complete=True, valid=valid)


def test_text_comes_at_once_and_whole(tokenizer: Tokenizer) -> None:
    parser = StreamParser(tokenizer)
    smile = [bytes([b]) for b in "🙂".encode()]
    ids = [next(i for i in range(256) if tokenizer.token_bytes(i) == b) for b in smile]
    assert [parser.push(i) for i in ids] == [[], [], [], [Reasoning("🙂")]]
    assert parser.push(ids[0]) == []
    assert parser.push(tokenizer.control("</think>")) == [Reasoning("\ufffd")]
    assert not parser.in_reasoning
    assert parser.push(ids[0]) == [] and parser.finish() == [Content("\ufffd")]


def test_the_message_can_be_appended_to_the_history(tokenizer: Tokenizer) -> None:
    for reply in ("hm", "hm</think>Hi", f"hm{SECTION}{call(A, '{')}{call('', '')}{call(':', '')}"):
        message = parse(tokenizer, reply)[0].message()
        assert json.loads(json.dumps(message)) == message
        kept = normalise([{"role": "user", "content": "x"}, message]).messages[1]
        assert {k: v for k, v in message.items() if v is not None or k == "content"} == kept


@settings(max_examples=200, deadline=None)
@given(data=st.data(), in_reasoning=st.booleans())
def test_any_ids_at_all(tokenizer: Tokenizer, data: st.DataObject, in_reasoning: bool) -> None:
    named = [tokenizer.control(n) for n in ("<think>", "</think>", SECTION, SECTION_END)]
    named += [tokenizer.control(n) for n in (CALL, ARGUMENTS, CALL_END)]
    any_id = st.one_of(
        st.sampled_from(named),
        st.integers(0, 300),
        st.integers(tokenizer.n_ranks, tokenizer.n_vocab - 1),
    )
    ids = data.draw(st.lists(any_id, max_size=40))
    parser = StreamParser(tokenizer, in_reasoning=in_reasoning)
    events = run(parser, ids)
    check_events(parser, merged(events))
    # No control token shows, and no text is made up: what comes out is in the ids, in order.
    out = "".join(e.text for e in events if not isinstance(e, (ToolCallStart, ToolCallEnd)))
    characters = iter(_texts(tokenizer, ids))
    assert all(c in characters for c in out)


def _texts(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text between control tokens, decoded stretch by stretch."""
    stretches: list[list[int]] = [[]]
    for i in ids:
        if tokenizer.is_control(i):
            stretches.append([])
        else:
            stretches[-1].append(i)
    return "".join(tokenizer.decode(s) for s in stretches)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([*"ab 🙂é{", "<think>", "</think>", SECTION, SECTION_END, CALL, A,
                                 ARGUMENTS, CALL_END, "<|im_end|>"]), max_size=25))  # fmt: skip
def test_the_same_text_in_other_tokens_gives_the_same_events(
    tokenizer: Tokenizer, parts: list[str]
) -> None:
    reply = "".join(parts)
    whole = encode(tokenizer, reply)
    single: list[int] = []  # byte by byte
    for i in whole:
        if tokenizer.is_control(i):
            single.append(i)
        else:
            single += tokenizer.token_bytes(i)
    assert all(tokenizer.token_bytes(b) == bytes([b]) for b in range(256))
    one, other = StreamParser(tokenizer), StreamParser(tokenizer)
    assert merged(run(one, whole)) == merged(run(other, single))
    assert one.message() == other.message() and one.incomplete == other.incomplete


def test_spelled_control_tokens_are_text(tokenizer: Tokenizer) -> None:
    text = f"</think>{SECTION}<|im_end|>"
    parser = StreamParser(tokenizer, in_reasoning=False)
    run(parser, tokenizer.encode_text(text))
    assert parser.message()["content"] == text
