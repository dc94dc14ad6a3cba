"""What a packed checkpoint will consist of: its files and the pieces that they are written in.

Everything is known from the source's headers: where each piece goes, how long it is, and which
shards it is made from. So pieces can be written in any order, by several threads, and after an
interruption only those that are missing; the result is the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from kimi_cpu.errors import CheckpointError
from kimi_cpu.quant import BLOCK_ROWS, GROUP_SIZE, packed_shape
from kimi_cpu.store.layout import PROJECTIONS, trunk_linears, vectors
from kimi_cpu.store.packed import BLOCKS, keeps_its_form
from kimi_cpu.store.records import FILE_BYTES, ExpertRecords, records_per_file
from kimi_cpu.store.repack.source import Source
from kimi_cpu.store.safetensors import NUMPY_DTYPES

#: Bytes of the source that one piece of the trunk is made from, at most about.
TRUNK_PIECE_BYTES = 16 << 20

#: Where tensors of the trunk begin in their file, those of whole blocks at least.
TENSOR_ALIGN = 64


class ExpertJob(NamedTuple):
    """Pack a routed expert."""

    layer: int
    expert: int


class RowsJob(NamedTuple):
    """Rows [begin, end) of a tensor of the trunk.

    how: "copy" (name is the tensor's), "pack" (an INT4 layer's as they are) or "round8", "round4"
    (name is the layer's).
    """

    name: str
    begin: int
    end: int
    how: str


class BytesJob(NamedTuple):
    """Given bytes: a header."""

    data: bytes


class Piece(NamedTuple):
    """What is written at once: [offset, offset + length) of a file.

    shards: numbers of the source's shards that it is made from.
    """

    file: str
    offset: int
    length: int
    shards: tuple[int, ...]
    job: ExpertJob | RowsJob | BytesJob


@dataclass(frozen=True)
class Options:
    """How to repack.

    Attributes:
        trunk: the form of the trunk's linear layers, one of manifest.TRUNK_FORMS.
        align: what experts' records are aligned to, one of records.ALIGNMENTS.
        file_bytes: size of a weight file, about.
    """

    trunk: str = "int8"
    align: int = 4096
    file_bytes: int = FILE_BYTES


class TargetTensor(NamedTuple):
    """A tensor of the trunk as it will be stored, and how it comes about (see RowsJob)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    how: str
    source_name: str
    source_rows: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * NUMPY_DTYPES[self.dtype].itemsize


class Layout:
    """Files and pieces of the packed form of `source`.

    Attributes:
        source, options: what is repacked and how.
        records: where experts go.
        expert_files, trunk_files: name -> bytes.
        pieces: in the order in which shards are needed.
    """

    def __init__(self, source: Source, options: Options) -> None:
        """Raises CheckpointError if the source's experts are not INT4."""
        _check_experts(source)
        self.source = source
        self.options = options
        config = source.config
        try:
            per_file = records_per_file(config, options.align, options.file_bytes)
            self.records = ExpertRecords(config, options.align, per_file)
        except ValueError as exc:
            raise CheckpointError(f"{source.folder}: {exc}", _NOT_INT4) from None
        self.expert_files = {
            self.records.file_name(i): count * self.records.stride
            for i, count in enumerate(self.records.file_records)
        }
        self.trunk_files: dict[str, int] = {}
        pieces = [*self._expert_pieces(), *self._trunk_pieces()]
        self.pieces = sorted(
            pieces, key=lambda piece: (max(piece.shards, default=-1), piece.file, piece.offset)
        )
        self.n_bytes = sum(self.expert_files.values()) + sum(self.trunk_files.values())

    def last_use(self) -> list[int]:
        """For each shard the index of the last of `pieces` that needs it, -1 if none does."""
        last = [-1] * len(self.source.shards)
        for i, piece in enumerate(self.pieces):
            for shard in piece.shards:
                last[shard] = i
        return last

    def source_bytes(self, piece: Piece) -> int:
        """What must be read for a piece."""
        source, job = self.source, piece.job
        if isinstance(job, ExpertJob):
            return sum(source.entry(name).nbytes for name in expert_tensors(source, job))
        if isinstance(job, BytesJob):
            return 0
        names = [job.name] if job.how == "copy" else layer_tensors(source, job.name)
        rows = source.entry(names[0]).shape[0]
        return sum(source.entry(name).nbytes for name in names) * (job.end - job.begin) // rows

    def _expert_pieces(self) -> Iterator[Piece]:
        records, source = self.records, self.source
        for layer in records.layers:
            for expert in range(records.n_experts):
                place = records.place(layer, expert)
                job = ExpertJob(layer, expert)
                shards = {source.shard_of(name) for name in expert_tensors(source, job)}
                yield Piece(
                    records.file_name(place.file),
                    place.offset,
                    records.record_bytes,
                    tuple(sorted(shards)),
                    job,
                )

    def _trunk_pieces(self) -> Iterator[Piece]:
        files: list[list[TargetTensor]] = [[]]
        n_bytes = 0
        for tensor in trunk_tensors(self.source, self.options.trunk):
            if files[-1] and n_bytes + tensor.nbytes > self.options.file_bytes:
                files.append([])
                n_bytes = 0
            files[-1].append(tensor)
            n_bytes += tensor.nbytes
        for i, tensors in enumerate(files, start=1):
            yield from self._trunk_file(f"trunk-{i:05d}.safetensors", tensors)

    def _trunk_file(self, file: str, tensors: list[TargetTensor]) -> Iterator[Piece]:
        # The format allows no holes: those that would shift what follows come last, and among
        # them the wider types first, so that each is aligned to its own.
        def rank(tensor: TargetTensor) -> int:
            if tensor.nbytes % TENSOR_ALIGN == 0:
                return 0
            return -NUMPY_DTYPES[tensor.dtype].itemsize + 16

        ordered = sorted(tensors, key=rank)
        header: dict[str, Any] = {"__metadata__": {"format": "kimi-cpu packed trunk"}}
        position = 0
        for tensor in ordered:
            header[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [position, position + tensor.nbytes],
            }
            position += tensor.nbytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-(8 + len(encoded)) % TENSOR_ALIGN)
        head = len(encoded).to_bytes(8, "little") + encoded
        yield Piece(file, 0, len(head), (), BytesJob(head))
        offset = len(head)
        for tensor in ordered:
            yield from self._tensor_pieces(file, offset, tensor)
            offset += tensor.nbytes
        self.trunk_files[file] = offset

    def _tensor_pieces(self, file: str, offset: int, tensor: TargetTensor) -> Iterator[Piece]:
        source, copy = self.source, tensor.how == "copy"
        names = [tensor.source_name] if copy else layer_tensors(source, tensor.source_name)
        shards = tuple(sorted({source.shard_of(name) for name in names}))
        n_rows = tensor.source_rows
        row_bytes = sum(source.entry(name).nbytes for name in names) // n_rows
        # Rows of a copy are rows; else they go by blocks of 16, the first axis of the target.
        unit = 1 if copy else BLOCK_ROWS
        step = max(1, TRUNK_PIECE_BYTES // row_bytes // unit) * unit
        unit_bytes = tensor.nbytes // tensor.shape[0]
        for begin in range(0, n_rows, step):
            end = min(begin + step, n_rows)
            length = -(-(end - begin) // unit) * unit_bytes
            job = RowsJob(tensor.source_name, begin, end, tensor.how)
            yield Piece(file, offset, length, shards, job)
            offset += length


def expert_tensors(source: Source, job: ExpertJob) -> list[str]:
    """Names of an expert's tensors in the source."""
    base = f"model.layers.{job.layer}.mlp.experts.{job.expert}"
    return [name for proj in PROJECTIONS for name in layer_tensors(source, f"{base}.{proj}")]


def layer_tensors(source: Source, name: str) -> list[str]:
    """Names of a linear layer's tensors in the source."""
    names = [f"{name}.weight_{part}" for part in ("packed", "scale", "shape")]
    return [n for n in names if n in source] or [f"{name}.weight"]


def trunk_tensors(source: Source, form: str) -> Iterator[TargetTensor]:
    """The trunk's tensors in order: embedding, layer by layer, norm, head."""

    def copied(name: str) -> TargetTensor:
        entry = source.entry(name)
        return TargetTensor(name, entry.dtype, entry.shape, "copy", name, entry.shape[0])

    def linear(name: str, out_features: int, in_features: int) -> Iterator[TargetTensor]:
        int4 = f"{name}.weight_packed" in source
        rounded = form != "bf16" and in_features % GROUP_SIZE == 0
        if keeps_its_form(name) or not (int4 or rounded):
            yield from map(copied, layer_tensors(source, name))
            return
        bits = 4 if int4 or form == "int4" else 8
        shape = packed_shape(out_features, in_features, bits)
        how = "pack" if int4 else f"round{bits}"
        yield TargetTensor(name + BLOCKS, "U8", shape, how, name, out_features)

    def position(tensor: TargetTensor) -> int:
        if tensor.name.startswith("model.layers."):
            return int(tensor.name.split(".")[2])
        return -1 if tensor.name.startswith("model.embed") else source.config.num_hidden_layers

    tensors = [copied(name) for name, _ in vectors(source.config)]
    for item in trunk_linears(source.config):
        tensors.extend(linear(*item))
    yield from sorted(tensors, key=position)


_NOT_INT4 = (
    "Only checkpoints with INT4 experts (compressed-tensors, groups of 32) can be repacked; "
    "others run in place."
)


def _check_experts(source: Source) -> None:
    """Raise CheckpointError if a routed expert is not INT4."""
    config = source.config
    for layer in range(config.num_hidden_layers):
        if config.is_dense_layer(layer):
            continue
        for expert in range(config.n_routed_experts):
            for projection in PROJECTIONS:
                name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
                if name in source:
                    dtype = source.entry(name).dtype
                    raise CheckpointError(
                        f"{source.file_of(name)}: {source.stored_name(name)} is {dtype}, not INT4",
                        _NOT_INT4,
                    )


def worker_bytes(layout: Layout) -> int:
    """Memory that a worker needs to make or check any piece: what it reads and what it writes."""
    most = max((layout.source_bytes(p) + p.length for p in layout.pieces), default=0)
    return most + 16 * 8192  # a piece has up to 10 parts, each read from page to page
