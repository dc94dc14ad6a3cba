"""Repacking against what the disk does when it reads and writes plainly at the same time.

    python -m bench.repack -m PUBLISHED --out FOLDER [--rounds 2] [--copy-gb 3]

Turn by turn, all past the page cache: reading alone, writing alone, both at once (a thread each, in
blocks of 16 MB, what is written made up in memory: nothing is computed and nobody waits for
another), then `repack` of the whole checkpoint into FOLDER, which is deleted again. One disk
shares its bandwidth between both directions, so the ceiling of repacking is the third figure, not
the smaller of the first two. With FOLDER on another disk than PUBLISHED, or one of them in memory
(tmpfs), nothing is shared but the processors, and the third figure is about that smaller one.
FOLDER must not exist; its disk needs room for the packed checkpoint and the copy.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import threading
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from kimi_cpu.benchmark import pagecache
from kimi_cpu.errors import UserError
from kimi_cpu.kernels import repacking
from kimi_cpu.quant import U8
from kimi_cpu.store.repack import Options, plan_repack, repack
from kimi_cpu.store.repack.files import Files, Scratch

BLOCK_BYTES = 16 << 20


def read_all(paths: list[Path], n_bytes: int) -> None:
    """Read the first n bytes of these files together, to nowhere."""
    scratch, files = Scratch(BLOCK_BYTES), Files()
    try:
        for path in paths:
            size = min(path.stat().st_size, n_bytes)
            n_bytes -= size
            for offset in range(0, size // BLOCK_BYTES * BLOCK_BYTES, BLOCK_BYTES):
                scratch.clear()
                files.read(path, offset, BLOCK_BYTES, scratch)
    finally:
        files.close()


def write_all(path: Path, n_bytes: int) -> None:
    """Write about n bytes to a new file and have them safely on the disk."""
    path.touch()
    block: U8 = Scratch(BLOCK_BYTES).take(BLOCK_BYTES)
    block[:] = np.random.default_rng(0).integers(256, size=BLOCK_BYTES, dtype=np.uint8)
    files = Files(write=True)
    try:
        for offset in range(0, n_bytes // BLOCK_BYTES * BLOCK_BYTES, BLOCK_BYTES):
            files.write(path, offset, block)
    finally:
        files.close()
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def plain_s(shards: list[Path], copy: Path, n_bytes: int, read: bool, write: bool) -> float:
    """Seconds to read n bytes, to write as many, or both at once."""
    work = [threading.Thread(target=read_all, args=(shards, n_bytes))] if read else []
    work += [threading.Thread(target=write_all, args=(copy, n_bytes))] if write else []
    begin = time.perf_counter()
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    seconds = time.perf_counter() - begin
    copy.unlink(missing_ok=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", dest="source", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--copy-gb", type=float, default=3.0)
    options = parser.parse_args()
    shards = sorted(options.source.glob("*.safetensors"))
    n_bytes = min(int(options.copy_gb * 1e9), sum(path.stat().st_size for path in shards))
    copy = options.out.with_name(options.out.name + ".copy")
    kinds = {"reading": (True, False), "writing": (False, True), "both": (True, True)}
    rates: dict[str, list[float]] = {name: [] for name in (*kinds, "repack")}
    for _ in tqdm(range(options.rounds), disable=None, leave=False, file=sys.stderr):
        pagecache.drop(shards)
        for name, (read, write) in kinds.items():
            rates[name].append(n_bytes / plain_s(shards, copy, n_bytes, read, write) / 1e9)
        plan = plan_repack(options.source, options.out, Options())
        begin = time.perf_counter()
        try:
            report = repack(plan, kernels=repacking)
        finally:
            seconds = time.perf_counter() - begin
            for left in (options.out, plan.progress.folder):
                shutil.rmtree(left, ignore_errors=True)
        rates["repack"].append(report.n_bytes / seconds / 1e9)
    for name, values in rates.items():
        print(f"{name:<9} " + "  ".join(f"{value:.2f}" for value in values) + " GB/s")
    both, ours = (statistics.median(rates[name]) for name in ("both", "repack"))
    slower = min(statistics.median(rates[name]) for name in ("reading", "writing"))
    print(
        f"repack is at {ours / both:.0%} of both at once, {ours / slower:.0%} of the slower alone"
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error.message}\nhint: {error.hint}")
