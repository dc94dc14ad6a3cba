"""A safetensors file as views on its memory map: nothing is copied, everything is checked.

Layout of a file: 8 bytes little-endian header length, that many bytes of JSON
(`{name: {"dtype", "shape", "data_offsets"}}`, optionally `__metadata__`), then the data.
The reader is our own because bf16 must come as views (NumPy has no bf16; it is handed out as
uint16 bits) and because kernels do not check bounds: a file is untrusted until it passed here.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kimi_cpu.config import parse_json_object
from kimi_cpu.errors import CheckpointError

#: The format's own limit on the header, which also bounds what a hostile file can make us parse.
MAX_HEADER_BYTES = 100_000_000

_DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip

#: How the dtypes that this engine computes with appear in NumPy (bf16 as its bits).
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"),
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}

_DAMAGED = "The file is damaged or no safetensors file: download it again."


class TensorEntry(NamedTuple):
    """Where a tensor lies: dtype tag, shape, and its bytes [begin, end) within the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """One open, validated, memory-mapped safetensors file.

    Attributes:
        path: the file.
        entries: name -> TensorEntry, in the header's order.
    """

    def __init__(self, path: Path) -> None:
        """Map the file and check its header; raises CheckpointError naming file and tensor."""
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < 8:
                    raise CheckpointError(f"{path}: only {size} bytes long", _DAMAGED)
                self._map: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}: no such file", "The download is incomplete: fetch the missing shard."
            ) from None
        except (OSError, ValueError) as exc:
            raise CheckpointError(f"{path}: cannot be read ({exc})", _DAMAGED) from None
        self.size = size
        self.entries = _read_header(path, self._map, size)

    def bytes_of(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes as a read-only uint8 view [n]."""
        return self._view(name, np.dtype(np.uint8))

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """The tensor as a read-only view: uint16 bits for BF16, float32, int32 or int64.

        Data at an address that is not a multiple of the item size (which the format allows) is
        copied, so that callers always get aligned arrays. Raises CheckpointError for a dtype
        that this engine does not compute with.
        """
        entry = self.entries[name]
        dtype = NUMPY_DTYPES.get(entry.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{self.path}: {name} has dtype {entry.dtype}",
                "This engine reads BF16 and F32 tensors (and packed INT4 experts).",
            )
        view = self._view(name, dtype).reshape(entry.shape)
        return view if view.flags.aligned else view.copy()

    def _view(self, name: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        if self._map is None:
            raise CheckpointError(f"{self.path}: already closed", "Open the checkpoint again.")
        entry = self.entries[name]
        count = (entry.end - entry.begin) // dtype.itemsize
        if count == 0:
            return np.empty(0, dtype=dtype)
        return np.frombuffer(self._map, dtype=dtype, count=count, offset=entry.begin)

    def close(self) -> None:
        """Let go of the map. It stays mapped as long as views on it are alive."""
        mapped, self._map = self._map, None
        if mapped is not None:
            try:
                mapped.close()
            except BufferError:
                pass  # arrays handed out still point into it: the last of them unmaps


def _read_header(path: Path, mapped: mmap.mmap, size: int) -> dict[str, TensorEntry]:
    length = int.from_bytes(mapped[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: header claims {length} bytes", _DAMAGED)
    start = 8 + length
    if start > size:
        raise CheckpointError(
            f"{path}: header claims {length} bytes, the file has only {size}",
            "The file is truncated: download it again.",
        )
    header = parse_json_object(mapped[8:start], f"{path}: header", CheckpointError, _DAMAGED)
    header.pop("__metadata__", None)
    entries: dict[str, TensorEntry] = {}
    for name, fields in header.items():
        entries[name] = _read_entry(path, name, fields, start)
    _check_cover(path, entries, start, size)
    return entries


def _read_entry(path: Path, name: str, fields: Any, start: int) -> TensorEntry:
    def bad(problem: str) -> CheckpointError:
        return CheckpointError(f"{path}: {name[:200]}: {problem}", _DAMAGED)

    if type(fields) is not dict or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise bad("expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    item_bytes = _DTYPE_BYTES.get(dtype) if type(dtype) is str else None
    if item_bytes is None:
        raise bad(f"unknown dtype {str(dtype)[:40]!r}")
    if type(shape) is not list or len(shape) > 8:
        raise bad("shape is no list of at most 8 sizes")
    n_bytes = item_bytes
    for n in shape:
        if type(n) is not int or not 0 <= n < 1 << 48:
            raise bad("shape holds something else than sizes")
        n_bytes *= n
    if type(offsets) is not list or len(offsets) != 2:
        raise bad("data_offsets is no pair")
    begin, end = offsets
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end < 1 << 62:
        raise bad(f"data_offsets {str(offsets)[:80]} are no byte range")
    if end - begin != n_bytes:
        raise bad(f"{dtype} {shape} needs {n_bytes} bytes, data_offsets span {end - begin}")
    return TensorEntry(dtype, tuple(shape), start + begin, start + end)


def _check_cover(path: Path, entries: dict[str, TensorEntry], start: int, size: int) -> None:
    """The tensors must follow each other without overlap or hole and fill the file exactly."""
    position, previous = start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.end > size:
            raise CheckpointError(
                f"{path}: {name} ends at byte {entry.end}, the file has only {size}",
                "The file is truncated: download it again.",
            )
        if entry.begin != position:
            what = "overlaps" if entry.begin < position else "leaves a hole after"
            raise CheckpointError(f"{path}: {name} {what} {previous}", _DAMAGED)
        position, previous = entry.end, name
    if position != size:
        raise CheckpointError(
            f"{path}: {size - position} bytes after the last tensor ({previous})", _DAMAGED
        )
