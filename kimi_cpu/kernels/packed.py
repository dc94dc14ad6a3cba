"""Products with weights in the packed layout (`quant.PackedWeight`): 16 rows in the lanes.

A 64-byte vector of a block has 4 bytes of each of 16 rows, so a result's products stay in its lane
and the sum across lanes of the row-major layouts falls away; the scales lie beside the vectors, so
a row block is one stream. The order of a row's bytes is that of the packed activations (`int4`),
even columns apart from odd ones.

Here are the products with float32 activations; those with int8 ones are in `q8` and `gemm`.
"""

from __future__ import annotations

from typing import Any

from numba.core import types

from kimi_cpu.kernels.isa import standalone
from kimi_cpu.kernels.simd import (
    FLOAT,
    I8,
    I16,
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

#: Tokens of a tile with float32 activations.
TILE_TOKENS = 4
_BYTES = vec(I8, 64)


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


@standalone
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
