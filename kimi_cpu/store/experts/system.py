"""Calls to the operating system that Python lacks or makes with its lock held.

All take addresses and lengths in bytes, and all of them are hints to memory that works without
them too, except `populate`, whose answer says whether the pages are there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import sys
from functools import lru_cache
from typing import Any

PAGE = mmap.PAGESIZE
IS_LINUX = sys.platform == "linux"

_MADV_RANDOM = 1
_MADV_DONTNEED = 4
_MADV_HUGEPAGE = 14
_MADV_POPULATE_READ = 22  # Linux 5.14
#: Linux cuts a longer request for reading ahead to the disk's largest transfer; few have a smaller.
_ADVICE_BYTES = 128 << 10


@lru_cache(maxsize=1)
def _libc() -> Any:
    """The C library, with the functions used here declared; None on Windows."""
    if sys.platform == "win32":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mlock.argtypes = libc.munlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def _madvise(address: int, length: int, advice: int) -> int:
    """0, or the error's number. Python's own `mmap.madvise` would stop all other threads."""
    return 0 if _libc().madvise(address, length, advice) == 0 else ctypes.get_errno()


def populate(address: int, length: int) -> bool:
    """Have the mapped pages around [address, address + length) read and mapped.

    Returns False if this system has no such call. Raises OSError if they cannot be read, which
    a load instruction would answer with a bus error.
    """
    if not IS_LINUX:
        return False
    start = address // PAGE * PAGE
    while True:
        code = _madvise(start, address + length - start, _MADV_POPULATE_READ)
        if code == 0:
            return True
        if code == errno.EINVAL:  # an older kernel, or one that only looks like Linux
            return False
        if code not in (errno.EINTR, errno.EAGAIN):
            # What reading a page that does not exist gives is EFAULT: a truncated file.
            raise OSError(errno.EIO if code == errno.EFAULT else code, _reason(code))


def _reason(code: int) -> str:
    if code == errno.EFAULT:
        return "the file ends too early, or the disk cannot read it"
    return os.strerror(code)


def unmap_pages(address: int, length: int) -> None:
    """Give up the whole pages inside the range: read again, or zero, when touched again."""
    start = -(-address // PAGE) * PAGE
    end = (address + length) // PAGE * PAGE
    if IS_LINUX and end > start:
        _madvise(start, end - start, _MADV_DONTNEED)


def forget_cached(fd: int, offset: int, length: int) -> None:
    """Drop the whole pages inside a file's range from the page cache; mapped ones stay."""
    start = -(-offset // PAGE) * PAGE
    end = (offset + length) // PAGE * PAGE
    if hasattr(os, "posix_fadvise") and end > start:
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, start, end - start, os.POSIX_FADV_DONTNEED)


def read_soon(fd: int, offset: int, length: int) -> None:
    """Start reading exactly this range of a file into the page cache."""
    if not hasattr(os, "posix_fadvise"):
        return
    with contextlib.suppress(OSError):
        for begin in range(offset, offset + length, _ADVICE_BYTES):
            n = min(_ADVICE_BYTES, offset + length - begin)
            os.posix_fadvise(fd, begin, n, os.POSIX_FADV_WILLNEED)


def no_readahead(address: int, length: int) -> None:
    """Page faults in this mapping read what is touched and nothing around it."""
    if IS_LINUX:
        _madvise(address, length, _MADV_RANDOM)


def use_huge_pages(address: int, length: int) -> None:
    """Ask for large pages: they double the speed of direct reads and spare the kernels' TLB."""
    if IS_LINUX:
        _madvise(address, length, _MADV_HUGEPAGE)


def lock(address: int, length: int) -> bool:
    """Keep the pages of the range in memory; False if that is not allowed."""
    libc = _libc()
    return libc is not None and libc.mlock(address, length) == 0


def lock_limit() -> int:
    """How many bytes this process may lock."""
    if sys.platform == "win32":
        return 0
    import resource

    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return 1 << 62 if limit == resource.RLIM_INFINITY else limit
