"""The expert store: what is asked for comes, nothing else changes, and errors are told."""

from __future__ import annotations

import errno
import gc
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from kimi_cpu.errors import CheckpointError, UsageError
from kimi_cpu.store.checkpoint import Checkpoint
from kimi_cpu.store.experts import system
from kimi_cpu.store.experts.backends import MappedBackend, can_read_directly
from kimi_cpu.store.experts.policy import Frequency
from kimi_cpu.store.experts.reader import IO_THREADS
from kimi_cpu.store.experts.simulation import Recorder, read_trace, simulate, zipf_trace
from tests.store.experts.shelf import (
    EXPERTS,
    LAYERS,
    TOP_K,
    budget_of,
    failing_store,
    open_store,
    shelves,
    take,
)
from tests.tiny import tiny_checkpoint

IO = pytest.mark.parametrize("io", ["mmap", "direct"])


@IO
@pytest.mark.parametrize("slots", [TOP_K, 9, 2 * EXPERTS])
def test_a_trace_as_simulated(checkpoint: Checkpoint, io, slots: int) -> None:
    """Bytes are right at every step, and hits are those of the simulation."""
    trace = zipf_trace(60, len(LAYERS), EXPERTS, TOP_K, seed=slots)
    store = open_store(checkpoint, slots, io, lookahead=False)
    found = shelves(checkpoint, store)
    for token in trace:
        with store.passing(1, 0):
            for layer, ids in zip(LAYERS, token.tolist(), strict=True):
                take(store, layer, ids)
                found[layer].check(ids)
                assert sum(len(s.experts) for s in found.values()) <= slots
    expected = simulate(trace, EXPERTS, slots, Frequency(len(LAYERS) * EXPERTS))
    stats = store.stats()
    assert stats.hits == expected.hits.sum() and stats.uses == trace.size
    assert stats.tokens == len(trace)
    assert stats.read_bytes > 0 and stats.wait_s > 0 and stats.disk_s > 0
    store.close()


@IO
@pytest.mark.parametrize("slots", [TOP_K, 7, 12, 2 * EXPERTS])
def test_sweeps(checkpoint: Checkpoint, io, slots: int) -> None:
    store = open_store(checkpoint, slots, io)
    found = shelves(checkpoint, store)
    rng = np.random.default_rng(slots)
    take(store, 1, [0, 5, 9, 11])
    for _ in range(8):
        for layer in LAYERS:
            ids = rng.permutation(EXPERTS)[: rng.integers(1, EXPERTS + 1)].tolist()
            order = []
            for group in store.layer(layer).sweep(ids):
                found[layer].check(group)
                order += group
            assert order == sorted(ids)
    store.close()


def test_a_sweep_reads_nothing_twice(checkpoint: Checkpoint) -> None:
    """What is resident and still to come is not let go for what is read meanwhile."""
    store = open_store(checkpoint, 8, "direct", lookahead=False)
    found = shelves(checkpoint, store)
    take(store, 1, [12, 13, 14, 15])
    of_four = store.stats().read_bytes
    take(store, 2, [0, 1, 2, 3])
    before = store.stats().read_bytes
    for group in store.layer(1).sweep(range(8, EXPERTS)):
        found[1].check(group)
    read = store.stats().read_bytes - before
    assert 0.8 * of_four < read < 1.2 * of_four
    store.close()


def test_many_are_begun_and_swept(checkpoint: Checkpoint) -> None:
    """A request for more than fit begins with the first of them."""
    store = open_store(checkpoint, 8, "direct", lookahead=False)
    found = shelves(checkpoint, store)
    store.layer(1).request(range(EXPERTS))
    assert set(store._loads) == set(range(8))
    order = []
    for group in store.layer(1).sweep(range(EXPERTS)):
        found[1].check(group)
        order += group
    assert order == list(range(EXPERTS))
    slot = budget_of(checkpoint, 1).slot_bytes
    assert store.stats().read_bytes <= EXPERTS * slot
    store.close()


def test_a_sweep_reads_as_far_ahead_as_there_are_slots(checkpoint: Checkpoint) -> None:
    """And lets nothing go that it has read and not used yet: each expert is read once."""
    store = open_store(checkpoint, 12, "direct", lookahead=False)
    found = shelves(checkpoint, store)
    of_one = store.layer(1)
    of_one.request(range(EXPERTS))
    store._reader.drain()  # the disk is far ahead
    for group in of_one.sweep(range(EXPERTS)):
        found[1].check(group)
        store._reader.drain()
    pieces = [p for e in range(EXPERTS) for p in store._backend.pieces(0, store._extents(e))]
    assert store.stats().read_bytes == sum(piece.length for piece in pieces)
    store.close()


def test_what_a_broken_off_pass_asked_for_is_not_read(checkpoint: Checkpoint) -> None:
    """Hundreds of experts may be queued: the next pass must not wait for them."""
    store, backend = failing_store(checkpoint, 20)
    found = shelves(checkpoint, store)
    backend.gate = threading.Event()
    with pytest.raises(KeyboardInterrupt), store.passing(64, 0):
        store.layer(1).request(range(EXPERTS))
        assert len(store._loads) == EXPERTS
        raise KeyboardInterrupt
    backend.gate.set()
    store._reader.drain()
    pieces = backend.pieces(0, store._extents(0))
    assert store.stats().read_bytes <= IO_THREADS * max(piece.length for piece in pieces)
    with store.passing(1, 0):
        take(store, 1, [12, 13, 14, 15])
        found[1].check([12, 13, 14, 15])
    assert store.resident + len(store._free) == 20
    store.close()


@IO
def test_latents_take_slots_and_give_them_back(checkpoint: Checkpoint, io) -> None:
    store = open_store(checkpoint, 12, io)
    found = shelves(checkpoint, store)
    slot = budget_of(checkpoint, 1).slot_bytes
    for layer in LAYERS:
        take(store, layer, [1, 2, 3, 4, 5, 6])
    assert store.resident == 12
    with store.passing(1, 5 * slot + 1):
        assert store.capacity == 6 and store.resident <= 6
        take(store, 2, [10, 11, 12, 13])
        found[2].check([10, 11, 12, 13])
        assert store.resident <= 6
    with pytest.raises(UsageError, match="conversation"), store.passing(1, 9 * slot):
        pass
    with store.passing(1, 0):
        assert store.capacity == 12
        for layer in LAYERS:
            take(store, layer, [5, 6, 7, 8])
            found[layer].check([5, 6, 7, 8])
        assert store.resident > 6
    store.close()


def test_a_disk_error_is_told_and_can_be_over(checkpoint: Checkpoint) -> None:
    store, backend = failing_store(checkpoint, TOP_K)
    found = shelves(checkpoint, store)
    backend.error = OSError(errno.EIO, "Input/output error")
    for _ in range(3):
        with pytest.raises(CheckpointError, match=r"safetensors: cannot be read.*Input/output"):
            take(store, 1, [0, 1, 2, 3])
    backend.error = None
    take(store, 1, [4, 5, 6, 7])
    found[1].check([4, 5, 6, 7])
    store.close()


def test_an_interrupt_loses_nothing(checkpoint: Checkpoint, monkeypatch) -> None:
    """Ctrl-C at any call inside a change: slots and shelves are put right at the next one."""
    rng = np.random.default_rng(0)
    store, _ = failing_store(checkpoint, 7)
    found = shelves(checkpoint, store)
    for name in ("_start", "_free_slots", "_take_off", "_put", "_extents", "_weights"):
        for after in range(4):
            original, calls = getattr(store, name), 0

            def interrupted(*args, original=original, after=after, **named):
                nonlocal calls
                calls += 1
                if calls == after + 1 and threading.current_thread() is threading.main_thread():
                    if after % 2:
                        original(*args, **named)
                    raise KeyboardInterrupt
                return original(*args, **named)

            monkeypatch.setattr(store, name, interrupted)
            for _ in range(3):
                layer = int(rng.integers(1, 3))
                try:
                    take(store, layer, rng.permutation(EXPERTS)[:TOP_K].tolist())
                except KeyboardInterrupt:
                    break
            monkeypatch.setattr(store, name, original)
            for layer in LAYERS:
                ids = rng.permutation(EXPERTS)[:TOP_K].tolist()
                take(store, layer, ids)
                found[layer].check(ids)
            held = {int(slot) for slot in store._slot_of if slot >= 0}
            held |= {load.slot for load in store._loads.values()}
            assert len(held) + len(store._free) == 7 and not held & set(store._free)
    store.close()


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals of Windows")
def test_an_interrupt_while_waiting(checkpoint: Checkpoint) -> None:
    store, backend = failing_store(checkpoint, TOP_K)
    found = shelves(checkpoint, store)
    backend.gate = threading.Event()
    store.layer(1).request([0, 1])
    main = threading.main_thread().ident
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.1, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            store.layer(1).arrived([0, 1])
    finally:
        signal.signal(signal.SIGINT, before)
    backend.gate.set()
    take(store, 1, [0, 1, 2, 3])
    found[1].check([0, 1, 2, 3])
    store.close()


@IO
def test_a_file_that_is_cut_off_while_in_use(tmp_path: Path, io) -> None:
    tiny_checkpoint(tmp_path, 4, shard_bytes=1 << 30)
    checkpoint = Checkpoint.open(tmp_path)
    store = open_store(checkpoint, 8, io)
    take(store, 1, [0])
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(1 << 14)
    with pytest.raises(CheckpointError, match="cannot be read any more"):
        for layer in LAYERS:
            take(store, layer, [8, 9, 10, 11])
    store.close()


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, 4)
    checkpoint = Checkpoint.open(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    for io in ("mmap", "direct"):
        store = open_store(checkpoint, 8, io)  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match="cannot be read any more"):
            take(store, 1, [0])
        store.close()


def test_population_by_hand(checkpoint: Checkpoint, monkeypatch) -> None:
    """Older kernels and other systems have no call for it."""
    monkeypatch.setattr(system, "populate", lambda *_: False)
    store = open_store(checkpoint, TOP_K, "mmap")
    found = shelves(checkpoint, store)
    for ids in ([0, 1, 2, 3], [12, 13, 14, 15]):
        take(store, 2, ids)
        found[2].check(ids)
    store.close()


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="a matter of Linux")
def test_file_systems_without_direct_reads(checkpoint: Checkpoint, monkeypatch) -> None:
    """Opening with O_DIRECT works and reading does not; or not even opening does."""
    import fcntl

    refused: list[int] = []
    original = os.preadv

    def preadv(fd, buffers, offset):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(fd)
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(fd, buffers, offset)

    monkeypatch.setattr("os.preadv", preadv)
    store = open_store(checkpoint, 8, "direct")
    found = shelves(checkpoint, store)
    take(store, 1, [0, 1, 2, 3])
    found[1].check([0, 1, 2, 3])
    assert refused
    store.close()
    shm = Path("/dev/shm")
    if shm.is_dir():
        assert can_read_directly(shm) is False


def test_evicted_experts_leave_the_page_cache(tmp_path: Path) -> None:
    """With a budget of few experts, the files are not in memory after many tokens."""
    from kimi_cpu.benchmark import pagecache

    tiny_checkpoint(tmp_path, 5, hidden_size=512, moe_intermediate_size=512, shard_bytes=1 << 30)
    path = tmp_path / "model.safetensors"
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system cannot drop files from its cache")
    pagecache.drop([path])
    if pagecache.cached_fraction([path]) != 0:
        pytest.skip("this file system keeps files in memory")
    checkpoint = Checkpoint.open(tmp_path)
    store = open_store(checkpoint, TOP_K, "mmap", lookahead=False)
    for layer in LAYERS:
        for first in range(0, EXPERTS, TOP_K):
            take(store, layer, list(range(first, first + TOP_K)))
    assert store.resident == TOP_K
    cached = pagecache.cached_fraction([path])
    assert cached is not None and cached < 0.3  # 4 of 32 experts, and pages at borders
    store.close()


def test_routing_is_recorded(checkpoint: Checkpoint, tmp_path: Path) -> None:
    trace = zipf_trace(10, len(LAYERS), EXPERTS, TOP_K, seed=1)
    path = tmp_path / "trace"
    recorder = Recorder(path, list(LAYERS), EXPERTS, TOP_K)
    store = open_store(checkpoint, 2 * EXPERTS, "mmap", recorder=recorder)
    with store.passing(6, 0):
        for i, layer in enumerate(LAYERS):
            store.layer(layer).count(trace[:6, i])
    for token in trace[6:]:
        with store.passing(1, 0):
            for layer, ids in zip(LAYERS, token, strict=True):
                store.layer(layer).count(ids[None])
    store.close()
    np.testing.assert_array_equal(read_trace(path)[0], trace)


def test_threads_end_with_the_store(checkpoint: Checkpoint) -> None:
    def io_threads() -> int:
        return sum(t.name.startswith("kimi-cpu-io") for t in threading.enumerate())

    before = io_threads()
    store = open_store(checkpoint, 8, "direct")
    assert io_threads() == before  # none before the first read
    take(store, 1, [0, 1])
    assert io_threads() > before
    experts = store.layer(1)
    store.close()
    assert io_threads() == before
    with pytest.raises(ValueError, match="closed"):
        experts.arrived([9])
    store = open_store(checkpoint, 8, "direct")  # nobody closes this one
    take(store, 1, [0, 1])
    del store
    gc.collect()
    deadline = time.monotonic() + 10
    while io_threads() > before:
        assert time.monotonic() < deadline


def test_several_threads_when_everything_fits(checkpoint: Checkpoint) -> None:
    store = open_store(checkpoint, 2 * EXPERTS, "mmap")
    found = shelves(checkpoint, store)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(30):
                with store.passing(1, 0):
                    for layer in LAYERS:
                        take(store, layer, rng.permutation(EXPERTS)[:TOP_K].tolist())
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for layer in LAYERS:
        found[layer].check([])
    store.close()


def test_mapped_buffers_outlive_the_backend(checkpoint: Checkpoint) -> None:
    backend = MappedBackend()
    extents = checkpoint.expert_extents(1, 0)
    backend.pieces(0, extents)
    buffers = backend.buffers(0, extents)
    backend.close()
    gc.collect()
    assert sum(int(b[-1]) >= 0 for b in buffers) == len(extents)
