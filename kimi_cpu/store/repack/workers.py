"""Threads that make and check pieces: reading, computing and writing overlap."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from isal.isal_zlib import crc32

from kimi_cpu import hardware
from kimi_cpu.store.repack import convert
from kimi_cpu.store.repack.convert import Kernels
from kimi_cpu.store.repack.files import Files, Scratch, TensorReader
from kimi_cpu.store.repack.make import check_piece, make_piece
from kimi_cpu.store.repack.plan import Layout, Piece, worker_bytes
from kimi_cpu.store.repack.progress import Done

#: Items that are waiting for a thread: enough to go on while the caller waits for the disk.
_QUEUE = 64

#: More threads than these only cost memory (50 MB each): the disk is busy.
_MAX_THREADS = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_threads() -> int:
    """Two more than cores, as some are waiting for the disk; at most 8."""
    return min(hardware.default_threads() + 2, _MAX_THREADS)


def in_threads(
    pool: ThreadPoolExecutor, job: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """What `job` gives for each item, as it comes.

    An error ends it: what others complete meanwhile is still given, then the error is raised.
    """
    queue = iter(items)
    running: set[Future[Result]] = set()
    failed: Future[Result] | None = None
    try:
        while failed is None:
            for item in islice(queue, _QUEUE - len(running)):
                running.add(pool.submit(job, item))
            if not running:
                return
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            failed = next((future for future in finished if future.exception()), None)
            if failed is not None:
                finished |= {future for future in running if not future.cancel()}
                wait(finished)
            yield from (future.result() for future in finished if not future.exception())
        failed.result()
    finally:
        for future in running:
            future.cancel()
        wait(running)


class _Worker:
    """What one thread works with."""

    def __init__(self, layout: Layout, write: bool) -> None:
        self.scratch = Scratch(worker_bytes(layout))
        self.source = Files()
        self.target = Files(write)
        self.reader = TensorReader(layout.source, self.source, self.scratch)

    def close(self) -> None:
        self.source.close()
        self.target.close()


class Workers:
    """A team of threads on the pieces of one folder.

    Args:
        layout: where pieces belong.
        folder: the folder that holds, or will hold, the packed checkpoint.
        threads: how many.
        write: whether pieces are written, not only read.
        kernels: what computes the bytes to write.
    """

    def __init__(
        self,
        layout: Layout,
        folder: Path,
        threads: int,
        write: bool,
        kernels: Kernels = convert,
    ) -> None:
        self._layout = layout
        self._folder = folder
        self._write = write
        self._kernels = kernels
        self._local = threading.local()
        self._all: list[_Worker] = []
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="repack")

    def make(self, pieces: Iterable[Piece]) -> Iterator[Done]:
        """Write pieces, and give each as it is written (though not yet safely on the disk).

        Raises CheckpointError for a bad source, OSError; then, as when the caller stops early,
        pieces in work are completed but not given.
        """
        return in_threads(self._pool, self._make, pieces)

    def check(self, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, bool, Done]]:
        """Read pieces back: (piece, whether it equals the source, what was found)."""
        return in_threads(self._pool, self._check, pieces)

    def release_files(self) -> None:
        """Close all files, so that they can be deleted. Nothing may be running."""
        for worker in self._all:
            worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        self.release_files()

    def _worker(self) -> _Worker:
        worker: _Worker | None = getattr(self._local, "worker", None)
        if worker is None:
            worker = self._local.worker = _Worker(self._layout, self._write)
            self._all.append(worker)
        worker.reader.clear()
        return worker

    def _make(self, piece: Piece) -> Done:
        worker = self._worker()
        data, deviation = make_piece(
            self._layout, piece, worker.reader, worker.scratch, self._kernels
        )
        worker.target.write(self._folder / piece.file, piece.offset, data)
        return Done(piece.file, piece.offset, piece.length, crc32(data.data), deviation)

    def _check(self, piece: Piece) -> tuple[Piece, bool, Done]:
        worker = self._worker()
        path = self._folder / piece.file
        worker.target.forget(path, piece.offset, piece.length)  # so that the disk is asked
        data = worker.target.read(path, piece.offset, piece.length, worker.scratch)
        equal, deviation = check_piece(self._layout, piece, data, worker.reader)
        found = Done(piece.file, piece.offset, piece.length, crc32(data.data), deviation)
        return piece, equal, found
