"""Files mapped into memory, read-only."""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kimi_cpu.errors import CheckpointError

#: Told of every weight file that is mapped: path, address, bytes. What it returns is called when
#: the file is mapped no more. `kimi_cpu.bus_error` sets it, on behalf of programs.
on_map: Callable[[Path, int, int], Callable[[], None]] | None = None


def map_file(path: Path, fd: int) -> mmap.mmap:
    """All of an open weight file, read-only. OSError; ValueError if it is empty."""
    mapped = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
    if on_map is not None:
        view = np.frombuffer(mapped, dtype=np.uint8)
        forget = on_map(path, view.ctypes.data, view.nbytes)
        weakref.finalize(mapped, forget).atexit = False  # views keep the map alive
    return mapped


def gone(path: Path, reason: str | None) -> CheckpointError:
    """The error of a file that could be opened when the checkpoint was."""
    return CheckpointError(
        f"{path}: cannot be read any more ({reason})",
        "Check the disk and that nobody changes the checkpoint while it is used.",
    )


class MappedFile:
    """One mapped weight file.

    Attributes:
        path: the file.
        size: its bytes.
    """

    def __init__(self, path: Path, min_bytes: int, hint: str) -> None:
        """Map the file; raises CheckpointError if it is missing, not readable or too short.

        Args:
            min_bytes: at least 1, because nothing can be mapped of an empty file.
            hint: what to do about a file that is too short.
        """
        self.path = path
        if not path.is_file():
            raise CheckpointError(
                f"{path}: no such file", "The download is incomplete: fetch the missing file."
            )
        try:
            with path.open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size < min_bytes:
                    raise CheckpointError(f"{path}: only {self.size} bytes long", hint)
                self._map: mmap.mmap | None = map_file(path, file.fileno())
        except (OSError, ValueError) as exc:
            raise CheckpointError(
                f"{path}: cannot be mapped ({exc})", "Check that the file may be read."
            ) from None

    def read(self, begin: int, end: int) -> bytes:
        """A copy of the bytes [begin, end)."""
        return self._open_map()[begin:end]

    def view(self, dtype: npt.DTypeLike, count: int, offset: int) -> npt.NDArray[Any]:
        """`count` elements from byte `offset` on as a read-only view [count]."""
        if count == 0:
            return np.empty(0, dtype=dtype)
        return np.frombuffer(self._open_map(), dtype=dtype, count=count, offset=offset)

    def whole(self) -> npt.NDArray[np.uint8]:
        """All of it as a read-only view, uint8 [size]."""
        return self.view(np.uint8, self.size, 0)

    def check(self) -> None:
        """Raises CheckpointError if the file has become shorter: touching its views would kill us.

        It costs less than a microsecond. What happens between two checks can only end the process
        (`kimi_cpu.bus_error`).
        """
        if self._map is not None and self._map.size() < self.size:
            raise gone(self.path, "it is shorter than it was")

    def close(self) -> None:
        """Let go of the map. It stays mapped as long as views on it are alive."""
        mapped, self._map = self._map, None
        if mapped is not None:
            with contextlib.suppress(BufferError):  # views are alive: the last of them unmaps
                mapped.close()

    def _open_map(self) -> mmap.mmap:
        if self._map is None:
            raise ValueError(f"{self.path} is closed")
        return self._map
