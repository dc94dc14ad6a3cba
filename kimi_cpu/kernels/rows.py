"""Moving and adding rows of float32: what stands between the products of a layer."""

from __future__ import annotations

from typing import Any

from numba.core import types

from kimi_cpu.kernels.common import BLOCK_TOKENS
from kimi_cpu.kernels.isa import jit
from kimi_cpu.kernels.norm_rope import _emit_pieces, _load, _store
from kimi_cpu.kernels.simd import I16, I32, Emit, const, intrinsic, load_i64


@intrinsic
def _add(typingctx: Any, a: Any, b: Any, out: Any, n: Any) -> Any:
    """out = a + b over n float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emit(builder)
        a, b, out, n = args

        def piece(i: Any, mask: Any) -> None:
            _store(e, builder.fadd(_load(e, a, i, mask), _load(e, b, i, mask)), out, i, mask)

        _emit_pieces(e, n, piece)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def _copy(typingctx: Any, source: Any, out: Any, n: Any) -> Any:
    """n float32 from source to out."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emit(builder)
        source, out, n = args
        _emit_pieces(e, n, lambda i, mask: _store(e, _load(e, source, i, mask), out, i, mask))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic
def _to_bf16(typingctx: Any, source: Any, out: Any) -> Any:
    """One float32 at source to bf16 bits at out, rounded to nearest even (finite values)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emit(builder)
        bits = e.load(I32, args[0])
        odd = builder.and_(builder.lshr(bits, const(I32, 16)), const(I32, 1))
        rounded = builder.add(builder.add(bits, const(I32, 0x7FFF)), odd)
        e.store(builder.trunc(builder.lshr(rounded, const(I32, 16)), I16), args[1])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@jit
def add_rows(a, b, out, n):  # type: ignore[no-untyped-def]
    """out = a + b over n float32 at these addresses."""
    _add(a, b, out, n)


@jit
def split_rows(x, left, right, n_left, n_right, start, stop):  # type: ignore[no-untyped-def]
    """Rows start .. stop-1 of x [n, n_left + n_right] into left [n, n_left], right [n, n_right]."""
    for i in range(start, stop):
        row = x + i * (n_left + n_right) * 4
        _copy(row, left + i * n_left * 4, n_left)
        _copy(row + n_left * 4, right + i * n_right * 4, n_right)


@jit
def _store_row(row, out, is_bf16, d):  # type: ignore[no-untyped-def]
    if is_bf16:
        for j in range(d):
            _to_bf16(row + j * 4, out + j * 2)
    else:
        _copy(row, out, d)


@jit
def store_latent_rows(  # type: ignore[no-untyped-def]
    c_kv, k_pe, tables, starts, c_kv_at, k_pe_at, is_bf16, rank, p_dim, n_tokens, start, stop
):
    """Rows start .. stop-1 of c_kv [B T, R] and k_pe [B T, P] become each timeline's next rows.

    The other arguments are those of `common.Latents`; n_tokens is T.
    """
    size = 2 if is_bf16 else 4
    for i in range(start, stop):
        timeline = i // n_tokens
        row = load_i64(starts + timeline * 8) + i - timeline * n_tokens
        block = load_i64(load_i64(tables + timeline * 8) + row // BLOCK_TOKENS * 8)
        inner = row % BLOCK_TOKENS
        _store_row(c_kv + i * rank * 4, block + c_kv_at + inner * rank * size, is_bf16, rank)
        _store_row(k_pe + i * p_dim * 4, block + k_pe_at + inner * p_dim * size, is_bf16, p_dim)


@intrinsic
def store_i64(typingctx: Any, addr: Any, value: Any) -> Any:
    """Write an int64 to an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        Emit(builder).store(args[1], args[0])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen
