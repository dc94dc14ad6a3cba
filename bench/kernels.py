"""Kernel speed as a share of what this machine can do, in one interleaved run.

    python bench/kernels.py [--threads 2] [--rounds 5] [--only TEXT]

Reading kernels (GEMV, one token through the experts) are compared with the fastest plain reader
of the same memory, whose working set is far beyond the caches; the machine's other load moves
both. Shapes are those of Kimi K2: hidden 7168, expert width 2048, 64 heads, latents 512 + 64.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numba.core import types

from kimi_cpu import hardware
from kimi_cpu.kernels import fast, isa
from kimi_cpu.kernels.common import ExpertTable, address
from kimi_cpu.kernels.simd import I32, Emit, I32x16, const, intrinsic, store_i32
from kimi_cpu.kernels.threads import load_args, op_of, run
from kimi_cpu.quant import Int4Weight

HIDDEN, WIDTH, HEADS, RANK, ROPE = 7168, 2048, 64, 512, 64
N_EXPERTS = 48  # 1.2 GB
STREAMS = 8


@intrinsic
def _read(typingctx: Any, addr: Any, n_bytes: Any) -> Any:
    """Touch n_bytes in STREAMS streams."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emit(builder)
        acc = [e.variable(const(I32x16, 0)) for _ in range(STREAMS)]
        length = builder.sdiv(args[1], e.i64(STREAMS))
        with e.loop(0, length, 64) as i:
            for k, a in enumerate(acc):
                at = e.add(e.add(args[0], e.mul(length, k)), i)
                e.prefetch(at, 1024)
                e.set(a, builder.add(e.get(a), e.load(I32x16, at)))
        total = e.get(acc[0])
        for a in acc[1:]:
            total = builder.add(total, e.get(a))
        return builder.extract_element(total, const(I32, 0))

    return types.int32(types.int64, types.int64), codegen


@isa.jit
def read_range(addr, block_bytes, sink, start, stop):  # type: ignore[no-untyped-def]
    """Read the blocks start .. stop-1; storing keeps the compiler from leaving it out."""
    for block in range(start, stop):
        store_i32(sink, _read(addr + block * block_bytes, block_bytes))


@op_of(read_range)
def read_op(args, start, stop):  # type: ignore[no-untyped-def]
    read_range(*load_args(args, 3), start, stop)


class Bench:
    """Inputs, and the measurements: name -> function that returns (amount, unit)."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        rng = self.rng = np.random.default_rng(0)
        d, i = HIDDEN, WIDTH
        self.sink = np.zeros(1, np.int32)
        nibbles, scales = d * i // 2, d * i // 32
        self.packed = np.resize(
            rng.integers(0, 256, 100_000_007, dtype=np.uint8), 3 * N_EXPERTS * nibbles
        )
        self.scale = np.full(3 * N_EXPERTS * scales, 0x3A80, np.uint16)
        self.int4 = [
            Int4Weight(
                self.packed[k * nibbles :][:nibbles].reshape(*shape[k % 3 // 2]),
                self.scale[k * scales :][:scales].reshape(shape[k % 3 // 2][0], -1),
            )
            for k in range(3 * N_EXPERTS)
            for shape in [((i, d // 2), (d, i // 2))]
        ]
        self.table = ExpertTable(lambda e: tuple(self.int4[3 * e : 3 * e + 3]), N_EXPERTS, WIDTH)  # type: ignore[arg-type,return-value]
        as_bf16 = self.packed.view(np.uint16)
        as_bf16 &= 0xBFFF  # no infinities
        n = len(as_bf16) // (d * i)
        self.bf16 = [as_bf16[k * d * i :][: d * i].reshape(i, d) for k in range(n)]

    def x(self, n: int, d: int) -> np.ndarray:
        return self.rng.standard_normal((n, d)).astype(np.float32)

    def read(self) -> float:
        block = 8 << 20
        n = self.packed.nbytes // block
        run(
            read_range,
            (address(self.packed), block, address(self.sink)),
            (),
            n,
            1,
            self.threads,
            1 << 40,
        )
        return n * block / 1e9

    def gemv_q8(self, down: bool) -> float:
        weights = [w for k, w in enumerate(self.int4) if (k % 3 == 2) == down][:N_EXPERTS]
        xq = fast.quantize_activations(self.x(1, weights[0].shape[1]))
        for w in weights:
            fast.linear_q8(xq, w, self.threads)
        return sum(w.nbytes for w in weights) / 1e9

    def gemv_exact(self) -> float:
        x = self.x(1, HIDDEN)
        for w in self.int4[0:24:3]:
            fast.linear(x, w, self.threads)
        return 8 * self.int4[0].nbytes / 1e9

    def gemv_bf16(self) -> float:
        x = self.x(1, HIDDEN)
        for w in self.bf16:
            fast.linear(x, w, self.threads)
        return sum(w.nbytes for w in self.bf16) / 1e9

    def moe_token(self) -> float:
        x, weights = self.x(1, HIDDEN), np.full((1, 8), 0.125, np.float32)
        for first in range(0, N_EXPERTS, 8):
            ids = np.arange(first, first + 8, dtype=np.int32)[None]
            fast.moe(x, self.table, ids, weights, "fast", self.threads)
        return (self.packed.nbytes + self.scale.nbytes) / 1e9

    def gemm_q8(self, m: int) -> float:
        xq = fast.quantize_activations(self.x(m, HIDDEN))
        n = max(1, 128 // m)
        for w in self.int4[0 : 3 * n : 3]:
            fast.linear_q8(xq, w, self.threads)
        return n * 2 * m * HIDDEN * WIDTH / 1e9

    def gemm_bf16(self, m: int) -> float:
        x = self.x(m, HIDDEN)
        fast.linear(x, self.bf16[0], self.threads)
        return 2 * m * HIDDEN * WIDTH / 1e9

    def decode(self, rows: int) -> float:
        cache = self.x(rows, RANK + ROPE).view(np.uint32)
        bits = (cache >> 16).astype(np.uint16)
        c_kv, k_pe = np.ascontiguousarray(bits[:, :RANK]), np.ascontiguousarray(bits[:, RANK:])
        q, q_pe = self.x(1, HEADS * RANK), self.x(1, HEADS * ROPE)
        start = time.perf_counter()
        fast.mla_decode(
            q.reshape(1, HEADS, RANK), q_pe.reshape(1, HEADS, ROPE), c_kv, k_pe, rows - 1, 0.1,
            self.threads,
        )  # fmt: skip
        return time.perf_counter() - start

    def prefill(self, n: int) -> float:
        q, q_pe = self.x(n, HEADS * 128), self.x(n, HEADS * ROPE)
        kv, k_pe = self.x(n, HEADS * 256), self.x(n, ROPE)
        start = time.perf_counter()
        fast.mla_prefill(
            q.reshape(n, HEADS, 128), q_pe.reshape(n, HEADS, ROPE), kv.reshape(n, HEADS, 256), k_pe,
            0, 0.1, self.threads,
        )  # fmt: skip
        return HEADS * n * n * (192 + 128) / 1e9 / (time.perf_counter() - start)

    def rates(self) -> dict[str, tuple[str, Callable[[], float]]]:
        """Measured by time: amount / seconds."""
        return {
            "read": ("GB/s", self.read),
            "int4 q8 GEMV 2048x7168": ("GB/s", lambda: self.gemv_q8(False)),
            "int4 q8 GEMV 7168x2048": ("GB/s", lambda: self.gemv_q8(True)),
            "moe, 1 token, 8 experts": ("GB/s", self.moe_token),
            "bf16 GEMV 2048x7168": ("GB/s", self.gemv_bf16),
            "int4 exact GEMV 2048x7168": ("GB/s", self.gemv_exact),
            **{f"int4 q8 GEMM M={m}": ("GOP/s", lambda m=m: self.gemm_q8(m)) for m in (8, 64, 256)},
            "bf16 GEMM M=64": ("GFLOP/s", lambda: self.gemm_bf16(64)),
        }

    def timed(self) -> dict[str, tuple[str, Callable[[], float]]]:
        """Functions that return their own result."""
        return {
            "mla_decode 4K rows": ("s", lambda: self.decode(4096)),
            "mla_decode 32K rows": ("s", lambda: self.decode(32768)),
            "mla_prefill 1K": ("GFLOP/s", lambda: self.prefill(1024)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=hardware.default_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="measure only names that contain this")
    options = parser.parse_args()
    bench = Bench(options.threads)
    results: dict[str, list[float]] = {}
    units: dict[str, str] = {}
    for round_number in range(options.rounds + 1):  # the first warms up and compiles
        for name, (unit, amount) in bench.rates().items():
            if options.only in name or name == "read":
                start = time.perf_counter()
                done = amount()
                value = done / (time.perf_counter() - start)
                units[name] = unit
                if round_number:
                    results.setdefault(name, []).append(value)
        for name, (unit, value_of) in bench.timed().items():
            if options.only in name:
                value, units[name] = value_of(), unit
                if round_number:
                    results.setdefault(name, []).append(value)
    ceiling = max(results["read"])
    cpu = hardware.cpu_name()
    lines = [f"{cpu}, {isa.VARIANT}, {options.threads} threads, {options.rounds} rounds"]
    for name, values in results.items():
        middle = statistics.median(values)
        best = min(values) if units[name] == "s" else max(values)
        line = f"{name:28s} median {middle:8.4g}  best {best:8.4g} {units[name]}"
        if units[name] == "GB/s":
            line += f"  {middle / statistics.median(results['read']):5.0%} of the median reader"
            line += f"  {middle / ceiling:5.0%} of the best"
        lines.append(line)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
