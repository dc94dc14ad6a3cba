"""OpenAI's own client, unchanged, against the server."""

from __future__ import annotations

import asyncio
import json

import pytest

openai = pytest.importorskip("openai")

from kimi_cpu.chat.tools import CALCULATOR  # noqa: E402
from tests.server.live import Live, until  # noqa: E402

QUESTION = [{"role": "user", "content": "What is 318 * 27?"}]


def client_of(live: Live, **kw):
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, **kw)


def test_an_answer(nano):
    with client_of(nano) as client:
        answer = client.chat.completions.create(
            model="nano", messages=[{"role": "user", "content": "What is 17 + 25?"}]
        )
        assert answer.choices[0].message.content == "17 + 25 = 42."
        assert answer.choices[0].message.reasoning_content.startswith("17+25")
        assert answer.usage.prompt_tokens_details.cached_tokens >= 0
        assert client.models.list().data[0].id == "nano"
        assert client.models.retrieve("nano").owned_by == "kimi-cpu"


def test_a_stream_with_its_helper(nano):
    with (
        client_of(nano) as client,
        client.chat.completions.stream(
            model="nano", messages=[{"role": "user", "content": "What is 17 + 25?"}],
            stream_options={"include_usage": True},
        ) as stream,
    ):  # fmt: skip
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == "17 + 25 = 42."
    assert final.usage.completion_tokens > 10 and final.choices[0].finish_reason == "stop"


def test_a_tool_loop(nano):
    with client_of(nano) as client:
        messages = list(QUESTION)
        for _ in range(3):
            answer = client.chat.completions.create(
                model="nano", messages=messages, tools=[CALCULATOR]
            )
            message = answer.choices[0].message
            messages.append(message)
            if answer.choices[0].finish_reason != "tool_calls":
                break
            for call in message.tool_calls:
                expression = json.loads(call.function.arguments)["expression"]
                left, right = expression.split("*")
                messages.append(
                    {
                        "role": "tool",
                        "tool_call_id": call.id,
                        "content": str(int(left) * int(right)),
                    }
                )
        assert "8586" in message.content and len(messages) == 4


def test_streamed_tool_calls(nano):
    with (
        client_of(nano) as client,
        client.chat.completions.stream(
            model="nano", messages=QUESTION, tools=[CALCULATOR]
        ) as stream,
    ):
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion()
    assert [json.loads(event.arguments) for event in done] == [{"expression": "318*27"}]
    (call,) = final.choices[0].message.tool_calls
    assert call.id == "functions.calculator:0" and call.function.name == "calculator"


def test_structured_output(nano):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "n": {"type": "integer"}},
        "required": ["name", "n"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    with client_of(nano) as client:
        for seed in range(5):
            answer = client.chat.completions.create(
                model="nano", messages=[{"role": "user", "content": "Hello"}], seed=seed,
                temperature=1.5, response_format=form, reasoning_effort="none", max_tokens=200,
            )  # fmt: skip
            value = json.loads(answer.choices[0].message.content)
            assert set(value) == {"name", "n"} and isinstance(value["n"], int)


def test_required_and_named_tools(nano):
    text = {"type": "object", "properties": {"text": {"type": "string", "maxLength": 20}},
            "required": ["text"]}  # fmt: skip
    tools = [
        {"type": "function", "function": {"name": name, "parameters": text}}
        for name in ("note", "say")
    ]
    named = {"type": "function", "function": {"name": "note"}}
    with client_of(nano) as client:
        for choice, names in (("required", {"note", "say"}), (named, {"note"})):
            answer = client.chat.completions.create(
                model="nano", messages=[{"role": "user", "content": "Hello"}],
                tools=tools, tool_choice=choice, reasoning_effort="none", max_tokens=400,
            )  # fmt: skip
            assert answer.choices[0].finish_reason == "tool_calls"
            for call in answer.choices[0].message.tool_calls:
                assert call.function.name in names and json.loads(call.function.arguments)


def test_async_streams_side_by_side(nano):
    async def ask(client, n):
        stream = await client.chat.completions.create(
            model="nano", messages=[{"role": "user", "content": f"What is {n} + 1?"}], stream=True
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{nano.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, n) for n in range(10, 20)))

    answers = asyncio.run(all_of_them())
    assert [answer.split("= ")[1] for answer in answers] == [f"{n + 1}." for n in range(10, 20)]


def test_completions(nano):
    with client_of(nano) as client:
        answer = client.completions.create(
            model="nano", prompt="Hello", max_tokens=3, echo=True, logprobs=2
        )
        assert answer.choices[0].text.startswith("Hello")
        assert answer.choices[0].logprobs.token_logprobs[0] is None
        stream = client.completions.create(model="nano", prompt="Hello", max_tokens=3, stream=True)
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] in ("stop", "length")


def test_logprobs(nano):
    with client_of(nano) as client:
        answer = client.chat.completions.create(
            model="nano", messages=[{"role": "user", "content": "What is 17 + 25?"}],
            logprobs=True, top_logprobs=2,
        )  # fmt: skip
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == answer.choices[0].message.content


def test_errors_are_the_clients_own(nano, serve):
    with client_of(nano) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="nano", messages=QUESTION, temperature=-1)
        assert caught.value.param == "temperature"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-4")
    guarded = serve(settings={"api_key": "secret"})
    with client_of(guarded) as client, pytest.raises(openai.AuthenticationError):
        client.chat.completions.create(model="x", messages=QUESTION)
    guarded.worker.model.engine.broken = RuntimeError("crash")
    with (
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="secret", max_retries=0) as client,
        pytest.raises(openai.APIError, match="internal error"),
    ):
        list(client.chat.completions.create(model="x", messages=QUESTION, stream=True))


def test_a_stream_that_is_closed_early(serve):
    live = serve(lambda _: "<think></think>" + "word " * 500, step_s=0.003)
    with client_of(live) as client:
        stream = client.chat.completions.create(model="x", messages=QUESTION, stream=True)
        for _, _ in zip(range(5), stream, strict=False):
            pass
        stream.close()
    until(lambda: live.worker._scheduler.active == 0)
    assert live.worker.model.engine.computed < 1500
