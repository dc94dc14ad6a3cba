"""Repacking from beginning to end: plan, write, publish."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import shutil
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from isal.isal_zlib import crc32

from kimi_cpu.config import ModelConfig
from kimi_cpu.errors import CheckpointError, UsageError, UserError
from kimi_cpu.store.checkpoint import INDEX_NAME, MANIFEST_NAME
from kimi_cpu.store.manifest import (
    VERSION,
    Chunk,
    CopiedFile,
    Manifest,
    Rounding,
    WeightFile,
)
from kimi_cpu.store.repack import convert
from kimi_cpu.store.repack.convert import EXACT, Deviation, Kernels
from kimi_cpu.store.repack.plan import Layout, Options, Piece, RowsJob
from kimi_cpu.store.repack.progress import Done, Progress, sync_folder, write_atomically
from kimi_cpu.store.repack.source import Header, Source, shard_names
from kimi_cpu.store.repack.workers import Workers, default_threads

#: Bytes written between two moments at which everything is made safe: so much is lost at most.
COMMIT_BYTES = 256 << 20

#: Left free on the disk.
SPARE_BYTES = 64 << 20

#: What the system says when nothing more can be written.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".md", ".py")
_MAX_COPIED_BYTES = 100_000_000
_SAME_COMMAND = "What is complete is kept: the same command goes on from there."

#: Called with the number of bytes that were written, or read back to be verified.
OnBytes = Callable[[int], object]


class Shards(Protocol):
    """Where the source's shards come from and go to."""

    #: Whether `release` frees anything: then shards are used up one after the other.
    frees: bool

    def fetch(self, shard: Path) -> None:
        """Make sure that the shard is there. Raises UserError. Called in a thread of its own."""

    def release(self, shard: Path) -> None:
        """The shard's records are written and verified: it is not needed any more."""


class LocalShards:
    """Shards that lie on the disk.

    Args:
        delete: whether each is deleted as soon as it is not needed any more.
    """

    def __init__(self, delete: bool = False) -> None:
        self.frees = delete

    def fetch(self, shard: Path) -> None:
        """Raises CheckpointError if it is not there."""
        if not shard.is_file():
            raise CheckpointError(f"{shard}: no such file", "Put the missing shard back.")

    def release(self, shard: Path) -> None:
        """Delete it, and what it points to as in the hub's cache, if that was asked for."""
        if self.frees and shard.exists():
            real = shard.resolve()
            real.unlink()
            if shard.is_symlink():
                shard.unlink()


@dataclass(frozen=True)
class Plan:
    """What repacking would do; nothing has been written yet.

    Attributes:
        target: the folder to make.
        layout: what it will hold.
        copied: files taken over as they are.
        n_bytes: size of the result, without its manifest.
        frees: whether source shards are freed on the way.
        done_bytes: of the weight files, already written by an earlier run.
        needed_bytes: what the disk must have free to complete it.
        free_bytes: what it has.
    """

    target: Path
    layout: Layout
    copied: tuple[Path, ...]
    n_bytes: int
    frees: bool
    done_bytes: int
    needed_bytes: int
    free_bytes: int
    progress: Progress

    @property
    def work_bytes(self) -> int:
        """What `on_bytes` will be told in all, about."""
        return self.layout.n_bytes * (2 if self.frees else 1)


@dataclass(frozen=True)
class Report:
    """What repacking did.

    Attributes:
        target: the folder.
        n_bytes: its size.
        manifest: what it holds.
        overall: rounding of all rounded tensors together; None if nothing was rounded.
    """

    target: Path
    n_bytes: int
    manifest: Manifest
    overall: Rounding | None


def plan_repack(
    source_folder: Path,
    target: Path,
    options: Options = Options(),  # noqa: B008, it is frozen
    frees: bool = False,
    headers: Mapping[str, Header] | None = None,
) -> Plan:
    """Check source, target and disk, and lay out the result. Writes nothing.

    Args:
        source_folder: a published checkpoint with INT4 experts.
        target: the folder to make; it must not exist, or be empty.
        options: how to repack.
        frees: whether source shards will be freed on the way.
        headers: of the source's shards, if they are not all on the disk.

    Raises:
        UsageError: the target exists, or was begun in another way.
        ConfigError, CheckpointError: the source is damaged, or cannot be repacked.
    """
    progress = Progress(target)
    config = ModelConfig.load(source_folder)
    if headers is None:
        if progress.pin.exists():
            raise UsageError(
                f"{progress.folder}: was begun by `kimi-cpu pull`", "Give another destination."
            )
        headers = {
            name: _header(source_folder / name, progress) for name in shard_names(source_folder)
        }
    layout = Layout(Source(source_folder, config, headers), options)
    progress.load(_state(layout), layout.pieces)
    done_bytes = sum(done.length for done in progress.done.values())
    copied = tuple(copied_files(source_folder))
    copied_bytes = sum(path.stat().st_size for path in copied)
    return Plan(
        target=target,
        layout=layout,
        copied=copied,
        n_bytes=layout.n_bytes + copied_bytes,
        frees=frees,
        done_bytes=done_bytes,
        needed_bytes=_needed_bytes(layout, progress, frees) + copied_bytes + SPARE_BYTES,
        free_bytes=free_bytes(target),
        progress=progress,
    )


def free_bytes(path: Path) -> int:
    """What is free on the disk that `path` is or will be on."""
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free


def copied_files(folder: Path) -> list[Path]:
    """What is taken over as it is: config, tokenizer, template, licence; no weights, no index."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and is_copied(path.name, path.stat().st_size)
    ]


def is_copied(name: str, n_bytes: int) -> bool:
    """Whether a file of a published checkpoint belongs beside its weights."""
    path = Path(name)
    return (
        path.name == name
        and not name.startswith(".")
        and name not in (INDEX_NAME, MANIFEST_NAME)
        and (path.suffix in _COPIED_SUFFIXES or name.upper().startswith("LICENSE"))
        and n_bytes <= _MAX_COPIED_BYTES
    )


def repack(
    plan: Plan,
    shards: Shards | None = None,
    threads: int | None = None,
    on_bytes: OnBytes = lambda n_bytes: None,
    kernels: Kernels = convert,
) -> Report:
    """Carry out a plan, from where it was left off if it was interrupted.

    Args:
        shards: where they come from; local ones that stay by default.
        threads: how many; they read, compute and write.
        on_bytes: told as the work proceeds.
        kernels: what computes; `kernels.repacking` is faster.

    Raises:
        CheckpointError: the source is damaged (found while reading it).
        UserError: the disk is full or fails, or another process is at it.
    """
    shards = LocalShards() if shards is None else shards
    if plan.free_bytes < plan.needed_bytes:
        raise UserError(
            f"{plan.target}: needs {plan.needed_bytes / 1e9:.1f} GB more on this disk, "
            f"{plan.free_bytes / 1e9:.1f} GB are free",
            "Free space, choose another disk, or let --delete-source-shards free it on the way.",
        )
    progress = plan.progress
    try:
        progress.begin(_state(plan.layout), plan.layout.source.headers)
        workers = Workers(plan.layout, progress.folder, threads or default_threads(), True, kernels)
        _write_pieces(plan, shards, workers, on_bytes)
        manifest = _complete(plan)
        progress.publish()
    except OSError as exc:
        raise disk_error(exc, progress.folder) from None
    finally:
        progress.close()
    overall = combined(by_tensor(plan.layout, progress.done))
    return Report(plan.target, plan.n_bytes, manifest, overall)


def combined(deviations: Mapping[str, Deviation]) -> Rounding | None:
    """The figures of all tensors together; None without any."""
    return rounding(sum(deviations.values(), EXACT)) if deviations else None


def rounding(deviation: Deviation) -> Rounding:
    """The figures of a tensor, to four digits: more would depend on the order of additions."""
    relative = math.sqrt(deviation.error_squares / deviation.squares) if deviation.squares else 0.0
    return Rounding(float(f"{relative:.4g}"), float(f"{deviation.max_abs:.4g}"))


def disk_error(exc: OSError, folder: Path) -> UserError:
    """The error for the user when writing (or reading) fails."""
    if exc.errno in DISK_FULL:
        return UserError(
            f"{folder}: no space left to write ({exc.strerror})", f"Free space. {_SAME_COMMAND}"
        )
    return UserError(f"{exc.filename or folder}: {exc.strerror or exc}", _SAME_COMMAND)


def _header(path: Path, progress: Progress) -> Header:
    if not path.exists() and (saved := progress.header(path.name)) is not None:
        return saved
    return Header.read(path)


def _state(layout: Layout) -> dict[str, Any]:
    options, source = layout.options, layout.source
    config = (source.folder / "config.json").read_bytes()
    return {
        "format_version": VERSION,
        "trunk_form": options.trunk,
        "alignment": options.align,
        "file_size": options.file_bytes,
        "source": [list(file) for file in source.identity],
        "config": hashlib.sha256(config).hexdigest(),
    }


def _needed_bytes(layout: Layout, progress: Progress, frees: bool) -> int:
    """How much more than now will be in use at the worst moment."""
    shards = layout.source.shards
    there = {number for number, shard in enumerate(shards) if shard.path.exists()}
    stages = _stages(layout, frees, progress.done)
    used = peak = 0
    for stage, following in zip(stages, (*stages[1:], None), strict=True):
        fetched = (stage.shards | (following.shards if following else set())) - there
        there |= fetched
        used += sum(shards[number].size for number in fetched) + sum(p.length for p in stage.todo)
        peak = max(peak, used)
        freed = there & set(stage.released)
        there -= freed
        used -= sum(shards[number].size for number in freed)
    return peak


def _write_pieces(plan: Plan, shards: Shards, workers: Workers, on_bytes: OnBytes) -> None:
    """Stage by stage; meanwhile the next stage's shards are fetched."""
    layout, progress = plan.layout, plan.progress
    for name in (*layout.expert_files, *layout.trunk_files):
        (progress.folder / name).touch()
    on_bytes(plan.done_bytes)
    stages = [
        (stage, _Fetch(shards, [layout.source.shards[n].path for n in sorted(stage.shards)]))
        for stage in _stages(layout, shards.frees, progress.done)
    ]
    with workers:
        stages[0][1].start()
        for i, (stage, fetch) in enumerate(stages):
            fetch.finish()
            if i + 1 < len(stages):
                stages[i + 1][1].start()
            _make(workers, progress, stage.todo, on_bytes)
            if stage.released:
                _verify_and_release(plan, workers, shards, stage.released, on_bytes)


class _Fetch:
    """Fetching some shards in the background.

    A download cannot be broken off from outside, so the thread does not keep the program from
    ending; what it has got by then is kept, like that of any download.
    """

    def __init__(self, shards: Shards, paths: list[Path]) -> None:
        self._shards, self._paths = shards, paths
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="fetch", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def finish(self) -> None:
        """Return when all are there. Raises what `Shards.fetch` raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            for path in self._paths:
                self._shards.fetch(path)
        except Exception as exc:
            self._error = exc


@dataclass(frozen=True)
class _Stage:
    """Pieces that are written before the shards `released` are not needed any more.

    Attributes:
        todo: those that are not written yet.
        released: numbers of shards.
    """

    todo: list[Piece]
    released: list[int]

    @property
    def shards(self) -> set[int]:
        """Numbers of those that `todo` is made from."""
        return {number for piece in self.todo for number in piece.shards}


def _stages(layout: Layout, one_by_one: bool, done: Collection[tuple[str, int]]) -> list[_Stage]:
    """In order; the shards of each one are released at its end, or all stay in a single stage."""
    n_stages = len(layout.source.shards) if one_by_one else 1
    stages = [_Stage([], []) for _ in range(n_stages)]
    for piece in layout.pieces:
        if (piece.file, piece.offset) not in done:
            number = max(piece.shards, default=0) if one_by_one else 0
            stages[number].todo.append(piece)
    if one_by_one:
        for shard, last in enumerate(layout.last_use()):
            if last >= 0:
                stages[max(layout.pieces[last].shards)].released.append(shard)
    for stage in stages:
        stage.todo[:] = _mixed(stage.todo)
    return stages


def _mixed(pieces: list[Piece]) -> list[Piece]:
    """Those that are rounded spread evenly among the others.

    Rounding is slower than the disk, everything else faster: one after the other, first the disk
    would wait for the processors, then they for it.
    """
    slow = [isinstance(p.job, RowsJob) and p.job.how.startswith("round") for p in pieces]
    counts, totals = [0, 0], (max(slow.count(False), 1), max(slow.count(True), 1))
    places: list[float] = []
    for kind in slow:
        places.append((counts[kind] + 0.5) / totals[kind])
        counts[kind] += 1
    return [pieces[i] for i in np.argsort(places, kind="stable")]


def _make(workers: Workers, progress: Progress, pieces: list[Piece], on_bytes: OnBytes) -> None:
    """Write pieces; on any error or Ctrl-C those that are complete are kept."""
    written: list[Done] = []
    n_bytes = 0
    try:
        for done in workers.make(pieces):
            written.append(done)
            n_bytes += done.length
            on_bytes(done.length)
            if n_bytes >= COMMIT_BYTES:
                batch, written, n_bytes = written, [], 0
                _commit(progress, batch)
    finally:
        _commit(progress, written)


def _commit(progress: Progress, written: list[Done]) -> None:
    """Make sure that written pieces are on the disk, and only then write that down."""
    for name in {done.file for done in written}:
        with (progress.folder / name).open("r+b") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # written once, not read again soon
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    progress.record(written)


def _verify_and_release(
    plan: Plan, workers: Workers, shards: Shards, released: list[int], on_bytes: OnBytes
) -> None:
    """Compare what was made from shards with them, once more from the disk, and let them go."""
    paths = [shard.path for shard in plan.layout.source.shards]
    there = {number for number in released if paths[number].exists()}
    # A piece of several shards was verified before the first of them was deleted. Headers, made
    # from none, are looked at each time: they are few.
    pieces = [
        piece
        for piece in plan.layout.pieces
        if (not piece.shards or there & set(piece.shards))
        and all(paths[number].exists() for number in piece.shards)
    ]
    for piece, equal, found in workers.check(pieces):
        on_bytes(piece.length)
        if not equal or found.crc32 != plan.progress.done[piece.file, piece.offset].crc32:
            raise UserError(
                f"{plan.progress.folder / piece.file}: bytes from {piece.offset} on are not what "
                "was written",
                "The disk or the memory of this machine is at fault; no shard was deleted since.",
            )
    workers.release_files()
    for number in released:
        shards.release(paths[number])


def _complete(plan: Plan) -> Manifest:
    """Everything beside the weights; the manifest last. OSError."""
    layout, progress = plan.layout, plan.progress
    for name, size in (layout.expert_files | layout.trunk_files).items():
        path = progress.folder / name
        if path.stat().st_size < size:  # the last record of a file ends before its slot
            with path.open("r+b") as file:
                file.truncate(size)
                os.fsync(file.fileno())
    copied = []
    for path in plan.copied:
        data = path.read_bytes()
        write_atomically(progress.folder / path.name, data)
        copied.append(CopiedFile(path.name, len(data), crc32(data)))
    deviations = by_tensor(layout, progress.done)
    manifest = Manifest(
        source=layout.source.identity,
        trunk_form=layout.options.trunk,
        align=layout.options.align,
        file_bytes=layout.options.file_bytes,
        records_per_file=layout.records.records_per_file,
        expert_files=_weight_files(layout.expert_files, progress),
        trunk_files=_weight_files(layout.trunk_files, progress),
        copied=tuple(copied),
        rounding={name: rounding(deviation) for name, deviation in deviations.items()},
    )
    write_atomically(progress.folder / MANIFEST_NAME, manifest.dumps().encode())
    sync_folder(progress.folder)
    return manifest


def _weight_files(sizes: Mapping[str, int], progress: Progress) -> tuple[WeightFile, ...]:
    chunks: dict[str, list[Chunk]] = {name: [] for name in sizes}
    for done in sorted(progress.done.values()):
        if done.file in chunks:
            chunks[done.file].append(Chunk(done.offset, done.length, done.crc32))
    return tuple(WeightFile(name, sizes[name], tuple(chunks[name])) for name in sorted(sizes))


def by_tensor(layout: Layout, done: Mapping[tuple[str, int], Done]) -> dict[str, Deviation]:
    """The deviation of each rounded tensor, by its layer's name."""
    deviations: dict[str, Deviation] = {}
    for piece in layout.pieces:
        if isinstance(piece.job, RowsJob) and piece.job.how.startswith("round"):
            deviation = done[piece.file, piece.offset].deviation
            name = piece.job.name
            deviations[name] = deviations.get(name, EXACT) + deviation
    return deviations
