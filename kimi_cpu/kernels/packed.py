"""Products with weights in the packed layout (`quant.PackedWeight`): 16 rows in the lanes.

A 64-byte vector of a block has 4 bytes of each of 16 rows, so a result's products stay in its lane
and the sum across lanes of the row-major layouts falls away; the scales lie beside the vectors, so
a row block is one stream. The order of a row's bytes is that of the packed activations (`int4`),
even columns apart from odd ones.

One vector (GEMV) reads STREAMS row blocks at a time. Many vectors go through `gemm`'s panels, which
are the same order unpacked to bytes: filling one is a few instructions a vector. A result is the
sum, in the order of the groups, of the scale times the group's exact integer dot product.
"""

from __future__ import annotations

from typing import Any

from numba.core import types

from kimi_cpu.kernels.int4 import PACK_BYTES, PACK_SCALES, PACK_SUMS
from kimi_cpu.kernels.isa import jit
from kimi_cpu.kernels.simd import (
    FLOAT,
    I8,
    I16,
    I32,
    I64,
    UNSIGNED_DOT,
    Emit,
    F32x16,
    I32x16,
    const,
    literal_intrinsic,
    vec,
)
from kimi_cpu.quant import BLOCK_COLUMNS, BLOCK_ROWS, block_bytes

#: Row blocks read side by side: more hide the memory's latency, fewer do not crowd the L1 cache.
STREAMS = 4
#: Tokens of a tile with float32 activations.
TILE_TOKENS = 4
#: How far ahead of a stream its memory is asked for.
PREFETCH_BYTES = 768
_BYTES = vec(I8, 64)


def _raw_dot(e: Emit, bits: int, total: Any, at: Any, even: list[Any], odd: list[Any]) -> Any:
    """total + the integer dot products of a group of 32 columns with 4 dwords even and odd each."""
    for j in range(4):
        if bits == 4:
            raw = e.load(_BYTES, at, 64 * j)
            low, high = e.b.and_(raw, const(_BYTES, 15)), e.b.lshr(raw, const(_BYTES, 4))
            total = e.dot_u4_s8(total, low, even[j], high, odd[j])
        else:
            total = e.dot_s8(total, load_int8(e, at, 64 * j), even[j])
            total = e.dot_s8(total, load_int8(e, at, 64 * j + 256), odd[j])
    return total


def load_int8(e: Emit, at: Any, offset: int) -> Any:
    """A vector of stored bytes q + 128 as `Emit.dot_s8` takes its weights, <64 x i8>."""
    stored = e.load(_BYTES, at, offset)
    return stored if UNSIGNED_DOT else e.b.xor(stored, const(_BYTES, -128))


def start_sums(e: Emit, sums: Any) -> Any:
    """What dot products with int8 weights start at, from the activations' -8 sum(x).

    Where the weights stay q + 128 that is -128 sum(x).
    """
    return e.b.shl(sums, const(sums.type, 4)) if UNSIGNED_DOT else const(sums.type, 0)


@literal_intrinsic
def _gemv_q8(
    typingctx: Any, bits: Any, x: Any, w: Any, columns: Any, out: Any, first: Any, step: Any,
    last: Any, stop: Any,
) -> Any:  # fmt: skip
    """out[r] = w[r] . x for the row blocks first, first + step, .. (STREAMS), at most `last`.

    bits: literal. x: one token's packed activations; columns: blocks of 64; stop: rows in all.
    """
    n_bits = bits.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, b = Emit(builder), builder
        x, w, columns, out, first, step, last, stop = args[1:]
        size = block_bytes(n_bits)
        which = [e.min(e.add(first, e.mul(step, s)), last) for s in range(STREAMS)]
        w_at = [e.add(w, e.mul(e.mul(block, columns), size)) for block in which]
        acc = [e.variable(const(F32x16, 0.0)) for _ in which]
        with e.loop(0, columns) as i:
            part = e.add(x, e.mul(b.lshr(i, e.i64(3)), PACK_BYTES))
            inside = b.and_(i, e.i64(7))
            pair = e.add(e.mul(b.lshr(inside, e.i64(1)), 128), e.mul(b.and_(inside, e.i64(1)), 32))
            q_at, number = e.add(part, pair), e.add(part, e.mul(inside, 8))
            here = [e.add(at, e.mul(i, size)) for at in w_at]
            for at in here:
                for line in range(0, size, 64):
                    e.prefetch(at, PREFETCH_BYTES + line)
            for group in range(2):
                even, odd = e.load_fours(q_at, 16 * group), e.load_fours(q_at, 16 * group + 64)
                start = e.load_splat(I32, number, PACK_SUMS + 4 * group)
                if n_bits == 8:
                    start = start_sums(e, start)
                x_scale = e.load_splat(FLOAT, number, PACK_SCALES + 4 * group)
                for at, slot in zip(here, acc, strict=True):
                    vectors = e.add(at, 64 * n_bits * group)
                    total = b.sitofp(_raw_dot(e, n_bits, start, vectors, even, odd), F32x16)
                    scale = e.bf16(e.load(vec(I16), at, 128 * n_bits + 32 * group))
                    e.set(slot, e.fma(total, b.fmul(scale, x_scale), e.get(slot)))
        for block, slot in zip(which, acc, strict=True):
            row = e.mul(block, BLOCK_ROWS)
            mask = e.lanes_below(b.sub(stop, row))
            e.store_masked(e.get(slot), e.add(out, e.mul(row, 4)), mask)
        return context.get_dummy_value()

    return types.void(bits, *[types.int64] * 8), codegen


@literal_intrinsic
def _tile_f32(
    typingctx: Any, bits: Any, tokens: Any, x: Any, x_stride: Any, index: Any, p: Any, p_last: Any,
    w: Any, d: Any, out: Any, out_stride: Any, block: Any, stop: Any,
) -> Any:  # fmt: skip
    """out[p + c, r] = w[r] . x[index[p + c]], float32 activations, one row block; exact weights.

    bits and tokens are literals; tokens past p_last repeat it.
    """
    n_bits, n_tokens = bits.literal_value, tokens.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, b = Emit(builder), builder
        x, x_stride, index, p, p_last, w, d, out, out_stride, block, stop = args[2:]
        size, columns = block_bytes(n_bits), b.lshr(e.add(d, BLOCK_COLUMNS - 1), e.i64(6))
        w_at = e.add(w, e.mul(e.mul(block, columns), size))
        row = e.mul(block, BLOCK_ROWS)
        xs, outs = [], []
        for c in range(n_tokens):
            token = e.min(e.add(p, c), p_last)
            xs.append(e.add(x, e.mul(e.load(I64, e.add(index, e.mul(token, 8))), x_stride)))
            outs.append(e.add(e.add(out, e.mul(token, out_stride)), e.mul(row, 4)))
        acc = [e.variable(const(F32x16, 0.0)) for _ in xs]
        zero_point = const(F32x16, float(1 << n_bits - 1))
        with e.loop(0, b.lshr(d, e.i64(5))) as g:
            half = b.and_(g, e.i64(1))
            at = e.add(w_at, e.mul(b.lshr(g, e.i64(1)), size))
            vectors = e.add(at, e.mul(half, 64 * n_bits))
            x_at = [e.add(x_c, e.mul(g, 128)) for x_c in xs]
            total = [e.variable(const(F32x16, 0.0)) for _ in xs]
            for j in range(4):
                even = e.load(I32x16, vectors, 64 * j)
                odd = b.lshr(even, const(I32x16, 4)) if n_bits == 4 else e.load(
                    I32x16, vectors, 64 * j + 256
                )  # fmt: skip
                for k in range(4):
                    for parity, source in enumerate((even, odd)):
                        u = b.and_(
                            b.lshr(source, const(I32x16, 8 * k)), const(I32x16, (1 << n_bits) - 1)
                        )
                        value = b.fsub(b.sitofp(u, F32x16), zero_point)
                        for x_c, slot in zip(x_at, total, strict=True):
                            factor = e.load_splat(FLOAT, x_c, 4 * (8 * j + 2 * k + parity))
                            e.set(slot, e.fma(value, factor, e.get(slot)))
            scale = e.bf16(e.load(vec(I16), e.add(at, e.mul(half, 32)), 128 * n_bits))
            for slot, group in zip(acc, total, strict=True):
                e.set(slot, e.fma(e.get(group), scale, e.get(slot)))
        mask = e.lanes_below(b.sub(stop, row))
        for place, slot in zip(outs, acc, strict=True):
            e.store_masked(e.get(slot), place, mask)
        return context.get_dummy_value()

    return types.void(bits, tokens, *[types.int64] * 11), codegen


@jit
def gemv_rows(bits, x, w, d, out, start, stop):  # type: ignore[no-untyped-def]
    """out[r] = w[r] . x, rows start .. stop-1, start a multiple of 16; x packed activations."""
    columns = (d + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    first, last = start // BLOCK_ROWS, (stop - 1) // BLOCK_ROWS
    step = (last - first + STREAMS) // STREAMS
    for block in range(first, first + step):
        if bits == 4:
            _gemv_q8(4, x, w, columns, out, block, step, last, stop)
        else:
            _gemv_q8(8, x, w, columns, out, block, step, last, stop)


@jit
def rows_f32(  # type: ignore[no-untyped-def]
    bits, x, x_stride, index, p_start, p_stop, out, out_stride, w, d, start, stop
):
    """out[p, r] = x[index[p]] . w[r] with float32 activations; start is a multiple of 16."""
    for block in range(start // BLOCK_ROWS, (stop + BLOCK_ROWS - 1) // BLOCK_ROWS):
        for p in range(p_start, p_stop, TILE_TOKENS):
            if bits == 4:
                _tile_f32(
                    4, TILE_TOKENS, x, x_stride, index, p, p_stop - 1, w, d, out, out_stride,
                    block, stop,
                )  # fmt: skip
            else:
                _tile_f32(
                    8, TILE_TOKENS, x, x_stride, index, p, p_stop - 1, w, d, out, out_stride,
                    block, stop,
                )  # fmt: skip
