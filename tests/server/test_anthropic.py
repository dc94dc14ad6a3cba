"""POST /v1/messages: what clients of Anthropic's API may send, and what they get."""

from __future__ import annotations

import json
import re

import pytest

from kimi_cpu.server.api.anthropic import put_together
from tests.cli.fake import call

CALCULATOR = {
    "name": "calculator",
    "description": "Evaluate an arithmetic expression.",
    "input_schema": {
        "type": "object",
        "properties": {"expression": {"type": "string"}},
        "required": ["expression"],
    },
}
THINKING = {"type": "enabled", "budget_tokens": 1024}


def user(content):
    return [{"role": "user", "content": content}]


def ask(live, content="hi", **fields):
    """The message, which must come."""
    body = {"model": "m", "max_tokens": 1000, "messages": user(content), **fields}
    response = live.post("/v1/messages", body)
    assert response.status_code == 200, response.text
    return response.json()


def events_of(live, content="hi", **fields):
    body = {"max_tokens": 1000, "messages": user(content), **fields}
    return list(live.events("/v1/messages", body))


def test_an_answer_of_the_nano_model(nano):
    message = ask(nano, "What is 17 + 25?")
    (block,) = message["content"]
    assert block["type"] == "text" and block["text"].endswith("17 + 25 = 42.")
    assert message["type"] == "message" and message["role"] == "assistant"
    assert message["stop_reason"] == "end_turn" and message["stop_sequence"] is None
    assert re.fullmatch("msg_[0-9a-f]+", message["id"]) and message["model"] == "nano"
    assert message["usage"]["output_tokens"] > 5
    assert message["usage"]["output_tokens_details"] == {"thinking_tokens": 0}


def test_thinking_comes_when_asked_for(nano):
    thought, text = ask(nano, "What is 17 + 25?", thinking=THINKING)["content"]
    assert thought["type"] == "thinking" and "42" in thought["thinking"] and thought["signature"]
    assert text == {"type": "text", "text": "17 + 25 = 42."}


@pytest.mark.parametrize(
    ("fields", "kinds"),
    [
        ({}, ["text"]),
        ({"thinking": {"type": "disabled"}}, ["text"]),
        ({"thinking": {"type": "between_tools"}}, ["text"]),
        ({"thinking": {"type": "adaptive"}}, ["thinking", "text"]),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}},
         ["thinking", "text"]),
        ({"thinking": THINKING, "output_config": {"effort": "low"}}, ["thinking", "text"]),
    ],
)  # fmt: skip
def test_ways_to_switch_thinking(scripted, fields, kinds):
    assert [block["type"] for block in ask(scripted, **fields)["content"]] == kinds


def test_thinking_is_bounded_and_may_be_omitted(serve):
    live = serve(lambda prompt: "<think>" + "word " * 300 + "</think>Yes.")
    message = ask(live, thinking={"type": "enabled", "budget_tokens": 20})
    assert message["content"][0]["thinking"] == "word " * 4
    omitted = ask(live, thinking={**THINKING, "display": "omitted"})["content"][0]
    assert omitted["thinking"] == "" and omitted["signature"]


def test_a_stream_is_in_order_and_says_the_same_as_the_whole(nano):
    fields = {"tools": [CALCULATOR], "thinking": THINKING}
    whole = ask(nano, "What is 318 * 27?", **fields)
    events = events_of(nano, "What is 318 * 27?", **fields)
    types = [event["type"] for event in events if event["type"] != "ping"]
    assert types[0] == "message_start" and types[-2:] == ["message_delta", "message_stop"]
    assert events[0]["message"]["content"] == [] and events[0]["message"]["stop_reason"] is None
    assert events[0]["message"]["usage"]["input_tokens"] > 50
    opened, last = None, -1
    for event in events:
        if event["type"] == "content_block_start":
            assert opened is None and event["index"] == last + 1
            opened = last = event["index"]
        elif event["type"].startswith("content_block"):
            assert event["index"] == opened
            opened = None if event["type"] == "content_block_stop" else opened
    together = put_together(events[1:])
    assert together["content"] == whole["content"]
    assert together["stop_reason"] == whole["stop_reason"] == "tool_use"
    thought, made = together["content"]
    assert thought["type"] == "thinking" and thought["signature"]
    assert made == {
        "type": "tool_use", "id": "functions_calculator_0", "name": "calculator",
        "input": {"expression": "318*27"},
    }  # fmt: skip
    kinds = {event["delta"]["type"] for event in events if event["type"] == "content_block_delta"}
    assert kinds == {"thinking_delta", "signature_delta", "input_json_delta"}
    assert len(events) > 15, "it comes in pieces"


@pytest.mark.parametrize("thinking", [{"type": "disabled"}, THINKING])
def test_a_tool_loop_computes_nothing_twice(nano, thinking):
    fields = {"tools": [CALCULATOR], "thinking": thinking}
    messages = user("What is 318 * 27?")
    first = ask(nano, messages=messages, **fields)
    made = first["content"][-1]
    messages += [
        {"role": "assistant", "content": first["content"]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": made["id"],
             "content": [{"type": "text", "text": "8586"}]}]},
    ]  # fmt: skip
    second = ask(nano, messages=messages, **fields)
    assert second["stop_reason"] == "end_turn" and "8586" in second["content"][-1]["text"]
    before, after = first["usage"], second["usage"]
    known = sum(before[n] for n in ("input_tokens", "cache_read_input_tokens", "output_tokens"))
    assert after["cache_read_input_tokens"] >= known - 1


class Seen:
    """A script that keeps the prompts it was given."""

    def __init__(self, reply="<think></think>Yes."):
        self.prompts, self.reply = [], reply

    def __call__(self, prompt):
        if not self.prompts or self.prompts[-1] != prompt:
            self.prompts.append(prompt)
        return self.reply


def test_what_the_model_reads(serve):
    seen = Seen()
    live = serve(seen)
    ask(
        live,
        system=[
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=a81f3;"},
            {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
        ],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "Look"},
                                         {"type": "text", "text": " there."}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "Two files.", "signature": "of whatever"},
                {"type": "redacted_thinking", "data": "AAAA"},
                {"type": "text", "text": "Reading."}]},
            {"role": "assistant", "content": [
                {"type": "tool_use", "id": "toolu_1", "name": "read", "input": {"path": "a"}},
                {"type": "tool_use", "id": "toolu_2", "name": "read", "input": {"path": "b"}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "toolu_2", "content": "B"},
                {"type": "tool_result", "tool_use_id": "toolu_1", "is_error": True,
                 "content": [{"type": "text", "text": "no such file"}]},
                {"type": "text", "text": "Go on."}]},
        ],
        tools=[{**CALCULATOR, "name": "read"}],
    )  # fmt: skip
    prompt = seen.prompts[-1]
    turns = re.findall(r"<\|im_\w+\|>(\w+)<\|im_middle\|>(.*?)<\|im_end\|>", prompt, re.S)
    assert json.loads(turns[0][1])[0]["function"]["parameters"] == CALCULATOR["input_schema"]
    assert turns[1:] == [
        ("system", "Be brief."),
        ("user", "Look there."),
        (
            "assistant",
            "<think>Two files.</think>Reading.<|tool_calls_section_begin|>"
            "<|tool_call_begin|>functions.read:0<|tool_call_argument_begin|>"
            '{"path": "a"}<|tool_call_end|>'
            "<|tool_call_begin|>functions.read:1<|tool_call_argument_begin|>"
            '{"path": "b"}<|tool_call_end|><|tool_calls_section_end|>',
        ),
        ("tool", "## Return of functions.read:1\nB"),
        ("tool", "## Return of functions.read:0\nError: no such file"),
        ("user", "Go on."),
    ]


def test_the_beginning_of_an_answer_is_continued(nano):
    """Only what follows comes back, and together they are the turn that the model said."""
    question = user("What is the capital of France?")
    begun = {"role": "assistant", "content": "The capital of France is"}
    message = ask(nano, messages=[*question, begun])
    (block,) = message["content"]
    assert block["type"] == "text" and block["text"] == " Paris."
    assert message["stop_reason"] == "end_turn"
    texts = [{"type": "text", "text": text} for text in ("The capital ", "of France is")]
    parts = {"role": "assistant", "content": texts}
    assert ask(nano, messages=[*question, parts])["content"] == message["content"]
    events = events_of(nano, messages=[*question, begun])
    assert put_together(events[1:])["content"] == message["content"]
    counted = nano.post("/v1/messages/count_tokens", {"messages": [*question, begun]}).json()
    usage = message["usage"]
    assert counted["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]
    # What is sent back is found in its own tokens.
    whole = {"role": "assistant", "content": begun["content"] + block["text"]}
    again = ask(nano, messages=[*question, whole, *user("And 3 + 4?")])
    known = counted["input_tokens"] + usage["output_tokens"]
    assert again["usage"]["cache_read_input_tokens"] >= known - 1


def test_what_the_model_reads_of_a_beginning(serve):
    """Text is text, also there; and the first thing that the model says may be a call."""
    seen = Seen("<think></think>Let me see." + call("calculator", '{"expression": "6*7"}'))
    live = serve(seen)
    begun = {"role": "assistant", "content": "Let me see"}
    message = ask(live, messages=[*user("6*7?"), begun], tools=[CALCULATOR])
    assert [block["type"] for block in message["content"]] == ["text", "tool_use"]
    assert message["stop_reason"] == "tool_use"
    ask(live, messages=[*user("x"), {"role": "assistant", "content": "a</think>b<|im_end|>"}])
    service = live.app.state.service
    (ids,) = {
        tuple(r.turn) for r in service.replies._replies.values() if not r.message.get("tool_calls")
    }
    control = service.model.tokenizer.special_tokens
    assert ids.count(control["</think>"]) == 1 and control["<|im_end|>"] not in ids
    for nothing in ("", []):
        empty = ask(live, messages=[*user("6*7?"), {"role": "assistant", "content": nothing}])
        assert empty["content"][0]["text"].startswith("Let me see")


def test_tool_choice(nano):
    note = {"name": "note", "input_schema": {
        "type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["n"]}}  # fmt: skip
    tools = [CALCULATOR, note]
    named = ask(nano, "Hello", tools=tools, tool_choice={"type": "tool", "name": "note"})
    assert named["stop_reason"] == "tool_use"
    assert [(b["name"], type(b["input"]["n"])) for b in named["content"]] == [("note", int)]
    forced = ask(
        nano, "Hello", tools=tools, max_tokens=400,
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
    )  # fmt: skip
    assert [block["type"] for block in forced["content"]].count("tool_use") == 1
    none = ask(nano, "What is 318 * 27?", tools=tools, tool_choice={"type": "none"}, max_tokens=60)
    assert all(block["type"] != "tool_use" for block in none["content"])
    auto = ask(nano, "What is 318 * 27?", tools=tools, tool_choice={"type": "auto"})
    assert auto["content"][-1]["input"] == {"expression": "318*27"}


def test_structured_output(nano):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 23]}},
              "required": ["n"], "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "schema": schema}
    (text,) = ask(nano, "Hello", output_config={"format": form})["content"]
    assert set(json.loads(text["text"])) == {"n"}


def test_why_it_stopped(scripted, serve):
    cut = ask(scripted, "slow", max_tokens=7)
    assert cut["stop_reason"] == "max_tokens" and cut["usage"]["output_tokens"] == 7
    ended = ask(scripted, "slow", stop_sequences=["never", "d w"])
    assert ended["stop_reason"] == "stop_sequence" and ended["stop_sequence"] == "d w"
    assert ended["content"] == [{"type": "text", "text": "wor"}]
    assert events_of(scripted, "slow", stop_sequences=["d w"])[-2]["delta"] == {
        "stop_reason": "stop_sequence", "stop_sequence": "d w",
    }  # fmt: skip
    assert ask(scripted, "hi", max_tokens=10**9)["stop_reason"] == "end_turn"
    live = serve(lambda _: "x" * 500, context=200)
    assert ask(live)["stop_reason"] == "model_context_window_exceeded"


def test_a_call_that_was_cut_off(serve):
    live = serve(lambda _: call("calculator", '{"expression": "' + "1" * 200))
    whole = ask(live, tools=[CALCULATOR], max_tokens=60)
    assert whole["content"] == [] and whole["stop_reason"] == "max_tokens"
    events = events_of(live, tools=[CALCULATOR], max_tokens=60)
    assert [event["type"] for event in events[-3:]] == [
        "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip


def test_blanks_are_no_block(serve):
    blanks = "\n" + call("calculator", '{"expression": "1"}')
    live = serve(lambda p: blanks if p.endswith("</think>") else f"<think> \n</think>{blanks}")
    for thinking in (THINKING, {"type": "disabled"}):
        (made,) = ask(live, tools=[CALCULATOR], thinking=thinking)["content"]
        assert made["type"] == "tool_use"


def test_pings_while_the_prompt_is_read(serve):
    live = serve(settings={"heartbeat_s": 0.05}, layer_s=0.15)
    events = events_of(live)
    first_block = [event["type"] for event in events].index("content_block_start")
    assert [event["type"] for event in events[:first_block]].count("ping") >= 3


def test_counting_tokens(nano):
    conversation = {"messages": user("What is 318 * 27?"), "system": "Be brief.",
                    "tools": [CALCULATOR], "tool_choice": {"type": "auto"}}  # fmt: skip
    for thinking in (None, THINKING, {"type": "disabled"}):
        fields = {**conversation, "thinking": thinking}
        count = nano.post("/v1/messages/count_tokens", {"model": "m", **fields}).json()
        usage = ask(nano, **fields)["usage"]
        total = usage["input_tokens"] + usage["cache_read_input_tokens"]
        assert count == {"input_tokens": total}
    long = nano.post("/v1/messages/count_tokens", {"messages": user("word " * 6000)})
    assert long.json()["input_tokens"] > 10_000, "also of what does not fit"


IMAGE = {"type": "image", "source": {"type": "url", "url": "file:///etc/passwd"}}
DOCUMENT = {"type": "document", "source": {"type": "file", "file_id": "file_1"}}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"messages": "hi"}, "messages: Expected"),
        ({"messages": [5]}, "messages[0]: not an object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role: use user"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: neither"),
        ({"messages": user([IMAGE])}, "messages[0].content[0]: 'image' is not supported"),
        ({"messages": user([DOCUMENT])}, "messages[0].content[0]: 'document' is not supported"),
        ({"messages": user([{"type": "text", "text": 5}])}, "messages[0].content[0].text: not"),
        ({"messages": user([{"text": "x"}])}, "messages[0].content[0]: not an object with"),
        ({"messages": user([{"type": "tool_result", "tool_use_id": "t", "content": "x"}])},
         "messages[0].content[0].tool_use_id: no call before"),
        ({"messages": user([{"type": "tool_result", "content": "x"}])},
         "messages[0].content[0].tool_use_id: missing"),
        ({"messages": user([{"type": "tool_result", "tool_use_id": "t", "content": [IMAGE]}])},
         "messages[0].content[0].content[0]: 'image' is not"),
        ({"messages": [{"role": "assistant", "content": [
            {"type": "tool_use", "id": "t", "name": "f", "input": "{}"}]}]},
         "messages[0].content[0].input: missing or not an object"),
        ({"messages": [{"role": "assistant", "content": [
            {"type": "server_tool_use", "id": "t", "name": "web_search", "input": {}}]}]},
         "messages[0].content[0]: 'server_tool_use' is not"),
        ({"messages": [*user("x"), {"role": "assistant", "content": "The answer is "}]},
         "messages[1]: the beginning of the answer must not end in blanks"),
        ({"messages": [*user("x"), {"role": "assistant", "content": [
            {"type": "tool_use", "id": "t", "name": "f", "input": {}}]}]},
         "messages[1]: ends in tool_use"),
        ({"messages": [*user("x"), {"role": "assistant", "content": "A"}], "thinking": THINKING},
         "thinking: not with"),
        ({"messages": [*user("x"), {"role": "assistant", "content": "A"}],
          "output_config": {"format": {"type": "json_schema", "schema": {}}}},
         "output_config.format: not with"),
        ({"system": [IMAGE]}, "system[0]: 'image'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
         "tools[0].type: 'web_search_20250305' is not a tool"),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema: missing"),
        ({"tools": [{"name": "x", "input_schema": 5}]}, "tools[0].input_schema: not an object"),
        ({"tools": [{"name": "", "input_schema": {}}]}, "tools[0].name: missing"),
        ({"tools": [CALCULATOR, CALCULATOR]}, "tools[1].name: 'calculator' is declared already"),
        ({"tools": [{**CALCULATOR, "strict": True, "input_schema": {
            "type": "object", "properties": {"x": {"not": {"pattern": "a"}}}}}]},
         "tools[0].input_schema.properties.x"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type: use auto"),
        ({"tool_choice": {"type": "any"}}, "tool_choice: 'required' without tools"),
        ({"tools": [CALCULATOR], "tool_choice": {"type": "tool", "name": "f"}},
         "tool_choice.name: 'f' is not among"),
        ({"tool_choice": "auto"}, "tool_choice: Expected"),
        ({"thinking": {"type": "maybe"}}, "thinking.type: use enabled"),
        ({"thinking": {"type": "enabled", "budget_tokens": "1"}}, "thinking.budget_tokens: not"),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "heroic"}},
         "output_config.effort is 'heroic'"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type: not"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences: at most"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": -5}, "top_k is -5"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": None}, "max_tokens: Expected"),
        ({"mcp_servers": [{"url": "http://127.0.0.1"}]}, "mcp_servers: this server runs no"),
        ({"container": "c"}, "container: this server runs no"),
        ({"thread": {"type": "create"}}, "thread: this server keeps no threads"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_fields_are_named(scripted, fields, text, stream):
    body = {"max_tokens": 10, "messages": user("hi"), "stream": stream, **fields}
    response = scripted.post("/v1/messages", body)
    assert response.status_code == 400, response.text
    error = response.json()
    assert error["type"] == "error" and error["error"]["type"] == "invalid_request_error"
    assert error["error"]["message"].startswith(text), error["error"]["message"]


def test_errors_have_the_shape_of_this_api(serve, scripted):
    def kind(response):
        body = response.json()
        assert body["type"] == "error" and body["error"]["message"]
        return response.status_code, body["error"]["type"]

    assert kind(scripted.client.get("/v1/messages")) == (405, "invalid_request_error")
    assert kind(scripted.post("/v1/messages/batches", {})) == (404, "not_found_error")
    missing = scripted.post("/v1/messages", {"messages": user("hi")})
    assert kind(missing) == (400, "invalid_request_error")
    assert "max_tokens" in missing.json()["error"]["message"]
    assert kind(scripted.client.post("/v1/messages", content=b"{")) == (
        400, "invalid_request_error",
    )  # fmt: skip
    live = serve(settings={"api_key": "secret"})
    body = {"max_tokens": 10, "messages": user("hi")}
    wrong = live.client.post("/v1/messages", json=body, headers={"Authorization": "Bearer x"})
    assert kind(wrong) == (401, "authentication_error")
    headers = {"x-api-key": "secret", "Authorization": ""}
    assert live.client.post("/v1/messages", json=body, headers=headers).status_code == 200
    live.worker.model.engine.broken = RuntimeError("crash")
    assert kind(live.post("/v1/messages", body)) == (500, "api_error")
    live.worker.model.engine.broken = RuntimeError("crash")
    last = events_of(live)[-1]
    assert last["type"] == "error" and last["error"]["type"] == "api_error"


def mutations(body):
    """The body with each of its values replaced by others in turn."""
    odd = [None, -5, "x", [], {}, [{}], [None], {"type": []}, True, "\ud800", 1e999]

    def places(value, where=()):
        items = enumerate(value) if isinstance(value, list) else ()
        for key, inner in value.items() if isinstance(value, dict) else items:
            yield (*where, key)
            yield from places(inner, (*where, key))

    for *where, last in list(places(body)):
        # Without a limit, a script that a schema has thrown out of its course goes on for long.
        for value in odd[1:] if last == "max_output_tokens" else odd:
            changed = json.loads(json.dumps(body))
            inner = changed
            for key in where:
                inner = inner[key]
            inner[last] = value
            yield changed


#: Some of them always, all in the slow tests.
SOME_OR_ALL = [pytest.param(13, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]


def check_mutations(live, path, body, every):
    """Whatever is wrong with a request is told as such: nothing is the server's fault."""
    seen = set()
    for changed in list(mutations(body))[::every]:
        content = json.dumps(changed).replace("Infinity", "1e999")
        response = live.client.post(path, content=content)
        assert response.status_code in (200, 400, 404), (changed, response.text)
        seen.add(response.status_code)
        if response.status_code == 400:
            assert response.json()["error"]["message"]
    assert {200, 400} <= seen
    assert live.worker._scheduler.active == 0


@pytest.mark.parametrize("every", SOME_OR_ALL)
def test_requests_that_are_wrong_somewhere(scripted, every):
    body = {
        "max_tokens": 1, "system": [{"type": "text", "text": "a"}], "stop_sequences": ["a"],
        "tools": [CALCULATOR], "tool_choice": {"type": "tool", "name": "calculator"},
        "thinking": {"type": "adaptive", "display": "omitted"},
        "output_config": {"effort": "low"},
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "a", "signature": "b"},
                {"type": "text", "text": "a"},
                {"type": "tool_use", "id": "t", "name": "calculator", "input": {"a": [1]}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t", "is_error": True,
                 "content": [{"type": "text", "text": "a"}]}]},
        ],
    }  # fmt: skip
    check_mutations(scripted, "/v1/messages", body, every)
    check_mutations(scripted, "/v1/messages/count_tokens", body, every)


@pytest.mark.parametrize("depth", [100, 900, 5000])
def test_input_that_is_nested_deeply(scripted, depth):
    nested = '{"a":' * depth + "1" + "}" * depth
    use = '{"type": "tool_use", "id": "t", "name": "f", "input": ' + nested + "}"
    content = (
        '{"max_tokens": 5, "messages": [{"role": "user", "content": "a"}, {"role": "assistant",'
        '"content": [' + use + ']}, {"role": "user", "content": "b"}]}'
    )
    response = scripted.client.post("/v1/messages", content=content)
    assert response.status_code in (200, 400), response.text
