"""Quantised weights times int8 activations, straight from where they are stored.

Packed weights times those of any number of tokens, published ones times those of few (see `gemm`).

16 rows lie in the lanes: of packed weights a 64-byte vector has 4 bytes of each, of published ones
the 16 bytes of a group of 32 columns are turned to that order in registers, 16 rows at a time. So
a group is 4 vectors of nibbles (8 of int8), each multiplied with 4 even and 4 odd activations of
every token, and no sum across lanes is needed.

A result is the sum, in the order of the groups, of (the group's exact integer dot product * weight
scale), rounded, * activation scale. It depends neither on how many tokens are computed together,
nor on the layout, nor on the range of rows.
"""

from __future__ import annotations

from typing import Any

from numba.core import types

from kimi_cpu.kernels.common import KIND_INT4, KIND_PACKED4, KIND_PACKED8
from kimi_cpu.kernels.int4 import (
    PACK_BYTES,
    PACK_ELEMENTS,
    PACK_SCALES,
    PACK_SUMS,
    emit_four_rows,
)
from kimi_cpu.kernels.isa import VARIANT, jit, standalone
from kimi_cpu.kernels.packed import load_int8, start_sums
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
    literal_intrinsic,
    vec,
)
from kimi_cpu.quant import BLOCK_COLUMNS, block_bytes

#: Tokens of a tile: the int32 and the float32 sums must fit the registers.
TILES = {"avx512vnni": (1, 2, 3, 4, 6, 8), "avxvnni": (1, 2, 3, 4), "avx2": (1, 2, 3)}.get(
    VARIANT, (1, 2)
)
#: Tokens of a tile of four published rows, which are read side by side; of more tokens, 16 rows
#: are turned.
FOUR_ROWS_TOKENS = 2
#: Row blocks of packed weights that one token, and few, read side by side: more hide the memory's
#: latency, fewer do not crowd the L1 cache.
STREAMS, FEW_STREAMS, FEW_TOKENS = 4, 2, 2
#: Rows and columns (a multiple of PACK_ELEMENTS) whose weights stay in the L2 cache while all
#: tokens pass by, and a tile's activations in the L1 cache meanwhile. Published rows stay whole.
ROW_BLOCK, COLUMN_BLOCK = 64, 2048
_BLOCK4_BYTES, _BLOCK8_BYTES = block_bytes(4), block_bytes(8)
#: How far ahead memory is asked for: of packed weights by the number of streams, and of published
#: rows that are read side by side.
PREFETCH_BYTES, PREFETCH_ROW_BYTES = {4: 768, 2: 2304, 1: 4608}, 768
_BYTES = vec(I8, 64)


def _scales_table(e: Emit, at: list[Any], n_groups: Any, table: Any) -> None:
    """Up to 16 groups' bf16 scales of 16 rows as float32, rows in the lanes, a group a vector.

    at: addresses of the rows' first scales; n_groups: how many exist (may be more than 16).
    """
    mask = e.lanes_below(n_groups)
    bits = [e.b.zext(e.load_masked(vec(I16), a, mask), I32x16) for a in at]
    for g, column in enumerate(e.transpose(bits)):
        value = e.b.bitcast(e.b.shl(column, const(I32x16, 16)), F32x16)
        e.store(value, table, 64 * g)


def rows_to_lanes(e: Emit, at: list[Any]) -> list[Any]:
    """16 bytes of each of 16 rows as 4 <16 x i32>: lane r of vector k has dword k of row r."""
    four = vec(I32, 4)
    vectors = []
    for k in range(4):  # quarter q of vector k is row 4 q + k
        parts = [e.load(four, at[4 * q + k]) for q in range(4)]
        low = e.shuffle(parts[0], parts[1], range(8))
        high = e.shuffle(parts[2], parts[3], range(8))
        vectors.append(e.shuffle(low, high, range(16)))
    return e.transpose_fours(vectors)


class _Weights:
    """How a tile gets at the weights of one storage.

    A turn of its loop is one group of published weights, a block of two groups of packed ones.
    """

    def __init__(
        self, e: Emit, kind: int, w: Any, scale: Any, d: Any, stored_d: Any, rows: list[Any],
        last: Any, in_cache: bool,
    ) -> None:  # fmt: skip
        """rows: where the row vectors start; published rows past `last` repeat it."""
        self.e, self.kind, self.rows, self.in_cache = e, kind, rows, in_cache
        b = e.b
        if kind == KIND_INT4:
            (row,) = rows
            self.bits, self.groups_a_turn = 4, 1
            self.row_bytes, self.n_groups = b.lshr(d, e.i64(1)), b.lshr(d, e.i64(5))
            each = [e.min(e.add(row, r), last) for r in range(LANES)]
            self.at = [e.add(w, e.mul(r, self.row_bytes)) for r in each]
            self.scale_at = [e.add(scale, e.mul(e.mul(r, self.n_groups), 2)) for r in each]
            self.table = e.scratch(16 * 64)
            self.turns = self.n_groups
        else:
            self.bits, self.groups_a_turn = 4 if kind == KIND_PACKED4 else 8, 2
            self.size = block_bytes(self.bits)
            self.turns = b.lshr(e.add(d, BLOCK_COLUMNS - 1), e.i64(6))
            block_row = e.mul(b.lshr(e.add(stored_d, BLOCK_COLUMNS - 1), e.i64(6)), self.size)
            self.at = [e.add(w, e.mul(b.lshr(row, e.i64(4)), block_row)) for row in rows]

    def start(self, turn: Any) -> None:
        """Before the groups of a turn: asks for memory ahead."""
        e, b = self.e, self.e.b
        if self.kind != KIND_INT4:
            self.here = [e.add(at, e.mul(turn, self.size)) for at in self.at]
            for at in () if self.in_cache else self.here:
                for line in range(0, self.size, 64):
                    e.prefetch(at, PREFETCH_BYTES[len(self.at)] + line)
            return
        offset = e.mul(turn, 16)
        self.here = [e.add(at, offset) for at in self.at]
        next_rows = e.add(e.add(self.at[0], e.mul(self.row_bytes, LANES)), e.mul(turn, 256))
        for line in range(0, 256, 64):
            e.prefetch(next_rows, line)
        inside = b.and_(turn, e.i64(15))
        with b.if_then(b.icmp_signed("==", inside, e.i64(0))):
            ahead = [e.add(at, e.mul(turn, 2)) for at in self.scale_at]
            _scales_table(e, ahead, b.sub(self.n_groups, turn), self.table)
        self.scale_here = e.add(self.table, e.mul(inside, 64))

    def pairs(self, vector: int, group: int) -> list[tuple[Any, Any]]:
        """(even, odd) weights, <64 x i8>, of the 4 x 8 columns of a group."""
        e, b = self.e, self.e.b
        if self.bits == 8:
            at = self.here[vector]
            offsets = range(512 * group, 512 * group + 256, 64)
            return [(load_int8(e, at, o), load_int8(e, at, o + 256)) for o in offsets]
        if self.kind == KIND_INT4:
            raw = [b.bitcast(v, _BYTES) for v in rows_to_lanes(e, self.here)]
        else:
            raw = [e.load(_BYTES, self.here[vector], 256 * group + 64 * j) for j in range(4)]
        return [(b.and_(v, const(_BYTES, 15)), b.lshr(v, const(_BYTES, 4))) for v in raw]

    def scale(self, vector: int, group: int) -> Any:
        """The 16 rows' scales of a group."""
        if self.kind == KIND_INT4:
            return self.e.load(F32x16, self.scale_here)
        at = self.here[vector]
        return self.e.bf16(self.e.load(vec(I16), at, 128 * self.bits + 32 * group))


def _streams(kind: int, tokens: int) -> int:
    """Row vectors of a tile. 16 published rows are 16 streams of their own."""
    if kind == KIND_INT4:
        return 1
    return STREAMS if tokens == 1 else FEW_STREAMS if tokens <= FEW_TOKENS else 1


def _emit_tile(
    e: Emit, weights: _Weights, lanes: list[Any], x: list[Any], out: list[Any], adds: Any
) -> None:
    """out[c][r] = w[r] . x[c] for the rows of the weights, of each vector so many lanes; addresses.

    Sums start at what `out` holds, if `adds`, an i1.
    """
    b = e.b
    shift = 4 if weights.groups_a_turn == 1 else 3
    masks = [e.lanes_below(n) for n in lanes]
    places = [[e.add(at, e.mul(row, 4)) for at in out] for row in weights.rows]
    acc = [[e.variable(const(F32x16, 0.0)) for _ in x] for _ in weights.rows]
    for mask, at_row, slots in zip(masks, places, acc, strict=True):
        for at, slot in zip(at_row, slots, strict=True):
            e.set(slot, const(F32x16, 0.0))
            with b.if_then(adds):
                e.set(slot, e.load_masked(F32x16, at, mask))
    with e.loop(0, weights.turns) as turn:
        weights.start(turn)
        part = e.mul(b.lshr(turn, e.i64(shift)), PACK_BYTES)
        inside = b.and_(turn, e.i64((1 << shift) - 1))
        if weights.groups_a_turn == 1:
            quad, place, width = b.lshr(inside, e.i64(2)), b.and_(inside, e.i64(3)), 16
        else:
            quad, place, width = b.lshr(inside, e.i64(1)), b.and_(inside, e.i64(1)), 32
        q_offset = e.add(part, e.add(e.mul(quad, 128), e.mul(place, width)))
        number = e.add(part, e.mul(inside, 4 * weights.groups_a_turn))
        for group in range(weights.groups_a_turn):
            sums = [e.load_splat(I32, e.add(at, number), PACK_SUMS + 4 * group) for at in x]
            if weights.bits == 8:
                sums = [start_sums(e, s) for s in sums]
            evens = [e.load_fours(e.add(at, q_offset), 16 * group) for at in x]
            odds = [e.load_fours(e.add(at, q_offset), 16 * group + 64) for at in x]
            activations = [list(zip(*both, strict=True)) for both in zip(evens, odds, strict=True)]
            for v, slots in enumerate(acc):
                dot = e.dot_u4_s8 if weights.bits == 4 else e.dot_s8
                total = dot(sums, weights.pairs(v, group), activations)
                w_scale = weights.scale(v, group)
                for c, at in enumerate(x):
                    scaled = b.fmul(b.sitofp(total[c], F32x16), w_scale)
                    x_scale = e.load_splat(FLOAT, e.add(at, number), PACK_SCALES + 4 * group)
                    e.set(slots[c], e.fma(scaled, x_scale, e.get(slots[c])))
    for mask, at_row, slots in zip(masks, places, acc, strict=True):
        for at, slot in zip(at_row, slots, strict=True):
            e.store_masked(e.get(slot), at, mask)


@literal_intrinsic
def rows_q8(
    typingctx: Any, kind: Any, cached: Any, tokens: Any, x: Any, x_stride: Any, index: Any, p: Any,
    out: Any, out_stride: Any, w: Any, scale: Any, d: Any, stored_d: Any, start: Any, stop: Any,
    adds: Any,
) -> Any:  # fmt: skip
    """out[p + c, r] = w[r] . x[index[p + c]] over d columns, 0 <= c < tokens, start <= r < stop.

    Rows of packed weights have stored_d columns, and w and x begin at the first of the d (a
    multiple of PACK_ELEMENTS). Sums start at what `out` holds, if `adds` is not 0.

    kind and cached are literals, cached 1 for weights in the L1 cache, which need no streams and
    no prefetching; tokens is one of TILES, and may be a literal. x: packed activations; addresses
    and strides in bytes. For packed weights start is a multiple of 16.
    """
    stored, in_cache = kind.literal_value, bool(cached.literal_value)
    sizes = list(TILES) if stored != KIND_INT4 else [n for n in TILES if n > FOUR_ROWS_TOKENS]
    if isinstance(tokens, types.IntegerLiteral):
        sizes = [tokens.literal_value]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, b = Emit(builder), builder
        tokens, x, x_stride, index, p, out, out_stride, w, scale = args[2:11]
        d, stored_d, start, stop, adds = args[11:]
        adds = b.icmp_signed("!=", adds, e.i64(0))
        last = e.add(start, b.and_(b.sub(b.sub(stop, e.i64(1)), start), e.i64(-LANES)))
        blocks = e.add(b.lshr(b.sub(last, start), e.i64(4)), 1)

        def tiles(n_tokens: int) -> None:
            n_streams = 1 if in_cache else _streams(stored, n_tokens)
            xs, outs = [], []
            for c in range(n_tokens):
                token = e.add(p, c)
                source = e.load(I64, e.add(index, e.mul(token, 8)))
                xs.append(e.add(x, e.mul(source, x_stride)))
                outs.append(e.add(out, e.mul(token, out_stride)))
            step = e.mul(b.udiv(e.add(blocks, n_streams - 1), e.i64(n_streams)), LANES)
            with e.loop(start, e.add(start, step), LANES) as row:
                wanted = [e.add(row, e.mul(step, v)) for v in range(n_streams)]
                lanes = [b.sub(stop, r) for r in wanted]  # past the last none: it comes elsewhere
                rows = [e.min(r, last) for r in wanted]
                last_row = b.sub(stop, e.i64(1))
                weights = _Weights(e, stored, w, scale, d, stored_d, rows, last_row, in_cache)
                _emit_tile(e, weights, lanes, xs, outs, adds)

        for size in sizes:
            with b.if_then(b.icmp_signed("==", tokens, e.i64(size))):
                tiles(size)
        return context.get_dummy_value()

    return types.void(kind, cached, tokens, *[types.int64] * 13), codegen


@literal_intrinsic
def four_rows_q8(
    typingctx: Any, tokens: Any, x: Any, x_stride: Any, index: Any, p: Any, out: Any,
    out_stride: Any, w: Any, scale: Any, d: Any, first: Any, step: Any, last: Any,
) -> Any:  # fmt: skip
    """As `rows_q8` for the published rows first, first + step, .. (four), at most `last`.

    tokens is a literal. The rows are read side by side.
    """
    n_tokens = tokens.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, b = Emit(builder), builder
        x, x_stride, index, p, out, out_stride, w, scale, d, first, step, last = args[1:]
        rows = [e.min(e.add(first, e.mul(step, r)), last) for r in range(4)]
        w_at = [e.add(w, e.mul(row, b.lshr(d, e.i64(1)))) for row in rows]
        scale_at = [e.add(scale, e.mul(row, b.lshr(d, e.i64(4)))) for row in rows]
        xs, outs = [], []
        for c in range(n_tokens):
            token = e.add(p, c)
            xs.append(e.add(x, e.mul(e.load(I64, e.add(index, e.mul(token, 8))), x_stride)))
            outs.append(e.add(out, e.mul(token, out_stride)))
        for at, result in zip(
            outs, emit_four_rows(e, xs, w_at, scale_at, d, PREFETCH_ROW_BYTES), strict=True
        ):
            for r, row in enumerate(rows):
                e.store(b.extract_element(result, const(I32, r)), e.add(at, e.mul(row, 4)))
        return context.get_dummy_value()

    return types.void(tokens, *[types.int64] * 12), codegen


@jit
def _published_rows(  # type: ignore[no-untyped-def]
    tokens, x, x_stride, index, p, out, out_stride, w, scale, d, start, stop
):
    step = (stop - start + 3) // 4 | 1
    for row in range(start, start + step):
        if tokens == 1:
            four_rows_q8(
                1, x, x_stride, index, p, out, out_stride, w, scale, d, row, step, stop - 1
            )
        else:
            four_rows_q8(
                2, x, x_stride, index, p, out, out_stride, w, scale, d, row, step, stop - 1
            )


@jit
def tile_of(n):  # type: ignore[no-untyped-def]
    """The largest of TILES up to n."""
    tokens = 1
    for size in TILES:
        if size <= n:
            tokens = size
    return tokens


@standalone
def _tile_rows(  # type: ignore[no-untyped-def]
    kind, tokens, x, x_stride, index, p, out, out_stride, w, scale, d, stored_d, start, stop, adds
):
    if kind == KIND_PACKED4:
        rows_q8(
            KIND_PACKED4, 0, tokens, x, x_stride, index, p, out, out_stride, w, scale, d, stored_d,
            start, stop, adds,
        )  # fmt: skip
    elif kind == KIND_PACKED8:
        rows_q8(
            KIND_PACKED8, 0, tokens, x, x_stride, index, p, out, out_stride, w, scale, d, stored_d,
            start, stop, adds,
        )  # fmt: skip
    elif tokens <= FOUR_ROWS_TOKENS:
        _published_rows(tokens, x, x_stride, index, p, out, out_stride, w, scale, d, start, stop)
    else:
        rows_q8(
            KIND_INT4, 0, tokens, x, x_stride, index, p, out, out_stride, w, scale, d, stored_d,
            start, stop, adds,
        )  # fmt: skip


@jit
def few_rows(  # type: ignore[no-untyped-def]
    kind, x, x_stride, index, p_start, p_stop, out, out_stride, w, scale, d, start, stop
):
    """out[p, r] = x[index[p]] . w[r], p_start <= p < p_stop, start <= r < stop; as `rows_q8`."""
    rows, columns = stop - start, d
    if p_stop - p_start > TILES[-1]:
        rows, columns = ROW_BLOCK, d if kind == KIND_INT4 else COLUMN_BLOCK
    size = _BLOCK8_BYTES if kind == KIND_PACKED8 else _BLOCK4_BYTES
    for block in range(start, stop, rows):
        last = min(block + rows, stop)
        for part in range(0, d, columns):
            x_part = x + part // PACK_ELEMENTS * PACK_BYTES
            w_part = w + part // BLOCK_COLUMNS * size
            p = p_start
            while p < p_stop:
                tokens = tile_of(p_stop - p)
                _tile_rows(
                    kind, tokens, x_part, x_stride, index, p, out, out_stride, w_part, scale,
                    min(columns, d - part), d, block, last, part,
                )  # fmt: skip
                p += tokens
