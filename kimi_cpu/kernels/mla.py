"""Latent attention and its cache, behind `reference`'s signatures."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

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
from kimi_cpu.kernels.common import KIND_BF16, Latents, address, weight_addresses, weight_kind
from kimi_cpu.kernels.linears import ROW_GRAIN, check, iota_address
from kimi_cpu.kernels.matmul import matmul_range
from kimi_cpu.kernels.rows import store_latent_rows
from kimi_cpu.kernels.threads import active_tape, empty, run
from kimi_cpu.quant import F32, U16, Int4Weight, PackedWeight, Weight, dequantize


def _dense(w: Weight) -> U16 | F32:
    return dequantize(w) if isinstance(w, Int4Weight | PackedWeight) else w


def absorb_q(q_nope: F32, w_kv_b: Weight, threads: int = 1) -> F32:
    """As `reference.absorb_q`: q_nope [T, H, N], w_kv_b [H * (N + V), R] -> [T, H, R]."""
    check(q_nope, None, None, None)
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
    check(o_lat, None, None, rank)
    n, n_heads = o_lat.shape[:2]
    head_rows = rows // n_heads
    if rows % n_heads or head_rows < v_head_dim:
        raise ValueError(f"kv_b has {rows} rows for {n_heads} heads of {v_head_dim} values")
    kind = weight_kind(w)
    row_bytes = rank * (2 if kind == KIND_BF16 else 4)
    out = empty((n, n_heads, v_head_dim))
    args = (
        kind, address(o_lat), n_heads * rank * 4, rank * 4, iota_address(n), n, address(out),
        n_heads * v_head_dim * 4, v_head_dim * 4,
        weight_addresses(w)[0] + (head_rows - v_head_dim) * row_bytes, 0, head_rows * row_bytes,
        v_head_dim, rank,
    )  # fmt: skip
    cost = w.nbytes * (1 + n // 8) // 2
    run(matmul_range, args, (o_lat, w, out), n_heads * v_head_dim, ROW_GRAIN, threads, cost)
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


def mla_decode(q_lat: F32, q_pe: F32, latents: Latents, scale: float, threads: int = 1) -> F32:
    """As `reference.mla_decode`: q_lat [B T, H, R], q_pe [B T, H, P] -> [B T, H, R]."""
    check(q_lat, None, None, latents.rank)
    check(q_pe, *q_lat.shape[:2], latents.rope_dim)
    n, timelines = latents.tokens_of(len(q_lat)), len(latents.starts)
    out = empty(q_lat.shape)
    if n == 1 or timelines > 1:  # may be recorded: positions are then read when the tape is played
        _decode_part(q_lat, q_pe, latents, scale, threads, out)
        return out
    groups = decode_groups(1, q_lat.shape[1])
    a_token = decode_splits(latents.rows) * groups * state_bytes(latents.rank)
    step = max(1, _MAX_STATE_BYTES // a_token)
    for t in range(0, n, step):
        part = slice(t, t + step)
        _decode_part(q_lat[part], q_pe[part], latents.later(t), scale, threads, out[part])
    return out


def _decode_part(
    q_lat: F32, q_pe: F32, latents: Latents, scale: float, threads: int, out: F32
) -> None:
    n, n_heads, rank = q_lat.shape
    timelines, p_dim, rows = len(latents.starts), latents.rope_dim, latents.rows
    n_tokens = n // timelines
    is_bf16 = latents.dtype == np.uint16
    form = FORM_BF16 if is_bf16 and HAS_BF16_DOT else FORM_F32
    groups, splits = timelines * decode_groups(n_tokens, n_heads), decode_splits(rows)
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
    tables, starts = address(latents.tables), address(latents.starts)
    items = empty((), np.int64)  # how many there are depends on the positions
    keep = (q_lat, q_pe, latents, out, work, items)
    pack = (
        form, address(q_lat), address(q_pe), queries, n_tokens * n_heads, rank, p_dim,
        float(scale), starts, timelines, n_tokens, address(items),
    )  # fmt: skip
    run(decode_pack_range, pack, keep, groups)
    args = (
        form, queries, tables, starts, latents.c_kv, latents.k_pe, int(is_bf16), states, n_tokens,
        n_heads, rank, p_dim, scratch, slots, slot_bytes,
    )  # fmt: skip
    run(decode_range, args, keep, items, 1, threads, n * n_heads * rows * rank // 16)
    merge = (states, address(out), n_tokens, n_heads, rank, starts)
    run(decode_merge_range, merge, keep, n * n_heads, 1, threads, splits * out.nbytes // 2)
    _put_back(work)


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
    check(q_nope, None, None, None)
    n, n_heads, n_dim = q_nope.shape
    check(q_pe, n, n_heads, None)
    check(kv, None, n_heads, None)
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
    cost = n * n_heads * (start + n) * n_dim // 16
    run(prefill_range, args, keep, items, 1, threads, cost)
    _put_back(work)
    return out


def store_latents(c_kv: F32, k_pe: F32, latents: Latents) -> None:
    """As `reference.store_latents`: c_kv [B T, R], k_pe [B T, P] into the timelines' blocks."""
    n_tokens = latents.tokens_of(len(c_kv))
    check(c_kv, None, latents.rank)
    check(k_pe, len(c_kv), latents.rope_dim)
    args = (
        address(c_kv), address(k_pe), address(latents.tables), address(latents.starts),
        latents.c_kv, latents.k_pe, int(latents.dtype == np.uint16), latents.rank,
        latents.rope_dim, n_tokens,
    )  # fmt: skip
    run(store_latent_rows, args, (c_kv, k_pe, latents), len(c_kv))
