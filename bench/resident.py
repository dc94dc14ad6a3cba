"""Whether a long run stays within its memory budget.

    python -m bench.resident -m MODEL --memory SIZE [--tokens 5000] [--seconds 300]

Decodes random tokens until one of the two is reached, in conversations of 1,024 tokens. Meanwhile
a thread looks every 20 ms at what is resident of the process (anonymous memory and mapped pages of
files) and, if it runs in a memory cgroup of its own, at what that is charged for, the
page cache included. Run it in a cgroup whose limit is the budget or little more:

    cgroup v1: mkdir /sys/fs/cgroup/memory/G; echo 5G > .../G/memory.limit_in_bytes;
               echo $$ > .../G/cgroup.procs; python -m bench.resident ...

Prints both, their maxima in each tenth of the run and over it all, against the budget.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from kimi_cpu.engine import Engine
from kimi_cpu.errors import UserError
from kimi_cpu.store.experts.budget import format_size, parse_size

_PAGE = 4096
_EVERY_S = 0.02
_PARTS = 10
_CONVERSATION = 1024


class Watch(threading.Thread):
    """Looks at this process's memory.

    Attributes:
        resident, charged: bytes, the most since `part` was called; charged is 0 outside a cgroup.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.resident = self.charged = 0
        self._usage = _usage_file()
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(_EVERY_S):
            self._look()

    def part(self) -> tuple[int, int]:
        """(resident, charged), the most since the last call."""
        self._look()
        found = self.resident, self.charged
        self.resident = self.charged = 0
        return found

    def stop(self) -> None:
        self._over.set()
        self.join()

    def _look(self) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident = max(self.resident, pages * _PAGE)
        if self._usage is not None:
            self.charged = max(self.charged, int(self._usage.read_text()))


def _usage_file() -> Path | None:
    """Where the memory cgroup of this process says what it is charged for; None in the root's."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for root, name in (
            ("/sys/fs/cgroup/memory", "memory.usage_in_bytes"),
            ("/sys/fs/cgroup", "memory.current"),
        ):
            file = Path(root + path) / name
            if controllers in ("memory", "") and path != "/" and file.exists():
                return file
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", dest="folder", type=Path, required=True)
    parser.add_argument("--memory", required=True)
    parser.add_argument("--tokens", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=300)
    options = parser.parse_args()
    watch = Watch()
    watch.start()
    rng = np.random.default_rng(0)
    with Engine.load(options.folder, memory=parse_size(options.memory)) as engine:
        store, config = engine.experts, engine.config
        session = engine.session()
        begin, done, parts = time.perf_counter(), 0, list[tuple[int, int]]()
        with tqdm(total=1.0, disable=None, leave=False, file=sys.stderr) as bar:
            while (
                share := max(done / options.tokens, (time.perf_counter() - begin) / options.seconds)
            ) < 1:
                if share * _PARTS >= len(parts) + 1:
                    parts.append(watch.part())
                if len(session) == _CONVERSATION:
                    session.rewind(len(session))
                session.step(int(rng.integers(config.vocab_size)))
                done += 1
                bar.update(share - bar.n)
        parts.append(watch.part())
        seconds, stats = time.perf_counter() - begin, store.stats()
    watch.stop()
    resident, charged = (max(values) for values in zip(*parts, strict=True))
    print(
        f"{options.folder.name}: {done:,} tokens in {seconds:.0f} s, {store.io}, "
        f"{stats.hit_rate:.1%} hits, {stats.read_bytes / 1e9:.1f} GB read, bounded: {store.bounded}"
    )
    for name, column, most in (("resident", 0, resident), ("charged", 1, charged)):
        shown = "  ".join(format_size(part[column]) for part in parts)
        print(f"{name}  {shown}; at most {format_size(most)}, {most / store.memory:.1%} of budget")
    if resident > store.memory or charged > store.memory:
        sys.exit("beyond the budget")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error.message}\nhint: {error.hint}")
