"""Each kernel as an operation: (args, start, stop) with its arguments in memory, for the team."""

from __future__ import annotations

import numpy as np

from kimi_cpu.kernels.attention import (
    decode_items,
    decode_merge_range,
    decode_pack_range,
    decode_range,
    prefill_range,
)
from kimi_cpu.kernels.attention_absorb import absorb_q_range
from kimi_cpu.kernels.bf16 import round_rows
from kimi_cpu.kernels.int4 import pack_rows
from kimi_cpu.kernels.matmul import matmul_range
from kimi_cpu.kernels.moe import (
    combine_range,
    count_choice,
    down_range,
    gate_up_range,
    sort_pairs,
)
from kimi_cpu.kernels.norm_rope import rmsnorm_rows, rope_rows, silu_mul_rows
from kimi_cpu.kernels.router import route_rows
from kimi_cpu.kernels.rows import add_rows, split_rows, store_i64, store_latent_rows
from kimi_cpu.kernels.simd import load_i64
from kimi_cpu.kernels.threads import as_f64, load_args, op_of


@op_of(matmul_range)
def matmul(args, start, stop):  # type: ignore[no-untyped-def]
    matmul_range(*load_args(args, 14), start, stop)


@op_of(gate_up_range)
def gate_up(args, start, stop):  # type: ignore[no-untyped-def]
    gate_up_range(*load_args(args, 13), start, stop)


@op_of(down_range)
def down(args, start, stop):  # type: ignore[no-untyped-def]
    down_range(*load_args(args, 11), start, stop)


@op_of(combine_range)
def combine(args, start, stop):  # type: ignore[no-untyped-def]
    combine_range(*load_args(args, 7), start, stop)


@op_of(count_choice)
def count(args, start, stop):  # type: ignore[no-untyped-def]
    count_choice(*load_args(args, 12))


@op_of(sort_pairs)
def sort(args, start, stop):  # type: ignore[no-untyped-def]
    sort_pairs(*load_args(args, 12))


# Positions and tables are read when an operation is played, so that a tape serves every token.


@op_of(decode_pack_range)
def decode_pack(args, start, stop):  # type: ignore[no-untyped-def]
    form, q_lat, q_pe, queries, n_queries, rank, p_dim, scale = load_args(args, 8)
    decode_pack_range(
        form, q_lat, q_pe, queries, n_queries, rank, p_dim, as_f64(scale), start, stop
    )
    if start == 0:
        starts, timelines, n_tokens, items = load_args(args + 8 * 8, 4)
        store_i64(items, decode_items(starts, timelines, n_tokens, n_queries))


@op_of(decode_range)
def decode(args, start, stop):  # type: ignore[no-untyped-def]
    decode_range(*load_args(args, 15), start, stop)


@op_of(decode_merge_range)
def decode_merge(args, start, stop):  # type: ignore[no-untyped-def]
    decode_merge_range(*load_args(args, 6), start, stop)


@op_of(prefill_range)
def prefill(args, start, stop):  # type: ignore[no-untyped-def]
    position, scale = load_i64(load_i64(args + 8 * 12)), as_f64(load_i64(args + 8 * 13))
    prefill_range(*load_args(args, 12), position, scale, *load_args(args + 8 * 14, 3), start, stop)


@op_of(absorb_q_range)
def absorb_q(args, start, stop):  # type: ignore[no-untyped-def]
    absorb_q_range(*load_args(args, 9), start, stop)


@op_of(pack_rows)
def pack(args, start, stop):  # type: ignore[no-untyped-def]
    x, d, out = load_args(args, 3)
    pack_rows(x, d, out, start, stop, np.int64(0), d)


@op_of(round_rows)
def round_bf16(args, start, stop):  # type: ignore[no-untyped-def]
    round_rows(*load_args(args, 3), start, stop)


@op_of(rmsnorm_rows)
def rmsnorm(args, start, stop):  # type: ignore[no-untyped-def]
    x, w, is_bf16, eps, out, d = load_args(args, 6)
    at = start * d * 4
    rmsnorm_rows(x + at, w, is_bf16, as_f64(eps), out + at, stop - start, d)


@op_of(rope_rows)
def rope(args, start, stop):  # type: ignore[no-untyped-def]
    x, cos, sin, out, n_heads, half = load_args(args, 6)
    at, angle = start * n_heads * half * 8, start * half * 4
    rope_rows(x + at, cos + angle, sin + angle, out + at, stop - start, n_heads, half)


@op_of(silu_mul_rows)
def silu_mul(args, start, stop):  # type: ignore[no-untyped-def]
    gate, up, out = load_args(args, 3)
    at = start * 4
    silu_mul_rows(gate + at, up + at, out + at, stop - start)


@op_of(route_rows)
def route(args, start, stop):  # type: ignore[no-untyped-def]
    logits, bias, n_experts, n_group, topk_group, top_k, normalise, factor, ids, weights = (
        load_args(args, 10)
    )
    at = start * top_k * 4
    route_rows(
        logits + start * n_experts * 4, bias, stop - start, n_experts, n_group, topk_group, top_k,
        normalise, as_f64(factor), ids + at, weights + at,
    )  # fmt: skip


@op_of(add_rows)
def add(args, start, stop):  # type: ignore[no-untyped-def]
    a, b, out = load_args(args, 3)
    at = start * 4
    add_rows(a + at, b + at, out + at, stop - start)


@op_of(split_rows)
def split(args, start, stop):  # type: ignore[no-untyped-def]
    split_rows(*load_args(args, 5), start, stop)


@op_of(store_latent_rows)
def store_latents(args, start, stop):  # type: ignore[no-untyped-def]
    store_latent_rows(*load_args(args, 10), start, stop)
