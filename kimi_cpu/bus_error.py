"""A program that touches a mapped weight file that is gone ends with an error, not a bus error.

Mapped bytes are read by load instructions. If the file has been cut off meanwhile, or its disk
fails, the system answers them with the signal SIGBUS: in any thread, in the middle of compiled
code, where no Python error can be raised. Python's own signal handlers do not help either: they run
between two instructions of Python, and the load would be tried again for ever. So the handler is
compiled. It finds the file whose map holds the address, writes that file's error to stderr and
exits with code 1; it needs no lock and calls only what a signal handler may call. A bus error
anywhere else ends the process as it would without us.

`install` is for programs: handlers of signals belong to them, not to libraries. Windows has no such
signal, and does not let anybody cut off a mapped file.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types as numba_types

from kimi_cpu.errors import UserError
from kimi_cpu.kernels.isa import c_callback
from kimi_cpu.kernels.simd import I64, POINTER, intrinsic, load_i64
from kimi_cpu.store import mapping

types: Any = numba_types  # untyped

_IS_MAC = sys.platform == "darwin"
_SIGBUS = getattr(signal, "SIGBUS", 0)  # Windows has none
_STDIN, _STDERR, _TCSANOW, _SIG_DFL = 0, 2, 0, 0
_SA_SIGINFO = 0x40 if _IS_MAC else 4
#: Where `siginfo_t` holds the address that could not be read.
_ADDRESS_AT = 24 if _IS_MAC else 16

# What the handler reads, in words of 8 bytes: whether it runs already, the address of the
# terminal's settings (or 0), and a row for each map: its first byte and its end (0: a free row),
# the address of the text to write, its bytes.
_ENTERED, _TERMINAL, _FIRST_ROW, _ROW_WORDS = 0, 1, 2, 4
#: More files than any checkpoint has; pages of the table that are not used take no memory.
_MAX_FILES = 1 << 14
_table = np.zeros(_FIRST_ROW + _MAX_FILES * _ROW_WORDS, dtype=np.int64)
_rows = _table[_FIRST_ROW:].reshape(_MAX_FILES, _ROW_WORDS)
_free = list(reversed(range(_MAX_FILES)))
#: What the addresses in the table point to, and the compiled handler.
_texts: dict[int, bytes] = {}
_handlers: list[Any] = []
_terminal = ctypes.create_string_buffer(256)  # more than a `struct termios` has

_exit = types.ExternalFunction("_exit", types.void(types.intc))
_getpgrp = types.ExternalFunction("getpgrp", types.intc())
_pause = types.ExternalFunction("pause", types.intc())
_raise = types.ExternalFunction("raise", types.intc(types.intc))
_signal = types.ExternalFunction("signal", types.intp(types.intc, types.intp))
_tcgetpgrp = types.ExternalFunction("tcgetpgrp", types.intc(types.intc))
_tcsetattr = types.ExternalFunction("tcsetattr", types.intc(types.intc, types.intc, types.intp))
_write = types.ExternalFunction("write", types.intp(types.intc, types.intp, types.intp))


@intrinsic
def _own_word(typingctx: Any) -> Any:
    """The address of a word that belongs to the compiled code, 0 at first."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        name = "kimi_cpu_bus_error_table"
        word = builder.module.globals.get(name)
        if word is None:
            word = ir.GlobalVariable(builder.module, I64, name)
            word.linkage, word.initializer = "internal", ir.Constant(I64, 0)
        return builder.ptrtoint(word, I64)

    return types.int64(), codegen


@intrinsic
def _exchange(typingctx: Any, addr: Any, value: Any) -> Any:
    """Store an int64 and return what was there, in one step."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("xchg", builder.inttoptr(args[0], POINTER), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


def _on_bus_error(number, info, context):  # type: ignore[no-untyped-def]
    """The handler (number: SIGBUS; info: address of its `siginfo_t`), compiled.

    With the number 0, which no signal has, it only learns where the table is: `info`.
    """
    if number == 0:
        _exchange(_own_word(), info)
        return
    table = load_i64(_own_word())
    address = load_i64(info + _ADDRESS_AT)
    for i in range(_MAX_FILES):
        row = table + 8 * (_FIRST_ROW + i * _ROW_WORDS)
        if load_i64(row) <= address < load_i64(row + 8):
            while _exchange(table + 8 * _ENTERED, 1) != 0:
                _pause()  # another thread is just about to end the process
            terminal = load_i64(table + 8 * _TERMINAL)
            if terminal != 0 and _tcgetpgrp(_STDIN) == _getpgrp():  # else it is not ours
                _tcsetattr(_STDIN, _TCSANOW, terminal)
            _write(_STDERR, load_i64(row + 16), load_i64(row + 24))
            _exit(1)
    _signal(_SIGBUS, _SIG_DFL)
    _raise(_SIGBUS)  # comes as soon as we return


class _Action(ctypes.Structure):
    """`struct sigaction` of Linux's C libraries, and of macOS."""

    _fields_ = (
        [
            ("handler", ctypes.c_void_p),
            ("mask", ctypes.c_uint32),
            ("flags", ctypes.c_int),
        ]
        if _IS_MAC
        else [
            ("handler", ctypes.c_void_p),
            ("mask", ctypes.c_ulong * 16),
            ("flags", ctypes.c_int),
            ("restorer", ctypes.c_void_p),
        ]
    )


def install(text_of: Callable[[UserError], bytes]) -> bool:
    """From now on weight files that are mapped are watched, those of this process as a whole.

    Compiles the handler, or loads it from the cache. The terminal's settings of this moment are
    what is restored before the process ends.

    Args:
        text_of: what to write to stderr for an error.

    Returns:
        False if nothing was done: there is a handler already (faulthandler's, the program's own,
        or ours), or the system is another than Linux and macOS.
    """
    if sys.platform not in ("linux", "darwin"):
        return False
    libc: Any = ctypes.CDLL(None)
    before = _Action()
    if libc.sigaction(_SIGBUS, None, ctypes.byref(before)) != 0 or before.handler:
        return False
    handler = c_callback("void(int32, int64, int64)", _on_bus_error)
    handler.ctypes(0, _table.ctypes.data, 0)
    if libc.tcgetattr(_STDIN, _terminal) == 0:
        _table[_TERMINAL] = ctypes.addressof(_terminal)
    action = _Action(handler=handler.address, flags=_SA_SIGINFO)
    if libc.sigaction(_SIGBUS, ctypes.byref(action), None) != 0:
        return False
    _handlers.append(handler)
    mapping.on_map = lambda path, address, n_bytes: watch(
        address, n_bytes, text_of(mapping.gone(path, "it became shorter, or its disk failed"))
    )
    return True


def watch(address: int, n_bytes: int, text: bytes) -> Callable[[], None]:
    """Have `text` written when bytes of this map cannot be read; what is returned forgets it."""
    try:
        row = _free.pop()
    except IndexError:  # a bus error there stays one
        return lambda: None
    _texts[row] = text
    end = -(-(address + n_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    _rows[row] = address, end, np.frombuffer(text, dtype=np.uint8).ctypes.data, len(text)

    def forget() -> None:  # runs when the map is collected, perhaps in the middle of `watch`
        _rows[row, 1] = 0
        _free.append(row)

    return forget
