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
from kimi_cpu.kernels.simd import I32, Emit, I32x16, const, intrinsic, store_i32
from kimi_cpu.kernels.threads import load_args, op_of, run

#: Memory that a reader passes over, if the machine has it to spare.
READ_BYTES = 1280 << 20
#: A unit of work; every reader's streams divide it evenly.
BLOCK_BYTES = 8 << 20
_MIN_BLOCKS = 8
_PREFETCH_BYTES = 1024


def _emit_read(builder: Any, args: Any, streams: int, prefetch: bool) -> Any:
    """Sum the int32 of args[1] bytes at args[0], in `streams` streams."""
    e = Emit(builder)
    sums = [e.variable(const(I32x16, 0)) for _ in range(streams)]
    length = builder.sdiv(args[1], e.i64(streams))
    with e.loop(0, length, 64) as i:
        for k, total in enumerate(sums):
            at = e.add(e.add(args[0], e.mul(length, k)), i)
            if prefetch:
                e.prefetch(at, _PREFETCH_BYTES)
            e.set(total, builder.add(e.get(total), e.load(I32x16, at)))
    total = e.get(sums[0])
    for other in sums[1:]:
        total = builder.add(total, e.get(other))
    return builder.extract_element(total, const(I32, 0))


# Made one by one at module level: Numba does not cache code with intrinsics made by a factory.


@intrinsic
def _read_1(typingctx: Any, addr: Any, n_bytes: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _emit_read(builder, args, 1, False)

    return types.int32(types.int64, types.int64), codegen


@intrinsic
def _read_4(typingctx: Any, addr: Any, n_bytes: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _emit_read(builder, args, 4, True)

    return types.int32(types.int64, types.int64), codegen


@intrinsic
def _read_8(typingctx: Any, addr: Any, n_bytes: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _emit_read(builder, args, 8, False)

    return types.int32(types.int64, types.int64), codegen


@intrinsic
def _read_8_prefetch(typingctx: Any, addr: Any, n_bytes: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _emit_read(builder, args, 8, True)

    return types.int32(types.int64, types.int64), codegen


# The sums are stored so that the compiler does not leave the loads out.


@isa.jit
def _range_1(addr, block_bytes, sink, start, stop):  # type: ignore[no-untyped-def]
    for block in range(start, stop):
        store_i32(sink, _read_1(addr + block * block_bytes, block_bytes))


@op_of(_range_1)
def _op_1(args, start, stop):  # type: ignore[no-untyped-def]
    _range_1(*load_args(args, 3), start, stop)


@isa.jit
def _range_4(addr, block_bytes, sink, start, stop):  # type: ignore[no-untyped-def]
    for block in range(start, stop):
        store_i32(sink, _read_4(addr + block * block_bytes, block_bytes))


@op_of(_range_4)
def _op_4(args, start, stop):  # type: ignore[no-untyped-def]
    _range_4(*load_args(args, 3), start, stop)


@isa.jit
def _range_8(addr, block_bytes, sink, start, stop):  # type: ignore[no-untyped-def]
    for block in range(start, stop):
        store_i32(sink, _read_8(addr + block * block_bytes, block_bytes))


@op_of(_range_8)
def _op_8(args, start, stop):  # type: ignore[no-untyped-def]
    _range_8(*load_args(args, 3), start, stop)


@isa.jit
def _range_8_prefetch(addr, block_bytes, sink, start, stop):  # type: ignore[no-untyped-def]
    for block in range(start, stop):
        store_i32(sink, _read_8_prefetch(addr + block * block_bytes, block_bytes))


@op_of(_range_8_prefetch)
def _op_8_prefetch(args, start, stop):  # type: ignore[no-untyped-def]
    _range_8_prefetch(*load_args(args, 3), start, stop)


#: name -> kernel(address, block_bytes, address of any 4 bytes, first block, end).
READERS: dict[str, Any] = {
    "1 stream": _range_1,
    "4 streams, prefetch": _range_4,
    "8 streams": _range_8,
    "8 streams, prefetch": _range_8_prefetch,
}


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
        args = (address(self._buffer), BLOCK_BYTES, address(self._sink))
        begin = time.perf_counter()
        run(READERS[reader], args, (self._buffer,), n_blocks, 1, threads, n_bytes)
        return n_bytes / (time.perf_counter() - begin)

    def measure(self, threads: int) -> dict[str, float]:
        """One pass of every reader: name -> bytes a second. The ceiling is the largest."""
        return {name: self.read(name, threads) for name in READERS}
