"""Int8 weights as the dot product of an instruction set takes them.

`vpdpbusd` wants one side unsigned, so there the weights are used as q + 128 (their top bit
flipped) and the sums start at -128 sum(x), which the packed activations give as -8 sum(x).
"""

from __future__ import annotations

from typing import Any

from kimi_cpu.kernels.simd import I8, UNSIGNED_DOT, Emit, const, vec

_BYTES = vec(I8, 64)


def bias_weights(e: Emit, words: Any) -> Any:
    """<16 x i32> of raw weights -> <64 x i8> as `dot_s8` takes them."""
    raw = e.b.bitcast(words, _BYTES)
    return e.b.xor(raw, const(_BYTES, -128)) if UNSIGNED_DOT else raw


def start_sums(e: Emit, sums: Any) -> Any:
    """What a dot product starts at, from the activations' -8 sum(x) (a scalar or a vector)."""
    return e.b.shl(sums, const(sums.type, 4)) if UNSIGNED_DOT else const(sums.type, 0)


def dot_s8(e: Emit, total: Any, w: Any, x: Any) -> Any:
    """total <16 x i32> + four products a lane of w (of `bias_weights`) and x, <64 x i8>."""
    return e.dot_s8(total, w, x)
