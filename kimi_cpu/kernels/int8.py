"""Inner loops over int8 weights in groups of 32 (`quant.Int8Weight`), rows in natural order.

`vpdpbusd` wants one side unsigned, so there the weights are used as q + 128 (their top bit
flipped) and the sums start at -128 sum(x), which the packed activations give as -8 sum(x).
"""

from __future__ import annotations

from typing import Any

from kimi_cpu.kernels.int4 import (
    PACK_BYTES,
    PACK_ELEMENTS,
    PACK_SCALES,
    PACK_SUMS,
    PREFETCH_BYTES,
)
from kimi_cpu.kernels.isa import VARIANT
from kimi_cpu.kernels.simd import FLOAT, I8, I16, I32, LANES, Emit, F32x16, I32x16, const, vec

BIASED = VARIANT == "avx512vnni"
_BYTES = vec(I8, 64)


def bias_weights(e: Emit, words: Any) -> Any:
    """<16 x i32> of raw weights -> <64 x i8> as `dot_s8` takes them."""
    raw = e.b.bitcast(words, _BYTES)
    return e.b.xor(raw, const(_BYTES, -128)) if BIASED else raw


def start_sums(e: Emit, sums: Any) -> Any:
    """What a dot product starts at, from the activations' -8 sum(x) (a scalar or a vector)."""
    return e.b.shl(sums, const(sums.type, 4)) if BIASED else const(sums.type, 0)


def dot_s8(e: Emit, total: Any, w: Any, x: Any) -> Any:
    """total <16 x i32> + four products a lane of w (of `bias_weights`) and x, <64 x i8>."""
    if BIASED:
        return e.dot_u8_s8(total, w, x)
    if VARIANT == "avx2":
        parts = []
        for half in (range(32), range(32, 64)):
            w_half, x_half = e.shuffle(w, w, half), e.shuffle(x, x, half)
            size = e.call("llvm.abs.v32i8", vec(I8, 32), [w_half, const(e.bool_type, 0)])
            signed = e.call("llvm.x86.avx2.psign.b", vec(I8, 32), [x_half, w_half])
            # At most 2 * 128 * 127: no 16-bit overflow
            pairs = e.call("llvm.x86.avx2.pmadd.ub.sw", vec(I16, 16), [size, signed])
            parts.append(
                e.call("llvm.x86.avx2.pmadd.wd", vec(I32, 8), [pairs, const(vec(I16, 16), 1)])
            )
        return e.b.add(total, e.shuffle(parts[0], parts[1], range(16)))
    products = e.b.mul(e.b.sext(w, vec(I16, 64)), e.b.sext(x, vec(I16, 64)))
    for i in range(4):
        lane = e.shuffle(products, products, range(i, 64, 4))
        total = e.b.add(total, e.b.sext(lane, I32x16))
    return total


def emit_dot_int8_q8(
    e: Emit, x: list[Any], w: list[Any], scale: list[Any], d: Any
) -> list[list[Any]]:
    """Accumulators [R][C] of int8 w[r] . packed int8 x[c], d a multiple of 32."""
    acc = [[e.variable(const(F32x16, 0.0)) for _ in x] for _ in w]

    def part(i: Any, groups_left: Any = None) -> None:
        """512 elements; with groups_left, only that many groups of every row exist."""
        x_at = [e.add(x_c, e.mul(i, PACK_BYTES)) for x_c in x]
        w_at = [e.add(w_r, e.mul(i, PACK_ELEMENTS)) for w_r in w]
        starts = [start_sums(e, e.load(I32x16, at, PACK_SUMS)) for at in x_at]
        x_scale = [e.load(F32x16, at, PACK_SCALES) for at in x_at]
        products = []
        for s_r in scale:
            at = e.add(s_r, e.mul(i, PACK_ELEMENTS // 16))
            if groups_left is None:
                bits = e.load(vec(I16), at)
            else:
                bits = e.load_masked(vec(I16), at, e.lanes_below(groups_left))
            w_scale = e.bf16(bits)
            products.append([e.b.fmul(w_scale, s) for s in x_scale])
        for vector in range(8):
            if groups_left is None:
                two_groups(vector, x_at, starts, w_at, products)
                continue
            left = e.b.sub(groups_left, e.i64(2 * vector))
            with e.b.if_then(e.b.icmp_signed(">", left, e.i64(0))):
                two_groups(vector, x_at, starts, w_at, products, e.lanes_below(e.mul(left, 8)))

    def two_groups(
        vector: int, x_at: Any, starts: Any, w_at: Any, products: Any, mask: Any = None
    ) -> None:
        block, half = divmod(vector, 2)
        elements = range(64 * half, 64 * half + 64)
        natural = [n // 32 * 16 + n % 32 // 2 + 64 * (n % 2) for n in elements]
        lanes = [2 * vector + lane // 8 for lane in range(LANES)]
        # the sum of a group goes to one of its eight lanes
        first = [2 * vector + lane // 8 if lane % 8 == 0 else LANES for lane in range(LANES)]
        weights = []
        for at in w_at:
            if mask is None:
                if len(x) == 1:
                    e.prefetch(at, PREFETCH_BYTES + 64 * vector)
                words = e.load(I32x16, at, 64 * vector)
            else:
                words = e.load_masked(I32x16, e.add(at, 64 * vector), mask)
            weights.append(bias_weights(e, words))
        for c, at in enumerate(x_at):
            even, odd = e.load(_BYTES, at, 128 * block), e.load(_BYTES, at, 128 * block + 64)
            activations = e.shuffle(even, odd, natural)
            start = e.shuffle(starts[c], const(I32x16, 0), first)
            for r, row in enumerate(weights):
                total = e.b.sitofp(dot_s8(e, start, row, activations), F32x16)
                scales = e.shuffle(products[r][c], products[r][c], lanes)
                e.set(acc[r][c], e.fma(total, scales, e.get(acc[r][c])))

    n_parts = e.b.sdiv(d, e.i64(PACK_ELEMENTS))
    with e.loop(0, n_parts) as i:
        part(i)
    groups_left = e.b.sdiv(e.b.srem(d, e.i64(PACK_ELEMENTS)), e.i64(32))
    with e.b.if_then(e.b.icmp_signed(">", groups_left, e.i64(0))):
        part(n_parts, groups_left)
    return acc


def emit_dot_int8_f32(
    e: Emit, x: list[Any], w: list[Any], scale: list[Any], d: Any
) -> list[list[Any]]:
    """Accumulators [R][C] of int8 w[r] . float32 x[c], d a multiple of 32; exact weights."""
    acc = [[e.variable(const(F32x16, 0.0)) for _ in x] for _ in w]
    with e.loop(0, e.b.sdiv(d, e.i64(32))) as group:
        for half in range(2):
            x_vectors = [e.load(F32x16, e.add(x_c, e.mul(group, 128)), 64 * half) for x_c in x]
            for r, (w_r, s_r) in enumerate(zip(w, scale, strict=True)):
                raw = e.load(vec(I8), e.add(w_r, e.mul(group, 32)), 16 * half)
                bits = e.b.zext(e.load(I16, e.add(s_r, e.mul(group, 2))), I32)
                s = e.splat(e.b.bitcast(e.b.shl(bits, const(I32, 16)), FLOAT))
                values = e.b.fmul(e.b.sitofp(e.b.sext(raw, I32x16), F32x16), s)
                for c, x_c in enumerate(x_vectors):
                    e.set(acc[r][c], e.fma(values, x_c, e.get(acc[r][c])))
    return acc
