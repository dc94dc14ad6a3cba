"""`kimi-cpu chat` makes replies as the server does: same constraint, same tokens."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest

from kimi_cpu.chat.tools import CALCULATOR
from kimi_cpu.cli import common
from kimi_cpu.sampling import SamplingParams
from kimi_cpu.server.prompts import chat_prompt
from kimi_cpu.server.replay import Replies
from tests.cli import fake

# Blanks and an order of keys that no serialiser has, and a key that is not declared.
ARGUMENTS = '{ "expression" :"1+1","digits": 3}'


@pytest.fixture
def model(tmp_path):
    folder = fake.write_folder(tmp_path)
    shutil.copy(common.embedded_model() / "chat_template.jinja", folder)
    loaded = fake.load_model(folder, 1, "fast")
    loaded.session.script = lambda prompt: "<think>Hm.</think>" + fake.call("calculator", ARGUMENTS)
    return loaded


def tool(closed):
    parameters = {**CALCULATOR["function"]["parameters"], "additionalProperties": not closed}
    return {"type": "function", "function": {**CALCULATOR["function"], "parameters": parameters}}


def reply(model, messages, tools):
    *_, result = common.reply_events(model, messages, tools, SamplingParams(temperature=0))
    return result


def test_calls_follow_their_schemas(model, monkeypatch):
    pytest.importorskip("llguidance")
    messages = [{"role": "user", "content": "1+1?"}]

    def said(closed):
        result = reply(model, messages, [tool(closed)])
        return [call["function"]["arguments"] for call in result.message.get("tool_calls", [])]

    assert said(closed=False) == [ARGUMENTS]
    assert ARGUMENTS not in said(closed=True), "digits is not declared"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert said(closed=True) == [ARGUMENTS], "without the extra the model is trusted"


def test_what_was_sampled_is_not_encoded_again(model):
    messages = [{"role": "user", "content": "1+1?"}]
    tools = [tool(closed=False)]
    first = reply(model, messages, tools)
    before = list(model.session.ids)
    (call,) = json.loads(json.dumps(first.message["tool_calls"]))
    call["function"]["arguments"] = json.dumps(json.loads(ARGUMENTS), sort_keys=True)
    messages += [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "2"},
    ]
    prompt = model.prompt(messages, tools)
    assert prompt.ids[: len(before)] == before
    assert prompt.conversation.next_call_index == 1
    # The server has the same prompt of it, if it has made the reply.
    assert chat_prompt(model.served, model.replies, messages, tools, check=False).ids == prompt.ids
    fresh = chat_prompt(model.served, Replies(model.tokenizer), messages, tools, check=False).ids
    assert fresh[: len(before)] != before
