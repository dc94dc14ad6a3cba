"""Adding, splitting and storing rows against the reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kimi_cpu.kernels import fast, reference
from kimi_cpu.quant import f32_to_bf16
from tests.kernels.conftest import paged, paged_timelines


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
@pytest.mark.parametrize(("n", "starts"), [(1, [0]), (1, [5, 700]), (4, [2]), (9, [250, 0, 512])])
def test_store_latents(inputs, dtype, n, starts):
    rank, p = 33, 6
    c_kv, k_pe = inputs.f32(n * len(starts), rank), inputs.f32(n * len(starts), p)
    empty = [(np.ones((s + n + 1, rank), dtype), np.ones((s + n + 1, p), dtype)) for s in starts]
    ours, theirs = paged_timelines(empty, starts, 800), paged_timelines(empty, starts, 800)
    fast.store_latents(c_kv, k_pe, ours)
    reference.store_latents(c_kv, k_pe, theirs)
    np.testing.assert_array_equal(ours.memory, theirs.memory)
    for i, start in enumerate(starts):
        stored_c, stored_k = theirs.gather(i, start + n + 1)
        for stored, rows in ((stored_c, c_kv), (stored_k, k_pe)):
            want = rows[i * n : (i + 1) * n]
            want = f32_to_bf16(want) if dtype == np.uint16 else want
            np.testing.assert_array_equal(stored[start:-1], want)
            assert (stored[:start] == 1).all() and (stored[-1] == 1).all()
    with pytest.raises(ValueError, match="do not fit"):
        fast.store_latents(c_kv, k_pe, replace(ours, starts=ours.starts + 800))


def test_bf16_rounding_is_to_nearest_even():
    rows = np.array([[1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1.5, 0.0, -0.0, 3.4e38]], np.float32)
    latents = paged(np.zeros((1, 7), np.uint16), np.zeros((1, 7), np.uint16), 0)
    fast.store_latents(rows, rows, latents)
    for stored in latents.gather(0, 1):
        np.testing.assert_array_equal(stored, f32_to_bf16(rows))


def test_shapes_are_checked(inputs):
    with pytest.raises(ValueError, match="shape"):
        fast.add(inputs.f32(2, 3), inputs.f32(3, 2))
