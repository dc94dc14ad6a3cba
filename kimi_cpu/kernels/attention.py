"""Causal attention with an online softmax over blocks of cache rows, and MLA's absorbed matrices.

One inner loop serves decode (queries are the heads of a token, keys and values the latents
themselves) and prefill (queries are the tokens of a head). A block of BLOCK_ROWS keys is copied
to float32, padded to whole vectors, and shared by all the queries at hand; nothing of size
T x S exists. Block borders lie at fixed rows, so a query's result does not depend on which
other queries are computed with it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.core import types

from kimi_cpu.kernels.common import KIND_BF16, KIND_F32
from kimi_cpu.kernels.dense import axpy_tile, load_weights
from kimi_cpu.kernels.isa import jit
from kimi_cpu.kernels.matmul import TILE_ROWS, TILE_TOKENS, dot_tile
from kimi_cpu.kernels.simd import (
    FLOAT,
    I32,
    LANES,
    Emit,
    F32x16,
    const,
    intrinsic,
    load_f32,
    store_f32,
)

BLOCK_ROWS = 64
#: Queries of one head that share a block of keys in prefill.
QUERY_BLOCK = 64


@intrinsic
def _copy_f32(typingctx: Any, source: Any, is_bf16: Any, out: Any, n: Any, factor: Any) -> Any:
    """n values (bf16 bits or float32) times factor, as float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, b = Emit(builder), builder
        source, is_bf16, out, n, factor = args
        factors = e.splat(factor)
        main = b.mul(b.sdiv(n, e.i64(LANES)), e.i64(LANES))

        def copy(kind: int, size: int) -> None:
            with e.loop(0, main, LANES) as i:
                v = load_weights(e, kind, e.add(source, e.mul(i, size)))
                e.store(b.fmul(v, factors), e.add(out, e.mul(i, 4)))
            mask = e.lanes_below(b.sub(n, main))
            v = load_weights(e, kind, e.add(source, e.mul(main, size)), mask)
            e.store_masked(b.fmul(v, factors), e.add(out, e.mul(main, 4)), mask)

        with b.if_else(b.icmp_signed("!=", is_bf16, e.i64(0))) as (bf16, f32):
            with bf16:
                copy(KIND_BF16, 2)
            with f32:
                copy(KIND_F32, 4)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(i64, i64, i64, i64, types.float32), codegen


@intrinsic
def _softmax_block(
    typingctx: Any, scores: Any, visible: Any, largest: Any, total: Any, alpha: Any
) -> Any:
    """One block of an online softmax, in place: scores[i] becomes exp(scores[i] - m).

    m is the largest score so far; lanes from `visible` (> 0) on become 0. largest, total and
    alpha are addresses of a float32 each: the running maximum and sum, and the factor by which
    everything before this block must be scaled.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, b = Emit(builder), builder
        scores, visible, largest, total, alpha = args
        low = const(F32x16, float("-inf"))
        masks = [e.lanes_below(b.sub(visible, e.i64(i))) for i in range(0, BLOCK_ROWS, LANES)]
        s = [e.select(m, e.load(F32x16, scores, 64 * i), low) for i, m in enumerate(masks)]
        block_max = s[0]
        for v in s[1:]:
            block_max = e.maximum(block_max, v)
        before = e.load(FLOAT, largest)
        new = e.maximum(before, e.max(block_max))
        zero = const(F32x16, 0.0)
        p = [
            e.select(m, e.exp(b.fsub(v, e.splat(new))), zero) for m, v in zip(masks, s, strict=True)
        ]
        p_sum = p[0]
        for i, v in enumerate(p):
            e.store(v, scores, 64 * i)
            p_sum = b.fadd(p_sum, v) if i else v
        factor = b.extract_element(e.exp(e.splat(b.fsub(before, new))), const(I32, 0))
        factor = b.select(b.fcmp_ordered(">", before, const(FLOAT, float("-inf"))), factor,
                          const(FLOAT, 0.0))  # fmt: skip
        e.store(new, largest)
        e.store(factor, alpha)
        e.store(b.fadd(b.fmul(e.load(FLOAT, total), factor), e.sum(p_sum)), total)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@jit
def _attend(  # type: ignore[no-untyped-def]
    q, q_stride, q_pe, q_pe_stride, n_queries, keys, key_stride, k_pe, k_pe_stride, is_bf16,
    values, value_stride, out, out_stride, n_dim, p_dim, v_dim, limit, limit_step, scale,
):  # fmt: skip
    """Attention of n_queries queries over one set of keys; query i sees limit + i * limit_step
    rows. A query is n_dim float32 at q and p_dim at q_pe, a key likewise (bf16 bits if is_bf16).
    values 0 means that the first v_dim key dimensions are the values. Addresses, strides in bytes.
    """
    padded = (n_dim + p_dim + LANES - 1) // LANES * LANES
    query = np.zeros((n_queries, padded), np.float32)
    key = np.zeros((BLOCK_ROWS, padded), np.float32)
    scores = np.zeros((TILE_TOKENS, BLOCK_ROWS), np.float32)
    state = np.zeros((2, n_queries), np.float32)  # running maximum and sum
    alpha = np.zeros(TILE_TOKENS, np.float32)
    iota = np.arange(max(n_queries, TILE_TOKENS))
    query_at, key_at, scores_at = query.ctypes.data, key.ctypes.data, scores.ctypes.data
    state_at, alpha_at, iota_at = state.ctypes.data, alpha.ctypes.data, iota.ctypes.data
    for i in range(n_queries):
        state[0, i] = -np.inf
        _copy_f32(q + i * q_stride, 0, query_at + i * padded * 4, n_dim, scale)
        _copy_f32(q_pe + i * q_pe_stride, 0, query_at + (i * padded + n_dim) * 4, p_dim, scale)
        for v in range(v_dim):
            store_f32(out + i * out_stride + v * 4, 0.0)
    most = limit + (n_queries - 1) * limit_step
    for first in range(0, most, BLOCK_ROWS):
        n_rows = min(BLOCK_ROWS, most - first)
        for r in range(n_rows):
            at = key_at + r * padded * 4
            _copy_f32(keys + (first + r) * key_stride, is_bf16, at, n_dim, 1.0)
            _copy_f32(k_pe + (first + r) * k_pe_stride, is_bf16, at + n_dim * 4, p_dim, 1.0)
        block_values = key_at if values == 0 else values + first * value_stride
        block_value_stride = padded * 4 if values == 0 else value_stride
        for i in range(0, n_queries, TILE_TOKENS):
            n_tile = min(TILE_TOKENS, n_queries - i)
            rows = min(n_rows, limit + (i + n_tile - 1) * limit_step - first)
            if rows <= 0:
                continue
            for r in range(0, rows, TILE_ROWS):
                dot_tile(
                    TILE_ROWS, TILE_TOKENS, KIND_F32, query_at + i * padded * 4, padded * 4,
                    iota_at, 0, n_tile - 1, scores_at, BLOCK_ROWS * 4, key_at, 0, r, 1, rows - 1,
                    padded,
                )  # fmt: skip
            for c in range(n_tile):
                visible = min(rows, limit + (i + c) * limit_step - first)
                if visible > 0:
                    _softmax_block(
                        scores_at + c * BLOCK_ROWS * 4, visible, state_at + (i + c) * 4,
                        state_at + (n_queries + i + c) * 4, alpha_at + c * 4,
                    )  # fmt: skip
                else:
                    alpha[c] = 1.0
                    for r in range(rows):
                        scores[c, r] = 0.0
            place = out + i * out_stride
            if n_tile == TILE_TOKENS:
                axpy_tile(
                    KIND_F32, TILE_TOKENS, scores_at, BLOCK_ROWS * 4, rows, block_values,
                    block_value_stride, v_dim, alpha_at, place, out_stride,
                )  # fmt: skip
            else:
                for c in range(n_tile):
                    axpy_tile(
                        KIND_F32, 1, scores_at + c * BLOCK_ROWS * 4, 0, rows, block_values,
                        block_value_stride, v_dim, alpha_at + c * 4, place + c * out_stride, 0,
                    )  # fmt: skip
    for i in range(n_queries):
        factor = np.float32(1.0) / state[1, i]
        for v in range(v_dim):
            at = out + i * out_stride + v * 4
            store_f32(at, load_f32(at) * factor)


@jit
def attend_range(  # type: ignore[no-untyped-def]
    decode, q, q_pe, keys, k_pe, is_bf16, out, n_tokens, n_heads, n_dim, p_dim, v_dim,
    position, scale, start, stop,
):  # fmt: skip
    """Items start .. stop-1 of an attention; query t sees the rows 0 .. position + t.

    decode: an item is a tile of TILE_TOKENS heads of a token; q and out are latents [T, H, R],
    keys the latent cache [S, R]. Otherwise an item is a block of QUERY_BLOCK tokens of a head;
    keys are [S, H, n_dim + v_dim], each head's keys and then its values.
    """
    if decode:
        tiles = (n_heads + TILE_TOKENS - 1) // TILE_TOKENS
        while start < stop:
            t = start // tiles
            first = start - t * tiles
            last = min(tiles, first + stop - start)
            head = first * TILE_TOKENS
            at = t * n_heads + head
            _attend(
                q + at * n_dim * 4, n_dim * 4, q_pe + at * p_dim * 4, p_dim * 4,
                min(n_heads, last * TILE_TOKENS) - head,
                keys, n_dim * (2 if is_bf16 else 4), k_pe, p_dim * (2 if is_bf16 else 4), is_bf16,
                0, 0, out + at * v_dim * 4, v_dim * 4, n_dim, p_dim, v_dim,
                position + t + 1, 0, scale,
            )  # fmt: skip
            start += last - first
        return
    key_stride = n_heads * (n_dim + v_dim) * 4
    for item in range(start, stop):
        head = item % n_heads
        t = item // n_heads * QUERY_BLOCK
        at = t * n_heads + head
        head_keys = keys + head * (n_dim + v_dim) * 4
        _attend(
            q + at * n_dim * 4, n_heads * n_dim * 4, q_pe + at * p_dim * 4, n_heads * p_dim * 4,
            min(QUERY_BLOCK, n_tokens - t),
            head_keys, key_stride, k_pe, p_dim * 4, 0,
            head_keys + n_dim * 4, key_stride, out + at * v_dim * 4, n_heads * v_dim * 4,
            n_dim, p_dim, v_dim, position + t + 1, 1, scale,
        )  # fmt: skip


@jit
def absorb_q_range(  # type: ignore[no-untyped-def]
    q, w, is_bf16, ones, out, n_tokens, n_heads, n_dim, rank, w_head_rows, start, stop
):
    """out[t, h, :] = sum over n of q[t, h, n] * W_UK[h][n, :], heads start .. stop-1; out is 0."""
    row_bytes = rank * (2 if is_bf16 else 4)
    for h in range(start, stop):
        weights = w + h * w_head_rows * row_bytes
        t = 0
        while t < n_tokens:
            coef, place = q + (t * n_heads + h) * n_dim * 4, out + (t * n_heads + h) * rank * 4
            coef_stride, out_stride = n_heads * n_dim * 4, n_heads * rank * 4
            if n_tokens - t >= TILE_TOKENS:
                if is_bf16:
                    axpy_tile(
                        KIND_BF16, TILE_TOKENS, coef, coef_stride, n_dim, weights, row_bytes, rank,
                        ones, place, out_stride,
                    )  # fmt: skip
                else:
                    axpy_tile(
                        KIND_F32, TILE_TOKENS, coef, coef_stride, n_dim, weights, row_bytes, rank,
                        ones, place, out_stride,
                    )  # fmt: skip
                t += TILE_TOKENS
            else:
                if is_bf16:
                    axpy_tile(
                        KIND_BF16, 1, coef, 0, n_dim, weights, row_bytes, rank, ones, place, 0
                    )
                else:
                    axpy_tile(KIND_F32, 1, coef, 0, n_dim, weights, row_bytes, rank, ones, place, 0)
                t += 1
