"""Eviction: what goes, what stays, and what a cache would hit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_cpu.errors import UsageError
from kimi_cpu.store.experts.policy import Frequency, LeastRecent
from kimi_cpu.store.experts.simulation import Recorder, read_trace, simulate, zipf_trace

LAYERS, EXPERTS, TOP_K = 2, 96, 4
ALL = LAYERS * EXPERTS


def test_the_least_frequent_goes() -> None:
    policy = Frequency(4)
    for expert, times in enumerate((3, 1, 2, 5)):
        policy.use(expert, times)
        policy.admit(expert)
    assert [policy.evict() for _ in range(5)] == [1, 2, 0, 3, None]


def test_equals_go_in_order_of_their_numbers() -> None:
    policy = Frequency(6)
    for expert in (4, 2, 5, 0):
        policy.use(expert)
        policy.admit(expert)
    assert [policy.evict() for _ in range(4)] == [0, 2, 4, 5]


def test_protected_experts_stay() -> None:
    policy = Frequency(3)
    for expert in range(3):
        policy.admit(expert)
    assert policy.evict({0, 1}) == 2
    assert policy.evict({0, 1}) is None
    assert policy.evict() == 0


def test_several_at_once_go_as_they_would_one_by_one() -> None:
    policy = Frequency(6)
    for expert, times in enumerate((3, 1, 2, 5, 4, 6)):
        policy.use(expert, times)
        policy.admit(expert)
    assert policy.evict_some(3, {2}) == [1, 0, 4]
    assert policy.state[1] == policy.scores[4]  # the age
    assert policy.evict_some(9, {2}) == [3, 5]
    assert policy.evict_some(9) == [2]


def test_uses_after_admission_count() -> None:
    policy = Frequency(3)
    for expert in range(3):
        policy.admit(expert)
    policy.use(0)
    policy.scores[1] += 5  # as compiled code does
    assert [policy.evict() for _ in range(3)] == [2, 0, 1]


def test_old_favourites_age() -> None:
    """What was used a thousand times once is let go when others are used now."""
    policy = Frequency(3, half_life=8)
    policy.use(0, 1000)
    for expert in range(3):
        policy.admit(expert)
    for _ in range(200):
        policy.use(1)
        policy.tick()
        assert policy.evict({0, 1}) == 2
        policy.use(2)
        policy.admit(2)
    policy.use(1)
    policy.use(2)
    assert policy.evict() in (0, 1, 2)
    assert policy.frequencies[0] / policy.state[0] < 1


def test_weights_do_not_overflow() -> None:
    policy = Frequency(2, half_life=1)
    policy.use(1, 3)
    for _ in range(5):
        policy.use(0)
        policy.tick(100_000)
    assert np.isfinite(policy.state).all() and np.isfinite(policy.frequencies).all()
    assert policy.frequencies[1] < 1e-80 * policy.state[0]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 7)), max_size=200))
def test_the_heap_finds_the_least_score(steps: list[tuple[int, int]]) -> None:
    policy = Frequency(8, half_life=4)
    resident: set[int] = set()
    for what, expert in steps:
        if what == 0:
            policy.use(expert)
        elif what == 1 and expert not in resident:
            policy.admit(expert)
            resident.add(expert)
        elif what == 2:
            expected = min(resident - {expert}, key=lambda e: (policy.scores[e], e), default=None)
            assert policy.evict({expert}) == expected
            resident.discard(expected)  # type: ignore[arg-type]
        policy.tick()


@pytest.mark.parametrize("capacity", [ALL // 10, ALL // 4, ALL // 2])
@pytest.mark.parametrize(("skew", "locality"), [(0.6, 0.3), (1.0, 0.3), (0.8, 0.0)])
def test_frequency_hits_more_than_lru(capacity: int, skew: float, locality: float) -> None:
    trace = zipf_trace(600, LAYERS, EXPERTS, TOP_K, skew=skew, locality=locality, window=8, seed=3)
    ours = simulate(trace, EXPERTS, capacity, Frequency(ALL)).hit_rate_after(100)
    lru = simulate(trace, EXPERTS, capacity, LeastRecent(ALL)).hit_rate_after(100)
    assert ours > lru
    for half_life in (128, 2048):
        other = simulate(trace, EXPERTS, capacity, Frequency(ALL, half_life)).hit_rate_after(100)
        assert other == pytest.approx(ours, abs=0.03)


def test_all_in_memory_misses_each_once() -> None:
    trace = zipf_trace(300, LAYERS, EXPERTS, TOP_K, seed=1)
    result = simulate(trace, EXPERTS, ALL, Frequency(ALL))
    distinct = sum(len(np.unique(trace[:, layer])) for layer in range(LAYERS))
    assert trace.size - result.hits.sum() == distinct
    assert result.hit_rate == pytest.approx(1 - distinct / trace.size)


def test_one_layer_in_memory() -> None:
    trace = zipf_trace(50, LAYERS, EXPERTS, TOP_K, seed=1)
    assert simulate(trace, EXPERTS, TOP_K, Frequency(ALL)).hit_rate < 0.2
    with pytest.raises(ValueError, match="slots"):
        simulate(trace, EXPERTS, TOP_K - 1, Frequency(ALL))
    assert simulate(trace[:0], EXPERTS, TOP_K, Frequency(ALL)).hit_rate == 0


def test_traces_are_distinct_choices_of_a_seed() -> None:
    trace = zipf_trace(100, LAYERS, EXPERTS, TOP_K, seed=7)
    assert trace.shape == (100, LAYERS, TOP_K) and trace.min() >= 0 and trace.max() < EXPERTS
    assert all(len(set(ids)) == TOP_K for ids in trace.reshape(-1, TOP_K).tolist())
    np.testing.assert_array_equal(trace, zipf_trace(100, LAYERS, EXPERTS, TOP_K, seed=7))


def test_a_recorded_trace_is_read_back(tmp_path) -> None:
    trace = zipf_trace(20, LAYERS, EXPERTS, TOP_K)
    path = tmp_path / "trace.jsonl"
    recorder = Recorder(path, [1, 2], EXPERTS, TOP_K)
    recorder.tokens(trace[:13])
    recorder.tokens(trace[13:])
    recorder.close()
    read, n_experts = read_trace(path)
    np.testing.assert_array_equal(read, trace)
    assert n_experts == EXPERTS
    path.write_text(path.read_text()[:-5])  # the writer was stopped
    np.testing.assert_array_equal(read_trace(path)[0], trace[:-1])


@pytest.mark.parametrize(
    "text", ["", "{}\n", "[1]\n", '{"version":2,"layers":[1],"n_experts":4,"top_k":1}\n[[1]]\n',
             '{"version":1,"layers":[1],"n_experts":4,"top_k":1}\n[[9]]\n',
             '{"version":1,"layers":[1],"n_experts":4,"top_k":1}\n[[1,2]]\n[[1]]\n']
)  # fmt: skip
def test_damaged_traces_are_refused(tmp_path, text: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match="no trace"):
        read_trace(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_trace(tmp_path / "none")
    with pytest.raises(UsageError, match="cannot be written"):
        Recorder(tmp_path / "none" / "trace", [1], 4, 1)
