"""Quantised weights times the int8 activations of many tokens.

A panel of rows and 512 columns is repacked into the L1 cache as unsigned bytes with the rows in
the lanes: a 64-byte vector holds 4 columns of 16 rows, so a dot product needs no sum across lanes
and 4 activations of a token are one broadcast. All tokens pass over the panel, a tile of R row
vectors times C tokens at a time, whose float32 sums wait in `out` between panels.

Panel: per row vector and group of 32 columns (`GROUP_BYTES`): 8 vectors of bytes (4 with the
even columns 8j + 0, 2, 4, 6, then 4 with the odd ones, the order of packed activations), and one
vector of 16 float32 scales.

Results are added as `q8` adds them, so they are the same bit for bit.
"""

from __future__ import annotations

from typing import Any

from numba.core import types

from kimi_cpu.kernels.common import KIND_PACKED4, KIND_PACKED8
from kimi_cpu.kernels.int4 import PACK_BYTES, PACK_ELEMENTS, PACK_SCALES, PACK_SUMS
from kimi_cpu.kernels.isa import VARIANT, jit
from kimi_cpu.kernels.packed import load_int8, start_sums
from kimi_cpu.kernels.q8 import scales_table
from kimi_cpu.kernels.simd import (
    FLOAT,
    I8,
    I16,
    I32,
    I64,
    LANES,
    Emit,
    F32x16,
    I32x16,
    const,
    intrinsic,
    literal_intrinsic,
    vec,
)
from kimi_cpu.quant import BLOCK_COLUMNS, block_bytes

#: Row vectors and tokens of a tile; the int32 and the float32 sums must fit the registers.
TILE_VECTORS, TILE_TOKENS = {"avx512vnni": (2, 4), "avxvnni": (1, 4)}.get(VARIANT, (1, 2))
#: Tokens of the tile for the last one or two.
REST_TOKENS = 2
BLOCK4_BYTES, BLOCK8_BYTES = block_bytes(4), block_bytes(8)
PANEL_ROWS = TILE_VECTORS * LANES
GROUP_BYTES = 8 * 64 + 64
VECTOR_BYTES = PACK_ELEMENTS // 32 * GROUP_BYTES


@intrinsic
def panel_scratch(typingctx: Any) -> Any:
    """Address of room for one panel on the caller's stack."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return Emit(builder).scratch(TILE_VECTORS * VECTOR_BYTES)

    return types.int64(), codegen


def _load_words(e: Emit, addr: Any, mask: Any) -> Any:
    return e.load(I32x16, addr) if mask is None else e.load_masked(I32x16, addr, mask)


@intrinsic
def fill_int4(
    typingctx: Any, panel: Any, w: Any, scale: Any, row_bytes: Any, row: Any, last: Any,
    n_groups: Any,
) -> Any:  # fmt: skip
    """One row vector of a panel from published INT4: rows `row` .. row + 15, at most `last`.

    w and scale are the addresses of row 0 in the first of n_groups (at most 16) groups; row_bytes
    is in_features / 2. Rows past `last` repeat it; groups past n_groups are left as they are.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, b = Emit(builder), builder
        panel, w, scale, row_bytes, row, last, n_groups = args
        rows = [e.min(e.add(row, r), last) for r in range(LANES)]
        w_at = [e.add(w, e.mul(r, row_bytes)) for r in rows]
        scale_bytes = b.lshr(row_bytes, e.i64(3))
        nibble, four = const(vec(I8, 64), 15), const(vec(I8, 64), 4)

        def block(i: Any, mask: Any) -> None:
            """4 groups, or those of the mask."""
            for at in w_at if mask is None else ():
                e.prefetch(e.add(at, e.mul(i, 64)), PACK_ELEMENTS // 2)
            words = [_load_words(e, e.add(at, e.mul(i, 64)), mask) for at in w_at]
            place = e.add(panel, e.mul(i, 4 * GROUP_BYTES))
            for k, column in enumerate(e.transpose(words)):
                u = b.bitcast(column, vec(I8, 64))
                offset = k // 4 * GROUP_BYTES + k % 4 * 64
                e.store(b.and_(u, nibble), place, offset)
                e.store(b.lshr(u, four), place, offset + 256)

        whole = b.lshr(n_groups, e.i64(2))
        with e.loop(0, whole) as i:
            block(i, None)
        left = b.and_(n_groups, e.i64(3))
        with b.if_then(b.icmp_signed(">", left, e.i64(0))):
            block(whole, e.lanes_below(e.mul(left, 4)))
        scales = [e.add(scale, e.mul(r, scale_bytes)) for r in rows]
        scales_table(e, scales, n_groups, e.add(panel, 512), GROUP_BYTES)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


@literal_intrinsic
def fill_packed(typingctx: Any, bits: Any, panel: Any, block: Any, n_groups: Any) -> Any:
    """One row vector of a panel from the packed layout: a row block, from `block` on.

    bits: literal. The last block is copied whole, so a panel may get one group more.
    """
    n_bits = bits.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, b = Emit(builder), builder
        _, panel, block, n_groups = args
        size, bytes64 = block_bytes(n_bits), vec(I8, 64)
        with e.loop(0, b.lshr(e.add(n_groups, 1), e.i64(1))) as i:  # two groups
            at, place = e.add(block, e.mul(i, size)), e.add(panel, e.mul(i, 2 * GROUP_BYTES))
            for line in range(0, size, 64):  # of the next panel
                e.prefetch(at, PACK_ELEMENTS // BLOCK_COLUMNS * size + line)
            for group in range(2):
                to = GROUP_BYTES * group
                for j in range(4):
                    if n_bits == 4:
                        raw = e.load(bytes64, at, 256 * group + 64 * j)
                        even = b.and_(raw, const(bytes64, 15))
                        odd = b.lshr(raw, const(bytes64, 4))
                    else:
                        even = load_int8(e, at, 512 * group + 64 * j)
                        odd = load_int8(e, at, 512 * group + 64 * j + 256)
                    e.store(even, place, to + 64 * j)
                    e.store(odd, place, to + 64 * j + 256)
                scale = e.bf16(e.load(vec(I16), at, 128 * n_bits + 32 * group))
                e.store(scale, place, to + 512)
        return context.get_dummy_value()

    return types.void(bits, *[types.int64] * 3), codegen


@literal_intrinsic
def gemm_tile(
    typingctx: Any, tokens: Any, is_int8: Any, panel: Any, n_groups: Any, first: Any, x: Any,
    x_stride: Any, index: Any, p: Any, p_last: Any, out: Any, out_stride: Any, row: Any, last: Any,
) -> Any:  # fmt: skip
    """out[p + c, row + i] += panel . x[index[p + c]], c < tokens, i < PANEL_ROWS.

    tokens and is_int8 are literals.

    x is the address of the packed activations' part that belongs to the panel; `first` panels
    start sums at 0. Tokens past p_last repeat it, rows past `last` are not touched.
    """
    n_tokens, int8 = tokens.literal_value, bool(is_int8.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, b = Emit(builder), builder
        panel, n_groups, first, x, x_stride, index, p, p_last, out, out_stride, row, last = args[2:]
        xs, outs = [], []
        for c in range(n_tokens):
            token = e.min(e.add(p, c), p_last)
            xs.append(e.add(x, e.mul(e.load(I64, e.add(index, e.mul(token, 8))), x_stride)))
            outs.append(e.add(e.add(out, e.mul(token, out_stride)), e.mul(row, 4)))
        left = e.add(b.sub(last, row), 1)
        is_first = b.icmp_signed("!=", first, e.i64(0))
        shown = b.select(is_first, e.i64(0), left)
        acc = [
            [
                e.variable(
                    e.load_masked(
                        F32x16, e.add(at, 64 * v), e.lanes_below(b.sub(shown, e.i64(LANES * v)))
                    )
                )
                for at in outs
            ]
            for v in range(TILE_VECTORS)
        ]
        with e.loop(0, n_groups) as g:
            part = e.add(panel, e.mul(g, GROUP_BYTES))
            weights = [e.add(part, VECTOR_BYTES * v) for v in range(TILE_VECTORS)]
            inside = e.add(e.mul(b.lshr(g, e.i64(2)), 128), e.mul(b.and_(g, e.i64(3)), 16))
            starts = [e.load_splat(I32, e.add(at, e.mul(g, 4)), PACK_SUMS) for at in xs]
            if int8:
                starts = [start_sums(e, s) for s in starts]
            total = [list(starts) for _ in range(TILE_VECTORS)]
            evens = [e.load_fours(e.add(at, inside)) for at in xs]
            odds = [e.load_fours(e.add(at, inside), 64) for at in xs]
            for j in range(4):
                low = [e.load(vec(I8, 64), at, 64 * j) for at in weights]
                high = [e.load(vec(I8, 64), at, 64 * j + 256) for at in weights]
                for c in range(n_tokens):
                    even, odd = evens[c][j], odds[c][j]
                    for v in range(TILE_VECTORS):
                        if int8:
                            total[v][c] = e.dot_s8(total[v][c], low[v], even)
                            total[v][c] = e.dot_s8(total[v][c], high[v], odd)
                        else:
                            total[v][c] = e.dot_u4_s8(total[v][c], low[v], even, high[v], odd)
            scales = [e.load(F32x16, at, 512) for at in weights]
            for c, at in enumerate(xs):
                x_scale = e.load_splat(FLOAT, e.add(at, e.mul(g, 4)), PACK_SCALES)
                for v in range(TILE_VECTORS):
                    scaled = b.fmul(b.sitofp(total[v][c], F32x16), scales[v])
                    e.set(acc[v][c], e.fma(scaled, x_scale, e.get(acc[v][c])))
        for v in range(TILE_VECTORS):
            mask = e.lanes_below(b.sub(left, e.i64(LANES * v)))
            for c, at in enumerate(outs):
                e.store_masked(e.get(acc[v][c]), e.add(at, 64 * v), mask)
        return context.get_dummy_value()

    return types.void(tokens, is_int8, *[types.int64] * 12), codegen


@jit
def _fill(kind, panel, w, scale, d, part, row, last, n_groups):  # type: ignore[no-untyped-def]
    columns = (d + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    for v in range(TILE_VECTORS):
        place, first = panel + v * VECTOR_BYTES, row + v * LANES
        block = min(first, last) // LANES * columns + part * (PACK_ELEMENTS // BLOCK_COLUMNS)
        if kind == KIND_PACKED4:
            fill_packed(4, place, w + block * BLOCK4_BYTES, n_groups)
        elif kind == KIND_PACKED8:
            fill_packed(8, place, w + block * BLOCK8_BYTES, n_groups)
        else:
            fill_int4(
                place, w + part * (PACK_ELEMENTS // 2), scale + part * (PACK_ELEMENTS // 16),
                d // 2, first, last, n_groups,
            )  # fmt: skip


@jit
def _tile(  # type: ignore[no-untyped-def]
    tokens, is_int8, panel, n_groups, first, x, x_stride, index, p, p_last, out, out_stride, row,
    last,
):  # fmt: skip
    if tokens == TILE_TOKENS:
        if is_int8:
            gemm_tile(
                TILE_TOKENS, 1, panel, n_groups, first, x, x_stride, index, p, p_last, out,
                out_stride, row, last,
            )  # fmt: skip
        else:
            gemm_tile(
                TILE_TOKENS, 0, panel, n_groups, first, x, x_stride, index, p, p_last, out,
                out_stride, row, last,
            )  # fmt: skip
    elif is_int8:
        gemm_tile(
            REST_TOKENS, 1, panel, n_groups, first, x, x_stride, index, p, p_last, out,
            out_stride, row, last,
        )  # fmt: skip
    else:
        gemm_tile(
            REST_TOKENS, 0, panel, n_groups, first, x, x_stride, index, p, p_last, out,
            out_stride, row, last,
        )  # fmt: skip


@jit
def gemm_rows(  # type: ignore[no-untyped-def]
    kind, x, x_stride, index, p_start, p_stop, out, out_stride, w, scale, d, start, stop
):
    """out[p, r] = x[index[p]] . w[r], p_start <= p < p_stop, start <= r < stop.

    x: packed activations; kind: KIND_INT4 (w and scale as published), KIND_PACKED4 or
    KIND_PACKED8 (then start is a multiple of 16). Addresses, strides in bytes.
    """
    panel = panel_scratch()
    is_int8 = int(kind == KIND_PACKED8)
    n_parts = (d + PACK_ELEMENTS - 1) // PACK_ELEMENTS
    for row in range(start, stop, PANEL_ROWS):
        for part in range(n_parts):
            n_groups = min(PACK_ELEMENTS, d - part * PACK_ELEMENTS) // 32
            _fill(kind, panel, w, scale, d, part, row, stop - 1, n_groups)
            x_part, first = x + part * PACK_BYTES, int(part == 0)
            p = p_start
            while p < p_stop:
                tokens = TILE_TOKENS if p_stop - p > REST_TOKENS else REST_TOKENS
                _tile(
                    tokens, is_int8, panel, n_groups, first, x_part, x_stride, index, p,
                    p_stop - 1, out, out_stride, row, stop - 1,
                )  # fmt: skip
                p += tokens
