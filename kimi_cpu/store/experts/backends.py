"""Two ways to bring an expert's bytes into memory, behind one interface.

`MappedBackend` maps the files: the system's page cache holds the bytes, so a second start finds
them there, and letting go means telling the system so. `DirectBackend` reads past the page cache
into slots of its own: no double bookkeeping, large pages, and less work for the CPU. Which of them
reads faster depends on the disk (`probe`).

Slots are numbered by the store. A slot's bytes may only be touched between the moment when all of
its pieces have been read and `evict`. `read` is called by several threads at once, everything else
by the store alone.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from kimi_cpu.quant import U8
from kimi_cpu.store.direct import ALIGN, HUGE_PAGE, open_past_cache
from kimi_cpu.store.experts import system
from kimi_cpu.store.extents import Extent
from kimi_cpu.store.mapping import gone, map_file

#: How experts are read.
Io = Literal["mmap", "direct"]

#: Bytes that one read asks for. Large ones are faster; small ones let a demand overtake.
PIECE_BYTES = 4 << 20


class Piece(NamedTuple):
    """A read: bytes [offset, offset + length) of `path`, to byte `at` of the slots' memory.

    needed: of `length`, what must be there: the end of a file may come before the end of a block.
    """

    path: Path
    offset: int
    length: int
    needed: int
    at: int


class Backend(ABC):
    """Reads experts.

    Attributes:
        io: "mmap" or "direct".
    """

    io: Io

    @abstractmethod
    def pieces(self, slot: int, extents: Sequence[Extent]) -> list[Piece]:
        """The reads that bring these bytes into a slot. CheckpointError: a file is gone."""

    @abstractmethod
    def read(self, piece: Piece) -> None:
        """Do one of them. Raises OSError: the disk failed, or the file ends too early."""

    @abstractmethod
    def buffers(self, slot: int, extents: Sequence[Extent]) -> list[U8]:
        """The bytes of each extent in the slot, uint8 [length]."""

    @abstractmethod
    def evict(self, slot: int, extents: Sequence[Extent]) -> None:
        """The slot's bytes are not needed any more."""

    @abstractmethod
    def shrink(self, slot: int) -> None:
        """An evicted slot will not be used any more: free its memory."""

    @abstractmethod
    def close(self) -> None:
        """Close the files. Buffers handed out stay valid."""


class _Descriptor:
    """An open file that is closed with its last reference, should nobody have closed it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


#: How files are opened for reading.
_READ = os.O_RDONLY | getattr(os, "O_BINARY", 0)


class _Mapping(NamedTuple):
    file: _Descriptor
    view: U8
    address: int

    @property
    def fd(self) -> int:
        return self.file.fd


class MappedBackend(Backend):
    """Experts in the page cache, populated before they are touched.

    Args:
        mapped: gives a file that is mapped already, uint8 [n]; by default it is mapped here.
    """

    io: Io = "mmap"

    def __init__(self, mapped: Callable[[Path], U8] | None = None) -> None:
        self._mapped = mapped or _map
        self._files: dict[Path, _Mapping] = {}
        self._populates = system.IS_LINUX
        self._scratch = threading.local()
        self._seek_lock = threading.Lock()

    def pieces(self, slot: int, extents: Sequence[Extent]) -> list[Piece]:
        pieces = []
        for path, offset, length in extents:
            if offset + length > len(self._file(path).view):
                raise gone(path, "it is shorter than it was")
            for begin in range(offset, offset + length, PIECE_BYTES):
                n = min(PIECE_BYTES, offset + length - begin)
                pieces.append(Piece(path, begin, n, n, 0))
        return pieces

    def read(self, piece: Piece) -> None:
        file = self._files[piece.path]
        if self._populates:
            # Page faults read what is missing in steps of one page, or else far too much.
            system.read_soon(file.fd, piece.offset, piece.length)
            if system.populate(file.address + piece.offset, piece.length):
                return
            self._populates = False
        self._read_by_hand(file, piece)

    def _read_by_hand(self, file: _Mapping, piece: Piece) -> None:
        """Read the bytes to nowhere, which shows errors as such, then touch their pages."""
        scratch: bytearray | None = getattr(self._scratch, "buffer", None)
        if scratch is None:
            scratch = self._scratch.buffer = bytearray(PIECE_BYTES)
        _read_exactly(file.fd, memoryview(scratch)[: piece.length], piece, self._seek_lock)
        file.view[piece.offset : piece.offset + piece.length : system.PAGE].max()

    def buffers(self, slot: int, extents: Sequence[Extent]) -> list[U8]:
        return [
            self._files[path].view[offset : offset + length] for path, offset, length in extents
        ]

    def evict(self, slot: int, extents: Sequence[Extent]) -> None:
        for path, offset, length in extents:
            file = self._files[path]
            system.unmap_pages(file.address + offset, length)
            system.forget_cached(file.fd, offset, length)

    def shrink(self, slot: int) -> None:
        pass

    def close(self) -> None:
        for file in self._files.values():
            file.file.close()
        self._files.clear()  # the last view unmaps

    def _file(self, path: Path) -> _Mapping:
        file = self._files.get(path)
        if file is None:
            try:
                opened = _Descriptor(os.open(path, _READ))
                view = self._mapped(path)
            except (OSError, ValueError) as exc:
                raise gone(path, getattr(exc, "strerror", None) or str(exc)) from None
            file = self._files[path] = _Mapping(opened, view, view.ctypes.data)
        return file


def _map(path: Path) -> U8:
    """A file as memory whose pages come one by one, uint8 [n]. OSError, ValueError."""
    with path.open("rb") as file:
        view = np.frombuffer(map_file(path, file.fileno()), dtype=np.uint8)
    system.no_readahead(view.ctypes.data, view.nbytes)
    return view


class DirectBackend(Backend):
    """Experts in slots of our own memory, read past the page cache where that is possible.

    Args:
        n_slots: how many experts may be resident.
        slot_bytes: see `slot_bytes_of`.
    """

    io: Io = "direct"

    def __init__(self, n_slots: int, slot_bytes: int) -> None:
        self._slot_bytes = slot_bytes
        self._files: dict[Path, tuple[_Descriptor, bool]] = {}  # and whether past the cache
        self._open_lock = threading.Lock()
        # Pages come when first written; only private ones may be huge and can be given back.
        private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANON}
        memory = mmap.mmap(-1, n_slots * slot_bytes + HUGE_PAGE, **private)
        whole = np.frombuffer(memory, dtype=np.uint8)
        skip = -whole.ctypes.data % HUGE_PAGE
        self._slab: U8 = whole[skip : skip + n_slots * slot_bytes]
        self._address = self._slab.ctypes.data
        self._bytes = memoryview(self._slab)  # type: ignore[arg-type]
        system.use_huge_pages(self._address, self._slab.nbytes)

    def pieces(self, slot: int, extents: Sequence[Extent]) -> list[Piece]:
        pieces = []
        for (path, offset, length), at in zip(extents, self._places(slot, extents), strict=True):
            self._file(path)
            start, end = offset // ALIGN * ALIGN, -(-(offset + length) // ALIGN) * ALIGN
            for begin in range(start, end, PIECE_BYTES):
                n = min(PIECE_BYTES, end - begin)
                needed = min(n, offset + length - begin)
                pieces.append(Piece(path, begin, n, needed, at + begin - start))
        return pieces

    def read(self, piece: Piece) -> None:
        file, past_cache = self._files[piece.path]
        target = self._bytes[piece.at : piece.at + piece.length]
        try:
            _read_exactly(file.fd, target, piece)
        except OSError as exc:
            if exc.errno != errno.EINVAL or not past_cache:
                raise
            # Opened for direct reads, but this file system cannot do this one.
            file, past_cache = self._reopen(piece.path)
            _read_exactly(file.fd, target, piece)
        if not past_cache:
            system.forget_cached(file.fd, piece.offset, piece.length)

    def buffers(self, slot: int, extents: Sequence[Extent]) -> list[U8]:
        result = []
        for (_, offset, length), at in zip(extents, self._places(slot, extents), strict=True):
            begin = at + offset % ALIGN
            result.append(self._slab[begin : begin + length])
        return result

    def evict(self, slot: int, extents: Sequence[Extent]) -> None:
        pass  # the next expert overwrites it

    def shrink(self, slot: int) -> None:
        system.unmap_pages(self._address + slot * self._slot_bytes, self._slot_bytes)

    def close(self) -> None:
        for file, _ in self._files.values():
            file.close()
        self._files.clear()

    def _places(self, slot: int, extents: Sequence[Extent]) -> list[int]:
        """Where the first block of each extent goes, within the slab."""
        places, at = [], slot * self._slot_bytes
        for _, offset, length in extents:
            places.append(at)
            at += -(-(offset + length) // ALIGN) * ALIGN - offset // ALIGN * ALIGN
        assert at <= (slot + 1) * self._slot_bytes, "an expert is larger than its slot"
        return places

    def _file(self, path: Path) -> None:
        if path in self._files:
            return
        try:
            self._files[path] = _open_direct(path)
        except OSError as exc:
            raise gone(path, exc.strerror) from None

    def _reopen(self, path: Path) -> tuple[_Descriptor, bool]:
        with self._open_lock:
            if self._files[path][1]:  # else another thread has done it
                self._files[path] = _Descriptor(os.open(path, _READ)), False
            return self._files[path]


def slot_bytes_of(extents: Sequence[Extent]) -> int:
    """Bytes of a slot of `DirectBackend` that holds these extents."""
    return sum(
        -(-(offset + length) // ALIGN) * ALIGN - offset // ALIGN * ALIGN
        for _, offset, length in extents
    )


def can_read_directly(path: Path) -> bool:
    """Whether the file's system lets us read past the page cache."""
    if sys.platform == "win32":
        return False
    try:
        file, past_cache = _open_direct(path)
        with mmap.mmap(-1, ALIGN) as block:
            os.preadv(file.fd, [block], 0)
    except OSError:
        return False
    return past_cache


def _open_direct(path: Path) -> tuple[_Descriptor, bool]:
    """The open file, and whether its reads go past the page cache."""
    fd = open_past_cache(path, _READ)
    return _Descriptor(os.open(path, _READ) if fd is None else fd), fd is not None


def _read_exactly(
    fd: int, target: memoryview, piece: Piece, seek_lock: threading.Lock | None = None
) -> None:
    """Fill `target` from the file; OSError if less than `piece.needed` bytes come."""
    done = 0
    while done < piece.needed:
        if hasattr(os, "preadv"):
            n = os.preadv(fd, [target[done:]], piece.offset + done)
        else:
            n = _read_at(fd, target[done:], piece.offset + done, seek_lock)
        if n == 0:
            raise OSError(errno.EIO, "the file ends too early")
        done += n


def _read_at(fd: int, target: memoryview, offset: int, lock: Any) -> int:
    """`preadv` for Windows."""
    with lock:
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(target))
    target[: len(data)] = data
    return len(data)
