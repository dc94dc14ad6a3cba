"""Messages and tools: what is accepted, what it becomes, and where it is wrong."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_cpu.chat.messages import normalise, validate_tools
from kimi_cpu.errors import MessageError

from .conftest import SHARED

USER = {"role": "user", "content": "hi"}


def call(call_id: str | None, name: str = "f", arguments: Any = "{}") -> dict[str, Any]:
    result: dict[str, Any] = {"function": {"name": name, "arguments": arguments}}
    return result if call_id is None else {"id": call_id, **result}


def assistant(*calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


def result(call_id: str, content: Any = "ok") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def ids(messages: list[dict[str, Any]]) -> list[str]:
    """The canonical ids of calls and results in order."""
    found = []
    for message in normalise(messages).messages:
        found += [c["id"] for c in message.get("tool_calls", [])]
        found += [message["tool_call_id"]] if "tool_call_id" in message else []
    return found


def test_ordinary_messages() -> None:
    conversation = normalise(
        [
            {"role": "developer", "content": "be brief", "name": ""},
            {"role": "user", "content": [{"type": "text", "text": "a"}], "name": "bob", "x": 1},
            {"role": "assistant", "reasoning": "hm", "tool_calls": [], "refusal": None},
            {"role": "assistant", "content": "b", "reasoning_content": "r", "name": None},
        ]
    )
    assert conversation.messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}], "name": "bob"},
        {"role": "assistant", "content": None, "reasoning_content": "hm"},
        {"role": "assistant", "content": "b", "reasoning_content": "r"},
    ]
    assert conversation.tools is None and conversation.next_call_index == 0
    assert normalise([]).messages == [] and normalise([], []).tools is None


def test_arguments_are_kept() -> None:
    given_arguments = ['{ "a" : 1 }', "broken {", "", {"a": 1}, None]
    message = assistant(*(call(None, arguments=a) for a in given_arguments))
    (kept,) = normalise([message]).messages
    arguments = [c["function"]["arguments"] for c in kept["tool_calls"]]
    assert arguments == ['{ "a" : 1 }', "broken {", "", {"a": 1}, "{}"]
    assert [c["type"] for c in kept["tool_calls"]] == ["function"] * 5


def test_foreign_ids_are_renamed_and_results_follow() -> None:
    messages = [
        USER,
        assistant(call("call_a", "x"), call("call_b", "y.z-w")),
        result("call_b"),
        result("call_a"),
        assistant(call("call_c", "x")),
        result("call_c"),
    ]
    before = copy.deepcopy(messages)
    conversation = normalise(messages)
    assert messages == before
    expected = ["functions.x:0", "functions.y.z-w:1"]
    assert ids(messages) == [*expected, *reversed(expected), "functions.x:2", "functions.x:2"]
    assert conversation.next_call_index == 3
    assert conversation.client_ids == {
        "functions.x:0": "call_a",
        "functions.y.z-w:1": "call_b",
        "functions.x:2": "call_c",
    }


@pytest.mark.parametrize("spelling", ["functions_Glob_4", "functions-Glob-4", "functions.Glob:4"])
@pytest.mark.parametrize("answer", ["functions_Glob_4", "functions-Glob-4", "functions.Glob:4"])
def test_rewritten_ids_keep_their_number(spelling: str, answer: str) -> None:
    messages = [assistant(call(spelling, "Glob")), result(answer), assistant(call(None, "g"))]
    assert ids(messages) == ["functions.Glob:4", "functions.Glob:4", "functions.g:5"]


def test_ids_of_another_tool_or_used_twice_are_renamed() -> None:
    assert ids([assistant(call("functions.a:3", "b"))]) == ["functions.b:0"]
    assert ids([assistant(call("search:7", "search"))]) == ["functions.search:0"]
    twice = [assistant(call("functions.a:0", "a"), call("functions.a:0", "a"))]
    assert ids([*twice, result("functions.a:0"), result("functions.a:0")]) == [
        "functions.a:0",
        "functions.a:1",
        "functions.a:0",
        "functions.a:1",
    ]


def test_a_client_may_use_an_id_again_in_another_turn() -> None:
    turn = [assistant(call("1", "a")), result("1")]
    unanswered = [assistant(call("1", "a"))]
    assert ids([*turn, *unanswered, *turn, result("1")]) == [
        *("functions.a:0", "functions.a:0"),
        "functions.a:1",
        *("functions.a:2", "functions.a:2", "functions.a:2"),
    ]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.text(min_size=1, max_size=4), st.text("ab_.:0", min_size=1)), max_size=8)
)
def test_canonical_ids_are_unique_and_every_call_can_be_answered(calls: list[Any]) -> None:
    made = normalise([assistant(*(call(i, name) for i, name in calls))]) if calls else normalise([])
    canonical = [c["id"] for m in made.messages for c in m["tool_calls"]]
    assert len(set(canonical)) == len(calls)
    for (_, name), call_id in zip(calls, canonical, strict=True):
        assert re.fullmatch(rf"functions\.{re.escape(name)}:[0-9]+", call_id)
    if calls:
        messages = [assistant(*(call(i, n) for i, n in calls)), *(result(i) for i, _ in calls)]
        assert sorted(ids(messages)) == sorted(canonical * 2)


def test_long_conversations_take_linear_time() -> None:
    messages: list[Any] = []
    for i in range(3000):
        messages += [
            assistant(call("same")),
            result("same"),
            assistant(call(f"c{i}")),
            result(f"c{i}"),
        ]
    assert len(set(ids(messages))) == 6000


def test_real_requests() -> None:
    path = SHARED / "tool_call_requests.jsonl"
    if not path.exists():
        pytest.skip("the requests are not at hand")
    for line in path.read_text(encoding="utf-8").splitlines():
        request = json.loads(line)
        conversation = normalise(request["messages"], request.get("tools"))
        assert len(conversation.messages) == len(request["messages"])
        assert conversation.tools == request["tools"]


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "messages: not a list"),
        ({"role": "user"}, "messages: not a list"),
        ([USER, "hi"], "messages[1]: not an object"),
        ([{"content": "hi"}], "messages[0].role: missing"),
        ([{"role": "root", "content": "hi"}], "messages[0].role: 'root'"),
        ([{"role": ["user"], "content": "hi"}], "messages[0].role: ['user']"),
        ([{"role": "user"}], "messages[0].content: missing"),
        ([{"role": "system", "content": None}], "messages[0].content: missing"),
        ([{"role": "user", "content": 5}], "messages[0].content: neither"),
        ([{"role": "user", "content": ["a"]}], "messages[0].content[0]: not a text part"),
        ([{"role": "user", "content": [{"type": "text"}]}], "content[0]: not a text part"),
        ([{"role": "user", "content": [IMAGE]}], "content[0]: image_url parts are not supported"),
        ([{"role": "user", "content": "", "name": 5}], "messages[0].name: not a string"),
        ([{"role": "user", "content": "", "tool_calls": [1]}], "messages[0].tool_calls: only"),
        ([{"role": "assistant", "reasoning_content": []}], "reasoning_content: not a string"),
        ([{"role": "assistant", "tool_calls": {}}], "messages[0].tool_calls: not a list"),
        ([{"role": "assistant", "tool_calls": [1]}], "messages[0].tool_calls[0]: not an object"),
        ([{"role": "assistant", "tool_calls": [{}]}], "tool_calls[0].function: missing"),
        ([assistant({"function": {}})], "messages[0].tool_calls[0].function.name: missing"),
        ([assistant(call("a"), call("b", arguments=[]))], "tool_calls[1].function.arguments: nei"),
        ([assistant({**call("a"), "id": 7})], "messages[0].tool_calls[0].id: not a string"),
        ([{"role": "tool", "content": "x"}], "messages[0].tool_call_id: missing"),
        ([result("call_1")], "messages[0].tool_call_id: no call before has the id 'call_1'"),
    ],
)
def test_what_is_wrong_is_named(messages: Any, message: str) -> None:
    with pytest.raises(MessageError, match=re.escape(message)):
        normalise(messages)


def tool(name: Any = "f", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def test_tools_are_copied_and_kept_whole() -> None:
    tools = [tool("a.b-c", description="d", parameters={"type": "object"}, strict=True), tool("b")]
    checked = validate_tools(tools)
    assert checked == tools and checked[0] is not tools[0]
    assert normalise([], tools).tools == tools


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ({}, "tools: not a list"),
        ("[]", "tools: not a list"),
        ([tool(), 5], "tools[1]: not an object"),
        ([{"type": "function"}], "tools[0].function: missing"),
        ([{**tool(), "type": 1}], "tools[0].type: not a string"),
        ([tool(None)], "tools[0].function.name: missing"),
        ([tool(" ")], "tools[0].function.name: missing"),
        ([tool("x" * 257)], "tools[0].function.name: longer than 256"),
        ([tool("a"), tool("a")], "tools[1].function.name: 'a' is declared already"),
        ([tool(description=5)], "tools[0].function.description: not a string"),
        ([tool(parameters="{}")], "tools[0].function.parameters: not an object"),
    ],
)
def test_what_is_wrong_with_tools_is_named(tools: Any, message: str) -> None:
    with pytest.raises(MessageError, match=re.escape(message)):
        validate_tools(tools)
