"""Inner loops over INT4 weights in the published nibble order, and the activations they want.

A byte of a row holds elements 2b (low nibble) and 2b + 1 (high nibble), stored as q + 8. So 64
bytes are 4 groups of 32 elements: masking gives 64 even elements, shifting 64 odd ones, and
only the activations have to be de-interleaved, once per vector. With u = q + 8 unsigned,
dot(q, x) = dot(u, x) - 8 sum(x), and the accumulators simply start at -8 sum(x).

Packed activations, per token and 512 elements (`PACK_BYTES`; zeros pad the last part):
    4 x [64 even int8 | 64 odd int8]
    16 int32: -8 * the sum of a group of 32
    16 float32: the scales of the groups
"""

from __future__ import annotations

from typing import Any

from numba.core import types

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
    intrinsic,
    quarters,
    vec,
)

PACK_ELEMENTS = 512
PACK_SUMS = 4 * 128
PACK_SCALES = PACK_SUMS + 64
PACK_BYTES = PACK_SCALES + 64


def packed_bytes(d: int) -> int:
    """Bytes of one token's packed activations of d elements."""
    return -(-d // PACK_ELEMENTS) * PACK_BYTES


def _sum_fours(e: Emit, rows: list[Any]) -> Any:
    """4 vectors of 4 x 4 int32 -> one, in quarter q lane r the sum of quarter q of vector r."""
    low, high = quarters(0, 4, 1, 5), quarters(2, 6, 3, 7)
    a, b = [e.b.add(e.shuffle(v, w, low), e.shuffle(v, w, high)) for v, w in (rows[:2], rows[2:])]
    return e.b.add(e.shuffle(a, b, quarters(0, 1, 4, 5)), e.shuffle(a, b, quarters(2, 3, 6, 7)))


def _scales_of_four(e: Emit, rows: list[Any]) -> list[Any]:
    """4 rows' scales, <16 x i16> of bf16 -> 4 float vectors, in quarter q of b group 4 b + q."""

    def eights(*low: int) -> list[int]:  # the same in each half of 8 lanes
        return [8 * h + i if i < 8 else 8 + 8 * h + i for h in range(2) for i in low]

    a, b, c, d = rows
    low, high = eights(0, 8, 1, 9, 2, 10, 3, 11), eights(4, 12, 5, 13, 6, 14, 7, 15)
    found = []
    for lanes in (low, high):  # groups 0-3 and 8-11, then 4-7 and 12-15
        ab, cd = e.shuffle(a, b, lanes), e.shuffle(c, d, lanes)
        two = e.shuffle(ab, cd, eights(0, 1, 8, 9, 2, 3, 10, 11))
        next_two = e.shuffle(ab, cd, eights(4, 5, 12, 13, 6, 7, 14, 15))
        found.append([
            e.bf16(e.shuffle(two, next_two, [*range(h, h + 8), *range(16 + h, 24 + h)]))
            for h in (0, 8)
        ])  # fmt: skip
    return [found[0][0], found[1][0], found[0][1], found[1][1]]


def emit_four_rows(
    e: Emit, x: list[Any], w: list[Any], scale: list[Any], d: Any, ahead: int
) -> list[Any]:
    """Four rows w of int4 times packed int8 x[c]: for each c <4 x float>, in the order of `q8`.

    d is a multiple of 32; the weights `ahead` bytes further on are asked for.
    """
    four = vec(FLOAT, 4)
    acc = [e.variable(const(four, 0.0)) for _ in x]
    nibble, shift = const(vec(I8, 64), 15), const(vec(I8, 64), 4)

    def part(i: Any, groups_left: Any = None) -> None:
        """512 elements; with groups_left, only that many groups of every row exist."""
        x_at = [e.add(x_c, e.mul(i, PACK_BYTES)) for x_c in x]
        w_at = [e.add(w_r, e.mul(i, PACK_ELEMENTS // 2)) for w_r in w]
        s_at = [e.add(s_r, e.mul(i, PACK_ELEMENTS // 16)) for s_r in scale]
        if groups_left is None:
            bits = [e.load(vec(I16), at) for at in s_at]
        else:
            bits = [e.load_masked(vec(I16), at, e.lanes_below(groups_left)) for at in s_at]
        w_scale = _scales_of_four(e, bits)
        for block in range(4):
            if groups_left is None:
                groups(block, x_at, w_at, w_scale[block])
                continue
            left = e.b.sub(groups_left, e.i64(4 * block))
            with e.b.if_then(e.b.icmp_signed(">", left, e.i64(0))):
                groups(block, x_at, w_at, w_scale[block], e.lanes_below(e.mul(left, 4)))

    def groups(block: int, x_at: Any, w_at: Any, w_scale: Any, mask: Any = None) -> None:
        """4 groups, or those of the mask."""
        weights = []
        for at in w_at:
            if mask is None:
                e.prefetch(at, ahead + 64 * block)
                raw = e.load(vec(I8, 64), at, 64 * block)
            else:
                words = e.load_masked(I32x16, e.add(at, 64 * block), mask)
                raw = e.b.bitcast(words, vec(I8, 64))
            weights.append((e.b.and_(raw, nibble), e.b.lshr(raw, shift)))
        for c, at in enumerate(x_at):
            even = e.load(vec(I8, 64), at, 128 * block)
            odd = e.load(vec(I8, 64), at, 128 * block + 64)
            sums = e.load(vec(I32, 4), at, PACK_SUMS + 16 * block)
            start = e.shuffle(sums, sums, [lane // 4 for lane in range(LANES)])
            zero = const(I32x16, 0)
            dots = [e.dot_u4_s8([zero], [pair], [[(even, odd)]])[0] for pair in weights]
            exact = e.b.sitofp(e.b.add(_sum_fours(e, dots), start), F32x16)
            scaled = e.b.fmul(exact, w_scale)
            for q in range(4):
                x_scale = e.load(FLOAT, at, PACK_SCALES + 16 * block + 4 * q)
                factor = e.shuffle(scaled, scaled, range(4 * q, 4 * q + 4))
                e.set(acc[c], e.fma(factor, e.splat(x_scale, 4), e.get(acc[c])))

    n_parts = e.b.lshr(d, e.i64(9))
    with e.loop(0, n_parts) as i:
        part(i)
    groups_left = e.b.and_(e.b.lshr(d, e.i64(5)), e.i64(15))
    with e.b.if_then(e.b.icmp_signed(">", groups_left, e.i64(0))):
        part(n_parts, groups_left)
    return [e.get(slot) for slot in acc]


def emit_dot_f32(e: Emit, x: list[Any], w: list[Any], scale: list[Any], d: Any) -> list[list[Any]]:
    """Accumulators [R][C] of int4 w[r] . float32 x[c], d a multiple of 32; exact weights."""
    acc = [[e.variable(const(F32x16, 0.0)) for _ in x] for _ in w]
    bytes16 = vec(I8)
    with e.loop(0, e.b.sdiv(d, e.i64(32))) as group:
        x_vectors = [
            [e.load(F32x16, e.add(x_c, e.mul(group, 128)), 64 * half) for half in range(2)]
            for x_c in x
        ]
        for r, (w_r, s_r) in enumerate(zip(w, scale, strict=True)):
            raw = e.load(bytes16, e.add(w_r, e.mul(group, 16)))
            low = e.b.and_(raw, const(bytes16, 15))
            high = e.b.lshr(raw, const(bytes16, 4))
            bits = e.b.zext(e.load(I16, e.add(s_r, e.mul(group, 2))), I32)
            s = e.splat(e.b.bitcast(e.b.shl(bits, const(I32, 16)), FLOAT))
            minus_8s = e.b.fmul(s, const(F32x16, -8.0))
            for half in range(2):
                natural = [8 * half + i // 2 + 16 * (i % 2) for i in range(16)]
                u = e.b.uitofp(e.b.zext(e.shuffle(low, high, natural), I32x16), F32x16)
                values = e.fma(u, s, minus_8s)  # (u - 8) s is exact in float32
                for c in range(len(x)):
                    e.set(acc[r][c], e.fma(values, x_vectors[c][half], e.get(acc[r][c])))
    return acc


@intrinsic
def _pack_group(typingctx: Any, x: Any, q: Any, sums: Any) -> Any:
    """Quantise 32 float32 at x: 16 even int8 to q, odd ones to q + 64, sum and scale to `sums`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, b = Emit(builder), builder
        x, q_at, sums = args
        halves = [e.load(F32x16, x, 0), e.load(F32x16, x, 64)]
        sign = const(I32x16, 0x7FFFFFFF)
        absolute = [b.bitcast(b.and_(b.bitcast(h, I32x16), sign), F32x16) for h in halves]
        largest = e.max(e.maximum(*absolute))
        positive = b.fcmp_ordered(">", largest, const(FLOAT, 0.0))
        inverse = b.select(positive, b.fdiv(const(FLOAT, 127.0), largest), const(FLOAT, 0.0))
        e.store(b.fmul(largest, const(FLOAT, 1 / 127)), sums, PACK_SCALES - PACK_SUMS)
        q = [
            b.trunc(b.fptosi(e.round(b.fmul(h, e.splat(inverse))), I32x16), vec(I8)) for h in halves
        ]
        even = e.shuffle(q[0], q[1], range(0, 32, 2))
        odd = e.shuffle(q[0], q[1], range(1, 32, 2))
        e.store(even, q_at)
        e.store(odd, q_at, 64)
        total = e.sum_i32(b.add(b.sext(even, I32x16), b.sext(odd, I32x16)))
        e.store(b.mul(total, const(I32, -8)), sums)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@jit
def pack_rows(x, d, out, start, stop, first, last):  # type: ignore[no-untyped-def]
    """Pack the elements [first, last) (multiples of 32) of the rows start .. stop-1 of x [T, d].

    out must be zero beyond d, where the last part is padded.
    """
    row_bytes = (d + PACK_ELEMENTS - 1) // PACK_ELEMENTS * PACK_BYTES
    for t in range(start, stop):
        for g in range(first // 32, last // 32):
            part = out + t * row_bytes + g // 16 * PACK_BYTES
            place = g % 16
            _pack_group(
                x + (t * d + g * 32) * 4, part + place // 4 * 128 + place % 4 * 16,
                part + PACK_SUMS + place * 4,
            )  # fmt: skip
