"""The worker pool, several sessions at once, and where compiled code is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from kimi_cpu.kernels import fast, isa
from kimi_cpu.kernels import threads as pool
from kimi_cpu.kernels.common import address
from kimi_cpu.kernels.rows import store_i64
from kimi_cpu.kernels.simd import load_i64

ROOT = Path(__file__).parents[2]


@isa.jit
def count_rows(out, start, stop):
    """out[i] += 1 for start <= i < stop."""
    for i in range(start, stop):
        store_i64(out + 8 * i, load_i64(out + 8 * i) + 1)


@isa.jit
def copy_first(source, out, start, stop):
    """out[start:stop] = source[0]."""
    for i in range(start, stop):
        store_i64(out + 8 * i, load_i64(source))


@pool.op_of(count_rows)
def _count(args, start, stop):
    count_rows(*pool.load_args(args, 1), start, stop)


@pool.op_of(copy_first)
def _copy(args, start, stop):
    copy_first(*pool.load_args(args, 2), start, stop)


@pytest.mark.parametrize(
    ("total", "grain", "threads"), [(1, 1, 4), (7, 2, 3), (100, 32, 2), (5, 8, 2), (10000, 1, 3)]
)
def test_ranges_cover_everything_once(total, grain, threads):
    for _ in range(50):
        seen = np.zeros(total + 1, dtype=np.int64)
        pool.run(count_rows, (address(seen),), (seen,), total, grain, threads, cost=1 << 40)
        assert (seen[:-1] == 1).all() and seen[-1] == 0


def test_nothing_to_do():
    seen = np.zeros(1, dtype=np.int64)
    pool.run(count_rows, (address(seen),), (seen,), 0)
    assert seen[0] == 0


def test_a_tape_plays_again_with_what_lies_in_its_inputs():
    source = np.array([5], dtype=np.int64)
    with pool.recording() as tape:
        middle = pool.empty((100,), np.int64)
        pool.run(copy_first, (address(source), address(middle)), (), 100, 1, 2, cost=1 << 40)
        out = pool.empty((300,), np.int64)
        pool.run(copy_first, (address(middle), address(out)), (), 300, 1, 2, cost=1 << 40)
    for value in (5, 7, -3):
        source[0] = value
        tape.play(threads=2)
        assert (out == value).all()


def test_a_tape_reuses_memory_that_nobody_refers_to():
    with pool.recording():
        first = pool.empty((100,), np.float32)
        view = first[10:]
        at = address(first)
        del first
        second = pool.empty((50,), np.float32)
        assert address(second) != at  # the view still needs it
        del view
        third = pool.empty((5, 10), np.float32)
        assert address(third) == at and third.shape == (5, 10)


def test_a_tape_calls_python_where_a_condition_is_set():
    condition, never = np.array(1, dtype=np.int64), np.zeros((), dtype=np.int64)
    seen, calls = np.zeros(4, dtype=np.int64), []

    def call():
        calls.append(seen.tolist())
        pool.run(count_rows, (address(seen),), (seen,), 1)  # not recorded, done at once

    with pool.recording() as tape:
        pool.run(count_rows, (address(seen),), (seen,), 2)
        tape.call_if(condition, call)
        tape.call_if(never, lambda: calls.append("never"))
        pool.run(count_rows, (address(seen),), (seen,), 4)
        tape.call_if(condition, lambda: calls.append("last"))
    tape.play(threads=1)
    condition[()] = 0
    tape.play(threads=2)
    assert calls == [[1, 1, 0, 0], "last"]
    assert seen.tolist() == [5, 4, 2, 2]
    condition[()] = 1
    with pool.recording() as failing:
        failing.call_if(condition, lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        failing.play(threads=2)


def test_workers_sleep_when_there_is_nothing_to_do():
    test_ranges_cover_everything_once(1000, 1, 2)
    time.sleep(0.2)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.05
    test_ranges_cover_everything_once(1000, 1, 2)  # and they wake up again


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_gets_a_team_of_its_own():
    test_ranges_cover_everything_once(1000, 1, 2)
    child = os.fork()
    if child == 0:
        seen = np.zeros(1000, dtype=np.int64)
        pool.run(count_rows, (address(seen),), (seen,), 1000, 1, 2, cost=1 << 40)
        os._exit(0 if (seen == 1).all() else 1)
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert status == 0


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


def test_reference_needs_no_numba():
    code = "import sys; from kimi_cpu.kernels import reference; sys.exit('numba' in sys.modules)"
    assert run_python(code).returncode == 0


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


def test_a_home_on_a_full_disk(tmp_path):
    """Compiled code goes to the temporary folder then."""
    home, tmp = tmp_path / "home", tmp_path / "tmp"
    tmp.mkdir()
    code = (
        "import shutil, types; from pathlib import Path; real = shutil.disk_usage;"
        f"shutil.disk_usage = lambda p: types.SimpleNamespace(free=0 if {str(home)!r} in str(p) "
        "else real(p).free);"
        "from kimi_cpu.kernels import isa;"
        f"assert Path({str(tmp)!r}) in isa.CACHE_FOLDER.parents, isa.CACHE_FOLDER"
    )
    result = run_python(code, XDG_CACHE_HOME=str(home), TMPDIR=str(tmp))
    assert result.returncode == 0, result.stderr


@isa.jit
def turn(out, turns, start, stop):
    """Something that takes a while, in one thread."""
    for i in range(turns):
        store_i64(out, load_i64(out) ^ i * load_i64(out))


@pool.op_of(turn)
def _turn(args, start, stop):
    turn(*pool.load_args(args, 2), start, stop)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two threads need two cores")
def test_workers_stay_awake_while_one_thread_computes():
    """Some milliseconds in one thread do not leave the rest of a tape to it alone."""
    out, seen = np.zeros(1, dtype=np.int64), np.zeros(64, dtype=np.int64)
    pool.run(count_rows, (address(seen),), (seen,), 64, 1, 2, cost=1 << 40)  # there is a team
    awake = pool._team.address + 8 * pool._AWAKE
    with pool.recording() as tape:
        pool.run(count_rows, (address(seen),), (seen,), 64, 1, 2, cost=1 << 40)
        pool.run(turn, (address(out), 20_000_000), (out,), 1)
        pool.run(copy_first, (awake, address(out)), (out,), 1)
    deadline = time.monotonic() + 20  # the other core may be lent to somebody else for a while
    out[0] = 0
    while out[0] == 0 and time.monotonic() < deadline:
        tape.play(threads=2)
    assert out[0] >= 1
