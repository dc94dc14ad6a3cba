"""Adding, splitting and storing rows against the reference."""

from __future__ import annotations

import numpy as np
import pytest

from kimi_cpu.kernels import fast, reference


@pytest.mark.parametrize("shape", [(1, 1), (1, 16), (3, 17), (2, 5, 33), (7, 192)])
def test_add(inputs, shape):
    a, b = inputs.f32(*shape), inputs.f32(*shape)
    np.testing.assert_array_equal(fast.add(a, b), reference.add(a, b))


@pytest.mark.parametrize(("shape", "n_left"), [((1, 2), 1), ((3, 40), 17), ((2, 4, 96), 64)])
def test_split(inputs, shape, n_left):
    x = inputs.f32(*shape)
    for ours, theirs in zip(fast.split(x, n_left), reference.split(x, n_left), strict=True):
        assert ours.flags.c_contiguous
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
@pytest.mark.parametrize(("n", "d", "start"), [(1, 1, 0), (1, 33, 5), (4, 16, 2)])
def test_store_rows_at(inputs, dtype, n, d, start):
    rows = inputs.f32(n, d)
    ours, theirs = np.ones((9, d), dtype), np.ones((9, d), dtype)
    fast.store_rows_at(rows, ours, np.array(start))
    reference.store_rows_at(rows, theirs, start)
    np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match="do not fit"):
        fast.store_rows_at(rows, ours, 9)


def test_bf16_rounding_is_to_nearest_even():
    rows = np.array([[1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1.5, 0.0, -0.0, 3.4e38]], np.float32)
    ours, theirs = np.zeros((1, 7), np.uint16), np.zeros((1, 7), np.uint16)
    fast.store_rows_at(rows, ours, 0)
    reference.store_rows_at(rows, theirs, 0)
    np.testing.assert_array_equal(ours, theirs)


def test_shapes_are_checked(inputs):
    with pytest.raises(ValueError, match="shape"):
        fast.add(inputs.f32(2, 3), inputs.f32(3, 2))
