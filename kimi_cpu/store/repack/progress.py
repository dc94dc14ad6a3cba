"""What is done of a repacking: kept beside the result, so that a killed one can go on.

The folder `.unfinished` in the unfinished result holds `state.json` (source and options), the
headers of the source's shards (which may be deleted as they are repacked), and `journal`, one line
for each piece whose bytes are safely on the disk. A line cut off by a crash is ignored, and its
piece written again. When the source comes from a hub, `hub.json` says from where.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from kimi_cpu.config.reader import load_json_object
from kimi_cpu.errors import UsageError, UserError
from kimi_cpu.store.repack.convert import Deviation
from kimi_cpu.store.repack.plan import Piece
from kimi_cpu.store.repack.source import Header

#: In the unfinished folder, for as long as it is unfinished.
WORK_NAME = ".unfinished"
_STATE, _JOURNAL, _HEADERS, _LOCK = "state.json", "journal", "headers", "lock"
_BEGIN_ANEW = "Delete that folder to begin anew, or give the same options and source as before."


class Done(NamedTuple):
    """A piece that is on the disk."""

    file: str
    offset: int
    length: int
    crc32: int
    deviation: Deviation


def write_atomically(path: Path, data: bytes) -> None:
    """A file that is there with all of `data`, or not at all, whatever happens. OSError."""
    part = path.with_name(path.name + ".tmp")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make new names in a folder durable, where the system can."""
    if os.name != "posix":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Lock:
    """Held by one process at a time; the system frees it when the process ends, however it ends."""

    def __init__(self, path: Path) -> None:
        """Raises UserError if another process holds it."""
        self._file = path.open("ab")
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(self._file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
            else:
                import fcntl

                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise UserError(
                f"{path.parent.parent}: another kimi-cpu is writing here", "Wait until it is done."
            ) from None

    def release(self) -> None:
        """Let go."""
        self._file.close()


class Progress:
    """The state of one repacking, read and written.

    Attributes:
        folder: the unfinished result.
        work: its folder of what is only needed until it is finished.
        done: pieces on the disk, by (file, offset).
    """

    def __init__(self, target: Path) -> None:
        """Find what there is of `target`.

        Raises UsageError if it cannot be made, because something else is there.
        """
        # Killed between getting its name and getting rid of `.unfinished`: still unfinished.
        named = (target / WORK_NAME / _STATE).exists()
        self.folder = target if named else target.with_name(target.name + ".partial")
        self.done: dict[tuple[str, int], Done] = {}
        self._target = target
        self.work = self.folder / WORK_NAME
        self._journal: BinaryIO | None = None
        self._lock: Lock | None = None
        if not named:
            _check_free(target)
        if self.folder.exists() and not self.work.is_dir():
            raise UsageError(
                f"{self.folder}: is in the way and was not made by kimi-cpu",
                "Move it away, or give another destination.",
            )

    @property
    def pin(self) -> Path:
        """The file that says which repository and commit a download is of."""
        return self.work / "hub.json"

    @property
    def is_local(self) -> bool:
        """Whether it was begun from a source on the disk."""
        return (self.work / _STATE).exists() and not self.pin.exists()

    @property
    def source_folder(self) -> Path:
        """Where a source that is only passing through is kept."""
        return self.work / "source"

    def header(self, name: str) -> Header | None:
        """The header of a shard as it was when repacking began, if that was saved."""
        path = self.work / _HEADERS / name
        if not path.is_file():
            return None
        data = path.read_bytes()
        return Header(data[8:], int.from_bytes(data[:8], "little"))

    def load(self, state: Mapping[str, Any], pieces: Iterable[Piece]) -> None:
        """Take up what was done before, if anything.

        Args:
            state: JSON values that tell this repacking from another.
            pieces: all that there are; others in the journal are forgotten.

        Raises UsageError if what was done before had another state.
        """
        path = self.work / _STATE
        if not path.exists():
            return
        found = load_json_object(path, UserError, _BEGIN_ANEW)
        for key, value in state.items():
            if found.get(key) != json.loads(json.dumps(value)):
                raise UsageError(
                    f"{self.folder}: was begun with another {key.replace('_', ' ')}", _BEGIN_ANEW
                )
        lengths = {(piece.file, piece.offset): piece.length for piece in pieces}
        sizes: dict[str, int] = {}
        for done in _read_journal(self.work / _JOURNAL):
            file = self.folder / done.file
            if done.file not in sizes:
                sizes[done.file] = file.stat().st_size if file.is_file() else 0
            there = sizes[done.file] >= done.offset + done.length
            if there and lengths.get((done.file, done.offset)) == done.length:
                self.done[done.file, done.offset] = done

    def begin(self, state: Mapping[str, Any], headers: Mapping[str, Header]) -> None:
        """Make the folder and lock it, or go on in it. OSError, UserError."""
        (self.work / _HEADERS).mkdir(parents=True, exist_ok=True)
        self._lock = Lock(self.work / _LOCK)
        if not (self.work / _STATE).exists():
            for name, header in headers.items():
                data = header.n_bytes.to_bytes(8, "little") + header.encoded
                write_atomically(self.work / _HEADERS / name, data)
            write_atomically(self.work / _STATE, json.dumps(state).encode())
        # Only what `load` accepted: later runs must not take a piece of a lost file for done.
        path = self.work / _JOURNAL
        write_atomically(path, b"".join(map(_line, self.done.values())))
        self._journal = path.open("ab")

    def record(self, pieces: Iterable[Done]) -> None:
        """Write down pieces that are safely on the disk. OSError."""
        assert self._journal is not None
        pieces = list(pieces)
        self._journal.write(b"".join(map(_line, pieces)))
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self.done.update({(piece.file, piece.offset): piece for piece in pieces})

    def close(self) -> None:
        """Let go of the files and the lock."""
        if self._journal is not None:
            self._journal.close()
        if self._lock is not None:
            self._lock.release()

    def publish(self) -> None:
        """Give the complete folder its name, then get rid of `.unfinished`. OSError."""
        self.close()
        if self.folder != self._target:
            if self._target.is_dir():
                self._target.rmdir()  # it is empty
            self.folder.rename(self._target)
            sync_folder(self._target.parent)
        work = self._target / WORK_NAME
        (work / _STATE).unlink(missing_ok=True)  # from here on it is finished
        shutil.rmtree(work)


def _check_free(target: Path) -> None:
    """Raise UsageError unless a folder can be made at `target`."""
    hint = "Give the name of a new folder."
    if target.is_dir():
        shutil.rmtree(target / WORK_NAME, ignore_errors=True)  # left by a kill at the very end
        if any(target.iterdir()):
            raise UsageError(f"{target}: is there already and not empty", hint)
        if target.is_mount():
            raise UsageError(f"{target}: is where a disk is mounted", f"{hint[:-1]} on it.")
    elif target.exists() or target.is_symlink():
        raise UsageError(f"{target}: is there already", hint)


def _line(piece: Done) -> bytes:
    return json.dumps(piece).encode() + b"\n"


def _read_journal(path: Path) -> Iterator[Done]:
    """The whole lines of a journal."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                name, offset, length, crc32, deviation = json.loads(line)
                done = Done(name, offset, length, crc32, Deviation(*deviation))
            except (ValueError, TypeError):
                return
            if not line.endswith(b"\n"):
                return
            yield done
