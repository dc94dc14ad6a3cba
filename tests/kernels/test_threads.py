"""The worker pool, several sessions at once, and the compiled code's variants."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

from kimi_cpu.kernels import fast, isa
from kimi_cpu.kernels import threads as pool

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("total", "grain", "threads"), [(1, 1, 4), (7, 2, 3), (100, 32, 2), (5, 8, 2)]
)
def test_ranges_cover_everything_once(total, grain, threads):
    seen = np.zeros(total, dtype=int)

    def kernel(offset, start, stop):
        assert offset == 3 and start % grain == 0
        seen[start:stop] += 1

    pool.run(kernel, (3,), (), total, grain, threads, cost=1 << 40)
    assert (seen == 1).all()


def test_small_work_runs_in_the_calling_thread():
    where = []
    pool.run(lambda *_: where.append(threading.get_ident()), (), (), 100, 1, 8, cost=10)
    assert where == [threading.get_ident()]


def test_an_error_in_a_worker_is_raised_and_the_pool_survives():
    def fail(start, stop):
        raise RuntimeError(f"rows {start}")

    for _ in range(3):
        with pytest.raises(RuntimeError, match="rows"):
            pool.run(fail, (), (), 8, 1, 4, cost=1 << 40)
    test_ranges_cover_everything_once(50, 1, 4)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
def test_arrays_outlive_an_interrupted_call():
    """Ctrl-C may leave a worker writing: it must not write into freed memory."""

    class Array:
        pass

    main, started, release = threading.get_ident(), threading.Event(), threading.Event()

    def kernel(start, stop):  # two ranges, one for this thread and one for a worker
        if threading.get_ident() == main:
            assert started.wait(10)
        else:
            started.set()
            assert release.wait(10)

    array = Array()
    alive = weakref.ref(array)

    def press_ctrl_c():
        started.wait(10)
        time.sleep(0.2)  # by now the main thread waits for the worker
        signal.pthread_kill(main, signal.SIGINT)

    presser = threading.Thread(target=press_ctrl_c)
    presser.start()
    with pytest.raises(KeyboardInterrupt):
        pool.run(kernel, (), (array,), 2, 1, 2, cost=1 << 40)
    presser.join()
    del array
    gc.collect()
    assert alive() is not None
    release.set()
    for _ in range(100):
        gc.collect()
        if alive() is None:
            break
        time.sleep(0.02)
    assert alive() is None


def test_sessions_may_compute_at_the_same_time(inputs, monkeypatch):
    monkeypatch.setattr(pool, "MIN_PARALLEL_COST", 0)
    x, w = inputs.f32(3, 256), inputs.weight("int4", 300, 256)
    want = fast.linear(x, w)
    wrong = []

    def session():
        for _ in range(100):
            if not np.array_equal(fast.linear(x, w, threads=2), want):
                wrong.append(1)

    sessions = [threading.Thread(target=session) for _ in range(3)]
    for s in sessions:
        s.start()
    for s in sessions:
        s.join(60)
        assert not s.is_alive()
    assert not wrong


def run_python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, **env}, timeout=300, check=False,
    )  # fmt: skip


def test_an_unknown_variant_is_refused():
    result = run_python("from kimi_cpu.kernels import fast", KIMI_CPU_ISA="avx1024")
    assert "UsageError" in result.stderr and "avx1024" in result.stderr


def test_reference_needs_no_numba():
    code = "import sys; from kimi_cpu.kernels import reference; sys.exit('numba' in sys.modules)"
    assert run_python(code).returncode == 0


@pytest.mark.skipif("KIMI_CPU_ISA" in os.environ, reason="already a forced variant")
@pytest.mark.parametrize("variant", [v for v in isa.VARIANTS if v != isa.VARIANT])
def test_other_variants(variant):
    """The kernel tests pass with each variant that this machine can run."""
    if isa.VARIANTS.index(variant) < isa.VARIANTS.index(isa.VARIANT):
        pytest.skip(f"this machine cannot run {variant}")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", *[f"tests/kernels/test_{name}.py" for name in
                                                       ("linear", "moe", "attention")]],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "KIMI_CPU_ISA": variant},
        timeout=600, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


def test_a_home_that_cannot_be_written(tmp_path):
    """Compiled code goes to the temporary folder then, and the kernels still work."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    code = (
        "from kimi_cpu.kernels import isa; from pathlib import Path; import os, tempfile;"
        "print(isa.CACHE_FOLDER); assert Path(tempfile.gettempdir()) in isa.CACHE_FOLDER.parents"
    )
    result = run_python(code, XDG_CACHE_HOME=str(blocked), TMPDIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
