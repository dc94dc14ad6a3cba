"""Matrix products over every kind of weight: out[p, r] = x[index[p]] . w[r].

One vector (GEMV) is memory-bound: a tile reads several far-apart streams of rows, which the
memory controller likes better than one. Many vectors (GEMM) reuse each row for a few vectors.
Every kernel of a kind adds up a result in the same order, so a token does not see its neighbours:
tokens computed together give bit for bit what each gives alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.core import types

from kimi_cpu.kernels.bf16 import bf16_rows
from kimi_cpu.kernels.common import (
    KIND_BF16,
    KIND_F32,
    KIND_INT4,
    KIND_PACKED4,
    KIND_PACKED8,
    WITH_Q8,
)
from kimi_cpu.kernels.dense import emit_dot
from kimi_cpu.kernels.gemm import gemm_rows
from kimi_cpu.kernels.int4 import emit_dot_f32
from kimi_cpu.kernels.isa import REGISTERS, VARIANT, jit, standalone
from kimi_cpu.kernels.packed import rows_f32
from kimi_cpu.kernels.q8 import few_rows
from kimi_cpu.kernels.simd import Emit, literal_intrinsic

# Tiles that fit the registers.
STREAMS = 8 if REGISTERS == 32 else 4
TILE_ROWS = TILE_TOKENS = 4 if REGISTERS == 32 else 2
#: Rows whose weights stay in the L2 cache while all tokens pass by.
ROW_BLOCK = 32
#: From so many tokens on, turning published rows to the packed order first pays.
GEMM_TOKENS = 17 if VARIANT == "avx512vnni" else 5


@literal_intrinsic
def dot_tile(
    typingctx: Any, rows: Any, tokens: Any, kind: Any, x: Any, x_stride: Any, index: Any,
    p_first: Any, p_last: Any, out: Any, out_stride: Any, w: Any, scale: Any, r_first: Any,
    r_step: Any, r_last: Any, d: Any,
) -> Any:  # fmt: skip
    """out[p, r] = x[index[p]] . w[r] for `tokens` p from p_first, `rows` r in steps of r_step.

    rows and tokens are literals. Past p_last (r_last) the last one is computed again, so the
    tile needs no remainder. Addresses and strides in bytes; index is an address of int64.
    """
    n_rows, n_tokens = rows.literal_value, tokens.literal_value
    only_kind = kind.literal_value if isinstance(kind, types.IntegerLiteral) else None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, b = Emit(builder), builder
        kind_value, x, x_stride, index, p_first, p_last, out, out_stride = args[2:10]
        w, scale, r_first, r_step, r_last, d = args[10:]
        xs, outs = [], []
        for c in range(n_tokens):
            p = e.min(e.add(p_first, c), p_last)
            source = e.load(p_first.type, e.add(index, e.mul(p, 8)))
            xs.append(e.add(x, e.mul(source, x_stride)))
            outs.append(e.add(out, e.mul(p, out_stride)))
        which = [e.min(e.add(r_first, e.mul(r_step, r)), r_last) for r in range(n_rows)]

        def body(kind_here: int) -> None:
            if kind_here in (KIND_F32, KIND_BF16):
                row_bytes = e.mul(d, 4 if kind_here == KIND_F32 else 2)
                acc = emit_dot(e, kind_here, xs, [e.add(w, e.mul(r, row_bytes)) for r in which], d)
            else:
                row_bytes, scale_bytes = b.sdiv(d, e.i64(2)), b.sdiv(d, e.i64(16))
                acc = emit_dot_f32(
                    e,
                    xs,
                    [e.add(w, e.mul(r, row_bytes)) for r in which],
                    [e.add(scale, e.mul(r, scale_bytes)) for r in which],
                    d,
                )
            for r, row in enumerate(which):
                for c, out_c in enumerate(outs):
                    e.store(e.sum(e.get(acc[r][c])), e.add(out_c, e.mul(row, 4)))

        if only_kind is not None:
            body(only_kind)
        else:
            for k in (KIND_F32, KIND_BF16, KIND_INT4):
                with b.if_then(b.icmp_signed("==", kind_value, e.i64(k))):
                    body(k)
        return context.get_dummy_value()

    kind_type = kind if only_kind is not None else types.int64
    return types.void(rows, tokens, kind_type, *[types.int64] * 13), codegen


@standalone
def _rows_in_float32(  # type: ignore[no-untyped-def]
    kind, x, x_stride, index, p_start, p_stop, out, out_stride, w, scale, d, start, stop
):
    """`dot_rows` of float32 activations and weights that are float32, bf16 or published INT4."""
    if p_stop - p_start == 1:
        step = (stop - start + STREAMS - 1) // STREAMS
        for i in range(step):
            dot_tile(
                STREAMS, 1, kind, x, x_stride, index, p_start, p_start, out, out_stride, w, scale,
                start + i, step, stop - 1, d,
            )  # fmt: skip
        return
    for block in range(start, stop, ROW_BLOCK):
        block_stop = min(block + ROW_BLOCK, stop)
        for p in range(p_start, p_stop, TILE_TOKENS):
            for r in range(block, block_stop, TILE_ROWS):
                dot_tile(
                    TILE_ROWS, TILE_TOKENS, kind, x, x_stride, index, p, p_stop - 1,
                    out, out_stride, w, scale, r, 1, block_stop - 1, d,
                )  # fmt: skip


@jit
def dot_rows(  # type: ignore[no-untyped-def]
    kind, x, x_stride, index, p_start, p_stop, out, out_stride, w, scale, d, start, stop
):
    """out[p, r] = x[index[p]] . w[r], p_start <= p < p_stop, start <= r < stop.

    For packed weights start is a multiple of 16. x: float32; with a kind + WITH_Q8 packed int8
    activations, or rounded to bf16 for bf16 weights.
    """
    if kind == KIND_BF16 + WITH_Q8:
        bf16_rows(x, x_stride, index, p_start, p_stop, out, out_stride, w, d, start, stop)
        return
    n, is_q8 = p_stop - p_start, kind >= WITH_Q8
    stored = kind - WITH_Q8 if is_q8 else kind
    if is_q8 and stored == KIND_INT4 and n >= GEMM_TOKENS:
        gemm_rows(x, x_stride, index, p_start, p_stop, out, out_stride, w, scale, d, start, stop)
        return
    if is_q8:
        few_rows(
            stored, x, x_stride, index, p_start, p_stop, out, out_stride, w, scale, d, start, stop,
        )  # fmt: skip
        return
    if stored in (KIND_PACKED4, KIND_PACKED8):
        bits = 8 if stored == KIND_PACKED8 else 4
        rows_f32(bits, x, x_stride, index, p_start, p_stop, out, out_stride, w, d, start, stop)
        return
    _rows_in_float32(
        stored, x, x_stride, index, p_start, p_stop, out, out_stride, w, scale, d, start, stop
    )


@jit
def matmul_range(  # type: ignore[no-untyped-def]
    kind, x, x_stride, x_batch, index, n, out, out_stride, out_batch, w, scale, w_batch, rows, d,
    start, stop,
):  # fmt: skip
    """The part start <= b * rows + r < stop of a batch of products, each as `dot_rows`.

    Product b takes x + b * x_batch, w + b * w_batch, out + b * out_batch (bytes), `rows` rows.
    """
    while start < stop:
        b = start // rows
        first = start - b * rows
        last = min(rows, first + stop - start)
        dot_rows(  # a plain 0 would be compiled in, as a second copy of all that it calls
            kind, x + b * x_batch, x_stride, index, np.int64(0), n, out + b * out_batch,
            out_stride, w + b * w_batch, scale, d, first, last,
        )  # fmt: skip
        start += last - first
