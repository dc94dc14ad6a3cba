"""MLA's key up-projection, absorbed into the query: sums of rows of W_UK, weighted by the query.

One token is memory-bound, so the rows pass in windows that lie together in memory, and the next
window is fetched meanwhile. (The value side is a batch of plain products: `kernels.matmul`.)
"""

from __future__ import annotations

from typing import Any

from numba.core import types

from kimi_cpu.kernels.common import KIND_BF16, KIND_F32
from kimi_cpu.kernels.dense import load_weights
from kimi_cpu.kernels.isa import REGISTERS, standalone
from kimi_cpu.kernels.simd import FLOAT, LANES, Emit, F32x16, const, literal_intrinsic

#: Tokens that share a row of the weight.
_TOKENS = 4
#: Vectors of the sums of one token, and of each of _TOKENS tokens, that fit the registers.
_VECTORS_ONE = REGISTERS // 2
_VECTORS = max(REGISTERS // 2 // _TOKENS, 1)
_WINDOW_ROWS = 16


@literal_intrinsic
def _weighted_rows(
    typingctx: Any, kind: Any, count: Any, coef: Any, coef_stride: Any, n: Any, w: Any, width: Any,
    head_bytes: Any, out: Any, out_stride: Any,
) -> Any:  # fmt: skip
    """out[c, :] = sum over i < n, in order, of coef[c, i] * w[i, :]; literal kind and count of c.

    w [n, width] of a head; the next head's lies head_bytes further on. Strides in bytes.
    """
    kind_value, count_value = kind.literal_value, count.literal_value
    size = 4 if kind_value == KIND_F32 else 2
    vectors = _VECTORS_ONE if count_value == 1 else _VECTORS

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, b = Emit(builder), builder
        _, _, coef, coef_stride, n, w, width, head_bytes, out, out_stride = args
        row_bytes = e.mul(width, size)
        coefs = [e.add(coef, e.mul(coef_stride, c)) for c in range(count_value)]
        outs = [e.add(out, e.mul(out_stride, c)) for c in range(count_value)]
        main = e.mul(b.sdiv(width, e.i64(LANES * vectors)), LANES * vectors)

        def columns(window: Any, ahead: Any, column: Any, n_vectors: int, mask: Any = None) -> None:
            begins = b.icmp_signed("==", window, e.i64(0))
            zero = const(F32x16, 0.0)
            places = [e.add(o, e.mul(column, 4)) for o in outs]
            acc: list[list[Any]] = []
            for place in places:
                acc.append([])
                for v in range(n_vectors):
                    at = e.add(place, 64 * v)
                    old = e.load(F32x16, at) if mask is None else e.load_masked(F32x16, at, mask)
                    acc[-1].append(e.variable(b.select(begins, zero, old)))
            with e.loop(window, e.min(e.add(window, _WINDOW_ROWS), n)) as i:
                row = e.add(e.add(w, e.mul(i, row_bytes)), e.mul(column, size))
                if count_value == 1 and mask is None:
                    for line in range(0, LANES * size * n_vectors, 64):
                        e.prefetch(e.add(row, ahead), line)
                weights = [
                    load_weights(e, kind_value, e.add(row, LANES * size * v), mask)
                    for v in range(n_vectors)
                ]
                for c, sums in enumerate(acc):
                    factor = e.splat(e.load(FLOAT, e.add(coefs[c], e.mul(i, 4))))
                    for weight, slot in zip(weights, sums, strict=True):
                        e.set(slot, e.fma(factor, weight, e.get(slot)))
            for place, sums in zip(places, acc, strict=True):
                for v, slot in enumerate(sums):
                    if mask is None:
                        e.store(e.get(slot), place, 64 * v)
                    else:
                        e.store_masked(e.get(slot), place, mask)

        with e.loop(0, n, _WINDOW_ROWS) as window:
            inside = b.icmp_signed("<", e.add(window, _WINDOW_ROWS), n)
            to_next_head = b.sub(head_bytes, e.mul(window, row_bytes))
            ahead = b.select(inside, e.mul(row_bytes, _WINDOW_ROWS), to_next_head)
            with e.loop(0, main, LANES * vectors) as column:
                columns(window, ahead, column, vectors)
            with e.loop(main, width, LANES) as column:
                columns(window, ahead, column, 1, e.lanes_below(b.sub(width, column)))
        return context.get_dummy_value()

    return types.void(kind, count, *[types.int64] * 8), codegen


@standalone
def absorb_q_range(  # type: ignore[no-untyped-def]
    q, w, is_bf16, out, n_tokens, n_heads, n_dim, rank, w_head_rows, start, stop
):
    """out[t, h, :] = sum over n of q[t, h, n] * W_UK[h][n, :], heads start .. stop-1."""
    head_bytes = w_head_rows * rank * (2 if is_bf16 else 4)
    q_stride, out_stride = n_heads * n_dim * 4, n_heads * rank * 4
    for h in range(start, stop):
        weights = w + h * head_bytes
        t = 0
        while t < n_tokens:
            at, place = q + (t * n_heads + h) * n_dim * 4, out + (t * n_heads + h) * rank * 4
            if n_tokens - t >= _TOKENS:
                if is_bf16:
                    _weighted_rows(
                        KIND_BF16, _TOKENS, at, q_stride, n_dim, weights, rank, head_bytes, place,
                        out_stride,
                    )  # fmt: skip
                else:
                    _weighted_rows(
                        KIND_F32, _TOKENS, at, q_stride, n_dim, weights, rank, head_bytes, place,
                        out_stride,
                    )  # fmt: skip
                t += _TOKENS
            else:
                if is_bf16:
                    _weighted_rows(
                        KIND_BF16, 1, at, q_stride, n_dim, weights, rank, head_bytes, place,
                        out_stride,
                    )  # fmt: skip
                else:
                    _weighted_rows(
                        KIND_F32, 1, at, q_stride, n_dim, weights, rank, head_bytes, place,
                        out_stride,
                    )  # fmt: skip
                t += 1
