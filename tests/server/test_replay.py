"""The model's own tokens are found again, whatever clients make of its messages."""

from __future__ import annotations

import copy
import json

import pytest

from tests.cli.fake import spelt

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("Glob", "Read")
]
SECTION = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.Glob:{n}<|tool_call_argument_begin|>"
    '{{"pattern": "*.py", "deep":true}}<|tool_call_end|><|tool_calls_section_end|>'
)


def script(prompt):
    """A call, then a call, then an answer; spaced as no serialiser does."""
    n = prompt.count("## Return of")
    if n < 2:
        return f"<think> Step {n}.\n</think>\n" + SECTION.format(n=n)
    return "<think>Done. </think> It is done. "


class Agent:
    """A client with habits of its own."""

    def __init__(self, live, habit):
        self.live, self.habit = live, habit
        self.messages = [{"role": "user", "content": "Find it."}]

    def turn(self):
        """One request; returns its usage and how it ended."""
        body = self.live.chat(messages=self.messages, tools=TOOLS)
        choice = body["choices"][0]
        message = self.habit(copy.deepcopy(choice["message"]))
        self.messages.append(message)
        for call in message.get("tool_calls") or []:
            self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": "found"})
        return body["usage"], choice["finish_reason"]


def same(message):
    return message


def rewritten_ids(message):
    for call in message.get("tool_calls", []):
        call["id"] = call["id"].replace(".", "_").replace(":", "_")
    return message


def own_ids(message):
    for n, call in enumerate(message.get("tool_calls", [])):
        call["id"] = f"call_{n}"
    return message


def spaced_anew(message):
    for call in message.get("tool_calls", []):
        call["function"]["arguments"] = json.dumps(
            json.loads(call["function"]["arguments"]), indent=2, sort_keys=True
        )
    return message


def objects(message):
    for call in message.get("tool_calls", []):
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return message


def no_reasoning(message):
    message.pop("reasoning_content", None)
    return message


def stripped(message):
    for name in ("content", "reasoning_content"):
        if message.get(name):
            message[name] = message[name].strip()
    return message


def empty_content(message):
    message["content"] = message["content"] or ""
    return message


def parts(message):
    if message["content"]:
        message["content"] = [{"type": "text", "text": message["content"]}]
    return message


def all_at_once(message):
    for habit in (own_ids, spaced_anew, no_reasoning, stripped):
        message = habit(message)
    return message


HABITS = [same, rewritten_ids, own_ids, spaced_anew, objects, no_reasoning, stripped,
          empty_content, parts, all_at_once]  # fmt: skip


@pytest.mark.parametrize("habit", HABITS)
def test_no_token_is_computed_twice(serve, habit):
    live = serve(script)
    engine = live.worker.model.engine
    agent = Agent(live, habit)
    usages = []
    for expected in ("tool_calls", "tool_calls", "stop"):
        before = engine.computed
        usage, reason = agent.turn()
        assert reason == expected
        if usages:
            last = usages[-1]
            # All of the last prompt and reply, but for the token that was not stepped.
            kept = last["prompt_tokens"] + last["completion_tokens"] - 1
            assert usage["prompt_tokens_details"]["cached_tokens"] >= kept
            new = usage["prompt_tokens"] - kept + usage["completion_tokens"]
            assert engine.computed - before <= new
        usages.append(usage)
    # The template leaves reasoning out of what lies behind an answer: up to there it is kept.
    agent.messages.append({"role": "user", "content": "And now?"})
    usage, _ = agent.turn()
    first = spelt(live.worker.model.tokenizer, "<|im_user|>user<|im_middle|>Find it.<|im_end|>")
    assert usage["prompt_tokens_details"]["cached_tokens"] > len(first)


def test_another_message_is_not_mistaken(serve):
    live = serve(script)
    for change in (
        {"content": "I looked."},
        {"reasoning_content": "Something else."},
        {"tool_calls": None, "content": "Nothing."},
    ):
        agent = Agent(live, lambda message, change=change: {**message, **change})
        agent.turn()
        shown = live.post("/detokenize", {"tokens": prompt_of(live, agent.messages)}).json()
        for text in change.values():
            if text is not None:
                assert text in shown["prompt"]


def prompt_of(live, messages):
    """The ids that the server makes of a conversation."""
    from kimi_cpu.server.prompts import chat_prompt

    service = live.app.state.service
    return chat_prompt(service.model, service.replies, messages, TOOLS).ids


def test_the_ids_are_those_that_were_sampled(nano):
    """The nano model at a high temperature picks tokens that encoding its text would not."""
    tokenizer = nano.worker.model.tokenizer
    differed = 0
    for seed in range(12):
        messages = [{"role": "user", "content": "Tell me about words."}]
        body = nano.chat(messages=messages, seed=seed, temperature=3.0, max_tokens=60,
                         reasoning_effort="none")  # fmt: skip
        message = body["choices"][0]["message"]
        messages += [message, {"role": "user", "content": "More."}]
        again = nano.chat(messages=messages, max_tokens=1, reasoning_effort="none")
        kept = body["usage"]["total_tokens"] - 1
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= kept
        differed += (
            len(tokenizer.encode_text(message["content"] or ""))
            != (body["usage"]["completion_tokens"])
        )
    assert differed, "the test shows nothing"


def test_other_conversations_have_their_own_replies(serve):
    """The same words after another question are not the same reply."""
    live = serve(lambda prompt: "<think>A</think>yes" if "one" in prompt else "<think>B</think>yes")
    for question, thought in (("one", "A"), ("two", "B")):
        messages = [{"role": "user", "content": question}]
        assert live.chat(messages=messages)["choices"][0]["message"]["reasoning_content"] == thought
    service = live.app.state.service
    from kimi_cpu.chat.messages import normalise

    for question, thought in (("one", "A"), ("two", "B"), ("three", None)):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]
        recalled = service.replies.recall(normalise(messages))
        assert recalled.conversation.messages[1].get("reasoning_content") == thought


def test_memory_is_bounded(serve, monkeypatch):
    from kimi_cpu.server import replay

    live = serve(lambda prompt: "<think></think>" + "x" * 50)
    monkeypatch.setattr(replay, "MAX_TOKENS", 500)
    for n in range(30):
        live.chat(f"question {n}")
    replies = live.app.state.service.replies
    assert replies._n_tokens <= 500 and 0 < len(replies._replies) <= 10
    assert replies._n_tokens == sum(len(r.turn) for r in replies._replies.values())
