"""The packed layout holds the same numbers, block by block where its description says."""

from __future__ import annotations

import numpy as np
import pytest

from kimi_cpu.quant import (
    Int4Weight,
    Int8Weight,
    PackedWeight,
    bf16_to_f32,
    dequantize,
    pack,
    quantize_int4,
    quantize_int8,
    unpack,
    unpack_int4,
)

SHAPES = [(16, 64), (1, 32), (17, 96), (48, 192), (5, 160)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quantize", [quantize_int4, quantize_int8])
def test_unpacking_gives_the_weight_back(shape, quantize):
    weight = quantize(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    packed = pack(weight)
    again = unpack(packed)
    assert type(again) is type(weight)
    for name in vars(weight):
        np.testing.assert_array_equal(getattr(again, name), getattr(weight, name))
    np.testing.assert_array_equal(dequantize(packed), dequantize(weight))


@pytest.mark.parametrize("bits", [4, 8])
def test_an_element_is_where_the_description_says(bits):
    rng = np.random.default_rng(1)
    w = rng.standard_normal((33, 160)).astype(np.float32)
    weight: Int4Weight | Int8Weight = quantize_int4(w) if bits == 4 else quantize_int8(w)
    q = unpack_int4(weight.packed) if isinstance(weight, Int4Weight) else weight.q
    blocks = pack(weight).blocks
    for row, column in [(0, 0), (32, 159), (17, 70), (15, 33), (16, 31), (8, 129)]:
        block = blocks[row // 16, column // 64]
        group, inside = column % 64 // 32, column % 32
        if bits == 4:  # byte b of a row is elements 2 b and 2 b + 1
            vector, byte = 4 * group + inside // 8, inside % 8 // 2
            stored = int(block[64 * vector + 4 * (row % 16) + byte])
            value = (stored >> 4 * (inside % 2) & 15) - 8
        else:
            vector = 8 * group + 4 * (inside % 2) + inside // 8
            value = int(block[64 * vector + 4 * (row % 16) + inside % 8 // 2]) - 128
        assert value == q[row, column]
        scales = block[128 * bits :].view(np.uint16)
        assert scales[16 * group + row % 16] == weight.scale[row, column // 32]


def test_padding_is_zero():
    packed = pack(quantize_int4(np.ones((1, 32), np.float32)))
    whole = unpack(PackedWeight(packed.blocks, (16, 64), 4))
    assert isinstance(whole, Int4Weight)
    assert not unpack_int4(whole.packed)[1:].any()
    assert not unpack_int4(whole.packed)[:, 32:].any()
    assert not bf16_to_f32(whole.scale)[1:].any()


def test_a_wrong_number_of_blocks_is_refused():
    packed = pack(quantize_int4(np.ones((16, 64), np.float32)))
    with pytest.raises(ValueError, match="no 4-bit weight"):
        PackedWeight(packed.blocks, (32, 64), 4)
