"""Linear layers over every kind of weight, against the reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_cpu.kernels import fast, reference
from kimi_cpu.kernels.attention_tile import HAS_BF16_DOT
from kimi_cpu.kernels.linears import PackedQ8, linear_bf16
from kimi_cpu.kernels.matmul import GEMM_TOKENS
from kimi_cpu.kernels.q8 import COLUMN_BLOCK, TILES
from kimi_cpu.quant import (
    GROUP_SIZE,
    Int4Weight,
    Int8Weight,
    bf16_to_f32,
    dequantize,
    f32_to_bf16,
    pack,
    quantize_int4,
    quantize_int8,
    unpack_int4,
)
from tests.kernels.conftest import Inputs

SHAPES = [
    # T, D, O: around the borders of vectors, packed parts, tiles and row blocks
    (1, 1, 1), (1, 15, 3), (2, 16, 4), (3, 17, 5), (1, 33, 9), (5, 31, 7), (4, 64, 33),
    (9, 100, 65),
    (1, 192, 32), (1, 200, 130), (6, 48, 31),
]  # fmt: skip
GROUPED = [(1, 32, 1), (1, 32, 7), (2, 64, 8), (1, 96, 9), (3, 128, 33), (1, 480, 40), (5, 512, 5),
           (4, 544, 70), (1, 1056, 17), (7, 1536, 12)]  # fmt: skip


@pytest.mark.parametrize(("n", "d", "rows"), SHAPES)
@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_dense(inputs, close, kind, n, d, rows):
    x, w = inputs.f32(n, d), inputs.weight(kind, rows, d)
    close(fast.linear(x, w), reference.linear(x, w))


@pytest.mark.skipif(not HAS_BF16_DOT, reason="this code has no bf16 dot products")
@pytest.mark.parametrize(("n", "d", "rows"), [
    *SHAPES, (1, 1024, 9), (2, 1055, 8), (4, 1057, 33), (17, 2049, 66), (70, 3104, 5),
    (135, 40, 130),
])  # fmt: skip
def test_rounded_to_bf16(inputs, close, n, d, rows):
    x, w = inputs.f32(n, d), inputs.weight("bf16", rows, d)
    close(linear_bf16(x, w), reference.linear_bf16(x, w))


@pytest.mark.skipif(not HAS_BF16_DOT, reason="this code has no bf16 dot products")
def test_rounding_to_bf16_is_to_even_and_keeps_infinities():
    """Against a matrix that shows each activation: ties, overflow to infinity, signed zero."""
    x = np.array([[1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, -3.4e38, -0.0]], np.float32)
    one = f32_to_bf16(np.ones((1, 1), np.float32))
    got = np.array([linear_bf16(np.ascontiguousarray(x[:, i : i + 1]), one) for i in range(6)])
    np.testing.assert_array_equal(got.ravel(), bf16_to_f32(f32_to_bf16(x)).ravel())


@pytest.mark.parametrize(("n", "d", "rows"), GROUPED)
@pytest.mark.parametrize("kind", ["int4", "packed4", "packed8"])
def test_groups_exact(inputs, close, kind, n, d, rows):
    x, w = inputs.f32(n, d), inputs.weight(kind, rows, d)
    close(fast.linear(x, w), reference.linear(x, w))


@pytest.mark.parametrize(("n", "d", "rows"), GROUPED)
@pytest.mark.parametrize("kind", ["int4", "packed4", "packed8"])
def test_q8(inputs, close, kind, n, d, rows):
    x, w = inputs.f32(n, d), inputs.weight(kind, rows, d)
    close(
        fast.linear_q8(fast.quantize_activations(x), w),
        reference.linear_q8(reference.quantize_activations(x), w),
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 10), st.integers(1, 40), st.integers(1, 70), st.integers(0, 99),
       st.sampled_from(["int4", "packed4", "packed8"]))  # fmt: skip
def test_q8_any_shape(n, groups, rows, seed, kind):
    inputs = Inputs(seed)
    x = inputs.f32(n, groups * GROUP_SIZE)
    w = inputs.weight(kind, rows, groups * GROUP_SIZE)
    got = fast.linear_q8(fast.quantize_activations(x), w)
    want = reference.linear_q8(reference.quantize_activations(x), w)
    terms = np.abs(x) @ np.abs(dequantize(w)).T  # their sum may cancel out, their rounding does not
    assert np.abs(got - want).max() <= 1e-6 * terms.max()


@pytest.mark.parametrize("kind", ["packed4", "packed8"])
@pytest.mark.parametrize("rows", [16, 40, 48, 100])
def test_q8_in_blocks_of_columns_equals_one_pass(inputs, kind, rows):
    """Many tokens pass over blocks of columns, and their sums wait in between; one token's not."""
    n, d = 2 * TILES[-1] + 3, 2 * COLUMN_BLOCK + 96
    x, w = fast.quantize_activations(inputs.f32(n, d)), inputs.weight(kind, rows, d)
    together = fast.linear_q8(x, w)
    for m in range(TILES[-1] + 1, n + 1):  # all sizes of the last tile
        np.testing.assert_array_equal(fast.linear_q8(PackedQ8(x.data[:m], (m, d)), w), together[:m])
    for t in range(n):
        alone = fast.linear_q8(PackedQ8(x.data[t : t + 1], (1, d)), w)
        np.testing.assert_array_equal(alone[0], together[t])


@pytest.mark.parametrize("d", [32, 192, 512, 1120])
def test_quantised_activations_equal_the_reference(inputs, d):
    x = inputs.f32(3, d)
    x[0, :32] = 0
    x[1, 5] = 1e6
    x[2, 7] = -x[2, :32].max() * 3
    got, want = fast.quantize_activations(x).unpack(), reference.quantize_activations(x)
    np.testing.assert_array_equal(got.q, want.q)
    np.testing.assert_allclose(got.scale, want.scale, rtol=2e-7)


def test_integers_are_exact_at_the_extremes():
    """All nibble values against activations of +-127: the integer part has no rounding at all."""
    d, rows = 1056, 16
    nibbles = np.tile(np.arange(rows, dtype=np.uint8)[:, None], (1, d // 2))
    scale = f32_to_bf16(np.ones((rows, d // 32), np.float32))
    w = Int4Weight(nibbles | nibbles << 4, scale)
    for x in (np.ones(d), -np.ones(d), np.resize([1.0, -1.0], d), np.resize([1.0, 1.0, -1.0], d)):
        x = (127 * x[None, :]).astype(np.float32)
        want = unpack_int4(w.packed).astype(np.int64) @ x[0].astype(np.int64)
        q = fast.quantize_activations(x)
        np.testing.assert_allclose(fast.linear_q8(q, w)[0], want, rtol=2e-7)
        np.testing.assert_array_equal(fast.linear(x, w)[0], want)


def test_int8_integers_are_exact_at_the_extremes():
    """Every int8 value, -128 too, against activations of +-127."""
    d, rows = 1056, 17
    q = np.resize(np.arange(-128, 128, dtype=np.int64), (rows, d)).astype(np.int8)
    q[0], q[1] = 127, -128
    w = pack(Int8Weight(q, f32_to_bf16(np.ones((rows, d // 32), np.float32))))
    for x in (np.ones(d), -np.ones(d), np.resize([1.0, -1.0], d), np.resize([1.0, 1.0, -1.0], d)):
        x = np.tile((127 * x[None, :]).astype(np.float32), (GEMM_TOKENS, 1))
        want = q.astype(np.int64) @ x[0].astype(np.int64)
        for n in (1, 5, GEMM_TOKENS):
            got = fast.linear_q8(fast.quantize_activations(x[:n]), w)
            np.testing.assert_allclose(got[-1], want, rtol=1e-6)
        np.testing.assert_array_equal(fast.linear(x, w)[-1], want)


def test_quantize_int8_stays_within_half_a_step(inputs):
    w = inputs.f32(9, 96)
    w[2, 32:64] = 0
    got = quantize_int8(w)
    assert got.q.dtype == np.int8 and got.scale.shape == (9, 3) and got.shape == w.shape
    assert np.abs(got.q).max() <= 127 and not got.q[2, 32:64].any()
    largest = np.abs(w.reshape(9, 3, 32)).max(axis=2, keepdims=True)
    error = np.abs(dequantize(got) - w).reshape(9, 3, 32)
    assert (error <= largest * (0.51 / 127 + 1 / 256)).all()  # clipping: half an ulp of bf16


@pytest.mark.parametrize("size", [1.0, 1e-37, 1e-41, 1e30])
def test_quantize_int8_as_it_is_defined(inputs, size):
    """Also where scales are tiny, or so small that bf16 has only 0 for them."""
    w = (inputs.f32(5, 64) * np.float32(size)).astype(np.float32)
    w[0, :32], w[1, 3], w[2, 32:] = 0, 50 * size, 1e-44
    got = quantize_int8(w)
    for row, scales, q in zip(w, bf16_to_f32(got.scale), got.q, strict=True):
        for group in (0, 1):
            part, scale = row[32 * group :][:32], scales[group]
            exact = np.abs(part).max(keepdims=True) / np.float32(127)
            assert scale == bf16_to_f32(f32_to_bf16(exact))[0]
            want = np.clip(np.rint(part / scale), -127, 127) if scale else np.zeros(32)
            np.testing.assert_array_equal(q[32 * group :][:32], want)


def test_zero_groups_give_zero(inputs, close):
    x, w = inputs.f32(2, 96), inputs.f32(5, 96)
    w[:, 32:64] = 0
    w[3] = 0
    x[1] = 0
    packed = quantize_int4(w)
    got = fast.linear_q8(fast.quantize_activations(x), packed)
    assert not got[1].any() and not got[:, 3].any()
    close(fast.linear(x, packed), reference.linear(x, packed))


#: Numbers of tokens on both sides of every tile's and kernel's border.
COUNTS = (*range(2, 18), GEMM_TOKENS - 1, GEMM_TOKENS, GEMM_TOKENS + 1, 67)


@pytest.mark.parametrize(
    ("d", "rows"), [(32, 1), (96, 16), (160, 70), (544, 33), (1120, 37), (2080, 67)]
)
@pytest.mark.parametrize("kind", ["f32", "bf16", "int4", "packed4", "packed8"])
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_a_token_does_not_see_its_neighbours(inputs, precision, kind, d, rows):
    """Tokens computed together give bit for bit what each gives alone."""
    x, w = inputs.f32(max(COUNTS), d), inputs.weight(kind, rows, d)
    alone = np.concatenate([fast.project(x[t : t + 1], w, precision) for t in range(len(x))])
    for n in COUNTS:
        np.testing.assert_array_equal(fast.project(x[:n], w, precision), alone[:n])
    np.testing.assert_array_equal(fast.project(x[5:11], w, precision), alone[5:11])


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(1, 40), st.integers(1, 70), st.integers(0, 99),
       st.sampled_from(["int4", "packed4", "packed8"]))  # fmt: skip
def test_q8_of_any_shape_does_not_see_neighbours(n, groups, rows, seed, kind):
    inputs = Inputs(seed)
    x = inputs.f32(n, groups * GROUP_SIZE)
    w = inputs.weight(kind, rows, groups * GROUP_SIZE)
    together = fast.project(x, w, "fast")
    for t in {0, n // 2, n - 1}:
        np.testing.assert_array_equal(together[t], fast.project(x[t : t + 1], w, "fast")[0])


@pytest.mark.parametrize("n", [1, 3, 8, GEMM_TOKENS])
def test_both_layouts_give_the_same(inputs, n):
    """Packing changes no bit of a result in fast precision."""
    x, w = inputs.f32(n, 544), inputs.weight("int4", 83, 544)
    together = fast.project(x, w, "fast")
    np.testing.assert_array_equal(together, fast.project(x, pack(w), "fast"))


@pytest.mark.parametrize("rows", [1, 31, 33, 100])
@pytest.mark.parametrize("n", [1, 7, GEMM_TOKENS])
def test_q8_does_not_depend_on_the_range_of_rows(inputs, rows, n):
    x, w = inputs.f32(n, 608), inputs.weight("int4", rows, 608)
    xq = fast.quantize_activations(x)
    whole = fast.linear_q8(xq, w)
    for start, stop in ((0, rows // 2), (rows // 2, rows), (rows - 1, rows)):
        if start < stop:
            part = Int4Weight(w.packed[start:stop], w.scale[start:stop])
            np.testing.assert_array_equal(whole[:, start:stop], fast.linear_q8(xq, part))


@pytest.mark.parametrize("kind", ["f32", "bf16", "int4", "packed4", "packed8"])
@pytest.mark.parametrize("n", [1, 6])
def test_threads_do_not_change_the_result(inputs, kind, n, monkeypatch):
    monkeypatch.setattr("kimi_cpu.kernels.threads.MIN_PARALLEL_COST", 0)
    x, w = inputs.f32(n, 96), inputs.weight(kind, 333, 96)
    one = fast.linear(x, w, threads=1)
    for threads in (2, 3, 8):
        np.testing.assert_array_equal(one, fast.linear(x, w, threads=threads))


def test_unaligned_read_only_weights(inputs, close):
    """Views into a mapped file start anywhere and cannot be written."""
    d, rows = 160, 9
    x, w = inputs.f32(1, d), inputs.weight("bf16", rows, d)
    raw = np.frombuffer(b"\0" + w.tobytes(), dtype=np.uint8)
    view = np.frombuffer(raw.data, dtype=np.uint16, offset=1).reshape(rows, d)
    close(fast.linear(x, view), reference.linear(x, w))


def test_wrong_shapes_are_refused(inputs):
    x, w = inputs.f32(2, 64), inputs.f32(3, 32)
    with pytest.raises(ValueError, match="shape"):
        fast.linear(x, w)
    with pytest.raises(ValueError, match="contiguous"):
        fast.linear(x[:, ::2], w)
    with pytest.raises(ValueError, match="contiguous"):
        fast.linear(inputs.f32(2, 3), w.T[:3])
    with pytest.raises(ValueError, match="groups"):
        fast.quantize_activations(inputs.f32(1, 33))
    with pytest.raises(ValueError, match="features"):
        fast.linear_q8(fast.quantize_activations(x), quantize_int4(w))
    with pytest.raises(TypeError, match="weight"):
        fast.linear(x, np.zeros((3, 64), np.float64))
