"""`python -m kimi_cpu.planning.selftest MODEL`: does a model compute here what NumPy computes?

A process of its own, so that whatever is broken (an import that crashes, an instruction that the
CPU does not have) ends this one and not the one that asks. Prints one JSON object; see `Report`.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from kimi_cpu.errors import UserError

#: Tokens of the prompt; enough for the kernels of many tokens.
_TOKENS = 24
#: Files of the cache that lie further apart in time were not compiled in one go.
_PAUSE_SECONDS = 30.0


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        variant, runnable: kernels in use, and all that this machine can run, the best one first.
        forced: KIMI_CPU_ISA.
        threads: that the engine takes.
        cache_folder: of the compiled kernels; was_cached: whether they were all there before.
        cache_bytes: how much there is now.
        compile_s: how long it took to compile them, now or then; None if that is not known.
        ready_s: from nothing imported to the first token of the model, now.
        relative_error: of the logits, against plain NumPy: L2 norm of the difference over L2 norm.
        decode_tps: tokens a second afterwards.
    """

    variant: str
    runnable: list[str]
    forced: str
    threads: int
    cache_folder: str
    was_cached: bool
    cache_bytes: int
    compile_s: float | None
    ready_s: float
    relative_error: float
    decode_tps: float


def run(folder: Path) -> Report:
    """Compute a prompt and some tokens. Raises UserError."""
    begin = time.perf_counter()
    import os

    import numpy as np

    from kimi_cpu.engine import Engine
    from kimi_cpu.kernels import isa
    from kimi_cpu.kernels.fast import compile_all

    was_cached = isa.is_cached()
    for _ in compile_all():
        pass
    with Engine.load(folder) as engine:
        ids = [(7919 * i + 1) % engine.config.vocab_size for i in range(_TOKENS)]
        session = engine.session()
        session.sync(ids[:-1])
        session.step(ids[-1])
        ready_s = time.perf_counter() - begin
        start = time.perf_counter()
        for token in ids:
            session.step(token)
        decode_tps = len(ids) / (time.perf_counter() - start)
        threads = engine.threads
    with (
        Engine.load(folder, precision="exact") as ours,
        Engine.load(folder, precision="exact", backend="reference") as plain,
    ):
        got, want = (e.session().sync(ids) for e in (ours, plain))
        error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    files = [path.stat() for path in isa.CACHE_FOLDER.rglob("*.nbc")]
    return Report(
        variant=isa.VARIANT, runnable=isa.runnable(), forced=os.environ.get("KIMI_CPU_ISA", ""),
        threads=threads, cache_folder=str(isa.CACHE_FOLDER), was_cached=was_cached,
        cache_bytes=sum(file.st_size for file in files),
        compile_s=_compiling_s([file.st_mtime for file in files]) if was_cached else ready_s,
        ready_s=ready_s, relative_error=error, decode_tps=decode_tps,
    )  # fmt: skip


def _compiling_s(times: list[float]) -> float | None:
    """How long the first process that filled the cache was at it, from its files' times."""
    if len(times) < 2:
        return None
    end = first = min(times)
    for before, after in pairwise(sorted(times)):
        if after - before > _PAUSE_SECONDS:
            break
        end = after
    return end - first


def main() -> int:
    try:
        print(json.dumps(asdict(run(Path(sys.argv[1])))))  # noqa: T201 - its only output
    except UserError as error:
        print(json.dumps({"error": error.message, "hint": error.hint}))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
