"""The threads that read experts.

A `Load` is one expert on its way. Its pieces wait in one of two queues: what a layer needs now is
read before what may be needed soon, and only one thread at a time works on the latter, so that a
demand waits for one small read at most. The threads start with the first load, hold on to nothing
but the queue, and end with the reader.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from kimi_cpu.store.experts.backends import Backend, Piece
from kimi_cpu.store.mapping import gone

#: Enough to keep a drive busy; more only take turns.
IO_THREADS = 4


class Load:
    """One expert on its way into memory.

    Attributes:
        number, slot: which one, and where it goes.
        n_bytes: what is read for it.
        ahead: nobody has asked for it yet.
        done: no more pieces are or will be read, and `result` or `error` is there.
        given_up: before all of it was read; there is no result.
        result: what `finish` made of the bytes.
        error: why not.
    """

    def __init__(
        self, number: int, slot: int, backend: Backend, pieces: Sequence[Piece],
        finish: Callable[[], Any], ahead: bool = False,
    ) -> None:  # fmt: skip
        """finish: called in a reader thread when all bytes are there; its result is kept."""
        self.number = number
        self.slot = slot
        self.n_bytes = sum(piece.length for piece in pieces)
        self.ahead = ahead
        self.done = False
        self.given_up = False
        self.result: Any = None
        self.error: Exception | None = None
        self.backend = backend
        self.pieces = pieces
        self._finish: Callable[[], Any] | None = finish
        self._left = len(pieces)

    def read(self, piece: Piece) -> None:
        """Read a piece, unless another one has failed."""
        if self.error is not None:
            return
        try:
            self.backend.read(piece)
        except OSError as exc:
            self.error = gone(piece.path, exc.strerror or str(exc))

    def count_down(self, pieces: int = 1) -> bool:
        """Some pieces are over; whether they were the last. The queue's lock is held."""
        self._left -= pieces
        return self._left == 0

    def complete(self) -> None:
        """Make the result; without the queue's lock."""
        finish, self._finish = self._finish, None
        if self.error is None and not self.given_up and finish is not None:
            try:
                self.result = finish()
            except Exception as exc:  # of whatever kind: it belongs to the one who waits
                self.error = exc


class _Queue:
    """What the threads share."""

    def __init__(self) -> None:
        lock = threading.Lock()
        self.changed = threading.Condition(lock)  # for the threads
        self.finished = threading.Condition(lock)  # for those who wait for them
        self.demand: deque[tuple[Load, Piece]] = deque()
        self.ahead: deque[tuple[Load, Piece]] = deque()
        self.ahead_running = False
        self.closed = False
        #: Seconds during which at least one thread was reading, and bytes read.
        self.busy_s = 0.0
        self.read_bytes = 0
        self._running = 0
        self._busy_since = 0.0

    def take(self) -> tuple[Load, Piece, bool] | None:
        """The next piece and whether it is one of `ahead`; None when closed."""
        with self.changed:
            while not self.closed:
                low = not self.demand
                if not low or (self.ahead and not self.ahead_running):
                    self.ahead_running |= low
                    load, piece = (self.ahead if low else self.demand).popleft()
                    if self._running == 0:
                        self._busy_since = time.perf_counter()
                    self._running += 1
                    return load, piece, low
                self.changed.wait()
            return None

    def over(self, load: Load, piece: Piece, low: bool) -> bool:
        """A piece was read; whether it was the load's last."""
        with self.changed:
            if low:
                self.ahead_running = False
                if self.ahead:
                    self.changed.notify()
            if load.error is None:
                self.read_bytes += piece.length
            return load.count_down()

    def withdraw(self, loads: Collection[Load]) -> list[tuple[Load, Piece]]:
        """Take the pieces of loads out of the queues; the lock is held."""
        gone = []
        for queue in (self.demand, self.ahead):
            mine = [item for item in queue if item[0] in loads]
            if mine:
                others = [item for item in queue if item[0] not in loads]
                queue.clear()
                queue.extend(others)
                gone += mine
        return gone

    def rest(self) -> None:
        """A thread has nothing more to do with the piece that it took."""
        with self.changed:
            self._running -= 1
            if self._running == 0:
                self.busy_s += time.perf_counter() - self._busy_since
            self.finished.notify_all()

    def is_idle(self) -> bool:
        """Whether nothing is queued or being read; the lock is held."""
        return not (self.demand or self.ahead or self._running)


class Reader:
    """Reads loads in the background."""

    def __init__(self, threads: int = IO_THREADS) -> None:
        self._n_threads = threads
        self._threads: list[threading.Thread] = []
        self._start_anew()

    def submit(self, loads: Sequence[Load]) -> None:
        """Queue loads in this order, behind those of the same urgency."""
        if self._pid != os.getpid():  # a fork: the threads stayed behind
            self._start_anew()
        queue = self._queue
        with queue.changed:
            for load in loads:
                target = queue.ahead if load.ahead else queue.demand
                target.extend((load, piece) for piece in load.pieces)
            queue.changed.notify_all()
        while len(self._threads) < self._n_threads:
            name = f"kimi-cpu-io-{len(self._threads)}"
            thread = threading.Thread(target=_work, args=(queue,), name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def hurry(self, load: Load) -> None:
        """A load that was started ahead is needed now."""
        queue = self._queue
        with queue.changed:
            load.ahead = False
            mine = queue.withdraw([load])
            if mine:
                queue.demand.extend(mine)
                queue.changed.notify_all()

    def give_up(self, loads: Iterable[Load]) -> None:
        """Some loads are not needed after all: read no more of them.

        Pieces that are being read go on to their end.
        """
        queue = self._queue
        with queue.changed:
            for load, n in Counter(load for load, _ in queue.withdraw(set(loads))).items():
                load.given_up = True
                if load.count_down(n):  # else a thread is at one, and says when it is over
                    load.done = True
            queue.finished.notify_all()

    def wait(self, loads: Collection[Load]) -> None:
        """Return when at least one of them is done; ValueError if the reader was closed.

        May be interrupted by Ctrl-C: the loads go on.
        """
        queue = self._queue
        with queue.finished:
            while not any(load.done for load in loads):
                if queue.closed:
                    raise ValueError("the engine is closed")
                queue.finished.wait()

    def drain(self) -> None:
        """Return when nothing is queued or being read."""
        queue = self._queue
        with queue.finished:
            while not queue.closed and not queue.is_idle():
                queue.finished.wait()

    @property
    def busy_s(self) -> float:
        """Seconds in which the disk was at work so far."""
        return self._queue.busy_s

    @property
    def read_bytes(self) -> int:
        """Bytes read so far."""
        return self._queue.read_bytes

    def close(self) -> None:
        """End the threads; pieces that are being read are finished first."""
        _stop(self._queue)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _start_anew(self) -> None:
        self._pid = os.getpid()
        self._queue = _Queue()
        self._threads = []
        weakref.finalize(self, _stop, self._queue).atexit = False


def _stop(queue: _Queue) -> None:
    with queue.changed:
        queue.closed = True
        queue.demand.clear()
        queue.ahead.clear()
        queue.changed.notify_all()
        queue.finished.notify_all()


def _work(queue: _Queue) -> None:
    while (item := queue.take()) is not None:
        load, piece, low = item
        load.read(piece)
        if queue.over(load, piece, low):
            load.complete()
            load.done = True
        queue.rest()
        del item, load, piece  # they would keep a closed store's memory alive while we wait
