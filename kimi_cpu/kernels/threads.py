"""Persistent worker threads that share out ranges of rows.

Kernels release the GIL and write disjoint rows, and a row's result does not depend on the range
it is computed in, so outputs are the same for any number of threads. Several Python threads may
use the pool at once: each waits for its own ranges only. (Numba's `prange` is avoided: its
default scheduler aborts the process when two threads enter it.)
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
from collections.abc import Callable
from typing import Any

#: Below this many bytes of weights (or comparable work) waking a thread costs more than it saves.
MIN_PARALLEL_COST = 400_000
#: Ranges a thread, so that a thread that the system holds up does not hold up the others.
CHUNKS_PER_THREAD = 4

_Job = Callable[[], None]


class _Pool:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._workers = 0
        self._pid = os.getpid()

    def submit(self, job: _Job, copies: int) -> None:
        """Let up to `copies` workers run job; missing workers are started."""
        if self._workers < copies or self._pid != os.getpid():
            self._grow(copies)
        for _ in range(copies):
            self._jobs.put(job)

    def _grow(self, n: int) -> None:
        with self._lock:
            if self._pid != os.getpid():  # a fork has no threads but this one
                self._jobs, self._workers, self._pid = queue.SimpleQueue(), 0, os.getpid()
            while self._workers < n:
                threading.Thread(
                    target=_work, args=(self._jobs,), name="kimi-cpu-kernel", daemon=True
                ).start()
                self._workers += 1


def _work(jobs: queue.SimpleQueue[_Job]) -> None:
    while True:
        job = jobs.get()
        job()
        del job  # and with it the arrays it keeps alive


_POOL = _Pool()


def run(
    kernel: Callable[..., Any],
    args: tuple[Any, ...],
    keep: tuple[Any, ...],
    total: int,
    grain: int,
    threads: int,
    cost: int,
) -> None:
    """kernel(*args, start, stop) over ranges that cover 0 .. total.

    Ranges start at multiples of grain. cost is about the bytes read: small work runs at once in
    the calling thread. keep holds the arrays whose addresses are in args: a worker may still be
    writing when Ctrl-C makes this function return early, so each holds them until it is done.
    An exception in any range is raised here, after all have ended.
    """
    grains = -(-total // grain)
    if threads <= 1 or cost < MIN_PARALLEL_COST or grains < 2:
        kernel(*args, 0, total)
        return
    chunks = min(grains, threads * CHUNKS_PER_THREAD)
    claims = itertools.count()  # next() is atomic
    done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def share(_keep: tuple[Any, ...] = keep) -> None:
        while (chunk := next(claims)) < chunks:
            start, stop = chunk * grains // chunks, (chunk + 1) * grains // chunks
            try:
                kernel(*args, start * grain, min(stop * grain, total))
            except BaseException as error:
                done.put(error)
            else:
                done.put(None)

    _POOL.submit(share, min(threads, chunks) - 1)
    share()
    errors = [error for _ in range(chunks) if (error := done.get()) is not None]
    if errors:
        raise errors[0]
