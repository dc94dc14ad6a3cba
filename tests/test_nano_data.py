"""The nano model's data: deterministic, split cleanly, and rendered as the template renders it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kimi_cpu.chat.messages import normalise
from kimi_cpu.chat.template import ChatTemplate, encode_segments
from kimi_cpu.tokenizer import Tokenizer
from tools.nano import dialogues, render
from tools.nano.bpe import Codec, read_ranks
from tools.nano.problems import FAMILIES, problems
from tools.nano.scenes import draw_scene, draw_turn

NANO = Path(__file__).resolve().parent.parent / "weights" / "nano"
KINDS = ("plain", "builtin", "other")


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec(read_ranks(NANO / "tiktoken.model"))


def test_batches_are_a_function_of_seed_step_and_rank(codec: Codec) -> None:
    first, again = (render.training_batch(codec, 1, 3, 0) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        for name, array in vars(a).items():
            np.testing.assert_array_equal(array, vars(b)[name])
    other = render.training_batch(codec, 1, 3, 1)
    assert not np.array_equal(first[0].ids, other[0].ids)


def test_no_held_out_problem_is_trained_on() -> None:
    rng = random.Random(0)
    trained = set()
    for i in range(3000):
        kind = KINDS[i % 3]
        trained.add(draw_turn(rng, draw_scene(rng, kind), kind).key)
    assert not any(map(dialogues.is_held_out, trained))
    for name in FAMILIES:
        for second in (False, True):
            asked = problems(name, 5, 0, second)
            assert all(dialogues.is_held_out(p.turn.key) for p in asked)


def test_the_split_does_not_depend_on_the_session() -> None:
    keys = (f"sum:{a}+{b}" for a in range(10, 20) for b in range(10, 20))
    held = [k for k in keys if dialogues.is_held_out(k)]
    assert held == [
        "sum:10+10",
        "sum:10+13",
        "sum:12+13",
        "sum:12+14",
        "sum:14+12",
        "sum:15+13",
        "sum:18+17",
    ]


def test_column_reasoning_ends_in_the_result() -> None:
    for a in range(100):
        for b in range(100):
            added = dialogues.add_reasoning(a, b)
            assert added.endswith((f"so {a + b}.", f"{a}+{b}={a + b}."))
            taken = dialogues.subtract_reasoning(a, b)
            assert str(abs(a - b)) + ("." if a >= b else ", negative.") in taken
    assert dialogues.add_reasoning(57, 68) == "57+68: 7+8=15, 5+6+1=12, so 125."
    assert dialogues.subtract_reasoning(42, 17) == "42-17: 12-7=5, 4-1-1=2, so 25."


def _messages(turn: dialogues.Turn, first: int, thinking: bool) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = [{"role": "user", "content": turn.user}]
    for step in turn.steps:
        message: dict[str, Any] = {"role": "assistant", "content": step.content or None}
        if thinking:
            message["reasoning_content"] = step.think
        if step.calls:
            message["tool_calls"] = [
                {
                    "id": f"functions.{name}:{first + i}", "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
                for i, (name, arguments) in enumerate(step.calls)
            ]  # fmt: skip
        out.append(message)
        for i, ((name, _), result) in enumerate(zip(step.calls, step.results, strict=True)):
            call_id = f"functions.{name}:{first + i}"
            out.append({"role": "tool", "tool_call_id": call_id, "content": result})
        first += len(step.calls)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_dialogues_are_rendered_as_the_template_does(codec: Codec, kind: str) -> None:
    tokenizer, template = Tokenizer.load(NANO), ChatTemplate.load(NANO)
    rng = random.Random(kind)
    for _ in range(25):
        scene = draw_scene(rng, kind)
        first, second = draw_turn(rng, scene, kind), draw_turn(rng, scene, kind)
        calls = render.calls_of(first)
        ours = render.prefix(codec, scene)
        ours += render.question(codec, first) + render.answer(codec, first, 0, False).ids
        ours += render.question(codec, second)
        answer = render.answer(codec, second, calls, True).ids
        system = [{"role": "system", "content": scene.system}] if scene.system else []
        past = system + _messages(first, 0, True)
        # The last message of the second turn would turn its reasoning into history: left out.
        now = _messages(second, calls, True)[:-1]
        checked = normalise(past + now, list(scene.tools) or None)
        segments = template.render_segments(checked.messages, checked.tools)
        theirs = encode_segments(tokenizer, segments)
        last = render.reply(codec, second, len(second.steps) - 1, calls, True)
        assert theirs == (ours + answer)[: -len(last)]


@pytest.mark.parametrize("long_chat", [False, True])
def test_a_packed_token_sees_its_own_dialogue_only(codec: Codec, long_chat: bool) -> None:
    row = render.fill_row(random.Random(5), codec, 384, "builtin", long_chat)
    mask = row.mask()
    assert row.used > 250
    ids, end = codec.ids, codec.ids["<|im_end|>"]
    for slot in range(row.used):
        seen = np.flatnonzero(mask[slot])
        assert seen.max() == slot
        np.testing.assert_array_equal(row.positions[seen], np.arange(len(seen)))
        if row.ids[slot] == end and row.ids[seen[-2]] != end:
            assert codec.decode(row.ids[seen]).startswith("<|im_system|>tool_declare<|im_middle|>")
        if row.weights[slot] > 0 and row.ids[slot] == ids["<|im_middle|>"]:
            assert row.labels[slot] == ids["<think>"]
