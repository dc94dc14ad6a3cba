"""Reading and writing at offsets, a thread at a time, past the page cache where that is possible.

Hundreds of gigabytes that are read and written once would push everything else out of the page
cache, and copying them through it costs more time than packing them. So aligned ranges go directly
between the disk and our memory (O_DIRECT, F_NOCACHE on macOS); what is not aligned, and file
systems that cannot do it, take the ordinary way.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kimi_cpu.errors import CheckpointError
from kimi_cpu.quant import U8
from kimi_cpu.store.direct import ALIGN, HUGE_PAGE, open_past_cache
from kimi_cpu.store.extents import Extent, merged
from kimi_cpu.store.repack.source import Source
from kimi_cpu.store.safetensors import NUMPY_DTYPES
from kimi_cpu.store.tensors import is_finite

_MAX_OPEN = 8
#: At once where a read makes a copy.
_SEEKING_BYTES = 16 << 20


class Scratch:
    """Memory that is given out piece by piece and taken back as a whole."""

    def __init__(self, n_bytes: int) -> None:
        # In huge pages direct reads are twice as fast; NumPy asks for them, but may begin beside.
        n_bytes = -(-n_bytes // HUGE_PAGE) * HUGE_PAGE
        memory = np.empty(n_bytes + HUGE_PAGE, dtype=np.uint8)
        start = -memory.ctypes.data % HUGE_PAGE
        self._memory = memory[start : start + n_bytes]
        self._used = 0

    def take(self, n_bytes: int, lead: int = 0) -> U8:
        """uint8 [n_bytes], `lead` bytes behind the begin of a page; valid until `clear`."""
        begin = self._used + lead
        self._used += -(-(lead + n_bytes) // ALIGN) * ALIGN
        if self._used > len(self._memory):
            raise MemoryError(f"{n_bytes} bytes asked of a scratch memory that is used up")
        return self._memory[begin : begin + n_bytes]

    def clear(self) -> None:
        """Take all of it back."""
        self._used = 0


class _File:
    """An open file: through the page cache, and past it if the system lets us."""

    def __init__(self, path: Path, write: bool) -> None:
        flags = (os.O_RDWR if write else os.O_RDONLY) | getattr(os, "O_BINARY", 0)
        self._cached = os.open(path, flags)
        self._direct = open_past_cache(path, flags)

    def read(self, offset: int, out: U8) -> int:
        """Read until `out` is full or the file ends; returns the number of bytes."""
        aligned = offset % ALIGN == 0 and len(out) % ALIGN == 0
        fd = self._direct if self._direct is not None and aligned else self._cached
        done = 0
        while done < len(out):
            n = _read_at(fd, out.data[done:], offset + done)
            if n == 0:
                break
            done += n
            if n % ALIGN:
                fd = self._cached
        return done

    def write(self, offset: int, data: U8) -> None:
        """Write all of `data`: whole blocks past the page cache if its memory lies as the file."""
        if self._direct is None or (offset - data.ctypes.data) % ALIGN:
            self._write_by(self._cached, offset, data)
            return
        head = min(-offset % ALIGN, len(data))
        whole = (len(data) - head) // ALIGN * ALIGN
        for fd, begin, end in (
            (self._cached, 0, head),
            (self._direct, head, head + whole),
            (self._cached, head + whole, len(data)),
        ):
            self._write_by(fd, offset + begin, data[begin:end])

    def _write_by(self, fd: int, offset: int, data: U8) -> None:
        done = 0
        while done < len(data):
            try:
                n = _write_at(fd, data.data[done:], offset + done)
            except OSError as exc:
                # A limit within a block, or a file system that cannot do this one directly.
                if exc.errno != errno.EINVAL or fd == self._cached:
                    raise
                fd = self._cached
                continue
            done += n
            if n % ALIGN:
                fd = self._cached

    def forget(self, offset: int, length: int) -> None:
        """Tell the system that these bytes need not stay in the page cache."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._cached, offset, length, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        for fd in (self._cached, self._direct):
            if fd is not None:
                os.close(fd)


def _read_at(fd: int, out: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [out], offset)
    os.lseek(fd, offset, os.SEEK_SET)  # Windows
    data = os.read(fd, min(len(out), _SEEKING_BYTES))
    out[: len(data)] = data
    return len(data)


def _write_at(fd: int, data: memoryview, offset: int) -> int:
    if hasattr(os, "pwritev"):
        return os.pwritev(fd, [data], offset)
    os.lseek(fd, offset, os.SEEK_SET)  # Windows
    return os.write(fd, data[:_SEEKING_BYTES])


class Files:
    """Open files of one thread.

    Args:
        write: whether they are written, too.
    """

    def __init__(self, write: bool = False) -> None:
        self._write = write
        self._open: dict[Path, _File] = {}

    def read(self, path: Path, offset: int, length: int, scratch: Scratch) -> U8:
        """Bytes [offset, offset + length) in scratch memory.

        Raises OSError, or CheckpointError if the file ends before.
        """
        lead = offset % ALIGN
        whole = scratch.take(-(-(lead + length) // ALIGN) * ALIGN)
        done = self._get(path).read(offset - lead, whole)
        if done < lead + length:
            raise CheckpointError(
                f"{path}: ends at byte {offset - lead + done}, earlier than its header says",
                "The file changed or is damaged: download it again.",
            )
        return whole[lead : lead + length]

    def write(self, path: Path, offset: int, data: U8) -> None:
        """Write all of `data`. OSError."""
        self._get(path).write(offset, data)

    def forget(self, path: Path, offset: int, length: int) -> None:
        """Tell the system that these bytes need not stay in the page cache."""
        self._get(path).forget(offset, length)

    def close(self) -> None:
        """Close all of them."""
        while self._open:
            self._open.popitem()[1].close()

    def _get(self, path: Path) -> _File:
        file = self._open.get(path)
        if file is None:
            if len(self._open) >= _MAX_OPEN:
                self.close()
            file = self._open[path] = _File(path, self._write)
        return file


class TensorReader:
    """Reads a source's tensors into scratch memory; each thread has one."""

    def __init__(self, source: Source, files: Files, scratch: Scratch) -> None:
        self.source = source
        self._files = files
        self._scratch = scratch
        self._loaded: dict[str, U8] = {}

    def clear(self) -> None:
        """Take the scratch memory back: what was read is gone."""
        self._scratch.clear()
        self._loaded.clear()

    def load(self, names: Iterable[str]) -> None:
        """Read these tensors whole, neighbours at once, which disks like; then ask for `rows`."""
        places = {}
        for name in names:
            entry = self.source.entry(name)
            places[name] = Extent(self.source.file_of(name), entry.begin, entry.nbytes)
        for path, offset, length in merged(places.values()):
            data = self._files.read(path, offset, length, self._scratch)
            for name, extent in places.items():
                begin = extent.offset - offset
                if extent.path == path and 0 <= begin <= length - extent.length:
                    self._loaded[name] = data[begin : begin + extent.length]

    def rows(self, name: str, begin: int = 0, end: int | None = None) -> npt.NDArray[Any]:
        """Rows [begin, end) of a tensor, all by default, as NUMPY_DTYPES has its dtype.

        Raises CheckpointError if they are dense and hold NaN or infinity, or cannot be read.
        """
        entry = self.source.entry(name)
        path = self.source.file_of(name)
        end = entry.shape[0] if end is None else end
        row_bytes = entry.nbytes // max(1, entry.shape[0])
        offset, length = entry.begin + begin * row_bytes, (end - begin) * row_bytes
        data = self._loaded.get(name)
        if data is None:
            data = self._files.read(path, offset, length, self._scratch)
        else:
            data = data[begin * row_bytes : end * row_bytes]
        array = data.view(NUMPY_DTYPES[entry.dtype]).reshape(end - begin, *entry.shape[1:])
        if entry.dtype in ("BF16", "F32") and not is_finite(array):
            raise CheckpointError(
                f"{path}: {self.source.stored_name(name)} holds NaN or infinity",
                "The file is damaged: download it again.",
            )
        return array
