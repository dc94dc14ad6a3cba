"""Every operation of the model in plain NumPy: short, slow, and the definition that counts.

Shape letters: T tokens, D in-features, O out-features, H heads, E experts, K chosen experts,
I expert width, R latent rank, N / P / V the nope, rope and value widths of a head, S cache rows.
All arrays are float32 unless noted; bf16 tensors are uint16 bits.
"""

from __future__ import annotations

from itertools import chain

import numpy as np

from kimi_cpu.kernels.common import BLOCK_TOKENS, I32, Q8, ExpertTable, Latents, Precision
from kimi_cpu.quant import (
    F32,
    GROUP_SIZE,
    U16,
    Int4Weight,
    PackedWeight,
    Weight,
    as_f32,
    bf16_to_f32,
    dequantize,
    f32_to_bf16,
)

#: The reference computes at once, always; the compiled kernels can be recorded.
recording = None


def linear(x: F32, w: Weight, threads: int = 1) -> F32:
    """x [T, D] times w [O, D] transposed -> [T, O], float32 activations whatever w is."""
    return x @ dequantize(w).T


def quantize_activations(x: F32, threads: int = 1) -> Q8:
    """x [T, D] (D a multiple of 32) -> int8 groups of 32, scale = max |x| / 127, ties to even."""
    groups = x.reshape(x.shape[0], x.shape[1] // GROUP_SIZE, GROUP_SIZE)
    largest = np.abs(groups).max(axis=2)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    q = np.rint(groups * inverse[:, :, None]).astype(np.int8)
    return Q8(q.reshape(x.shape), largest * np.float32(1 / 127))


def linear_q8(xq: Q8, w: Int4Weight | PackedWeight, threads: int = 1) -> F32:
    """Quantised activations [T, D] times INT4 or packed w [O, D] transposed -> [T, O].

    Integer products are summed exactly inside a group, then scaled and added in float32.
    """
    return (xq.q * np.repeat(xq.scale, GROUP_SIZE, axis=1)) @ dequantize(w).T


def linear_bf16(x: F32, w: U16, threads: int = 1) -> F32:
    """x [T, D], rounded to bf16, times bf16 w [O, D] transposed -> [T, O]; float32 sums."""
    return linear(bf16_to_f32(f32_to_bf16(x)), w)


def silu_mul(gate: F32, up: F32) -> F32:
    """silu(gate) * up, silu(z) = z / (1 + exp(-z)); both [T, I]."""
    with np.errstate(over="ignore"):  # exp(-z) = inf gives the right limit, 0
        out: F32 = gate / (1 + np.exp(-gate)) * up
    return out


def project(x: F32, w: Weight, precision: Precision, threads: int = 1) -> F32:
    """x [T, D] times w [O, D] transposed -> [T, O]; "fast" and quantised: int8 activations."""
    if precision == "fast" and isinstance(w, Int4Weight | PackedWeight):
        return linear_q8(quantize_activations(x), w)
    return linear(x, w)


def request(experts: ExpertTable, ids: I32) -> None:
    """A router chose these experts, int32 [T, K] (distinct in a row): `moe` will want them."""
    experts.source.count(ids)
    experts.source.request(np.unique(ids).tolist())


def anticipate(experts: ExpertTable, ids: I32) -> None:
    """The next layer may want these, int32 [1, K], best first: they may be read meanwhile."""
    experts.source.anticipate(ids[0].tolist())


def moe(
    x: F32, experts: ExpertTable, ids: I32, weights: F32, precision: Precision, threads: int = 1
) -> F32:
    """The routed experts: x [T, D], ids int32 [T, K] (distinct in a row), weights [T, K] -> [T, D].

    Row t is the sum, by rising expert id, of
    weights[t, k] * down(silu(gate x_t) * up x_t) of expert ids[t, k].
    Only chosen experts are touched, after a `request` for them. Quantised projections of "fast"
    precision see int8 activations.
    """
    out = np.zeros_like(x)
    for e in chain.from_iterable(experts.source.sweep(np.unique(ids).tolist())):
        gate, up, down = experts[e]
        tokens, slot = np.nonzero(ids == e)
        hidden = silu_mul(project(x[tokens], gate, precision), project(x[tokens], up, precision))
        out[tokens] += weights[tokens, slot, None] * project(hidden, down, precision)
    return out


def route(
    logits: F32,
    bias: F32,
    n_group: int,
    topk_group: int,
    top_k: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[I32, F32]:
    """Choose experts: logits [T, E], bias [E] -> ids int32 [T, K], weights [T, K].

    s = sigmoid(logits). s + bias chooses: first the best `topk_group` of `n_group` groups by the
    sum of their two best experts, then the best `top_k` experts inside them, best first, the
    lower index first among equals. The weights are s alone, divided by their sum (+ 1e-20) if
    `norm_topk_prob`, times `routed_scaling_factor`.
    """
    n_tokens, n_experts = logits.shape
    with np.errstate(over="ignore"):
        score = (1 / (1 + np.exp(-logits))).astype(np.float32)
    choice = score + bias
    if topk_group < n_group:
        grouped = choice.reshape(n_tokens, n_group, n_experts // n_group)
        group_score = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
        order = np.argsort(-group_score, axis=1, kind="stable")
        masked = np.full_like(grouped, -np.inf)
        rows = np.arange(n_tokens)[:, None]
        masked[rows, order[:, :topk_group]] = grouped[rows, order[:, :topk_group]]
        choice = masked.reshape(n_tokens, n_experts)
    ids = np.argsort(-choice, axis=1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(score, ids, axis=1)
    if norm_topk_prob:
        weights = weights / (weights.sum(axis=1, keepdims=True) + np.float32(1e-20))
    return ids.astype(np.int32), weights * np.float32(routed_scaling_factor)


def rmsnorm(x: F32, w: U16 | F32, eps: float) -> F32:
    """x / sqrt(mean(x^2) + eps) * w over the last axis; x [T, D], w [D]."""
    variance = np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True)
    normalised: F32 = (x / np.sqrt(variance + eps)).astype(np.float32)
    return normalised * as_f32(w)


def rope(x: F32, cos: F32, sin: F32) -> F32:
    """Rotate the interleaved pairs (2i, 2i + 1) of x [T, H, P] by angles of cos, sin [T, P / 2].

    The output stays interleaved; scores do not depend on the order as queries and keys agree.
    """
    even, odd = x[:, :, 0::2], x[:, :, 1::2]
    c, s = cos[:, None, :], sin[:, None, :]
    out = np.empty_like(x)
    out[:, :, 0::2] = even * c - odd * s
    out[:, :, 1::2] = even * s + odd * c
    return out


def absorb_q(q_nope: F32, w_kv_b: Weight, threads: int = 1) -> F32:
    """Queries into latent space: q_nope [T, H, N], w_kv_b [H * (N + V), R] -> [T, H, R].

    Head h's rows of w_kv_b are N key rows (W_UK) and then V value rows (W_UV);
    the result is q_nope . W_UK, so that (q_lat . c_kv) equals (q_nope . k_nope).
    """
    n_heads, n = q_nope.shape[1:]
    w = dequantize(w_kv_b)
    w_uk = w.reshape(n_heads, -1, w.shape[1])[:, :n]
    return np.ascontiguousarray(np.einsum("thn,hnr->thr", q_nope, w_uk, optimize=True))


def absorb_v(o_lat: F32, w_kv_b: Weight, v_head_dim: int, threads: int = 1) -> F32:
    """Latent outputs to values: o_lat [T, H, R], w_kv_b [H * (N + V), R] -> [T, H, V]."""
    w = dequantize(w_kv_b)
    w_uv = w.reshape(o_lat.shape[1], -1, w.shape[1])[:, -v_head_dim:]
    return np.ascontiguousarray(np.einsum("thr,hvr->thv", o_lat, w_uv, optimize=True))


def _causal_softmax(scores: F32, start: int) -> F32:
    """Softmax over the last axis of scores [T, H, S]; query t sees rows 0 .. start + t."""
    n_tokens, _, n_rows = scores.shape
    visible = np.arange(n_rows)[None, :] <= start + np.arange(n_tokens)[:, None]
    scores = np.where(visible[:, None, :], scores, np.float32(-np.inf))
    p = np.exp(scores - scores.max(axis=2, keepdims=True))
    softmax: F32 = p / p.sum(axis=2, keepdims=True)
    return softmax


def mla_decode(q_lat: F32, q_pe: F32, latents: Latents, scale: float, threads: int = 1) -> F32:
    """Attention in latent space: q_lat [B T, H, R], q_pe [B T, H, P] -> o_lat [B T, H, R].

    The T tokens of each of B timelines follow one another. Token t of a timeline attends to its
    rows 0 .. start + t: softmax((q_lat . c_kv + q_pe . k_pe) * scale) . c_kv.
    """
    n_tokens, out = latents.tokens_of(len(q_lat)), np.empty_like(q_lat)
    for b, start in enumerate(latents.starts.tolist()):
        c, k = (as_f32(rows) for rows in latents.gather(b, start + n_tokens))
        own = slice(b * n_tokens, (b + 1) * n_tokens)
        scores = (q_lat[own] @ c.T + q_pe[own] @ k.T) * np.float32(scale)
        out[own] = _causal_softmax(scores, start) @ c
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
    """Attention with per-head keys: q_nope [T, H, N], q_pe [T, H, P] -> [T, H, V].

    kv [S, H, N + V] is kv_b(c_kv) of the rows 0 .. S-1, k_pe [S, P] their rotated shared keys;
    query t attends to rows 0 .. start + t.
    """
    n = q_nope.shape[2]
    scores = np.einsum("thn,shn->ths", q_nope, kv[:, :, :n], optimize=True)
    scores = (scores + q_pe @ as_f32(k_pe).T) * np.float32(scale)
    p = _causal_softmax(scores, start)
    return np.ascontiguousarray(np.einsum("ths,shv->thv", p, kv[:, :, n:], optimize=True))


def add(a: F32, b: F32) -> F32:
    """a + b, of the same shape."""
    return a + b


def split(x: F32, n_left: int) -> tuple[F32, F32]:
    """The first n_left numbers of the last axis, and the others, both contiguous."""
    return np.ascontiguousarray(x[..., :n_left]), np.ascontiguousarray(x[..., n_left:])


def store_latents(c_kv: F32, k_pe: F32, latents: Latents) -> None:
    """c_kv [B T, R] and k_pe [B T, P] become the rows start .. start + T - 1 of B timelines.

    They are rounded to bf16 bits if those are what the blocks hold.
    """
    n_tokens = latents.tokens_of(len(c_kv))
    for i in range(len(c_kv)):
        timeline, t = divmod(i, n_tokens)
        block, row = divmod(int(latents.starts[timeline]) + t, BLOCK_TOKENS)
        for rows, out in zip((c_kv, k_pe), latents.block(timeline, block), strict=True):
            out[row] = f32_to_bf16(rows[i]) if out.dtype == np.uint16 else rows[i]
