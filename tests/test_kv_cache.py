"""Blocks of latents: shared, copied when written to, counted, used again."""

from __future__ import annotations

import gc

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kimi_cpu.config import ModelConfig
from kimi_cpu.errors import ContextError
from kimi_cpu.kernels import reference
from kimi_cpu.kernels.common import BLOCK_TOKENS
from kimi_cpu.kv_cache import BlockPool, LatentCache
from kimi_cpu.quant import F32
from tests.tiny import tiny_checkpoint

CONTEXT = 4 * BLOCK_TOKENS + 7


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint(folder, 3, max_position_embeddings=CONTEXT)
    return ModelConfig.load(folder)


def append(cache: LatentCache, marks: list[int]) -> None:
    """Rows that tell their mark, layer and number, stored as a pass does."""
    cache.reserve(len(marks))
    starts = np.array([cache.length])
    tables = np.array([cache.table_address])
    for layer in range(cache.pool.layers):
        latents = cache.pool.latents(layer, tables, starts, cache.length + len(marks))
        column = np.array(marks, np.float32)[:, None] * 100 + layer
        c_kv = np.repeat(column, cache.pool.rank, axis=1)
        k_pe = np.repeat(-column, cache.pool.rope_dim, axis=1)
        reference.store_latents(c_kv, k_pe, latents)
    cache.advance(len(marks))


def rows(cache: LatentCache, layer: int) -> tuple[F32, F32]:
    tables, starts = np.array([cache.table_address]), np.array([cache.length])
    return cache.pool.latents(layer, tables, starts, cache.length).gather(0, cache.length)


def check(cache: LatentCache, marks: list[int]) -> None:
    assert cache.length == len(marks)
    for layer in range(cache.pool.layers):
        c_kv, k_pe = rows(cache, layer)
        want = np.array(marks, np.float32)[:, None] * 100 + layer
        assert (c_kv == want).all() and (k_pe == -want).all()


def test_a_branch_shares_until_somebody_writes(config: ModelConfig) -> None:
    pool = BlockPool(config)
    first = LatentCache(config, pool)
    marks = list(range(2 * BLOCK_TOKENS + 10))
    append(first, marks)
    assert (first.nbytes, first.shared_nbytes) == (3 * pool.block_bytes, 0)
    second = first.branch(BLOCK_TOKENS + 5)
    assert pool.used_bytes == 3 * pool.block_bytes
    assert second.nbytes == second.shared_nbytes == 2 * pool.block_bytes
    append(second, [7])  # copies five rows
    assert pool.used_bytes == 4 * pool.block_bytes
    assert first.shared_nbytes == second.shared_nbytes == pool.block_bytes
    check(second, [*marks[: BLOCK_TOKENS + 5], 7])
    first.truncate(3)
    append(first, [8, 9])
    check(first, [0, 1, 2, 8, 9])
    check(second, [*marks[: BLOCK_TOKENS + 5], 7])
    del second
    gc.collect()
    assert pool.used_bytes == first.nbytes == pool.block_bytes
    assert first.shared_nbytes == 0


def test_growing_does_not_move_the_table(config: ModelConfig) -> None:
    cache = LatentCache(config)
    table = cache.table_address
    append(cache, list(range(CONTEXT)))
    assert cache.table_address == table
    check(cache, list(range(CONTEXT)))
    with pytest.raises(ContextError, match="do not fit the model's context"):
        cache.reserve(1)


def test_blocks_are_used_again(config: ModelConfig) -> None:
    pool = BlockPool(config)
    cache = LatentCache(config, pool)
    append(cache, [1])
    address = cache._blocks[0].address
    cache.truncate(0)
    assert pool.used_bytes == 0
    append(cache, [2])
    assert cache._blocks[0].address == address


def test_a_branch_of_another_pool_is_a_copy(config: ModelConfig) -> None:
    ours, theirs = LatentCache(config), LatentCache(config)
    marks = list(range(BLOCK_TOKENS + 3))
    append(theirs, marks)
    ours.take_over(theirs)
    assert ours.shared_nbytes == 0 and theirs.shared_nbytes == 0
    append(theirs, [5])
    check(ours, marks)


def test_no_memory_is_said_and_changes_nothing(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = BlockPool(config)
    cache = LatentCache(config, pool)
    append(cache, [1, 2])
    left = [1]

    def take() -> object:
        if not left:
            raise MemoryError
        left.pop()
        return BlockPool.take(pool)

    monkeypatch.setattr(pool, "take", take)
    with pytest.raises(ContextError, match="no memory"):
        cache.reserve(3 * BLOCK_TOKENS)
    monkeypatch.undo()
    assert pool.used_bytes == cache.nbytes == pool.block_bytes
    check(cache, [1, 2])


class Timelines(RuleBasedStateMachine):
    """Any history of branches, rewinds and growth, against plain lists."""

    config: ModelConfig

    @initialize()
    def begin(self) -> None:
        self.pool = BlockPool(self.config)
        self.caches: list[tuple[LatentCache, list[int]]] = []
        self.mark = 0
        self.create()

    @rule()
    def create(self) -> None:
        if len(self.caches) < 5:
            self.caches.append((LatentCache(self.config, self.pool), []))

    def any(self, data: st.DataObject) -> tuple[LatentCache, list[int]]:
        """By number, as hypothesis keeps what it draws alive."""
        return self.caches[data.draw(st.integers(0, len(self.caches) - 1))]

    @rule(data=st.data(), count=st.sampled_from([1, 2, 100, BLOCK_TOKENS, 300]))
    def grow(self, data: st.DataObject, count: int) -> None:
        cache, marks = self.any(data)
        count = min(count, CONTEXT - len(marks))
        if count:
            new = list(range(self.mark, self.mark + count))
            self.mark += count
            append(cache, new)
            marks += new

    @rule(data=st.data(), part=st.floats(0, 1))
    def cut(self, data: st.DataObject, part: float) -> None:
        cache, marks = self.any(data)
        length = round(part * len(marks))
        cache.truncate(length)
        del marks[length:]

    @rule(data=st.data(), part=st.floats(0, 1))
    def branch(self, data: st.DataObject, part: float) -> None:
        cache, marks = self.any(data)
        length = round(part * len(marks))
        if len(self.caches) < 5:
            self.caches.append((cache.branch(length), marks[:length]))

    @rule(data=st.data())
    def take_over(self, data: st.DataObject) -> None:
        into = data.draw(st.integers(0, len(self.caches) - 1))
        cache, marks = self.any(data)
        self.caches[into][0].take_over(cache)
        self.caches[into] = (self.caches[into][0], list(marks))

    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        if len(self.caches) > 1:
            self.caches.pop(data.draw(st.integers(0, len(self.caches) - 1)))

    @invariant()
    def rows_are_right(self) -> None:
        for cache, marks in self.caches:
            check(cache, marks)

    @invariant()
    def bytes_are_right(self) -> None:
        listed = [block for cache, _ in self.caches for block in cache._blocks]
        distinct = {block.address for block in listed}
        assert self.pool.used_bytes == len(distinct) * self.pool.block_bytes
        for block in listed:
            assert block.users == sum(other is block for other in listed)


def test_any_history(config: ModelConfig) -> None:
    machine = type("Timelines", (Timelines,), {"config": config})
    machine.TestCase.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)
    machine.TestCase().runTest()  # type: ignore[attr-defined]
