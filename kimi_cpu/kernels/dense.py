"""The inner loop over float32 and bf16 weights: dot products.

It works on a tile: R rows of the weight and C vectors (tokens, heads or queries) share every
load. The order of additions of one result does not depend on R, C or on its place in the tile.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from kimi_cpu.kernels.common import KIND_F32
from kimi_cpu.kernels.simd import (
    I16,
    I64,
    LANES,
    Emit,
    F32x16,
    const,
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
