"""Real clients, unchanged: `openai` on /v1/responses and `anthropic` on /v1/messages.

Chat completions with `openai` are in test_openai_client.py; clients that are too large for the test
environment in tools/check_clients.py.
"""

from __future__ import annotations

import asyncio
import json

import pytest

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")
pydantic = pytest.importorskip("pydantic")  # both need it

from tests.server.live import until  # noqa: E402
from tests.server.test_anthropic import CALCULATOR as MESSAGES_CALCULATOR  # noqa: E402
from tests.server.test_responses import CALCULATOR as RESPONSES_CALCULATOR  # noqa: E402

QUESTION = "What is 318 * 27?"
SUM = "What is 17 + 25?"


class Answer(pydantic.BaseModel):
    n: int
    certain: bool


def openai_client(live, **kw):
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, **kw)


def anthropic_client(live, **kw):
    fields = {"api_key": "none", "max_retries": 0, **kw}
    return anthropic.Anthropic(base_url=live.url, **fields)


def multiplied(expression: str) -> str:
    left, right = expression.split("*")
    return str(int(left) * int(right))


def test_responses(nano):
    with openai_client(nano) as client:
        response = client.responses.create(model="nano", input=SUM)
        assert response.output_text == "17 + 25 = 42." and response.status == "completed"
        assert [item.type for item in response.output] == ["reasoning", "message"]
        assert response.usage.output_tokens_details.reasoning_tokens > 0
        again = client.responses.retrieve(response.id)
        assert again.output_text == response.output_text
        client.responses.delete(response.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response.id)


def test_responses_streamed(nano):
    with (
        openai_client(nano) as client,
        client.responses.stream(
            model="nano", input=QUESTION, tools=[RESPONSES_CALCULATOR]
        ) as stream,
    ):
        events = list(stream)
        final = stream.get_final_response()
    types = [event.type for event in events]
    assert types[0] == "response.created" and types[-1] == "response.completed"
    assert "response.reasoning_text.delta" in types
    made = final.output[-1]
    assert made.type == "function_call" and json.loads(made.arguments)["expression"] == "318*27"


@pytest.mark.parametrize("stored", [False, True])
def test_a_tool_loop_over_responses(nano, stored):
    with openai_client(nano) as client:
        items, fields = [{"role": "user", "content": QUESTION}], {}
        for _ in range(3):
            response = client.responses.create(
                model="nano", input=items, tools=[RESPONSES_CALCULATOR], store=stored, **fields
            )
            if stored:
                items, fields = [], {"previous_response_id": response.id}
            else:
                items += response.output
            calls = [item for item in response.output if item.type == "function_call"]
            if not calls:
                break
            for call in calls:
                output = multiplied(json.loads(call.arguments)["expression"])
                items.append(
                    {"type": "function_call_output", "call_id": call.call_id, "output": output}
                )
        assert "8586" in response.output_text
        assert response.usage.input_tokens_details.cached_tokens > 100


def test_responses_parsed(nano):
    with openai_client(nano) as client:
        response = client.responses.parse(
            model="nano", input="Hello", text_format=Answer, reasoning={"effort": "none"},
            max_output_tokens=200,
        )  # fmt: skip
    assert isinstance(response.output_parsed, Answer)


def test_responses_errors(nano):
    with openai_client(nano) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(model="nano", input="x", tools=[{"type": "web_search"}])
        assert caught.value.param == "tools[0].type"
        with pytest.raises(openai.BadRequestError, match="there is no response"):
            client.responses.create(model="nano", input="x", previous_response_id="resp_1")


def test_a_message(nano):
    with anthropic_client(nano) as client:
        message = client.messages.create(
            model="nano", max_tokens=100, messages=[{"role": "user", "content": SUM}]
        )
        assert message.content[0].text.endswith("= 42.") and message.stop_reason == "end_turn"
        counted = client.messages.count_tokens(
            model="nano", messages=[{"role": "user", "content": SUM}]
        )
        usage = message.usage
        assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_a_message_streamed(nano):
    thinking = {"type": "enabled", "budget_tokens": 1024}
    with (
        anthropic_client(nano) as client,
        client.messages.stream(
            model="nano", max_tokens=2000, messages=[{"role": "user", "content": QUESTION}],
            tools=[MESSAGES_CALCULATOR], thinking=thinking,
        ) as stream,
    ):  # fmt: skip
        types = [event.type for event in stream]
        final = stream.get_final_message()
    assert {"thinking", "signature", "input_json", "message_stop"} <= set(types)
    assert [block.type for block in final.content] == ["thinking", "tool_use"]
    assert final.content[1].input == {"expression": "318*27"}
    assert final.stop_reason == "tool_use" and final.usage.output_tokens > 10


def test_a_tool_loop_over_messages(nano):
    messages = [{"role": "user", "content": QUESTION}]
    with anthropic_client(nano) as client:
        for _ in range(3):
            message = client.messages.create(
                model="nano", max_tokens=2000, messages=messages, tools=[MESSAGES_CALCULATOR],
                thinking={"type": "adaptive"}, system="You are Kimi.",
            )  # fmt: skip
            messages.append({"role": "assistant", "content": message.content})
            if message.stop_reason != "tool_use":
                break
            results = [
                {"type": "tool_result", "tool_use_id": block.id,
                 "content": multiplied(block.input["expression"])}
                for block in message.content if block.type == "tool_use"
            ]  # fmt: skip
            messages.append({"role": "user", "content": results})
    assert "8586" in message.content[-1].text
    assert message.usage.cache_read_input_tokens > 50


def test_the_tool_runner(nano):
    @anthropic.beta_tool
    def calculator(expression: str) -> str:
        """Evaluate an arithmetic expression."""
        return multiplied(expression)

    with anthropic_client(nano) as client:
        runner = client.beta.messages.tool_runner(
            model="nano", max_tokens=1000, tools=[calculator],
            messages=[{"role": "user", "content": QUESTION}],
        )  # fmt: skip
        final = runner.until_done()
    assert "8586" in final.content[-1].text


def test_messages_side_by_side(nano):
    async def ask(client, n):
        async with client.messages.stream(
            model="nano", max_tokens=100,
            messages=[{"role": "user", "content": f"What is {n} + 1?"}],
        ) as stream:  # fmt: skip
            return "".join([text async for text in stream.text_stream])

    async def all_of_them():
        fields = {"base_url": nano.url, "api_key": "none", "max_retries": 0}
        async with anthropic.AsyncAnthropic(**fields) as client:
            return await asyncio.gather(*(ask(client, n) for n in range(10, 18)))

    answers = asyncio.run(all_of_them())
    assert [answer.split("= ")[1] for answer in answers] == [f"{n + 1}." for n in range(10, 18)]


def test_messages_errors(nano, serve):
    hi = [{"role": "user", "content": "hi"}]
    image = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1:9/x.png"}}
    with anthropic_client(nano) as client:
        with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].content\[0\]"):
            client.messages.create(
                model="m", max_tokens=10, messages=[{"role": "user", "content": [image]}]
            )
        with pytest.raises(anthropic.NotFoundError):
            client.models.retrieve("claude")
    guarded = serve(settings={"api_key": "secret"})
    with (
        anthropic_client(guarded) as client,
        pytest.raises(anthropic.AuthenticationError, match="the API key is wrong"),
    ):
        client.messages.create(model="m", max_tokens=10, messages=hi)
    with anthropic_client(guarded, api_key="secret") as client:
        assert client.messages.create(model="m", max_tokens=99, messages=hi).content
    with anthropic_client(guarded, api_key=None, auth_token="secret") as client:
        assert client.messages.create(model="m", max_tokens=99, messages=hi).content
        guarded.worker.model.engine.broken = RuntimeError("crash")
        with (
            pytest.raises(anthropic.APIStatusError, match="internal error"),
            client.messages.stream(model="m", max_tokens=99, messages=hi) as stream,
        ):
            stream.until_done()


def test_streams_that_are_closed_early(serve):
    live = serve(lambda _: "<think></think>" + "word " * 500, step_s=0.003)
    hi = [{"role": "user", "content": "hi"}]
    with anthropic_client(live) as client:
        stream = client.messages.create(model="m", max_tokens=5000, messages=hi, stream=True)
        for _, _ in zip(range(5), stream, strict=False):
            pass
        stream.close()
    with openai_client(live) as client:
        stream = client.responses.create(model="m", input="hi", stream=True)
        for _, _ in zip(range(5), stream, strict=False):
            pass
        stream.close()
    until(lambda: live.worker._scheduler.active == 0)
    assert live.worker.model.engine.computed < 2500
