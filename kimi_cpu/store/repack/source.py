"""The published checkpoint that is repacked: known by its headers, read piece by piece.

Files are read, not mapped, so that the memory in use is what we allocate; and a shard may be gone
(already repacked and deleted) or not yet here (still to be downloaded) while its header is known.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from kimi_cpu.config import ModelConfig
from kimi_cpu.errors import CheckpointError
from kimi_cpu.store.checkpoint import INDEX_NAME, MANIFEST_NAME, SINGLE_NAME
from kimi_cpu.store.manifest import SourceFile
from kimi_cpu.store.published import by_name, gc_paused, read_index
from kimi_cpu.store.safetensors import SafetensorsHeader, TensorEntry, header_length
from kimi_cpu.store.validate import check_against_config, select


class Header(NamedTuple):
    """A shard's header as it lies in the file: JSON bytes, and the whole file's size."""

    encoded: bytes
    n_bytes: int

    @classmethod
    def read(cls, path: Path) -> Header:
        """Of a file that is here. Raises CheckpointError."""
        try:
            with path.open("rb") as file:
                n_bytes = os.fstat(file.fileno()).st_size
                length = header_length(path, file.read(8), n_bytes)
                return cls(file.read(length), n_bytes)
        except OSError as exc:
            raise CheckpointError(
                f"{path}: cannot be read ({exc.strerror or exc})",
                "The download is incomplete, or the file may not be read.",
            ) from None


class Source:
    """A published checkpoint by its headers.

    Attributes:
        folder: where it lies.
        config: its ModelConfig.
        headers: of its weight files, by name.
        shards: its weight files, sorted by name.
        identity: what tells it from other checkpoints.
        skipped: names of tensors that are no part of the language model, as stored.
    """

    def __init__(self, folder: Path, config: ModelConfig, headers: Mapping[str, Header]) -> None:
        """Check the headers against index and config. Raises CheckpointError.

        Args:
            headers: of every shard, by file name.
        """
        self.folder = folder
        self.config = config
        self.headers = headers
        with gc_paused():
            self.shards = [
                SafetensorsHeader(folder / name, header.encoded, header.n_bytes)
                for name, header in sorted(headers.items())
            ]
            if (folder / INDEX_NAME).exists():
                stored = by_name(folder, read_index(folder / INDEX_NAME), self.shards)
            else:
                stored = dict.fromkeys(self.shards[0].names(), self.shards[0])
            self._tensors = select(config, stored)
            check_against_config(folder, config, self._tensors)
        self.identity = tuple(
            SourceFile(name, header.n_bytes, hashlib.sha256(header.encoded).hexdigest())
            for name, header in sorted(headers.items())
        )
        prefix = config.tensor_prefix
        used = {prefix + name for name in self._tensors}
        self.skipped = [name for name in stored if name not in used]
        self._number = {shard.path: i for i, shard in enumerate(self.shards)}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def entry(self, name: str) -> TensorEntry:
        """dtype, shape and place of a tensor of the language model."""
        return self._tensors[name].entry(self.config.tensor_prefix + name)

    def file_of(self, name: str) -> Path:
        """The shard that holds it."""
        return self._tensors[name].path

    def shard_of(self, name: str) -> int:
        """The shard's number among `shards`."""
        return self._number[self._tensors[name].path]

    def stored_name(self, name: str) -> str:
        """Its name in the shard, for messages."""
        return self.config.tensor_prefix + name


def shard_names(folder: Path) -> list[str]:
    """Names of a checkpoint's shards by its index, sorted. Raises CheckpointError."""
    if (folder / MANIFEST_NAME).exists():
        raise CheckpointError(
            f"{folder}: is a packed checkpoint already", "Repack the published one."
        )
    if (folder / INDEX_NAME).exists():
        return sorted(set(read_index(folder / INDEX_NAME).values()))
    if (folder / SINGLE_NAME).exists():
        return [SINGLE_NAME]
    raise CheckpointError(
        f"{folder}: neither {INDEX_NAME} nor {SINGLE_NAME} is here",
        "Give the folder of a Hugging Face checkpoint in safetensors format.",
    )
