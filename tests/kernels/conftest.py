"""Random inputs and the comparison used by all kernel tests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kimi_cpu.quant import F32, Weight, f32_to_bf16, pack, quantize_int4, quantize_int8

MAKE_WEIGHT: dict[str, Callable[[F32], Weight]] = {
    "f32": lambda w: w,
    "bf16": f32_to_bf16,
    "int4": quantize_int4,
    "packed4": lambda w: pack(quantize_int4(w)),
    "packed8": lambda w: pack(quantize_int8(w)),
}


class Inputs:
    """Seeded float32 arrays, and weights of every kind made from them."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)

    def f32(self, *shape: int) -> F32:
        return self.rng.standard_normal(shape).astype(np.float32)

    def weight(self, kind: str, *shape: int) -> Weight:
        return MAKE_WEIGHT[kind](self.f32(*shape))


def assert_close(got: F32, want: F32, tolerance: float = 1e-5) -> None:
    """Equal within tolerance times the largest value wanted; no NaN anywhere."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype == np.float32
    assert np.isfinite(got).all()
    assert np.abs(got - want).max(initial=0) <= tolerance * max(np.abs(want).max(initial=0), 1e-30)


@pytest.fixture
def inputs() -> Inputs:
    return Inputs()


@pytest.fixture
def close() -> Callable[..., None]:
    return assert_close
