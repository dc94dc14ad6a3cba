"""The expert store: who is in memory, who is on the way, and who has to go.

A model asks for a layer's experts as soon as its router has spoken (`LayerExperts.request`), does
something else, and takes them as they come (`arrived`). A load's result is put on the layer's
*shelf*, the kernels' table of addresses, and taken off it before its memory is given to another.
Only the thread that runs a pass changes what is resident; reader threads fill memory that nobody
looks at yet.

When everything fits, nothing is ever taken off a shelf, and passes of several threads may run at
once. Otherwise a pass holds `passing()` from its first layer to its last: an expert that one
timeline computes with must not be let go by another.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kimi_cpu.quant import Weight
from kimi_cpu.store.checkpoint import Checkpoint
from kimi_cpu.store.experts.backends import Backend, Io
from kimi_cpu.store.experts.budget import Budget
from kimi_cpu.store.experts.policy import Frequency
from kimi_cpu.store.experts.reader import Load, Reader
from kimi_cpu.store.experts.simulation import Recorder
from kimi_cpu.store.experts.stats import ExpertStats
from kimi_cpu.store.experts.trunk import ResidentTrunk
from kimi_cpu.store.extents import Extent

Expert = tuple[Weight, Weight, Weight]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]

#: Experts of the next layer that are loaded ahead at a time.
_LOOKAHEAD = 4
#: The last so many decide whether loading ahead pays ...
_JUDGED = 96
#: ... and so many must have been of use. One that is takes a whole read out of a wait; one that
#: is not makes a demand wait for a piece of it and sends the least wanted expert away.
_LEAST_USEFUL = 1 / 3
#: After so many tokens without, it gets another chance.
_RETRY_TOKENS = 512

#: Positions in `ExpertStore.counters`.
USES, HITS = 0, 1


class Shelf(Protocol):
    """Where a layer's resident experts lie ready for the kernels (their `ExpertTable`)."""

    def put(self, expert: int, weights: Expert) -> None:
        """This expert may be used from now on."""

    def take(self, expert: int) -> None:
        """It may not be used any more."""


class LayerExperts:
    """One layer's experts, as its kernels ask for them.

    Attributes:
        scores, frequencies: float64 [E], the policy's numbers of this layer's experts.
        state: float64 [2], see `policy.Frequency`.
        counters: int64 [2], uses and hits of the whole store.
        chosen: int32 [K], what the last pass of one token chose here.
        shelf: where its experts are put, once there is one.
    """

    def __init__(self, store: ExpertStore, layer: int, first: int) -> None:
        """first: the store's number of expert 0. Use `ExpertStore.layer`."""
        self._store = store
        self.layer = layer
        self.first = first
        own = slice(first, first + store.n_experts)
        self.scores: F64 = store.policy.scores[own]
        self.frequencies: F64 = store.policy.frequencies[own]
        self.state: F64 = store.policy.state
        self.counters: I64 = store.counters
        self.chosen: I32 = store.chosen[first // store.n_experts]
        self.shelf: Shelf | None = None

    def put_on(self, shelf: Shelf) -> None:
        """Experts of this layer go to `shelf`: those that are here now, and all later ones."""
        self._store.attach(self, shelf)

    def count(self, ids: I32) -> None:
        """A router chose: int32 [T, K]. Compiled code does this itself for T = 1."""
        self._store.count(self, ids)

    def request(self, ids: Collection[int]) -> None:
        """Start reading those that are missing; returns at once. Raises CheckpointError.

        Of more than a token needs only the first: `sweep` goes on from there.
        """
        self._store.request(self, ids)

    def arrived(self, ids: Sequence[int]) -> list[int]:
        """Those of the requested experts that are resident; waits until it is at least one.

        Raises CheckpointError (the disk failed, a file was cut off, a scale is not finite) and
        KeyboardInterrupt; nothing is lost by either.
        """
        return self._store.arrived(self, ids)

    def sweep(self, ids: Collection[int]) -> Iterator[list[int]]:
        """All of `ids` by rising number in groups, each resident while it is handed out.

        Meanwhile the next ones are read. In a repacked checkpoint that is their order in the
        files. The memory of a group may be reused as soon as the next one is asked for.
        """
        return self._store.sweep(self, ids)

    def anticipate(self, ids: Sequence[int]) -> None:
        """This layer, the next one, may want these (best first): read some when the disk is free.

        Called when the router of the layer before, if that has one, has spoken.
        """
        self._store.anticipate(self, ids)


class ExpertStore:
    """Owns the routed experts of one checkpoint.

    Args:
        checkpoint: where they are.
        backend: how they are read; its slots are the store's.
        budget: how many may be resident.
        lookahead: whether loading ahead may be tried.
        recorder: writes down what the routers choose.
        trunk: is closed with the store.

    Attributes:
        n_experts, top_k: of a layer, of a token.
        looks_ahead: int64 [1], 1 while loading ahead is worth it, for compiled code to see.
    """

    def __init__(
        self, checkpoint: Checkpoint, backend: Backend, budget: Budget, *, lookahead: bool = True,
        recorder: Recorder | None = None, trunk: ResidentTrunk | None = None,
    ) -> None:  # fmt: skip
        config = checkpoint.config
        self.n_experts, self.top_k = config.n_routed_experts, config.num_experts_per_tok
        self._checkpoint = checkpoint
        self._backend = backend
        self._budget = budget
        self._recorder = recorder
        self._trunk = trunk
        self._reader = Reader()
        layers = config.moe_layers
        total = len(layers) * self.n_experts
        self.policy = Frequency(total)
        self.counters: I64 = np.zeros(2, dtype=np.int64)
        self.chosen: I32 = np.zeros((len(layers), self.top_k), dtype=np.int32)
        self._layers = {
            layer: LayerExperts(self, layer, i * self.n_experts) for i, layer in enumerate(layers)
        }
        self._numbers_of = list(self._layers)
        self._latent_bytes = 0
        self._capacity = budget.slots(0)
        self.bounded = self._capacity < total
        self._lookahead = lookahead and self.bounded
        self.looks_ahead: I64 = np.array([int(self._lookahead)], dtype=np.int64)

        # A number's slot or -1. Everything else about residency follows from it and the loads.
        self._slot_of = np.full(total, -1, dtype=np.int64)
        self._n_slots = self._capacity
        self._free = list(range(self._n_slots - 1, -1, -1))
        self._retired: set[int] = set()  # slots given up for latents
        self._loads: dict[int, Load] = {}
        self._protected: set[int] = set()  # what the layer at hand computes with
        self._whole = True  # false after an exception in the middle of a change
        self._lock = threading.RLock()
        self._pass_lock = threading.RLock()

        self._guessed: set[int] = set()  # numbers loaded ahead whose router has not spoken yet
        self._useful: deque[bool] = deque(maxlen=_JUDGED)
        self._retry_at = 0
        self._tokens = self._ahead = self._ahead_used = self._ahead_hits = 0
        self._wait_s = 0.0
        self._routes: list[I32 | None] = [None] * len(layers)

    def layer(self, layer: int) -> LayerExperts:
        """The experts of a layer, by the layer's number in the model."""
        return self._layers[layer]

    @property
    def io(self) -> Io:
        """How experts are read."""
        return self._backend.io

    @property
    def memory(self) -> int:
        """The budget in bytes."""
        return self._budget.total_bytes

    @property
    def latent_bytes(self) -> int:
        """What of it is set aside for latents that are kept."""
        return self._budget.latent_bytes

    @property
    def records(self) -> bool:
        """Whether what the routers choose is written down."""
        return self._recorder is not None

    @property
    def capacity(self) -> int:
        """Experts that may be resident now."""
        return self._capacity

    @property
    def resident(self) -> int:
        """Experts that are resident or on the way."""
        return int((self._slot_of >= 0).sum()) + len(self._loads)

    @property
    def expert_bytes(self) -> float:
        """Of one expert, on average."""
        return self._checkpoint.expert_bytes / max(len(self._slot_of), 1)

    def spare_bytes(self, latent_bytes: int) -> int:
        """What a pass may take beside so many bytes of latents; a token's experts stay."""
        if not self.bounded:
            return 1 << 62
        kept = self.top_k * self._budget.slot_bytes
        beside = self._budget.beside_experts(latent_bytes)
        return max(self._budget.expert_bytes - beside - kept, 0)

    def stats(self) -> ExpertStats:
        """What has happened so far."""
        return ExpertStats(
            tokens=self._tokens, uses=int(self.counters[USES]), hits=int(self.counters[HITS]),
            read_bytes=self._reader.read_bytes, wait_s=self._wait_s, disk_s=self._reader.busy_s,
            ahead=self._ahead, ahead_used=self._ahead_used, ahead_hits=self._ahead_hits,
        )  # fmt: skip

    @contextmanager
    def passing(self, n_tokens: int, latent_bytes: int) -> Iterator[None]:
        """A forward pass of n tokens, beside so many bytes of latents.

        Raises LowMemoryError if the latents leave too little memory for a layer's experts, and
        CheckpointError if a file was cut off.
        """
        self._checkpoint.check_files()
        if not self.bounded and self._recorder is None:
            with self._abandoning():
                yield
            self._tokens += n_tokens
            return
        with self._pass_lock:
            if self.bounded and latent_bytes != self._latent_bytes:
                self._make_room(latent_bytes)
            self._routes = [None] * len(self._layers)
            with self._abandoning():
                yield
            self._tokens += n_tokens
            self.policy.tick(n_tokens)
            if self._recorder is not None:
                self._record(self._recorder)
            if self._lookahead and not self.looks_ahead[0] and self._tokens >= self._retry_at:
                self._useful.clear()
                self.looks_ahead[0] = 1

    def close(self) -> None:
        """End the threads and close the files. Weights handed out stay valid."""
        self._reader.close()
        self._backend.close()
        if self._trunk is not None:
            self._trunk.close()
        if self._recorder is not None:
            self._recorder.close()
        # Circles of references would keep gigabytes until the garbage collector finds them.
        for layer in self._layers.values():
            layer.shelf = None
        self._layers.clear()

    # What follows is LayerExperts' side of it; numbers are those of the whole store.

    def attach(self, layer: LayerExperts, shelf: Shelf) -> None:
        with self._changing():
            layer.shelf = shelf
            for number in range(layer.first, layer.first + self.n_experts):
                slot = int(self._slot_of[number])
                if slot >= 0:
                    shelf.put(number - layer.first, self._weights(number, slot))

    def count(self, layer: LayerExperts, ids: I32) -> None:
        experts, times = np.unique(ids, return_counts=True)
        numbers = experts.astype(np.int64) + layer.first
        for number, n in zip(numbers.tolist(), times.tolist(), strict=True):
            self.policy.use(number, n)
        self.counters[USES] += len(numbers)
        self.counters[HITS] += int((self._slot_of[numbers] >= 0).sum())
        if len(ids) == 1:
            layer.chosen[:] = ids[0]
        elif self._recorder is not None:
            self._routes[layer.first // self.n_experts] = ids.copy()

    def request(self, layer: LayerExperts, ids: Collection[int]) -> None:
        wanted = {layer.first + int(e) for e in ids}
        if self._lookahead:
            self._judge(wanted)
        if len(wanted) > self.top_k:
            self._read_on(layer, sorted(ids), ())
            return
        with self._changing():
            self._protected = wanted
            self._publish()
            late = self._begin(sorted(wanted), wanted)
            while late:
                self._wait_for_slot()
                late = self._begin(late, wanted)

    def arrived(self, layer: LayerExperts, ids: Sequence[int]) -> list[int]:
        begin = None
        while True:
            with self._changing():
                self._publish()
                here = [e for e in ids if self._slot_of[layer.first + e] >= 0]
                loads = [self._loads.get(layer.first + e) for e in ids]
            if here or not ids:
                if begin is not None:
                    self._wait_s += time.perf_counter() - begin
                return here
            waiting = [load for load in loads if load is not None]
            if not waiting:  # nobody asked, or another thread got the error of this load
                self.request(layer, ids)
                continue
            begin = begin or time.perf_counter()
            self._reader.wait(waiting)

    def sweep(self, layer: LayerExperts, ids: Collection[int]) -> Iterator[list[int]]:
        left, group = sorted(ids), list[int]()
        while left or group:
            self._read_on(layer, left, group)
            if group:
                yield group
            group = []
            if left:
                self.arrived(layer, left[:1])
                missing = self._missing(layer, left)
                # While some are missing, slots must become free for them: by small groups.
                group = left[: min(left.index(missing[0]), self._few)] if missing else left
                left = left[len(group) :]

    def anticipate(self, layer: LayerExperts, ids: Sequence[int]) -> None:
        if not self.looks_ahead[0]:
            return
        if self._guessed:  # nobody asked: all that their layer chose was there
            self._judge(self._last_choice(min(self._guessed) // self.n_experts))
        with self._changing():
            self._publish()
            room = min(_LOOKAHEAD, self._capacity - 2 * self.top_k)
            room -= sum(load.ahead for load in self._loads.values())
            # A router whose logits are not finite may choose one twice; the pass then fails.
            numbers = list(dict.fromkeys(layer.first + int(e) for e in ids))
            kept = self._protected.union(numbers)
            if layer.first:  # the layer before is computing, even if it had to ask for nothing
                kept.update(self._last_choice(layer.first // self.n_experts - 1))
            absent = [n for n in numbers if self._slot_of[n] < 0 and n not in self._loads]
            slots = self._free_slots(min(room, len(absent)), kept)
            new = [self._start(*one, ahead=True) for one in zip(absent, slots, strict=False)]
            self._reader.submit(new)
            self._ahead += len(new)
            self._guessed = {load.number for load in new}

    # Inside.

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """The lock of all that describes residency; mends it if a Ctrl-C came in between."""
        with self._lock:
            if not self._whole:
                self._mend()
            self._whole = False
            yield
            self._whole = True

    @contextmanager
    def _abandoning(self) -> Iterator[None]:
        """A pass that is broken off wants no more of what it asked for, perhaps hundreds."""
        try:
            yield
        except BaseException:
            with self._changing():
                self._reader.give_up(self._loads.values())
            raise

    def _mend(self) -> None:
        """Work out anew what a change that was broken off left half done."""
        self._reader.give_up(self._loads.values())
        self._reader.drain()
        for number, load in list(self._loads.items()):
            if not load.done:
                del self._loads[number]  # only a part of it was ever queued
        used = {load.slot for load in self._loads.values()} | self._retired
        for number in np.flatnonzero(self._slot_of >= 0).tolist():
            slot = int(self._slot_of[number])
            if slot in used or number in self._loads:
                self._slot_of[number] = -1
                self._take_off(number)
            else:
                used.add(slot)
                self._put(number, self._weights(number, slot))
        for number in np.flatnonzero(self._slot_of < 0).tolist():
            self._take_off(number)
        self._free = [slot for slot in range(self._n_slots - 1, -1, -1) if slot not in used]
        self.policy.reset(np.flatnonzero(self._slot_of >= 0).tolist())

    def _publish(self) -> None:
        """Make resident what the readers have finished; raise the first error among demands."""
        error = None
        for number, load in list(self._loads.items()):
            if not load.done:
                continue
            if load.error is None and not load.given_up:
                self._slot_of[number] = load.slot
                self.policy.admit(number)
                self._put(number, load.result)
            else:
                self._backend.evict(load.slot, self._extents(number))
                self._free.append(load.slot)
                if not load.ahead:
                    error = error or load.error
            del self._loads[number]
        if error is not None:
            raise error

    def _start(self, number: int, slot: int, ahead: bool = False) -> Load:
        """A load of this expert into this slot, to be submitted."""
        assert number not in self._loads, "a second load would lose the slot of the first"
        extents = self._extents(number)
        load = Load(
            number, slot, self._backend, self._backend.pieces(slot, extents),
            lambda: self._weights(number, slot), ahead,
        )  # fmt: skip
        self._loads[number] = load
        return load

    def _wait_for_slot(self) -> None:
        """All slots are being read into; one that nobody needs now has to be finished."""
        others = [load for number, load in self._loads.items() if number not in self._protected]
        if not others:
            raise RuntimeError(f"{self._capacity} slots do not hold {len(self._protected)}")
        self._reader.wait(others)
        self._publish()

    def _free_slots(self, n: int, protected: Collection[int]) -> list[int]:
        """Up to n slots that are free or held by the least wanted experts outside `protected`."""
        slots = [self._free.pop() for _ in range(min(n, len(self._free)))]
        victims = self.policy.evict_some(n - len(slots), protected)
        return slots + [self._evict(victim) for victim in victims]

    def _evict(self, number: int) -> int:
        """Let a resident expert go, which the policy has counted as gone; its slot."""
        slot = int(self._slot_of[number])
        self._take_off(number)
        self._slot_of[number] = -1
        self._backend.evict(slot, self._extents(number))
        return slot

    def _make_room(self, latent_bytes: int) -> None:
        """Adapt the number of slots to the latents."""
        self._budget.check(latent_bytes)
        with self._changing():
            self._publish()
            self._protected = set()
            self._capacity = min(self._budget.slots(latent_bytes), self._n_slots)
            while (surplus := self._n_slots - len(self._retired) - self._capacity) > 0:
                for slot in self._free_slots(surplus, ()):
                    self._retired.add(slot)
                    self._backend.shrink(slot)
                    surplus -= 1
                if surplus:
                    self._wait_for_slot()
            while self._n_slots - len(self._retired) < self._capacity:
                self._free.append(self._retired.pop())
            self._latent_bytes = latent_bytes

    def _missing(self, layer: LayerExperts, ids: Sequence[int]) -> list[int]:
        """Those that are not resident, in the order given."""
        return [e for e in ids if self._slot_of[layer.first + e] < 0]

    def _read_on(self, layer: LayerExperts, ids: Sequence[int], group: Collection[int]) -> None:
        """Start reading of the missing ones what slots can be found for beside `group`.

        Others of `ids` are let go for the first few alone, and only if the very next is missing.
        """
        with self._changing():
            self._publish()
            missing = self._missing(layer, ids)
            soon = [layer.first + e for e in missing[: self._capacity - len(group)]]
            self._protected = {*soon, *(layer.first + e for e in group)}
            self._begin(soon, self._protected | {layer.first + e for e in ids})
            if missing and missing[0] == ids[0]:
                self._begin(soon[: self._few], self._protected)

    def _begin(self, numbers: Iterable[int], protected: Collection[int]) -> list[int]:
        """Start or hurry the reading of those that are not resident.

        As many as there are slots for that are free or held by others than `protected`; returns
        the rest.
        """
        absent = [number for number in numbers if self._slot_of[number] < 0]
        for load in map(self._loads.get, absent):
            if load is not None and load.ahead:
                self._reader.hurry(load)
        new = [number for number in absent if number not in self._loads]
        slots = self._free_slots(len(new), protected)
        self._reader.submit(list(map(self._start, new, slots)))
        return new[len(slots) :]

    def _judge(self, wanted: Collection[int]) -> None:
        """A router has spoken: give up what was loaded ahead in vain, and draw conclusions.

        What is not read yet of a wrong guess would keep the disk busy while it could read the next
        layer's, and make a run read a fifth more than it needs.
        """
        guessed, self._guessed = self._guessed, set()
        if not guessed:
            return
        right = guessed.intersection(wanted)
        with self._changing():
            wrong = [self._loads[n] for n in guessed - right if n in self._loads]
            self._reader.give_up([load for load in wrong if load.ahead])
            for number in right:
                load = self._loads.get(number)
                in_time = load is not None and load.done and load.error is None
                self.counters[HITS] += in_time  # the router's own count saw only shelves
                self._ahead_hits += in_time or self._slot_of[number] >= 0
        self._useful.extend(number in right for number in guessed)
        self._ahead_used += len(right)
        if len(self._useful) == _JUDGED and sum(self._useful) < _LEAST_USEFUL * _JUDGED:
            self.looks_ahead[0] = 0
            self._retry_at = self._tokens + _RETRY_TOKENS

    def _last_choice(self, index: int) -> list[int]:
        """The numbers that the last pass of one token chose in the store's index-th layer."""
        numbers: list[int] = (self.chosen[index] + index * self.n_experts).tolist()
        return numbers

    def _record(self, recorder: Recorder) -> None:
        """Write down the tokens that passed all layers: of a prompt that is the last one."""
        routes = [
            one[None] if several is None else several
            for one, several in zip(self.chosen, self._routes, strict=True)
        ]
        through = min(map(len, routes))
        recorder.tokens(np.stack([ids[-through:] for ids in routes], axis=1))

    @property
    def _few(self) -> int:
        """Experts of a sweep that are computed with at a time."""
        return max(min(self._capacity // 2, self.top_k), 1)

    def _layer_of(self, number: int) -> LayerExperts:
        return self._layers[self._numbers_of[number // self.n_experts]]

    def _place(self, number: int) -> tuple[int, int]:
        """(layer in the model, expert)."""
        index, expert = divmod(number, self.n_experts)
        return self._numbers_of[index], expert

    def _extents(self, number: int) -> list[Extent]:
        return self._checkpoint.expert_extents(*self._place(number))

    def _weights(self, number: int, slot: int) -> Expert:
        """Views on the bytes of a slot; the first time they are checked."""
        buffers = self._backend.buffers(slot, self._extents(number))
        return self._checkpoint.expert_from(*self._place(number), buffers)

    def _put(self, number: int, weights: Expert) -> None:
        shelf = self._layer_of(number).shelf
        if shelf is not None:
            shelf.put(number % self.n_experts, weights)

    def _take_off(self, number: int) -> None:
        shelf = self._layer_of(number).shelf
        if shelf is not None:
            shelf.take(number % self.n_experts)
