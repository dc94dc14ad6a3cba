"""Proof that a packed checkpoint is undamaged, and that it is what it was made from."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from isal.isal_zlib import crc32

from kimi_cpu.config import ModelConfig
from kimi_cpu.errors import CheckpointError
from kimi_cpu.store.checkpoint import MANIFEST_NAME, Checkpoint
from kimi_cpu.store.manifest import Chunk, Manifest, Rounding, WeightFile
from kimi_cpu.store.packed import PackedCheckpoint
from kimi_cpu.store.repack.files import Files, Scratch
from kimi_cpu.store.repack.plan import ExpertJob, Layout, Options, Piece, RowsJob
from kimi_cpu.store.repack.progress import Done
from kimi_cpu.store.repack.run import OnBytes, by_tensor, combined, rounding
from kimi_cpu.store.repack.source import Header, Source, shard_names
from kimi_cpu.store.repack.workers import Workers, default_threads, in_threads

_READ_BYTES = 16 << 20
_DAMAGED = "Repack the checkpoint again; if it happens again, the disk or the memory is at fault."


@dataclass(frozen=True)
class Verified:
    """What was found to hold.

    Attributes:
        folder: the packed checkpoint.
        n_bytes: read of it.
        n_chunks: checksums that were right, those of copied files included.
        n_experts: experts that were compared with the source, bit by bit; 0 without a source.
        rounding: of each rounded tensor of the trunk, measured against the source.
        overall: the same of all of them together; None if there are none.
    """

    folder: Path
    n_bytes: int
    n_chunks: int
    n_experts: int
    rounding: dict[str, Rounding]
    overall: Rounding | None


def open_packed(folder: Path) -> Manifest:
    """The manifest of a packed checkpoint that opens. Raises ConfigError or CheckpointError."""
    checkpoint = Checkpoint.open(folder)
    checkpoint.close()
    if not isinstance(checkpoint, PackedCheckpoint):
        raise CheckpointError(f"{folder}: is no packed checkpoint", f"It has no {MANIFEST_NAME}.")
    return checkpoint.manifest


def verify(
    folder: Path,
    source_folder: Path | None = None,
    threads: int | None = None,
    on_bytes: OnBytes = lambda n_bytes: None,
) -> Verified:
    """Check every checksum; with a source, also that unpacking gives its numbers.

    INT4 weights and everything copied must be equal bit by bit, rounded tensors equal to the source
    rounded again, by the definitions in `quant`.

    Args:
        folder: the packed checkpoint.
        source_folder: what it was made from.
        threads: how many.
        on_bytes: told as the work proceeds, of `Checkpoint.file_bytes` in all, about.

    Raises:
        CheckpointError: something does not hold; the message names the first place.
    """
    manifest = open_packed(folder)
    threads = threads or default_threads()
    n_bytes, n_chunks = _check_copied(folder, manifest)
    if source_folder is None:
        for file, chunk, checksum in _checksums(folder, manifest, threads):
            _expect(
                chunk.crc32 == checksum, folder / file.name, chunk.offset, "the checksum is wrong"
            )
            on_bytes(chunk.length)
            n_bytes += chunk.length
            n_chunks += 1
        return Verified(folder, n_bytes, n_chunks, 0, {}, None)
    layout = _layout(source_folder, manifest)
    checksums = {
        (file.name, chunk.offset): chunk
        for file in (*manifest.expert_files, *manifest.trunk_files)
        for chunk in file.chunks
    }
    for piece in layout.pieces:
        listed = checksums.get((piece.file, piece.offset))
        same = listed is not None and listed.length == piece.length
        _expect(same, folder / MANIFEST_NAME, piece.offset, f"lists no such part of {piece.file}")
    done: dict[tuple[str, int], Done] = {}
    with Workers(layout, folder, threads, write=False) as workers:
        for piece, equal, found in workers.check(layout.pieces):
            path = folder / piece.file
            right = found.crc32 == checksums[piece.file, piece.offset].crc32
            _expect(right, path, piece.offset, f"the checksum of {_name(piece)} is wrong")
            _expect(equal, path, piece.offset, f"{_name(piece)} is not what the source has")
            done[piece.file, piece.offset] = found
            on_bytes(piece.length)
            n_bytes += piece.length
    deviations = by_tensor(layout, done)
    return Verified(
        folder=folder,
        n_bytes=n_bytes,
        n_chunks=n_chunks + len(done),
        n_experts=layout.records.count,
        rounding={name: rounding(deviation) for name, deviation in deviations.items()},
        overall=combined(deviations),
    )


def _expect(holds: bool, path: Path, offset: int, problem: str) -> None:
    if not holds:
        raise CheckpointError(f"{path}: {problem} (at byte {offset})", _DAMAGED)


def _name(piece: Piece) -> str:
    if isinstance(piece.job, ExpertJob):
        return f"expert {piece.job.expert} of layer {piece.job.layer}"
    return piece.job.name if isinstance(piece.job, RowsJob) else "the header"


def _layout(source_folder: Path, manifest: Manifest) -> Layout:
    """How the source is packed with the options that the manifest tells."""
    config = ModelConfig.load(source_folder)
    headers = {name: Header.read(source_folder / name) for name in shard_names(source_folder)}
    source = Source(source_folder, config, headers)
    if source.identity != manifest.source:
        raise CheckpointError(
            f"{source_folder}: is not what the packed checkpoint was made from",
            "Give the same download; without a source only the checksums are verified.",
        )
    return Layout(source, Options(manifest.trunk_form, manifest.align, manifest.file_bytes))


def _check_copied(folder: Path, manifest: Manifest) -> tuple[int, int]:
    """(bytes, how many) of the files that were copied, if they are as they were."""
    for file in manifest.copied:
        path = folder / file.name
        try:
            data = path.read_bytes()
        except OSError as exc:
            raise CheckpointError(f"{path}: {exc.strerror}", "Copy it from the source.") from None
        _expect(crc32(data) == file.crc32, path, 0, "is not what was copied from the source")
    return sum(file.n_bytes for file in manifest.copied), len(manifest.copied)


def _checksums(
    folder: Path, manifest: Manifest, threads: int
) -> Iterator[tuple[WeightFile, Chunk, int]]:
    """Every chunk of the weight files with the checksum that it has on the disk."""
    local = threading.local()
    opened: list[Files] = []

    def read(item: tuple[WeightFile, Chunk]) -> tuple[WeightFile, Chunk, int]:
        if not hasattr(local, "files"):
            local.files, local.scratch = Files(), Scratch(_READ_BYTES + 8192)
            opened.append(local.files)
        file, chunk = item
        path, found = folder / file.name, 0
        for begin in range(chunk.offset, chunk.offset + chunk.length, _READ_BYTES):
            local.scratch.clear()
            length = min(_READ_BYTES, chunk.offset + chunk.length - begin)
            local.files.forget(path, begin, length)  # so that the disk is asked
            found = crc32(local.files.read(path, begin, length, local.scratch).data, found)
        return file, chunk, found

    files = (*manifest.expert_files, *manifest.trunk_files)
    items = ((file, chunk) for file in files for chunk in file.chunks)
    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        try:
            yield from in_threads(pool, read, items)
        finally:
            for reader in opened:
                reader.close()
