"""Choosing experts and computing them, behind `reference`'s signatures."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kimi_cpu.kernels.common import (
    I32,
    I64,
    CannotReplay,
    ExpertTable,
    Precision,
    address,
)
from kimi_cpu.kernels.linears import (
    ROW_GRAIN,
    PackedQ8,
    check,
    iota_address,
    packed_buffer,
    project,
    quantize_activations,
    silu_mul,
)
from kimi_cpu.kernels.moe import down_range, gate_up_range, group_pairs
from kimi_cpu.kernels.router import route_rows
from kimi_cpu.kernels.threads import active_tape, empty, run
from kimi_cpu.quant import F32, GROUP_SIZE

#: Pairs of a token and an expert processed at once: bounds the memory of intermediate results.
MOE_PAIRS = 4096


def moe(
    x: F32, experts: ExpertTable, ids: I32, weights: F32, precision: Precision, threads: int = 1
) -> F32:
    """As `reference.moe`: x [T, D], ids int32 [T, K], weights [T, K] -> [T, D]."""
    check(x, None, None)
    check(weights, len(x), None)
    if ids.shape != weights.shape:
        raise ValueError(f"ids {ids.shape} and weights {weights.shape} differ in shape")
    out = empty(x.shape)
    if len(x) == 1:
        _moe_token(x, experts, ids, weights, precision, threads, out)
        return out
    out[:] = 0
    flat = ids.ravel()
    order = np.argsort(flat, kind="stable")  # pairs (token, slot), sorted by expert
    ordered = flat[order].astype(np.int64)
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    segments = np.stack([ordered[starts], starts, np.r_[starts[1:], flat.size]], axis=1)
    if segments[0, 0] < 0 or segments[-1, 0] >= len(experts):
        raise ValueError(f"expert ids outside 0 .. {len(experts) - 1}")
    pair_token, pair_weight = order // ids.shape[1], weights.ravel()[order]
    quantise = precision == "fast" and x.shape[1] % GROUP_SIZE == experts.width % GROUP_SIZE == 0
    xq = quantize_activations(x) if quantise else None
    first = 0
    while first < len(segments):  # some experts at a time: bounds the intermediate results
        n = max(1, int(np.sum(segments[first:, 2] - segments[first, 1] <= MOE_PAIRS)))
        part = segments[first : first + n]
        begin, end = int(part[0, 1]), int(part[-1, 2])
        pairs = _Pairs(part - [0, begin, begin], pair_token[begin:end], pair_weight[begin:end])
        _moe_part(x, xq, experts, pairs, precision, threads, out)
        first += n
    return out


class _Pairs(NamedTuple):
    """Chosen (token, slot) pairs, sorted by expert."""

    segments: I64  # [n, 3]: expert, its first pair, the end of its pairs
    token: I64  # [P], row of x
    weight: F32  # [P]


def _moe_part(
    x: F32, xq: PackedQ8 | None, experts: ExpertTable, pairs: _Pairs, precision: Precision,
    threads: int, out: F32,
) -> None:  # fmt: skip
    """Add what the pairs' experts compute to out [T, D]."""
    chosen = pairs.segments[:, 0].tolist()
    cost = 0
    for e in chosen:  # the first use of an expert loads and validates it
        if experts[e][0].shape != (experts.width, x.shape[1]):
            raise ValueError(f"expert {e} has shape {experts[e][0].shape} for {x.shape[1]} inputs")
        cost += experts[e][0].nbytes
    cost *= 1 + len(pairs.token) // len(chosen) // 8
    if any(experts.kinds[e] < 0 for e in chosen):
        _moe_mixed(x, experts, pairs, precision, threads, out)
    else:
        _run_experts(x, xq, experts, pairs, precision == "fast", threads, cost, 0, out)


def _moe_token(
    x: F32, experts: ExpertTable, ids: I32, weights: F32, precision: Precision, threads: int,
    out: F32,
) -> None:  # fmt: skip
    """One token: every chosen expert has one pair, and nothing depends on which they are.

    So this can be recorded: the experts' addresses are looked up when the tape is played.
    """
    top_k, d = ids.shape[1], x.shape[1]
    segments, sorted_weights = empty((top_k, 3), np.int64), empty((top_k,))
    sort = (address(ids), address(weights), address(segments), address(sorted_weights), top_k)
    run(group_pairs, sort, (ids, weights, segments, sorted_weights), 1)
    pairs = _Pairs(segments, np.zeros(top_k, np.int64), sorted_weights)

    def load() -> None:
        for e in segments[:, 0].tolist():
            if not 0 <= e < len(experts):
                raise ValueError(f"expert ids outside 0 .. {len(experts) - 1}")
            if experts[e][0].shape[1] != d:
                raise ValueError(f"expert {e} has shape {experts[e][0].shape} for {d} inputs")

    tape = active_tape()
    if tape is None:
        load()
        if any(experts.kinds[e] < 0 for e in segments[:, 0].tolist()):
            out[:] = 0
            _moe_mixed(x, experts, pairs, precision, threads, out)
            return
    else:

        def load_for_tape() -> None:
            load()
            if any(experts.kinds[e] < 0 for e in segments[:, 0].tolist()):
                raise CannotReplay("experts whose projections are stored in different ways")

        tape.need_experts(segments, experts.addresses, load_for_tape)
    xq = None
    if precision == "fast" and d % GROUP_SIZE == experts.width % GROUP_SIZE == 0:
        # float32 or bf16 experts do not read it; the cost is a few microseconds.
        xq = quantize_activations(x)
    cost = top_k * experts.width * d // 2
    _run_experts(x, xq, experts, pairs, precision == "fast", threads, cost, 1, out)


def _run_experts(
    x: F32, xq: PackedQ8 | None, experts: ExpertTable, pairs: _Pairs, fast: bool, threads: int,
    cost: int, new_tokens: int, out: F32,
) -> None:  # fmt: skip
    """Both phases over the pairs; the first new_tokens rows of out are zeroed before."""
    n_pairs, d, width = len(pairs.token), x.shape[1], experts.width
    gate, up, slots = empty((n_pairs, width)), empty((n_pairs, width)), empty((n_pairs, d))
    hq = None if xq is None else packed_buffer(n_pairs, width)
    keep: tuple[object, ...] = (x, experts, *pairs, out, gate, up, slots, xq, hq)
    hq_address = 0 if hq is None else address(hq)
    shared = (
        address(experts.addresses), address(experts.kinds), int(fast), address(pairs.segments),
        len(pairs.segments),
    )  # fmt: skip
    up_args = (
        *shared, address(pairs.token), address(x), 0 if xq is None else address(xq.data), d,
        address(gate), address(up), hq_address, width,
    )  # fmt: skip
    run(gate_up_range, up_args, keep, width, GROUP_SIZE, threads, 2 * cost)
    down_args = (
        *shared, iota_address(n_pairs), address(gate), hq_address, width, address(slots),
        address(pairs.token), address(pairs.weight), new_tokens, address(out), d,
    )  # fmt: skip
    run(down_range, down_args, keep, d, ROW_GRAIN, threads, cost)


def _moe_mixed(
    x: F32, experts: ExpertTable, pairs: _Pairs, precision: Precision, threads: int, out: F32
) -> None:
    """Experts whose projections are stored in different ways: one call a projection."""
    for e, start, stop in pairs.segments.tolist():
        gate, up, down = experts[e]
        tokens = pairs.token[start:stop]
        v = np.ascontiguousarray(x[tokens])
        h = silu_mul(project(v, gate, precision, threads), project(v, up, precision, threads))
        out[tokens] += pairs.weight[start:stop, None] * project(h, down, precision, threads)


def route(
    logits: F32,
    bias: F32,
    n_group: int,
    topk_group: int,
    top_k: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[I32, F32]:
    """As `reference.route`: logits [T, E], bias [E] -> ids int32 [T, K], weights [T, K]."""
    check(logits, None, None)
    n, n_experts = logits.shape
    check(bias, n_experts)
    if n_experts % n_group or not 0 < top_k <= topk_group * (n_experts // n_group):
        raise ValueError(f"cannot choose {top_k} of {n_experts} experts in {n_group} groups")
    ids, weights = empty((n, top_k), np.int32), empty((n, top_k))
    args = (
        address(logits), address(bias), n_experts, n_group, topk_group, top_k,
        int(norm_topk_prob), float(routed_scaling_factor), address(ids), address(weights),
    )  # fmt: skip
    run(route_rows, args, (logits, bias, ids, weights), n)
    return ids, weights
