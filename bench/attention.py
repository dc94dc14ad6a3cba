"""Attention kernels as a share of the arithmetic peak, and of BLAS, in one interleaved run.

    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE -u OMP_NUM_THREADS \\
        python -m bench.attention [--threads 2] [--rounds 5] [--only TEXT] [--cpu-time]

The peak is a loop of multiply-adds that touch registers only, on all threads; the rate of BLAS is
NumPy's float32 product of two 2048 x 2048 matrices. Shapes are those of Kimi K2: 64 heads, latents
512 + 64, keys 128 + 64, values 128. Decode counts 64 x (576 + 512) multiply-adds a row, prefill
192 + 128 for each pair of a query and a visible key. On a machine that others share, --cpu-time
counts the CPU seconds of a single thread instead (and leaves BLAS out); otherwise only what was
measured while every thread had a core of its own counts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from bench.peak import on_all_cores, peak
from kimi_cpu import hardware
from kimi_cpu.kernels import fast, isa
from kimi_cpu.kernels.attention_tile import FORM_BF16, FORM_F32, HAS_BF16_DOT
from kimi_cpu.kernels.common import BLOCK_TOKENS, Latents, address
from kimi_cpu.quant import F32, U16, f32_to_bf16

HEADS, RANK, ROPE, NOPE, VALUE = 64, 512, 64, 128, 128


class Bench:
    """Inputs and measurements; each returns GFLOP/s (two a multiply-add)."""

    def __init__(self, threads: int, longest: int, cpu_time: bool = False) -> None:
        self.threads = 1 if cpu_time else threads
        self.clock = time.thread_time if cpu_time else time.perf_counter
        self.rng = np.random.default_rng(0)
        rows = self.x(-(-longest // BLOCK_TOKENS) * BLOCK_TOKENS, RANK + ROPE)
        self.blocks: dict[bool, F32 | U16] = {False: rows, True: f32_to_bf16(rows)}
        self.matrix = self.x(2048, 2048)
        self.product = np.empty_like(self.matrix)

    def x(self, *shape: int) -> F32:
        return self.rng.standard_normal(shape, dtype=np.float32)

    def peak(self, form: int) -> float:
        return peak(form, self.threads, self.clock)

    def blas(self) -> float:
        begin = self.clock()
        np.matmul(self.matrix, self.matrix, out=self.product)
        seconds = self.clock() - begin
        time.sleep(0.3)  # the threads of BLAS spin on after its end
        return 2e-9 * 2048**3 / seconds

    def decode(self, rows: int, bf16: bool, tokens: int = 1) -> float:
        blocks = self.blocks[bf16]  # of BLOCK_TOKENS rows: first their c_kv, then their k_pe
        steps = np.arange(-(-rows // BLOCK_TOKENS)) * BLOCK_TOKENS * blocks[0].nbytes
        table = address(blocks) + steps
        latents = Latents(
            np.array([address(table)]), np.array([rows - tokens]), rows, 0,
            BLOCK_TOKENS * RANK * blocks.itemsize, RANK, ROPE, blocks.dtype.type,
        )  # fmt: skip
        q, q_pe = self.x(tokens, HEADS, RANK), self.x(tokens, HEADS, ROPE)
        begin = self.clock()
        fast.mla_decode(q, q_pe, latents, 0.05, self.threads)
        seconds = self.clock() - begin
        return 2e-9 * tokens * HEADS * (2 * RANK + ROPE) * rows / seconds

    def prefill(self, tokens: int, heads: int, bf16: bool) -> float:
        q, q_pe = self.x(tokens, heads, NOPE), self.x(tokens, heads, ROPE)
        kv, k_pe = self.x(tokens, heads, NOPE + VALUE), self.x(tokens, ROPE)
        pe = f32_to_bf16(k_pe) if bf16 else k_pe
        begin = self.clock()
        fast.mla_prefill(q, q_pe, kv, pe, 0, 0.05, self.threads)
        seconds = self.clock() - begin
        return 1e-9 * heads * tokens * (tokens + 1) * (NOPE + ROPE + VALUE) / seconds

    def all(self) -> dict[str, Callable[[], float]]:
        """Name -> measurement. A name that ends in bf16 is compared with the bf16 peak."""
        found: dict[str, Callable[[], float]] = {
            "peak f32": lambda: self.peak(FORM_F32),
            "peak bf16": lambda: self.peak(FORM_BF16),
            "sgemm": self.blas,
        }
        for kind, bf16 in (("bf16", True), ("f32", False)):
            for rows in (512, 4096, 32768, 131072):
                found[f"decode {rows} rows {kind}"] = lambda r=rows, b=bf16: self.decode(r, b)
            found[f"decode 4096 rows, 8 tokens {kind}"] = lambda b=bf16: self.decode(4096, b, 8)
            for tokens, heads in ((1024, HEADS), (8192, 4)):
                found[f"prefill {tokens} x {heads} heads {kind}"] = (
                    lambda t=tokens, h=heads, b=bf16: self.prefill(t, h, b)
                )
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=hardware.default_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--longest", type=int, default=131072, help="rows of the cache")
    parser.add_argument("--only", default="", help="measure only names that contain this")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, in CPU seconds")
    options = parser.parse_args()
    bench = Bench(options.threads, options.longest, options.cpu_time)
    results: dict[str, list[float]] = {}
    for round_number in range(options.rounds + 1):  # the first warms up and compiles
        for name, measure in bench.all().items():
            references = ("peak f32", "peak bf16", "sgemm")
            wanted = name in references or any(o in name for o in options.only.split("|"))
            if options.cpu_time and name == "sgemm":
                continue
            if not wanted or (name.startswith("decode") and int(name.split()[1]) > options.longest):
                continue
            value = measure() if options.cpu_time else on_all_cores(measure, bench.threads)
            if round_number and value is not None:
                results.setdefault(name, []).append(value)
    middle = {name: statistics.median(values) for name, values in results.items()}
    lines = [
        f"{hardware.cpu_name()}, {isa.VARIANT}{' + bf16 dot' if HAS_BF16_DOT else ''}, "
        f"{bench.threads} threads, {options.rounds} rounds"
    ]
    for name, values in results.items():
        line = f"{name:34s} median {middle[name]:7.1f}  best {max(values):7.1f} GFLOP/s"
        if name.startswith(("decode", "prefill")):
            form = "bf16" if HAS_BF16_DOT and name.endswith("bf16") else "f32"
            line += f"  {middle[name] / middle[f'peak {form}']:5.0%} of the {form} peak"
            if "sgemm" in middle:
                line += f"  {middle[name] / middle['sgemm']:5.0%} of sgemm"
        if name.startswith("decode"):
            words = name.split()
            tokens = int(words[3]) if "tokens" in name else 1
            work = 2e-9 * tokens * HEADS * (2 * RANK + ROPE) * int(words[1])
            line += f"  {1e3 * work / middle[name]:6.2f} ms"
        lines.append(line)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
