"""Published INT4 weights times the int8 activations of many tokens.

16 rows and COLUMN_BLOCK columns (18 KB) are turned to the order of the packed layout, in the L1
cache, and all tokens pass over them with the kernel of packed weights (`q8.rows_q8`). Between parts
the sums wait in `out`, so results are the same bit for bit as those of few tokens.
"""

from __future__ import annotations

from typing import Any

from numba.core import types

from kimi_cpu.kernels.common import KIND_PACKED4
from kimi_cpu.kernels.int4 import PACK_BYTES, PACK_ELEMENTS
from kimi_cpu.kernels.isa import standalone
from kimi_cpu.kernels.q8 import COLUMN_BLOCK, rows_q8, rows_to_lanes, tile_of
from kimi_cpu.kernels.simd import I16, LANES, Emit, I32x16, intrinsic, vec
from kimi_cpu.quant import BLOCK_COLUMNS, block_bytes

_SIZE = block_bytes(4)


@intrinsic
def _scratch(typingctx: Any) -> Any:
    """Address of room for 16 rows of COLUMN_BLOCK columns on the caller's stack."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return Emit(builder).scratch(COLUMN_BLOCK // BLOCK_COLUMNS * _SIZE)

    return types.int64(), codegen


@intrinsic
def fill_blocks(
    typingctx: Any, to: Any, w: Any, scale: Any, row_bytes: Any, row: Any, last: Any, n_groups: Any,
    ahead: Any,
) -> Any:  # fmt: skip
    """The rows row .. row + 15 of published INT4, at most `last`, as blocks of the packed layout.

    w and scale are the addresses of row 0 in the first of n_groups groups; row_bytes is
    in_features / 2. 256 bytes a group are asked for from `ahead` on. Of an odd number of groups
    the last block's second half gets no weights, but scales of 0. Scales are written 16 groups
    at a time: there must be room in `to` for those that do not exist.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, b = Emit(builder), builder
        to, w, scale, row_bytes, row, last, n_groups, ahead = args
        rows = [e.min(e.add(row, r), last) for r in range(LANES)]
        w_at = [e.add(w, e.mul(r, row_bytes)) for r in rows]
        scale_at = [e.add(scale, e.mul(r, b.lshr(row_bytes, e.i64(3)))) for r in rows]
        with e.loop(0, n_groups, 16) as first:
            here = e.add(to, e.mul(first, _SIZE // 2))
            left = b.sub(n_groups, first)
            mask = e.lanes_below(left)
            bits = [
                b.zext(e.load_masked(vec(I16), e.add(at, e.mul(first, 2)), mask), I32x16)
                for at in scale_at
            ]
            for g, column in enumerate(e.transpose(bits)):
                place = g // 2 * _SIZE + 512 + 32 * (g % 2)
                e.store(b.trunc(column, vec(I16)), here, place)
            with e.loop(0, e.min(left, 16)) as g:
                offset = e.mul(e.add(first, g), 16)
                for line in range(0, 256, 64):
                    e.prefetch(e.add(ahead, e.mul(offset, LANES)), line)
                half = e.mul(b.and_(g, e.i64(1)), 256)
                place = e.add(e.add(here, e.mul(b.lshr(g, e.i64(1)), _SIZE)), half)
                for k, v in enumerate(rows_to_lanes(e, [e.add(at, offset) for at in w_at])):
                    e.store(v, place, 64 * k)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), codegen


@standalone
def gemm_rows(  # type: ignore[no-untyped-def]
    x, x_stride, index, p_start, p_stop, out, out_stride, w, scale, d, start, stop
):
    """out[p, r] = x[index[p]] . w[r], p_start <= p < p_stop, start <= r < stop.

    x: packed activations; w and scale as published. Addresses, strides in bytes.
    """
    blocks = _scratch()
    for row in range(start, stop, LANES):
        rows = min(LANES, stop - row)
        next_rows = w + (row + LANES) * (d // 2)
        for part in range(0, d, COLUMN_BLOCK):
            columns = min(COLUMN_BLOCK, d - part)
            fill_blocks(
                blocks, w + part // 2, scale + part // 16, d // 2, row, row + rows - 1,
                columns // 32, next_rows + part // 2 * LANES,
            )  # fmt: skip
            x_part = x + part // PACK_ELEMENTS * PACK_BYTES
            p = p_start
            while p < p_stop:
                tokens = tile_of(p_stop - p)
                rows_q8(
                    KIND_PACKED4, 1, tokens, x_part, x_stride, index, p, out + row * 4, out_stride,
                    blocks, 0, columns, columns, 0, rows, part,
                )  # fmt: skip
                p += tokens
