"""A team of threads that hand work over by spinning, and the tape of operations they play.

An *operation* (see `ops.py`) is a compiled function of (args, start, stop): `args` is the address
of its int64 arguments, [start, stop) the part of its rows to compute. `run` plays one at once;
inside `recording()` it is appended to a `Tape` instead, which plays a whole token without
returning to Python. Outputs come from `empty`: a tape keeps and reuses their memory.

One thread, the leader, publishes an operation's chunks in a single word; every thread of the team
claims chunks by compare-and-swap until none is left, and the leader waits until all are done. A
thread that the system holds up therefore holds up nobody unless it holds a chunk. Workers spin
while a tape is played, as nobody could wake them, and for a tenth of a millisecond after it; then
they sleep, so that nothing burns between tokens.
Rows are written by exactly one chunk and do not depend on its borders: results are the same for any
number of threads. (Numba's `prange` is avoided: its default scheduler takes 0.1 ms to start and
aborts the process when two threads enter it.)
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types as numba_types

from kimi_cpu.kernels.common import Position, address
from kimi_cpu.kernels.isa import IS_X86, c_callback, jit, link, mark_cached
from kimi_cpu.kernels.simd import I64, POINTER, intrinsic, literal_intrinsic, load_i64

types: Any = numba_types  # untyped

#: Below this many bytes of weights (or comparable work) a hand-over costs more than it saves.
MIN_PARALLEL_COST = 50_000
#: Chunks a thread, so that a thread that the system holds up does not hold up the others.
CHUNKS_PER_THREAD = 4

# The team's memory: words of 8 bytes, what different threads write on different cache lines.
# A claim word is sequence << 40 | chunks << 20 | next chunk: one compare-and-swap sees all three.
_CLAIM, _DONE, _JOB, _AWAKE, _YIELD, _PLAYING, _WORDS = 0, 16, 32, 48, 64, 80, 96
_FIELD = (1 << 20) - 1
#: Turns of the pause loop (20 to 40 ns each) before a worker sleeps or the leader yields its core.
_SPIN_TURNS = 4000

# A tape entry: operation, rows (or minus the address of their number), rows a chunk, words of
# arguments, and the arguments. Operation 0 stops the tape for Python, see `Tape.call_if`.
_HEAD = 4
_CALL_WORDS = _HEAD + 1


@literal_intrinsic
def load_args(typingctx: Any, args: Any, n: Any) -> Any:
    """The first n (a literal) int64 arguments of an operation, as a tuple."""
    count = n.literal_value

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        words = []
        for i in range(count):
            at = builder.add(values[0], ir.Constant(I64, 8 * i))
            words.append(builder.load(builder.inttoptr(at, POINTER), typ=I64, align=8))
        return context.make_tuple(builder, signature.return_type, words)

    return types.UniTuple(types.int64, count)(types.int64, n), codegen


@intrinsic
def as_f64(typingctx: Any, bits: Any) -> Any:
    """The float64 that `float_bits` put into an int64 argument."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), codegen


def float_bits(x: float) -> int:
    """A float64's bits as an int64, to pass it among an operation's arguments."""
    return int(struct.unpack("<q", struct.pack("<d", x))[0])


@intrinsic
def _call(typingctx: Any, op: Any, args: Any, start: Any, stop: Any) -> Any:
    """Call an operation by its address."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        function = ir.FunctionType(ir.VoidType(), [I64] * 3).as_pointer()
        builder.call(builder.inttoptr(values[0], function), values[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def _yield_core(typingctx: Any, function: Any) -> Any:
    """Call `sched_yield` (or its like) at this address."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), []).as_pointer()
        builder.call(builder.inttoptr(values[0], kind), [])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def _atomic_load(typingctx: Any, addr: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = builder.inttoptr(args[0], POINTER)
        return builder.load_atomic(at, "acquire", 8, typ=I64)

    return types.int64(types.int64), codegen


@intrinsic
def _atomic_add(typingctx: Any, addr: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(args[0], POINTER), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _atomic_set(typingctx: Any, addr: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("xchg", builder.inttoptr(args[0], POINTER), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _swap_if_equal(typingctx: Any, addr: Any, expected: Any, new: Any) -> Any:
    """Compare-and-swap; 1 if it took place."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = builder.inttoptr(args[0], POINTER)
        result = builder.cmpxchg(at, args[1], args[2], "seq_cst", "seq_cst")
        return builder.zext(builder.extract_value(result, 1), I64)

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def _pause(typingctx: Any) -> Any:
    """Tell the core that this is a spin loop."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if IS_X86:
            name = "llvm.x86.sse2.pause"
            kind = ir.FunctionType(ir.VoidType(), [])
            declared = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
            builder.call(declared, [])
        else:
            builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@jit
def _take_chunks(team):  # type: ignore[no-untyped-def]
    """Claim and compute chunks of the published operation until none is left."""
    claim = _atomic_load(team + _CLAIM * 8)
    while (claim & _FIELD) < ((claim >> 20) & _FIELD):
        if _swap_if_equal(team + _CLAIM * 8, claim, claim + 1):
            # The operation cannot end before this chunk is done, so its fields are stable.
            op, args, grain, total = load_args(team + _JOB * 8, 4)
            start = (claim & _FIELD) * grain
            _call(op, args, start, min(start + grain, total))
            _atomic_add(team + _DONE * 8, 1)
        claim = _atomic_load(team + _CLAIM * 8)


@jit
def _serve(team):  # type: ignore[no-untyped-def]
    """A worker's turn: help until there has been nothing to do for a while."""
    _atomic_add(team + _AWAKE * 8, 1)
    idle = 0
    while idle < _SPIN_TURNS:
        claim = _atomic_load(team + _CLAIM * 8)
        if (claim & _FIELD) < ((claim >> 20) & _FIELD):
            _take_chunks(team)
            idle = 0
        else:
            _pause()
            idle = 0 if _atomic_load(team + _PLAYING * 8) != 0 else idle + 1
    _atomic_add(team + _AWAKE * 8, -1)


@jit
def _lead(team, op, args, grain, total, chunks):  # type: ignore[no-untyped-def]
    """Publish an operation, take part in it, and wait until all of it is done."""
    _atomic_set(team + _JOB * 8, op)
    _atomic_set(team + _JOB * 8 + 8, args)
    _atomic_set(team + _JOB * 8 + 16, grain)
    _atomic_set(team + _JOB * 8 + 24, total)
    _atomic_set(team + _DONE * 8, 0)
    sequence = (_atomic_load(team + _CLAIM * 8) >> 40) + 1
    _atomic_set(team + _CLAIM * 8, (sequence << 40) | (chunks << 20))
    _take_chunks(team)
    turns = 0
    while _atomic_load(team + _DONE * 8) < chunks:
        turns += 1
        if turns < _SPIN_TURNS:
            _pause()
        else:  # somebody holds a chunk and no core: give it ours
            _yield_core(load_i64(team + _YIELD * 8))


@jit
def _play(team, tape, position, end):  # type: ignore[no-untyped-def]
    """Play the words [position, end) of a tape; returns where it stopped (end: all is done).

    team 0: in this thread alone.
    """
    if team != 0:
        _atomic_set(team + _PLAYING * 8, 1)
    while position < end:
        op, total, grain, words = load_args(tape + position * 8, 4)
        args = tape + (position + _HEAD) * 8
        if total < 0:
            total = load_i64(-total)
        if op == 0:
            if load_i64(load_i64(args)) != 0:
                break
        else:
            chunks = (total + grain - 1) // grain
            if chunks == 1 or team == 0:
                _call(op, args, 0, total)
            elif chunks > 1:
                _lead(team, op, args, grain, total, chunks)
        position += _HEAD + words
    if team != 0:
        _atomic_set(team + _PLAYING * 8, 0)
    return position


class Op:
    """A compiled operation; compiled, or loaded from the cache, when first used."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function
        self._callback: Any = None
        self.__doc__ = function.__doc__

    def compile(self) -> None:
        """Compile it, or load it from the cache, if that has not been done yet."""
        if self._callback is None:
            for _ in link():
                pass
            self._callback = c_callback("void(int64, int64, int64)", self._function)

    @property
    def address(self) -> int:
        """Where its machine code is."""
        self.compile()
        return int(self._callback.address)


_OPS: dict[Any, Op] = {}


def op_of(kernel: Any) -> Callable[[Callable[..., None]], Op]:
    """Decorator: `function(args, start, stop)` is the operation that calls this kernel."""

    def register(function: Callable[..., None]) -> Op:
        _OPS[kernel] = Op(function)
        return _OPS[kernel]

    return register


def compile_all() -> Iterator[int]:
    """Compile all operations, or load them from the cache, before the first token needs them.

    Yields before each piece of the work how many are left.
    """
    for left in link():
        yield left + len(_OPS)
    for done, op in enumerate(list(_OPS.values())):
        yield len(_OPS) - done
        op.compile()
    _lead_team(0, 0, 0, threads=2)  # an empty tape: what plays it, and what a worker does
    mark_cached()


class _Team:
    """The process's workers and the memory through which they are led."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._memory = np.zeros(_WORDS + 8, dtype=np.int64)
        skip = -address(self._memory) % 64 // 8  # start on a cache line
        self._words = self._memory[skip : skip + _WORDS]
        self._words[_YIELD] = _yield_address()
        self.address = address(self._words)
        self._wake = threading.Semaphore(0)
        self._workers = 0
        self.lock = threading.Lock()

    def call_up(self, threads: int) -> None:
        """See to it that threads - 1 workers are awake or waking; the caller holds the lock."""
        while self._workers < threads - 1:
            threading.Thread(target=self._work, name="kimi-cpu-kernel", daemon=True).start()
            self._workers += 1
        for _ in range(threads - 1 - int(self._words[_AWAKE])):
            self._wake.release()

    def _work(self) -> None:
        while True:
            self._wake.acquire()
            _serve(self.address)

    def is_ours(self) -> bool:
        """False in a child process: a fork has no threads but the one that forked."""
        return self._pid == os.getpid()


def _yield_address() -> int:
    """Address of a C function without arguments that gives up the core."""
    if sys.platform == "win32":
        function = ctypes.windll.kernel32.SwitchToThread  # type: ignore[attr-defined, unused-ignore]
    else:
        function = ctypes.CDLL(None).sched_yield
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)


_team: _Team | None = None


def _lead_team(tape: int, position: int, end: int, threads: int) -> int:
    """`_play` with `threads` threads; returns where the tape stopped."""
    global _team
    if threads <= 1:
        return int(_play(0, tape, position, end))
    team = _team
    if team is None or not team.is_ours():
        team = _team = _Team()
    with team.lock:
        team.call_up(threads)
        return int(_play(team.address, tape, position, end))


def _reference_counts(arrays: list[npt.NDArray[np.uint8]]) -> list[int]:
    return [sys.getrefcount(array) for array in arrays]


#: The count of an array that only a list refers to (it differs between Python versions).
_UNUSED = _reference_counts([np.empty(1, dtype=np.uint8)])[0]


class Tape:
    """Recorded operations, playable any number of times; keeps the arrays they use alive."""

    def __init__(self) -> None:
        self._recorded: list[int] = []
        self._words: npt.NDArray[np.int64] | None = None
        self._keep: list[Any] = []
        self._buffers: list[npt.NDArray[np.uint8]] = []
        #: Work space that recorded operations have in common, by whatever names it.
        self.shared: dict[Any, npt.NDArray[np.uint8]] = {}
        self._calls: dict[int, Callable[[], None]] = {}
        self._parallel = False

    def add(self, op: Op, args: Sequence[int], keep: Sequence[Any], total: int, grain: int) -> None:
        """Append an operation; grain >= total plays it in one piece."""
        self._recorded += [op.address, total, grain, len(args), *args]
        self._keep += keep
        self._parallel |= total < 0 or grain < total

    def call_if(self, condition: npt.NDArray[np.int64], function: Callable[[], None]) -> None:
        """Append a call of `function`, made if an earlier operation has set `condition`.

        Args:
            condition: int64 [], not 0 if the function is to be called.
            function: may run operations of its own; what it raises ends `play`.
        """
        self._calls[len(self._recorded)] = function
        self._recorded += [0, 0, 1, 1, address(condition)]
        self._keep.append(condition)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        """Memory for an intermediate result, taken from one that nobody refers to any more.

        Operations are played in the order of recording, so when the recorded code has dropped
        its last reference to an array, later operations may overwrite it.
        """
        n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        for buffer, count in zip(self._buffers, _reference_counts(self._buffers), strict=True):
            if buffer.nbytes >= n_bytes and count == _UNUSED:
                break
        else:
            buffer = np.empty(max(n_bytes, 64), dtype=np.uint8)
            self._buffers.append(buffer)
        array: npt.NDArray[Any] = buffer[:n_bytes].view(dtype).reshape(shape)
        return array

    def play(self, threads: int) -> None:
        """Compute everything once."""
        if self._words is None:
            self._words = np.array(self._recorded, dtype=np.int64)
        tape, end, position = address(self._words), self._words.size, 0
        while position < end:
            position = _lead_team(tape, position, end, threads if self._parallel else 1)
            if position < end:
                self._calls[position]()
                position += _CALL_WORDS


_state = threading.local()


@contextmanager
def recording() -> Iterator[Tape]:
    """Within this block (and thread), `run` records into the tape that it yields."""
    assert getattr(_state, "tape", None) is None, "already recording"
    _state.tape = Tape()
    try:
        yield _state.tape
    finally:
        _state.tape = None


def active_tape() -> Tape | None:
    """The tape being recorded by this thread, if any."""
    tape: Tape | None = getattr(_state, "tape", None)
    return tape


def empty(shape: tuple[int, ...], dtype: Any = np.float32) -> npt.NDArray[Any]:
    """An uninitialised array for an operation's output."""
    tape = active_tape()
    return np.empty(shape, dtype) if tape is None else tape.empty(shape, dtype)


def run(
    kernel: Any,
    args: Sequence[int | float],
    keep: Sequence[Any],
    total: int | Position,
    grain: int = 1,
    threads: int = 1,
    cost: int = 0,
) -> None:
    """Compute rows 0 .. total - 1 of an operation, now or, when recording, later.

    Args:
        kernel: a kernel that has an operation (see `ops.py`).
        args: its arguments: addresses, integers, and floats, which are passed by their bits.
        keep: the arrays whose addresses are in args.
        total: number of rows; an int64 array [] that an earlier operation fills, if it varies.
        grain: chunks start at multiples of this.
        threads: how many threads may take part.
        cost: about the bytes it reads: small work is not handed over.
    """
    tape = active_tape()
    op = _OPS.get(kernel)
    if op is None:
        raise TypeError(f"{kernel} is no operation yet: register it in kernels/ops.py")
    words = [float_bits(a) if isinstance(a, float) else a for a in args]
    if not isinstance(total, int):
        keep = (*keep, total)
        total = int(total) if tape is None else -address(total)
    if threads <= 1 or cost < MIN_PARALLEL_COST:
        chunk = max(total, 1) if total >= 0 else 1 << 40
    elif total < 0:
        chunk = grain
    else:
        chunks = threads * CHUNKS_PER_THREAD
        chunk = max(-(-total // (chunks * grain)) * grain, 1)
    if tape is not None:
        tape.add(op, words, keep, total, chunk)
        return
    entry = np.array([op.address, total, chunk, len(words), *words], dtype=np.int64)
    _lead_team(address(entry), 0, entry.size, threads if chunk < total else 1)
