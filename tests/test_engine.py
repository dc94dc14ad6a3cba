"""Sessions: one timeline, prefix reuse, rewinding, snapshots, errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kimi_cpu import engine as engine_module
from kimi_cpu import model as model_module
from kimi_cpu.engine import Engine
from kimi_cpu.errors import CheckpointError, ContextError, UsageError
from kimi_cpu.kernels.common import ABSENT, MIXED
from kimi_cpu.quant import dequantize, f32_to_bf16
from tests.tiny import tiny_checkpoint

CONTEXT = 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint(folder, 21, max_position_embeddings=CONTEXT)
    return folder


@pytest.fixture(scope="module", params=["exact", "fast"])
def engine(folder: Path, request: pytest.FixtureRequest) -> Engine:
    return Engine.load(folder, precision=request.param)


def ids(engine: Engine, count: int, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    return [int(i) for i in rng.integers(0, engine.config.vocab_size, count)]


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal but for rounding: attention has two forms, and in fast precision an int8 activation may
    fall on the other side."""
    return bool(np.linalg.norm(a - b) < 2e-2 * np.linalg.norm(b))


same = np.testing.assert_array_equal


def test_step_equals_sync(engine: Engine) -> None:
    prompt = ids(engine, 9)
    stepped, synced = engine.session(), engine.session()
    for token in prompt:
        logits = stepped.step(token)
    assert close(logits, synced.sync(prompt))
    assert stepped.tokens == synced.tokens == tuple(prompt)


def test_sync_computes_only_what_is_new(engine: Engine) -> None:
    session, prompt = engine.session(), ids(engine, 20)
    session.sync(prompt)
    computed: list[tuple[int, int]] = []
    session.sync([*prompt[:15], *prompt[:3]], lambda done, all_: computed.append((done, all_)))
    assert computed[-1] == (3, 3) and len(computed) == engine.config.num_hidden_layers
    assert session.tokens == (*prompt[:15], *prompt[:3])
    again: list[tuple[int, int]] = []
    session.sync(session.tokens, lambda done, all_: again.append((done, all_)))
    assert again == []  # nothing to do: the logits are still there


def test_sync_after_divergence_equals_a_fresh_session(engine: Engine) -> None:
    session, prompt = engine.session(), ids(engine, 30)
    session.sync(prompt)
    other = [*prompt[:12], *ids(engine, 10, seed=1)]
    same(session.sync(other), engine.session().sync(other))


def test_sync_to_a_shorter_prefix(engine: Engine) -> None:
    session, prompt = engine.session(), ids(engine, 30)
    session.sync(prompt)
    same(session.sync(prompt[:17]), engine.session().sync(prompt[:17]))
    assert len(session) == 17


def test_extend_tells_the_logits_of_every_token(engine: Engine) -> None:
    session, prompt = engine.session(), ids(engine, 20)
    first = session.extend(prompt[:12])
    assert first.shape == (12, engine.config.vocab_size)
    seen: list[tuple[int, int]] = []
    second = session.extend(prompt[12:], lambda done, all_: seen.append((done, all_)))
    assert seen[-1] == (8, 8) and len(seen) == engine.config.num_hidden_layers
    assert session.tokens == tuple(prompt)
    same(np.vstack([first, second]), engine.score(prompt))
    same(session.sync(prompt), second[-1])
    for wrong in ([], [engine.config.vocab_size], [0] * CONTEXT):
        with pytest.raises(ContextError):
            session.extend(wrong)


def test_rewind(engine: Engine) -> None:
    session, prompt = engine.session(), ids(engine, 12)
    expected = session.sync(prompt).copy()
    session.step(1)
    session.step(2)
    session.rewind(2)
    assert session.tokens == tuple(prompt)
    same(session.sync(prompt), expected)
    session.rewind(0)
    session.rewind(12)
    assert session.tokens == ()
    for n in (-1, 1):
        with pytest.raises(ContextError, match="cannot take back"):
            session.rewind(n)


def test_snapshot_is_independent(engine: Engine) -> None:
    session, prompt = engine.session(), ids(engine, 12)
    expected = session.sync(prompt).copy()
    snapshot = session.snapshot()
    after = session.step(5).copy()
    session.sync(ids(engine, 20, seed=3))
    session.restore(snapshot)
    assert session.tokens == tuple(prompt)
    same(session.sync(prompt), expected)
    same(session.step(5), after)  # the very same latents
    other = engine.session()
    other.restore(snapshot)
    same(other.step(5), after)


def test_long_prompts_come_in_sweeps_and_the_context_is_respected(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, prompt = engine.session(), ids(engine, CONTEXT)
    whole = engine.session().sync(prompt)
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK", 512)
    steps: list[tuple[int, int]] = []
    logits = session.sync(prompt, lambda done, all_: steps.append((done, all_)))
    layers = engine.config.num_hidden_layers
    shares = [(512 * done // layers, CONTEXT) for done in range(1, layers + 1)]
    rest = CONTEXT - 512
    shares += [(512 + rest * done // layers, CONTEXT) for done in range(1, layers + 1)]
    assert steps == shares
    same(logits, whole)
    assert session.remaining == 0
    with pytest.raises(ContextError, match="600"):
        session.step(0)
    with pytest.raises(ContextError, match="601"):
        session.sync([*prompt, 0])
    assert session.tokens == tuple(prompt)


def test_parts_of_heads_and_tokens_change_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kimi's 64 heads and long prompts take several turns where tiny models take one."""
    prompt = ids(engine, CONTEXT)
    whole = engine.session().sync(prompt)
    assert engine.config.num_attention_heads > 2
    assert engine._model.forms.absorbed_tokens < CONTEXT - 100
    monkeypatch.setattr(model_module, "HEADS_AT_ONCE", 2)
    monkeypatch.setattr(model_module, "MLP_TOKENS", 100)
    monkeypatch.setattr(model_module, "ABSORBED_TOKENS", 5)
    same(engine.session().sync(prompt), whole)


def test_a_prompt_chooses_each_expert_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    moe = engine._model.kernels.moe

    def counted(x: np.ndarray, *args: object) -> np.ndarray:
        calls.append(len(x))
        return moe(x, *args)

    monkeypatch.setattr(engine._model.kernels, "moe", counted)
    engine.session().sync(ids(engine, CONTEXT))
    dense = sum(engine.config.is_dense_layer(i) for i in range(engine.config.num_hidden_layers))
    # After the last attention only the last token, whose logits are asked for, goes on.
    assert calls == [CONTEXT] * (engine.config.num_hidden_layers - dense - 1) + [1]


def test_interrupted_prefill_keeps_what_is_complete(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK", 512)
    session, prompt = engine.session(), ids(engine, CONTEXT)

    def stop(done: int, all_: int) -> None:
        if done > 512:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.sync(prompt, stop)
    assert session.tokens == tuple(prompt[:512])
    same(session.sync(prompt), engine.session().sync(prompt))


def test_interrupt_inside_a_pass_leaves_no_trace(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, prompt = engine.session(), ids(engine, 8)
    session.sync(prompt)
    forward = engine._model.forward

    def interrupted(*args: object, **kwargs: object) -> np.ndarray:
        forward(*args, **kwargs)  # the cache has advanced, the session knows nothing of it
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine._model, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.extend([1])
    assert session.tokens == tuple(prompt)
    same(session.sync([*prompt, 2]), engine.session().sync([*prompt, 2]))


@pytest.mark.parametrize("bad", [-1, 10**6])
def test_ids_outside_the_vocabulary(engine: Engine, bad: int) -> None:
    session = engine.session()
    for call in (lambda: session.sync([0, bad]), lambda: engine.score([bad])):
        with pytest.raises(ContextError, match="outside the vocabulary"):
            call()
    with pytest.raises(ContextError, match="outside the vocabulary"):
        session.step(bad)
    assert session.tokens == ()


def test_nothing_to_compute(engine: Engine) -> None:
    with pytest.raises(ContextError, match="no tokens"):
        engine.session().sync([])
    with pytest.raises(ContextError, match="no tokens"):
        engine.score([])


def test_score_rows_are_the_steps(engine: Engine) -> None:
    prompt = ids(engine, 50)
    rows, session = engine.score(prompt), engine.session()
    steps = np.array([session.step(token) for token in prompt])
    errors = np.linalg.norm(steps - rows, axis=1) / np.linalg.norm(rows, axis=1)
    # Fast precision may round to the other side and then, in a random model, choose other experts.
    assert np.max(errors) < 1e-5 if engine.precision == "exact" else np.median(errors) < 2e-2


def test_steps_across_the_splits_of_a_long_context(tmp_path: Path) -> None:
    """Recorded passes follow the position: memory that moves, and the rows' splits at 1,024."""
    tiny_checkpoint(tmp_path, 22)
    with Engine.load(tmp_path, precision="exact", threads=2) as engine:
        prompt = ids(engine, 1060)
        rows = engine.score(prompt)
        session = engine.session()
        session.sync(prompt[:1000])
        for token, row in zip(prompt[1000:], rows[1000:], strict=True):
            assert np.linalg.norm(session.step(token) - row) < 1e-4 * np.linalg.norm(row)


def test_sessions_do_not_disturb_each_other(engine: Engine) -> None:
    first, second, prompt = engine.session(), engine.session(), ids(engine, 12)
    for token in prompt:
        first.step(token)
        second.step((token + 1) % engine.config.vocab_size)
    assert close(first.step(3), engine.session().sync([*prompt, 3]))


def test_experts_stored_in_different_ways(folder: Path) -> None:
    with Engine.load(folder) as plain, Engine.load(folder) as mixed:
        for layer in mixed._model.layers[1:]:
            table = layer.mlp.experts  # type: ignore[union-attr]

            def put(e, weights, put=table.put):
                put(e, (*weights[:2], f32_to_bf16(dequantize(weights[2]))))

            table.put = put
        a, b = plain.session(), mixed.session()
        for token in ids(plain, 6):
            ours, theirs = b.step(token), a.step(token)
        assert close(ours, theirs)
        assert MIXED in table.kinds and not (table.kinds >= 0).any()


def test_threads_change_nothing(folder: Path, engine: Engine) -> None:
    prompt = ids(engine, 40)
    one = Engine.load(folder, precision=engine.precision, threads=1)
    three = Engine.load(folder, precision=engine.precision, threads=3)
    same(one.score(prompt), three.score(prompt))


def test_only_chosen_experts_are_loaded(folder: Path) -> None:
    with Engine.load(folder) as engine:
        session = engine.session()
        session.step(3)
        table = engine._model.layers[-1].mlp.experts  # type: ignore[union-attr]
        loaded = int((table.kinds != ABSENT).sum())
        assert loaded == engine.config.num_experts_per_tok < engine.config.n_routed_experts


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    """A NaN in a tensor too large to be searched at load shows in the logits, and is found."""
    tiny_checkpoint(tmp_path, 5)
    with Engine.load(tmp_path) as engine:
        lm_head = np.array(engine._model.lm_head)
        lm_head[3, 7] = 0x7FC0
        engine._model.lm_head = lm_head
        session = engine.session()
        with pytest.raises(CheckpointError, match="not finite"):
            session.sync([1, 2, 3])
        assert session.tokens == () and engine._model.new_cache().length == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "quick"}, "precision"),
        ({"threads": 0}, "threads"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_wrong_options(folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Engine.load(folder, **options)  # type: ignore[arg-type]
