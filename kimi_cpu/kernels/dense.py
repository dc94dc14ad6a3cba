"""Inner loops over float32 and bf16 weights: dot products and weighted sums of rows.

Both work on a tile: R rows of the weight and C vectors (tokens, heads or queries) share every
load. The order of additions of one result does not depend on R, C or on its place in the tile.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from kimi_cpu.kernels.common import KIND_BF16, KIND_F32
from kimi_cpu.kernels.simd import (
    FLOAT,
    I16,
    I64,
    LANES,
    Emit,
    F32x16,
    const,
    literal_intrinsic,
    vec,
)

PREFETCH_BYTES = 1024


def load_weights(e: Emit, kind: int, addr: Any, mask: Any = None) -> Any:
    """16 consecutive weights as float32; with a mask, only its lanes are read."""
    if kind == KIND_F32:
        return e.load(F32x16, addr) if mask is None else e.load_masked(F32x16, addr, mask)
    bits = vec(I16)
    return e.bf16(e.load(bits, addr) if mask is None else e.load_masked(bits, addr, mask))


def emit_dot(e: Emit, kind: int, x: list[Any], w: list[Any], d: Any) -> list[list[Any]]:
    """Accumulators [R][C] of w[r] . x[c] over d elements (any d >= 0), lanes not yet summed."""
    size = 4 if kind == KIND_F32 else 2
    acc = [[e.variable(const(F32x16, 0.0)) for _ in x] for _ in w]

    def step(i: Any, offset: int, mask: Any = None) -> None:
        xi = e.mul(i, 4)
        wi = e.mul(i, size)
        xs = []
        for x_c in x:
            at = e.add(e.add(x_c, xi), offset * 4)
            xs.append(e.load(F32x16, at) if mask is None else e.load_masked(F32x16, at, mask))
        for r, w_r in enumerate(w):
            row = load_weights(e, kind, e.add(e.add(w_r, wi), offset * size), mask)
            for c, x_c in enumerate(xs):
                e.set(acc[r][c], e.fma(row, x_c, e.get(acc[r][c])))

    main = e.b.and_(d, ir.Constant(I64, -2 * LANES))
    with e.loop(0, main, 2 * LANES) as i:
        if len(x) == 1:  # memory-bound: a cache line of every row is asked for ahead
            for w_r in w:
                for line in range(2 * size // 4):
                    e.prefetch(e.add(w_r, e.mul(i, size)), PREFETCH_BYTES + 64 * line)
        step(i, 0)
        step(i, LANES)
    with e.loop(main, d, LANES) as i:
        step(i, 0, e.lanes_below(e.b.sub(d, i)))
    return acc


@literal_intrinsic
def axpy_tile(
    typingctx: Any, kind: Any, count: Any, coef: Any, coef_stride: Any, n: Any, w: Any,
    w_stride: Any, width: Any, alpha: Any, out: Any, out_stride: Any,
) -> Any:  # fmt: skip
    """out[c, :] = alpha[c] * out[c, :] + sum over i < n, in order, of coef[c, i] * w[i, :].

    kind (KIND_F32 or KIND_BF16) and count (the number of c) are literals. coef, w, out and
    alpha are addresses, strides are bytes between rows; w and out have `width` columns.
    """
    vectors = 4 if count.literal_value > 1 else 8
    kind_value, count_value = kind.literal_value, count.literal_value
    size = 4 if kind_value == KIND_F32 else 2

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emit(builder)
        _, _, coef, coef_stride, n, w, w_stride, width, alpha, out, out_stride = args
        coefs = [e.add(coef, e.mul(coef_stride, c)) for c in range(count_value)]
        outs = [e.add(out, e.mul(out_stride, c)) for c in range(count_value)]
        alphas = [e.splat(e.load(FLOAT, alpha, 4 * c)) for c in range(count_value)]

        def columns(first: Any, n_vectors: int, mask: Any = None) -> None:
            def place(base: Any, v: int) -> Any:
                return e.add(base, e.add(e.mul(first, 4), 64 * v))

            acc: list[list[Any]] = []
            for c in range(count_value):
                acc.append([])
                for v in range(n_vectors):
                    at = place(outs[c], v)
                    old = e.load(F32x16, at) if mask is None else e.load_masked(F32x16, at, mask)
                    acc[c].append(e.variable(builder.fmul(old, alphas[c])))
            with e.loop(0, n) as i:
                row = e.add(e.add(w, e.mul(i, w_stride)), e.mul(first, size))
                rows = [
                    load_weights(e, kind_value, e.add(row, LANES * size * v), mask)
                    for v in range(n_vectors)
                ]
                for c in range(count_value):
                    factor = e.splat(e.load(FLOAT, e.add(coefs[c], e.mul(i, 4))))
                    for v in range(n_vectors):
                        e.set(acc[c][v], e.fma(factor, rows[v], e.get(acc[c][v])))
            for c in range(count_value):
                for v in range(n_vectors):
                    value = e.get(acc[c][v])
                    if mask is None:
                        e.store(value, place(outs[c], v))
                    else:
                        e.store_masked(value, place(outs[c], v), mask)

        main = builder.mul(builder.sdiv(width, e.i64(LANES * vectors)), e.i64(LANES * vectors))
        with e.loop(0, main, LANES * vectors) as first:
            columns(first, vectors)
        with e.loop(main, width, LANES) as first:
            columns(first, 1, e.lanes_below(builder.sub(width, first)))
        return context.get_dummy_value()

    assert kind_value in (KIND_F32, KIND_BF16)
    return types.void(kind, count, *[types.int64] * 9), codegen
