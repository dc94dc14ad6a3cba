"""Weights into the packed layout, fast: what `quant.pack` defines, written into given memory.

The layout's transposition of 16 rows x 4 bytes is one of 32-bit words, which NumPy does at several
GB/s as long as its source and target stay in the caches.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np

from kimi_cpu.quant import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    F32,
    GROUP_SIZE,
    U8,
    U16,
    Int4Weight,
    as_f32,
    dequantize,
    pack,
    quantize_int4,
    quantize_int8,
)

#: Elements that are rounded at once: their float32 temporaries stay in the L2 cache.
_ROUND_ELEMENTS = 1 << 17


class Deviation(NamedTuple):
    """How far rounding moved some weights: sums that add up over parts of a tensor.

    Attributes:
        error_squares: of (w - w')^2.
        squares: of w^2.
        max_abs: largest |w - w'|.
    """

    error_squares: float
    squares: float
    max_abs: float

    def __add__(self, other: object) -> Deviation:
        if not isinstance(other, Deviation):
            return NotImplemented
        return Deviation(
            self.error_squares + other.error_squares,
            self.squares + other.squares,
            max(self.max_abs, other.max_abs),
        )


EXACT = Deviation(0.0, 0.0, 0.0)


def pack_int4(weight: Int4Weight, out: U8) -> None:
    """Write INT4 weights as they are into `out`, uint8 [row blocks, column blocks, 576]."""
    rows, columns = weight.shape
    if rows % BLOCK_ROWS or columns % BLOCK_COLUMNS:  # no published model: the plain way will do
        out[:] = pack(weight).blocks
        return
    _transpose(np.ascontiguousarray(weight.packed), weight.scale, out)


def round_rows(w: U16 | F32, bits: int, out: U8) -> Deviation:
    """Round bf16 or float32 rows [n, in] to int8 or INT4 groups of 32 and write them into `out`.

    Args:
        w: in is a multiple of 32; n of 16, unless these are a tensor's last rows.
        bits: 8 or 4.
        out: uint8 [ceil(n / 16), ceil(in / 64), 1088 or 576].
    """
    n, columns = w.shape
    step = max(1, _ROUND_ELEMENTS // columns // BLOCK_ROWS) * BLOCK_ROWS
    deviation = EXACT
    for begin in range(0, n, step):
        rows = as_f32(w[begin : begin + step])
        blocks = out[begin // BLOCK_ROWS : -(-(begin + len(rows)) // BLOCK_ROWS)]
        deviation += _round(rows, bits, blocks)
    return deviation


def _round(rows: F32, bits: int, out: U8) -> Deviation:
    quantized = quantize_int8(rows) if bits == 8 else quantize_int4(rows)
    whole = rows.shape[0] % BLOCK_ROWS == 0 and rows.shape[1] % BLOCK_COLUMNS == 0
    if not whole:
        out[:] = pack(quantized).blocks
    elif isinstance(quantized, Int4Weight):
        _transpose(quantized.packed, quantized.scale, out)
    else:
        pairs = (quantized.q.view(np.uint8) ^ 0x80).reshape(rows.shape[0], -1, 16, 2)
        even_odd = np.empty((rows.shape[0], pairs.shape[1], 2, 16), dtype=np.uint8)
        even_odd[:, :, 0], even_odd[:, :, 1] = pairs[..., 0], pairs[..., 1]
        _transpose(even_odd.reshape(rows.shape), quantized.scale, out)
    return measure(rows, dequantize(quantized))


def measure(w: F32, rounded: F32) -> Deviation:
    """The deviation of weights from what they were; `rounded` is overwritten."""
    error = np.subtract(rounded, w, out=rounded)
    return Deviation(
        error_squares=float(np.sum(error * error, dtype=np.float64)),
        squares=float(np.sum(w * w, dtype=np.float64)),
        max_abs=float(np.abs(error).max()),
    )


def _transpose(values: U8, scale: U16, out: U8) -> None:
    """Rows of bytes [n, b] and scales [n, in / 32] into blocks; whole blocks only."""
    row_blocks, column_blocks, block_bytes = out.shape
    scale_bytes = 2 * 2 * BLOCK_ROWS
    vectors = (block_bytes - scale_bytes) // 64
    words = values.view(np.uint32).reshape(row_blocks, BLOCK_ROWS, column_blocks, vectors)
    target = out.view(np.uint32)[:, :, : vectors * BLOCK_ROWS]
    scales = scale.reshape(row_blocks, BLOCK_ROWS, column_blocks, BLOCK_COLUMNS // GROUP_SIZE)
    scale_target = out.view(np.uint16)[:, :, -2 * BLOCK_ROWS :]
    for i in range(row_blocks):  # a block of rows at a time stays in the caches
        target[i].reshape(column_blocks, vectors, BLOCK_ROWS)[:] = words[i].transpose(1, 2, 0)
        cells = cast(U16, scale_target[i].reshape(column_blocks, 2, BLOCK_ROWS))
        cells[:] = scales[i].transpose(1, 2, 0)
