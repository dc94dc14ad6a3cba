"""Decoding with experts that do not fit into memory, against what disk and memory allow.

    python -m bench.streaming -m PACKED [--share 0.1,0.25,0.5] [--tokens 200] [--io direct]
        [--look-ahead]

The routers' choices are replaced by a made-up trace, so that hit rates can be compared with an
offline simulation and with plain LRU:
- "cold": no expert is used again before it has been let go, so all of them come from the disk. The
  ceiling is what the probe reads at random, the median of some before and after.
- a share of the experts in memory, and a trace with popular experts and locality in time
  (`simulation.zipf_trace`). The floor of a token's time is the larger of disk (the bytes of the
  simulation's misses at the probe's rate) and memory (trunk and chosen experts at the reader's).

With --look-ahead the store also reads what is expected to be chosen. How often that is right is
taken from the embedded model, whose routers were trained (`bench.guesses`); made-up traces have no
routers to ask.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tqdm import tqdm

from kimi_cpu import hardware
from kimi_cpu.benchmark import pagecache
from kimi_cpu.engine import Engine
from kimi_cpu.errors import UserError
from kimi_cpu.kernels import fast
from kimi_cpu.kernels.bandwidth import DramReader
from kimi_cpu.kernels.common import ExpertTable
from kimi_cpu.model import Model
from kimi_cpu.store.checkpoint import Checkpoint
from kimi_cpu.store.experts import probe
from kimi_cpu.store.experts.budget import make_budget
from kimi_cpu.store.experts.opening import open_experts
from kimi_cpu.store.experts.policy import Frequency, LeastRecent
from kimi_cpu.store.experts.residency import LayerExperts
from kimi_cpu.store.experts.simulation import Trace, simulate, zipf_trace
from kimi_cpu.store.summary import summarise

#: Latents of the few hundred tokens that are decoded.
_LATENT_BYTES = 64 << 20
#: Of the experts guessed for a layer, best first, the share that is then chosen: what
#: `python -m bench.guesses` finds in the embedded model.
_RIGHT = (0.94, 0.85, 0.77, 0.74, 0.65, 0.56, 0.45, 0.40)


#: How often the disk is asked for its speed before, and after: it changes within seconds.
_PROBES = 2


class TracedKernels(ModuleType):
    """The compiled kernels with routers that choose what a trace says, token by token.

    Args:
        trace: int32 [T, L, K].
        guesses: likewise, what is expected one layer before.
    """

    def __init__(self, trace: Trace, guesses: Trace) -> None:
        super().__init__(fast.__name__)
        self._trace, self._trace_of_guesses = trace, guesses
        layers, top_k = trace.shape[1:]
        self._ids = np.zeros((layers, 1, top_k), dtype=np.int32)
        self._guesses = np.zeros((layers, 1, top_k), dtype=np.int32)
        self._weights = np.full((1, top_k), 1 / top_k, dtype=np.float32)
        self._layer_of: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(fast, name)

    def choose(self, token: int) -> None:
        """The next step is this token of the trace."""
        self._ids[:, 0] = self._trace[token]
        self._guesses[:, 0] = self._trace_of_guesses[token]

    def route(self, logits: Any, bias: Any, *_: Any) -> tuple[Any, Any]:
        """Layers are known by their biases; they are met in their order."""
        return self._ids[self._layer_of.setdefault(id(bias), len(self._layer_of))], self._weights

    def anticipate(self, experts: ExpertTable, ids: Any) -> None:
        """What the model guesses are the right ones, see `route`: guess as the trace says."""
        assert isinstance(experts.source, LayerExperts)
        fast.anticipate(experts, self._guesses[experts.source.first // len(experts)])


def guesses_of(trace: Trace, n_experts: int, seed: int) -> Trace:
    """The trace with choices replaced by other experts, the more of them the lower the rank."""
    rng = np.random.default_rng(seed)
    order = rng.random((*trace.shape[:2], n_experts))
    np.put_along_axis(order, trace.astype(np.int64), 2.0, axis=2)
    others = order.argsort(axis=2)[:, :, : trace.shape[2]]  # as a router's, all different
    right = np.interp(np.arange(trace.shape[2]), np.arange(len(_RIGHT)), _RIGHT)
    return np.where(rng.random(trace.shape) < right, trace, others).astype(np.int32)


@dataclass(frozen=True)
class Measured:
    """Tokens of a trace: the middle of their times, and what the store counted."""

    tokens_per_s: float
    hit_rate: float  # without what was loaded ahead
    recall: float  # of what was missing, the part that was loaded ahead
    read_bytes: float  # a token
    wait_s: float  # a token
    disk_s: float  # a token


def decode(
    folder: Path, trace: Trace, guesses: Trace | None, slots: int, skip: int, io: str
) -> Measured:
    """Decode a trace with so many experts in memory; the first `skip` tokens are not counted."""
    checkpoint = Checkpoint.open(folder)
    try:
        budget = make_budget(checkpoint, 0)
        memory = budget.trunk_bytes + budget.reserve_bytes + slots * budget.slot_bytes
        store = open_experts(
            checkpoint, memory=memory + _LATENT_BYTES, io=io,  # type: ignore[arg-type]
            lookahead=guesses is not None,
        )  # fmt: skip
        kernels = TracedKernels(trace, trace if guesses is None else guesses)
        model = Model(checkpoint, store, kernels, "fast", hardware.default_threads())
        with Engine(checkpoint, model) as engine:
            session = engine.session()
            for token in range(len(trace)):
                if token == skip:
                    before, begin = store.stats(), time.perf_counter()
                kernels.choose(token)
                session.step(token % engine.config.vocab_size)
            seconds = time.perf_counter() - begin
            stats = store.stats() - before
    finally:
        checkpoint.close()
    n = len(trace) - skip
    return Measured(
        n / seconds, (stats.hits - stats.ahead_hits) / stats.uses, stats.recall,
        stats.read_bytes / n, stats.wait_s / n, stats.disk_s / n,
    )  # fmt: skip


def drop(checkpoint: Checkpoint) -> None:
    """Forget what the page cache has of the experts; the trunk comes back with the first tokens."""
    pagecache.drop(sorted({checkpoint.file_of(name) for name in checkpoint.names()}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", dest="folder", type=Path, required=True)
    parser.add_argument("--share", default="0.1,0.25,0.5", help="of the experts, in memory")
    parser.add_argument("--tokens", type=int, default=200, help="measured, after as many more")
    parser.add_argument("--io", default="auto", choices=("auto", "mmap", "direct"))
    parser.add_argument("--look-ahead", action="store_true", help="as well as a trained model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shares = [float(part) for part in options.share.split(",") if part]
    checkpoint = Checkpoint.open(options.folder)
    config = checkpoint.config
    layers, experts, top_k = (
        len(config.moe_layers), config.n_routed_experts, config.num_experts_per_tok
    )  # fmt: skip
    total = layers * experts
    expert_bytes = checkpoint.expert_bytes / total
    drop(checkpoint)
    trunk = summarise(checkpoint).token_trunk_bytes
    reader, threads = DramReader(), hardware.default_threads()
    rows = []
    for share in tqdm([0.0, *shares], disable=None, leave=False, file=sys.stderr):
        speeds = [probe.measure(checkpoint).ceiling for _ in range(_PROBES)]
        dram = [max(reader.measure(threads).values())]
        n = options.tokens
        if share == 0:
            slots, skip = 3 * top_k * layers, 8
            cycle = np.arange((n // 2 + skip) * top_k).reshape(-1, 1, top_k) % experts
            trace = np.repeat(cycle, layers, axis=1).astype(np.int32)
        else:
            slots, skip = round(share * total), n
            trace = zipf_trace(2 * n, layers, experts, top_k, seed=options.seed)
        drop(checkpoint)
        guesses = None
        if options.look_ahead:
            guesses = guesses_of(trace, experts, options.seed)
        got = decode(options.folder, trace, guesses, slots, skip, options.io)
        speeds += [probe.measure(checkpoint).ceiling for _ in range(_PROBES)]
        dram.append(max(reader.measure(threads).values()))
        ours = simulate(trace, experts, slots, Frequency(total)).hit_rate_after(skip)
        lru = simulate(trace, experts, slots, LeastRecent(total)).hit_rate_after(skip)
        misses = layers * top_k * (1 - ours) * expert_bytes
        disk_s = misses / np.median(speeds)
        dram_s = (trunk + layers * top_k * expert_bytes) / np.mean(dram)
        floor_s = max(disk_s, dram_s)
        rows.append([
            f"{share:.0%}" if share else "cold", f"{got.tokens_per_s:.2f}", f"{1 / floor_s:.2f}",
            f"{got.tokens_per_s * floor_s:.0%}", f"{got.hit_rate:.3f}", f"{ours:.3f}",
            f"{lru:.3f}", f"{got.recall:.2f}", f"{got.wait_s * 1e3:.0f}",
            f"{got.disk_s * got.tokens_per_s:.0%}",
            f"{got.read_bytes / max(misses, 1):.3f}",
            f"{disk_s * 1e3:.1f} / {dram_s * 1e3:.1f}",
            " ".join(f"{speed / 1e9:.1f}" for speed in speeds),
        ])  # fmt: skip
        show(rows)


_COLUMNS = (
    "in memory", "tok/s", "floor's", "reached", "hits", "simulated", "LRU", "ahead",
    "wait ms", "disk busy", "read / needed",
    "floor ms: disk / memory", "probes before and after, GB/s",
)  # fmt: skip


def show(rows: list[list[str]]) -> None:
    """The last row of the table, with its head before the first one."""
    if len(rows) == 1:
        print("| " + " | ".join(_COLUMNS) + " |")
        print("|" + "|".join(" ---: " for _ in _COLUMNS) + "|")
    print("| " + " | ".join(rows[-1]) + " |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error.message}\nhint: {error.hint}")
