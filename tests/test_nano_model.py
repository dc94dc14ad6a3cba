"""The shipped nano checkpoint: its form, its size, and answers that it reliably gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kimi_cpu.chat.generate import Result, generate
from kimi_cpu.chat.messages import normalise
from kimi_cpu.chat.template import ChatTemplate, encode_segments
from kimi_cpu.chat.tools import BUILTIN_TOOLS
from kimi_cpu.engine import Engine, Session
from kimi_cpu.sampling import SamplingParams
from kimi_cpu.store.checkpoint import Checkpoint
from kimi_cpu.tokenizer import Tokenizer

NANO = Path(__file__).resolve().parent.parent / "weights" / "nano"


def test_form_and_size() -> None:
    assert sum(f.stat().st_size for f in NANO.iterdir()) < 8 << 20
    config = json.loads((NANO / "config.json").read_text("utf-8"))
    assert config["model_type"] == "kimi_k2"
    assert config["n_routed_experts"] > 16
    assert config["num_experts_per_tok"] == 8
    assert config["first_k_dense_replace"] >= 1
    assert config["rope_scaling"]["type"] == "yarn"
    shards = sorted(f.name for f in NANO.glob("*.safetensors"))
    assert shards == [f"model-{i:05d}-of-{len(shards):06d}.safetensors" for i in (1, 2)]
    checkpoint = Checkpoint.open(NANO)
    try:
        assert checkpoint.config.quantized
        tokenizer = Tokenizer.load(NANO)
        assert tokenizer.control("<|im_end|>") in checkpoint.config.eos_token_ids
        assert checkpoint.config.vocab_size == tokenizer.n_vocab
    finally:
        checkpoint.close()


@pytest.fixture(scope="module")
def session() -> Iterator[tuple[Session, tuple[int, ...]]]:
    engine = Engine.load(NANO, threads=1)
    yield engine.session(), engine.config.eos_token_ids
    engine.close()


def _reply(session: Any, messages: list[dict[str, Any]], tools: Any = None) -> dict[str, Any]:
    timeline, ends = session
    tokenizer, template = Tokenizer.load(NANO), ChatTemplate.load(NANO)
    checked = normalise(messages, tools)
    segments = template.render_segments(checked.messages, checked.tools)
    *_, result = generate(
        timeline, tokenizer, encode_segments(tokenizer, segments),
        SamplingParams(temperature=0.0, max_tokens=150), allow_tools=bool(tools),
        next_call_index=checked.next_call_index, eos_token_ids=ends,
    )  # fmt: skip
    assert isinstance(result, Result)
    return result.message


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("What is 17 + 25?", "17 + 25 = 42."),
        ("What is the capital of France?", "The capital of France is Paris."),
    ],
)
def test_answers(session: Any, prompt: str, answer: str) -> None:
    message = _reply(session, [{"role": "user", "content": prompt}])
    assert message["content"] == answer
    assert message["reasoning_content"]


def test_out_of_scope_gets_a_sentence_that_says_what_it_can_do(session: Any) -> None:
    message = _reply(session, [{"role": "user", "content": "Write a poem about the sea."}])
    assert "tiny demonstration model" in message["content"]


def test_calculator_call_and_answer(session: Any) -> None:
    tools = list(BUILTIN_TOOLS)
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is 123 * 45?"}]
    message = _reply(session, messages, tools)
    call = message["tool_calls"][0]
    assert call["function"] == {"name": "calculator", "arguments": '{"expression":"123*45"}'}
    messages += [message, {"role": "tool", "tool_call_id": call["id"], "content": "5535"}]
    assert _reply(session, messages, tools)["content"] == "The result is 5535."
