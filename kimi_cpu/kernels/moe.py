"""The routed experts of one layer: gate, up, SwiGLU, down, and the weighted sum.

The chosen (token, slot) pairs are sorted by expert. A segment is one expert with its pairs
p in [start, stop); one token makes K segments of one pair. All phases may be split over rows.
A token's results are added by rising expert, in whatever order they were computed.
"""

from __future__ import annotations

from kimi_cpu.kernels.common import ABSENT, KIND_INT4, WITH_Q8
from kimi_cpu.kernels.int4 import PACK_BYTES, PACK_ELEMENTS, pack_rows
from kimi_cpu.kernels.isa import jit
from kimi_cpu.kernels.matmul import dot_rows
from kimi_cpu.kernels.norm_rope import add_scaled_row, silu_mul_row, zero_row
from kimi_cpu.kernels.rows import store_i64
from kimi_cpu.kernels.simd import (
    load_f32,
    load_f64,
    load_i32,
    load_i64,
    store_f32,
    store_f64,
    store_i32,
)


@jit
def _kind(kinds, expert, fast):  # type: ignore[no-untyped-def]
    kind = load_i32(kinds + expert * 4)
    return kind + WITH_Q8 if fast and kind >= KIND_INT4 else kind


@jit
def _packed(d):  # type: ignore[no-untyped-def]
    return (d + PACK_ELEMENTS - 1) // PACK_ELEMENTS * PACK_BYTES


@jit
def gate_up_range(  # type: ignore[no-untyped-def]
    table, kinds, fast, segments, count, pair_token, x, xq, d, gate, up, hq, width, start, stop
):  # fmt: skip
    """Rows start .. stop-1 of silu(gate x) * up x of every pair, into gate [P, width].

    For quantised experts in fast mode x comes packed in xq and the result is packed into hq too, so
    start and stop must then be multiples of 32. segments: int64 [n, 3] of expert, start, stop;
    count: int64 n; pair_token: int64 [P], the row of x; table, kinds: of ExpertTable. All
    addresses.
    """
    for s in range(load_i64(count)):
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
    table, kinds, fast, segments, count, iota, hidden, hq, width, slots, d, start, stop
):
    """Columns start .. stop-1 of the down projections of every pair, into slots [P, d].

    iota: int64 0, 1, ..; the others as for `gate_up_range`. All addresses.
    """
    for s in range(load_i64(count)):
        expert = load_i64(segments + s * 24)
        p_start, p_stop = load_i64(segments + s * 24 + 8), load_i64(segments + s * 24 + 16)
        kind = _kind(kinds, expert, fast)
        source, stride = (hq, _packed(width)) if kind >= WITH_Q8 else (hidden, width * 4)
        dot_rows(
            kind, source, stride, iota, p_start, p_stop, slots, d * 4,
            load_i64(table + expert * 48 + 32), load_i64(table + expert * 48 + 40),
            width, start, stop,
        )  # fmt: skip


@jit
def combine_range(  # type: ignore[no-untyped-def]
    slots, n_pairs, pair_token, pair_weight, new_tokens, out, d, start, stop
):
    """Add pair_weight[p] * slots[p] to row pair_token[p] of out [T, d], columns start .. stop-1.

    The first new_tokens rows of out are zeroed before. pair_weight: float32 [P]. All addresses.
    """
    for t in range(new_tokens):
        zero_row(out + (t * d + start) * 4, stop - start)
    for p in range(n_pairs):
        row = load_i64(pair_token + p * 8)
        add_scaled_row(
            slots + (p * d + start) * 4, pair_weight + p * 4, out + (row * d + start) * 4,
            stop - start,
        )  # fmt: skip


@jit
def _tally(ids, n_pairs, times, n_experts):  # type: ignore[no-untyped-def]
    """times [n_experts], int64: how often each expert is among the ids, int32 [n_pairs]."""
    for e in range(n_experts):
        store_i64(times + e * 8, 0)
    for i in range(n_pairs):
        at = times + load_i32(ids + i * 4) * 8
        store_i64(at, load_i64(at) + 1)


@jit
def count_choice(  # type: ignore[no-untyped-def]
    ids, n_tokens, top_k, n_experts, kinds, scores, frequencies, state, counters, chosen, times,
    missing,
):  # fmt: skip
    """`ExpertSource.count` of a few tokens: ids int32 [n_tokens, top_k].

    times: int64 [n_experts] of scratch; missing: int64 [], how many of the experts are not there.
    What it does to the policy's numbers is `store.experts.policy.Frequency.use`.
    """
    _tally(ids, n_tokens * top_k, times, n_experts)
    weight, age, uses, absent = load_f64(state), load_f64(state + 8), 0, 0
    for expert in range(n_experts):
        n = load_i64(times + expert * 8)
        if n > 0:
            frequency = load_f64(frequencies + expert * 8) + n * weight
            store_f64(frequencies + expert * 8, frequency)
            score = age + frequency / weight
            if score > load_f64(scores + expert * 8):
                store_f64(scores + expert * 8, score)
            uses += 1
            absent += int(load_i32(kinds + expert * 4) == ABSENT)
    if n_tokens == 1:
        for k in range(top_k):
            store_i32(chosen + k * 4, load_i32(ids + k * 4))
    store_i64(counters, load_i64(counters) + uses)
    store_i64(counters + 8, load_i64(counters + 8) + uses - absent)
    store_i64(missing, absent)


@jit
def sort_pairs(  # type: ignore[no-untyped-def]
    ids, weights, n_tokens, top_k, n_experts, kinds, ready, late, counts, times, pair_token,
    pair_weight,
):  # fmt: skip
    """A few tokens' pairs, numbered by rising expert, in two lists of segments.

    ids int32 and weights float32 [n_tokens, top_k] are in the router's order; times: int64
    [n_experts] of scratch. ready and late: int64 [P, 3], experts that are there and those that are
    not (or are MIXED); counts: int64 [2], how many of each; pair_token: int64 [P], pair_weight:
    float32 [P]. All addresses.
    """
    _tally(ids, n_tokens * top_k, times, n_experts)
    n_ready, n_late, place = 0, 0, 0
    for expert in range(n_experts):
        n = load_i64(times + expert * 8)
        if n > 0:
            if load_i32(kinds + expert * 4) >= 0:
                segment, n_ready = ready + n_ready * 24, n_ready + 1
            else:
                segment, n_late = late + n_late * 24, n_late + 1
            store_i64(segment, expert)
            store_i64(segment + 8, place)
            store_i64(segment + 16, place + n)
            store_i64(times + expert * 8, place)
            place += n
    for i in range(n_tokens * top_k):
        at = times + load_i32(ids + i * 4) * 8
        place = load_i64(at)
        store_i64(at, place + 1)
        store_i64(pair_token + place * 8, i // top_k)
        store_f32(pair_weight + place * 4, load_f32(weights + i * 4))
    store_i64(counts, n_ready)
    store_i64(counts + 8, n_late)
