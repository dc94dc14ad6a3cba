"""A token's logits are the same in every bit, however its prompt came to be computed.

Everything is compared with a fresh session that computes the whole prompt in one pass.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kimi_cpu import engine as engine_module
from kimi_cpu.attention_form import EXPANDED, FormRule, first_expanded
from kimi_cpu.cli.common import embedded_model
from kimi_cpu.config import ModelConfig
from kimi_cpu.engine import Engine, Session
from kimi_cpu.kernels.common import BLOCK_TOKENS, MIXED
from kimi_cpu.prefixes import PrefixCache
from kimi_cpu.quant import F32, dequantize, f32_to_bf16
from kimi_cpu.store.repack import plan_repack, repack
from tests.tiny import tiny_checkpoint, tiny_config

#: Control tokens of the tiny model.
ASSISTANT, USER, SYSTEM = 253, 254, 255


def write_tokens(folder: Path) -> None:
    names = {ASSISTANT: "<|im_assistant|>", USER: "<|im_user|>", SYSTEM: "<|im_system|>"}
    entries = {str(i): {"content": name} for i, name in names.items()}
    text = json.dumps({"added_tokens_decoder": entries})
    (folder / "tokenizer_config.json").write_text(text)


@pytest.fixture(scope="module", params=["published", "packed", "nano"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "nano":
        return embedded_model()
    folder = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint(folder, 41)
    write_tokens(folder)
    if request.param == "published":
        return folder
    return repack(plan_repack(folder, tmp_path_factory.mktemp("packed"))).target


@pytest.fixture(scope="module", params=["exact", "fast"])
def engine(folder: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine.load(folder, precision=request.param, threads=2) as engine:
        yield engine


def text(engine: Engine, n: int, seed: int) -> list[int]:
    """Ids without control tokens."""
    return np.random.default_rng(seed).integers(3, 200, n).tolist()


def conversation(engine: Engine, seed: int, n_messages: int = 5) -> list[int]:
    """Messages shorter and longer than what decides, the last one begun by the assistant."""
    rule, rng = engine._model.forms, np.random.default_rng(seed)
    assert len(rule.openers) == 3 and rule.assistant == rule.openers[0]
    ids: list[int] = []
    for i in range(n_messages):
        n = int(rng.choice([0, 3, rule.absorbed_tokens - 1, rule.absorbed_tokens + 1, 70, 300]))
        ids += [int(rng.choice(rule.openers)), *text(engine, n, 100 * seed + i)]
    return [*ids, rule.assistant, *text(engine, 2, seed)]


def alone(engine: Engine, ids: list[int]) -> F32:
    return engine.session().sync(ids)


same = np.testing.assert_array_equal


@pytest.mark.parametrize("kind", ["text", "conversation"])
def test_every_beginning(engine: Engine, kind: str) -> None:
    """The logits of a whole prompt are those of its beginnings, in slices and after rewinding."""
    ids = conversation(engine, 1) if kind == "conversation" else text(engine, 400, 1)
    rows = engine.score(ids)
    rng = np.random.default_rng(2)
    session, sliced = engine.session(), engine.session()
    n = engine._model.forms.absorbed_tokens
    for end in (1, 2, n - 1, n, n + 1, n + 2, *rng.integers(1, len(ids), 8).tolist(), len(ids)):
        same(session.sync(ids[:end]), rows[end - 1])  # goes on or back, whatever came before
        same(alone(engine, ids[:end]), rows[end - 1])
        session.sync([*ids[: end // 2], *text(engine, int(rng.integers(1, 90)), end)])
    begin = 0
    while begin < len(ids):
        end = min(begin + int(rng.choice([1, 2, 5, 17, 64, 130])), len(ids))
        if rng.random() < 0.5:
            same(sliced.extend(ids[begin:end]), rows[begin:end])
        else:
            same(sliced.sync(ids[:end]), rows[end - 1])
        begin = end


def test_small_sweeps(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = conversation(engine, 3)
    want = alone(engine, ids)
    for chunk in (7, 64, 256):
        monkeypatch.setattr(engine_module, "PREFILL_CHUNK", chunk)
        same(alone(engine, ids), want)
    monkeypatch.setattr(engine_module, "SCORE_CHUNK", 33)
    same(engine.score(ids)[-1], want)


def reply(session: Session, logits: F32, n: int) -> list[int]:
    """Greedy text, without control tokens."""
    found = []
    for _ in range(n):
        found.append(int(logits[:200].argmax()))
        logits = session.step(found[-1])
    return found


def test_what_was_generated_is_what_a_later_prompt_says(engine: Engine) -> None:
    """Replies of an assistant, longer than what decides, are not computed again."""
    session, ids = engine.session(), conversation(engine, 4)
    for turn in range(3):
        logits = session.sync(ids)
        ids = [*ids, *reply(session, logits, engine._model.forms.absorbed_tokens + 5)]
        user = [engine._model.forms.openers[1], *text(engine, 10 + 40 * turn, turn)]
        ids += [*user, engine._model.forms.assistant]
        assert session.common_prefix(ids) == len(session) == len(ids) - len(user) - 1
        same(session.sync(ids), alone(engine, ids))


def test_text_continued_by_the_model_is_computed_again(engine: Engine) -> None:
    """Without messages it cannot be told who wrote it: a prompt is not what was generated."""
    session, ids = engine.session(), text(engine, 100, 5)
    longer = [*ids, *reply(session, session.sync(ids), 10)]
    assert session.tokens == tuple(longer)
    assert session.common_prefix(longer) == 100
    same(session.sync(longer), alone(engine, longer))
    session.step(1)
    session.step(2)
    session.rewind(1)
    same(session.sync([*longer, 1]), alone(engine, [*longer, 1]))


def test_sessions_in_one_step(engine: Engine) -> None:
    prompts = [conversation(engine, seed, 1 + seed) for seed in range(5)]
    prompts[2] = text(engine, 150, 9)
    alone_ = [engine.session() for _ in prompts]
    together = [engine.session() for _ in prompts]
    for session, prompt in zip(together, prompts, strict=True):
        for end in range(40, len(prompt) + 40, 40):
            session.sync(prompt[:end])
    for session, prompt in zip(alone_, prompts, strict=True):
        session.sync(prompt)
    for token in range(10, 16):
        rows = engine.step(together, [token] * len(prompts))
        for row, session in zip(rows, alone_, strict=True):
            same(row, session.step(token))


@pytest.mark.parametrize("kind", ["text", "conversation"])
def test_known_beginnings(engine: Engine, tmp_path: Path, kind: str) -> None:
    """Through the cache of prefixes: of any length, from memory, from disk, after replies."""
    first = conversation(engine, 6, 6) if kind == "conversation" else text(engine, 700, 6)
    n, size = len(first), 1 << 30
    prompts = [first]
    for common in (n - 1, n // 2, 1, min(n - 1, BLOCK_TOKENS), min(n - 1, BLOCK_TOKENS + 3)):
        prompts += [first[:common], [*first[:common], *conversation(engine, common, 2)]]
    wanted = [alone(engine, prompt) for prompt in prompts]
    for run in range(2):
        cache = PrefixCache(engine, size, folder=tmp_path, folder_bytes=size)
        kept: set[int] = set()
        order = np.random.default_rng(run).permutation(2 * len(prompts)) % len(prompts)
        found = 0
        for i in order.tolist():
            session = cache.take(prompts[i])
            found += len(session)
            assert (session.snapshot().logits is not None) == (i in kept)
            logits = session.sync(prompts[i])
            same(logits, wanted[i])
            if i % 2:
                cache.keep_logits(session)
                kept.add(i)
            reply(session, logits, i % 3)
            cache.give_back(session)
        assert found > n  # else nothing was tried
        cache.close()


def test_experts_stored_in_different_ways(folder: Path) -> None:
    """Projections of several kinds in one expert take a path of their own, for any tokens."""
    with Engine.load(folder, threads=2) as engine:
        for layer in engine._model.layers[1:]:
            table = layer.mlp.experts  # type: ignore[union-attr]

            def put(e, weights, put=table.put):
                put(e, (*weights[:2], f32_to_bf16(dequantize(weights[2]))))

            table.put = put
        ids = conversation(engine, 8)
        rows, session = engine.score(ids), engine.session()
        for end in (1, 2, 30, 31, 90, len(ids) - 1, len(ids)):
            same(session.sync(ids[:end]), rows[end - 1])
        same(engine.step([session], [5])[0], alone(engine, [*ids, 5]))
        assert MIXED in table.kinds and not (table.kinds >= 0).any()


# The rule itself


def test_the_rule() -> None:
    rule = FormRule(3, (7, 8, 9), 7)
    ids = [1, 2, 3, 4, 8, 1, 1, 1, 1, 7, 1, 1, 1, 1, 9, 9, 8, 1, 1, 7, 7]
    want = "eeee---ee" + "-" * 12
    got = rule.expanded(np.array(ids))
    assert "".join("-e"[int(x)] for x in got) == want
    for end in range(len(ids)):  # what follows does not matter
        same(rule.expanded(np.array(ids[:end], np.int64)), got[:end])
    keys = rule.keys(np.array(ids)).tolist()
    assert keys == [i + EXPANDED * (w == "e") for i, w in zip(ids, want, strict=True)]
    assert not FormRule(2).expanded(np.array([], np.int64)).size


def test_where_the_expansion_begins() -> None:
    kimi = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "v_head_dim": 128}
    assert first_expanded(ModelConfig.from_dict(tiny_config(**kimi))) == 64
    wide = {"kv_lora_rank": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
    assert first_expanded(ModelConfig.from_dict(tiny_config(**wide))) == 4096  # never: the context


@pytest.mark.parametrize(
    "content",
    [None, "{", "[]", "{}", '{"added_tokens_decoder": 3}', '{"added_tokens_decoder": {"x": 1}}',
     '{"added_tokens_decoder": {"300": {"content": "<|im_user|>"}}}',
     '{"added_tokens_decoder": {"9": {"content": ["<|im_user|>"]}}}',
     '{"added_tokens_decoder": {"99999999999999999999": {"content": "<|im_user|>"}}}'],
)  # fmt: skip
def test_folders_that_tell_no_control_tokens(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer_config.json").write_text(content)
    rule = FormRule.of(ModelConfig.from_dict(tiny_config()), tmp_path)
    assert rule.openers == () and rule.assistant == -1
    assert rule.expanded(np.arange(50)).all()
