"""The packed layout holds the same numbers, block by block where its description says."""

from __future__ import annotations

import numpy as np
import pytest

from kimi_cpu.quant import (
    U8,
    Int4Weight,
    Int8Weight,
    PackedWeight,
    bf16_to_f32,
    dequantize,
    f32_to_bf16,
    pack,
    packed_shape,
    quantize_int4,
    quantize_int8,
    rows_of,
    unpack,
    unpack_int4,
)


def blocks_by_definition(weight: Int4Weight | Int8Weight) -> U8:
    """The packed layout byte by byte, as `PackedWeight` describes it."""
    (rows, columns), bits = weight.shape, 4 if isinstance(weight, Int4Weight) else 8
    row_blocks, column_blocks, size = packed_shape(rows, columns, bits)
    if isinstance(weight, Int4Weight):
        values, zero = weight.packed, 0x88
    else:
        groups = (weight.q.view(np.uint8) ^ 0x80).reshape(rows, -1, 16, 2)
        values, zero = groups.swapaxes(2, 3).reshape(rows, columns), 0x80
    padded = np.full((16 * row_blocks, column_blocks * 8 * bits), zero, dtype=np.uint8)
    padded[:rows, : values.shape[1]] = values
    scale = np.zeros((16 * row_blocks, 2 * column_blocks), dtype=np.uint16)
    scale[:rows, : weight.scale.shape[1]] = weight.scale
    blocks = np.empty((row_blocks, column_blocks, size), dtype=np.uint8)
    # [row block, row, column block, vector, byte] -> [row block, column block, vector, row, byte]
    cells = padded.reshape(row_blocks, 16, column_blocks, 2 * bits, 4).transpose(0, 2, 3, 1, 4)
    blocks[:, :, : 128 * bits] = cells.reshape(row_blocks, column_blocks, -1)
    cells = scale.view(np.uint8).reshape(row_blocks, 16, column_blocks, 2, 2)
    cells = cells.transpose(0, 2, 3, 1, 4)
    blocks[:, :, 128 * bits :] = cells.reshape(row_blocks, column_blocks, -1)
    return blocks


SHAPES = [(16, 64), (1, 32), (17, 96), (48, 192), (5, 160)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quantize", [quantize_int4, quantize_int8])
def test_unpacking_gives_the_weight_back(shape, quantize):
    weight = quantize(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    packed = pack(weight)
    np.testing.assert_array_equal(packed.blocks, blocks_by_definition(weight))
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


@pytest.mark.parametrize("make", [
    lambda w: w, f32_to_bf16, quantize_int4, lambda w: pack(quantize_int4(w)),
    lambda w: pack(quantize_int8(w)),
])  # fmt: skip
def test_rows_are_those_of_the_whole(make):
    weight = make(np.random.default_rng(2).standard_normal((60, 96)).astype(np.float32))
    whole = dequantize(weight)
    for start, stop in ((0, 16), (16, 48), (32, 60), (0, 60)):
        rows = rows_of(weight, start, stop)
        assert rows.shape == (stop - start, 96)
        np.testing.assert_array_equal(dequantize(rows), whole[start:stop])


def test_a_block_of_rows_is_not_cut():
    packed = pack(quantize_int4(np.ones((60, 64), np.float32)))
    for start, stop in ((8, 32), (0, 24)):
        with pytest.raises(ValueError, match="cut a block"):
            rows_of(packed, start, stop)
