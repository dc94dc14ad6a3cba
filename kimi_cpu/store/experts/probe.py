"""How fast this disk reads experts at random, and by which way: measured once a file system.

The answer is kept in the user's cache folder for a month. A file there that is damaged, or cannot
be written, only costs another measurement.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kimi_cpu import hardware
from kimi_cpu.store.checkpoint import Checkpoint
from kimi_cpu.store.experts.backends import (
    Backend,
    DirectBackend,
    Io,
    MappedBackend,
    can_read_directly,
    slot_bytes_of,
)
from kimi_cpu.store.experts.reader import Load, Reader

#: For both ways together.
PROBE_SECONDS = 1.6
#: Experts read at a time, as a layer asks for them.
_AT_A_TIME = 8
_KEEP_SECONDS = 30 * 24 * 3600
_FILE = "disks.json"


@dataclass(frozen=True)
class DiskSpeed:
    """Random reads of whole experts that are not in the page cache, eight at a time.

    Attributes:
        mmap, direct: bytes a second; direct None where it is not possible.
        expert_bytes: how large the experts were.
    """

    mmap: float
    direct: float | None
    expert_bytes: int

    @property
    def best(self) -> Io:
        """The faster way. The direct one also if it seems up to a quarter slower.

        It leaves more CPU time to compute, and a probe beside other work is not that exact.
        """
        return "direct" if self.direct is not None and self.direct > 0.75 * self.mmap else "mmap"

    def better_of(self, other: DiskSpeed) -> DiskSpeed:
        """Each way at the faster of two probes."""
        direct = [speed.direct for speed in (self, other) if speed.direct is not None]
        return DiskSpeed(max(self.mmap, other.mmap), max(direct, default=None), self.expert_bytes)

    @property
    def ceiling(self) -> float:
        """Bytes a second of the faster way."""
        return max(self.mmap, self.direct or 0.0)


def disk_speed(checkpoint: Checkpoint, *, again: bool = False) -> DiskSpeed:
    """What the probe says about the disk with the experts, measured now if it never was.

    Args:
        again: measure even if there is a recent result; what is better of the two is kept, as
            other work can only slow a probe down.

    Raises CheckpointError (a file is gone) and OSError (the disk cannot read it).
    """
    extents = checkpoint.expert_extents(checkpoint.config.moe_layers[0], 0)
    key = _file_system(extents[0].path)
    expert_bytes = sum(extent.length for extent in extents)
    kept = _recall(key)
    if kept is not None and not 0.5 < kept.expert_bytes / expert_bytes < 2:
        kept = None
    if kept is not None and not again:
        return kept
    speed = measure(checkpoint)
    _remember(key, speed if kept is None else speed.better_of(kept))
    return speed


def measure(checkpoint: Checkpoint, seconds: float = PROBE_SECONDS) -> DiskSpeed:
    """Read random experts in both ways by turns, for so long or until all have been read.

    What was in the page cache of these experts is dropped, so that it is the disk that reads.
    """
    config = checkpoint.config
    layers, n = config.moe_layers, config.n_routed_experts
    order = np.random.default_rng(0).permutation(len(layers) * n).tolist()
    places = [(layers[i // n], i % n) for i in order]
    experts = iter(places)
    first = checkpoint.expert_extents(layers[0], 0)
    slot_bytes = 2 * slot_bytes_of(first)  # others may lie less favourably
    backends: list[Backend] = [MappedBackend()]
    if can_read_directly(first[0].path):
        backends.append(DirectBackend(_AT_A_TIME, slot_bytes))
    done = [[0, 0.0] for _ in backends]
    reader = Reader()
    try:
        for backend in backends:
            if backend.io == "direct":  # its memory is new: the first write to a page takes time
                _read_some(checkpoint, backend, reader, iter(places[-_AT_A_TIME:]), [0, 0.0])
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for backend, total in zip(backends, done, strict=True):
                if not _read_some(checkpoint, backend, reader, experts, total):
                    end = 0
    finally:
        reader.close()
        for backend in backends:
            backend.close()
    rates = [n_bytes / max(spent, 1e-9) for n_bytes, spent in done]
    return DiskSpeed(
        rates[0], rates[1] if len(rates) > 1 else None, sum(extent.length for extent in first)
    )


def _read_some(
    checkpoint: Checkpoint, backend: Backend, reader: Reader, experts: Iterator[tuple[int, int]],
    total: list[Any],
) -> bool:  # fmt: skip
    """One turn: a few experts; adds [bytes, seconds]; False if there are no more."""
    some = [place for _, place in zip(range(_AT_A_TIME), experts, strict=False)]
    if not some:
        return False
    loads, mapped = [], MappedBackend() if backend.io == "direct" else backend
    for slot, (layer, expert) in enumerate(some):
        extents = checkpoint.expert_extents(layer, expert)
        mapped.pieces(slot, extents)
        mapped.evict(slot, extents)
        loads.append(Load(slot, slot, backend, backend.pieces(slot, extents), lambda: None))
    if mapped is not backend:
        mapped.close()
    begin = time.perf_counter()
    reader.submit(loads)
    waiting = set(loads)
    while waiting:
        reader.wait(waiting)
        waiting = {load for load in waiting if not load.done}
    total[1] += time.perf_counter() - begin
    for load, place in zip(loads, some, strict=True):
        if load.error is not None:
            raise load.error
        total[0] += load.n_bytes
        backend.evict(load.slot, checkpoint.expert_extents(*place))
    return True


def _file_system(path: Path) -> str:
    """Names the file system that holds `path`, after a restart as before it."""
    if hasattr(os, "statvfs"):
        fsid = os.statvfs(path).f_fsid
        if fsid:
            return f"{fsid:x}"
    return f"dev-{path.stat().st_dev}"


def _read_kept() -> dict[str, Any]:
    try:
        kept = json.loads((hardware.user_cache_folder() / _FILE).read_text("utf-8"))
    except (OSError, ValueError, RuntimeError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _recall(key: str) -> DiskSpeed | None:
    try:
        entry = _read_kept()[key]
        if not 0 <= time.time() - entry["measured"] < _KEEP_SECONDS:
            return None
        direct = entry["direct"]
        speed = DiskSpeed(
            float(entry["mmap"]), None if direct is None else float(direct),
            int(entry["expert_bytes"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError):
        return None
    return speed if speed.mmap > 0 and speed.expert_bytes > 0 else None


def _remember(key: str, speed: DiskSpeed) -> None:
    kept = _read_kept()
    kept[key] = asdict(speed) | {"measured": int(time.time())}
    with contextlib.suppress(OSError, RuntimeError):  # a full disk, no home directory
        folder = hardware.user_cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=_FILE)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(kept, file, indent=1)
            Path(name).replace(folder / _FILE)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
