"""Where the routed experts of a packed checkpoint lie: one record an expert (docs/format.md)."""

from __future__ import annotations

from itertools import accumulate
from math import prod
from typing import NamedTuple

from kimi_cpu.config import ModelConfig
from kimi_cpu.quant import GROUP_SIZE, U8, PackedWeight, packed_shape

#: What a record may be aligned to: the page of most machines, or that of some ARM ones.
ALIGNMENTS = (4096, 65536)

#: An expert file is at most about this long. FAT32 would take it, and little is lost with one.
FILE_BYTES = 4_000_000_000


class Place(NamedTuple):
    """A record: the number of its file, from 0, and its first byte there."""

    file: int
    offset: int


class ExpertRecords:
    """The geometry of all expert files.

    Attributes:
        layers: the layers that have routed experts, in order.
        count: how many records there are.
        shapes: (out_features, in_features) of gate, up and down.
        record_bytes: bytes of one record.
        stride: distance of two records, `record_bytes` rounded up to `align`.
        records_per_file: as many as every file but the last has.
        file_records: how many each file has.
    """

    def __init__(self, config: ModelConfig, align: int, records_per_file: int) -> None:
        """Raises ValueError if these experts have no whole groups of 32 weights."""
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        if hidden % GROUP_SIZE or inner % GROUP_SIZE:
            raise ValueError(f"{hidden} x {inner} experts have no whole groups of {GROUP_SIZE}")
        self.layers = config.moe_layers
        self.n_experts = config.n_routed_experts
        self.count = len(self.layers) * self.n_experts
        self.shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
        self._block_shapes = [packed_shape(*shape, 4) for shape in self.shapes]
        self._ends = list(accumulate(prod(shape) for shape in self._block_shapes))
        self.record_bytes = self._ends[-1]
        self.stride = -(-self.record_bytes // align) * align
        self.records_per_file = records_per_file
        whole, rest = divmod(self.count, records_per_file)
        self.file_records = [records_per_file] * whole + ([rest] if rest else [])
        self._position = {layer: i for i, layer in enumerate(self.layers)}

    @staticmethod
    def file_name(number: int) -> str:
        """Name of file `number`, from 0."""
        return f"experts-{number + 1:05d}.kcpu"

    def place(self, layer: int, expert: int) -> Place:
        """Where the record of an expert lies. KeyError or IndexError if there is none."""
        if not 0 <= expert < self.n_experts:
            raise IndexError(f"there is no expert {expert}")
        i = self._position[layer] * self.n_experts + expert
        file, i = divmod(i, self.records_per_file)
        return Place(file, i * self.stride)

    def chunks(self, count: int) -> list[tuple[int, int]]:
        """(offset, length) of the first `count` records of a file."""
        return [(i * self.stride, self.record_bytes) for i in range(count)]

    def part(self, projection: int) -> tuple[int, int, tuple[int, int]]:
        """Begin and end within a record, and shape, of gate (0), up (1) or down (2)."""
        end = self._ends[projection]
        return end - prod(self._block_shapes[projection]), end, self.shapes[projection]

    def weights(self, record: U8) -> tuple[PackedWeight, PackedWeight, PackedWeight]:
        """(gate, up, down) as views on the bytes of a record, uint8 [record_bytes or more]."""
        gate, up, down = (
            PackedWeight(record[begin:end].reshape(blocks), shape, bits=4)
            for (begin, end, shape), blocks in zip(
                map(self.part, range(3)), self._block_shapes, strict=True
            )
        )
        return gate, up, down


def records_per_file(config: ModelConfig, align: int, file_bytes: int = FILE_BYTES) -> int:
    """How many records fit into a file of about `file_bytes`, at least 1."""
    return max(1, file_bytes // ExpertRecords(config, align, 1).stride)
