"""Agents over HTTP: a long tool loop, and calls that always follow their schemas."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

pytest.importorskip("starlette")
openai = pytest.importorskip("openai")

from kimi_cpu.chat.template import ChatTemplate  # noqa: E402
from kimi_cpu.sampling import SamplingParams  # noqa: E402
from kimi_cpu.server.settings import ServedModel  # noqa: E402
from kimi_cpu.tokenizer import Tokenizer  # noqa: E402
from tests.server.scripted import ScriptedEngine  # noqa: E402
from tests.text.conftest import SHARED, kimi_folder  # noqa: E402, F401 (a fixture)
from tests.text.grammars import RandomModel, requests  # noqa: E402


def function(name: str, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }
    declared = {"name": name, "description": f"Use {name}.", "parameters": parameters}
    return {"type": "function", "function": declared}


TEXT = {"type": "string"}
TOOLS = [
    function("Glob", {"pattern": TEXT, "deep": {"type": "boolean"}}, ["pattern"]),
    function("ReadFile", {"path": TEXT, "lines": {"type": "integer", "minimum": 1}}, ["path"]),
    function("edit-file", {"path": TEXT, "old": TEXT, "new": TEXT}, ["path", "old", "new"]),
]
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}


def calls_of(step: int) -> list[tuple[str, str]]:
    """What the model calls in this step: names, and arguments spaced as no serialiser does."""
    glob = ("Glob", f'{{ "pattern":"src/**/{step}-é*.py" ,"deep":true}}')
    read = ("ReadFile", f'{{"path": "src/a {step}.py", "lines":{step + 1} }}')
    edit = ("edit-file", f'{{"path":"b","old":"x = \\"{step}\\"\\n", "new" : "é{step}"}}')
    return [[glob], [read], [edit], [read, glob]][step % 4]


def first_call(step: int) -> int:
    """The number of its first call: every fourth step makes two."""
    return step + step // 4


def script(steps: int):
    """A model that works for so many steps, then answers."""

    def say(prompt: str) -> str:
        n_calls = prompt.count("## Return of")
        step = next(s for s in range(n_calls + 1) if first_call(s) >= n_calls)
        if step >= steps:
            return "<think>All of it is done.</think> It took a while. "
        made = "".join(
            f"<|tool_call_begin|>functions.{name}:{first_call(step) + n}"
            f"<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"
            for n, (name, arguments) in enumerate(calls_of(step))
        )
        section = f"<|tool_calls_section_begin|>{made}<|tool_calls_section_end|>"
        return f"<think> Step {step}:\nI go on.</think>" + ("Next. " if step % 3 else "") + section

    return say


def habit(message: dict[str, Any], step: int) -> dict[str, Any]:
    """What clients do to a message before they send it back."""
    if step % 5 == 1:
        message.pop("reasoning_content", None)
    for n, call in enumerate(message["tool_calls"]):
        if step % 3 == 1:
            call["id"] = call["id"].replace(".", "_").replace(":", "_")
        elif step % 3 == 2:
            call["id"] = f"call_{step}_{n}"
        if step % 2:
            value = json.loads(call["function"]["arguments"])
            call["function"]["arguments"] = json.dumps(value, separators=(",", ":"))
    return message


def resident_mb() -> float:
    """Of this process, server and client together; 0 where nobody tells."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def run(live, steps: int) -> None:
    engine = live.worker.model.engine
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "You are an agent."},
        {"role": "user", "content": "Tidy up the project."},
    ]
    seconds: list[float] = []
    memory: list[float] = []
    lengths: list[int] = []
    known = 0  # tokens of the conversation that the server has computed
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        for step in range(steps + 1):
            computed = engine.computed
            begun = time.perf_counter()
            if step % 2:
                with client.chat.completions.stream(
                    model="m", messages=messages, tools=TOOLS,
                    stream_options={"include_usage": True},
                ) as stream:  # fmt: skip
                    answer = stream.get_final_completion()
            else:
                answer = client.chat.completions.create(model="m", messages=messages, tools=TOOLS)
            seconds.append(time.perf_counter() - begun)
            memory.append(resident_mb())
            usage, choice = answer.usage, answer.choices[0]
            cached = usage.prompt_tokens_details.cached_tokens
            assert cached >= known - 1, f"step {step} computes {known - cached} tokens again"
            assert engine.computed - computed <= usage.total_tokens - known + 1
            known = usage.prompt_tokens + usage.completion_tokens
            lengths.append(known)
            message = choice.message.model_dump(exclude_none=True)
            if step == steps:
                break
            assert choice.finish_reason == "tool_calls"
            expected = calls_of(step)
            assert len(message["tool_calls"]) == len(expected)
            for n, (call, (name, arguments)) in enumerate(
                zip(message["tool_calls"], expected, strict=True)
            ):
                assert call["id"] == f"functions.{name}:{first_call(step) + n}"
                assert call["function"]["name"] == name
                value = json.loads(call["function"]["arguments"])
                assert value == json.loads(arguments)
                jsonschema.Draft202012Validator(SCHEMAS[name]).validate(value)
            message = habit(message, step)
            messages.append(message)
            for n, call in enumerate(message["tool_calls"]):
                result = f"{step}.{n}: " + "found something; " * (step % 4)
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    assert choice.finish_reason == "stop" and choice.message.content.strip() == "It took a while."
    assert lengths[-1] > 100 * steps
    if steps < 100:
        return
    third = steps // 3
    # The quickest tenth: other work on the machine does not count.
    early, late = np.percentile(seconds[5:third], 10), np.percentile(seconds[-third:], 10)
    longer = np.mean(lengths[-third:]) / np.mean(lengths[5:third])
    print(f"{early * 1e3:.0f} -> {late * 1e3:.0f} ms a step, {lengths[-1]:,} tokens, "
          f"{memory[third]:.0f} -> {memory[-1]:.0f} MB")  # fmt: skip
    assert late < early * longer * 1.5, "a step may take as much longer as the conversation is"
    assert memory[-1] - memory[third] < 40, "memory is flat"
    assert live.worker._scheduler.active == 0
    assert live.worker._scheduler.cache_bytes <= live.worker.model.session_bytes


def test_an_agent_of_20_steps(serve):
    run(serve(script(20)), 20)


@pytest.mark.slow
def test_an_agent_of_300_steps(serve):
    before = threading.active_count()
    live = serve(script(300), context=400_000)
    run(live, 300)
    assert threading.active_count() <= before + 8


class RandomEngine(ScriptedEngine):
    """A model that says anything; what it is depends on the number of tokens alone."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, lambda _: "")
        self.model = RandomModel(tokenizer, 0, eager=8)

    def logits(self, ids: list[int]) -> np.ndarray:
        self.model._rng = np.random.default_rng(len(ids))
        return self.model()


@pytest.fixture
def random_model(kimi_folder, request) -> ServedModel:  # noqa: F811
    """Kimi's vocabulary and template, and a model that has learnt nothing."""
    shutil.copy(SHARED / "chat_template.jinja", kimi_folder)
    tokenizer = Tokenizer.load(kimi_folder)
    template = ChatTemplate.load(kimi_folder)
    engine = RandomEngine(tokenizer)
    return ServedModel("random", engine, tokenizer, template, SamplingParams())  # type: ignore[arg-type]


def check_cases(live, cases: list[dict[str, Any]], max_tokens: int) -> None:
    """Calls forced in each case, in turn over the three APIs: the complete ones are valid."""
    complete = 0
    for n, case in enumerate(cases):
        tools = [tool["function"] for tool in case["tools"]]
        schemas = {tool["name"]: tool["parameters"] for tool in tools}
        names = list(schemas)
        named = names[n % len(names)]
        common = {"max_tokens": max_tokens, "seed": n, "thinking": {"type": "disabled"}}
        choice = "required" if n % 2 else {"type": "function", "function": {"name": named}}
        body = {**case, **common, "tool_choice": choice, "stream": False}
        answer = live.post("/v1/chat/completions", body)
        assert answer.status_code == 200, answer.text
        reply = answer.json()["choices"][0]
        calls = reply["message"].get("tool_calls", [])
        assert reply["finish_reason"] in ("tool_calls", "length")
        for call in calls:
            complete += 1
            name = call["function"]["name"]
            assert name in ([named] if isinstance(choice, dict) else names)
            value = json.loads(call["function"]["arguments"])
            jsonschema.Draft202012Validator(schemas[name]).validate(value)
        if len(tools) == len({tool["name"] for tool in tools}):
            complete += _check_messages(live, n, tools, schemas, max_tokens)
    assert complete > len(cases) / 2


def _check_messages(live, n, tools, schemas, max_tokens) -> int:
    """The same tools over Anthropic's API."""
    declared = [{"name": tool["name"], "input_schema": tool["parameters"]} for tool in tools]
    body = {
        "max_tokens": max_tokens, "tools": declared, "tool_choice": {"type": "any"},
        "messages": [{"role": "user", "content": f"Case {n}."}],
    }  # fmt: skip
    answer = live.post("/v1/messages", body)
    assert answer.status_code == 200, answer.text
    made = [block for block in answer.json()["content"] if block["type"] == "tool_use"]
    for block in made:
        jsonschema.Draft202012Validator(schemas[block["name"]]).validate(block["input"])
    return len(made)


@pytest.mark.skipif(not requests(), reason="the tool-call cases are not at hand")
@pytest.mark.parametrize(
    "every", [pytest.param(16, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]
)
def test_tool_call_cases(random_model, every):
    from tests.server.live import Live

    live = Live(lambda phase: random_model).ready()
    live.client.timeout = 600
    try:
        check_cases(live, requests()[::every], 120)
    finally:
        live.stop()
