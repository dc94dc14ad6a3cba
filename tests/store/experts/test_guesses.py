"""Experts read before their router has spoken: what guesses may cost, and how they are judged."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from kimi_cpu.store.checkpoint import Checkpoint
from kimi_cpu.store.experts.backends import MappedBackend, Piece
from kimi_cpu.store.experts.residency import ExpertStore
from kimi_cpu.store.extents import Extent
from tests.store.experts.shelf import EXPERTS, Failing, failing_store, open_store, shelves, take

IO = pytest.mark.parametrize("io", ["mmap", "direct"])


@IO
def test_loads_go_on_until_asked_for(checkpoint: Checkpoint, io) -> None:
    store = open_store(checkpoint, 8, io, lookahead=True)
    found = shelves(checkpoint, store)
    take(store, 1, [0, 1])
    store.layer(2).anticipate([3, 4, 5])  # no room: 8 slots are two layers' experts
    assert store.stats().ahead == 0
    store = open_store(checkpoint, 12, io)
    found = shelves(checkpoint, store)
    take(store, 1, [0, 1])
    store.layer(2).anticipate([3, 4, 5, 6, 7])
    deadline = time.monotonic() + 10
    while store.resident < 6 or not all(load.done for load in store._loads.values()):
        assert time.monotonic() < deadline
    assert set(found[2].experts) == set()  # nobody looked yet
    take(store, 2, [4, 3, 9, 10])
    found[2].check([4, 3, 9, 10])
    stats = store.stats()
    assert (stats.ahead, stats.ahead_used, stats.ahead_hits) == (4, 2, 2)
    assert (stats.uses, stats.hits) == (6, 2) and stats.recall == 2 / 6
    store.close()


def test_a_guess_that_comes_twice_is_read_once(checkpoint: Checkpoint) -> None:
    """As of a router of damaged weights. A second load would lose the slot of the first."""
    store = open_store(checkpoint, 12, "direct")
    found = shelves(checkpoint, store)
    for t in range(20):
        first = 4 * t % EXPERTS
        store.layer(2).anticipate([first, first, first + 1, first, first + 1])
        take(store, 2, [first, first + 1, first + 2, first + 3])
    used = store.resident + len(store._free)
    assert used == store.capacity and store.stats().ahead == 40
    found[2].check([first, first + 1, first + 2, first + 3])
    store.close()


def test_useless_lookahead_switches_itself_off_for_a_while(checkpoint: Checkpoint) -> None:
    store = open_store(checkpoint, 12, "direct")
    shelves(checkpoint, store)
    for t in range(1000):
        with store.passing(1, 0):
            store.layer(2).anticipate([0, 1, 2, 3])
            take(store, 2, [10, 11, 12, 13])
            take(store, 1, [t % EXPERTS])  # sends the useless ones away
        if not store.looks_ahead[0]:
            break
    assert not store.looks_ahead[0]
    before = store.stats().ahead
    store.layer(2).anticipate([0, 1, 2, 3])
    assert store.stats().ahead == before
    for _ in range(600):
        with store.passing(1, 0):
            pass
    assert store.looks_ahead[0]
    store.close()


def test_what_is_asked_for_on_its_way_becomes_a_demand(checkpoint: Checkpoint) -> None:
    """It does not count as having been there; guesses that nobody asked for are given up."""
    store, backend = failing_store(checkpoint, 12)
    found = shelves(checkpoint, store)
    backend.gate = threading.Event()
    store.layer(1).anticipate([3, 4, 5, 6])
    experts = store.layer(1)
    experts.count(np.array([[4, 5, 8, 9]], dtype=np.int32))
    experts.request([4, 5, 8, 9])
    assert {n: load.ahead for n, load in store._loads.items()} == {
        3: True, 4: False, 5: False, 8: False, 9: False,
    }  # fmt: skip
    backend.gate.set()
    left = [4, 5, 8, 9]
    while left:
        left = [e for e in left if e not in experts.arrived(left)]
    found[1].check([4, 5, 8, 9])
    stats = store.stats()
    assert (stats.ahead, stats.ahead_used, stats.ahead_hits, stats.hits) == (4, 2, 0, 0)
    store.close()


def begun_guess(store: ExpertStore, backend: Failing, layer: int, ids: list[int]) -> None:
    """Guesses whose first piece is being read and will be until the gate opens."""
    backend.gate = threading.Event()
    store.layer(layer).anticipate(ids)
    deadline = time.monotonic() + 10
    while not store._reader._queue.ahead_running:
        assert time.monotonic() < deadline


def test_of_wrong_guesses_no_more_is_read(checkpoint: Checkpoint) -> None:
    store, backend = failing_store(checkpoint, 12)
    found = shelves(checkpoint, store)
    begun_guess(store, backend, 1, [3, 4, 5, 6])
    wrong = store._loads[3]
    store.layer(1).request([8, 9])
    assert set(store._loads) == {3, 8, 9}  # of the first one a piece is on its way
    assert backend.gate is not None
    backend.gate.set()
    take(store, 1, [8, 9])
    store._reader.drain()
    needed = sum(p.length for e in (8, 9) for p in backend.pieces(0, store._extents(e)))
    assert store.stats().read_bytes == needed + wrong.pieces[0].length
    store.layer(1).request([8])
    assert not store._loads and set(found[1].experts) == {8, 9}
    assert len(store._free) == 10
    store.close()


def test_a_guess_that_was_given_up_can_be_asked_for(checkpoint: Checkpoint) -> None:
    """Even while the piece that was begun is still being read."""
    store, backend = failing_store(checkpoint, 12)
    found = shelves(checkpoint, store)
    begun_guess(store, backend, 1, [3, 4])
    store.layer(1).request([])
    assert store._loads[3].given_up
    timer = threading.Timer(0.1, backend.gate.set)  # type: ignore[union-attr]
    timer.start()
    take(store, 1, [3, 4, 5])
    found[1].check([3, 4, 5])
    assert store.resident == 3 and len(store._free) == 9
    store.close()


def test_the_next_layer_gives_up_guesses_that_nobody_asked_about(checkpoint: Checkpoint) -> None:
    """Where all that a router chooses is resident, nothing is requested."""
    store, backend = failing_store(checkpoint, 16)
    shelves(checkpoint, store)
    begun_guess(store, backend, 1, [3, 4])
    store.layer(2).anticipate([5])
    assert set(store._loads) == {3, EXPERTS + 5} and store._loads[3].given_up
    assert store.stats().ahead_used == 0
    assert backend.gate is not None
    backend.gate.set()
    take(store, 2, [5])
    assert store.stats().ahead_used == 1
    store.close()


def test_guesses_take_no_room_from_a_layer_that_found_all_it_chose(checkpoint: Checkpoint) -> None:
    """It asks for nothing, and computes while the next one's are read."""
    store = open_store(checkpoint, 12, "direct")
    found = shelves(checkpoint, store)
    for expert in range(8):  # the least wanted first
        take(store, 1, [expert])
    take(store, 2, [0, 1, 2, 3])  # 12 slots are taken
    chosen = [0, 1, 2, 3]  # the first that would have to go
    store.layer(1).count(np.array([chosen], dtype=np.int32))
    store.policy.scores[:] = np.arange(len(store.policy.scores))
    store.policy.reset(np.flatnonzero(store._slot_of >= 0).tolist())
    store.layer(2).anticipate([8, 9, 10, 11])
    store._reader.drain()
    found[1].check(chosen)
    assert set(found[1].experts) == set(chosen)
    store.close()


def test_guesses_that_arrived_before_their_router_spoke_were_right(checkpoint: Checkpoint) -> None:
    """Then the layer finds them, asks for nothing, and the next guess has to judge this one."""
    store = open_store(checkpoint, 16, "direct")
    found = shelves(checkpoint, store)
    store.layer(2).request([0])
    store.layer(1).anticipate([3, 4, 5, 6])
    store._reader.drain()
    assert store.layer(2).arrived([0]) == [0]  # publishes what else is there
    found[1].check([3, 4, 5, 6])
    store.layer(1).count(np.array([[3, 4, 5, 9]], dtype=np.int32))
    store.layer(2).anticipate([1])
    stats = store.stats()
    assert (stats.ahead, stats.ahead_used, stats.ahead_hits) == (5, 3, 3)
    assert (stats.uses, stats.hits) == (4, 3)
    store.close()


def test_what_was_read_of_a_guess_is_let_go(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mapped, it would stay in the page cache beyond the budget."""
    gate, begun, evicted = threading.Event(), threading.Event(), list[object]()
    read, evict = MappedBackend.read, MappedBackend.evict

    def gated(backend: MappedBackend, piece: Piece) -> None:
        begun.set()
        gate.wait()
        read(backend, piece)

    def recorded(backend: MappedBackend, slot: int, extents: list[Extent]) -> None:
        evicted.append(extents)
        evict(backend, slot, extents)

    monkeypatch.setattr(MappedBackend, "read", gated)
    monkeypatch.setattr(MappedBackend, "evict", recorded)
    store = open_store(checkpoint, 12, "mmap")
    shelves(checkpoint, store)
    store.layer(1).anticipate([3, 4])
    begun.wait()
    store.layer(1).request([5])
    assert evicted == [store._extents(4)]
    gate.set()
    take(store, 1, [5])
    store._reader.drain()
    store.layer(1).request([5])
    assert evicted == [store._extents(4), store._extents(3)]
    store.close()
