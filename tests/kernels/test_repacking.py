"""Rounding in one pass, and packing with vectors, give the bits that NumPy gives."""

from __future__ import annotations

import numpy as np
import pytest

from kimi_cpu.kernels.repacking import pack_int4, round_rows
from kimi_cpu.quant import F32, U16, Int4Weight, f32_to_bf16, packed_shape
from kimi_cpu.store.repack import convert

SHAPES = [(16, 64), (32, 128), (16, 96), (20, 64), (33, 32), (1, 32), (48, 7168), (272, 2048)]


def weights(shape: tuple[int, int], kind: str) -> F32:
    rng = np.random.default_rng(shape[0])
    w: F32 = rng.standard_normal(shape, dtype=np.float32)
    if kind == "tiny":  # down to subnormal numbers, to scales that are subnormal or round to 0
        w *= np.float32(2) ** rng.integers(-150, -110, shape).astype(np.float32)
    elif kind == "huge":
        w *= np.float32(1e37)
    elif kind == "zeros":
        w[np.repeat(rng.random((shape[0], shape[1] // 32)) < 0.5, 32, axis=1)] = 0
    elif kind == "halves":  # many lie exactly between two steps
        w = rng.integers(-254, 255, shape).astype(np.float32) / np.float32(2)
    return w


@pytest.mark.parametrize("kind", ["usual", "tiny", "huge", "zeros", "halves"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_reference_to_the_bit(shape: tuple[int, int], bits: int, kind: str) -> None:
    w = weights(shape, kind)
    dense: U16 | F32
    for dense in (w, f32_to_bf16(w)):
        right = np.full(packed_shape(*shape, bits), 1, dtype=np.uint8)
        # With a guard behind it, and beginning anywhere.
        memory = np.full(right.size + 164, 2, dtype=np.uint8)
        out = memory[100 : 100 + right.size].reshape(right.shape)
        deviation = convert.round_rows(dense, bits, right)
        error_squares, squares, max_abs = round_rows(dense, bits, out)
        assert np.array_equal(out, right)
        assert np.all(memory[:100] == 2) and np.all(memory[-64:] == 2)
        assert max_abs == deviation.max_abs
        assert np.isclose(error_squares, deviation.error_squares, rtol=1e-12, atol=0)
        assert np.isclose(squares, deviation.squares, rtol=1e-12, atol=0)


def test_rows_of_any_stride() -> None:
    w = weights((40, 256), "usual")[::2, :128]
    right, out = (np.empty(packed_shape(20, 128, 8), dtype=np.uint8) for _ in range(2))
    convert.round_rows(np.ascontiguousarray(w), 8, right)
    round_rows(w, 8, out)
    assert np.array_equal(out, right)


def test_blocks_that_do_not_fit() -> None:
    w = weights((16, 64), "usual")
    for shape in ((2, 1, 1088), (1, 2, 1088), (1, 1, 576)):
        with pytest.raises(ValueError, match="are no 8-bit weight"):
            round_rows(w, 8, np.empty(shape, dtype=np.uint8))
    with pytest.raises(ValueError, match="are no 8-bit weight"):
        round_rows(w[:, :48], 8, np.empty((1, 1, 1088), dtype=np.uint8))
    with pytest.raises(ValueError, match="contiguous"):
        round_rows(w, 8, np.empty((1, 1, 2176), dtype=np.uint8)[:, :, ::2])


@pytest.mark.parametrize("shape", SHAPES)
def test_packing_is_the_reference_to_the_bit(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape[1])
    rows, columns = shape
    values = rng.integers(0, 256, (rows, columns), dtype=np.uint8)[:, ::2]
    scale = rng.integers(0, 1 << 16, (rows, columns // 32), dtype=np.uint16)
    weight = Int4Weight(values, scale)
    right = np.full(packed_shape(rows, columns, 4), 1, dtype=np.uint8)
    memory = np.full(right.size + 164, 2, dtype=np.uint8)
    out = memory[100 : 100 + right.size].reshape(right.shape)
    convert.pack_int4(weight, right)
    pack_int4(weight, out)
    assert np.array_equal(out, right)
    assert np.all(memory[:100] == 2) and np.all(memory[-64:] == 2)
    with pytest.raises(ValueError, match="are no 4-bit weight"):
        pack_int4(weight, out[:, :-1])
    with pytest.raises(ValueError, match="contiguous"):
        pack_int4(weight, np.empty((*out.shape[:2], 1152), dtype=np.uint8)[:, :, ::2])
