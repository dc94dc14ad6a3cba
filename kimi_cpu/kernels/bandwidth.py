"""How fast this machine reads its memory: the ceiling that decoding is compared with.

One way of reading is not the ceiling: a single stream a thread reaches 80 % of what several reach
on some machines, and hardware prefetchers differ. So several readers run over the same memory,
far beyond the caches, and the best of them counts.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numba.core import types

from kimi_cpu import hardware
from kimi_cpu.kernels import isa
from kimi_cpu.kernels.common import address
from kimi_cpu.kernels.simd import I32, Emit, I32x16, const, literal_intrinsic, store_i32
from kimi_cpu.kernels.threads import load_args, op_of, run

#: Memory that a reader passes over, if the machine has it to spare.
READ_BYTES = 1280 << 20
#: A unit of work; every reader's streams divide it evenly.
BLOCK_BYTES = 8 << 20
_MIN_BLOCKS = 8
_PREFETCH_BYTES = 1024


@literal_intrinsic
def _sum_block(typingctx: Any, streams: Any, prefetch: Any, addr: Any, n_bytes: Any) -> Any:
    """The sum of the int32 in n_bytes at addr, read in so many streams; the first two literals."""
    n_streams, prefetches = streams.literal_value, prefetch.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        e = Emit(builder)
        addr, n_bytes = args[2:]
        sums = [e.variable(const(I32x16, 0)) for _ in range(n_streams)]
        length = builder.sdiv(n_bytes, e.i64(n_streams))
        with e.loop(0, length, 64) as i:
            for k, total in enumerate(sums):
                at = e.add(e.add(addr, e.mul(length, k)), i)
                if prefetches:
                    e.prefetch(at, _PREFETCH_BYTES)
                e.set(total, builder.add(e.get(total), e.load(I32x16, at)))
        total = e.get(sums[0])
        for other in sums[1:]:
            total = builder.add(total, e.get(other))
        return builder.extract_element(total, const(I32, 0))

    return types.int32(streams, prefetch, types.int64, types.int64), codegen


@isa.jit
def _read_blocks(reader, addr, block_bytes, sink, start, stop):  # type: ignore[no-untyped-def]
    """Pass over blocks [start, stop) of block_bytes at addr, as one of READERS does.

    The sums are stored, or the compiler would leave the loads out: the last block's at sink.
    """
    for block in range(start, stop):
        at = addr + block * block_bytes
        if reader == 0:
            total = _sum_block(1, 0, at, block_bytes)
        elif reader == 1:
            total = _sum_block(4, 1, at, block_bytes)
        elif reader == 2:
            total = _sum_block(8, 0, at, block_bytes)
        else:
            total = _sum_block(8, 1, at, block_bytes)
        store_i32(sink, total)


@op_of(_read_blocks)
def _op(args, start, stop):  # type: ignore[no-untyped-def]
    _read_blocks(*load_args(args, 4), start, stop)


#: The ways of reading; their places are the numbers that `_read_blocks` knows them by.
READERS = ("1 stream", "4 streams, prefetch", "8 streams", "8 streams, prefetch")


class DramReader:
    """A buffer of private memory and the readers that pass over it.

    Args:
        n_bytes: size of the buffer; by default `READ_BYTES`, or a sixteenth of the free memory
            if that is less: a model may want the rest. Never under 64 MB.

    Attributes:
        n_bytes: the size chosen, whole blocks of `BLOCK_BYTES`.
    """

    def __init__(self, n_bytes: int | None = None) -> None:
        if n_bytes is None:
            n_bytes = min(READ_BYTES, hardware.available_ram_bytes() // 16)
        self._n_blocks = max(_MIN_BLOCKS, n_bytes // BLOCK_BYTES)
        self.n_bytes = self._n_blocks * BLOCK_BYTES
        self._buffer = np.empty(self.n_bytes, dtype=np.uint8)
        # Written once, or every page would be the system's one page of zeros, which is in cache.
        self._buffer.fill(1)
        self._sink = np.zeros(1, dtype=np.int32)
        for name in READERS:  # compile
            self.read(name, 1, n_blocks=1)

    def read(self, reader: str, threads: int, n_blocks: int | None = None) -> float:
        """One pass of one of READERS over the buffer (or its first blocks): bytes a second."""
        n_blocks = n_blocks or self._n_blocks
        n_bytes = n_blocks * BLOCK_BYTES
        buffer, sink = address(self._buffer), address(self._sink)
        args = (READERS.index(reader), buffer, BLOCK_BYTES, sink)
        begin = time.perf_counter()
        run(_read_blocks, args, (self._buffer,), n_blocks, 1, threads, n_bytes)
        return n_bytes / (time.perf_counter() - begin)

    def measure(self, threads: int) -> dict[str, float]:
        """One pass of every reader: name -> bytes a second. The ceiling is the largest."""
        return {name: self.read(name, threads) for name in READERS}
