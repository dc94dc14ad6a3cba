"""Files mapped into memory, read-only."""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kimi_cpu.errors import CheckpointError


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
                self._map: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
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

        Between two checks nothing can protect from that; they cost less than a microsecond.
        """
        if self._map is not None and self._map.size() < self.size:
            raise CheckpointError(
                f"{self.path}: cannot be read any more (it is shorter than it was)",
                "Check the disk and that nobody changes the checkpoint while it is used.",
            )

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
