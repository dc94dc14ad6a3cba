"""A checkpoint on disk, as the engine sees it: published and read in place, or repacked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from kimi_cpu.config import ModelConfig
from kimi_cpu.errors import CheckpointError
from kimi_cpu.quant import F32, U8, U16, Weight
from kimi_cpu.store.extents import Extent
from kimi_cpu.store.mapping import MappedFile
from kimi_cpu.store.safetensors import SafetensorsFile, TensorEntry

#: The file that makes a folder a checkpoint: Hugging Face's index, the only shard of a small
#: model, or the manifest of a repacked one (docs/format.md).
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MANIFEST_NAME = "kimi-cpu.json"


class Checkpoint(ABC):
    """An open checkpoint. Names are without K2.5's `language_model.` prefix.

    Attributes:
        folder: where it lies.
        config: its ModelConfig.
        n_files, file_bytes: how many weight files it has, and their size.
        total_bytes: bytes of all tensors of the language model.
        expert_bytes: those of the routed experts.
        trunk_bytes: the rest (embedding included).
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        """Use `Checkpoint.open`."""
        self.folder = folder
        self.config = config
        self.n_files = self.file_bytes = 0
        self._files: Sequence[MappedFile | SafetensorsFile] = ()
        self.total_bytes = self.expert_bytes = self.trunk_bytes = 0

    @staticmethod
    def open(folder: str | Path) -> Checkpoint:
        """Open and validate a checkpoint folder of either format; reads headers only.

        Raises ConfigError or CheckpointError naming the file and the key or tensor.
        """
        folder = Path(folder)
        config = ModelConfig.load(folder)
        if (folder / MANIFEST_NAME).exists():
            from kimi_cpu.store.packed import PackedCheckpoint

            return PackedCheckpoint.load(folder, config)
        if not (folder / INDEX_NAME).exists() and not (folder / SINGLE_NAME).exists():
            raise CheckpointError(
                f"{folder}: neither {INDEX_NAME} nor {SINGLE_NAME} is here",
                "Give the folder of a Hugging Face checkpoint in safetensors format.",
            )
        from kimi_cpu.store.published import PublishedCheckpoint

        return PublishedCheckpoint.load(folder, config)

    @abstractmethod
    def names(self) -> Iterator[str]:
        """Names of all tensors of the language model."""

    @abstractmethod
    def entry(self, name: str) -> TensorEntry:
        """dtype, shape and byte range within its file of tensor `name`, without reading it."""

    @abstractmethod
    def file_of(self, name: str) -> Path:
        """The file that holds tensor `name`."""

    @abstractmethod
    def tensor(self, name: str) -> U16 | F32:
        """A dense tensor as a read-only view: uint16 bits for BF16, float32 for F32.

        Raises CheckpointError if it is small (`tensors.CHECK_BYTES`) and holds NaN or infinity.
        """

    @abstractmethod
    def linear(self, name: str) -> Weight:
        """The weight [out, in] of the linear layer `name`, e.g. "model.layers.0.mlp.up_proj".

        As it is stored: packed, INT4, bf16 bits or float32. A tied "lm_head" is the embedding.
        Raises CheckpointError if the scales of quantised groups are not finite.
        """

    @abstractmethod
    def expert(self, layer: int, expert: int) -> tuple[Weight, Weight, Weight]:
        """(gate, up, down) of one routed expert: [I, D], [I, D], [D, I].

        Raises CheckpointError if its scales are not finite (looked at once: reads all of it).
        """

    @abstractmethod
    def expert_extents(self, layer: int, expert: int) -> list[Extent]:
        """Where the bytes of one routed expert lie: few long ranges, in the order of the files."""

    @abstractmethod
    def expert_from(
        self, layer: int, expert: int, buffers: Sequence[U8]
    ) -> tuple[Weight, Weight, Weight]:
        """What `expert` gives, as views on bytes that the caller has read.

        Args:
            buffers: uint8 [length] of each of `expert_extents`, in its order.
        """

    def mapped(self, path: Path) -> U8:
        """A weight file as it is mapped here: a read-only view of all of it, uint8 [n]."""
        return next(file.whole() for file in self._files if file.path == path)

    def check_files(self) -> None:
        """Raises CheckpointError if one of the files has become shorter since it was opened."""
        for file in self._files:
            file.check()

    @abstractmethod
    def close(self) -> None:
        """Close the files; arrays already handed out stay valid."""

    def find_non_finite(self, names: Iterable[str] | None = None) -> CheckpointError | None:
        """Search tensors for NaN or infinity, reading them whole (default: all but experts).

        Returns an error that names the first culprit, or None. Meant for the moment when logits
        came out non-finite: it tells a damaged file from a bug.
        """
        if names is None:
            names = (name for name in self.names() if ".mlp.experts." not in name)
        for name in names:
            try:
                self._check_finite(name)
            except CheckpointError as exc:
                return exc
        return None

    @abstractmethod
    def _check_finite(self, name: str) -> None:
        """Raise CheckpointError if tensor `name` holds NaN or infinity."""

    def _count(self, name: str, n_bytes: int) -> None:
        """Add a tensor to the totals."""
        self.total_bytes += n_bytes
        if ".mlp.experts." in name:
            self.expert_bytes += n_bytes
        else:
            self.trunk_bytes += n_bytes
