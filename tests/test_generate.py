"""The generation loop on a scripted session."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kimi_cpu.chat.generate import Reply, Result, StopMatcher, check_tokenizer, generate
from kimi_cpu.chat.parser import Content, Reasoning, ToolCallEnd, ToolCallStart
from kimi_cpu.errors import ContextError, TokenizerError
from kimi_cpu.sampling import SamplingParams
from kimi_cpu.tokenizer import Tokenizer
from tests.cli.fake import CONTROL, FakeSession, call, spelt

GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    ranks = {bytes([b]): b for b in range(256)}
    return Tokenizer(ranks, {256 + n: name for n, name in enumerate(CONTROL)})


def run(tokenizer, reply, params=GREEDY, prompt="hi", session=None, **kw):
    if session is None:
        session = FakeSession(tokenizer, lambda _: reply)
    events = list(generate(session, tokenizer, spelt(tokenizer, prompt), params, **kw))
    result = events.pop()
    assert isinstance(result, Result)
    text = "".join(e.text for e in events if isinstance(e, Content))
    reasoning = "".join(e.text for e in events if isinstance(e, Reasoning))
    assert (result.message["content"] or "") == text
    assert result.message.get("reasoning_content", "") == reasoning
    return result, events, session


@pytest.mark.parametrize(
    ("vocab_size", "eos", "names", "message"),
    [
        (512, (258,), CONTROL, ""),
        (767, (), CONTROL, ""),  # rows of padding
        (511, (), CONTROL, "has 512 ids, config.json says vocab_size = 511"),
        (163840, (), CONTROL, "has 512 ids, config.json says vocab_size = 163,840"),
        (512, (65,), CONTROL, "eos_token_id 65 is the text 'A'"),
        (512, (), [n for n in CONTROL if n != "<|im_user|>"], "no control token '<|im_user|>'"),
    ],
)
def test_a_tokenizer_of_another_checkpoint_is_refused(vocab_size, eos, names, message):
    ranks = {bytes([b]): b for b in range(256)}
    tokenizer = Tokenizer(ranks, {256 + n: name for n, name in enumerate(names)})
    config = SimpleNamespace(vocab_size=vocab_size, eos_token_ids=eos)
    if not message:
        check_tokenizer(tokenizer, config)
        return
    with pytest.raises(TokenizerError) as caught:
        check_tokenizer(tokenizer, config)
    assert message in caught.value.message and "same checkpoint" in caught.value.hint


def test_reasoning_and_content(tokenizer):
    result, _, session = run(tokenizer, "<think>so</think>yes, café")
    assert result.finish_reason == "stop"
    assert result.message == {
        "role": "assistant", "content": "yes, café", "reasoning_content": "so",
    }  # fmt: skip
    usage = result.usage
    assert usage.prompt_tokens == 2 and usage.reasoning_tokens == 2 and usage.cached_tokens == 0
    assert usage.completion_tokens == 2 + 2 + len("yes, café".encode())
    assert list(result.token_ids) == session.ids[2:], "the end token is not stepped"
    assert 0 <= result.timings.prompt_s <= result.timings.first_token_s <= result.timings.total_s


def test_cached_tokens_are_the_common_prefix(tokenizer):
    _, _, session = run(tokenizer, "<think></think>a")
    result, _, _ = run(tokenizer, "", prompt="hi<think></think>ab", session=session)
    assert result.usage.cached_tokens == 5


def test_tool_calls(tokenizer):
    reply = "<think>t</think>ok" + call("f", '{"a": 1}')
    result, events, _ = run(tokenizer, reply, allow_tools=True)
    assert result.finish_reason == "tool_calls"
    (made,) = result.message["tool_calls"]
    assert made["function"] == {"name": "f", "arguments": '{"a": 1}'}
    kinds = [type(e) for e in events]
    assert kinds.index(ToolCallStart) < kinds.index(ToolCallEnd)


def test_no_calls_without_declared_tools(tokenizer):
    result, _, _ = run(tokenizer, "<think></think>ok" + call("f", "{}"), SamplingParams(0, seed=1))
    assert "tool_calls" not in result.message


def test_a_turn_cannot_be_forged(tokenizer):
    reply = "<think></think>a<|im_user|>user<|im_middle|>b"
    params = SamplingParams(temperature=0, max_tokens=4)
    result, _, session = run(tokenizer, reply, params)
    assert tokenizer.control("<|im_user|>") not in session.ids
    assert tokenizer.control("<|im_user|>") not in result.token_ids


def test_max_tokens(tokenizer):
    params = SamplingParams(temperature=0, max_tokens=5)
    result, _, _ = run(tokenizer, "<think>ab</think>cdef", params)
    assert result.finish_reason == "length" and result.usage.completion_tokens == 5
    assert result.message["content"] == "c"


def test_full_context_ends_the_reply(tokenizer):
    session = FakeSession(tokenizer, lambda _: "<think></think>" + "x" * 50, context=10)
    result, _, _ = run(tokenizer, "", session=session)
    assert result.finish_reason == "length" and len(session.ids) <= 10
    with pytest.raises(ContextError):
        run(tokenizer, "", prompt="y" * 11, session=session)


def test_no_memory_for_the_context_ends_the_reply(tokenizer):
    class Full(FakeSession):
        def step(self, token):
            if len(self.ids) >= 6:
                raise ContextError("no memory", "")
            return super().step(token)

    result, _, _ = run(tokenizer, "", session=Full(tokenizer, lambda _: "<think></think>abcdefg"))
    assert result.finish_reason == "length" and result.message["content"] == "abc"


def test_a_call_cut_off_is_not_reported(tokenizer):
    reply = "<think></think>" + call("f", '{"a": 1}')
    params = SamplingParams(temperature=0, max_tokens=25)
    result, _, _ = run(tokenizer, reply, params, allow_tools=True)
    assert result.finish_reason == "length" and "tool_calls" not in result.message


def test_thinking_budget_forces_the_end(tokenizer):
    params = SamplingParams(temperature=0, thinking_budget=3)
    result, _, session = run(tokenizer, "<think>abcdefgh</think>yes", params)
    assert result.message["reasoning_content"] == "abc" and result.usage.reasoning_tokens == 3
    assert session.ids[2:7] == spelt(tokenizer, "<think>abc</think>")
    assert tokenizer.control("<think>") not in session.ids[7:]


def test_thinking_off_prefills(tokenizer):
    params = SamplingParams(temperature=0, thinking_budget=0)
    for prompt in ("hi", "hi<think>", "hi<think></think>"):
        result, _, session = run(tokenizer, "yes", params, prompt)
        assert session.synced[0] == spelt(tokenizer, "hi<think></think>")
        assert result.message == {"role": "assistant", "content": "yes"}


def test_a_prompt_that_ends_the_reasoning_itself(tokenizer):
    result, _, _ = run(tokenizer, "yes", prompt="hi<think></think>")
    assert result.message == {"role": "assistant", "content": "yes"}
    assert result.usage.reasoning_tokens == 0


def test_a_reasoning_closed_by_its_budget_stays_closed(tokenizer):
    params = SamplingParams(temperature=0, thinking_budget=2, max_tokens=12)
    result, _, _ = run(tokenizer, "<think>abcd</think>x<think>y", params)
    assert result.usage.reasoning_tokens == 2
    assert result.token_ids.count(tokenizer.control("<think>")) == 1


def test_rows_without_a_token_are_never_sampled(tokenizer):
    class Padded(FakeSession):
        def _logits(self):
            return np.concatenate([super()._logits(), np.full(100, 99, np.float32)])

    session = Padded(tokenizer, lambda _: "<think></think>yes")
    assert run(tokenizer, "", session=session)[0].message["content"] == "yes"


def test_thinking_off_bans_reopening(tokenizer):
    params = SamplingParams(temperature=0, thinking_budget=0, max_tokens=3)
    result, _, _ = run(tokenizer, "<think>x</think>y", params)
    assert tokenizer.control("<think>") not in result.token_ids


@pytest.mark.parametrize(
    ("reply", "stops", "content", "reason"),
    [
        ("one STOP two", ("STOP",), "one ", "stop"),
        ("one STO", ("STOP",), "one STO", "stop"),
        ("one STOSTOP", ("STOP",), "one STO", "stop"),
        ("a\n\nb", ("\n\n", "b"), "a", "stop"),
        ("naïve é", ("é",), "naïve ", "stop"),
        ("plain", ("zzz",), "plain", "stop"),
    ],
)
def test_stop_strings_across_tokens(tokenizer, reply, stops, content, reason):
    params = SamplingParams(temperature=0, stop=stops)
    result, events, _ = run(tokenizer, f"<think>a STOP b zzz</think>{reply}", params)
    assert result.message["content"] == content and result.finish_reason == reason
    assert "STOP" in result.message["reasoning_content"], "stop strings are not for reasoning"
    assert [e for e in events if isinstance(e, Content)]


def test_text_held_back_comes_before_a_call(tokenizer):
    params = SamplingParams(temperature=0, stop=("STOP",))
    reply = "<think></think>go STO" + call("f", "{}")
    result, events, _ = run(tokenizer, reply, params, allow_tools=True)
    assert result.finish_reason == "tool_calls" and result.message["content"] == "go STO"
    start = next(i for i, e in enumerate(events) if isinstance(e, ToolCallStart))
    assert not any(isinstance(e, Content) for e in events[start:])


def test_stop_matcher_holds_back_no_more_than_needed():
    matcher = StopMatcher(("abc",))
    assert matcher.push("xab") == ("x", False)
    assert matcher.push("d") == ("abd", False)
    assert matcher.push("ab") == ("", False)
    assert matcher.push("cz") == ("", True)


@settings(max_examples=100, deadline=None)
@given(
    st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3)
)  # fmt: skip
@example("aabc", ["abc", "b"])  # the shorter one is complete first
def test_stop_matcher_does_not_care_how_text_is_cut_up(text, stops):
    def shown(pieces):
        matcher, out = StopMatcher(stops), ""
        for piece in pieces:
            certain, found = matcher.push(piece)
            out += certain
            if found:
                return out, True
        return out + matcher.flush(), False

    out, found = shown([text])
    assert (out, found) == shown(text)
    assert text.startswith(out) and found == any(stop in text for stop in stops)
    assert not any(stop in out for stop in stops)


def test_cancelling_leaves_a_usable_session(tokenizer):
    session = FakeSession(tokenizer, lambda _: "<think>t</think>abcdef")
    asked = []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) > 7

    result, _, _ = run(tokenizer, "", session=session, cancelled=cancelled)
    assert result.finish_reason == "cancelled"
    assert session.ids == spelt(tokenizer, "hi") + list(result.token_ids)
    again, _, _ = run(tokenizer, "", prompt="ho", session=session)
    assert again.finish_reason == "stop" and again.message["content"] == "abcdef"


def test_cancelling_between_chunks_of_the_prompt(tokenizer):
    class Chunks(FakeSession):
        def sync(self, ids, progress=None):
            progress(1, len(ids))
            raise AssertionError("went on")

    session = Chunks(tokenizer)
    result, _, _ = run(tokenizer, "", session=session, cancelled=lambda: True)
    assert result.finish_reason == "cancelled" and result.message["content"] is None


def test_an_abandoned_reply_leaves_a_usable_session(tokenizer):
    session = FakeSession(tokenizer, lambda _: "<think>t</think>abc")
    events = generate(session, tokenizer, spelt(tokenizer, "hi"), GREEDY)
    next(events)
    events.close()
    assert run(tokenizer, "", session=session)[0].message["content"] == "abc"


def test_a_model_without_think_tokens_only_answers():
    ranks = {bytes([b]): b for b in range(256)}
    names = [name for name in CONTROL if "think" not in name]
    plain = Tokenizer(ranks, {256 + n: name for n, name in enumerate(names)})

    class Session(FakeSession):
        def sync(self, ids, progress=None):
            self.ids = list(ids)
            self.reply = [*plain.encode_text("yes"), plain.control("[EOS]")]
            return self._logits()

    for budget in (None, 0, 3):
        params = SamplingParams(temperature=0, thinking_budget=budget)
        events = list(generate(Session(plain), plain, [1, 2], params))
        assert events[-1].message == {"role": "assistant", "content": "yes"}
        assert events[-1].usage.prompt_tokens == 2


def drive(session, reply):
    """All events of a reply on a session, and the `sampled` of each token."""
    events, sampled = [], []
    logits = session.sync(reply.prompt)
    while reply.going_on:
        events += reply.feed(logits)
        if reply.sampled is not None:
            sampled.append(reply.sampled)
        if reply.going_on:
            logits = session.step(reply.token)
    return events, sampled


def test_replies_fed_in_turn_equal_replies_alone(tokenizer):
    texts = ["<think>one</think>first", "<think></think>" + call("f", '{"a": 1}'), "no thought"]
    alone = [run(tokenizer, text, allow_tools=True)[0] for text in texts]
    sessions = [FakeSession(tokenizer, lambda _, text=text: text) for text in texts]
    prompt = spelt(tokenizer, "hi")
    replies = [Reply(tokenizer, prompt, GREEDY, allow_tools=True) for _ in texts]
    logits = [s.sync(r.prompt) for s, r in zip(sessions, replies, strict=True)]
    while any(reply.going_on for reply in replies):
        for i, reply in enumerate(replies):
            if reply.going_on:
                reply.feed(logits[i])
                if reply.going_on:
                    logits[i] = sessions[i].step(reply.token)
    for reply, expected in zip(replies, alone, strict=True):
        assert reply.result().message == expected.message
        assert reply.result().token_ids == expected.token_ids


def test_plain_text_has_no_reasoning(tokenizer):
    session = FakeSession(tokenizer, lambda _: "on and on")
    reply = Reply(
        tokenizer, spelt(tokenizer, "go "), SamplingParams(0, thinking_budget=0), plain=True
    )
    drive(session, reply)
    assert session.synced == [spelt(tokenizer, "go ")]
    assert reply.result().message == {"role": "assistant", "content": "on and on"}


def test_no_more_calls_than_allowed(tokenizer):
    two = call("f", "{}").removesuffix("<|tool_calls_section_end|>") + call("g", "{}", 1)
    for most, names in ((1, ["f"]), (2, ["f", "g"]), (None, ["f", "g"])):
        session = FakeSession(tokenizer, lambda _: "<think></think>" + two + "and more")
        reply = Reply(tokenizer, [1], GREEDY, allow_tools=True, max_calls=most)
        drive(session, reply)
        result = reply.result()
        assert [c["function"]["name"] for c in result.message["tool_calls"]] == names
        assert result.finish_reason == "tool_calls"
        if most is not None:
            assert result.token_ids[-1] == tokenizer.control("<|tool_calls_section_end|>")
            assert result.message["content"] is None


def test_logprobs_of_each_token_by_its_part(tokenizer):
    session = FakeSession(tokenizer, lambda _: "<think>a</think>b" + call("f", "{}"))
    reply = Reply(tokenizer, [1], GREEDY, allow_tools=True, top_logprobs=2)
    _, sampled = drive(session, reply)
    assert [s.token for s in sampled[:-1]] == list(reply.result().token_ids)
    assert tokenizer.is_control(sampled[-1].token), "the one that ends it, too"
    parts = [s.part for s in sampled]
    assert parts[:4] == ["control", "reasoning", "control", "content"]
    assert set(parts[4:]) == {"control"}
    first = sampled[1]
    assert first.token == ord("a") == first.top[0][0] and len(first.top) == 2
    assert first.logprob == first.top[0][1] == pytest.approx(0, abs=1e-6)
    assert first.top[1][1] == pytest.approx(-100, abs=1e-3)


def test_a_constraint_decides_what_may_come(tokenizer):
    class Only:
        """Exactly these bytes, then the end."""

        def __init__(self, text):
            self.ids = [*tokenizer.encode_text(text), tokenizer.control("<|im_end|>")]
            self.accepted = []

        def mask(self):
            bits = np.zeros(tokenizer.n_vocab // 32, np.uint32)
            token = self.ids[len(self.accepted)]
            bits[token // 32] |= np.uint32(1 << (token % 32))
            return bits

        def accept(self, token):
            self.accepted.append(token)

    only = Only("é!")
    params = SamplingParams(temperature=1, seed=3)
    session = FakeSession(tokenizer, lambda _: "something else")
    reply = Reply(tokenizer, [1], params, plain=True, constraint=only)
    drive(session, reply)
    assert reply.result().message["content"] == "é!" and only.accepted == list("é!".encode())


def test_the_stop_string_that_ended_it_is_told(tokenizer):
    params = SamplingParams(temperature=0, stop=("END", "STOP"))
    assert run(tokenizer, "<think></think>a STOP b", params)[0].stop == "STOP"
    assert run(tokenizer, "<think></think>a b", params)[0].stop is None
