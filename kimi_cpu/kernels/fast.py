"""The compiled kernels behind the signatures of `kernels.reference`; see there for the meaning.

Importing this module imports numba and chooses the instruction set (`kernels.isa`); each kernel
is compiled, or loaded from the disk cache, when first called. Arrays must be C-contiguous
float32 unless the reference says otherwise; shapes are checked here, values are not. Every
function may be called from several Python threads at once, and its result does not depend on
`threads`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kimi_cpu.kernels import isa, ops  # noqa: F401 - ops registers the operations
from kimi_cpu.kernels.attention import (
    QUERY_BLOCK,
    SLOT_CELL,
    decode_groups,
    decode_merge_range,
    decode_pack_range,
    decode_range,
    decode_scratch_bytes,
    decode_splits,
    prefill_range,
    prefill_scratch_bytes,
    query_bytes,
    state_bytes,
)
from kimi_cpu.kernels.attention_absorb import absorb_q_range
from kimi_cpu.kernels.attention_tile import FORM_BF16, FORM_F32, HAS_BF16_DOT
from kimi_cpu.kernels.common import (
    I32,
    I64,
    KIND_BF16,
    Q8,
    WITH_Q8,
    CannotReplay,
    ExpertTable,
    Position,
    Precision,
    address,
    weight_addresses,
    weight_kind,
)
from kimi_cpu.kernels.int4 import (
    PACK_BYTES,
    PACK_ELEMENTS,
    PACK_SCALES,
    PACK_SUMS,
    pack_rows,
    packed_bytes,
)
from kimi_cpu.kernels.matmul import matmul_range
from kimi_cpu.kernels.moe import down_range, gate_up_range, group_pairs
from kimi_cpu.kernels.norm_rope import rmsnorm_rows, rope_rows, silu_mul_rows
from kimi_cpu.kernels.router import route_rows
from kimi_cpu.kernels.rows import add_rows, split_rows, store_rows
from kimi_cpu.kernels.threads import active_tape, empty, run
from kimi_cpu.kernels.threads import recording as recording  # part of what the model needs
from kimi_cpu.quant import (
    F32,
    GROUP_SIZE,
    U16,
    Int4Weight,
    PackedWeight,
    Weight,
    as_f32,
    dequantize,
)

VARIANT = isa.VARIANT

#: Pairs of a token and an expert processed at once: bounds the memory of intermediate results.
MOE_PAIRS = 4096
_ROW_GRAIN = 32

_iota_lock = threading.Lock()
_iota: I64 = np.arange(1024, dtype=np.int64)
_iota_kept: list[I64] = [_iota]  # older ones may still be in use by another thread


def _iota_address(n: int) -> int:
    """Address of int64 0, 1, .. of at least n elements, never freed."""
    global _iota
    if n > len(_iota):
        with _iota_lock:
            if n > len(_iota):
                grown = np.arange(1 << (n - 1).bit_length(), dtype=np.int64)
                _iota_kept.append(grown)
                _iota = grown
    return address(_iota)


def _check(x: npt.NDArray[np.generic], *shape: int | None) -> None:
    """ValueError unless x is C-contiguous float32 of this shape (None: any length)."""
    if x.dtype != np.float32 or not x.flags.c_contiguous:
        raise ValueError(f"expected C-contiguous float32, got {x.dtype} with strides {x.strides}")
    if x.ndim != len(shape) or any(
        want is not None and want != got for want, got in zip(shape, x.shape, strict=True)
    ):
        raise ValueError(f"expected shape {shape}, got {x.shape}")


@dataclass(frozen=True, slots=True)
class PackedQ8:
    """Activations [T, D] quantised as `common.Q8`, in the order that INT4 kernels read.

    Attributes:
        data: uint8 [T, packed_bytes(D)], see `kernels.int4`.
        shape: (T, D).
    """

    data: npt.NDArray[np.uint8]
    shape: tuple[int, int]

    def unpack(self) -> Q8:
        """In natural order, for tests and inspection."""
        n_tokens, d = self.shape
        parts = self.data.reshape(n_tokens, -1, PACK_BYTES)
        blocks = parts[:, :, :PACK_SUMS].reshape(n_tokens, -1, 2, 64)
        q = blocks.transpose(0, 1, 3, 2).reshape(n_tokens, -1)
        scale = np.ascontiguousarray(parts[:, :, PACK_SCALES:]).view(np.float32)
        return Q8(
            np.ascontiguousarray(q[:, :d]).view(np.int8),
            np.ascontiguousarray(scale.reshape(n_tokens, -1)[:, : d // GROUP_SIZE]),
        )


def _packed_buffer(n_rows: int, d: int) -> npt.NDArray[np.uint8]:
    make = np.zeros if d % PACK_ELEMENTS else np.empty  # the padding must be zero
    return make((n_rows, packed_bytes(d)), dtype=np.uint8)


def linear(x: F32, w: Weight, threads: int = 1) -> F32:
    """As `reference.linear`: x [T, D], w [O, D] of any kind -> [T, O]."""
    rows, d = w.shape
    _check(x, None, d)
    n = len(x)
    values, scales = weight_addresses(w)
    out = empty((n, rows))
    args = (
        weight_kind(w), address(x), d * 4, 0, _iota_address(n), n, address(out), rows * 4, 0,
        values, scales, 0, rows, d,
    )  # fmt: skip
    run(matmul_range, args, (x, w, out), rows, _ROW_GRAIN, threads, w.nbytes * (1 + n // 8))
    return out


def quantize_activations(x: F32) -> PackedQ8:
    """As `reference.quantize_activations`: x [T, D], D a multiple of 32."""
    _check(x, None, None)
    n, d = x.shape
    if d % GROUP_SIZE:
        raise ValueError(f"{d} activations are not whole groups of {GROUP_SIZE}")
    data = _packed_buffer(n, d)
    run(pack_rows, (address(x), d, address(data)), (x, data), n)
    return PackedQ8(data, (n, d))


def linear_q8(xq: PackedQ8, w: Int4Weight | PackedWeight, threads: int = 1) -> F32:
    """As `reference.linear_q8`: xq [T, D] of `quantize_activations`, w [O, D] -> [T, O].

    From GEMM_TOKENS tokens on another kernel adds in another order (`kernels.gemm`).
    """
    rows, d = w.shape
    n = xq.shape[0]
    if xq.shape[1] != d:
        raise ValueError(f"activations of {xq.shape[1]} features for a weight of {d}")
    values, scales = weight_addresses(w)
    out = empty((n, rows))
    args = (
        weight_kind(w) + WITH_Q8, address(xq.data), packed_bytes(d), 0, _iota_address(n), n,
        address(out), rows * 4, 0, values, scales, 0, rows, d,
    )  # fmt: skip
    run(matmul_range, args, (xq, w, out), rows, _ROW_GRAIN, threads, w.nbytes * (1 + n // 8))
    return out


def project(x: F32, w: Weight, precision: Precision, threads: int = 1) -> F32:
    """As `reference.project`: x [T, D], w [O, D] of any kind -> [T, O]."""
    if precision == "fast" and isinstance(w, Int4Weight | PackedWeight):
        return linear_q8(quantize_activations(x), w, threads)
    return linear(x, w, threads)


def silu_mul(gate: F32, up: F32) -> F32:
    """As `reference.silu_mul`: gate, up [T, I] -> [T, I]."""
    _check(gate, None, None)
    _check(up, *gate.shape)
    out = empty(gate.shape)
    run(silu_mul_rows, (address(gate), address(up), address(out)), (gate, up, out), gate.size)
    return out


def moe(
    x: F32, experts: ExpertTable, ids: I32, weights: F32, precision: Precision, threads: int = 1
) -> F32:
    """As `reference.moe`: x [T, D], ids int32 [T, K], weights [T, K] -> [T, D]."""
    _check(x, None, None)
    _check(weights, len(x), None)
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
    hq = None if xq is None else _packed_buffer(n_pairs, width)
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
        *shared, _iota_address(n_pairs), address(gate), hq_address, width, address(slots),
        address(pairs.token), address(pairs.weight), new_tokens, address(out), d,
    )  # fmt: skip
    run(down_range, down_args, keep, d, _ROW_GRAIN, threads, cost)


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
    _check(logits, None, None)
    n, n_experts = logits.shape
    _check(bias, n_experts)
    if n_experts % n_group or not 0 < top_k <= topk_group * (n_experts // n_group):
        raise ValueError(f"cannot choose {top_k} of {n_experts} experts in {n_group} groups")
    ids, weights = empty((n, top_k), np.int32), empty((n, top_k))
    args = (
        address(logits), address(bias), n_experts, n_group, topk_group, top_k,
        int(norm_topk_prob), float(routed_scaling_factor), address(ids), address(weights),
    )  # fmt: skip
    run(route_rows, args, (logits, bias, ids, weights), n)
    return ids, weights


def rmsnorm(x: F32, w: U16 | F32, eps: float) -> F32:
    """As `reference.rmsnorm`: x [T, D], w [D] -> [T, D]."""
    _check(x, None, *w.shape)
    out = empty(x.shape)
    args = (
        address(x), weight_addresses(w)[0], int(w.dtype == np.uint16), float(eps), address(out),
        x.shape[1],
    )  # fmt: skip
    run(rmsnorm_rows, args, (x, w, out), len(x))
    return out


def rope(x: F32, cos: F32, sin: F32) -> F32:
    """As `reference.rope`: x [T, H, P], cos and sin [T, P / 2] -> [T, H, P]."""
    _check(x, None, None, None)
    n, n_heads, p = x.shape
    _check(cos, n, p // 2)
    _check(sin, n, p // 2)
    out = empty(x.shape)
    args = (address(x), address(cos), address(sin), address(out), n_heads, p // 2)
    run(rope_rows, args, (x, cos, sin, out), n)
    return out


def _dense(w: Weight) -> U16 | F32:
    return dequantize(w) if isinstance(w, Int4Weight | PackedWeight) else w


def absorb_q(q_nope: F32, w_kv_b: Weight, threads: int = 1) -> F32:
    """As `reference.absorb_q`: q_nope [T, H, N], w_kv_b [H * (N + V), R] -> [T, H, R]."""
    _check(q_nope, None, None, None)
    w = _dense(w_kv_b)
    n, n_heads, n_dim = q_nope.shape
    rows, rank = w.shape
    if rows % n_heads or rows // n_heads < n_dim:
        raise ValueError(f"kv_b has {rows} rows for {n_heads} heads of {n_dim}")
    out = empty((n, n_heads, rank))
    args = (
        address(q_nope), weight_addresses(w)[0], int(w.dtype == np.uint16), address(out), n,
        n_heads, n_dim, rank, rows // n_heads,
    )  # fmt: skip
    run(absorb_q_range, args, (q_nope, w, out), n_heads, 1, threads, w.nbytes * (1 + n // 8) // 2)
    return out


def absorb_v(o_lat: F32, w_kv_b: Weight, v_head_dim: int, threads: int = 1) -> F32:
    """As `reference.absorb_v`: o_lat [T, H, R], w_kv_b [H * (N + V), R] -> [T, H, V]."""
    w = _dense(w_kv_b)
    rows, rank = w.shape
    _check(o_lat, None, None, rank)
    n, n_heads = o_lat.shape[:2]
    head_rows = rows // n_heads
    if rows % n_heads or head_rows < v_head_dim:
        raise ValueError(f"kv_b has {rows} rows for {n_heads} heads of {v_head_dim} values")
    kind = weight_kind(w)
    row_bytes = rank * (2 if kind == KIND_BF16 else 4)
    out = empty((n, n_heads, v_head_dim))
    args = (
        kind, address(o_lat), n_heads * rank * 4, rank * 4, _iota_address(n), n, address(out),
        n_heads * v_head_dim * 4, v_head_dim * 4,
        weight_addresses(w)[0] + (head_rows - v_head_dim) * row_bytes, 0, head_rows * row_bytes,
        v_head_dim, rank,
    )  # fmt: skip
    cost = w.nbytes * (1 + n // 8) // 2
    run(matmul_range, args, (o_lat, w, out), n_heads * v_head_dim, _ROW_GRAIN, threads, cost)
    return out


#: Sums of a decode attention that exist at a time; more tokens take several turns.
_MAX_STATE_BYTES = 64 << 20
_work_space: list[npt.NDArray[np.uint8]] = []


def _take_work_space(n_bytes: int) -> npt.NDArray[np.uint8]:
    """Memory that begins with a cache line; new pages are dear, so `_work_space` keeps some.

    `_put_back` it after use. The layers of a tape, played one after another, share theirs.
    """
    tape = active_tape()
    if tape is not None and n_bytes in tape.shared:
        return tape.shared[n_bytes]
    memory = _work_space.pop() if tape is None and _work_space else np.empty(0, dtype=np.uint8)
    if len(memory) < n_bytes:
        memory = np.empty(n_bytes + 64, dtype=np.uint8)
        memory = memory[-address(memory) % 64 :]
    if tape is not None:
        tape.shared[n_bytes] = memory
    return memory


def _put_back(memory: npt.NDArray[np.uint8]) -> None:
    if active_tape() is None:
        _work_space.append(memory)


def mla_decode(
    q_lat: F32,
    q_pe: F32,
    c_kv: F32 | U16,
    k_pe: F32 | U16,
    start: int | Position,
    scale: float,
    threads: int = 1,
) -> F32:
    """As `reference.mla_decode`: q_lat [T, H, R], q_pe [T, H, P], cache [S, R], [S, P]."""
    _check(q_lat, None, None, None)
    n, n_heads, rank = q_lat.shape
    _check(q_pe, n, n_heads, None)
    p_dim = q_pe.shape[2]
    if c_kv.dtype != k_pe.dtype:
        c_kv, k_pe = as_f32(c_kv), as_f32(k_pe)
    if c_kv.shape[1] != rank or k_pe.shape[1] != p_dim or min(len(c_kv), len(k_pe)) < start + n:
        raise ValueError(f"a cache of {c_kv.shape}, {k_pe.shape} for {start} + {n} tokens")
    out = empty(q_lat.shape)
    if n == 1:  # may be recorded: `start` is then read when the tape is played
        _decode_part(q_lat, q_pe, c_kv, k_pe, start, scale, threads, out)
        return out
    a_token = decode_splits(int(start), n) * decode_groups(1, n_heads) * state_bytes(rank)
    step = max(1, _MAX_STATE_BYTES // a_token)
    for t in range(0, n, step):
        part = slice(t, t + step)
        first = int(start) + t
        _decode_part(q_lat[part], q_pe[part], c_kv, k_pe, first, scale, threads, out[part])
    return out


def _decode_part(
    q_lat: F32, q_pe: F32, c_kv: F32 | U16, k_pe: F32 | U16, start: int | Position, scale: float,
    threads: int, out: F32,
) -> None:  # fmt: skip
    (n, n_heads, rank), p_dim = q_lat.shape, q_pe.shape[2]
    position = np.asarray(start, dtype=np.int64)
    rows = int(start) + n if active_tape() is None else len(c_kv)
    is_bf16 = c_kv.dtype == np.uint16
    form = FORM_BF16 if is_bf16 and HAS_BF16_DOT else FORM_F32
    groups, splits = decode_groups(n, n_heads), decode_splits(rows - n, n)
    slots, slot_bytes = max(threads, 1), decode_scratch_bytes(form, rank, p_dim)
    sizes = (
        slots * (SLOT_CELL + slot_bytes), groups * query_bytes(form, rank, p_dim),
        splits * groups * state_bytes(rank),
    )  # fmt: skip
    work = _take_work_space(sum(sizes))
    work[: slots * SLOT_CELL] = 0
    scratch = address(work)
    queries = scratch + sizes[0]
    states = queries + sizes[1]
    items = empty((), np.int64)  # how many there are depends on the position
    keep = (q_lat, q_pe, c_kv, k_pe, out, work, items, position)
    pack = (
        form, address(q_lat), address(q_pe), queries, n * n_heads, rank, p_dim, float(scale),
        groups, n, address(position), address(items),
    )  # fmt: skip
    run(decode_pack_range, pack, keep, groups)
    args = (
        form, queries, weight_addresses(c_kv)[0], weight_addresses(k_pe)[0], int(is_bf16), states,
        n, n_heads, rank, p_dim, address(position), scratch, slots, slot_bytes,
    )  # fmt: skip
    run(decode_range, args, keep, items, 1, threads, n * n_heads * rows * rank // 16)
    merge = (states, address(out), n, n_heads, rank, address(position))
    run(decode_merge_range, merge, keep, n * n_heads, 1, threads, splits * out.nbytes // 2)
    _put_back(work)


def mla_prefill(
    q_nope: F32,
    q_pe: F32,
    kv: F32,
    k_pe: F32 | U16,
    start: int | Position,
    scale: float,
    threads: int = 1,
) -> F32:
    """As `reference.mla_prefill`: q_nope [T, H, N], q_pe [T, H, P], kv [S, H, N + V]."""
    _check(q_nope, None, None, None)
    n, n_heads, n_dim = q_nope.shape
    _check(q_pe, n, n_heads, None)
    _check(kv, None, n_heads, None)
    p_dim, v_dim = q_pe.shape[2], kv.shape[2] - n_dim
    if v_dim < 1 or k_pe.shape[1] != p_dim or min(len(kv), len(k_pe)) < start + n:
        raise ValueError(f"keys of {kv.shape}, {k_pe.shape} for {start} + {n} tokens")
    position = np.asarray(start, dtype=np.int64)
    out = empty((n, n_heads, v_dim))
    is_bf16 = k_pe.dtype == np.uint16
    form = FORM_BF16 if is_bf16 and HAS_BF16_DOT else FORM_F32
    slots, slot_bytes = max(threads, 1), prefill_scratch_bytes(form, n_dim, p_dim, v_dim)
    work = _take_work_space(slots * (SLOT_CELL + slot_bytes))
    work[: slots * SLOT_CELL] = 0
    args = (
        form, address(q_nope), address(q_pe), address(kv), weight_addresses(k_pe)[0], int(is_bf16),
        address(out), n, n_heads, n_dim, p_dim, v_dim, address(position), float(scale),
        address(work), slots, slot_bytes,
    )  # fmt: skip
    items = n_heads * -(-n // QUERY_BLOCK)
    keep = (q_nope, q_pe, kv, k_pe, out, work, position)
    cost = n * n_heads * (int(start) + n) * n_dim // 16
    run(prefill_range, args, keep, items, 1, threads, cost)
    _put_back(work)
    return out


def add(a: F32, b: F32) -> F32:
    """As `reference.add`: a + b, same shape."""
    _check(a, *b.shape)
    _check(b, *a.shape)
    out = empty(a.shape)
    run(add_rows, (address(a), address(b), address(out)), (a, b, out), a.size)
    return out


def split(x: F32, n_left: int) -> tuple[F32, F32]:
    """As `reference.split`: x [..., D] -> [..., n_left] and [..., D - n_left]."""
    _check(x, *x.shape)
    n_right = x.shape[-1] - n_left
    left, right = empty((*x.shape[:-1], n_left)), empty((*x.shape[:-1], n_right))
    args = (address(x), address(left), address(right), n_left, n_right)
    run(split_rows, args, (x, left, right), x.size // x.shape[-1])
    return left, right


def store_rows_at(rows: F32, out: U16 | F32, start: int | Position) -> None:
    """As `reference.store_rows_at`: rows [T, D] -> out[start : start + T]."""
    _check(rows, None, out.shape[1])
    if int(start) + len(rows) > len(out):
        raise ValueError(f"{start} + {len(rows)} rows do not fit {len(out)}")
    position = np.asarray(start, dtype=np.int64)
    args = (
        address(rows), address(out), int(out.dtype == np.uint16), rows.shape[1], address(position)
    )  # fmt: skip
    run(store_rows, args, (rows, out, position), len(rows))
