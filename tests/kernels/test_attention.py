"""MLA attention, its absorbed matrices, norms and rotary embedding, against the reference."""

from __future__ import annotations

import numpy as np
import pytest

from kimi_cpu.kernels import fast, mla, reference
from kimi_cpu.kernels.attention import SPLIT_ROWS
from kimi_cpu.kernels.common import BLOCK_TOKENS
from kimi_cpu.quant import f32_to_bf16
from tests.kernels.conftest import paged, paged_timelines

#: A bf16 cache may be multiplied by queries and probabilities that are rounded to bf16.
BF16_TOLERANCE = 1e-2

DIMS = [
    # T, H, N, P, V, R, start
    (1, 4, 16, 8, 16, 32, 0), (1, 4, 16, 8, 16, 32, 63), (1, 1, 3, 2, 5, 7, 64),
    (3, 5, 16, 4, 12, 50, 61),
    (2, 3, 128, 64, 128, 512, 70), (3, 5, 7, 6, 17, 33, SPLIT_ROWS - 2),
    (67, 2, 24, 8, 20, 40, 0), (130, 3, 10, 6, 9, 33, 5),
]  # fmt: skip


@pytest.fixture(params=["f32", "bf16", "bf16 without its dot product"])
def cache_kind(request, monkeypatch):
    if "without" in request.param:
        monkeypatch.setattr(mla, "HAS_BF16_DOT", False)
    return request.param


def tolerance(cache_kind):
    return BF16_TOLERANCE if cache_kind == "bf16" else 1e-5


@pytest.mark.parametrize(("n", "heads", "n_dim", "p", "v", "rank", "start"), DIMS)
def test_mla_decode(inputs, close, n, heads, n_dim, p, v, rank, start, cache_kind):
    q_lat, q_pe = inputs.f32(n, heads, rank), inputs.f32(n, heads, p)
    c_kv, k_pe = inputs.f32(start + n + 2, rank), inputs.f32(start + n + 2, p)
    c_kv[start + n :] = np.nan  # rows that no query may see are not even read
    k_pe[start + n :] = np.nan
    if cache_kind != "f32":
        c_kv, k_pe = f32_to_bf16(c_kv), f32_to_bf16(k_pe)
    latents = paged(c_kv, k_pe, start)
    got = fast.mla_decode(q_lat, q_pe, latents, 0.1)
    want = reference.mla_decode(q_lat, q_pe, latents, 0.1)
    close(got, want, tolerance(cache_kind))


@pytest.mark.parametrize(("n", "heads", "n_dim", "p", "v", "rank", "start"), DIMS)
def test_mla_prefill(inputs, close, n, heads, n_dim, p, v, rank, start, cache_kind):
    q_nope, q_pe = inputs.f32(n, heads, n_dim), inputs.f32(n, heads, p)
    kv, k_pe = inputs.f32(start + n, heads, n_dim + v), inputs.f32(start + n, p)
    args = (q_nope, q_pe, kv, k_pe if cache_kind == "f32" else f32_to_bf16(k_pe), start, 0.1)
    close(fast.mla_prefill(*args), reference.mla_prefill(*args), tolerance(cache_kind))


@pytest.mark.parametrize("kind", ["bf16", "f32", "int4"])
@pytest.mark.parametrize(("n", "heads", "n_dim", "v", "rank"), [(1, 4, 16, 16, 32),
                                                              (7, 3, 5, 4, 64),
                                                              (5, 2, 128, 128, 512)])  # fmt: skip
def test_absorbed_matrices(inputs, close, kind, n, heads, n_dim, v, rank):
    w = inputs.weight(kind, heads * (n_dim + v), rank)
    q = inputs.f32(n, heads, n_dim)
    q_lat = reference.absorb_q(q, w)
    close(fast.absorb_q(q, w), q_lat)
    close(fast.absorb_v(q_lat, w, v), reference.absorb_v(q_lat, w, v))


@pytest.mark.parametrize("rank", [33, 100])
def test_absorbed_matrices_of_odd_rank(inputs, close, rank):
    w, q = inputs.weight("bf16", 3 * (5 + 6), rank), inputs.f32(5, 3, 5)
    q_lat = reference.absorb_q(q, w)
    close(fast.absorb_q(q, w), q_lat)
    close(fast.absorb_v(q_lat, w, 6), reference.absorb_v(q_lat, w, 6))


def test_decode_and_prefill_agree(inputs, close):
    """The absorbed form and the per-head form are the same attention."""
    n, heads, n_dim, p, v, rank, start = 6, 3, 16, 8, 12, 40, 80
    w = inputs.f32(heads * (n_dim + v), rank)
    q_nope, q_pe = inputs.f32(n, heads, n_dim), inputs.f32(n, heads, p)
    c_kv, k_pe = inputs.f32(start + n, rank), inputs.f32(start + n, p)
    latents = paged(c_kv, k_pe, start)
    o_lat = fast.mla_decode(fast.absorb_q(q_nope, w), q_pe, latents, 0.05)
    kv = fast.linear(c_kv, w).reshape(start + n, heads, n_dim + v)
    close(fast.absorb_v(o_lat, w, v), fast.mla_prefill(q_nope, q_pe, kv, k_pe, start, 0.05), 1e-4)


@pytest.mark.parametrize("start", [60, SPLIT_ROWS - 50])
def test_a_query_does_not_see_its_neighbours(inputs, monkeypatch, cache_kind, start):
    n, heads, rank, p = 70, 3, 48, 8
    monkeypatch.setattr("kimi_cpu.kernels.threads.MIN_PARALLEL_COST", 0)
    q_lat, q_pe = inputs.f32(n, heads, rank), inputs.f32(n, heads, p)
    c_kv, k_pe = inputs.f32(start + n, rank), inputs.f32(start + n, p)
    kv = inputs.f32(start + n, heads, rank + 20)
    if cache_kind != "f32":
        c_kv, k_pe = f32_to_bf16(c_kv), f32_to_bf16(k_pe)
    decode = fast.mla_decode(q_lat, q_pe, paged(c_kv, k_pe, start), 0.1)
    prefill = fast.mla_prefill(q_lat, q_pe, kv, k_pe, start, 0.1)
    for t in (0, 1, 5, 63, 64, 69):
        s = slice(t, t + 1)
        latents = paged(c_kv, k_pe, start + t)
        one = fast.mla_decode(q_lat[s], q_pe[s], latents, 0.1, threads=2)
        np.testing.assert_array_equal(decode[s], one)
        one = fast.mla_prefill(q_lat[s], q_pe[s], kv, k_pe, start + t, 0.1, threads=2)
        np.testing.assert_array_equal(prefill[s], one)
    for threads in (2, 5):
        again = fast.mla_decode(q_lat, q_pe, paged(c_kv, k_pe, start), 0.1, threads=threads)
        np.testing.assert_array_equal(decode, again)
        again = fast.mla_prefill(q_lat, q_pe, kv, k_pe, start, 0.1, threads=threads)
        np.testing.assert_array_equal(prefill, again)


def test_large_scores_do_not_overflow(inputs, close):
    q_lat, q_pe = 100 * inputs.f32(1, 4, 32), inputs.f32(1, 4, 8)
    c_kv, k_pe = 100 * inputs.f32(130, 32), inputs.f32(130, 8)
    args = (q_lat, q_pe, paged(c_kv, k_pe, 129), 1.0)
    close(fast.mla_decode(*args), reference.mla_decode(*args))
    bits = (q_lat, q_pe, paged(f32_to_bf16(c_kv), f32_to_bf16(k_pe), 129), 1.0)
    assert np.isfinite(fast.mla_decode(*bits)).all()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("heads", [1, 5, 40])
def test_timelines_do_not_see_each_other(inputs, monkeypatch, cache_kind, n, heads):
    """Several timelines at once, of any length: bit for bit what each gives alone."""
    monkeypatch.setattr("kimi_cpu.kernels.threads.MIN_PARALLEL_COST", 0)
    rank, p = 40, 8
    starts = [0, 2 * SPLIT_ROWS + 5, BLOCK_TOKENS - 1, SPLIT_ROWS - n, SPLIT_ROWS - 1, 700]
    rows = [(inputs.f32(start + n, rank), inputs.f32(start + n, p)) for start in starts]
    if cache_kind != "f32":
        rows = [(f32_to_bf16(c_kv), f32_to_bf16(k_pe)) for c_kv, k_pe in rows]
    q_lat, q_pe = inputs.f32(len(starts) * n, heads, rank), inputs.f32(len(starts) * n, heads, p)
    together = paged_timelines(rows, starts, 3000)
    got = fast.mla_decode(q_lat, q_pe, together, 0.1, threads=3)
    np.testing.assert_array_equal(got, fast.mla_decode(q_lat, q_pe, together, 0.1))
    want = np.empty_like(got)
    for i, ((c_kv, k_pe), start) in enumerate(zip(rows, starts, strict=True)):
        own = slice(i * n, (i + 1) * n)
        latents = paged(c_kv, k_pe, start)
        one = fast.mla_decode(q_lat[own], q_pe[own], latents, 0.1)
        np.testing.assert_array_equal(got[own], one)
        want[own] = reference.mla_decode(q_lat[own], q_pe[own], latents, 0.1)
    np.testing.assert_array_equal(want, reference.mla_decode(q_lat, q_pe, together, 0.1))


def test_many_threads_share_scratch(inputs, monkeypatch):
    """More threads than cores: each range finds a slot of its own."""
    monkeypatch.setattr("kimi_cpu.kernels.threads.MIN_PARALLEL_COST", 0)
    n, heads, rank, p, start = 5, 64, 32, 16, 3 * SPLIT_ROWS
    q_lat, q_pe = inputs.f32(n, heads, rank), inputs.f32(n, heads, p)
    c_kv, k_pe = inputs.f32(start + n, rank), inputs.f32(start + n, p)
    latents = paged(c_kv, k_pe, start)
    want = fast.mla_decode(q_lat, q_pe, latents, 0.1)
    for threads in (2, 3, 9):
        got = fast.mla_decode(q_lat, q_pe, latents, 0.1, threads)
        np.testing.assert_array_equal(want, got)


def test_caches_that_are_too_short_are_refused(inputs):
    q_lat, q_pe = inputs.f32(2, 3, 16), inputs.f32(2, 3, 8)
    for kernels in (fast, reference):
        with pytest.raises(ValueError, match="do not fit"):
            kernels.mla_decode(q_lat, q_pe, paged(inputs.f32(6, 16), inputs.f32(6, 8), 5), 1.0)
    with pytest.raises(ValueError, match="shape"):
        fast.mla_decode(q_lat, q_pe, paged(inputs.f32(7, 15), inputs.f32(7, 8), 5), 1.0)
    with pytest.raises(ValueError, match="keys"):
        fast.mla_prefill(q_lat, q_pe, inputs.f32(6, 3, 20), inputs.f32(6, 8), 5, 1.0)


@pytest.mark.parametrize("d", [1, 7, 16, 192, 1000])
@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_rmsnorm(inputs, close, d, kind):
    x = inputs.f32(3, d)
    w = inputs.weight(kind, 1, d)[0]
    close(fast.rmsnorm(x, w, 1e-5), reference.rmsnorm(x, w, 1e-5))
    zero = np.zeros_like(x)
    assert not fast.rmsnorm(zero, w, 1e-6).any()


@pytest.mark.parametrize(("n", "heads", "p"), [(1, 1, 2), (3, 4, 10), (2, 64, 64)])
def test_rope(inputs, close, n, heads, p):
    angle = inputs.f32(n, p // 2)
    args = (inputs.f32(n, heads, p), np.cos(angle), np.sin(angle))
    close(fast.rope(*args), reference.rope(*args), 1e-6)


@pytest.mark.parametrize("width", [1, 16, 37])
def test_silu_mul(inputs, close, width):
    gate, up = 5 * inputs.f32(3, width), inputs.f32(3, width)
    gate[0, 0], gate[1, 0] = 1000, -1000
    close(fast.silu_mul(gate, up), reference.silu_mul(gate, up))
