"""Choosing experts: sigmoid scores, a correction bias, groups, the top k."""

from __future__ import annotations

import math

import numpy as np

from kimi_cpu.kernels.isa import jit
from kimi_cpu.kernels.simd import load_f32, store_f32, store_i32


@jit
def _take_best(values, n):  # type: ignore[no-untyped-def]
    """Index of the largest of values[:n], the lowest among equals, which is then struck out."""
    best = 0
    for i in range(1, n):
        if values[i] > values[best]:
            best = i
    values[best] = -np.inf
    return best


@jit
def route_rows(  # type: ignore[no-untyped-def]
    logits, bias, n_tokens, n_experts, n_group, topk_group, top_k, normalise, factor, ids, weights
):
    """As `reference.route`; addresses of float32 logits [T, E], bias [E], the two outputs."""
    score = np.empty(n_experts, np.float32)
    choice = np.empty(n_experts, np.float32)
    group_score = np.empty(n_group, np.float32)
    allowed = np.empty(n_group, np.int64)
    per_group = n_experts // n_group
    one = np.float32(1.0)
    for t in range(n_tokens):
        for i in range(n_experts):
            z = load_f32(logits + (t * n_experts + i) * 4)
            score[i] = one / (one + math.exp(-z))
            choice[i] = score[i] + load_f32(bias + i * 4)
        if topk_group < n_group:
            for g in range(n_group):
                first = np.float32(-np.inf)
                second = np.float32(0.0) if per_group == 1 else np.float32(-np.inf)
                for i in range(g * per_group, (g + 1) * per_group):
                    if choice[i] > first:
                        second = first if per_group > 1 else second
                        first = choice[i]
                    elif choice[i] > second and per_group > 1:
                        second = choice[i]
                group_score[g] = first + second
                allowed[g] = 0
            for _ in range(topk_group):
                allowed[_take_best(group_score, n_group)] = 1
            for i in range(n_experts):
                if allowed[i // per_group] == 0:
                    choice[i] = -np.inf
        total = np.float32(1e-20)
        for k in range(top_k):
            best = _take_best(choice, n_experts)
            total += score[best]
            store_i32(ids + (t * top_k + k) * 4, best)
            store_f32(weights + (t * top_k + k) * 4, score[best])
        for k in range(top_k):
            at = weights + (t * top_k + k) * 4
            weight = load_f32(at)
            if normalise:
                weight = weight / total
            store_f32(at, np.float32(weight * factor))
