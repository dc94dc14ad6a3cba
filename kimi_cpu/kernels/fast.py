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

import numpy as np
import numpy.typing as npt

from kimi_cpu.kernels import isa
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
    KIND_INT4,
    Q8,
    ExpertTable,
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
from kimi_cpu.kernels.matmul import KIND_Q8, TILE_TOKENS, matmul_range
from kimi_cpu.kernels.moe import down_range, gate_up_range
from kimi_cpu.kernels.norm_rope import rmsnorm_rows, rope_rows, silu_mul_rows
from kimi_cpu.kernels.router import route_rows
from kimi_cpu.kernels.threads import run
from kimi_cpu.quant import F32, GROUP_SIZE, U16, Int4Weight, Weight, as_f32, dequantize

VARIANT = isa.VARIANT

#: Tokens that the experts process at once; bounds the memory of intermediate results.
MOE_TOKENS = 512
_ROW_GRAIN = 32

_iota_lock = threading.Lock()
_iota: I64 = np.arange(1024, dtype=np.int64)
_iota_kept: list[I64] = [_iota]  # older ones may still be in use by another thread
_ONES = np.ones(TILE_TOKENS, dtype=np.float32)


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
    out = np.empty((n, rows), dtype=np.float32)
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
    pack_rows(address(x), d, address(data), 0, n, 0, d)
    return PackedQ8(data, (n, d))


def linear_q8(xq: PackedQ8, w: Int4Weight, threads: int = 1) -> F32:
    """As `reference.linear_q8`: xq [T, D] of `quantize_activations`, INT4 w [O, D] -> [T, O]."""
    rows, d = w.shape
    n = xq.shape[0]
    if xq.shape[1] != d:
        raise ValueError(f"activations of {xq.shape[1]} features for a weight of {d}")
    values, scales = weight_addresses(w)
    out = np.empty((n, rows), dtype=np.float32)
    args = (
        KIND_Q8, address(xq.data), packed_bytes(d), 0, _iota_address(n), n, address(out),
        rows * 4, 0, values, scales, 0, rows, d,
    )  # fmt: skip
    run(matmul_range, args, (xq, w, out), rows, _ROW_GRAIN, threads, w.nbytes * (1 + n // 8))
    return out


def silu_mul(gate: F32, up: F32) -> F32:
    """As `reference.silu_mul`: gate, up [T, I] -> [T, I]."""
    _check(gate, None, None)
    _check(up, *gate.shape)
    out = np.empty_like(gate)
    silu_mul_rows(address(gate), address(up), address(out), gate.size)
    return out


def moe(
    x: F32, experts: ExpertTable, ids: I32, weights: F32, precision: Precision, threads: int = 1
) -> F32:
    """As `reference.moe`: x [T, D], ids int32 [T, K], weights [T, K] -> [T, D]."""
    _check(x, None, None)
    _check(weights, len(x), None)
    if ids.shape != weights.shape:
        raise ValueError(f"ids {ids.shape} and weights {weights.shape} differ in shape")
    out = np.empty_like(x)
    for t in range(0, len(x), MOE_TOKENS):
        part = slice(t, t + MOE_TOKENS)
        _moe_part(x[part], experts, ids[part], weights[part], precision, threads, out[part])
    return out


def _moe_part(
    x: F32, experts: ExpertTable, ids: I32, weights: F32, precision: Precision, threads: int,
    out: F32,
) -> None:  # fmt: skip
    (n_tokens, d), top_k = x.shape, ids.shape[1]
    n_pairs = n_tokens * top_k
    iota = _iota_address(max(n_pairs, 2))
    if n_tokens == 1:
        chosen = ids[0].tolist()
        segments = np.empty((top_k, 3), dtype=np.int64)
        segments[:, 0] = ids[0]
        segments[:, 1] = _iota[:top_k]
        segments[:, 2] = _iota[1 : top_k + 1]
        pair_token = np.zeros(top_k, dtype=np.int64)
        pair_place = _iota
    else:
        flat = ids.ravel()
        order = np.argsort(flat, kind="stable")
        ordered = flat[order]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        chosen = ordered[starts].tolist()
        segments = np.stack([ordered[starts], starts, np.r_[starts[1:], n_pairs]], axis=1)
        segments = np.ascontiguousarray(segments, dtype=np.int64)
        pair_token = order // top_k
        pair_place = np.empty(n_pairs, dtype=np.int64)
        pair_place[order] = _iota[:n_pairs]
    if min(chosen) < 0 or max(chosen) >= len(experts):
        raise ValueError(f"expert ids outside 0 .. {len(experts) - 1}")
    loaded = [experts[e] for e in chosen]  # the first use of an expert loads and validates it
    width, cost = loaded[0][0].shape[0], 0
    fast = precision == "fast"
    for gate_weight, _, _ in loaded:
        if gate_weight.shape != (width, d):
            raise ValueError(f"an expert of shape {gate_weight.shape} among ({width}, {d})")
        cost += gate_weight.nbytes
    cost *= 1 + n_pairs // len(chosen) // 8
    if any(experts.kinds[e] < 0 for e in chosen):
        _moe_mixed(x, experts, segments, pair_token, pair_place, weights, precision, threads, out)
        return
    gate = np.empty((n_pairs, width), dtype=np.float32)
    up = np.empty((n_pairs, width), dtype=np.float32)
    slots = np.empty((n_pairs, d), dtype=np.float32)
    xq_address = hq_address = 0
    keep: tuple[object, ...] = (
        x, experts, segments, pair_token, pair_place, weights, out, gate, up, slots
    )  # fmt: skip
    if fast and any(experts.kinds[e] == KIND_INT4 for e in chosen):
        xq, hq = quantize_activations(x), _packed_buffer(n_pairs, width)
        xq_address, hq_address = address(xq.data), address(hq)
        keep += (xq, hq)
    shared = (
        address(experts.addresses), address(experts.kinds), int(fast), address(segments),
        len(segments),
    )  # fmt: skip
    up_args = (
        *shared, address(pair_token), address(x), xq_address, d, address(gate), address(up),
        hq_address, width,
    )  # fmt: skip
    run(gate_up_range, up_args, keep, width, GROUP_SIZE, threads, 2 * cost)
    down_args = (
        *shared, iota, address(gate), hq_address, width, address(slots), address(pair_place),
        address(weights), n_tokens, top_k, address(out), d,
    )  # fmt: skip
    run(down_range, down_args, keep, d, _ROW_GRAIN, threads, cost)


def _moe_mixed(
    x: F32, experts: ExpertTable, segments: I64, pair_token: I64, pair_place: I64, weights: F32,
    precision: Precision, threads: int, out: F32,
) -> None:  # fmt: skip
    """Experts whose projections are stored in different ways: one call a projection."""

    def project(v: F32, w: Weight) -> F32:
        if precision == "fast" and isinstance(w, Int4Weight):
            return linear_q8(quantize_activations(v), w, threads)
        return linear(v, w, threads)

    slots = np.empty((len(pair_token), x.shape[1]), dtype=np.float32)
    for e, start, stop in segments.tolist():
        gate, up, down = experts[e]
        v = np.ascontiguousarray(x[pair_token[start:stop]])
        slots[start:stop] = project(silu_mul(project(v, gate), project(v, up)), down)
    n_pairs = weights.size
    picked = slots[pair_place[:n_pairs]].reshape(*weights.shape, -1)
    out[:] = 0
    for k in range(weights.shape[1]):
        out += weights[:, k, None] * picked[:, k]


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
    ids = np.empty((n, top_k), dtype=np.int32)
    weights = np.empty((n, top_k), dtype=np.float32)
    route_rows(
        address(logits), address(bias), n, n_experts, n_group, topk_group, top_k,
        int(norm_topk_prob), float(routed_scaling_factor), address(ids), address(weights),
    )  # fmt: skip
    return ids, weights


def rmsnorm(x: F32, w: U16 | F32, eps: float) -> F32:
    """As `reference.rmsnorm`: x [T, D], w [D] -> [T, D]."""
    _check(x, None, *w.shape)
    out = np.empty_like(x)
    values, _ = weight_addresses(w)
    rmsnorm_rows(address(x), values, int(w.dtype == np.uint16), float(eps), address(out), *x.shape)
    return out


def rope(x: F32, cos: F32, sin: F32) -> F32:
    """As `reference.rope`: x [T, H, P], cos and sin [T, P / 2] -> [T, H, P]."""
    _check(x, None, None, None)
    n, n_heads, p = x.shape
    _check(cos, n, p // 2)
    _check(sin, n, p // 2)
    out = np.empty_like(x)
    rope_rows(address(x), address(cos), address(sin), address(out), n, n_heads, p // 2)
    return out


def _dense(w: Weight) -> U16 | F32:
    return dequantize(w) if isinstance(w, Int4Weight) else w


def absorb_q(q_nope: F32, w_kv_b: Weight, threads: int = 1) -> F32:
    """As `reference.absorb_q`: q_nope [T, H, N], w_kv_b [H * (N + V), R] -> [T, H, R]."""
    _check(q_nope, None, None, None)
    w = _dense(w_kv_b)
    n, n_heads, n_dim = q_nope.shape
    rows, rank = w.shape
    if rows % n_heads or rows // n_heads < n_dim:
        raise ValueError(f"kv_b has {rows} rows for {n_heads} heads of {n_dim}")
    out = np.zeros((n, n_heads, rank), dtype=np.float32)
    args = (
        address(q_nope), weight_addresses(w)[0], int(w.dtype == np.uint16), address(_ONES),
        address(out), n, n_heads, n_dim, rank, rows // n_heads,
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
    out = np.empty((n, n_heads, v_head_dim), dtype=np.float32)
    args = (
        kind, address(o_lat), n_heads * rank * 4, rank * 4, _iota_address(n), n, address(out),
        n_heads * v_head_dim * 4, v_head_dim * 4,
        weight_addresses(w)[0] + (head_rows - v_head_dim) * row_bytes, 0, head_rows * row_bytes,
        v_head_dim, rank,
    )  # fmt: skip
    cost = w.nbytes * (1 + n // 8) // 2
    run(matmul_range, args, (o_lat, w, out), n_heads * v_head_dim, _ROW_GRAIN, threads, cost)
    return out


def _aligned(n_bytes: int) -> npt.NDArray[np.uint8]:
    """Memory that begins with a cache line."""
    memory = np.empty(n_bytes + 64, dtype=np.uint8)
    skip = -address(memory) % 64
    return memory[skip : skip + n_bytes]


def _scratch(slot_bytes: int, slots: int) -> tuple[npt.NDArray[np.uint8], int]:
    """Work space of `kernels.attention`, and the size of a slot."""
    slot_bytes = -(-slot_bytes // 64) * 64
    memory = _aligned(slots * (SLOT_CELL + slot_bytes))
    memory[: slots * SLOT_CELL] = 0
    return memory, slot_bytes


def mla_decode(
    q_lat: F32,
    q_pe: F32,
    c_kv: F32 | U16,
    k_pe: F32 | U16,
    start: int,
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
    out = np.empty_like(q_lat)
    is_bf16 = c_kv.dtype == np.uint16
    form = FORM_BF16 if is_bf16 and HAS_BF16_DOT else FORM_F32
    groups, splits = decode_groups(n, n_heads), decode_splits(start, n)
    slots = max(threads, 1)
    scratch, slot_bytes = _scratch(decode_scratch_bytes(form, rank, p_dim), slots)
    queries = _aligned(groups * query_bytes(form, rank, p_dim))
    states = _aligned(splits * groups * state_bytes(rank))
    keep = (q_lat, q_pe, c_kv, k_pe, out, scratch, queries, states)
    decode_pack_range(
        form, address(q_lat), address(q_pe), address(queries), n * n_heads, rank, p_dim,
        float(scale), 0, groups,
    )  # fmt: skip
    args = (
        form, address(queries), weight_addresses(c_kv)[0], weight_addresses(k_pe)[0],
        int(is_bf16), address(states), n, n_heads, rank, p_dim, start, address(scratch), slots,
        slot_bytes,
    )  # fmt: skip
    cost = n * n_heads * (start + n) * rank // 16
    run(decode_range, args, keep, splits * groups, 1, threads, cost)
    merge = (address(states), address(out), n, n_heads, rank, start)
    run(decode_merge_range, merge, keep, n * n_heads, 1, threads, splits * out.nbytes // 2)
    return out


def mla_prefill(
    q_nope: F32,
    q_pe: F32,
    kv: F32,
    k_pe: F32 | U16,
    start: int,
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
    out = np.empty((n, n_heads, v_dim), dtype=np.float32)
    is_bf16 = k_pe.dtype == np.uint16
    form = FORM_BF16 if is_bf16 and HAS_BF16_DOT else FORM_F32
    slots = max(threads, 1)
    scratch, slot_bytes = _scratch(prefill_scratch_bytes(form, n_dim, p_dim, v_dim), slots)
    args = (
        form, address(q_nope), address(q_pe), address(kv), weight_addresses(k_pe)[0], int(is_bf16),
        address(out), n, n_heads, n_dim, p_dim, v_dim, start, float(scale), address(scratch), slots,
        slot_bytes,
    )  # fmt: skip
    items = n_heads * -(-n // QUERY_BLOCK)
    keep = (q_nope, q_pe, kv, k_pe, out, scratch)
    run(prefill_range, args, keep, items, 1, threads, n * n_heads * (start + n) * n_dim // 16)
    return out
