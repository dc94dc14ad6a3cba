"""MLA's up-projections, absorbed into the query and the output of latent attention."""

from __future__ import annotations

from kimi_cpu.kernels.common import KIND_BF16, KIND_F32
from kimi_cpu.kernels.dense import axpy_tile
from kimi_cpu.kernels.isa import jit
from kimi_cpu.kernels.matmul import TILE_TOKENS


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
