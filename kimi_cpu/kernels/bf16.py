"""bf16 weights times activations rounded to bf16, by `vdpbf16ps`, where the machine has it.

The instruction adds the products of a pair of bf16 to each of 16 float32 lanes, twice the rate of
float32 multiply-adds, and needs no conversion. A tile is some rows times some tokens, one vector
of sums each. After every BLOCK columns, which lie in the L1 cache for many tokens, the lanes of a
vector are added up, pairwise and always in the same order, and the block's sum to the result: so a
result does not depend on the number of tokens or on its place in a tile.
"""

from __future__ import annotations

from typing import Any

from numba.core import types

from kimi_cpu.kernels.attention_tile import FORM_BF16, HAS_BF16_DOT, _multiply_add, _to_bf16
from kimi_cpu.kernels.isa import jit, standalone
from kimi_cpu.kernels.simd import (
    I16,
    I32,
    I64,
    LANES,
    Emit,
    F32x16,
    const,
    intrinsic,
    literal_intrinsic,
    vec,
)

#: Columns whose products are added up in the lanes.
BLOCK = 1024
#: Columns of a vector; rows of activations are padded with zeros to a multiple.
STEP = 2 * LANES
#: Rows read side by side for one or two tokens.
_STREAMS = 8
#: Rows and tokens of a tile for more.
_TILE = 4
#: Rows and tokens that lie in the L2 cache, BLOCK columns of them.
_ROW_BLOCK = _TOKEN_BLOCK = 64
#: Up to so many tokens wait for the weights: a tile's rows are read along, one after the other.
_FEW_TOKENS = 16
#: How far ahead memory is asked for, by the number of rows that are read side by side.
_PREFETCH_BYTES = {_STREAMS: 1024, _TILE: 2048}


def rounded_bytes(d: int) -> int:
    """Bytes of one token's rounded activations of d elements."""
    return -(-d // STEP) * STEP * 2


def _fold(e: Emit, vectors: list[Any]) -> Any:
    """A vector with the sum of the lanes of each of 2^k <= 16 vectors, as `Emit.sum` adds them."""
    n, width = len(vectors), LANES
    while width > 1:
        half = width // 2
        if len(vectors) == 1:  # two halves of one
            vectors = [vectors[0], vectors[0]]
            starts = range(0, vectors[0].type.count, width)
        else:
            starts = range(0, 2 * vectors[0].type.count, width)
        low, high = ([s + first + i for s in starts for i in range(half)] for first in (0, half))
        vectors = [
            e.b.fadd(e.shuffle(a, b, low), e.shuffle(a, b, high))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        width = half
    assert len(vectors) == 1 and vectors[0].type.count == n
    return vectors[0]


def _load(e: Emit, addr: Any, n: Any = None) -> Any:
    """32 bf16, or the first n of them and zeros, for `_multiply_add`."""
    if n is None:
        return e.load(F32x16, addr)
    halves = [
        e.load_masked(vec(I16), e.add(addr, 2 * first), e.lanes_below(e.b.sub(n, e.i64(first))))
        for first in (0, LANES)
    ]
    return e.b.bitcast(e.shuffle(halves[0], halves[1], range(STEP)), F32x16)


def _emit_block(e: Emit, x: list[Any], w: list[Any], columns: Any, ahead: list[Any]) -> Any:
    """The sums over the first `columns`, at most BLOCK, of x[c] times w[r]: in lane c * R + r.

    The memory from each address `ahead` on is asked for, as much as is read of a row.
    """
    columns = e.min(columns, BLOCK)
    acc = [[e.variable(const(F32x16, 0.0)) for _ in w] for _ in x]
    for slots in acc:
        for slot in slots:
            e.set(slot, const(F32x16, 0.0))

    def step(offset: Any, n: Any = None) -> None:
        at = e.mul(offset, 2)
        tokens = [_load(e, e.add(x_c, at)) for x_c in x]
        for r, w_r in enumerate(w):
            row = _load(e, e.add(w_r, at), n)
            for c, token in enumerate(tokens):
                e.set(acc[c][r], _multiply_add(e, FORM_BF16, token, row, e.get(acc[c][r])))

    whole = e.b.and_(columns, e.i64(-STEP))
    with e.loop(0, whole, STEP) as i:
        for at in ahead:
            e.prefetch(e.add(at, e.mul(i, 2)), 0)
        step(i)
    left = e.b.sub(columns, whole)
    with e.b.if_then(e.b.icmp_signed(">", left, e.i64(0))):
        step(whole, left)
    return _fold(e, [e.get(slot) for slots in acc for slot in slots])


@literal_intrinsic
def _few(
    typingctx: Any, rows: Any, tokens: Any, x: Any, x_stride: Any, index: Any, p_first: Any,
    p_last: Any, out: Any, out_stride: Any, w: Any, r_first: Any, r_step: Any, r_last: Any, d: Any,
) -> Any:  # fmt: skip
    """out[p, r] = x[index[p]] . w[r] for `tokens` p from p_first, `rows` r in steps of r_step.

    rows and tokens are literals. Past p_last (r_last) the last one is computed again. Addresses;
    strides in bytes.
    """
    n_rows, n_tokens = rows.literal_value, tokens.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not HAS_BF16_DOT:  # never called
            return context.get_dummy_value()
        e, b = Emit(builder), builder
        x, x_stride, index, p_first, p_last, out, out_stride = args[2:9]
        w, r_first, r_step, r_last, d = args[9:]
        xs, outs = _tokens(e, n_tokens, x, x_stride, index, p_first, p_last, out, out_stride)
        which = [e.min(e.add(r_first, e.mul(r_step, r)), r_last) for r in range(n_rows)]
        w_at = [e.add(w, e.mul(e.mul(row, d), 2)) for row in which]
        total = e.variable(const(vec(F32x16.element, n_rows * n_tokens), 0.0))
        with e.loop(0, d, BLOCK) as first:
            at = e.mul(first, 2)
            x_here, w_here = [e.add(x_c, at) for x_c in xs], [e.add(w_r, at) for w_r in w_at]
            ahead = [e.add(w_r, _PREFETCH_BYTES[n_rows]) for w_r in w_here]
            part = _emit_block(e, x_here, w_here, b.sub(d, first), ahead)
            e.set(total, b.fadd(e.get(total), part))
        result = e.get(total)
        for c, place in enumerate(outs):
            for r, row in enumerate(which):
                value = b.extract_element(result, const(I32, c * n_rows + r))
                e.store(value, e.add(place, e.mul(row, 4)))
        return context.get_dummy_value()

    return types.void(rows, tokens, *[types.int64] * 12), codegen


def _tokens(
    e: Emit, n: int, x: Any, x_stride: Any, index: Any, first: Any, last: Any, out: Any,
    out_stride: Any,
) -> tuple[list[Any], list[Any]]:  # fmt: skip
    """Addresses of n tokens' activations and results from `first` on; past `last` its own."""
    xs, outs = [], []
    for c in range(n):
        p = e.min(e.add(first, c), last)
        xs.append(e.add(x, e.mul(e.load(I64, e.add(index, e.mul(p, 8))), x_stride)))
        outs.append(e.add(out, e.mul(p, out_stride)))
    return xs, outs


@literal_intrinsic
def _tile(
    typingctx: Any, ahead: Any, x: Any, x_stride: Any, index: Any, p: Any, p_last: Any, out: Any,
    out_stride: Any, w: Any, row: Any, last: Any, d: Any, first: Any, next_row: Any,
    next_first: Any,
) -> Any:  # fmt: skip
    """out[p + c, row + r] += the products of BLOCK columns from `first` on; r, c < _TILE.

    Columns from 0 on start the sums. Tokens past p_last are computed again, rows past `last` are
    not touched. So many columns of `ahead` (a literal) rows from next_row and next_first on are
    asked for.
    """
    n_ahead = ahead.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not HAS_BF16_DOT:  # never called
            return context.get_dummy_value()
        e, b = Emit(builder), builder
        (
            x,
            x_stride,
            index,
            p,
            p_last,
            out,
            out_stride,
            w,
            row,
            last,
            d,
            first,
            next_row,
            next_first,
        ) = args[1:]
        xs, outs = _tokens(e, _TILE, x, x_stride, index, p, p_last, out, out_stride)
        at = e.mul(first, 2)
        x_here, w_here = [e.add(x_c, at) for x_c in xs], []
        for r in range(_TILE):
            start = e.mul(e.mul(e.min(e.add(row, r), last), d), 2)
            w_here.append(e.add(e.add(w, start), at))
        next_at = [
            e.add(w, e.mul(e.add(e.mul(e.add(next_row, r), d), next_first), 2))
            for r in range(n_ahead)
        ]
        part = _emit_block(e, x_here, w_here, b.sub(d, first), next_at)
        lanes = e.lanes_below(e.min(e.add(b.sub(last, row), 1), _TILE))
        begins = b.icmp_signed("==", first, e.i64(0))
        sums = []
        for c, place in enumerate(outs):  # all loads first: repeated tokens are added once
            here = e.add(place, e.mul(row, 4))
            old = b.select(begins, const(F32x16, 0.0), e.load_masked(F32x16, here, lanes))
            own = e.shuffle(part, part, [_TILE * c + i % _TILE for i in range(LANES)])
            sums.append((b.fadd(old, own), here))
        for value, here in sums:
            e.store_masked(value, here, lanes)
        return context.get_dummy_value()

    return types.void(ahead, *[types.int64] * 14), codegen


@jit
def _any_tile(  # type: ignore[no-untyped-def]
    ahead, x, x_stride, index, p, p_last, out, out_stride, w, row, last, d, first, next_row,
    next_first,
):  # fmt: skip
    if ahead == 0:
        _tile(
            0, x, x_stride, index, p, p_last, out, out_stride, w, row, last, d, first, next_row,
            next_first,
        )  # fmt: skip
    elif ahead == 1:
        _tile(
            1, x, x_stride, index, p, p_last, out, out_stride, w, row, last, d, first, next_row,
            next_first,
        )  # fmt: skip
    else:
        _tile(
            2, x, x_stride, index, p, p_last, out, out_stride, w, row, last, d, first, next_row,
            next_first,
        )  # fmt: skip


@standalone
def bf16_rows(  # type: ignore[no-untyped-def]
    x, x_stride, index, p_start, p_stop, out, out_stride, w, d, start, stop
):
    """out[p, r] = x[index[p]] . w[r], p_start <= p < p_stop, start <= r < stop; x rounded."""
    n = p_stop - p_start
    if n <= 2:
        step = (stop - start + _STREAMS - 1) // _STREAMS | 1
        for row in range(start, start + step):
            if n == 1:
                _few(
                    _STREAMS, 1, x, x_stride, index, p_start, p_start, out, out_stride, w, row,
                    step, stop - 1, d,
                )  # fmt: skip
            else:
                _few(
                    _STREAMS, 2, x, x_stride, index, p_start, p_start + 1, out, out_stride, w, row,
                    step, stop - 1, d,
                )  # fmt: skip
        return
    if n <= _TILE:
        step = (stop - start + _TILE - 1) // _TILE | 1
        for row in range(start, start + step):
            _few(
                _TILE, _TILE, x, x_stride, index, p_start, p_stop - 1, out, out_stride, w, row,
                step, stop - 1, d,
            )  # fmt: skip
        return
    size = _TILE if n <= _FEW_TOKENS else _ROW_BLOCK
    for block in range(start, stop, size):
        last = min(block + size, stop) - 1
        for p_block in range(p_start, p_stop, _TOKEN_BLOCK):
            p_last = min(p_block + _TOKEN_BLOCK, p_stop) - 1
            for first in range(0, max(d, 1), BLOCK):
                for row in range(block, last + 1, _TILE):
                    # What comes next is asked for bit by bit, some rows in each tile.
                    next_row, next_first = row + _TILE, first
                    if size == _TILE:
                        next_row, next_first = row, first + BLOCK
                    ahead = 2 if p_last - p_block < 3 * _TILE else 1
                    for p in range(p_block, p_last + 1, _TILE):
                        done = (p - p_block) // _TILE * ahead
                        _any_tile(
                            ahead if done < _TILE else 0, x, x_stride, index, p, p_last, out,
                            out_stride, w, row, last, d, first, next_row + done, next_first,
                        )  # fmt: skip


@intrinsic
def _round_row(typingctx: Any, x: Any, out: Any, d: Any) -> Any:
    """d float32 at x to bf16 at out, ties to even, and zeros up to a multiple of STEP."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not HAS_BF16_DOT:  # never called
            return context.get_dummy_value()
        e, b = Emit(builder), builder
        x, out, d = args
        whole = b.and_(d, e.i64(-STEP))
        with e.loop(0, whole, STEP) as i:
            at = e.add(x, e.mul(i, 4))
            e.store(
                _to_bf16(e, e.load(F32x16, at), e.load(F32x16, at, 64)), e.add(out, e.mul(i, 2))
            )
        left = b.sub(d, whole)
        with b.if_then(b.icmp_signed(">", left, e.i64(0))):
            at = e.add(x, e.mul(whole, 4))
            low = e.load_masked(F32x16, at, e.lanes_below(left))
            high = e.load_masked(F32x16, e.add(at, 64), e.lanes_below(b.sub(left, e.i64(LANES))))
            e.store(_to_bf16(e, low, high), e.add(out, e.mul(whole, 2)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@jit
def round_rows(x, d, out, start, stop):  # type: ignore[no-untyped-def]
    """The rows start .. stop-1 of x [T, d] to bf16, each `rounded_bytes` long; addresses."""
    stride = (d + STEP - 1) // STEP * STEP * 2
    for t in range(start, stop):
        _round_row(x + t * d * 4, out + t * stride, d)
