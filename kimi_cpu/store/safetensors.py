"""A safetensors file as views on its memory map: nothing is copied, everything is checked.

Layout of a file: 8 bytes little-endian header length, that many bytes of JSON
(`{name: {"dtype", "shape", "data_offsets"}}`, optionally `__metadata__`), then the data.
The reader is our own because bf16 must come as views (NumPy has no bf16; it is handed out as
uint16 bits) and because kernels do not check bounds: a file is untrusted until it passed here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kimi_cpu.config.reader import parse_json_object, shown
from kimi_cpu.errors import CheckpointError
from kimi_cpu.store.mapping import MappedFile

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
    "U8": np.dtype("<u1"),
}

_FIELDS = {"dtype", "shape", "data_offsets"}
_DAMAGED = "The file is damaged or no safetensors file: download it again."
_TRUNCATED = "The file is truncated: download it again."

#: (dtype, shape, begin, end). Plain tuples in the table: the garbage collector stops tracking
#: those, so that 200,000 of them cost later collections nothing.
_RawEntry = tuple[str, tuple[int, ...], int, int]


class TensorEntry(NamedTuple):
    """Where a tensor lies: dtype tag, shape, and its bytes [begin, end) within the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class SafetensorsHeader:
    """What the header of a safetensors file says: the file itself need not be there.

    Attributes:
        path: the file.
        size: its bytes.
    """

    def __init__(self, path: Path, encoded: bytes, size: int) -> None:
        """Check a header (its JSON, without the length) of a file of `size` bytes.

        Raises CheckpointError naming `path` and the tensor.
        """
        self.path = path
        self.size = size
        self._entries = _parse(path, encoded, size)

    def names(self) -> list[str]:
        """Names of all tensors, in the header's order."""
        return list(self._entries)

    def entry(self, name: str) -> TensorEntry:
        """Where tensor `name` lies; KeyError if there is none."""
        return TensorEntry(*self._entries[name])

    def nbytes(self, name: str) -> int:
        """Bytes of tensor `name`."""
        _, _, begin, end = self._entries[name]
        return end - begin


class SafetensorsFile(SafetensorsHeader):
    """One open, validated, memory-mapped safetensors file."""

    def __init__(self, path: Path) -> None:
        """Map the file and check its header; raises CheckpointError naming file and tensor."""
        self._file = MappedFile(path, 8, _DAMAGED)
        try:
            length = header_length(path, self._file.read(0, 8), self._file.size)
            super().__init__(path, self._file.read(8, 8 + length), self._file.size)
        except BaseException:
            self.close()
            raise

    def bytes_of(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes as a read-only uint8 view [n]."""
        return self._view(self.entry(name), np.dtype(np.uint8))

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """The tensor as a read-only view: uint16 bits for BF16, float32, int32 or int64.

        Data at an address that is not a multiple of the item size (which the format allows) is
        copied, so that callers always get aligned arrays. Raises CheckpointError for a dtype
        that this engine does not compute with.
        """
        entry = self.entry(name)
        dtype = NUMPY_DTYPES.get(entry.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{self.path}: {shown(name)} has dtype {entry.dtype}",
                "This engine reads BF16 and F32 tensors, and packed INT4 experts.",
            )
        view = self._view(entry, dtype).reshape(entry.shape)
        if not view.flags.aligned:
            view = view.copy()
            view.flags.writeable = False
        return view

    def _view(self, entry: TensorEntry, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        return self._file.view(dtype, entry.nbytes // dtype.itemsize, entry.begin)

    def close(self) -> None:
        """Let go of the map. It stays mapped as long as views on it are alive."""
        self._file.close()

    def whole(self) -> npt.NDArray[np.uint8]:
        """As `MappedFile.whole`."""
        return self._file.whole()

    def check(self) -> None:
        """As `MappedFile.check`."""
        self._file.check()


def header_length(path: Path, first: bytes, size: int) -> int:
    """The header's length from the first 8 bytes of a file; CheckpointError if it cannot be."""
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: header claims {length} bytes", _DAMAGED)
    if 8 + length > size:
        raise CheckpointError(
            f"{path}: header claims {length} bytes, the whole file has {size}", _TRUNCATED
        )
    return length


def _parse(path: Path, encoded: bytes, size: int) -> dict[str, _RawEntry]:
    start = 8 + len(encoded)
    header = parse_json_object(encoded, f"{path}: header", CheckpointError, _DAMAGED)
    header.pop("__metadata__", None)
    try:
        entries = {name: _read_entry(fields, start) for name, fields in header.items()}
    except ValueError:
        raise _bad_entry(path, header, start) from None
    _check_cover(path, entries, start, size)
    return entries


def _bad_entry(path: Path, header: dict[str, Any], start: int) -> CheckpointError:
    """Find the entry that `_read_entry` refused, to name it."""
    for name, fields in header.items():
        try:
            _read_entry(fields, start)
        except ValueError as exc:
            return CheckpointError(f"{path}: {shown(name)}: {exc}", _DAMAGED)
    raise AssertionError("no entry was refused the second time")


def _read_entry(fields: Any, start: int) -> _RawEntry:
    """Check one entry of the header; ValueError says what is wrong with it."""
    if type(fields) is not dict or fields.keys() != _FIELDS:
        raise ValueError("expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    n_bytes = _DTYPE_BYTES.get(dtype, 0) if type(dtype) is str else 0
    if not n_bytes:
        raise ValueError(f"unknown dtype {ascii(dtype)[:40]}")
    if type(shape) is not list or len(shape) > 8:
        raise ValueError("shape is no list of at most 8 sizes")
    for n in shape:
        if type(n) is not int or not 0 <= n < 1 << 48:
            raise ValueError("shape holds something else than sizes")
        n_bytes *= n
    if type(offsets) is not list or len(offsets) != 2:
        raise ValueError("data_offsets is no pair")
    begin, end = offsets
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end < 1 << 62:
        raise ValueError(f"data_offsets {ascii(offsets)[:80]} are no byte range")
    if end - begin != n_bytes:
        raise ValueError(f"{dtype} {shape} needs {n_bytes} bytes, data_offsets give {end - begin}")
    return dtype, tuple(shape), start + begin, start + end


def _check_cover(path: Path, entries: dict[str, _RawEntry], start: int, size: int) -> None:
    """The tensors must follow each other without overlap or hole and fill the file exactly."""
    position, previous = start, "the header"
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if end > size:
            raise CheckpointError(
                f"{path}: {shown(name)} ends at byte {end}, the file has only {size}", _TRUNCATED
            )
        if begin != position:
            what = "overlaps" if begin < position else "leaves a hole after"
            raise CheckpointError(f"{path}: {shown(name)} {what} {shown(previous)}", _DAMAGED)
        position, previous = end, name
    if position != size:
        raise CheckpointError(
            f"{path}: {size - position} bytes too many after {shown(previous)}", _DAMAGED
        )
