"""The arithmetic peak of this machine, and whether all of its cores are there to reach it.

A virtual machine's CPUs may be two threads of one core for some seconds and two cores in the next:
a loop of multiply-adds in registers on all threads, against the same loop on one, tells.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba.core import types

from kimi_cpu.kernels import isa
from kimi_cpu.kernels.attention_tile import FORM_BF16, FORM_F32, HAS_BF16_DOT, _multiply_add
from kimi_cpu.kernels.common import address
from kimi_cpu.kernels.simd import FLOAT, I32, Emit, F32x16, const, literal_intrinsic, store_f32
from kimi_cpu.kernels.threads import load_args, op_of, run

_CHAINS = 16 if isa.VARIANT == "avx512vnni" else 6


@literal_intrinsic
def _multiply_adds(typingctx: Any, form: Any, n: Any) -> Any:
    """n times _CHAINS independent vectors of multiply-adds, in registers."""
    form_value = form.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emit(builder)
        if form_value == FORM_BF16 and not HAS_BF16_DOT:
            return const(FLOAT, 0.0)
        acc = [e.variable(const(F32x16, float(k))) for k in range(_CHAINS)]
        x = e.splat(builder.sitofp(args[1], FLOAT))
        with e.loop(0, args[1]):
            for a in acc:
                e.set(a, _multiply_add(e, form_value, x, x, e.get(a)))
        total = e.get(acc[0])
        for a in acc[1:]:
            total = builder.fadd(total, e.get(a))
        return builder.extract_element(total, const(I32, 0))

    return types.float32(form, types.int64), codegen


@isa.jit
def peak_range(form, n, sink, start, stop):  # type: ignore[no-untyped-def]
    """The loop for the items start .. stop-1; storing its result keeps it from being left out."""
    for _ in range(start, stop):
        if form == FORM_BF16:
            store_f32(sink, _multiply_adds(FORM_BF16, n))
        else:
            store_f32(sink, _multiply_adds(FORM_F32, n))


@op_of(peak_range)
def peak_op(args, start, stop):  # type: ignore[no-untyped-def]
    peak_range(*load_args(args, 3), start, stop)


T = TypeVar("T")
_sink = np.zeros(1, np.float32)


def peak(form: int, threads: int, clock: Any = time.perf_counter, n: int = 200_000) -> float:
    """GFLOP/s (two a multiply-add) of the loop with n turns, 16 times a thread."""
    items = 16 * threads
    each = _CHAINS * 16 * (2 if form == FORM_BF16 else 1)
    begin = clock()
    run(peak_range, (form, n, address(_sink)), (), items, 1, threads, 1 << 40)
    return 2e-9 * n * items * each / float(clock() - begin)


def cores_present(threads: int) -> float:
    """How many cores' worth of arithmetic `threads` threads get now; takes about 10 ms."""
    return peak(FORM_F32, threads, n=40_000) / peak(FORM_F32, 1, n=40_000)


def on_all_cores(work: Callable[[], T], threads: int) -> T | None:
    """What `work` returns, measured while every thread had a core; None if that did not happen.

    Waits and repeats, for some ten seconds at most.
    """
    for _ in range(20):
        if cores_present(threads) > 0.85 * threads:
            value = work()
            if cores_present(threads) > 0.85 * threads:
                return value
        time.sleep(0.5)
    return None
