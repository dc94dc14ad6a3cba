"""Choosing experts and computing them, behind `reference`'s signatures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kimi_cpu.kernels.common import (
    FEW_TOKENS,
    I32,
    I64,
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
from kimi_cpu.kernels.moe import (
    combine_range,
    count_choice,
    down_range,
    gate_up_range,
    sort_pairs,
)
from kimi_cpu.kernels.router import route_rows
from kimi_cpu.kernels.threads import active_tape, empty, run
from kimi_cpu.quant import F32, GROUP_SIZE, Weight

#: Pairs of a token and an expert processed at once: bounds the memory of intermediate results.
MOE_PAIRS = 4096


def request(experts: ExpertTable, ids: I32) -> None:
    """As `reference.request`: ids int32 [T, K]."""
    source, tape, n = experts.source, active_tape(), len(ids)
    if tape is None and n != 1:
        source.count(ids)
        source.request(np.unique(ids).tolist())
        return
    missing, times = empty((), np.int64), empty((len(experts),), np.int64)
    numbers = (source.scores, source.frequencies, source.state, source.counters, source.chosen)
    args = (
        address(ids), n, ids.shape[1], len(experts), address(experts.kinds),
        *(address(number) for number in numbers), address(times), address(missing),
    )  # fmt: skip
    run(count_choice, args, (experts, ids, times, missing), 1)

    def ask() -> None:
        source.request(np.unique(ids).tolist())

    if tape is not None:
        tape.call_if(missing, ask)
    elif missing:
        ask()


def anticipate(experts: ExpertTable, ids: I32) -> None:
    """As `reference.anticipate`: ids int32 [1, K]."""
    tape = active_tape()
    if tape is None:
        experts.source.anticipate(ids[0].tolist())
    else:
        tape.call_if(np.ones((), np.int64), lambda: experts.source.anticipate(ids[0].tolist()))


def moe(
    x: F32, experts: ExpertTable, ids: I32, weights: F32, precision: Precision, threads: int = 1
) -> F32:
    """As `reference.moe`: x [T, D], ids int32 [T, K], weights [T, K] -> [T, D]."""
    check(x, None, experts.hidden)
    check(weights, len(x), None)
    if ids.shape != weights.shape:
        raise ValueError(f"ids {ids.shape} and weights {weights.shape} differ in shape")
    tape = active_tape()
    if tape is None and not (ids.min() >= 0 and ids.max() < len(experts)):
        raise ValueError(f"expert ids outside 0 .. {len(experts) - 1}")
    xq = None
    if precision == "fast" and x.shape[1] % GROUP_SIZE == experts.width % GROUP_SIZE == 0:
        # float32 or bf16 experts do not read it; the cost is a few microseconds.
        xq = quantize_activations(x, threads)
    work = _Experts(x, xq, experts, precision, threads)
    if len(x) <= FEW_TOKENS:
        return _moe_few(work, ids, weights)
    out = empty(x.shape)
    out[:] = 0
    flat = ids.ravel()
    order = np.argsort(flat, kind="stable")  # pairs (token, slot), sorted by expert
    ordered = flat[order].astype(np.int64)
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    segments = np.stack([ordered[starts], starts, np.r_[starts[1:], flat.size]], axis=1)
    pair_token, pair_weight = order // ids.shape[1], weights.ravel()[order]
    for group in experts.source.sweep(segments[:, 0].tolist()):
        mine, segments = segments[: len(group)], segments[len(group) :]
        while len(mine):  # some at a time: bounds the intermediate results
            n = max(1, int(np.sum(mine[:, 2] - mine[0, 1] <= MOE_PAIRS)))
            part, mine = mine[:n], mine[n:]
            begin, end = int(part[0, 1]), int(part[-1, 2])
            pairs = _Pairs(pair_token[begin:end], pair_weight[begin:end])
            slots = work.compute(part - [0, begin, begin], pairs)
            work.combine(slots, pairs, 0, out)
    return out


class _Pairs(NamedTuple):
    """Chosen (token, slot) pairs, sorted by expert."""

    token: I64  # [P], row of x
    weight: F32  # [P]


class _Slots(NamedTuple):
    """What is computed for pairs."""

    gate: F32  # [P, I], then the hidden activations
    up: F32  # [P, I]
    hidden: PackedQ8 | None  # the hidden activations quantised, [P, I]
    out: F32  # [P, D]


def _moe_few(work: _Experts, ids: I32, weights: F32) -> F32:
    """A few tokens: room for as many experts as there are pairs, whichever they are.

    So this can be recorded. What is there is computed first, the rest as it comes.
    """
    experts, (n, top_k) = work.experts, ids.shape
    n_pairs = n * top_k
    ready, late = empty((n_pairs, 3), np.int64), empty((n_pairs, 3), np.int64)
    counts, times = empty((2,), np.int64), empty((len(experts),), np.int64)
    pairs = _Pairs(empty((n_pairs,), np.int64), empty((n_pairs,)))
    sort = (
        address(ids), address(weights), n, top_k, len(experts), address(experts.kinds),
        address(ready), address(late), address(counts), address(times), address(pairs.token),
        address(pairs.weight),
    )  # fmt: skip
    keep = (experts, ids, weights, ready, late, counts, times, *pairs)
    run(sort_pairs, sort, keep, 1)
    slots = work.slots(n_pairs)
    work.run(ready, counts[:1], pairs, slots, n_pairs)

    def finish() -> None:
        segments = {e: (e, start, stop) for e, start, stop in late[: counts[1]].tolist()}
        for group in _coming(experts, list(segments), n):
            part = np.array([segments[e] for e in group], dtype=np.int64)
            work.fill(part, pairs, slots)

    tape = active_tape()
    if tape is not None:
        tape.call_if(counts[1:].reshape(()), finish)
    elif counts[1]:
        finish()
    out = empty(work.x.shape)
    work.combine(slots, pairs, n, out)
    return out


def _coming(experts: ExpertTable, ids: list[int], n_tokens: int) -> Iterator[list[int]]:
    """These experts in groups as they arrive; those of several tokens may not fit all at once."""
    if n_tokens > 1:
        yield from experts.source.sweep(ids)
        return
    left = set(ids)
    while left:
        here = experts.source.arrived(sorted(left))
        left.difference_update(here)
        yield here


@dataclass(frozen=True)
class _Experts:
    """The experts of one layer at work on x [T, D]."""

    x: F32
    xq: PackedQ8 | None
    experts: ExpertTable
    precision: Precision
    threads: int

    def slots(self, n_pairs: int) -> _Slots:
        width, hidden = self.experts.width, self.experts.hidden
        packed = None
        if self.xq is not None:
            packed = PackedQ8(packed_buffer(n_pairs, width), (n_pairs, width))
        return _Slots(
            empty((n_pairs, width)), empty((n_pairs, width)), packed, empty((n_pairs, hidden))
        )

    def compute(self, segments: I64, pairs: _Pairs) -> _Slots:
        """Slots of all pairs; segments [n, 3]: expert, its first pair, the end of its pairs."""
        slots = self.slots(len(pairs.token))
        self.fill(segments, pairs, slots)
        return slots

    def fill(self, segments: I64, pairs: _Pairs, slots: _Slots) -> None:
        """Compute the pairs of these segments, whose experts are in the table."""
        mixed = self.experts.kinds[segments[:, 0]] < 0
        for expert, start, stop in segments[mixed].tolist():
            gate, up, down = self.experts[expert]
            x = np.ascontiguousarray(self.x[pairs.token[start:stop]])
            hidden = silu_mul(self._project(x, gate), self._project(x, up))
            slots.out[start:stop] = self._project(hidden, down)
        rest = np.ascontiguousarray(segments[~mixed])
        if len(rest):
            count = np.array([len(rest)], dtype=np.int64)
            n_pairs = int((rest[:, 2] - rest[:, 1]).sum())
            self.run(rest, count, pairs, slots, len(rest) * (1 + n_pairs // len(rest) // 8))

    def run(self, segments: I64, count: I64, pairs: _Pairs, slots: _Slots, work: int) -> None:
        """The two phases; count: int64 [1], how many segments; work: about so many experts."""
        experts, d, width = self.experts, self.experts.hidden, self.experts.width
        hq = 0 if slots.hidden is None else address(slots.hidden.data)
        keep = (self, segments, count, *pairs, *slots)
        shared = (
            address(experts.addresses), address(experts.kinds), int(self.precision == "fast"),
            address(segments), address(count),
        )  # fmt: skip
        up_args = (
            *shared, address(pairs.token), address(self.x),
            0 if self.xq is None else address(self.xq.data), d, address(slots.gate),
            address(slots.up), hq, width,
        )  # fmt: skip
        cost = work * width * d // 2
        run(gate_up_range, up_args, keep, width, GROUP_SIZE, self.threads, 2 * cost)
        down_args = (
            *shared, iota_address(len(pairs.token)), address(slots.gate), hq, width,
            address(slots.out), d,
        )  # fmt: skip
        run(down_range, down_args, keep, d, ROW_GRAIN, self.threads, cost)

    def combine(self, slots: _Slots, pairs: _Pairs, new_tokens: int, out: F32) -> None:
        """Add all slots to out [T, D], whose first new_tokens rows are zeroed before."""
        n_pairs = len(pairs.token)
        args = (
            address(slots.out), n_pairs, address(pairs.token), address(pairs.weight), new_tokens,
            address(out), out.shape[1],
        )  # fmt: skip
        cost = slots.out.nbytes // 4  # they lie in the caches
        run(combine_range, args, (*slots, *pairs, out), out.shape[1], ROW_GRAIN, self.threads, cost)

    def _project(self, x: F32, w: Weight) -> F32:
        return project(x, w, self.precision, self.threads)


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
