"""Kernels as shares of the memory's and the arithmetic's limits, in one interleaved run.

    python -m bench.kernels [--threads 2] [--rounds 5] [--only TEXT] [--json FILE]

Shapes are those of Kimi K2. Weights come from 1 GB of memory and more, one matrix after the other,
so that no cache serves them, and every row is a recorded tape of calls, as a token is. All rows
of a round alternate with the streaming readers of `kernels/bandwidth.py`; the ceiling is the best
reader's median. Only what was measured while every thread had a core of its own counts
(`bench/peak.py`), if --shared-cores is not given. Attention: `bench.attention`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from bench.peak import on_all_cores
from kimi_cpu import hardware
from kimi_cpu.kernels import fast, isa
from kimi_cpu.kernels.bandwidth import READERS, DramReader
from kimi_cpu.kernels.common import ExpertTable, Precision
from kimi_cpu.quant import Int4Weight, PackedWeight, Weight, block_bytes, packed_shape

HIDDEN, WIDTH, N_EXPERTS = 7168, 2048, 48
#: Of the products of several tokens.
TOKENS = (2, 4, 8, 16, 64, 256)
#: Does something once, on all threads: amount a second.
Work = Callable[[], float]
#: A bf16 scale of 2^-10.
_SCALE = 0x3A80
PRECISIONS: tuple[Precision, ...] = ("fast", "exact")
_SHAPES = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))


class Bench:
    """Weights, and what is measured: name -> (unit, function that returns the amount done)."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.rng = np.random.default_rng(0)
        self.reader = DramReader()
        n = 3 * N_EXPERTS
        noise = self.rng.integers(0, 256, 64_000_007, dtype=np.uint8)  # of no period of a matrix
        published = np.resize(noise, n * HIDDEN * WIDTH // 2)
        scales = np.full(n * HIDDEN * WIDTH // 32, _SCALE, np.uint16)
        self.published = [
            Int4Weight(values.reshape(shape[0], -1), scale.reshape(shape[0], -1))
            for values, scale, shape in zip(
                np.split(published, n), np.split(scales, n), _SHAPES * N_EXPERTS, strict=True
            )
        ]
        self.packed4 = self._packed(noise, 4, n)
        self.packed8 = self._packed(noise, 8, n // 2)
        # as bf16: the high bit of the exponent cleared, so no infinities
        bits = np.resize(noise, n // 3 * HIDDEN * WIDTH * 2).view(np.uint16)
        bits &= 0xBFFF
        self.bf16 = [part.reshape(WIDTH, HIDDEN) for part in np.split(bits, n // 3)]
        self.x = {
            (m, d): self.rng.standard_normal((m, d), dtype=np.float32)
            for m in (1, *TOKENS)
            for d in (HIDDEN, WIDTH)
        }

    @staticmethod
    def _packed(noise: np.ndarray, bits: int, n: int) -> list[PackedWeight]:
        size = int(np.prod(packed_shape(WIDTH, HIDDEN, bits)))  # the same for both shapes
        memory = np.resize(noise, n * size)
        memory.reshape(-1, block_bytes(bits))[:, 128 * bits :].view(np.uint16)[:] = _SCALE
        return [
            PackedWeight(part.reshape(packed_shape(*shape, bits)), shape, bits)
            for part, shape in zip(np.split(memory, n), (_SHAPES * N_EXPERTS)[:n], strict=True)
        ]

    def gemv(self, weights: list[Int4Weight] | list[PackedWeight], down: bool) -> Work:
        chosen = [w for i, w in enumerate(weights) if (i % 3 == 2) == down]
        xq = fast.quantize_activations(self.x[1, chosen[0].shape[1]])
        return self.tape(
            lambda: [fast.linear_q8(xq, w, self.threads) for w in chosen],
            sum(w.nbytes for w in chosen) / 1e9,
        )

    def dense_gemv(self, weights: Sequence[Weight], precision: Precision) -> Work:
        x = self.x[1, HIDDEN]
        return self.tape(
            lambda: [fast.project(x, w, precision, self.threads) for w in weights],
            sum(w.nbytes for w in weights) / 1e9,
        )

    def moe(self, weights: list[Int4Weight] | list[PackedWeight]) -> Work:
        """One token through 8 of N_EXPERTS experts after the other."""
        table = ExpertTable.of([tuple(weights[3 * e : 3 * e + 3]) for e in range(N_EXPERTS)])  # type: ignore[misc]
        share = np.full((1, 8), 0.125, np.float32)
        ids = [np.arange(e, e + 8, dtype=np.int32)[None] for e in range(0, N_EXPERTS, 8)]
        x = self.x[1, HIDDEN]
        return self.tape(
            lambda: [fast.moe(x, table, i, share, "fast", self.threads) for i in ids],
            sum(w.nbytes for w in weights) / 1e9,
        )

    def gemm(self, weights: list[Int4Weight] | list[PackedWeight], m: int) -> Work:
        xq = fast.quantize_activations(self.x[m, HIDDEN])
        chosen = weights[0 : 3 * max(2, 128 // m) : 3]
        return self.tape(
            lambda: [fast.linear_q8(xq, w, self.threads) for w in chosen],
            len(chosen) * 2e-9 * m * HIDDEN * WIDTH,
        )

    def gemm_bf16(self, m: int, precision: Precision) -> Work:
        x, weights = self.x[m, HIDDEN], self.bf16[: max(4, 48 // m)]
        return self.tape(
            lambda: [fast.project(x, w, precision, self.threads) for w in weights],
            len(weights) * 2e-9 * m * HIDDEN * WIDTH,
        )

    def tape(self, compute: Callable[[], object], amount: float) -> Work:
        """Record what `compute` does; returns a function that does it and the seconds taken."""
        with fast.recording() as tape:
            compute()

        def measure() -> float:
            start = time.perf_counter()
            tape.play(self.threads)
            return amount / (time.perf_counter() - start)

        return measure

    def rows(self) -> dict[str, tuple[str, Work]]:
        """Name -> unit and measurement."""
        found: dict[str, tuple[str, Work]] = {}
        for name, weights in (
            ("INT4 packed", self.packed4), ("INT4 published", self.published),
            ("int8 packed", self.packed8),
        ):  # fmt: skip
            for down, shape in enumerate(("2048x7168", "7168x2048")):
                found[f"{name} GEMV {shape}"] = "GB/s", self.gemv(weights, bool(down))
            if name != "int8 packed":
                found[f"{name} moe, 1 token"] = "GB/s", self.moe(weights)
            for m in TOKENS:
                found[f"{name} GEMM M={m}"] = "GOP/s", self.gemm(weights, m)
        for precision in PRECISIONS:
            name = f"bf16 {precision}"
            found[f"{name} GEMV 2048x7168"] = "GB/s", self.dense_gemv(self.bf16, precision)
            for m in TOKENS:
                found[f"{name} GEMM M={m}"] = "GFLOP/s", self.gemm_bf16(m, precision)
        for name, weights in ("INT4 packed", self.packed4), ("INT4 published", self.published):
            found[f"{name} x float32 GEMV"] = "GB/s", self.dense_gemv(weights[:48:3], "exact")
        return found


def measure(
    bench: Bench, rounds: int, only: str, shared_cores: bool
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Every row `rounds` times, alternating with the readers; returns values and units."""
    results: dict[str, list[float]] = {}
    units: dict[str, str] = {}
    rows = {n: r for n, r in bench.rows().items() if any(part in n for part in only.split("|"))}
    for number in range(rounds + 1):  # the first warms up and compiles
        for name, (unit, work) in rows.items():
            readers = {
                f"read, {reader}": lambda r=reader: bench.reader.read(r, bench.threads) / 1e9
                for reader in READERS
            }
            turn = {**(readers if unit == "GB/s" else {}), name: work}

            def measured(turn: dict[str, Work] = turn) -> dict[str, float]:
                return {label: each() for label, each in turn.items()}

            values = measured() if shared_cores else on_all_cores(measured, bench.threads)
            units[name] = unit
            if number and values:
                for label, value in values.items():
                    results.setdefault(label, []).append(value)
    return results, units


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=hardware.default_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="only names that contain one of A|B|C")
    parser.add_argument("--shared-cores", action="store_true", help="do not wait for whole cores")
    parser.add_argument("--json", help="append the medians to this file, one line of JSON")
    options = parser.parse_args()
    results, units = measure(
        Bench(options.threads), options.rounds, options.only, options.shared_cores
    )
    middle = {name: statistics.median(values) for name, values in results.items()}
    ceiling = max((v for name, v in middle.items() if name.startswith("read")), default=0.0)
    print(f"{hardware.cpu_name()}, {isa.VARIANT}, {options.threads} threads, "
          f"{options.rounds} rounds, best reader {ceiling:.1f} GB/s")  # fmt: skip
    for name, values in results.items():
        unit = units.get(name, "GB/s")
        line = (
            f"{name:32s} {middle[name]:7.1f} ({min(values):.1f}-{max(values):.1f}, {len(values)})"
        )
        line += f" {unit}"
        if unit == "GB/s":
            line += f"  {middle[name] / ceiling:4.0%}"
        print(line)
    if options.json:
        with Path(options.json).open("a", encoding="utf-8") as file:
            print(json.dumps({
                "what": "kernels", "cpu": hardware.cpu_name(), "variant": isa.VARIANT,
                "threads": options.threads, "rounds": options.rounds, "medians": middle,
            }), file=file)  # fmt: skip


if __name__ == "__main__":
    main()
