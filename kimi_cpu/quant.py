"""Number formats of weights, defined in NumPy: bf16, INT4 and int8 groups of 32.

INT4 is compressed-tensors' `pack-quantized`, symmetric, group size 32 along the input
dimension. Read as little-endian bytes, byte b of a row holds element 2b in its low nibble and
2b + 1 in its high nibble; a nibble stores q + 8 with q in [-8, 7]; w = q * scale[row, col // 32].

The packed layout (`PackedWeight`) holds the same numbers of INT4 or int8 groups in the order in
which the kernels multiply: 16 rows at a time, a 64-byte vector with 4 bytes of each, and the scales
beside what they scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

GROUP_SIZE = 32

F32 = npt.NDArray[np.float32]
U16 = npt.NDArray[np.uint16]
U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Int4Weight:
    """A linear layer's weight in the published INT4 format, usually views on a mapped file.

    Attributes:
        packed: uint8 [out_features, in_features / 2], two nibbles a byte.
        scale: bf16 bits as uint16 [out_features, in_features / 32].
    """

    packed: U8
    scale: U16

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.packed.shape[0], self.packed.shape[1] * 2

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scale.nbytes


@dataclass(frozen=True)
class Int8Weight:
    """A linear layer's weight as int8 in groups of 32 along the input: w = q * scale.

    The form in which weights are rounded and unpacked; they are stored and multiplied packed.

    Attributes:
        q: int8 [out_features, in_features], values in [-127, 127].
        scale: bf16 bits as uint16 [out_features, in_features / 32].
    """

    q: npt.NDArray[np.int8]
    scale: U16

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.q.shape[0], self.q.shape[1]

    @property
    def nbytes(self) -> int:
        return self.q.nbytes + self.scale.nbytes


#: A block of the packed layout: this many rows times columns.
BLOCK_ROWS, BLOCK_COLUMNS = 16, 64


def block_bytes(bits: int) -> int:
    """Bytes of a block: its vectors and 32 bf16 scales; 576 or 1088."""
    return BLOCK_ROWS * (BLOCK_COLUMNS * bits // 8 + 2 * 2)


def packed_shape(out_features: int, in_features: int, bits: int) -> tuple[int, int, int]:
    """Shape of `PackedWeight.blocks`: row blocks, column blocks, bytes of a block."""
    rows, columns = -(-out_features // BLOCK_ROWS), -(-in_features // BLOCK_COLUMNS)
    return rows, columns, block_bytes(bits)


@dataclass(frozen=True)
class PackedWeight:
    """A linear layer's weight as INT4 or int8 groups of 32, in the kernels' order.

    A block of 16 rows and 64 columns is 8 (INT4) or 16 (int8) vectors of 64 bytes, then the 32
    bf16 scales: 16 rows of the first group of 32 columns, 16 rows of the second. A vector has 4
    consecutive bytes of each row, row by row. For INT4 these are the published bytes (two elements
    each, nibble q + 8). For int8 they are q + 128: four vectors hold the columns 8 j + 0, 2, 4, 6
    of a group (j = 0 .. 3) and four the columns 8 j + 1, 3, 5, 7. Rows and columns beyond the
    weight's shape are zeros with scale 0.

    Attributes:
        blocks: uint8 [ceil(out / 16), ceil(in / 64), 576 or 1088], C-contiguous.
        shape: (out_features, in_features), in_features a multiple of 32.
        bits: 4 or 8.
    """

    blocks: U8
    shape: tuple[int, int]
    bits: int

    def __post_init__(self) -> None:
        expected = packed_shape(*self.shape, self.bits)
        if self.bits not in (4, 8) or self.shape[1] % GROUP_SIZE or self.blocks.shape != expected:
            raise ValueError(
                f"blocks of shape {self.blocks.shape} are no {self.bits}-bit weight {self.shape}"
            )

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes


#: A linear weight [out_features, in_features]: bf16 bits (uint16), float32, or quantised groups.
Weight = U16 | F32 | Int4Weight | PackedWeight


def bf16_to_f32(bits: U16) -> F32:
    """bf16 bits (uint16) -> float32, exact, any shape."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(x: F32) -> U16:
    """float32 -> bf16 bits (uint16), round to nearest even, any shape; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded).astype(np.uint16)


def as_f32(tensor: U16 | F32) -> F32:
    """A bf16 (uint16 bits) or float32 tensor as float32."""
    if tensor.dtype == np.uint16:
        return bf16_to_f32(cast(U16, tensor))
    return tensor.astype(np.float32, copy=False)


def quantize_int4(w: F32) -> Int4Weight:
    """Round float32 [out, in] (in a multiple of 32) to INT4 groups, scale = max |w| / 7."""
    out_features, in_features = w.shape
    groups = w.reshape(out_features, in_features // GROUP_SIZE, GROUP_SIZE)
    scale = f32_to_bf16(np.abs(groups).max(axis=2) / 7.0)
    divisor = bf16_to_f32(scale)[:, :, None]
    q = np.rint(np.divide(groups, divisor, out=np.zeros_like(groups), where=divisor > 0))
    nibbles = (np.clip(q, -8, 7) + 8).astype(np.uint8).reshape(out_features, in_features)
    packed = nibbles[:, 0::2] | (nibbles[:, 1::2] << np.uint8(4))
    return Int4Weight(packed=packed.astype(np.uint8, copy=False), scale=scale)


def quantize_int8(w: F32) -> Int8Weight:
    """Round float32 [out, in] (in a multiple of 32) to int8 groups, scale = max |w| / 127.

    The scale is rounded to bf16 first, and q divides by what was stored; it may lose half a step
    of the largest element, which is clipped to 127.
    """
    out_features, in_features = w.shape
    size = np.abs(w).reshape(-1)
    largest: F32 = np.maximum.reduceat(size, np.arange(0, size.size, GROUP_SIZE))
    scale = f32_to_bf16(largest / np.float32(127)).reshape(out_features, in_features // GROUP_SIZE)
    divisor = bf16_to_f32(scale)
    divisor[divisor == 0] = 1  # what is so small is rounded to 0
    q = np.divide(w, np.repeat(divisor, GROUP_SIZE, axis=1))
    np.clip(np.rint(q, out=q), -127, 127, out=q)
    return Int8Weight(q.astype(np.int8), scale)


def unpack_int4(packed: U8) -> npt.NDArray[np.int8]:
    """uint8 [out, in / 2] -> int8 [out, in] with values in [-8, 7]."""
    q = np.empty((packed.shape[0], packed.shape[1] * 2), dtype=np.int8)
    q[:, 0::2] = (packed & 15).astype(np.int8) - 8
    q[:, 1::2] = (packed >> 4).astype(np.int8) - 8
    return q


def rows_of(weight: Weight, start: int, stop: int) -> Weight:
    """Rows start .. stop-1 (out_features) as a view; for a packed weight both multiples of 16."""
    if isinstance(weight, Int4Weight):
        return Int4Weight(weight.packed[start:stop], weight.scale[start:stop])
    if isinstance(weight, PackedWeight):
        if start % BLOCK_ROWS or (stop % BLOCK_ROWS and stop != weight.shape[0]):
            raise ValueError(f"rows {start} .. {stop} cut a block of {BLOCK_ROWS}")
        blocks = weight.blocks[start // BLOCK_ROWS : -(-stop // BLOCK_ROWS)]
        return PackedWeight(blocks, (stop - start, weight.shape[1]), weight.bits)
    return weight[start:stop]


#: Rows of blocks: of true width about a megabyte.
_PACKED_AT_ONCE = 16


def pack(weight: Int4Weight | Int8Weight, out: U8 | None = None) -> PackedWeight:
    """The same numbers in the packed layout; exact, `unpack` gives them back.

    Args:
        out: uint8 of `packed_shape`, C-contiguous: where to write the blocks; new memory if None.
    """
    (rows, columns), bits = weight.shape, 4 if isinstance(weight, Int4Weight) else 8
    row_blocks, column_blocks, _ = shape = packed_shape(rows, columns, bits)
    values: U8
    if isinstance(weight, Int4Weight):
        values, zero = np.ascontiguousarray(weight.packed), 0x88
    else:
        pairs = (weight.q.view(np.uint8) ^ np.uint8(0x80)).reshape(rows, -1, 16, 2)
        even_odd = np.empty((rows, columns // GROUP_SIZE, 2, 16), dtype=np.uint8)
        even_odd[:, :, 0], even_odd[:, :, 1] = pairs[..., 0], pairs[..., 1]
        values, zero = even_odd.reshape(rows, columns), 0x80
    scale = weight.scale
    if rows % BLOCK_ROWS or columns % BLOCK_COLUMNS:
        padded = row_blocks * BLOCK_ROWS
        values = _padded(values, (padded, column_blocks * BLOCK_COLUMNS * bits // 8), zero)
        scale = _padded(scale, (padded, column_blocks * 2), 0)
    blocks = np.empty(shape, dtype=np.uint8) if out is None else out
    # The 16 rows x 4 bytes of a vector are 16 words of 32 bits, which NumPy transposes at several
    # GB/s. Some rows of blocks at a time: with one, threads only wait for each other's lock.
    vectors = 2 * bits
    words = values.view(np.uint32).reshape(row_blocks, BLOCK_ROWS, column_blocks, vectors)
    word_target = blocks.view(np.uint32)[:, :, : vectors * BLOCK_ROWS]
    scales = scale.reshape(row_blocks, BLOCK_ROWS, column_blocks, 2)
    scale_target = blocks.view(np.uint16)[:, :, -2 * BLOCK_ROWS :]
    for i in range(0, row_blocks, _PACKED_AT_ONCE):
        some = slice(i, i + _PACKED_AT_ONCE)
        # [row block, row, column block, vector] -> [row block, column block, vector, row]
        cells = (-1, column_blocks, vectors, BLOCK_ROWS)
        word_target[some].reshape(cells)[:] = words[some].transpose(0, 2, 3, 1)
        cells = (-1, column_blocks, 2, BLOCK_ROWS)
        scale_target[some].reshape(cells)[:] = scales[some].transpose(0, 2, 3, 1)
    return PackedWeight(blocks, weight.shape, bits)


def _padded(array: npt.NDArray[np.generic], shape: tuple[int, int], value: int) -> npt.NDArray[Any]:
    """`array` with rows and columns of `value` behind its own."""
    out = np.full(shape, value, dtype=array.dtype)
    out[: array.shape[0], : array.shape[1]] = array
    return out


def unpack(weight: PackedWeight) -> Int4Weight | Int8Weight:
    """A packed weight in natural order."""
    (rows, columns), bits, blocks = weight.shape, weight.bits, weight.blocks
    row_blocks, column_blocks, _ = blocks.shape
    cells = blocks[:, :, : 128 * bits].reshape(row_blocks, column_blocks, 2 * bits, BLOCK_ROWS, 4)
    # [row block, column block, vector, row, byte] -> [row block, row, column block, vector, byte]
    values = cells.transpose(0, 3, 1, 2, 4).reshape(row_blocks * BLOCK_ROWS, -1)
    values = values[:rows, : columns * bits // 8]
    cells = blocks[:, :, 128 * bits :].reshape(row_blocks, column_blocks, 2, BLOCK_ROWS, 2)
    scale = np.ascontiguousarray(cells.transpose(0, 3, 1, 2, 4)).view(np.uint16)
    scale = scale.reshape(row_blocks * BLOCK_ROWS, -1)[:rows, : columns // GROUP_SIZE]
    if bits == 4:
        return Int4Weight(np.ascontiguousarray(values), np.ascontiguousarray(scale))
    groups = (values ^ np.uint8(0x80)).reshape(rows, -1, 2, 16)  # even columns, odd columns
    q = np.ascontiguousarray(groups.swapaxes(2, 3)).reshape(rows, columns)
    return Int8Weight(np.ascontiguousarray(q).view(np.int8), np.ascontiguousarray(scale))


def dequantize(weight: Weight | Int8Weight) -> F32:
    """Any weight as float32 [out, in]."""
    if isinstance(weight, PackedWeight):
        weight = unpack(weight)
    if isinstance(weight, Int4Weight):
        scale = np.repeat(bf16_to_f32(weight.scale), GROUP_SIZE, axis=1)
        return unpack_int4(weight.packed).astype(np.float32) * scale
    if isinstance(weight, Int8Weight):
        scale = np.repeat(bf16_to_f32(weight.scale), GROUP_SIZE, axis=1)
        return weight.q.astype(np.float32) * scale
    return as_f32(weight)
