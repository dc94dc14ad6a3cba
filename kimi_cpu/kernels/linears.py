"""The projections and the row operations around them, behind `reference`'s signatures.

Arrays must be C-contiguous float32 unless the reference says otherwise; shapes are checked here,
values are not.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kimi_cpu.kernels.attention_tile import HAS_BF16_DOT
from kimi_cpu.kernels.bf16 import round_rows, rounded_bytes
from kimi_cpu.kernels.common import (
    I64,
    KIND_BF16,
    Q8,
    WITH_Q8,
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
from kimi_cpu.kernels.matmul import matmul_range
from kimi_cpu.kernels.norm_rope import rmsnorm_rows, rope_rows, silu_mul_rows
from kimi_cpu.kernels.rows import add_rows, split_rows
from kimi_cpu.kernels.threads import empty, run
from kimi_cpu.quant import F32, GROUP_SIZE, U16, Int4Weight, PackedWeight, Weight

#: Rows of a weight that a thread takes at a time are a multiple of this.
ROW_GRAIN = 32

_iota_lock = threading.Lock()
_iota: I64 = np.arange(1024, dtype=np.int64)
_iota_kept: list[I64] = [_iota]  # older ones may still be in use by another thread


def iota_address(n: int) -> int:
    """Address of int64 0, 1, .. of at least n elements, never freed."""
    global _iota
    if n > len(_iota):
        with _iota_lock:
            if n > len(_iota):
                grown = np.arange(1 << (n - 1).bit_length(), dtype=np.int64)
                _iota_kept.append(grown)
                _iota = grown
    return address(_iota)


def check(x: npt.NDArray[np.generic], *shape: int | None) -> None:
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


def packed_buffer(n_rows: int, d: int) -> npt.NDArray[np.uint8]:
    make = np.zeros if d % PACK_ELEMENTS else np.empty  # the padding must be zero
    return make((n_rows, packed_bytes(d)), dtype=np.uint8)


def linear(x: F32, w: Weight, threads: int = 1) -> F32:
    """As `reference.linear`: x [T, D], w [O, D] of any kind -> [T, O]."""
    rows, d = w.shape
    check(x, None, d)
    n = len(x)
    values, scales = weight_addresses(w)
    out = empty((n, rows))
    args = (
        weight_kind(w), address(x), d * 4, 0, iota_address(n), n, address(out), rows * 4, 0,
        values, scales, 0, rows, d,
    )  # fmt: skip
    run(matmul_range, args, (x, w, out), rows, ROW_GRAIN, threads, w.nbytes * (1 + n // 8))
    return out


def quantize_activations(x: F32, threads: int = 1) -> PackedQ8:
    """As `reference.quantize_activations`: x [T, D], D a multiple of 32."""
    check(x, None, None)
    n, d = x.shape
    if d % GROUP_SIZE:
        raise ValueError(f"{d} activations are not whole groups of {GROUP_SIZE}")
    data = packed_buffer(n, d)
    run(pack_rows, (address(x), d, address(data)), (x, data), n, 1, threads, x.nbytes)
    return PackedQ8(data, (n, d))


def linear_q8(xq: PackedQ8, w: Int4Weight | PackedWeight, threads: int = 1) -> F32:
    """As `reference.linear_q8`: xq [T, D] of `quantize_activations`, w [O, D] -> [T, O]."""
    rows, d = w.shape
    n = xq.shape[0]
    if xq.shape[1] != d:
        raise ValueError(f"activations of {xq.shape[1]} features for a weight of {d}")
    values, scales = weight_addresses(w)
    out = empty((n, rows))
    args = (
        weight_kind(w) + WITH_Q8, address(xq.data), packed_bytes(d), 0, iota_address(n), n,
        address(out), rows * 4, 0, values, scales, 0, rows, d,
    )  # fmt: skip
    run(matmul_range, args, (xq, w, out), rows, ROW_GRAIN, threads, w.nbytes * (1 + n // 8))
    return out


def linear_bf16(x: F32, w: Weight, threads: int = 1) -> F32:
    """As `reference.linear_bf16`: x [T, D], rounded to bf16, times bf16 w [O, D] -> [T, O].

    Only where HAS_BF16_DOT.
    """
    rows, d = w.shape
    check(x, None, d)
    n = len(x)
    values, _ = weight_addresses(w)
    rounded, out = empty((n, rounded_bytes(d)), np.uint8), empty((n, rows))
    run(round_rows, (address(x), d, address(rounded)), (x, rounded), n, 1, threads, x.nbytes)
    args = (
        KIND_BF16 + WITH_Q8, address(rounded), rounded_bytes(d), 0, iota_address(n), n,
        address(out), rows * 4, 0, values, 0, 0, rows, d,
    )  # fmt: skip
    run(matmul_range, args, (rounded, w, out), rows, ROW_GRAIN, threads, w.nbytes * (1 + n // 8))
    return out


def project(x: F32, w: Weight, precision: Precision, threads: int = 1) -> F32:
    """As `reference.project`: x [T, D], w [O, D] of any kind -> [T, O].

    "fast" also rounds the activations of bf16 weights to bf16, where the machine multiplies those.
    """
    if precision == "fast" and isinstance(w, Int4Weight | PackedWeight):
        return linear_q8(quantize_activations(x, threads), w, threads)
    if precision == "fast" and HAS_BF16_DOT and weight_kind(w) == KIND_BF16:
        return linear_bf16(x, w, threads)
    return linear(x, w, threads)


def silu_mul(gate: F32, up: F32) -> F32:
    """As `reference.silu_mul`: gate, up [T, I] -> [T, I]."""
    check(gate, None, None)
    check(up, *gate.shape)
    out = empty(gate.shape)
    run(silu_mul_rows, (address(gate), address(up), address(out)), (gate, up, out), gate.size)
    return out


def rmsnorm(x: F32, w: U16 | F32, eps: float) -> F32:
    """As `reference.rmsnorm`: x [T, D], w [D] -> [T, D]."""
    check(x, None, *w.shape)
    out = empty(x.shape)
    args = (
        address(x), weight_addresses(w)[0], int(w.dtype == np.uint16), float(eps), address(out),
        x.shape[1],
    )  # fmt: skip
    run(rmsnorm_rows, args, (x, w, out), len(x))
    return out


def rope(x: F32, cos: F32, sin: F32) -> F32:
    """As `reference.rope`: x [T, H, P], cos and sin [T, P / 2] -> [T, H, P]."""
    check(x, None, None, None)
    n, n_heads, p = x.shape
    check(cos, n, p // 2)
    check(sin, n, p // 2)
    out = empty(x.shape)
    args = (address(x), address(cos), address(sin), address(out), n_heads, p // 2)
    run(rope_rows, args, (x, cos, sin, out), n)
    return out


def add(a: F32, b: F32) -> F32:
    """As `reference.add`: a + b, same shape."""
    check(a, *b.shape)
    check(b, *a.shape)
    out = empty(a.shape)
    run(add_rows, (address(a), address(b), address(out)), (a, b, out), a.size)
    return out


def split(x: F32, n_left: int) -> tuple[F32, F32]:
    """As `reference.split`: x [..., D] -> [..., n_left] and [..., D - n_left]."""
    check(x, *x.shape)
    n_right = x.shape[-1] - n_left
    left, right = empty((*x.shape[:-1], n_left)), empty((*x.shape[:-1], n_right))
    args = (address(x), address(left), address(right), n_left, n_right)
    run(split_rows, args, (x, left, right), x.size // x.shape[-1])
    return left, right
