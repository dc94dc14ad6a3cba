"""Putting weights into the packed layout, and how far rounding dense ones moves them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from kimi_cpu.quant import (
    BLOCK_ROWS,
    F32,
    U8,
    U16,
    Int4Weight,
    as_f32,
    dequantize,
    pack,
    quantize_int4,
    quantize_int8,
)

#: Elements that are rounded at once. With fewer, whose float32 temporaries would stay in the L2
#: cache, threads only wait for the interpreter's lock.
_ROUND_ELEMENTS = 1 << 19


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


class Kernels(Protocol):
    """What computes: this module, or one that does the same faster (`kernels.repacking`).

    The same bytes and figures; only the sums of the latter may be added up in another order.
    """

    def round_rows(self, w: U16 | F32, bits: int, out: U8) -> tuple[float, float, float]:
        """As `convert.round_rows`."""

    def pack_int4(self, weight: Int4Weight, out: U8) -> None:
        """As `convert.pack_int4`."""


def pack_int4(weight: Int4Weight, out: U8) -> None:
    """Write published INT4 into `out`, uint8 [ceil(n / 16), ceil(in / 64), 576], exactly."""
    pack(weight, out)


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
    pack(quantized, out)
    return measure(rows, dequantize(quantized))


def measure(w: F32, rounded: F32) -> Deviation:
    """The deviation of weights from what they were; `rounded` is overwritten."""
    error = np.subtract(rounded, w, out=rounded)
    return Deviation(
        error_squares=_squares(error),
        squares=_squares(w),
        max_abs=float(max(error.max(), -error.min())),
    )


def _squares(values: F32) -> float:
    """The sum of their squares. In float64: its first four digits must not depend on the order."""
    wide = values.astype(np.float64).reshape(-1)
    return float(np.vdot(wide, wide))
