"""Test runs in processes of their own. They mostly compile, each on one core."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 900


@dataclass(frozen=True)
class Run:
    """`NAME=VALUE pytest FILES`."""

    name: str
    value: str
    files: tuple[str, ...]


class Runs:
    """As many at once as there are cores, in the order given."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        self._pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 1)
        self._outputs: dict[Run, Future[tuple[int, str]]] = {
            run: self._pool.submit(self._play, run) for run in runs
        }

    def result(self, run: Run) -> tuple[int, str]:
        """Wait for the run: exit code and output."""
        return self._outputs[run].result()

    def stop(self) -> None:
        """End the runs that nobody waits for any more."""
        for output in self._outputs.values():
            output.cancel()
        for process in self._processes:
            process.kill()
        self._pool.shutdown()

    def _play(self, run: Run) -> tuple[int, str]:
        with subprocess.Popen(
            [sys.executable, "-m", "pytest", "-x", *run.files], cwd=ROOT, text=True,
            env=os.environ | {run.name: run.value}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) as process:  # fmt: skip
            self._processes.append(process)
            try:
                output, _ = process.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                output = f"not done after {SECONDS} s"
        return process.returncode, output
