"""A Hugging Face checkpoint folder, read in place: every tensor is a view on a mapped file.

Opening reads and checks the headers of all shards against the index and the config, and touches
no weight. What only the data can tell (a NaN among the scales, a `weight_shape` that disagrees)
is checked when a tensor is first handed out, so that only what is read costs time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from kimi_cpu.config import ModelConfig
from kimi_cpu.config.reader import load_json_object, shown
from kimi_cpu.errors import CheckpointError
from kimi_cpu.quant import F32, U8, U16, Int4Weight, Weight
from kimi_cpu.store.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from kimi_cpu.store.extents import Extent, merged
from kimi_cpu.store.layout import PROJECTIONS
from kimi_cpu.store.safetensors import NUMPY_DTYPES, SafetensorsFile, TensorEntry
from kimi_cpu.store.tensors import Tensors
from kimi_cpu.store.validate import Header, check_against_config, select

_MAX_INDEX_BYTES = 256 << 20
_INCOMPLETE = "The download is incomplete or mixed from two models: fetch the checkpoint again."


class PublishedCheckpoint(Checkpoint):
    """An open checkpoint in the published format."""

    def __init__(
        self, folder: Path, config: ModelConfig, files: list[SafetensorsFile],
        tensors: dict[str, SafetensorsFile],
    ) -> None:  # fmt: skip
        """Use `Checkpoint.open`."""
        super().__init__(folder, config)
        self._files = files
        self._tensors = Tensors(tensors, config.tensor_prefix)
        for file in files:
            self.n_files += 1
            self.file_bytes += file.size
        for name, file in tensors.items():
            self._count(name, file.nbytes(config.tensor_prefix + name))

    @classmethod
    def load(cls, folder: Path, config: ModelConfig) -> PublishedCheckpoint:
        """Open and validate; reads headers only. Raises CheckpointError."""
        files: list[SafetensorsFile] = []
        try:
            with gc_paused():
                stored = _open_shards(folder, files)
                tensors = select(config, stored)
                check_against_config(folder, config, tensors)
                return cls(folder, config, files, tensors)
        except BaseException:
            for file in files:
                file.close()
            raise

    def names(self) -> Iterator[str]:
        return iter(self._tensors)

    def entry(self, name: str) -> TensorEntry:
        return self._tensors.entry(name)

    def file_of(self, name: str) -> Path:
        return self._tensors.file_of(name)

    def tensor(self, name: str) -> U16 | F32:
        return self._tensors.dense(name)

    def linear(self, name: str) -> Weight:
        if name == "lm_head" and self.config.tie_word_embeddings:
            return self.tensor("model.embed_tokens.weight")
        return self._tensors.linear(name)

    def expert(self, layer: int, expert: int) -> tuple[Weight, Weight, Weight]:
        base = f"model.layers.{layer}.mlp.experts.{expert}"
        gate, up, down = (self.linear(f"{base}.{projection}") for projection in PROJECTIONS)
        return gate, up, down

    def expert_extents(self, layer: int, expert: int) -> list[Extent]:
        # In published files two: the packed weights with their shapes, and the scales.
        return merged(self._expert_tensors(layer, expert).values())

    def expert_from(
        self, layer: int, expert: int, buffers: Sequence[U8]
    ) -> tuple[Weight, Weight, Weight]:
        tensors = self._expert_tensors(layer, expert)
        read = list(zip(merged(tensors.values()), buffers, strict=True))

        def array(name: str) -> npt.NDArray[Any]:
            path, begin, length = tensors[name]
            extent, buffer = next(
                (extent, buffer)
                for extent, buffer in read
                if extent.path == path and extent.offset <= begin < extent.offset + extent.length
            )
            data = buffer[begin - extent.offset :][:length]
            entry = self.entry(name)
            typed = np.require(data.view(NUMPY_DTYPES[entry.dtype]), requirements="A")
            return typed.reshape(entry.shape)

        def weight(projection: str) -> Weight:
            name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}"
            if f"{name}.weight" in tensors:
                dense: U16 | F32 = array(f"{name}.weight")
                return dense
            scale = array(f"{name}.weight_scale")
            self._tensors.check_finite(f"{name}.weight_scale", scale)
            return Int4Weight(array(f"{name}.weight_packed").view(np.uint8), scale)

        gate, up, down = map(weight, PROJECTIONS)
        return gate, up, down

    def _expert_tensors(self, layer: int, expert: int) -> dict[str, Extent]:
        """Name -> where it lies, of all tensors of a routed expert."""
        tensors = {}
        for projection in PROJECTIONS:
            for part in ("weight", "weight_packed", "weight_scale", "weight_shape"):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}.{part}"
                if name in self._tensors:
                    entry = self.entry(name)
                    tensors[name] = Extent(self.file_of(name), entry.begin, entry.nbytes)
        return tensors

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _check_finite(self, name: str) -> None:
        if self.entry(name).dtype in ("BF16", "F32"):
            self._tensors.check_finite(name, self._tensors.raw(name))


@contextmanager
def gc_paused() -> Iterator[None]:
    """Parsing 200,000 header entries creates no garbage cycles; collecting takes half the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _open_shards(folder: Path, files: list[SafetensorsFile]) -> dict[str, SafetensorsFile]:
    """Open every shard, appending to `files`; returns stored name -> file."""
    if not (folder / INDEX_NAME).exists():
        files.append(SafetensorsFile(folder / SINGLE_NAME))
        return dict.fromkeys(files[0].names(), files[0])
    weight_map = read_index(folder / INDEX_NAME)
    for shard_name in sorted(set(weight_map.values())):
        files.append(SafetensorsFile(folder / shard_name))
    return by_name(folder, weight_map, files)


def by_name(folder: Path, weight_map: dict[str, str], files: list[Header]) -> dict[str, Header]:
    """Stored name -> file, if the files hold exactly what the index says; CheckpointError if not.

    Args:
        files: all files that the index names.
    """
    stored: dict[str, Header] = {}
    for file in files:
        shard_name = file.path.name
        for name in file.names():
            expected = weight_map.get(name)
            if expected != shard_name:
                problem = f"belongs into {expected}" if expected else "is missing there"
                raise CheckpointError(
                    f"{file.path}: {shown(name)} {problem} by {INDEX_NAME}", _INCOMPLETE
                )
            stored[name] = file
    if len(stored) != len(weight_map):
        name = next(name for name in weight_map if name not in stored)
        raise CheckpointError(
            f"{folder / weight_map[name]}: {shown(name)} is not in the file, but in {INDEX_NAME}",
            _INCOMPLETE,
        )
    return stored


def read_index(path: Path) -> dict[str, str]:
    """The index: stored name -> file name, a plain one. Raises CheckpointError."""
    hint = "The index is damaged: download it again."
    weight_map = load_json_object(path, CheckpointError, hint, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is missing, empty or no object", hint)
    if not all(type(shard_name) is str for shard_name in weight_map.values()):
        raise CheckpointError(f"{path}: weight_map holds something else than file names", hint)
    for shard_name in set(weight_map.values()):
        # A plain file name only: an index must not make us open files elsewhere.
        plain = shard_name.isprintable() and not set(shard_name) & set("/\\:")
        if not plain or shard_name.startswith(".") or not shard_name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: {ascii(shard_name)[:200]} is no name of a .safetensors file beside it",
                hint,
            )
    return cast("dict[str, str]", weight_map)
