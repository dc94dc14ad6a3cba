"""What the machine's memory allows: the rate that a reply is compared with."""

from __future__ import annotations

import contextlib
import statistics
from pathlib import Path

from kimi_cpu import hardware
from kimi_cpu.kernels.bandwidth import DramReader
from kimi_cpu.planning.shape import shape_of_checkpoint
from kimi_cpu.store.checkpoint import Checkpoint

#: Memory that is read to find its speed: beyond the caches, and read in a moment.
READ_BYTES = 512 << 20
#: Weights of a token that are fewer may lie in the caches, which are faster than memory.
LEAST_BYTES = 256 << 20
_TURNS = 3


def ceiling_tps(folder: Path, threads: int) -> float | None:
    """Tokens a second of one reply, if its weights came from memory as fast as that can be read
    and nothing else took time; None for a model so small that memory is not its limit.

    Takes about a second, with all of the given threads: call it while nothing is computed.
    Replies that are made together share what they read, and may go beyond it in sum.
    """
    with contextlib.closing(Checkpoint.open(folder)) as checkpoint:
        shape = shape_of_checkpoint(checkpoint)
    token_bytes = shape.trunk_bytes + shape.token_expert_bytes
    if token_bytes < LEAST_BYTES:
        return None
    reader = DramReader(min(READ_BYTES, hardware.available_ram_bytes() // 16))
    speeds = [max(reader.measure(threads).values()) for _ in range(_TURNS)]
    return statistics.median(speeds) / token_bytes
