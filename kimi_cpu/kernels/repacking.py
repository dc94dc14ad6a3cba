"""What repacking computes, straight into the packed layout (`quant.PackedWeight` defines it).

The same numbers to the bit as the functions of `store.repack.convert`, their plain NumPy
references. Rounding is 3 to 4 times as fast: a group of 32 weights stays in registers from its
largest element to its bytes in the block and its share of the deviation. Packing INT4 weights, 3 to
7 times: they are turned as for products of many tokens, with vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from kimi_cpu.kernels.gemm import fill_blocks
from kimi_cpu.kernels.isa import jit
from kimi_cpu.kernels.simd import (
    FLOAT,
    I8,
    I16,
    I32,
    LANES,
    Emit,
    F32x16,
    I32x16,
    const,
    literal_intrinsic,
    vec,
)
from kimi_cpu.quant import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    F32,
    GROUP_SIZE,
    U8,
    U16,
    Int4Weight,
    block_bytes,
    pack,
    packed_shape,
)

_F64x16 = vec(ir.DoubleType())
#: What the sums of a call lie in: 16 lanes of float64 each for errors and weights, 16 float32.
_SQUARES_AT, _MAX_AT, _SUMS_BYTES = 128, 256, 320


#: `fill_blocks` writes the scales of so many columns, whether they are there or not.
_COLUMNS_AT_ONCE = LANES * GROUP_SIZE


@literal_intrinsic
def _round_group(
    typingctx: Any, bits: Any, size: Any, w: Any, row_bytes: Any, n_rows: Any, out: Any, half: Any,
    sums: Any,
) -> Any:  # fmt: skip
    """Round one group of up to 16 rows into its half of a block.

    bits (8 or 4) and size (bytes of a weight: 2 for bf16, 4 for float32) are literals; w is the
    first row's group, out the block, half 0 or 1, sums what the deviation is added to.
    """
    n_bits, n_bytes = bits.literal_value, size.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, b = Emit(builder), builder
        w, row_bytes, n_rows, out, half, sums = args[2:]
        largest_q = (1 << n_bits - 1) - 1
        smallest_q = -largest_q if n_bits == 8 else -largest_q - 1
        vectors_at = e.add(out, e.mul(half, 64 * n_bits))
        scales_at = e.add(e.add(out, 128 * n_bits), e.mul(half, 2 * BLOCK_ROWS))
        errors = e.variable(e.load(_F64x16, sums))
        squares = e.variable(e.load(_F64x16, sums, _SQUARES_AT))
        largest_error = e.variable(e.load(F32x16, sums, _MAX_AT))

        def weights(at: Any, offset: int) -> Any:
            if n_bytes == 4:
                return e.load(F32x16, at, 4 * offset)
            return e.bf16(e.load(vec(I16), at, 2 * offset))

        def absolute(v: Any) -> Any:
            return b.bitcast(b.and_(b.bitcast(v, I32x16), const(I32x16, 0x7FFFFFFF)), F32x16)

        def add_squares(total: Any, values: list[Any]) -> None:
            wide = [b.fpext(v, _F64x16) for v in values]
            e.set(total, b.fadd(e.get(total), b.fadd(*[b.fmul(v, v) for v in wide])))

        with e.loop(0, n_rows) as row:
            at = e.add(w, e.mul(row, row_bytes))
            values = [weights(at, 0), weights(at, LANES)]
            largest = e.max(e.maximum(*[absolute(v) for v in values]))
            scale = b.bitcast(b.fdiv(largest, const(FLOAT, float(largest_q))), I32)
            odd = b.and_(b.lshr(scale, const(I32, 16)), const(I32, 1))
            scale = b.lshr(b.add(b.add(scale, const(I32, 0x7FFF)), odd), const(I32, 16))
            e.store(b.trunc(scale, I16), e.add(scales_at, e.mul(row, 2)))
            step = b.bitcast(b.shl(scale, const(I32, 16)), FLOAT)
            is_zero = b.fcmp_ordered("==", step, const(FLOAT, 0.0))  # so small that q becomes 0
            divisor = e.splat(b.select(is_zero, const(FLOAT, 1.0), step))
            q = []
            for v in values:
                limited = e.minimum(b.fdiv(v, divisor), const(F32x16, float(largest_q)))
                q.append(e.round(e.maximum(limited, const(F32x16, float(smallest_q)))))
            steps = e.splat(step)
            off = [b.fsub(b.fmul(x, steps), v) for x, v in zip(q, values, strict=True)]
            add_squares(errors, off)
            add_squares(squares, values)
            for v in off:
                e.set(largest_error, e.maximum(absolute(v), e.get(largest_error)))
            stored = [
                b.trunc(b.add(b.fptosi(x, I32x16), const(I32x16, 1 << n_bits - 1)), vec(I8))
                for x in q
            ]
            even = e.shuffle(stored[0], stored[1], range(0, 32, 2))
            odd = e.shuffle(stored[0], stored[1], range(1, 32, 2))
            if n_bits == 4:
                parts = [b.or_(even, b.shl(odd, const(vec(I8), 4)))]
            else:
                parts = [even, odd]
            row_at = e.add(vectors_at, e.mul(row, 4))
            for p, part in enumerate(parts):
                words = b.bitcast(part, vec(I32, 4))
                for j in range(4):
                    e.store(b.extract_element(words, const(I32, j)), row_at, 64 * (4 * p + j))
        e.store(e.get(errors), sums)
        e.store(e.get(squares), sums, _SQUARES_AT)
        e.store(e.get(largest_error), sums, _MAX_AT)
        return context.get_dummy_value()

    return types.void(bits, size, *[types.int64] * 6), codegen


@jit
def _round_rows(w, n_rows, columns, is_bf16, bits, out, block_size, sums):  # type: ignore[no-untyped-def]
    """Round w [n_rows, columns] at these addresses; blocks that are padded hold their padding."""
    row_bytes = columns * (2 if is_bf16 else 4)
    for block in range((n_rows + BLOCK_ROWS - 1) // BLOCK_ROWS):
        first = w + block * BLOCK_ROWS * row_bytes
        rows = min(BLOCK_ROWS, n_rows - block * BLOCK_ROWS)
        for group in range(columns // GROUP_SIZE):
            half = group % 2
            if is_bf16:
                at = first + group * GROUP_SIZE * 2
                if bits == 8:
                    _round_group(8, 2, at, row_bytes, rows, out, half, sums)
                else:
                    _round_group(4, 2, at, row_bytes, rows, out, half, sums)
            else:
                at = first + group * GROUP_SIZE * 4
                if bits == 8:
                    _round_group(8, 4, at, row_bytes, rows, out, half, sums)
                else:
                    _round_group(4, 4, at, row_bytes, rows, out, half, sums)
            out += block_size * half
        if columns % BLOCK_COLUMNS:
            out += block_size


def round_rows(w: U16 | F32, bits: int, out: U8) -> tuple[float, float, float]:
    """Round bf16 or float32 rows [n, in] to int8 or INT4 groups of 32 and write them into `out`.

    Several Python threads may do that at once.

    Args:
        w: finite numbers; in is a multiple of 32; n of 16, unless these are a tensor's last rows.
        bits: 8 or 4.
        out: uint8 [ceil(n / 16), ceil(in / 64), 1088 or 576], C-contiguous.

    Returns:
        The sums of (w - w')^2 and of w^2, and the largest |w - w'|.
    """
    n, columns = w.shape
    if columns % GROUP_SIZE or out.shape != packed_shape(n, columns, bits):
        raise ValueError(f"blocks of shape {out.shape} are no {bits}-bit weight {w.shape}")
    if not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError("the blocks must be writable and contiguous")
    rows = np.ascontiguousarray(w)
    if n % BLOCK_ROWS:
        _fill_empty(out[-1:], bits)
    if columns % BLOCK_COLUMNS:
        _fill_empty(out[:, -1:], bits)
    sums = np.zeros(_SUMS_BYTES, dtype=np.uint8)
    _round_rows(
        rows.ctypes.data, n, columns, rows.dtype == np.uint16, bits, out.ctypes.data,
        block_bytes(bits), sums.ctypes.data,
    )  # fmt: skip
    squares = sums[:_MAX_AT].view(np.float64).reshape(2, LANES).sum(axis=1)
    return float(squares[0]), float(squares[1]), float(sums[_MAX_AT:].view(np.float32).max())


@jit
def _pack_rows(w, scale, n_rows, columns, out, block_row_bytes):  # type: ignore[no-untyped-def]
    """Whole blocks of published INT4 [n_rows, columns] at these addresses."""
    row_bytes = columns // 2
    for row in range(0, n_rows, BLOCK_ROWS):
        fill_blocks(
            out, w, scale, row_bytes, row, row + BLOCK_ROWS - 1, columns // GROUP_SIZE,
            w + (row + BLOCK_ROWS) * row_bytes,
        )  # fmt: skip
        out += block_row_bytes


def pack_int4(weight: Int4Weight, out: U8) -> None:
    """Write published INT4 into `out`, exactly. Several Python threads may do that at once.

    Args:
        out: uint8 [ceil(n / 16), ceil(in / 64), 576], C-contiguous.
    """
    rows, columns = weight.shape
    if out.shape != packed_shape(rows, columns, 4):
        raise ValueError(f"blocks of shape {out.shape} are no 4-bit weight {weight.shape}")
    if not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError("the blocks must be writable and contiguous")
    if rows % BLOCK_ROWS or columns % _COLUMNS_AT_ONCE:  # of no expert of Kimi K2
        pack(weight, out)
        return
    values, scale = np.ascontiguousarray(weight.packed), np.ascontiguousarray(weight.scale)
    _pack_rows(
        values.ctypes.data, scale.ctypes.data, rows, columns, out.ctypes.data, out.strides[0]
    )


def _fill_empty(blocks: U8, bits: int) -> None:
    """Zeros with scale 0, which is what lies beyond a weight's shape."""
    blocks[:, :, : 128 * bits] = 0x80 if bits == 8 else 0x88
    blocks[:, :, 128 * bits :] = 0
