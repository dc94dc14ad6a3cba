"""The system's page cache of weight files: emptying it, and looking what is in it."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from kimi_cpu.errors import UsageError


def drop(files: Iterable[Path]) -> None:
    """Make the system forget the cached pages of `files`, so that the next read is from disk.

    No process may have them mapped, this one included: mapped pages stay.

    Raises:
        UsageError: this system has no way to do it.
    """
    if not hasattr(os, "posix_fadvise"):
        raise UsageError(
            "this system cannot drop files from its cache (no posix_fadvise)",
            "Leave out --cold; restart the machine for one cold run.",
        )
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)  # pages that are not written yet would stay
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def cached_fraction(files: Iterable[Path]) -> float | None:
    """Share of the files' bytes that is in the page cache; None where it cannot be told."""
    try:
        mincore: Any = ctypes.CDLL(None, use_errno=True).mincore
    except (AttributeError, OSError, TypeError):
        return None
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    resident = pages = 0
    for path in files:
        size = path.stat().st_size
        if not size:
            continue
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        ):
            view = np.frombuffer(mapped, dtype=np.uint8)
            flags = np.zeros(-(-size // mmap.PAGESIZE), dtype=np.uint8)
            failed = mincore(view.ctypes.data, size, flags.ctypes.data)
            del view  # or the map could not be closed
        if failed:
            return None
        resident += int((flags & 1).sum())
        pages += len(flags)
    return resident / pages if pages else None


def read_bytes() -> int | None:
    """Bytes that this process has made the disk read so far; None where unknown."""
    try:
        text = Path("/proc/self/io").read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    return None
