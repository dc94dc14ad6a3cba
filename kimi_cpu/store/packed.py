"""A repacked checkpoint (docs/format.md): experts and trunk in the kernels' order, mapped."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from kimi_cpu.config import ModelConfig
from kimi_cpu.config.reader import shown
from kimi_cpu.errors import CheckpointError
from kimi_cpu.quant import BLOCK_ROWS, F32, GROUP_SIZE, U8, U16, PackedWeight, Weight, packed_shape
from kimi_cpu.store.checkpoint import MANIFEST_NAME, Checkpoint
from kimi_cpu.store.extents import Extent
from kimi_cpu.store.layout import PROJECTIONS, trunk_linears, vectors
from kimi_cpu.store.manifest import Manifest, WeightFile, load_manifest
from kimi_cpu.store.mapping import MappedFile
from kimi_cpu.store.records import ExpertRecords
from kimi_cpu.store.safetensors import SafetensorsFile, TensorEntry
from kimi_cpu.store.tensors import Tensors, is_finite
from kimi_cpu.store.validate import DENSE, TensorCheck, surplus

#: A packed linear layer's tensor is named like the layer with this behind it.
BLOCKS = ".weight_blocks"

_EXPERT_NAME = re.compile(
    rf"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.({'|'.join(PROJECTIONS)}){re.escape(BLOCKS)}"
)
_INCOMPLETE = "The folder is incomplete: copy all of it, or repack the checkpoint again."
_MISMATCH = "config.json and the manifest belong to different models: repack again."
_DAMAGED = "The file is damaged: repack the checkpoint again."


class PackedCheckpoint(Checkpoint):
    """An open packed checkpoint.

    An expert's projections count as tensors named `...gate_proj.weight_blocks`, though they are no
    tensors of a safetensors file. `entry` gives the dtype of packed tensors as INT4 or INT8.

    Attributes:
        manifest: what `kimi-cpu.json` says.
        records: where experts lie.
    """

    def __init__(
        self, folder: Path, config: ModelConfig, manifest: Manifest, records: ExpertRecords,
        expert_files: list[MappedFile], trunk_files: list[SafetensorsFile],
    ) -> None:  # fmt: skip
        """Use `Checkpoint.open`."""
        super().__init__(folder, config)
        self.manifest = manifest
        self.records = records
        self._expert_files = expert_files
        by_name = {name: file for file in trunk_files for name in file.names()}
        self._trunk = Tensors(by_name)
        self._shapes = {name: (n, m) for name, n, m in trunk_linears(config)}
        self._checked: set[str | tuple[int, int]] = set()
        self._files = [*expert_files, *trunk_files]
        for file in self._files:
            self.n_files += 1
            self.file_bytes += file.size
        for name in self._trunk:
            self._count(name, self._trunk.entry(name).nbytes)
        self.expert_bytes = records.count * records.record_bytes
        self.total_bytes += self.expert_bytes

    @classmethod
    def load(cls, folder: Path, config: ModelConfig) -> PackedCheckpoint:
        """Open and validate; reads the manifest and headers only. Raises CheckpointError."""
        manifest = load_manifest(folder)
        records = _records(folder / MANIFEST_NAME, config, manifest)
        expert_files: list[MappedFile] = []
        trunk_files: list[SafetensorsFile] = []
        try:
            for listed in manifest.expert_files:
                _check_size(folder / listed.name, listed)
                expert_files.append(MappedFile(folder / listed.name, 1, _INCOMPLETE))
            for listed in manifest.trunk_files:
                _check_size(folder / listed.name, listed)
                trunk_files.append(SafetensorsFile(folder / listed.name))
            _check_trunk(folder, config, trunk_files)
            return cls(folder, config, manifest, records, expert_files, trunk_files)
        except BaseException:
            for mapped in expert_files:
                mapped.close()
            for file in trunk_files:
                file.close()
            raise

    def names(self) -> Iterator[str]:
        yield from self._trunk
        for layer in self.records.layers:
            for expert in range(self.records.n_experts):
                for projection in PROJECTIONS:
                    yield f"model.layers.{layer}.mlp.experts.{expert}.{projection}{BLOCKS}"

    def entry(self, name: str) -> TensorEntry:
        if name in self._trunk:
            entry = self._trunk.entry(name)
            if not name.endswith(BLOCKS):
                return entry
            return entry._replace(dtype="INT8" if _bits(entry) == 8 else "INT4")
        layer, expert, projection = _expert_name(name)
        place = self.records.place(layer, expert)
        begin, end, shape = self.records.part(PROJECTIONS.index(projection))
        return TensorEntry("INT4", shape, place.offset + begin, place.offset + end)

    def file_of(self, name: str) -> Path:
        if name in self._trunk:
            return self._trunk.file_of(name)
        layer, expert, _ = _expert_name(name)
        return self._expert_files[self.records.place(layer, expert).file].path

    def tensor(self, name: str) -> U16 | F32:
        return self._trunk.dense(name)

    def linear(self, name: str) -> Weight:
        if name == "lm_head" and self.config.tie_word_embeddings:
            return self.tensor("model.embed_tokens.weight")
        if ".mlp.experts." in name:
            layer, expert, projection = _expert_name(name + BLOCKS)
            return self.expert(layer, expert)[PROJECTIONS.index(projection)]
        if name + BLOCKS not in self._trunk:
            return self._trunk.linear(name)
        weight = self._packed(name)
        if name not in self._checked:
            self._check_scales(name, weight, self.file_of(name + BLOCKS))
            self._checked.add(name)
        return weight

    def expert(self, layer: int, expert: int) -> tuple[Weight, Weight, Weight]:
        place = self.records.place(layer, expert)
        file = self._expert_files[place.file]
        record = file.view(np.uint8, self.records.record_bytes, place.offset)
        return self._expert_weights(layer, expert, record)

    def expert_extents(self, layer: int, expert: int) -> list[Extent]:
        place = self.records.place(layer, expert)
        path = self._expert_files[place.file].path
        return [Extent(path, place.offset, self.records.record_bytes)]

    def expert_from(
        self, layer: int, expert: int, buffers: Sequence[U8]
    ) -> tuple[Weight, Weight, Weight]:
        (record,) = buffers
        return self._expert_weights(layer, expert, record)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _expert_weights(
        self, layer: int, expert: int, record: U8
    ) -> tuple[PackedWeight, PackedWeight, PackedWeight]:
        weights = self.records.weights(record)
        if (layer, expert) not in self._checked:
            base = f"model.layers.{layer}.mlp.experts.{expert}"
            path = self._expert_files[self.records.place(layer, expert).file].path
            for projection, weight in zip(PROJECTIONS, weights, strict=True):
                self._check_scales(f"{base}.{projection}", weight, path)
            self._checked.add((layer, expert))
        return weights

    def _packed(self, name: str) -> PackedWeight:
        """A packed linear layer of the trunk, unchecked."""
        blocks = self._trunk.raw(name + BLOCKS)
        return PackedWeight(blocks, self._shapes[name], _bits(self._trunk.entry(name + BLOCKS)))

    def _check_finite(self, name: str) -> None:
        if name not in self._trunk:
            layer, expert, _ = _expert_name(name)
            self._checked.discard((layer, expert))
            self.expert(layer, expert)
        elif name.endswith(BLOCKS):
            layer_name = name.removesuffix(BLOCKS)
            self._check_scales(layer_name, self._packed(layer_name), self.file_of(name))
        elif self.entry(name).dtype in ("BF16", "F32"):
            self._trunk.check_finite(name, self._trunk.raw(name))

    def _check_scales(self, name: str, weight: PackedWeight, path: Path) -> None:
        if not is_finite(scales(weight)):
            raise CheckpointError(f"{path}: {name}: a scale is NaN or infinity", _DAMAGED)


def scales(weight: PackedWeight) -> U16:
    """All scales of a packed weight, bf16 bits as a uint16 view [row blocks, column blocks, 32]."""
    return weight.blocks[:, :, -2 * 2 * BLOCK_ROWS :].view(np.uint16)


def keeps_its_form(name: str) -> bool:
    """Whether a linear layer of the trunk is stored as published, whatever the trunk's form.

    `kv_b_proj` is multiplied from both sides (attention absorbs its halves into the query and the
    output); the kernels' order serves one side only.
    """
    return name.endswith(".kv_b_proj")


def _bits(entry: TensorEntry) -> int:
    return 8 if entry.shape[2] == packed_shape(1, 1, 8)[2] else 4


def _expert_name(name: str) -> tuple[int, int, str]:
    """Layer, expert and projection of the name of an expert's tensor; KeyError for another."""
    match = _EXPERT_NAME.fullmatch(name)
    if match is None:
        raise KeyError(name)
    return int(match[1]), int(match[2]), match[3]


def _check_size(path: Path, listed: WeightFile) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file", _INCOMPLETE)
    size = path.stat().st_size
    if size != listed.n_bytes:
        raise CheckpointError(
            f"{path}: has {size} bytes, {MANIFEST_NAME} says {listed.n_bytes}", _INCOMPLETE
        )


def _records(path: Path, config: ModelConfig, manifest: Manifest) -> ExpertRecords:
    """The experts' geometry by the config, if the manifest lists exactly such files."""
    try:
        records = ExpertRecords(config, manifest.align, manifest.records_per_file)
    except ValueError as exc:
        raise CheckpointError(f"{path}: {exc}", _MISMATCH) from None
    if len(manifest.expert_files) != len(records.file_records):
        raise CheckpointError(
            f"{path}: {len(manifest.expert_files)} expert files, "
            f"config.json asks for {len(records.file_records)}",
            _MISMATCH,
        )
    for i, (listed, count) in enumerate(
        zip(manifest.expert_files, records.file_records, strict=True)
    ):
        fits = listed.name == records.file_name(i) and listed.n_bytes == count * records.stride
        if not fits or [chunk[:2] for chunk in listed.chunks] != records.chunks(count):
            raise CheckpointError(
                f"{path}: {listed.name} is not what config.json asks for: {count} records of "
                f"{records.record_bytes} bytes",
                _MISMATCH,
            )
    return records


def _check_trunk(folder: Path, config: ModelConfig, files: list[SafetensorsFile]) -> None:
    """Every tensor of the trunk is there, in a form that it may have, and no other."""
    tensors: dict[str, SafetensorsFile] = {}
    for file in files:
        for name in file.names():
            if name in tensors:
                raise CheckpointError(f"{file.path}: {shown(name)} is there twice", _DAMAGED)
            tensors[name] = file
    check = TensorCheck(folder, "", tensors)
    for name, shape in vectors(config):
        check.tensor(name, shape, DENSE)
    for name, out_features, in_features in trunk_linears(config):
        packable = not keeps_its_form(name) and in_features % GROUP_SIZE == 0
        if name + BLOCKS in tensors and packable:
            entry = tensors[name + BLOCKS].entry(name + BLOCKS)
            bits = _bits(entry) if len(entry.shape) == 3 else 8
            check.tensor(name + BLOCKS, packed_shape(out_features, in_features, bits), ("U8",))
        else:
            check.linear(name, out_features, in_features)
    for name, file in tensors.items():
        if name not in check.seen:
            raise surplus(file, name)
