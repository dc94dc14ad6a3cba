"""A Hugging Face checkpoint folder, read in place: every tensor is a view on a mapped file.

`Checkpoint.open` reads and checks the headers of all shards against the index and the config,
and touches no weight. What only the data can tell (a NaN among the scales, a `weight_shape` that
disagrees) is checked when a tensor is first handed out, so that only what is read costs time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from kimi_cpu.config import ModelConfig
from kimi_cpu.config.reader import load_json_object, shown
from kimi_cpu.errors import CheckpointError
from kimi_cpu.quant import F32, U16, Int4Weight, Weight
from kimi_cpu.store.extents import Extent, merged
from kimi_cpu.store.layout import PROJECTIONS
from kimi_cpu.store.safetensors import SafetensorsFile, TensorEntry
from kimi_cpu.store.validate import check_against_config, select

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

#: Dense tensors up to this size are searched for NaN and infinity when first handed out. Larger
#: ones are left to `find_non_finite`: reading 21 GB at start would cost what loading must not.
CHECK_BYTES = 1 << 20

_MAX_INDEX_BYTES = 256 << 20
_INCOMPLETE = "The download is incomplete or mixed from two models: fetch the checkpoint again."
_DAMAGED = "The file is damaged: download it again."


class Checkpoint:
    """An open checkpoint. Names are without K2.5's `language_model.` prefix.

    Attributes:
        folder: where it lies.
        config: its ModelConfig.
        n_files, file_bytes: how many weight files it has, and their size.
        total_bytes: bytes of all tensors of the language model.
        expert_bytes: those of the routed experts.
        trunk_bytes: the rest (embedding included).
    """

    def __init__(
        self, folder: Path, config: ModelConfig, files: list[SafetensorsFile],
        tensors: dict[str, SafetensorsFile],
    ) -> None:  # fmt: skip
        """Use `Checkpoint.open`."""
        self.folder = folder
        self.config = config
        self.n_files = len(files)
        self.file_bytes = sum(file.size for file in files)
        self._files = files
        self._tensors = tensors
        self._checked: set[str] = set()
        prefix = config.tensor_prefix
        self.total_bytes = self.expert_bytes = 0
        for name, file in tensors.items():
            n_bytes = file.nbytes(prefix + name)
            self.total_bytes += n_bytes
            if ".mlp.experts." in name:
                self.expert_bytes += n_bytes
        self.trunk_bytes = self.total_bytes - self.expert_bytes

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Open and validate a checkpoint folder; reads headers only.

        Raises ConfigError or CheckpointError naming the file and the key or tensor.
        """
        folder = Path(folder)
        config = ModelConfig.load(folder)
        files: list[SafetensorsFile] = []
        try:
            with _gc_paused():
                stored = _open_shards(folder, files)
                tensors = select(config, stored)
                check_against_config(folder, config, tensors)
                return cls(folder, config, files, tensors)
        except BaseException:
            for file in files:
                file.close()
            raise

    def names(self) -> Iterator[str]:
        """Names of all tensors of the language model."""
        return iter(self._tensors)

    def entry(self, name: str) -> TensorEntry:
        """dtype, shape and byte range within its file of tensor `name`, without reading it."""
        return self._tensors[name].entry(self.config.tensor_prefix + name)

    def file_of(self, name: str) -> Path:
        """The file that holds tensor `name`."""
        return self._tensors[name].path

    def tensor(self, name: str) -> U16 | F32:
        """A dense tensor as a read-only view: uint16 bits for BF16, float32 for F32.

        Raises CheckpointError if it is small (`CHECK_BYTES`) and holds NaN or infinity.
        """
        array = cast("U16 | F32", self._raw(name))
        if array.nbytes <= CHECK_BYTES and name not in self._checked:
            self._check_finite(name, array)
            self._checked.add(name)
        return array

    def linear(self, name: str) -> Weight:
        """The weight [out, in] of the linear layer `name`, e.g. "model.layers.0.mlp.up_proj".

        INT4 if the checkpoint has `name.weight_packed`, else bf16 bits or float32. A tied
        "lm_head" is the embedding. Raises CheckpointError if INT4 scales are not finite.
        """
        if name == "lm_head" and self.config.tie_word_embeddings:
            return self.tensor("model.embed_tokens.weight")
        packed_name = f"{name}.weight_packed"
        if packed_name not in self._tensors:
            return self.tensor(f"{name}.weight")
        out_features, words = self.entry(packed_name).shape
        file = self._tensors[packed_name]
        packed = file.bytes_of(self.config.tensor_prefix + packed_name)
        scale = cast(U16, self._raw(f"{name}.weight_scale"))
        if name not in self._checked:
            self._check_finite(f"{name}.weight_scale", scale)
            self._check_weight_shape(f"{name}.weight_shape", (out_features, words * 8))
            self._checked.add(name)
        return Int4Weight(packed=packed.reshape(out_features, words * 4), scale=scale)

    def expert(self, layer: int, expert: int) -> tuple[Weight, Weight, Weight]:
        """(gate, up, down) of one routed expert: [I, D], [I, D], [D, I]."""
        base = f"model.layers.{layer}.mlp.experts.{expert}"
        gate, up, down = (self.linear(f"{base}.{projection}") for projection in PROJECTIONS)
        return gate, up, down

    def expert_extents(self, layer: int, expert: int) -> list[Extent]:
        """Where the bytes of one routed expert lie: few long ranges, in the order of the files.

        In published files two: the packed weights with their shapes, and the scales.
        """
        base = f"model.layers.{layer}.mlp.experts.{expert}"
        extents = []
        for projection in PROJECTIONS:
            for part in ("weight", "weight_packed", "weight_scale", "weight_shape"):
                name = f"{base}.{projection}.{part}"
                if name in self._tensors:
                    entry = self.entry(name)
                    extents.append(Extent(self.file_of(name), entry.begin, entry.nbytes))
        return merged(extents)

    def find_non_finite(self, names: Iterable[str] | None = None) -> CheckpointError | None:
        """Search tensors for NaN or infinity, reading them whole (default: all but experts).

        Returns an error that names the first culprit, or None. Meant for the moment when logits
        came out non-finite: it tells a damaged file from a bug.
        """
        if names is None:
            names = (name for name in self._tensors if ".mlp.experts." not in name)
        for name in names:
            if self.entry(name).dtype in ("BF16", "F32"):
                try:
                    self._check_finite(name, self._raw(name))
                except CheckpointError as exc:
                    return exc
        return None

    def close(self) -> None:
        """Close the files; arrays already handed out stay valid."""
        for file in self._files:
            file.close()

    def _raw(self, name: str) -> npt.NDArray[Any]:
        return self._tensors[name].tensor(self.config.tensor_prefix + name)

    def _check_finite(self, name: str, array: npt.NDArray[Any]) -> None:
        if not _is_finite(array):
            stored_name = self.config.tensor_prefix + name
            raise CheckpointError(
                f"{self.file_of(name)}: {stored_name} holds NaN or infinity", _DAMAGED
            )

    def _check_weight_shape(self, name: str, expected: tuple[int, int]) -> None:
        if name not in self._tensors:
            return
        found = tuple(int(n) for n in self._raw(name))
        if found != expected:
            raise CheckpointError(
                f"{self.file_of(name)}: {self.config.tensor_prefix}{name} says {list(found)}, "
                f"the packed weight is {list(expected)}",
                _DAMAGED,
            )


@contextmanager
def _gc_paused() -> Iterator[None]:
    """Parsing 200,000 header entries creates no garbage cycles; collecting takes half the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _is_finite(array: npt.NDArray[Any]) -> bool:
    """No NaN, no infinity. For bf16 bits by two maxima, without a temporary array."""
    if array.size == 0:
        return True
    if array.dtype == np.uint16:
        # Infinity and NaN are the largest bit patterns of either sign: seen as int16 those of
        # positive sign come out on top, seen as uint16 those of negative sign.
        return bool(array.view(np.int16).max() < 0x7F80 and array.max() < 0xFF80)
    return bool(np.isfinite(array.min()) and np.isfinite(array.max()))


def _open_shards(folder: Path, files: list[SafetensorsFile]) -> dict[str, SafetensorsFile]:
    """Open every shard, appending to `files`; returns stored name -> file."""
    index_path = folder / INDEX_NAME
    stored: dict[str, SafetensorsFile] = {}
    if not index_path.exists():
        if not (folder / SINGLE_NAME).exists():
            raise CheckpointError(
                f"{folder}: neither {INDEX_NAME} nor {SINGLE_NAME} is here",
                "Give the folder of a Hugging Face checkpoint in safetensors format.",
            )
        files.append(SafetensorsFile(folder / SINGLE_NAME))
        return dict.fromkeys(files[0].names(), files[0])
    weight_map = _read_index(index_path)
    for shard_name in sorted(set(weight_map.values())):
        file = SafetensorsFile(folder / shard_name)
        files.append(file)
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


def _read_index(path: Path) -> dict[str, str]:
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
