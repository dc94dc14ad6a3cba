"""Making the expert store that fits the memory and the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from kimi_cpu.errors import UsageError
from kimi_cpu.store.checkpoint import Checkpoint
from kimi_cpu.store.experts.backends import (
    Backend,
    DirectBackend,
    Io,
    MappedBackend,
    can_read_directly,
)
from kimi_cpu.store.experts.budget import make_budget
from kimi_cpu.store.experts.probe import disk_speed
from kimi_cpu.store.experts.residency import ExpertStore
from kimi_cpu.store.experts.simulation import Recorder
from kimi_cpu.store.experts.trunk import ResidentTrunk


def open_experts(
    checkpoint: Checkpoint,
    *,
    memory: int | None = None,
    latents: int | None = 0,
    io: Io | Literal["auto"] = "auto",
    trace: Path | None = None,
    lookahead: bool = True,
) -> ExpertStore:
    """The store of a checkpoint's routed experts.

    Args:
        memory: bytes that the process may use; by default `default_memory()`.
        latents: bytes of it that are set aside for latents that are kept; None: see `make_budget`.
        io: "mmap", "direct", or "auto": mapped if everything fits into memory (then it is there
            at the next start, too), else what is faster on this disk, which takes up to 2 s to
            find out the first time.
        trace: file to which the routing of every token is written.
        lookahead: whether experts may be read before their router has spoken.

    Raises:
        UsageError: too little memory, an unknown `io`, or a trace that cannot be written.
        CheckpointError: a weight file is gone or cannot be read.
    """
    if io not in ("mmap", "direct", "auto"):
        raise UsageError(f"unknown io {io!r}", 'use "mmap", "direct" or "auto"')
    budget = make_budget(checkpoint, memory, latents)
    budget.check()
    config = checkpoint.config
    layers = config.moe_layers
    recorder = None
    if trace is not None:
        recorder = Recorder(trace, layers, config.n_routed_experts, config.num_experts_per_tok)
    if io == "auto":
        io = "mmap" if budget.holds_everything else _faster(checkpoint, layers[0])
    backend: Backend = (
        DirectBackend(budget.slots(0), budget.slot_bytes) if io == "direct" else MappedBackend()
    )
    trunk = None if budget.holds_everything else ResidentTrunk(checkpoint)
    return ExpertStore(
        checkpoint, backend, budget, lookahead=lookahead, recorder=recorder, trunk=trunk
    )


def _faster(checkpoint: Checkpoint, layer: int) -> Io:
    if not can_read_directly(checkpoint.expert_extents(layer, 0)[0].path):
        return "mmap"
    try:
        return disk_speed(checkpoint).best
    except OSError:
        return "mmap"  # the error will show again, when an expert is wanted
