"""What is found again, what has to go, and that a found prefix is the right one."""

from __future__ import annotations

import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kimi_cpu.errors import UsageError
from kimi_cpu.kernels.common import BLOCK_TOKENS
from kimi_cpu.prefixes import PrefixCache
from kimi_cpu.prefixes.cache import WORTH_READING
from kimi_cpu.prefixes.tree import PROTECTED_REQUESTS
from tests.prefixes.fake import FakeEngine

VOCAB = 256


def make(engine: FakeEngine, blocks: int, folder: Path | None = None, **options: Any) -> Any:
    """A cache with room for so many blocks of latents."""
    options = {"folder_bytes": 1 << 30} | options if folder else options
    return PrefixCache(engine, blocks * engine.pool.block_bytes, folder=folder, **options)  # type: ignore[arg-type]


def ids(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, count).tolist()


def request(cache: Any, prompt: list[int], reply: list[int] = []) -> int:  # noqa: B006
    """Serve a prompt; how many of its tokens were known."""
    session = cache.take(prompt)
    known = len(session)
    assert tuple(prompt[:known]) == session.tokens
    session.check()
    session.sync(prompt)
    session.sync([*prompt, *reply])
    cache.give_back(session)
    return known


def test_a_conversation_goes_on(engine: FakeEngine) -> None:
    cache, timeline = make(engine, 100), ids(700, 0)
    assert request(cache, timeline, [1, 2, 3]) == 0
    for turn in range(10):
        before = len(timeline) + 3
        timeline = [*timeline, 1, 2, 3, *ids(90 * (turn % 3), turn)]
        assert request(cache, timeline, [1, 2, 3]) == before
    assert cache.nbytes == -(-(len(timeline) + 3) // BLOCK_TOKENS) * engine.pool.block_bytes


def test_what_begins_alike_is_kept_once(engine: FakeEngine) -> None:
    cache, system = make(engine, 100), ids(4 * BLOCK_TOKENS + 50, 0)
    for seed in range(1, 6):
        known = request(cache, [*system, *ids(60, seed)])
        assert known == (0 if seed == 1 else len(system))
    gc.collect()
    assert cache.nbytes == (4 + 5) * engine.pool.block_bytes
    assert engine.pool.used_bytes == cache.nbytes


def test_equal_work_of_two_sessions_is_kept_once(engine: FakeEngine) -> None:
    cache, prompt = make(engine, 100), ids(600, 0)
    sessions = [cache.take(prompt) for _ in range(3)]
    for session in sessions:
        session.sync(prompt)
    for session in sessions:
        cache.give_back(session)
    del session, sessions
    gc.collect()
    assert engine.pool.used_bytes == cache.nbytes == 3 * engine.pool.block_bytes


def test_two_at_once_write_each_its_own(engine: FakeEngine) -> None:
    cache, prompt = make(engine, 100), ids(300, 0)
    request(cache, prompt)
    first, second = cache.take(prompt), cache.take(prompt)
    first.sync([*prompt, *ids(400, 1)])
    second.sync([*prompt, *ids(10, 2)])
    for session in (first, second):
        session.check()
        cache.give_back(session)
    assert request(cache, [*prompt, *ids(400, 1)]) == 700
    assert request(cache, [*prompt, *ids(10, 2)]) == 310


def test_small_requests_do_not_evict_a_conversation(engine: FakeEngine) -> None:
    cache, timeline = make(engine, 10), ids(8 * BLOCK_TOKENS, 0)
    request(cache, timeline)
    for seed in range(1, PROTECTED_REQUESTS // 2):
        request(cache, ids(300, seed))  # a take and a give_back each
        assert cache.nbytes <= 10 * engine.pool.block_bytes
    timeline += [1, 2, 3]
    assert request(cache, timeline) == len(timeline) - 3
    request(cache, ids(300, 0))
    assert request(cache, timeline) == len(timeline)


def test_a_conversation_that_nobody_needs_yields_at_last(engine: FakeEngine) -> None:
    cache, timeline = make(engine, 10), ids(8 * BLOCK_TOKENS, 0)
    request(cache, timeline)
    for seed in range(1, PROTECTED_REQUESTS):
        request(cache, ids(300, seed))
    assert request(cache, timeline) < len(timeline)


def test_another_long_conversation_evicts_the_end_of_the_first(engine: FakeEngine) -> None:
    cache, first, second = make(engine, 10), ids(8 * BLOCK_TOKENS, 0), ids(6 * BLOCK_TOKENS, 1)
    request(cache, first)
    request(cache, second)
    assert cache.common_prefix(second) == len(second)
    assert cache.common_prefix(first) == 4 * BLOCK_TOKENS


def test_what_a_session_uses_stays(engine: FakeEngine) -> None:
    cache, first = make(engine, 10), ids(8 * BLOCK_TOKENS, 0)
    request(cache, first)
    session = cache.take(first)
    for seed in (1, 2, 3):
        request(cache, ids(9 * BLOCK_TOKENS, seed))
        assert cache.common_prefix(first) == len(first)
    del session  # it failed: nobody gives it back
    gc.collect()
    request(cache, ids(9 * BLOCK_TOKENS, 4))
    assert cache.common_prefix(first) < len(first)
    assert cache.nbytes <= 10 * engine.pool.block_bytes


def test_more_than_the_budget_is_cut(engine: FakeEngine) -> None:
    cache, timeline = make(engine, 3), ids(5 * BLOCK_TOKENS + 9, 0)
    request(cache, timeline)
    assert cache.common_prefix(timeline) == 3 * BLOCK_TOKENS
    nothing = make(engine, 0)
    assert [request(nothing, timeline) for _ in range(2)] == [0, 0] and nothing.nbytes == 0


def test_strange_ids(engine: FakeEngine) -> None:
    cache, prompt = make(engine, 10), ids(20, 0)
    request(cache, prompt)
    for bad in (-1, VOCAB, 2**40):
        session = cache.take([*prompt[:10], bad, *prompt[11:]])
        assert session.tokens == tuple(prompt[:10])
    assert cache.take([]).tokens == ()
    cache.give_back(cache.take([]))
    assert cache.common_prefix(prompt) == 20


def test_clear(engine: FakeEngine) -> None:
    cache = make(engine, 10)
    for seed in range(5):
        request(cache, ids(500, seed))
    cache.clear()
    gc.collect()
    assert cache.nbytes == engine.pool.used_bytes == 0
    assert request(cache, ids(500, 1)) == 0


def test_evicted_to_disk_and_found_again(engine: FakeEngine, tmp_path: Path) -> None:
    cache = make(engine, 4, tmp_path)
    prompts = [ids(3 * BLOCK_TOKENS + 40, seed) for seed in range(6)]
    for prompt in prompts:
        assert request(cache, prompt) == 0
    cache._disk.wait(time.monotonic() + 20)
    for prompt in prompts:
        assert request(cache, [*prompt, 7]) == len(prompt)
        assert cache.nbytes <= 4 * engine.pool.block_bytes
    cache.close()
    gc.collect()
    assert engine.pool.used_bytes == 0


def test_a_restart(engine: FakeEngine, folder: Path, tmp_path: Path) -> None:
    cache, system = make(engine, 100, tmp_path), ids(2 * BLOCK_TOKENS + 20, 0)
    prompts = [[*system, *ids(count, count)] for count in (1, 40, 300, 700)]
    for prompt in prompts:
        request(cache, prompt)
    assert list(tmp_path.rglob("*.latents")) == []  # memory had room for all
    cache.close()
    again = make(FakeEngine(folder, engine.config), 100, tmp_path)
    for prompt in prompts:
        assert request(again, [*prompt, 9]) == len(prompt)
    again.close()


def test_other_models_precisions_and_versions_are_apart(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = ids(500, 0)
    cache = make(engine, 10, tmp_path)
    request(cache, prompt)
    cache.close()

    def known() -> int:
        other = make(engine, 10, tmp_path)
        try:
            return len(other.take(prompt))
        finally:
            other.close()

    assert known() == len(prompt)
    for target, name, value in [
        (engine, "precision", "fast"),
        (engine, "kernels_name", "avx2"),
        ("kimi_cpu.prefixes.identity", "__version__", "0.0"),
        ("kimi_cpu.prefixes.identity", "FORMAT", 9),
    ]:
        with monkeypatch.context() as patch:
            if isinstance(target, str):
                patch.setattr(f"{target}.{name}", value)
            else:
                patch.setattr(target, name, value)
            assert known() == 0
    weights = next(engine.folder.glob("*.safetensors"))
    stamp = weights.stat().st_mtime
    import os

    os.utime(weights, (stamp + 5, stamp + 5))
    assert known() == 0
    os.utime(weights, (stamp, stamp))


def test_a_folder_that_cannot_be_used(engine: FakeEngine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot keep latents here"):
        make(engine, 10, tmp_path / "file")


class Requests(RuleBasedStateMachine):
    """Any history of requests against a list of all that was ever computed."""

    engine: FakeEngine
    memory_blocks: int
    on_disk: bool

    @initialize()
    def begin(self) -> None:
        self._folder = tempfile.TemporaryDirectory() if self.on_disk else None
        self.root = Path(self._folder.name) if self._folder else None
        self.cache = make(self.engine, self.memory_blocks, self.root)
        self.computed: list[list[int]] = []
        self.running: list[Any] = []

    def prompt(self, data: st.DataObject) -> list[int]:
        """Pieces of a few kinds, so that much begins alike and parts anywhere."""
        pieces = st.lists(
            st.tuples(
                st.sampled_from([1, 5, 100, BLOCK_TOKENS - 1, BLOCK_TOKENS, 300]),
                st.integers(0, 2),
            ),
            min_size=1,
            max_size=4,
        )
        return [token for count, kind in data.draw(pieces) for token in ids(count, kind)]

    def longest(self, prompt: list[int]) -> int:
        def common(other: list[int]) -> int:
            n = min(len(other), len(prompt))
            return next((i for i in range(n) if other[i] != prompt[i]), n)

        return max(map(common, self.computed), default=0)

    @rule(data=st.data())
    def begin_request(self, data: st.DataObject) -> None:
        if len(self.running) >= 3:
            return
        prompt = self.prompt(data)
        if self.on_disk:
            assert self.cache._disk.wait(time.monotonic() + 60)
        session = self.cache.take(prompt)
        session.check()
        assert session.tokens == tuple(prompt[: len(session)])
        longest = self.longest(prompt)
        assert len(session) <= longest
        if self.memory_blocks >= 1000:
            assert len(session) == longest
        elif self.on_disk:
            assert len(session) > longest - WORTH_READING
        self.running.append((session, prompt))

    @rule(data=st.data())
    def end_request(self, data: st.DataObject) -> None:
        if not self.running:
            return
        session, prompt = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        session.sync([*prompt, *ids(data.draw(st.sampled_from([0, 1, 200, 256])), 1)])
        self.computed.append(list(session.tokens))
        self.cache.give_back(session)

    @rule(data=st.data())
    def fail_request(self, data: st.DataObject) -> None:
        if self.running:
            self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))

    @rule()
    def restart(self) -> None:
        if self.on_disk:
            self.running.clear()
            self.cache.close(60)
            self.cache = make(self.engine, self.memory_blocks, self.root)

    @invariant()
    def memory_is_bounded(self) -> None:
        if not self.running:
            assert self.cache.nbytes <= self.memory_blocks * self.engine.pool.block_bytes

    def teardown(self) -> None:
        self.running.clear()
        self.cache.close()
        if self._folder:
            self._folder.cleanup()


@pytest.mark.parametrize(("memory_blocks", "on_disk"), [(1000, False), (5, False), (5, True)])
def test_any_history(engine: FakeEngine, memory_blocks: int, on_disk: bool) -> None:
    machine = type(
        "Requests",
        (Requests,),
        {"engine": engine, "memory_blocks": memory_blocks, "on_disk": on_disk},
    )
    machine.TestCase.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
    machine.TestCase().runTest()  # type: ignore[attr-defined]
