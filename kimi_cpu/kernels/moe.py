"""The routed experts of one layer: gate, up, SwiGLU, down, and the weighted sum.

The chosen (token, slot) pairs are sorted by expert. A segment is one expert with its pairs
p in [start, stop); one token makes K segments of one pair. Both phases may be split over rows.
A token's results are added in the order of the segments, by rising expert.
"""

from __future__ import annotations

from kimi_cpu.kernels.common import KIND_INT4, WITH_Q8
from kimi_cpu.kernels.int4 import PACK_BYTES, PACK_ELEMENTS, pack_rows
from kimi_cpu.kernels.isa import jit
from kimi_cpu.kernels.matmul import dot_rows
from kimi_cpu.kernels.norm_rope import add_scaled_row, silu_mul_row, zero_row
from kimi_cpu.kernels.rows import store_i64
from kimi_cpu.kernels.simd import load_f32, load_i32, load_i64, store_f32


@jit
def _kind(kinds, expert, fast):  # type: ignore[no-untyped-def]
    kind = load_i32(kinds + expert * 4)
    return kind + WITH_Q8 if fast and kind >= KIND_INT4 else kind


@jit
def _packed(d):  # type: ignore[no-untyped-def]
    return (d + PACK_ELEMENTS - 1) // PACK_ELEMENTS * PACK_BYTES


@jit
def gate_up_range(  # type: ignore[no-untyped-def]
    table, kinds, fast, segments, n_segments, pair_token, x, xq, d, gate, up, hq, width,
    start, stop,
):  # fmt: skip
    """Rows start .. stop-1 of silu(gate x) * up x of every pair, into gate [P, width].

    For quantised experts in fast mode x comes packed in xq and the result is packed into hq too, so
    start and stop must then be multiples of 32. segments: int64 [n, 3] of expert, start, stop;
    pair_token: int64 [P], the row of x; table, kinds: of ExpertTable. All addresses.
    """
    for s in range(n_segments):
        expert = load_i64(segments + s * 24)
        p_start, p_stop = load_i64(segments + s * 24 + 8), load_i64(segments + s * 24 + 16)
        kind = _kind(kinds, expert, fast)
        source, stride = (xq, _packed(d)) if kind >= WITH_Q8 else (x, d * 4)
        for part in range(2):
            dot_rows(
                kind, source, stride, pair_token, p_start, p_stop,
                gate if part == 0 else up, width * 4,
                load_i64(table + expert * 48 + part * 16),
                load_i64(table + expert * 48 + part * 16 + 8), d, start, stop,
            )  # fmt: skip
        for p in range(p_start, p_stop):
            at = (p * width + start) * 4
            silu_mul_row(gate + at, up + at, gate + at, stop - start)
        if kind >= WITH_Q8:
            pack_rows(gate, width, hq, p_start, p_stop, start, stop)


@jit
def down_range(  # type: ignore[no-untyped-def]
    table, kinds, fast, segments, n_segments, iota, hidden, hq, width, slots, pair_token,
    pair_weight, new_tokens, out, d, start, stop,
):  # fmt: skip
    """Columns start .. stop-1 of the output: down projections into slots [P, d], added to out.

    out [T, d] gains pair_weight[p] * slots[p] in row pair_token[p]; its first new_tokens rows are
    zeroed before. iota: int64 0, 1, ..; pair_weight float32 [P]. All addresses.
    """
    for t in range(new_tokens):
        zero_row(out + (t * d + start) * 4, stop - start)
    for s in range(n_segments):
        expert = load_i64(segments + s * 24)
        p_start, p_stop = load_i64(segments + s * 24 + 8), load_i64(segments + s * 24 + 16)
        kind = _kind(kinds, expert, fast)
        source, stride = (hq, _packed(width)) if kind >= WITH_Q8 else (hidden, width * 4)
        dot_rows(
            kind, source, stride, iota, p_start, p_stop, slots, d * 4,
            load_i64(table + expert * 48 + 32), load_i64(table + expert * 48 + 40),
            width, start, stop,
        )  # fmt: skip
        for p in range(p_start, p_stop):
            row = load_i64(pair_token + p * 8)
            add_scaled_row(
                slots + (p * d + start) * 4, pair_weight + p * 4, out + (row * d + start) * 4,
                stop - start,
            )  # fmt: skip


@jit
def group_pairs(ids, weights, segments, pair_weight, top_k):  # type: ignore[no-untyped-def]
    """One token's pairs, sorted by expert: segments int64 [top_k, 3], pair_weight [top_k].

    ids int32 and weights float32 [top_k] are in the router's order.
    """
    for k in range(top_k):
        expert, place = load_i32(ids + k * 4), 0
        for other in range(top_k):
            place += int(load_i32(ids + other * 4) < expert)
        store_i64(segments + place * 24, expert)
        store_i64(segments + place * 24 + 8, place)
        store_i64(segments + place * 24 + 16, place + 1)
        store_f32(pair_weight + place * 4, load_f32(weights + k * 4))
