"""Files whose reads and writes go past the page cache."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

#: Such reads and writes begin and end at multiples of this, in the file and in memory.
ALIGN = 4096
#: Memory that begins at a multiple of this can be in large pages, which doubles their speed.
HUGE_PAGE = 2 << 20


def open_past_cache(path: Path, flags: int) -> int | None:
    """A descriptor for aligned reads and writes; None where the system or its file system cannot.

    Some file systems open a file so and refuse the first read with EINVAL.
    Raises OSError if the file cannot be opened at all.
    """
    if hasattr(os, "O_DIRECT"):
        with contextlib.suppress(OSError):  # EINVAL: tmpfs and others
            return os.open(path, flags | os.O_DIRECT)
    elif sys.platform == "darwin":
        import fcntl

        fd = os.open(path, flags)
        try:
            fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)
        except OSError:
            os.close(fd)
        else:
            return fd
    return None
