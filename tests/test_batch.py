"""Several sessions decoded together give, bit for bit, what each gives alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kimi_cpu.engine import Engine, Session
from kimi_cpu.errors import CheckpointError, ContextError, UsageError
from kimi_cpu.kernels.common import BLOCK_TOKENS
from kimi_cpu.store.repack import plan_repack, repack
from tests.tiny import tiny_checkpoint

CONTEXT = 1400
#: Lengths before the steps: empty, around a block's and a split's border, and some.
LENGTHS = [0, 1, BLOCK_TOKENS - 1, BLOCK_TOKENS, 1023, 7, 700, 1024, 3, 90, 255, 2, 1, 30, 300, 0]


@pytest.fixture(scope="module", params=["published", "packed", "bf16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint(
        folder, 31, int4=request.param != "bf16", max_position_embeddings=CONTEXT,
        hidden_size=128, moe_intermediate_size=64,
    )  # fmt: skip
    if request.param != "packed":
        return folder
    return repack(plan_repack(folder, tmp_path_factory.mktemp("packed"))).target


@pytest.fixture(scope="module", params=["exact", "fast"])
def engine(folder: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine.load(folder, precision=request.param, threads=2) as engine:
        yield engine


def ids(engine: Engine, count: int, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    return [int(i) for i in rng.integers(0, engine.config.vocab_size, count)]


def sessions(engine: Engine, lengths: list[int]) -> list[Session]:
    made = []
    for seed, length in enumerate(lengths):
        session = engine.session()
        if length:
            session.sync(ids(engine, length, seed))
        made.append(session)
    return made


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 16])
def test_equal_bit_for_bit(engine: Engine, n: int) -> None:
    together, alone = sessions(engine, LENGTHS[:n]), sessions(engine, LENGTHS[:n])
    for turn in range(4):
        tokens = ids(engine, n, seed=100 + turn)
        rows = engine.step(together, tokens)
        assert rows.shape == (n, engine.config.vocab_size) and rows.dtype == np.float32
        for session, other, token, row in zip(together, alone, tokens, rows, strict=True):
            np.testing.assert_array_equal(row, other.step(token))
            assert session.tokens == other.tokens
            np.testing.assert_array_equal(session._logits, row)


def test_any_company(engine: Engine) -> None:
    """Sessions come and go between steps, in any order; whole replies are the same."""
    rng = np.random.default_rng(7)
    prompts = [ids(engine, length, seed) for seed, length in enumerate([5, 300, 40, 260, 12])]
    want = []
    for prompt in prompts:
        session = engine.session()
        logits = session.sync(prompt)
        for _ in range(12):
            logits = session.step(int(logits.argmax()))
        want.append((session.tokens, logits))
    made = [engine.session() for _ in prompts]
    last = [session.sync(prompt) for session, prompt in zip(made, prompts, strict=True)]
    while waiting := [i for i, s in enumerate(made) if len(s) < len(prompts[i]) + 12]:
        some = rng.permutation(waiting)[: rng.integers(1, len(waiting) + 1)].tolist()
        rows = engine.step([made[i] for i in some], [int(last[i].argmax()) for i in some])
        for i, row in zip(some, rows, strict=True):
            last[i] = row
    for session, logits, (tokens, expected) in zip(made, last, want, strict=True):
        assert session.tokens == tokens
        np.testing.assert_array_equal(logits, expected)


def test_branches_go_on_together(engine: Engine) -> None:
    """Sessions that share blocks write each into its own."""
    first = engine.session()
    first.sync(ids(engine, BLOCK_TOKENS + 20))
    others = [engine.session() for _ in range(3)]
    snapshot = first.snapshot()
    for other in others:
        other.restore(snapshot)
    together = [first, *others]
    tokens = [3, 4, 5, 6]
    for _ in range(3):
        rows = engine.step(together, tokens)
    for token, row in zip(tokens, rows, strict=True):
        alone = engine.session()
        alone.restore(snapshot)
        for _ in range(3):
            expected = alone.step(token)
        np.testing.assert_array_equal(row, expected)


def test_one_that_cannot_go_on_leaves_all_as_they_were(engine: Engine) -> None:
    full, other = sessions(engine, [CONTEXT, 9])
    before = other.sync(other.tokens)
    with pytest.raises(ContextError, match="do not fit"):
        engine.step([other, full], [1, 2])
    assert len(full) == CONTEXT and len(other) == 9
    assert other.sync(other.tokens) is before  # even its logits
    with pytest.raises(ContextError, match="vocabulary"):
        engine.step([other], [-1])
    expected = sessions(engine, [CONTEXT, 9])[1].step(5)
    np.testing.assert_array_equal(engine.step([other], [5])[0], expected)


def test_an_interrupt_inside_leaves_no_trace(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = sessions(engine, [9, 300])
    step = engine._model.step

    def interrupted(*args: object) -> np.ndarray:
        step(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine._model, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step(made, [1, 2])
    assert [len(session) for session in made] == [9, 300]
    rows = engine.step(made, [3, 4])
    for row, other, token in zip(rows, sessions(engine, [9, 300]), [3, 4], strict=True):
        np.testing.assert_array_equal(row, other.step(token))


def test_damage_changes_nothing(folder: Path) -> None:
    with Engine.load(folder) as engine:
        made = sessions(engine, [4, 5])
        engine._model.norm = np.full(engine.config.hidden_size, np.nan, np.float32)
        with pytest.raises(CheckpointError, match="not finite"):
            engine.step(made, [1, 2])
        assert [len(session) for session in made] == [4, 5]


def test_wrong_calls(engine: Engine, folder: Path) -> None:
    one, two = sessions(engine, [3, 3])
    for call, message in [
        (lambda: engine.step([], []), "0 tokens for 0"),
        (lambda: engine.step([one], [1, 2]), "2 tokens for 1"),
        (lambda: engine.step([one, two, one], [1, 2, 3]), "twice"),
    ]:
        with pytest.raises(UsageError, match=message):
            call()
    with Engine.load(folder) as other, pytest.raises(UsageError, match="another engine"):
        other.step([one], [1])
    assert len(one) == len(two) == 3


class Stop(Exception):
    pass


@pytest.mark.parametrize("slice_tokens", [64, 257])
def test_a_prompt_in_slices_that_are_stopped(engine: Engine, slice_tokens: int) -> None:
    """Stopped after any layer and taken up again, between steps of others: the same bits."""
    prompt, layers = ids(engine, 600), engine.config.num_hidden_layers
    want = engine.session().sync(prompt)
    session, others = engine.session(), sessions(engine, [5, 40])
    for turn, end in enumerate(range(slice_tokens, 600 + slice_tokens, slice_tokens)):
        for stop_after in range(turn % 2, layers):
            calls = 0

            def progress(done: int, todo: int, stop_after: int = stop_after) -> None:
                nonlocal calls
                calls += 1
                if calls > stop_after:
                    raise Stop

            before = session.tokens
            with pytest.raises(Stop):
                session.sync(prompt[:end], progress)
            assert session.tokens == before
            engine.step(others, [1, 2])
        got = session.sync(prompt[:end])
    np.testing.assert_array_equal(got, want)


def test_all_operations_in_parallel(
    engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small: replayed by two and three threads, the bits are those of one."""
    monkeypatch.setattr("kimi_cpu.kernels.threads.MIN_PARALLEL_COST", 0)
    tokens = [ids(engine, 5, seed=50 + turn) for turn in range(5)]
    want = engine_rows(engine, tokens)
    for threads in (1, 2, 3):
        with Engine.load(folder, precision=engine.precision, threads=threads) as other:
            for got, expected in zip(engine_rows(other, tokens), want, strict=True):
                np.testing.assert_array_equal(got, expected)


def engine_rows(engine: Engine, tokens: list[list[int]]) -> list[np.ndarray]:
    made = sessions(engine, LENGTHS[2:7])
    return [engine.step(made, turn) for turn in tokens]
