"""Elementwise kernels: RMSNorm, rotary position embedding, SwiGLU's silu(gate) * up."""

from __future__ import annotations

from typing import Any

from numba.core import types

from kimi_cpu.kernels.common import KIND_BF16, KIND_F32
from kimi_cpu.kernels.dense import load_weights
from kimi_cpu.kernels.isa import jit
from kimi_cpu.kernels.simd import FLOAT, LANES, Emit, F32x16, const, intrinsic, load_f32, store_f32


def _emit_pieces(e: Emit, n: Any, piece: Any) -> None:
    """piece(i, mask) for i = 0, 16, .. below n; mask is None but for the last, partial vector."""
    main = e.b.mul(e.b.sdiv(n, e.i64(LANES)), e.i64(LANES))
    with e.loop(0, main, LANES) as i:
        piece(i, None)
    left = e.b.sub(n, main)
    with e.b.if_then(e.b.icmp_signed(">", left, e.i64(0))):
        piece(main, e.lanes_below(left))


def _load(e: Emit, addr: Any, i: Any, mask: Any) -> Any:
    return load_weights(e, KIND_F32, e.add(addr, e.mul(i, 4)), mask)


def _store(e: Emit, value: Any, addr: Any, i: Any, mask: Any) -> None:
    addr = e.add(addr, e.mul(i, 4))
    if mask is None:
        e.store(value, addr)
    else:
        e.store_masked(value, addr, mask)


@intrinsic
def silu_mul_row(typingctx: Any, gate: Any, up: Any, out: Any, n: Any) -> Any:
    """out = silu(gate) * up over n float32; out may be gate or up."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e, b = Emit(builder), builder
        gate, up, out, n = args

        def piece(i: Any, mask: Any) -> None:
            g = _load(e, gate, i, mask)
            ones = b.fadd(e.exp(b.fneg(g)), const(F32x16, 1.0))
            _store(e, b.fmul(b.fdiv(g, ones), _load(e, up, i, mask)), out, i, mask)

        _emit_pieces(e, n, piece)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def _sum_of_squares(typingctx: Any, x: Any, n: Any) -> Any:
    """Sum of x^2 over n float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emit(builder)
        acc = e.variable(const(F32x16, 0.0))

        def piece(i: Any, mask: Any) -> None:
            v = _load(e, args[0], i, mask)
            e.set(acc, e.fma(v, v, e.get(acc)))

        _emit_pieces(e, args[1], piece)
        return e.sum(e.get(acc))

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def _scale_row(
    typingctx: Any, x: Any, factor: Any, w: Any, w_is_bf16: Any, out: Any, n: Any
) -> Any:
    """out = x * factor * w over n elements."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emit(builder)
        x, factor, w, w_is_bf16, out, n = args
        factors = e.splat(factor)

        def pieces(kind: int, size: int) -> None:
            def piece(i: Any, mask: Any) -> None:
                weights = load_weights(e, kind, e.add(w, e.mul(i, size)), mask)
                v = builder.fmul(_load(e, x, i, mask), factors)
                _store(e, builder.fmul(v, weights), out, i, mask)

            _emit_pieces(e, n, piece)

        is_bf16 = builder.icmp_signed("!=", w_is_bf16, e.i64(0))
        with builder.if_else(is_bf16) as (bf16, f32):
            with bf16:
                pieces(KIND_BF16, 2)
            with f32:
                pieces(KIND_F32, 4)
        return context.get_dummy_value()

    i64, f32 = types.int64, types.float32
    return types.void(i64, f32, i64, i64, i64, i64), codegen


@intrinsic
def add_scaled_row(typingctx: Any, row: Any, weight: Any, out: Any, n: Any) -> Any:
    """out[i] += weight[0] * row[i], i < n; float32 at these addresses."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emit(builder)
        row, weight, out, n = args
        factor = e.splat(e.load(FLOAT, weight))

        def piece(i: Any, mask: Any) -> None:
            total = e.fma(factor, _load(e, row, i, mask), _load(e, out, i, mask))
            _store(e, total, out, i, mask)

        _emit_pieces(e, n, piece)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def zero_row(typingctx: Any, out: Any, n: Any) -> Any:
    """out[i] = 0, i < n; float32 at this address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emit(builder)
        _emit_pieces(e, args[1], lambda i, mask: _store(e, const(F32x16, 0.0), args[0], i, mask))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 2), codegen


@jit
def silu_mul_rows(gate, up, out, n):  # type: ignore[no-untyped-def]
    """out = silu(gate) * up over n float32 at these addresses."""
    silu_mul_row(gate, up, out, n)


@jit
def rmsnorm_rows(x, w, w_is_bf16, eps, out, n_rows, d):  # type: ignore[no-untyped-def]
    """RMSNorm of n_rows rows of d float32 at x; w bf16 bits or float32."""
    for t in range(n_rows):
        row = x + t * d * 4
        mean = _sum_of_squares(row, d) / d
        _scale_row(row, 1.0 / (mean + eps) ** 0.5, w, w_is_bf16, out + t * d * 4, d)


@jit
def rope_rows(x, cos, sin, out, n_tokens, n_heads, half):  # type: ignore[no-untyped-def]
    """Rotate the pairs of x [T, H, 2 half] by the angles of cos, sin [T, half]."""
    for t in range(n_tokens):
        for h in range(n_heads):
            at = (t * n_heads + h) * half * 8
            for i in range(half):
                c = load_f32(cos + (t * half + i) * 4)
                s = load_f32(sin + (t * half + i) * 4)
                even = load_f32(x + at + i * 8)
                odd = load_f32(x + at + i * 8 + 4)
                store_f32(out + at + i * 8, even * c - odd * s)
                store_f32(out + at + i * 8 + 4, even * s + odd * c)
