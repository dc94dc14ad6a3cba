"""One piece of a packed checkpoint: made from its source, and checked against it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np

from kimi_cpu.errors import CheckpointError
from kimi_cpu.quant import (
    BLOCK_ROWS,
    F32,
    U8,
    U16,
    Int4Weight,
    Int8Weight,
    PackedWeight,
    as_f32,
    dequantize,
    packed_shape,
    quantize_int4,
    quantize_int8,
    unpack,
)
from kimi_cpu.store.direct import ALIGN
from kimi_cpu.store.layout import PROJECTIONS
from kimi_cpu.store.repack.convert import EXACT, Deviation, Kernels, measure
from kimi_cpu.store.repack.files import Scratch, TensorReader
from kimi_cpu.store.repack.plan import (
    BytesJob,
    ExpertJob,
    Layout,
    Piece,
    RowsJob,
    expert_tensors,
)

#: Rows that are checked at once, in blocks: their float32 temporaries stay small.
_CHECK_ROW_BLOCKS = 8


def make_piece(
    layout: Layout, piece: Piece, reader: TensorReader, scratch: Scratch, kernels: Kernels
) -> tuple[U8, Deviation]:
    """The piece's bytes, uint8 [length] in scratch memory, and what rounding changed.

    Raises CheckpointError if the source is damaged or cannot be read.
    """
    job = piece.job
    if isinstance(job, BytesJob):
        return np.frombuffer(job.data, dtype=np.uint8), EXACT
    out = scratch.take(piece.length, lead=piece.offset % ALIGN)  # so that it goes to disk directly
    if isinstance(job, ExpertJob):
        for target, weight in zip(layout.records.weights(out), _expert(reader, job), strict=True):
            kernels.pack_int4(weight, target.blocks)
        return out, EXACT
    if job.how == "copy":
        rows = reader.rows(job.name, job.begin, job.end)
        out[:] = np.ascontiguousarray(rows).view(np.uint8).reshape(-1)
        return out, EXACT
    if job.how == "pack":
        int4 = _int4(reader, job.name, job.begin, job.end)
        kernels.pack_int4(int4, out.reshape(packed_shape(*int4.shape, 4)))
        return out, EXACT
    dense = _dense(reader, job)
    bits = _bits(job)
    blocks = out.reshape(packed_shape(len(dense), dense.shape[1], bits))
    return out, Deviation(*kernels.round_rows(dense, bits, blocks))


def check_piece(
    layout: Layout, piece: Piece, data: U8, reader: TensorReader
) -> tuple[bool, Deviation]:
    """Whether bytes of a packed checkpoint are what its source says, and what rounding changed.

    By `quant.unpack`, which shares nothing with what packed them: INT4 weights are unpacked and
    compared bit by bit; so are rounded ones, with the source rounded once more.
    """
    job = piece.job
    if isinstance(job, BytesJob):
        return data.tobytes() == job.data, EXACT
    if isinstance(job, ExpertJob):
        pairs = zip(layout.records.weights(data), _expert(reader, job), strict=True)
        return all(_same(unpack(packed), weight) for packed, weight in pairs), EXACT
    if job.how == "copy":
        rows = np.ascontiguousarray(reader.rows(job.name, job.begin, job.end))
        return bool(np.array_equal(data, rows.view(np.uint8).reshape(-1))), EXACT
    if job.how == "pack":
        weight = _int4(reader, job.name, job.begin, job.end)
        blocks = data.reshape(packed_shape(*weight.shape, 4))
        return _same(unpack(PackedWeight(blocks, weight.shape, 4)), weight), EXACT
    return _check_rounded(job, data, _dense(reader, job))


def _check_rounded(job: RowsJob, data: U8, dense: U16 | F32) -> tuple[bool, Deviation]:
    bits, in_features = _bits(job), dense.shape[1]
    all_blocks = data.reshape(packed_shape(len(dense), in_features, bits))
    deviation = EXACT
    for i in range(0, len(all_blocks), _CHECK_ROW_BLOCKS):
        blocks = all_blocks[i : i + _CHECK_ROW_BLOCKS]
        rows = as_f32(dense[i * BLOCK_ROWS :][: len(blocks) * BLOCK_ROWS])
        found = unpack(PackedWeight(blocks, (len(rows), in_features), bits))
        if not _same(found, quantize_int8(rows) if bits == 8 else quantize_int4(rows)):
            return False, deviation
        deviation += measure(rows, dequantize(found))
    return True, deviation


def _same(a: Int4Weight | Int8Weight, b: Int4Weight | Int8Weight) -> bool:
    if isinstance(a, Int4Weight) and isinstance(b, Int4Weight):
        return np.array_equal(a.packed, b.packed) and np.array_equal(a.scale, b.scale)
    if isinstance(a, Int8Weight) and isinstance(b, Int8Weight):
        return np.array_equal(a.q, b.q) and np.array_equal(a.scale, b.scale)
    return False


def _bits(job: RowsJob) -> int:
    return 8 if job.how == "round8" else 4


def _dense(reader: TensorReader, job: RowsJob) -> U16 | F32:
    return cast("U16 | F32", reader.rows(f"{job.name}.weight", job.begin, job.end))


def _expert(reader: TensorReader, job: ExpertJob) -> Iterator[Int4Weight]:
    reader.load(expert_tensors(reader.source, job))
    for projection in PROJECTIONS:
        yield _int4(reader, f"model.layers.{job.layer}.mlp.experts.{job.expert}.{projection}")


def _int4(reader: TensorReader, name: str, begin: int = 0, end: int | None = None) -> Int4Weight:
    packed = reader.rows(f"{name}.weight_packed", begin, end).view(np.uint8)
    shape_name = f"{name}.weight_shape"
    if shape_name in reader.source:
        found = reader.rows(shape_name).tolist()
        whole = [reader.source.entry(f"{name}.weight_packed").shape[0], packed.shape[1] * 2]
        if found != whole:
            raise CheckpointError(
                f"{reader.source.file_of(shape_name)}: {reader.source.stored_name(shape_name)} "
                f"says {found}, the packed weight is {whole}",
                "The file is damaged: download it again.",
            )
    return Int4Weight(packed, cast(U16, reader.rows(f"{name}.weight_scale", begin, end)))
