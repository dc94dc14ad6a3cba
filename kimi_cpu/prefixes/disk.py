"""Blocks of latents on disk, shared by all processes that are given the same folder.

A folder has one folder a model, and that one file a block. Files appear and vanish whole, so
processes need no lock; who finds a file gone or damaged computes instead. Nothing is written by
the thread that computes. Least recently used files go first when the folder exceeds its budget;
parents are used with their children, so ends go before beginnings.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kimi_cpu.errors import UsageError
from kimi_cpu.kv_cache import Block, BlockPool
from kimi_cpu.prefixes.blockfile import (
    BlockName,
    DamagedFileError,
    read_block,
    read_tokens,
    write_block,
)

log = logging.getLogger(__name__)

#: Blocks that wait to be written, in bytes; what comes when there are more is not kept.
WAITING_BYTES = 512 << 20
#: After so many files the folder is measured again: other processes write into it, too.
_FILES_BETWEEN_SCANS = 32
#: Files that nobody has finished after this time never will be.
_STALE_S = 3600.0
_TEMPORARY = ".part"
#: What is looked at, and removed, in the folder: others may keep things beside.
_OWN_FOLDER = re.compile(r"[0-9a-f]{32}")
_OWN_TEMPORARY = re.compile(rf"[0-9a-f]{{32}}{re.escape(_TEMPORARY)}")


@dataclass(frozen=True)
class _Waiting:
    name: BlockName
    tokens: bytes
    block: Block


class BlockStore:
    """The blocks of one model on disk.

    Args:
        folder: of all models; made if it is not there, for this user alone, as token ids are text.
        model: the key of the model, see `identity`.
        budget_bytes: all files of the folder together.

    Raises:
        UsageError: the folder cannot be made or read.
    """

    def __init__(self, folder: Path, model: bytes, budget_bytes: int) -> None:
        self._root = folder
        self._model = model
        self._folder = folder / model.hex()
        self._budget_bytes = budget_bytes
        self._children: dict[bytes, dict[bytes, BlockName]] = {}
        self._waiting: dict[bytes, _Waiting] = {}
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._writing = False
        self._complained = False
        self._since_scan = 0
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder.mkdir(mode=0o700, exist_ok=True)
            self._total = self._scan()
        except OSError as error:
            raise UsageError(
                f"{folder}: cannot keep latents here ({error.strerror or error})",
                "give another --cache-dir, or none",
            ) from error
        self._thread = threading.Thread(target=self._work, name="kimi-cpu-latents", daemon=True)
        self._thread.start()

    @property
    def nbytes(self) -> int:
        """Size of all files of the folder, as far as is known."""
        return self._total

    def children(self, parent: bytes) -> list[BlockName]:
        """Blocks that follow the tokens of this digest."""
        with self._changed:
            return list(self._children.get(parent, {}).values())

    def has(self, name: BlockName) -> bool:
        """Whether a block is there, or will be."""
        with self._changed:
            return name.own in self._children.get(name.parent, {})

    def tokens(self, name: BlockName) -> bytes | None:
        """A block's token ids; None if it is gone or damaged."""
        with self._changed:
            waiting = self._waiting.get(name.own)
        if waiting is not None:
            return waiting.tokens
        try:
            return read_tokens(self._path(name), self._model, name)
        except (OSError, DamagedFileError) as error:
            self._lose(name, error)
            return None

    def load(self, name: BlockName, pool: BlockPool) -> Block | None:
        """A block, with one user, the caller; None if it is gone or damaged."""
        with self._changed:
            waiting = self._waiting.get(name.own)
            if waiting is not None:
                waiting.block.pool.share([waiting.block])
                return waiting.block
        path = self._path(name)
        block = pool.take()
        try:
            read_block(path, self._model, name, block)
        except (OSError, DamagedFileError) as error:
            pool.drop([block])
            self._lose(name, error)
            return None
        except BaseException:
            pool.drop([block])
            raise
        with self._changed:  # another process may have written it
            self._children.setdefault(name.parent, {})[name.own] = name
        return block

    def exists(self, name: BlockName) -> bool:
        """Whether there is a file, though this process may not have known of it."""
        return self.has(name) or self._path(name).exists()

    def touch(self, names: list[BlockName]) -> None:
        """Note that the files of these blocks are of use."""
        for name in names:
            with contextlib.suppress(OSError):
                os.utime(self._path(name))

    def save(self, name: BlockName, tokens: bytes, block: Block) -> bool:
        """Write a block, some time, sharing it until then; False if too many are waiting."""
        with self._changed:
            if self._closed:
                return False
            if name.own in self._waiting:
                return True
            if len(self._queue) * block.pool.block_bytes >= max(
                WAITING_BYTES, 2 * block.pool.block_bytes
            ):
                return False
            block.pool.share([block])
            waiting = _Waiting(name, tokens, block)
            self._waiting[name.own] = waiting
            self._queue.append(waiting)
            self._children.setdefault(name.parent, {})[name.own] = name
            self._changed.notify_all()
            return True

    def wait(self, deadline: float) -> bool:
        """Until nothing waits to be written, or `time.monotonic()` reaches the deadline."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._waiting or self._closed, max(deadline - time.monotonic(), 0)
            )

    def room(self, deadline: float) -> bool:
        """Until `save` would take a block, or the deadline."""
        with self._changed:
            return self._changed.wait_for(
                lambda: len(self._queue) < 2, max(deadline - time.monotonic(), 0)
            )

    def close(self) -> None:
        """Write nothing more than the file at hand."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
        self._thread.join()
        for waiting in self._waiting.values():
            waiting.block.pool.drop([waiting.block])
        self._waiting.clear()

    # What follows runs in the writing thread, but for the first scan.

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                waiting = self._queue.popleft()
            written = False
            try:
                written = self._write(waiting)
            except OSError as error:
                if not self._complained:
                    log.warning("cannot keep latents in %s: %s", self._folder, error)
                self._complained = True
            except Exception:
                log.exception("cannot keep latents in %s", self._folder)
            with self._changed:
                if not written:
                    self._children.get(waiting.name.parent, {}).pop(waiting.name.own, None)
                del self._waiting[waiting.name.own]
                self._changed.notify_all()
            waiting.block.pool.drop([waiting.block])

    def _write(self, waiting: _Waiting) -> bool:
        path = self._path(waiting.name)
        if path.exists():
            self.touch([waiting.name])
            return True
        latents = waiting.block.dump(waiting.name.n_tokens)
        if latents.nbytes > self._budget_bytes:
            return False
        temporary = self._folder / f"{secrets.token_hex(16)}{_TEMPORARY}"
        self._total += write_block(
            path, temporary, self._model, waiting.name, waiting.tokens, latents
        )
        self._complained = False
        self._since_scan += 1
        if self._total > self._budget_bytes or self._since_scan >= _FILES_BETWEEN_SCANS:
            self._total = self._scan()
            self._since_scan = 0
            if self._total > self._budget_bytes:
                self._shrink()
        return True

    def _files(self) -> Iterator[tuple[float, int, Path, BlockName | None]]:
        """Time, size, path and name of the files of any model; no name: one being written."""
        for folder in self._root.iterdir():
            if not _OWN_FOLDER.fullmatch(folder.name):
                continue
            with contextlib.suppress(OSError):
                for entry in os.scandir(folder):
                    name = BlockName.parse(entry.name)
                    if name or _OWN_TEMPORARY.fullmatch(entry.name):
                        with contextlib.suppress(OSError):  # gone meanwhile
                            status = entry.stat()
                            yield status.st_mtime, status.st_size, Path(entry.path), name

    def _scan(self) -> int:
        """Find out which blocks of this model there are; the size of all files."""
        total = 0
        children: dict[bytes, dict[bytes, BlockName]] = {}
        for modified, size, path, name in self._files():
            if name is None and time.time() - modified > _STALE_S:
                with contextlib.suppress(OSError):
                    path.unlink()
                continue
            total += size
            if name is not None and path.parent == self._folder:
                children.setdefault(name.parent, {})[name.own] = name
        with self._changed:
            for waiting in self._waiting.values():
                children.setdefault(waiting.name.parent, {})[waiting.name.own] = waiting.name
            self._children = children
        return total

    def _shrink(self) -> None:
        """Remove what was not used for the longest time, a little more than needed."""
        target = self._budget_bytes - self._budget_bytes // 20
        files = [file for file in self._files() if file[-1] is not None]
        for _, size, path, name in sorted(files):
            if self._total <= target:
                return
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            self._total -= size
            if path.parent == self._folder and name is not None:
                with self._changed:
                    self._children.get(name.parent, {}).pop(name.own, None)

    def _path(self, name: BlockName) -> Path:
        return self._folder / name.file_name

    def _lose(self, name: BlockName, error: Exception) -> None:
        """Forget a file that cannot be used; one that is damaged is removed."""
        with self._changed:
            self._children.get(name.parent, {}).pop(name.own, None)
        if isinstance(error, FileNotFoundError):
            return  # another process needed the room
        log.warning("skipped %s: %s", self._path(name), error)
        if isinstance(error, DamagedFileError):
            with contextlib.suppress(OSError):
                self._path(name).unlink()
