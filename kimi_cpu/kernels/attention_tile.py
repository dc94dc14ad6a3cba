"""Inner loops of attention: queries in the lanes of a vector, blocks of keys in panels.

A *group* is LANE_GROUP queries, one to a lane: a query is a head of a token in decode, a token of
a head in prefill. Its queries lie transposed, [key dimension][lane], so a key's scores against the
whole group are sums of (one number of the key) x (a row of that matrix): no sum across lanes,
neither here nor in the softmax, whose maximum and sum are lanes, too.

Keys and values of a block of rows are copied to *panels* of PANEL columns, once for all groups:
[panel][row][column]. Two forms of arithmetic, chosen by a literal:

    FORM_F32    float32 everywhere
    FORM_BF16   bf16 factors, float32 sums (`vdpbf16ps`, twice the rate). A 32-bit lane holds two
                neighbours along the dimension that is summed: two dimensions of a query or key,
                two rows of the values or of the probabilities.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.registry import cpu_target

from kimi_cpu.kernels.common import KIND_BF16, KIND_F32
from kimi_cpu.kernels.isa import REGISTERS, VARIANT
from kimi_cpu.kernels.simd import (
    FLOAT,
    I16,
    I32,
    I64,
    LANES,
    POINTER,
    Emit,
    F32x16,
    I32x16,
    const,
    intrinsic,
    literal_intrinsic,
    vec,
)

FORM_F32, FORM_BF16 = 0, 1
#: Whether this process's code may use `vdpbf16ps` (Zen 4, Sapphire Rapids and later).
HAS_BF16_DOT: bool = VARIANT == "avx512vnni" and "+avx512bf16" in (
    cpu_target.target_context.codegen().magic_tuple()[2].split(",")
)

# A tile of TILE x VECTORS sums takes half of the registers.
VECTORS = 2 if REGISTERS == 32 else 1
TILE = REGISTERS // 2 // VECTORS
PANEL = LANE_GROUP = LANES * VECTORS
#: Rows of keys that are in the caches at a time; a multiple of ROW_STEP.
BLOCK_ROWS = 128
#: Rows are padded with zeros to a multiple of this.
ROW_STEP = 8
#: Bytes between panels beyond their rows: else the same row of all panels meets in one cache set.
PANEL_GAP = 64
_UNROLL = 4
_ROW_BYTES = 4 * LANE_GROUP

# 2^r for |r| <= 1/2, the relative error least among polynomials that are 1 at 0, highest first.
_EXP2_F32 = (1.32647271e-3, 9.67151264e-3, 5.55073374e-2, 0.240222421, 0.693146978, 1.0)
_EXP2_BF16 = (9.58285304e-3, 5.59064247e-2, 0.240240986, 0.693124193, 1.0)


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not know."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_BF16x32 = ir.VectorType(_BFloat(), 2 * LANES)


def _multiply_add(e: Emit, form: int, a: Any, b: Any, total: Any) -> Any:
    """total + a * b by lanes, or the two products of each pair of bf16."""
    if form == FORM_F32:
        return e.fma(a, b, total)
    assert HAS_BF16_DOT
    pairs = [e.b.bitcast(v, _BF16x32) for v in (a, b)]
    return e.call("llvm.x86.avx512bf16.dpbf16ps.512", F32x16, [total, *pairs])


def _to_bf16(e: Emit, low: Any, high: Any) -> Any:
    """32 float32, rounded to bf16 (ties to even)."""
    bits = e.call("llvm.x86.avx512bf16.cvtne2ps2bf16.512", _BF16x32, [high, low])
    return e.b.bitcast(bits, vec(I16, 2 * LANES))


def _interleave_bf16(e: Emit, rows: list[Any]) -> Any:
    """Two vectors rounded to bf16: lane i of both in the halves of 32-bit lane i."""
    bits = _to_bf16(e, rows[0], rows[1])
    pairs = e.shuffle(bits, bits, [x for i in range(LANES) for x in (i, i + LANES)])
    return e.b.bitcast(pairs, F32x16)


def _emit_tile(
    e: Emit, form: int, acc: list[list[Any]], a: Any, a_row: int, a_step: int, b: Any, n: Any
) -> None:
    """acc[m][v] += sum over k < n of A[m, k] * B[k, v]; n is a multiple of _UNROLL.

    A[m, k] is the 32 bits at a + m * a_row + k * a_step, B[k, v] vector v at b + k * _ROW_BYTES.
    """
    with e.loop(0, n, _UNROLL) as k0:
        a_k, b_k = e.add(a, e.mul(k0, a_step)), e.add(b, e.mul(k0, _ROW_BYTES))
        for k in range(_UNROLL):
            rows = [e.load(F32x16, b_k, k * _ROW_BYTES + 64 * v) for v in range(VECTORS)]
            for m, sums in enumerate(acc):
                factor = e.splat(e.load(FLOAT, a_k, k * a_step + m * a_row))
                for v, slot in enumerate(sums):
                    e.set(slot, _multiply_add(e, form, factor, rows[v], e.get(slot)))


def _scores_code(form: int) -> Any:
    size = 4 if form == FORM_F32 else 2

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emit(builder)
        if form == FORM_BF16 and not HAS_BF16_DOT:  # never called
            return context.get_dummy_value()
        _, keys, queries, n_panels, out, ahead, ahead_stride, ahead_lines = args
        acc = [[e.variable(const(F32x16, 0.0)) for _ in range(VECTORS)] for _ in range(TILE)]
        n = PANEL * size // 4
        with e.loop(0, n_panels) as p:
            line = e.add(ahead, e.mul(p, e.mul(ahead_lines, 64)))
            with e.loop(0, ahead_lines) as i:
                for m in range(TILE):
                    e.prefetch(e.add(line, e.mul(ahead_stride, m)), e.mul(i, 64))
            _emit_tile(
                e, form, acc,
                e.add(keys, e.mul(p, BLOCK_ROWS * PANEL * size + PANEL_GAP)), PANEL * size, 4,
                e.add(queries, e.mul(p, n * _ROW_BYTES)), e.i64(n),
            )  # fmt: skip
        for m, sums in enumerate(acc):
            for v, slot in enumerate(sums):
                e.store(e.get(slot), out, m * _ROW_BYTES + 64 * v)
        return context.get_dummy_value()

    return codegen


@literal_intrinsic
def scores_tile(
    typingctx: Any, form: Any, keys: Any, queries: Any, n_panels: Any, out: Any, ahead: Any,
    ahead_stride: Any, ahead_lines: Any,
) -> Any:  # fmt: skip
    """out[m, lane] = key m . query of the lane, for TILE rows m of a block of keys.

    keys: address of the first row in the first panel; queries: the group's transposed queries;
    out: float32 [TILE, LANE_GROUP]. Meanwhile TILE rows of the next block, ahead_stride bytes
    apart, come from memory, ahead_lines cache lines of each row with every panel.
    """
    return types.void(form, *[types.int64] * 7), _scores_code(form.literal_value)


def _values_code(form: int) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emit(builder)
        if form == FORM_BF16 and not HAS_BF16_DOT:  # never called
            return context.get_dummy_value()
        _, p, values, n, alpha, out, out_stride = args
        acc = []
        places = [e.add(out, e.mul(out_stride, m)) for m in range(TILE)]
        for m, place in enumerate(places):
            factor = e.splat(e.load(FLOAT, alpha, 4 * m))
            acc.append([
                e.variable(builder.fmul(e.load(F32x16, place, 64 * v), factor))
                for v in range(VECTORS)
            ])  # fmt: skip
        _emit_tile(e, form, acc, p, 4, _ROW_BYTES, values, n)
        for place, sums in zip(places, acc, strict=True):
            for v, slot in enumerate(sums):
                e.store(e.get(slot), place, 64 * v)
        return context.get_dummy_value()

    return codegen


@literal_intrinsic
def values_tile(
    typingctx: Any, form: Any, p: Any, values: Any, n: Any, alpha: Any, out: Any, out_stride: Any
) -> Any:
    """out[m, :] = alpha[m] * out[m, :] + sum over k < n of p[k, m] * values[k, :], TILE lanes m.

    p: the first lane's probability in row 0 (or pair of rows 0 and 1); values: one panel; out:
    float32 [TILE, PANEL] with out_stride bytes between rows.
    """
    return types.void(form, *[types.int64] * 6), _values_code(form.literal_value)


def _exp2(e: Emit, form: int, x: Any) -> Any:
    """2^x for x <= 0, exactly 1 for 0, within 2e-7 of the value (4e-6 if it is rounded to bf16)."""
    b = e.b
    x = e.maximum(x, const(F32x16, -126.0))
    magic = const(F32x16, 12582912.0)  # 1.5 * 2^23: the low bits of the sum are the integer
    shifted = b.fadd(x, magic)
    r = b.fsub(x, b.fsub(shifted, magic))
    coefficients = _EXP2_F32 if form == FORM_F32 else _EXP2_BF16
    p = const(F32x16, coefficients[0])
    for coefficient in coefficients[1:]:
        p = e.fma(p, r, const(F32x16, coefficient))
    exponent = b.shl(b.bitcast(shifted, I32x16), const(I32x16, 23))
    return b.bitcast(b.add(b.bitcast(p, I32x16), exponent), F32x16)


def _softmax_code(form: int) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, b = Emit(builder), builder
        if form == FORM_BF16 and not HAS_BF16_DOT:  # never called
            return context.get_dummy_value()
        _, scores, rows, first, limits, state, alpha = args
        low, zero = const(F32x16, float("-inf")), const(F32x16, 0.0)
        every = range(VECTORS)
        begin = e.splat(b.trunc(first, I32))
        limit = [b.sub(e.load(I32x16, limits, 64 * v), begin) for v in every]
        before = [e.load(F32x16, state, 64 * v) for v in every]
        largest = [e.variable(before[v]) for v in every]
        total = [e.variable(zero) for _ in every]

        def passes(masked: bool) -> None:
            def choose(r: Any, v: int, value: Any, other: Any) -> Any:
                if not masked:
                    return value
                row = e.splat(b.trunc(r, I32))
                return e.select(b.icmp_signed("<", row, limit[v]), value, other)

            with e.loop(0, rows) as r:
                for v in every:
                    s = e.load(F32x16, e.add(scores, e.mul(r, _ROW_BYTES)), 64 * v)
                    e.set(largest[v], e.maximum(e.get(largest[v]), choose(r, v, s, low)))
            # A lane that has seen nothing yet would compute inf - inf.
            m = [e.maximum(e.get(largest[v]), const(F32x16, -1e38)) for v in every]
            with e.loop(0, rows, 2) as r:
                source = e.add(scores, e.mul(r, _ROW_BYTES))
                for v in every:
                    p = []
                    for i in range(2):
                        s = e.load(F32x16, source, i * _ROW_BYTES + 64 * v)
                        p.append(choose(e.add(r, i), v, _exp2(e, form, b.fsub(s, m[v])), zero))
                    if form == FORM_F32:
                        e.store(p[0], source, 64 * v)
                        e.store(p[1], source, _ROW_BYTES + 64 * v)
                        e.set(total[v], b.fadd(e.get(total[v]), b.fadd(p[0], p[1])))
                    else:
                        pair = _interleave_bf16(e, p)
                        e.store(pair, e.add(scores, e.mul(b.lshr(r, e.i64(1)), _ROW_BYTES)), 64 * v)
                        ones = const(I32x16, 0x3F803F80)
                        e.set(total[v], _multiply_add(e, form, pair, ones, e.get(total[v])))

        least = b.sext(e.load(I32, limits), I64)  # limits ascend
        with b.if_else(b.icmp_signed("<=", e.add(first, rows), least)) as (whole, part):
            with whole:
                passes(False)
            with part:
                passes(True)
        for v in every:
            m = e.get(largest[v])
            factor = _exp2(e, FORM_F32, b.fsub(before[v], e.maximum(m, const(F32x16, -1e38))))
            factor = e.select(b.fcmp_ordered(">", before[v], low), factor, zero)
            e.store(factor, alpha, 64 * v)
            e.store(m, state, 64 * v)
            old = e.load(F32x16, state, _ROW_BYTES + 64 * v)
            e.store(e.fma(old, factor, e.get(total[v])), state, _ROW_BYTES + 64 * v)
        return context.get_dummy_value()

    return codegen


@literal_intrinsic
def softmax_block(
    typingctx: Any, form: Any, scores: Any, rows: Any, first: Any, limits: Any, state: Any,
    alpha: Any,
) -> Any:  # fmt: skip
    """One block of an online softmax, in place: scores [rows, LANE_GROUP] become probabilities.

    Row r of lane i becomes 2^(score - m), or 0 if first + r >= limits[i] (int32, ascending).
    state: float32 running maxima m [LANE_GROUP], then sums [LANE_GROUP]; alpha [LANE_GROUP]: what
    everything before this block must be multiplied by. rows is even; FORM_BF16 leaves pairs of
    rows in rows / 2 rows, and the sum is of the rounded probabilities.
    """
    return types.void(form, *[types.int64] * 6), _softmax_code(form.literal_value)


# Copies


def _load_columns(e: Emit, kind: int, addr: Any, n: Any) -> Any:
    """The first n (any integer, at most 16 count) of 16 elements; float32, or bf16 bits."""
    ty = F32x16 if kind == KIND_F32 else vec(I16)
    result = e.variable(const(ty, 0))
    with e.b.if_else(e.b.icmp_signed(">=", n, e.i64(LANES))) as (whole, part):
        with whole:
            e.set(result, e.load(ty, addr))
        with part, e.b.if_then(e.b.icmp_signed(">", n, e.i64(0))):
            e.set(result, e.load_masked(ty, addr, e.lanes_below(n)))
    return e.get(result)


@literal_intrinsic
def pack_rows_f32(
    typingctx: Any, kind: Any, source: Any, stride: Any, n_rows: Any, rows: Any, n_columns: Any,
    out: Any,
) -> Any:  # fmt: skip
    """Panels of float32 from n_rows rows of n_columns elements of a literal kind, zero-padded.

    rows (>= n_rows) are written in each panel; a panel has room for BLOCK_ROWS.
    """
    kind_value = kind.literal_value
    size = 4 if kind_value == KIND_F32 else 2

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, b = Emit(builder), builder
        _, source, stride, n_rows, rows, n_columns, out = args
        with e.loop(0, rows) as r:
            row = e.add(source, e.mul(r, stride))
            place = e.variable(e.add(out, e.mul(r, _ROW_BYTES)))
            whole = b.select(b.icmp_signed("<", r, n_rows), n_columns, e.i64(0))
            with e.loop(0, n_columns, PANEL) as first:
                here, left = e.add(row, e.mul(first, size)), b.sub(whole, first)
                for v in range(VECTORS):
                    n = b.sub(left, e.i64(LANES * v))
                    value = _load_columns(e, kind_value, e.add(here, LANES * size * v), n)
                    if kind_value == KIND_BF16:
                        value = e.bf16(value)
                    e.store(value, e.get(place), 64 * v)
                e.set(place, e.add(e.get(place), BLOCK_ROWS * PANEL * 4 + PANEL_GAP))
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 6), codegen


@literal_intrinsic
def pack_rows_bf16(
    typingctx: Any, kind: Any, source: Any, stride: Any, n_rows: Any, rows: Any, n_columns: Any,
    keys: Any, values: Any,
) -> Any:  # fmt: skip
    """As `pack_rows_f32` in bf16, rows even: as keys and, with pairs of rows, as values.

    Either address may be 0: that form is left out.
    """
    kind_value = kind.literal_value
    size = 4 if kind_value == KIND_F32 else 2

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, b = Emit(builder), builder
        if not HAS_BF16_DOT:  # never called
            return context.get_dummy_value()
        _, source, stride, n_rows, rows, n_columns, keys, values = args
        with e.loop(0, rows, 2) as r:
            panel = e.variable(e.mul(r, PANEL * 2))
            sources, whole = [], []
            for i in range(2):
                row = e.add(r, i)
                sources.append(e.add(source, e.mul(row, stride)))
                whole.append(b.select(b.icmp_signed("<", row, n_rows), n_columns, e.i64(0)))
            with e.loop(0, n_columns, PANEL) as first:
                bits = []
                for i in range(2):
                    here, left = e.add(sources[i], e.mul(first, size)), b.sub(whole[i], first)
                    parts = [
                        _load_columns(
                            e, kind_value, e.add(here, LANES * size * v),
                            b.sub(left, e.i64(LANES * v)),
                        )
                        for v in range(VECTORS)
                    ]  # fmt: skip
                    if kind_value == KIND_F32:
                        bits.append(_to_bf16(e, parts[0], parts[1]))
                    else:
                        bits.append(e.shuffle(parts[0], parts[1], range(2 * LANES)))
                at = e.get(panel)
                with b.if_then(b.icmp_signed("!=", keys, e.i64(0))):
                    e.store(bits[0], e.add(keys, at))
                    e.store(bits[1], e.add(keys, at), PANEL * 2)
                with b.if_then(b.icmp_signed("!=", values, e.i64(0))):
                    for v in range(VECTORS):
                        lanes = [x for j in range(LANES * v, LANES * v + LANES)
                                 for x in (j, j + 2 * LANES)]  # fmt: skip
                        e.store(e.shuffle(bits[0], bits[1], lanes), e.add(values, at), 64 * v)
                e.set(panel, e.add(at, BLOCK_ROWS * PANEL * 2 + PANEL_GAP))
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 7), codegen


@literal_intrinsic
def pack_queries(
    typingctx: Any, form: Any, q: Any, stride: Any, n: Any, n_columns: Any, scale: Any, out: Any
) -> Any:
    """A group's queries, n <= LANE_GROUP rows of n_columns float32, transposed.

    They are multiplied by scale * log2(e), as `softmax_block` raises 2 to the power of the scores.
    out: [columns padded to whole panels][LANE_GROUP] float32, or pairs of bf16. Lanes from n on
    repeat the last query.
    """
    form_value = form.literal_value
    vectors = 1 if form_value == FORM_F32 else 2  # of a row that give 16 rows of the result

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, b = Emit(builder), builder
        if form_value == FORM_BF16 and not HAS_BF16_DOT:  # never called
            return context.get_dummy_value()
        _, q, stride, n, n_columns, scale, out = args
        factor = e.splat(b.fptrunc(b.fmul(scale, const(scale.type, math.log2(math.e))), FLOAT))
        padded = e.mul(b.sdiv(e.add(n_columns, PANEL - 1), e.i64(PANEL)), PANEL)
        with e.loop(0, padded, LANES * vectors) as column, e.loop(0, VECTORS) as v:
            rows = []
            for i in range(LANES):
                lane = e.min(e.add(e.mul(v, LANES), i), b.sub(n, e.i64(1)))
                at = e.add(e.add(q, e.mul(lane, stride)), e.mul(column, 4))
                parts = []
                for k in range(vectors):
                    mask = e.lanes_below(b.sub(n_columns, e.add(column, LANES * k)))
                    part = e.load_masked(F32x16, e.add(at, 64 * k), mask)
                    parts.append(b.fmul(part, factor))
                if form_value == FORM_F32:
                    rows.append(parts[0])
                else:
                    rows.append(b.bitcast(_to_bf16(e, parts[0], parts[1]), F32x16))
            at = e.mul(b.sdiv(column, e.i64(vectors)), _ROW_BYTES)
            at = e.add(e.add(out, at), e.mul(v, 64))
            for i, row in enumerate(e.transpose(rows)):
                e.store(row, at, i * _ROW_BYTES)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(form, i64, i64, i64, i64, types.float64, i64), codegen


@intrinsic
def fill(typingctx: Any, addr: Any, value: Any, n: Any) -> Any:
    """n (a multiple of 16) float32 at addr become value."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emit(builder)
        value = e.splat(args[1])
        with e.loop(0, args[2], LANES) as i:
            e.store(value, e.add(args[0], e.mul(i, 4)))
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64), codegen


@intrinsic
def scale_to(typingctx: Any, source: Any, factor: Any, keep: Any, out: Any, n: Any) -> Any:
    """out = out * keep + source * factor over n float32; keep 0 does not read out."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, b = Emit(builder), builder
        source, factor, keep, out, n = args
        factors, keeps = e.splat(factor), e.splat(keep)
        adds = b.fcmp_ordered("!=", keep, const(FLOAT, 0.0))
        with e.loop(0, n, LANES) as i:
            at, left = e.add(out, e.mul(i, 4)), b.sub(n, i)
            mask = e.lanes_below(left)
            value = b.fmul(e.load_masked(F32x16, e.add(source, e.mul(i, 4)), mask), factors)
            result = e.variable(value)
            with b.if_then(adds):
                e.set(result, e.fma(e.load_masked(F32x16, at, mask), keeps, value))
            e.store_masked(e.get(result), at, mask)
        return context.get_dummy_value()

    i64, f32 = types.int64, types.float32
    return types.void(i64, f32, f32, i64, i64), codegen


@intrinsic
def exchange(typingctx: Any, addr: Any, value: Any) -> Any:
    """Atomically write an int64 and return what was there."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], POINTER)
        return builder.atomic_rmw("xchg", pointer, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen
