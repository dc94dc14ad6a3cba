"""Timing an engine on made-up tokens, beside the machine's memory bandwidth.

Follows llama-bench: `ppP` computes a prompt of P tokens, `tgN` decodes N tokens one by one,
`ppP+tgN` does both, ` @ dD` after D tokens of context that are not timed. Token ids come from a
seed; tokenising and sampling are left out. Rates are means over repetitions.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from kimi_cpu import __version__, hardware
from kimi_cpu.benchmark import pagecache
from kimi_cpu.benchmark.traffic import (
    ExpertCounter,
    ObservedKernels,
    PartTimer,
    Traffic,
    traffic,
)
from kimi_cpu.engine import PREFILL_CHUNK, Engine, Session, SessionSnapshot
from kimi_cpu.errors import UsageError
from kimi_cpu.kernels.common import Precision
from kimi_cpu.model import Ids, Model
from kimi_cpu.store.checkpoint import Checkpoint
from kimi_cpu.store.experts.backends import Io
from kimi_cpu.store.experts.opening import open_experts
from kimi_cpu.store.experts.residency import ExpertStore
from kimi_cpu.store.experts.stats import ExpertStats
from kimi_cpu.store.summary import Summary, summarise

#: Told (what is done now, whether one of `count_steps` is complete with it).
Progress = Callable[[str, bool], None]

#: More of the files than this in memory is not cold. A few pages around the headers come back.
_COLD_FRACTION = 0.05


@dataclass(frozen=True)
class Test:
    """One row: n_prompt tokens at once, then n_gen one by one, after n_depth of context."""

    n_prompt: int
    n_gen: int
    n_depth: int = 0

    __test__ = False  # no test of pytest

    @property
    def name(self) -> str:
        """As llama-bench writes it, e.g. "tg128 @ d4096"."""
        parts = []
        if self.n_prompt:
            parts.append(f"pp{self.n_prompt}")
        if self.n_gen:
            parts.append(f"tg{self.n_gen}")
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def n_tokens(self) -> int:
        """Tokens that are timed."""
        return self.n_prompt + self.n_gen

    @property
    def end(self) -> int:
        """Length of the timeline in the end."""
        return self.n_depth + self.n_tokens

    def passes(self) -> list[tuple[int, int]]:
        """(tokens before, tokens computed) of each forward pass that is timed."""
        prompt_end = self.n_depth + self.n_prompt
        chunks = [
            (begin, min(PREFILL_CHUNK, prompt_end - begin))
            for begin in range(self.n_depth, prompt_end, PREFILL_CHUNK)
        ]
        return chunks + [(position, 1) for position in range(prompt_end, self.end)]


def trace(vocab_size: int, n: int, seed: int) -> Ids:
    """The n token ids that all tests of this seed begin with: int64 [n]."""
    return np.random.default_rng(seed).integers(0, vocab_size, size=n, dtype=np.int64)


def run_test(session: Session, test: Test, ids: Ids) -> float:
    """Compute a test's tokens on a session that holds ids[: n_depth]; returns seconds."""
    prompt_end = test.n_depth + test.n_prompt
    prompt, steps = ids[:prompt_end].tolist(), ids[prompt_end : test.end].tolist()
    begin = time.perf_counter()
    if test.n_prompt:
        session.sync(prompt)
    for token in steps:
        session.step(token)
    return time.perf_counter() - begin


@dataclass(frozen=True)
class Sample:
    """One repetition: seconds, and bytes that came from the disk (None if unknown)."""

    seconds: float
    disk_bytes: int | None


@dataclass(frozen=True)
class Row:
    """What was measured of one test.

    Attributes:
        test, threads, precision, cold, seed: what was asked for.
        samples: one per repetition.
        traffic: bytes read from memory per token.
        ceilings: bytes a second that the best plain reader got from memory, before each
            repetition and after the last.
        profile: seconds a token by part (see `traffic.PARTS`), if asked for.
        disk_wait_s: seconds a token that nothing could be computed for want of an expert, while
            profiling.
        experts: what the expert store did in the timed runs.
        memory: the budget in bytes, if not all experts fit into it.
        io: how experts are read.
        started: when, UTC.
    """

    test: Test
    threads: int
    precision: Precision
    cold: bool
    seed: int
    samples: list[Sample]
    traffic: Traffic
    ceilings: list[float]
    profile: dict[str, float] | None
    disk_wait_s: float | None
    experts: ExpertStats
    memory: int | None
    io: Io
    started: datetime

    @property
    def samples_ts(self) -> list[float]:
        """Tokens a second of each repetition."""
        return [self.test.n_tokens / sample.seconds for sample in self.samples]

    @property
    def avg_ts(self) -> float:
        return statistics.fmean(self.samples_ts)

    @property
    def stddev_ts(self) -> float:
        return _stddev(self.samples_ts)

    @property
    def ceiling_bytes_per_s(self) -> float:
        """The middle of `ceilings`."""
        return statistics.median(self.ceilings)

    @property
    def ceiling_ts(self) -> float:
        """Tokens a second if memory were read at the ceiling and nothing else took time."""
        return self.ceiling_bytes_per_s / self.traffic.total_bytes

    @property
    def ceiling_fraction(self) -> float:
        return self.avg_ts / self.ceiling_ts

    @property
    def disk_bytes_per_token(self) -> float | None:
        values = [s.disk_bytes for s in self.samples if s.disk_bytes is not None]
        if len(values) < len(self.samples):
            return None
        return statistics.fmean(values) / self.test.n_tokens


def _stddev(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def count_steps(tests: int, threads: int, repetitions: int) -> int:
    """How many steps `Bench.run` reports, given numbers of tests, of thread counts, of samples."""
    return tests * threads * (repetitions + 1)


class Bench:
    """Measures tests on one checkpoint.

    Args:
        folder: the checkpoint.
        precision: as `Engine.load`.
        seed: of the token ids.
        memory, io: as `Engine.load`.
        repetitions: samples of each test.
        cold: empty the page cache of the weight files before each sample. Else a pass over the
            test's own tokens first brings its weights into the page cache and into this
            process's page tables (the first touch of a mapping runs at half the speed).
        profile: also split the time by part.
        read_bytes: memory that the bandwidth readers pass over; None for the default.
        progress: told what is going on.

    Raises ConfigError or CheckpointError.
    """

    def __init__(
        self, folder: Path, *, precision: Precision, seed: int, repetitions: int, cold: bool,
        profile: bool, memory: int | None = None, io: Io | Literal["auto"] = "auto",
        read_bytes: int | None = None, progress: Progress,
    ) -> None:  # fmt: skip
        from kimi_cpu.kernels.bandwidth import DramReader

        self.folder = folder
        self._precision: Precision = precision
        self._seed, self._repetitions = seed, repetitions
        self._cold, self._profile, self._progress = cold, profile, progress
        self._memory, self._io = memory, io
        self._checkpoint = Checkpoint.open(folder)
        # Before the experts divide what is left: else it would drive the trunk out of memory.
        self._reader = DramReader(read_bytes)
        self._experts = self._open_experts()
        self.config = self._checkpoint.config
        self.summary: Summary = summarise(self._checkpoint)
        self._files = sorted({self._checkpoint.file_of(n) for n in self._checkpoint.names()})
        self._traffic: dict[Test, Traffic] = {}

    def check(self, tests: list[Test]) -> None:
        """Raises UsageError if the model's context is too short for one of them."""
        limit = self.config.max_position_embeddings
        for test in tests:
            if test.end > limit:
                raise UsageError(
                    f"{test.name} needs {test.end:,} tokens, the model's context has {limit:,}",
                    "Use smaller -p, -n or -d.",
                )

    def run(self, tests: list[Test], threads: list[int]) -> Iterator[Row]:
        """Measure every test with every number of threads.

        Raises UsageError (the context is too short; --cold does not work here).
        """
        self.check(tests)
        if self._cold:
            self._forget()  # says at once if it does not work
        ids = trace(self.config.vocab_size, max(test.end for test in tests), self._seed)
        for n_threads in threads:
            for test in tests:
                yield self._row(test, n_threads, ids)

    def _row(self, test: Test, threads: int, ids: Ids) -> Row:
        started = datetime.now(UTC)
        label = f"{test.name}, {threads} thread{'s' if threads > 1 else ''}"
        self._progress(f"{label}: warm-up", False)
        session = self._engine(threads).session()
        if test.n_depth:
            session.sync(ids[: test.n_depth].tolist())
        context = session.snapshot()
        if test not in self._traffic:
            self._traffic[test] = self._count(test, threads, ids, context)
        profile = disk_wait_s = None
        if self._cold:
            del session
        else:
            run_test(session, test, ids)
        if self._profile:
            profile, disk_wait_s = self._split(test, threads, ids, context)
        self._progress(label, True)

        samples, ceilings, experts = [], [], ExpertStats()
        for repetition in range(self._repetitions):
            ceilings.append(self._ceiling(threads))
            if self._cold:
                self._forget()
                session = self._engine(threads).session()
                session.restore(context)
            else:
                session.rewind(len(session) - test.n_depth)
            before, experts_before = pagecache.read_bytes(), self._experts.stats()
            seconds = run_test(session, test, ids)
            after = pagecache.read_bytes()
            experts += self._experts.stats() - experts_before
            read = after - before if after is not None and before is not None else None
            samples.append(Sample(seconds, read))
            if self._cold:
                del session
            self._progress(f"{label}: {repetition + 1}/{self._repetitions}", True)
        ceilings.append(self._ceiling(threads))
        return Row(
            test=test, threads=threads, precision=self._precision, cold=self._cold,
            seed=self._seed, samples=samples, traffic=self._traffic[test], ceilings=ceilings,
            profile=profile, disk_wait_s=disk_wait_s, experts=experts,
            memory=self._experts.memory if self._experts.bounded else None,
            io=self._experts.io, started=started,
        )  # fmt: skip

    def _engine(self, threads: int) -> Engine:
        from kimi_cpu.kernels import fast

        return Engine(self._checkpoint, self._model(fast, threads))

    def _model(self, kernels: ModuleType, threads: int) -> Model:
        return Model(self._checkpoint, self._experts, kernels, self._precision, threads)

    def _open_experts(self) -> ExpertStore:
        return open_experts(self._checkpoint, memory=self._memory, io=self._io)

    def _observed(
        self, threads: int, observer: ExpertCounter | PartTimer, context: SessionSnapshot
    ) -> tuple[Model, Session]:
        """A model that reports to `observer`, and a session of it after `context`."""
        from kimi_cpu.kernels import fast

        kernels = ObservedKernels(fast, observer)
        model = self._model(kernels, threads)
        session = Session(model)
        session.restore(context)
        observer.reset()
        return model, session

    def _count(self, test: Test, threads: int, ids: Ids, context: SessionSnapshot) -> Traffic:
        counter = ExpertCounter()
        model, session = self._observed(threads, counter, context)
        run_test(session, test, ids)
        return traffic(model, test.passes(), counter.touched)

    def _split(
        self, test: Test, threads: int, ids: Ids, context: SessionSnapshot
    ) -> tuple[dict[str, float], float]:
        """Seconds a token by part, and waiting for the disk, from a pass with timers."""
        timer = PartTimer()
        if self._cold:
            self._forget()
        model, session = self._observed(threads, timer, context)
        timer.watch(model)
        before = self._experts.stats()
        seconds = run_test(session, test, ids)
        split = timer.seconds
        split["other"] += seconds - sum(split.values())
        wait = (self._experts.stats() - before).wait_s
        return {part: value / test.n_tokens for part, value in split.items()}, wait / test.n_tokens

    def _ceiling(self, threads: int) -> float:
        return max(self._reader.measure(threads).values())

    def _forget(self) -> None:
        """Unmap the weights and drop them from the page cache."""
        self._experts.close()
        self._checkpoint.close()
        del self._experts, self._checkpoint  # views on the files would keep them mapped
        gc.collect()
        pagecache.drop(self._files)
        left = pagecache.cached_fraction(self._files)
        if left is not None and left > _COLD_FRACTION:
            raise UsageError(
                f"{left:.0%} of the weight files stay in memory, so nothing would be cold",
                "Another process uses them, or they lie in a memory file system: "
                "copy the model to a disk, or leave out --cold.",
            )
        self._checkpoint = Checkpoint.open(self.folder)
        self._experts = self._open_experts()

    def describe(self) -> dict[str, Any]:
        """What is the same in all rows, with llama-bench's names where it has them."""
        from kimi_cpu.kernels import isa

        return {
            "build_version": __version__,
            "cpu_info": hardware.cpu_name(),
            "kernels": isa.VARIANT,
            "model_filename": str(self.folder),
            "model_type": self.summary.model_type,
            "model_size": self.summary.total_bytes,
            "model_n_params": self.summary.n_parameters,
            "n_layers": self.summary.n_layers,
            "n_batch": PREFILL_CHUNK,
        }
