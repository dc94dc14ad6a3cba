"""POST /v1/responses: what clients may send, and what they get."""

from __future__ import annotations

import json
import re

import pytest

from kimi_cpu.server.stored import StoredResponses
from tests.cli.fake import call
from tests.server.test_anthropic import SOME_OR_ALL, Seen, check_mutations

PARAMETERS = {
    "type": "object",
    "properties": {"expression": {"type": "string"}},
    "required": ["expression"],
}
CALCULATOR = {
    "type": "function",
    "name": "calculator",
    "description": "Evaluate an arithmetic expression.",
    "parameters": PARAMETERS,
}


def ask(live, content="hi", **fields):
    """The response, which must come."""
    response = live.post("/v1/responses", {"model": "m", "input": content, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def events_of(live, content="hi", **fields):
    """The events of a stream, which are numbered."""
    events = list(live.events("/v1/responses", {"input": content, **fields}))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def kinds(response):
    return [item["type"] for item in response["output"]]


def text_of(response):
    return "".join(
        part["text"]
        for item in response["output"]
        if item["type"] == "message"
        for part in item["content"]
    )


def test_an_answer_of_the_nano_model(nano):
    response = ask(nano, "What is 17 + 25?", metadata={"a": "b"})
    thought, message = response["output"]
    assert thought["type"] == "reasoning" and thought["summary"] == []
    assert thought["content"][0]["type"] == "reasoning_text"
    assert "42" in thought["content"][0]["text"]
    assert message["content"] == [
        {"type": "output_text", "text": "17 + 25 = 42.", "annotations": [], "logprobs": []}
    ]
    assert message["role"] == "assistant" and message["status"] == "completed"
    assert response["object"] == "response" and response["status"] == "completed"
    assert response["model"] == "nano" and response["metadata"] == {"a": "b"}
    assert re.fullmatch("resp_[0-9a-f]+", response["id"])
    usage = response["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["output_tokens_details"]["reasoning_tokens"] > 0


@pytest.mark.parametrize("content", ["What is 17 + 25?", "What is 318 * 27?"])
def test_a_stream_says_the_same_as_the_whole(nano, content):
    fields = {"tools": [CALCULATOR], "instructions": "Be brief.", "max_output_tokens": 200}
    whole = ask(nano, content, **fields)
    events = events_of(nano, content, **fields)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0]["response"]["status"] == "in_progress"
    last = events[-1]
    assert last["type"] == f"response.{whole['status']}"
    assert kinds(last["response"]) == kinds(whole)
    for ours, theirs in zip(last["response"]["output"], whole["output"], strict=True):
        assert {**ours, "id": 0} == {**theirs, "id": 0}
    texts, done = {}, []
    for event in events[2:-1]:
        name, at = event["type"].removeprefix("response."), event["output_index"]
        item = last["response"]["output"][at]
        assert event.get("item_id", item["id"]) == item["id"]
        if name == "output_item.added":
            assert at == len(texts) and event["item"]["status"] == "in_progress"
            texts[at] = ""
        elif name.endswith(".delta"):
            texts[at] += event["delta"]
        elif name in ("output_text.done", "reasoning_text.done"):
            assert event["text"] == texts[at] == item["content"][0]["text"]
        elif name == "function_call_arguments.done":
            assert event["arguments"] == texts[at] == item["arguments"]
        elif name == "output_item.done":
            assert event["item"] == item
            done.append(at)
        else:
            assert name in ("content_part.added", "content_part.done")
    assert done == list(range(len(whole["output"])))
    assert len(events) > 15, "it comes in pieces"


@pytest.mark.parametrize("back", ["items", "previous_response_id", "without reasoning"])
def test_a_tool_loop_computes_nothing_twice(nano, back):
    first = ask(nano, "What is 318 * 27?", tools=[CALCULATOR])
    made = first["output"][-1]
    assert made["call_id"] == "functions.calculator:0" and made["status"] == "completed"
    assert json.loads(made["arguments"]) == {"expression": "318*27"}
    result = {"type": "function_call_output", "call_id": made["call_id"], "output": "8586"}
    if back == "previous_response_id":
        fields = {"content": [result], "previous_response_id": first["id"]}
    else:
        items = first["output"] if back == "items" else [made]
        fields = {"content": [{"role": "user", "content": "What is 318 * 27?"}, *items, result]}
    second = ask(nano, tools=[CALCULATOR], **fields)
    assert second["status"] == "completed" and "8586" in text_of(second)
    known = first["usage"]["input_tokens"] + first["usage"]["output_tokens"]
    assert second["usage"]["input_tokens_details"]["cached_tokens"] >= known - 1


def test_what_the_model_reads(serve):
    seen = Seen()
    live = serve(seen)
    ask(
        live,
        [
            {"type": "message", "role": "user", "content": [
                {"type": "input_text", "text": "Look"}, {"type": "input_text", "text": " there."}]},
            {"type": "reasoning", "id": "rs_1", "summary": [],
             "content": [{"type": "reasoning_text", "text": "Two files."}]},
            {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
             "content": [{"type": "output_text", "text": "Reading.", "annotations": []}]},
            {"type": "function_call", "call_id": "call_1", "name": "read", "arguments": "{}"},
            {"type": "function_call", "call_id": "call_2", "name": "read", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "call_2", "output": "B"},
            {"type": "function_call_output", "call_id": "call_1",
             "output": [{"type": "input_text", "text": "A"}]},
            {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "AAAA"},
            {"role": "assistant", "content": "Both."},
            {"role": "developer", "content": "Go on."},
        ],
        instructions="Be brief.",
        tools=[{**CALCULATOR, "name": "read"}],
    )  # fmt: skip
    prompt = seen.prompts[-1]
    turns = re.findall(r"<\|im_\w+\|>(\w+)<\|im_middle\|>(.*?)<\|im_end\|>", prompt, re.S)
    assert json.loads(turns[0][1])[0]["function"]["parameters"] == PARAMETERS
    made = "".join(
        f"<|tool_call_begin|>functions.read:{n}<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
        for n in (0, 1)
    )
    # The template leaves out the reasoning before the last answer.
    assert turns[1:] == [
        ("system", "Be brief."),
        ("user", "Look there."),
        (
            "assistant",
            "<think></think>Reading.<|tool_calls_section_begin|>"
            + made
            + "<|tool_calls_section_end|>",
        ),
        ("tool", "## Return of functions.read:1\nB"),
        ("tool", "## Return of functions.read:0\nA"),
        ("assistant", "<think></think>Both."),
        ("system", "Go on."),
    ]


def test_items_by_reference(serve):
    said = "<think>Hm.</think>Let me see." + call("calculator", '{"expression": "6*7"}')
    prompts = []

    def script(prompt):
        prompts.append(prompt)
        return "<think>So.</think>42." if "## Return of" in prompt else said

    live = serve(script)
    first = ask(live, "Six times seven?", tools=[CALCULATOR])
    assert kinds(first) == ["reasoning", "message", "function_call"]
    made = first["output"][-1]
    result = {"type": "function_call_output", "call_id": made["call_id"], "output": "42"}
    question = {"role": "user", "content": "Six times seven?"}
    seen = set()
    references = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
    short = [{"id": item["id"]} for item in first["output"]]  # as OpenAI's documentation allows
    for items in (first["output"], references, short):
        body = ask(live, [question, *items, result], tools=[CALCULATOR])
        known = first["usage"]["input_tokens"] + first["usage"]["output_tokens"]
        assert body["usage"]["input_tokens_details"]["cached_tokens"] >= known - 1
        seen.add(next(prompt for prompt in reversed(prompts) if prompt.endswith("<|im_middle|>")))
    assert len(seen) == 1 and all(text in prompts[-1] for text in ("6*7", "Let me see.", "Hm."))
    for response_id in (first["id"], None):
        if response_id:
            live.client.delete(f"/v1/responses/{response_id}")
        else:
            references = [
                {"type": "item_reference", "id": ask(live, store=False)["output"][0]["id"]}
            ]
        response = live.post("/v1/responses", {"input": [question, *references]})
        assert response.status_code == 404
        error = response.json()["error"]
        assert error["param"] == "input[1]" and "there is no item" in error["message"]
    assert not live.app.state.service.stored.find_item(made["id"])


def test_log_probabilities(nano):
    include = ["message.output_text.logprobs", "reasoning.encrypted_content"]
    fields = {"include": include, "top_logprobs": 3, "temperature": 0}
    whole = ask(nano, "What is 17 + 25?", **fields)
    assert whole["top_logprobs"] == 3
    part = whole["output"][-1]["content"][0]
    entries = part["logprobs"]
    assert "".join(entry["token"] for entry in entries) == part["text"] == "17 + 25 = 42."
    for entry in entries:
        assert bytes(entry["bytes"]).decode() == entry["token"] and entry["logprob"] <= 0
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["token"] == entry["token"], "greedy"
    chat = nano.chat("What is 17 + 25?", logprobs=True, top_logprobs=3, temperature=0)
    assert chat["choices"][0]["logprobs"]["content"] == entries
    events = events_of(nano, "What is 17 + 25?", **fields)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [entry for event in deltas for entry in event["logprobs"]] == entries
    assert sum(1 for event in deltas if event["logprobs"]) > 3, "they come with their text"
    for event in events:
        if event["type"] == "response.output_text.done":
            assert event["logprobs"] == entries
        if event["type"] in ("response.content_part.added", "response.content_part.done"):
            known = entries if event["type"].endswith("done") else []
            assert event["part"].get("logprobs", known) == known
    assert events[-1]["response"]["output"][-1]["content"][0]["logprobs"] == entries
    # Without being included they do not come, whatever their number.
    plain = ask(nano, "What is 17 + 25?", top_logprobs=3, temperature=0)
    assert plain["output"][-1]["content"][0]["logprobs"] == []


def test_log_probabilities_are_of_the_text_alone(serve):
    live = serve(lambda _: "<think>Hm.</think>  " + call("calculator", '{"expression": "1"}'))
    include = ["message.output_text.logprobs"]
    assert kinds(ask(live, tools=[CALCULATOR], include=include)) == ["reasoning", "function_call"]
    live = serve(lambda _: "<think></think>A \n" + call("calculator", '{"expression": "1"}'))
    first = ask(live, tools=[CALCULATOR], include=include)["output"][0]["content"][0]
    assert "".join(entry["token"] for entry in first["logprobs"]) == first["text"] == "A \n"


def test_instructions_are_those_of_this_request_only(serve):
    seen = Seen()
    live = serve(seen)
    first = ask(live, "One.", instructions="Be brief.")
    second = ask(live, "Two.", previous_response_id=first["id"], instructions="Be long.")
    assert "Be brief." not in seen.prompts[-1] and "Be long." in seen.prompts[-1]
    ask(live, "Three.", previous_response_id=second["id"])
    prompt = seen.prompts[-1]
    assert "Be long." not in prompt
    assert re.findall(r"(?:user|assistant)<\|im_middle\|>(?:<think></think>)?(\w+\.)", prompt) == [
        "One.", "Yes.", "Two.", "Yes.", "Three.",
    ]  # fmt: skip


def test_what_is_kept(scripted, nano):
    kept = ask(scripted)
    path = f"/v1/responses/{kept['id']}"
    assert scripted.client.get(path).json() == kept
    assert scripted.client.delete(path).json()["deleted"] is True
    for gone in (kept["id"], ask(scripted, store=False)["id"], "resp_x"):
        for response in (
            scripted.client.get(f"/v1/responses/{gone}"),
            scripted.client.delete(f"/v1/responses/{gone}"),
        ):
            assert response.status_code == 404
            assert "there is no response" in response.json()["error"]["message"]
        response = scripted.post("/v1/responses", {"input": "x", "previous_response_id": gone})
        assert response.status_code == 400
    assert response.json()["error"]["param"] == "previous_response_id"
    assert response.json()["error"]["code"] == "previous_response_not_found"
    assert nano.client.get(f"/v1/responses/{kept['id']}").status_code == 404
    streamed = events_of(scripted)[-1]["response"]
    assert scripted.client.get(f"/v1/responses/{streamed['id']}").json() == streamed


def test_the_store_is_bounded():
    store = StoredResponses(max_bytes=1000)
    for n in range(30):
        store.keep(({"role": "user", "content": "x" * 50},), {"id": str(n)})
        store.find("0")
    assert 5 < len(store) < 20 and store.find("0") is not None and store.find("1") is None
    store.keep(({"content": "x" * 2000},), {"id": "large"})
    assert len(store) == 0


def test_structured_output(nano):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 23]}},
              "required": ["n"], "additionalProperties": False}  # fmt: skip
    off = {"effort": "none"}
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    response = ask(nano, "Hello", text={"format": form}, reasoning=off)
    assert set(json.loads(text_of(response))) == {"n"} and kinds(response) == ["message"]
    form = {"type": "json_object"}
    response = ask(nano, "Hello", text={"format": form}, reasoning=off, max_output_tokens=300)
    if response["status"] == "completed":
        assert isinstance(json.loads(text_of(response)), dict)
    assert kinds(ask(nano, "Hello", text={"format": {"type": "text"}}))[-1] == "message"


def test_tool_choice(nano):
    note = {"type": "function", "name": "note", "parameters": {
        "type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["n"]}}  # fmt: skip
    fields = {"tools": [CALCULATOR, note], "reasoning": {"effort": "none"}}
    named = ask(nano, "Hello", tool_choice={"type": "function", "name": "note"}, **fields)
    (made,) = named["output"]
    assert made["name"] == "note" and 0 <= json.loads(made["arguments"])["n"] <= 9
    forced = ask(
        nano, "Hello", tool_choice="required", parallel_tool_calls=False, max_output_tokens=400,
        **fields,
    )  # fmt: skip
    assert kinds(forced).count("function_call") == 1
    none = ask(nano, "What is 318 * 27?", tool_choice="none", max_output_tokens=60, **fields)
    assert "function_call" not in kinds(none)


def test_efforts(serve):
    live = serve(lambda prompt: "<think>" + "word " * 300 + "</think>Yes.")
    thought = ask(live, reasoning={"effort": "minimal"})["output"][0]
    assert len(thought["content"][0]["text"]) == 256
    assert len(ask(live, reasoning={"summary": "auto"})["output"][0]["content"][0]["text"]) == 1500


def test_what_was_cut_off(scripted, serve):
    cut = ask(scripted, "slow", max_output_tokens=30)
    assert cut["status"] == "incomplete"
    assert cut["incomplete_details"] == {"reason": "max_output_tokens"}
    assert cut["usage"]["output_tokens"] == 30
    live = serve(lambda _: call("calculator", '{"expression": "' + "1" * 200))
    fields = {"tools": [CALCULATOR], "max_output_tokens": 60, "reasoning": {"effort": "none"}}
    (made,) = ask(live, **fields)["output"]
    assert made["status"] == "incomplete"
    last = events_of(live, **fields)[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["output"][0]["status"] == "incomplete"
    # A conversation goes on from there all the same.
    ask(live, "and?", previous_response_id=last["response"]["id"], **fields)


def test_a_crash_ends_the_stream_with_an_event(serve):
    live = serve()
    live.worker.model.engine.broken = RuntimeError("crash")
    last = events_of(live)[-1]
    assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "server_error"
    live.worker.model.engine.broken = RuntimeError("crash")
    assert live.post("/v1/responses", {"input": "x"}).status_code == 500


IMAGE = {"type": "input_image", "image_url": "file:///etc/passwd"}


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"input": None}, "input", "Expected"),
        ({"input": 5}, "input", "Expected"),
        ({"input": [5]}, "input[0]", "not an object"),
        ({"input": [{}]}, "input[0]", "not supported"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type", "not supported"),
        ({"input": [{"type": "item_reference"}]}, "input[0].id", "missing"),
        ({"input": [{"type": "item_reference", "id": 5}]}, "input[0].id", "not a string"),
        ({"top_logprobs": 21}, "top_logprobs", "0 to 20"),
        ({"top_logprobs": -1}, "top_logprobs", "0 to 20"),
        ({"include": "all"}, "include", "Expected"),
        ({"previous_response_id": "resp_x"}, "previous_response_id", "there is no response"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "use user"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input[0].content[0]", "input_image"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
         "input[0].content[0]", "input_file"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
         "input[0].content[0].text", "not a string"),
        ({"input": [{"role": "user"}]}, "input[0].content", "neither"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]},
         "input[0].arguments", "missing"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id",
         "missing"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]},
         "input[0].call_id", "no call before"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": [IMAGE]}]},
         "input[0].output[0]", "input_image"),
        ({"input": [{"type": "reasoning", "content": "x"}]}, "input[0].content", "not a list"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'web_search' is not supported"),
        ({"tools": [{"type": "mcp", "server_url": "http://127.0.0.1"}]}, "tools[0].type", "mcp"),
        ({"tools": [{"name": "f"}]}, "tools[0].type", "missing"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "missing"),
        ({"tools": [{**CALCULATOR, "parameters": 5}]}, "tools[0].parameters", "not an object"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice", "neither"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice.name", "not among"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "neither"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema",
         "missing"),
        ({"text": {"format": {"type": "json_schema", "schema": {"not": {}}}}},
         "text.format.schema", "not"),
        ({"reasoning": {"effort": "heroic"}}, "reasoning.effort", "use none"),
        ({"reasoning": {"effort": 5}}, "reasoning.effort", "not a string"),
        ({"max_output_tokens": 0}, "max_output_tokens", "1 or more"),
        ({"temperature": -1}, "temperature", "from 0"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"background": True}, "background", "not supported"),
        ({"conversation": "conv_1"}, "conversation", "not supported"),
        ({"prompt": {"id": "p"}}, "prompt", "not supported"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_fields_are_named(scripted, fields, param, text, stream):
    response = scripted.post("/v1/responses", {"input": "hi", "stream": stream, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] is not None and error["param"].startswith(param), error
    assert text in error["message"] and error["message"].startswith(param), error
    assert error["type"] == "invalid_request_error" and error["code"]


@pytest.mark.parametrize("every", SOME_OR_ALL)
def test_requests_that_are_wrong_somewhere(scripted, every):
    body = {
        "max_output_tokens": 1, "instructions": "a", "tools": [CALCULATOR], "metadata": {"a": "b"},
        "tool_choice": {"type": "function", "name": "calculator"}, "reasoning": {"effort": "low"},
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "a"}]},
            {"type": "function_call", "call_id": "c", "name": "calculator", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "1"},
        ],
    }  # fmt: skip
    check_mutations(scripted, "/v1/responses", body, every)
