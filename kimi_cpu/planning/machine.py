"""What this machine can do, measured in a few seconds: memory, arithmetic, disk.

Rates are taken with the engine's own kernels, since what decoding will reach is what they reach;
the plain readers beside them say what memory could deliver. Importing this imports numba.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from kimi_cpu import hardware
from kimi_cpu.config import ModelConfig
from kimi_cpu.errors import UsageError
from kimi_cpu.kernels import fast, isa
from kimi_cpu.kernels.bandwidth import DramReader
from kimi_cpu.planning.shape import Kind
from kimi_cpu.quant import U8, Int4Weight, PackedWeight, Weight, block_bytes, packed_shape
from kimi_cpu.store.checkpoint import Checkpoint
from kimi_cpu.store.experts.probe import DiskSpeed, disk_speed, measure
from kimi_cpu.store.extents import Extent

#: Rows and columns of the matrices that kernels are timed on: an expert's of Kimi K2.
_ROWS, _COLUMNS = 2048, 7168
#: Bytes of matrices of each kind: more than any cache. Less if memory is short.
_KIND_BYTES = 256 << 20
#: Tokens at once for which products are timed.
GEMM_TOKENS = (8, 32, 128)
#: A bf16 scale of 2^-10.
_SCALE = 0x3A80
#: Bytes of the file that the disk is probed with where there is no checkpoint.
_SCRATCH_BYTES = 1 << 30
_SCRATCH_NAME = ".kimi-cpu-probe-"
_ABANDONED_SECONDS = 600


@dataclass(frozen=True)
class Machine:
    """What was found out.

    Attributes:
        cpu, variant, threads: processor, kernels' instruction set, threads that compute.
        ram_bytes: of the machine, or of its cgroup's limit; available_bytes: of it, now.
        dram: bytes a second of the best plain reader, or of a kernel should one be faster;
            dram_range: the reader's slowest and fastest pass.
        gemv: bytes a second of one token's products, by kind of weight.
        gemm: operations a second of many tokens' products, by kind: a rate for each GEMM_TOKENS.
        disk: bytes a second of random reads of experts; None if not known.
        disk_speed: what the probe said; None if it was not asked (disk was given).
    """

    cpu: str
    variant: str
    threads: int
    ram_bytes: int
    available_bytes: int
    dram: float
    dram_range: tuple[float, float]
    gemv: dict[Kind, float]
    gemm: dict[Kind, tuple[float, ...]]
    disk: float | None
    disk_speed: DiskSpeed | None = None

    def gemm_rate(self, kind: Kind, tokens: float) -> float:
        """Operations a second for so many tokens at once, between those that were timed."""
        at = np.log2(np.maximum(tokens, 1))
        return float(np.interp(at, np.log2(GEMM_TOKENS), self.gemm[kind]))


class Meter:
    """Times memory and the kernels, in as many turns as one likes.

    A machine is not the same all the time (others use it, virtual CPUs share a core for a while):
    a few turns now and a few later say more than the same number at once.

    Args:
        kinds: the weights to time.
        threads: that compute; by default as the engine does.
    """

    def __init__(self, kinds: Sequence[Kind], threads: int | None = None) -> None:
        self._threads = threads or hardware.default_threads()
        self._found = hardware.detect()  # before we take some of the memory
        self._kinds = kinds
        kind_bytes = min(_KIND_BYTES, self._found.available_ram_bytes // 64)
        self._reader = DramReader(2 * kind_bytes)
        #: (kind, tokens) -> amount of bytes or operations, and what does them.
        self._work: dict[tuple[Kind, int], tuple[float, Callable[[], None]]] = {}
        for kind in kinds:
            weights = _weights(kind, kind_bytes)
            for tokens in (1, *GEMM_TOKENS):
                # Few matrices for many tokens: there it is arithmetic that takes the time.
                used = weights if tokens == 1 else weights[: max(2, 128 // tokens)]
                amount = 2.0 * tokens * _ROWS * _COLUMNS * len(used)
                if tokens == 1:
                    amount = float(sum(w.nbytes for w in used))
                self._work[kind, tokens] = amount, _tape(used, tokens, self._threads)
        self._passes: list[float] = []
        self._samples: dict[tuple[Kind, int], list[float]] = {key: [] for key in self._work}

    def turn(self) -> None:
        """Everything once; takes about half a second."""
        self._passes.append(max(self._reader.measure(self._threads).values()))
        for key, (amount, run) in self._work.items():
            begin = time.perf_counter()
            run()
            self._samples[key].append(amount / (time.perf_counter() - begin))

    def machine(self) -> Machine:
        """The middle of all turns so far, at least one; without a disk."""
        middle = {key: statistics.median(values) for key, values in self._samples.items()}
        gemv = {kind: middle[kind, 1] for kind in self._kinds}
        found, passes = self._found, self._passes
        return Machine(
            cpu=found.cpu, variant=isa.VARIANT, threads=self._threads, ram_bytes=found.ram_bytes,
            available_bytes=found.available_ram_bytes,
            dram=max(statistics.median(passes), *gemv.values()),
            dram_range=(min(passes), max(passes)), gemv=gemv,
            gemm={kind: tuple(middle[kind, n] for n in GEMM_TOKENS) for kind in self._kinds},
            disk=None,
        )  # fmt: skip


def _weights(kind: Kind, n_bytes: int) -> list[Weight]:
    """Matrices of noise, so many bytes of them in all, each in memory of its own."""
    noise = np.random.default_rng(0).integers(0, 256, 8_000_009, dtype=np.uint8)
    first = _weight(kind, noise)
    count = max(2, n_bytes // first.nbytes)
    return [first, *(_weight(kind, np.roll(noise, 4096 * i)) for i in range(1, count))]


def _weight(kind: Kind, noise: U8) -> Weight:
    if kind == "float":  # the exponent's high bit cleared, so no infinities
        return np.resize(noise, _ROWS * _COLUMNS * 2).view(np.uint16).reshape(
            _ROWS, _COLUMNS
        ) & np.uint16(0xBFFF)
    if kind == "int4":
        values = np.resize(noise, _ROWS * _COLUMNS // 2).reshape(_ROWS, -1)
        return Int4Weight(values, np.full((_ROWS, _COLUMNS // 32), _SCALE, np.uint16))
    bits = 4 if kind == "packed4" else 8
    shape = packed_shape(_ROWS, _COLUMNS, bits)
    blocks = np.resize(noise, int(np.prod(shape)))
    blocks.reshape(-1, block_bytes(bits))[:, 128 * bits :].view(np.uint16)[:] = _SCALE
    return PackedWeight(blocks.reshape(shape), (_ROWS, _COLUMNS), bits)


def _tape(weights: Sequence[Weight], tokens: int, threads: int) -> Callable[[], None]:
    """Products of `tokens` tokens with each weight, recorded as the engine records a token."""
    x = np.random.default_rng(1).standard_normal((tokens, _COLUMNS), dtype=np.float32)
    quantised = fast.quantize_activations(x)  # once, as for all experts of a layer
    with fast.recording() as tape:
        for weight in weights:
            if isinstance(weight, Int4Weight | PackedWeight):
                fast.linear_q8(quantised, weight, threads)
            else:
                fast.project(x, weight, "fast", threads)
    tape.play(threads)  # compiled and touched

    def run() -> None:
        tape.play(threads)

    return run


def probe_checkpoint(checkpoint: Checkpoint) -> DiskSpeed:
    """How fast this disk reads the checkpoint's own experts now. Raises OSError.

    The engine goes by the result, too: it is kept.
    """
    return disk_speed(checkpoint, again=True)


def probe_folder(folder: Path, config: ModelConfig, expert_bytes: int) -> DiskSpeed:
    """The same for a checkpoint that is not there yet, with a file written for the purpose.

    Raises UsageError if the folder cannot take the file (1 GB, removed at once).
    """
    count = max(16, min(_SCRATCH_BYTES // expert_bytes, config.n_routed_experts))
    with _scratch(folder, count, expert_bytes) as path:
        extents = {e: [Extent(path, e * expert_bytes, expert_bytes)] for e in range(count)}
        experts = SimpleNamespace(
            config=SimpleNamespace(moe_layers=[0], n_routed_experts=count),
            expert_extents=lambda layer, expert: extents[expert],
        )
        return measure(cast(Checkpoint, experts))


@contextmanager
def _scratch(folder: Path, count: int, n_bytes: int) -> Iterator[Path]:
    """A file of `count` pieces of noise, written through to the disk."""
    hint = "Name a folder on the disk in question, or say its speed: --disk 3.5"
    try:
        free = shutil.disk_usage(folder).free
    except OSError as exc:
        raise UsageError(f"{folder}: cannot be measured ({exc.strerror})", hint) from None
    if free < 2 * count * n_bytes:
        raise UsageError(
            f"{folder}: {free / 1e9:.1f} GB are free, too few to measure the disk", hint
        )
    for left in folder.glob(f"{_SCRATCH_NAME}*"):  # by a run that was killed
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                left.unlink()
    noise = memoryview(cast(Any, np.random.default_rng(0).integers(0, 256, n_bytes, np.uint8)))
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=_SCRATCH_NAME) as file:
            for _ in range(count):
                file.write(noise)
            file.flush()
            os.fsync(file.fileno())
            yield Path(file.name)
    except OSError as exc:
        raise UsageError(
            f"{folder}: the disk cannot be measured ({exc.strerror or exc})", hint
        ) from None
