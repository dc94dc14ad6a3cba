"""Kernels, oracle and fast precision once more: other instruction sets, arrays with bounds checks.

The runs are begun with the first test of this folder, and compile beside the others.
"""

from __future__ import annotations

import os

import pytest

from kimi_cpu.kernels import isa
from tests.kernels.runs import Run, Runs

KERNELS = tuple(
    f"tests/kernels/test_{name}.py" for name in ("linear", "moe", "attention", "rows", "repacking")
)
MODEL = ("tests/test_oracle.py", "tests/test_precision.py")
BOUNDS = Run("NUMBA_BOUNDSCHECK", "1", (*KERNELS, "tests/kernels/test_threads.py"))
OTHERS = [Run("KIMI_CPU_ISA", variant, (*KERNELS, *MODEL)) for variant in isa.runnable()[1:]]
RUNS = [*OTHERS[::-1], BOUNDS]  # portable code takes longest to compile
if any(name in os.environ for name in ("KIMI_CPU_ISA", "NUMBA_BOUNDSCHECK")):
    RUNS = []  # this is such a run already


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.name}={run.value}")
def test_kernels_in_another_run(run: Run, runs: Runs) -> None:
    code, output = runs.result(run)
    assert code == 0, output[-4000:]
    assert " passed" in output  # not only skipped
