"""Which instructions the kernels use, and where their compiled code is kept.

Importing this module imports numba. The variant follows what Numba will really emit for this
process, and the environment variable KIMI_CPU_ISA forces another one that the machine can run, so
that the AVX2 code is tested on an AVX-512 machine:

    avx512vnni   512-bit vectors, `vpdpbusd`
    avxvnni      256-bit vectors, `vpdpbusd`, FMA
    avx2         256-bit vectors, `vpmaddubsw` + `vpmaddwd`, FMA
    neon         128-bit vectors of 64-bit ARM, `sdot`, FMA
    portable     the baseline of any architecture
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import inspect
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding
import numba
from llvmlite.binding import llvm_version_info
from numba.core import config, types
from numba.core.codegen import get_host_cpu_features
from numba.core.registry import cpu_target

from kimi_cpu import hardware
from kimi_cpu.errors import UsageError

_KEEP_SECONDS = 30 * 24 * 3600
#: Linux on ARM: the entry of the auxiliary vector, and its bit for `sdot` and `udot`.
_AT_HWCAP, _HWCAP_ASIMDDP = 16, 1 << 20


@dataclass(frozen=True)
class Variant:
    """What the kernels may use and how much of it there is.

    Attributes:
        machine: "x86_64" or "aarch64"; "" for any.
        needs: sets of LLVM's CPU features, of which the machine must have one as a whole.
        registers: how many vectors of 16 float32 or int32 the registers hold together.
        target: LLVM's name of a CPU and features: what is compiled for when the variant is forced,
            if the machine has them all, and when it is compiled for another machine.
    """

    machine: str
    needs: tuple[frozenset[str], ...]
    registers: int
    target: tuple[str, str]


def _any_of(*features: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(f.split()) for f in features)


_AVX2 = (
    "+64bit,+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16,+avx,+avx2,+fma,+f16c,"
    "+bmi,+bmi2,+lzcnt,+movbe"
)
_AVX512 = ",+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512cd,+avx512vnni"

#: The best one first.
VARIANTS = {
    "avx512vnni": Variant(
        "x86_64",
        _any_of("avx2 fma avx512f avx512bw avx512vl avx512dq avx512vnni"),
        32,
        ("icelake-server", _AVX2 + _AVX512),
    ),
    # The same code runs on AVX-512 machines, whose LLVM encodes its `vpdpbusd` in another way.
    "avxvnni": Variant(
        "x86_64",
        _any_of("avx2 fma avxvnni", "avx2 fma avx512vl avx512vnni"),
        8,
        ("haswell", _AVX2 + ",+avxvnni"),
    ),
    "avx2": Variant("x86_64", _any_of("avx2 fma"), 8, ("haswell", _AVX2)),
    "neon": Variant("aarch64", _any_of("dotprod"), 8, ("generic", "+neon,+fp-armv8,+dotprod")),
    "portable": Variant("", _any_of(""), 4, ("x86-64", "+64bit,+sse,+sse2,+cx8,+fxsr,+mmx")),
}

#: Numba's settings, which it makes up at import time.
numba_config: Any = config

#: The shape of `vpdpbusd`'s operands changed with LLVM 22.
LLVM_MAJOR: int = llvm_version_info[0]


def _machine() -> str:
    """As in `Variant.machine`; "" for an architecture that has only the portable kernels."""
    name = platform.machine().lower()
    known = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
    return known.get(name, "") if numba_config.MACHINE_BITS == 64 else ""


def _names(features: str) -> set[str]:
    """The features that an LLVM feature string enables."""
    return {f[1:] for f in features.split(",") if f.startswith("+")}


def _has_dotprod() -> bool:
    """Whether this ARM machine has `sdot`: LLVM reports nothing on macOS, and this nowhere."""
    if sys.platform == "darwin":
        return True  # every Mac with an ARM processor
    try:
        getauxval = ctypes.CDLL(None).getauxval
    except (AttributeError, OSError, TypeError):  # not Linux: nothing to ask, so portable
        return False
    getauxval.restype = ctypes.c_ulong
    return bool(getauxval(_AT_HWCAP) & _HWCAP_ASIMDDP)


def _possible(features: str) -> list[str]:
    """The variants that code with these features may be, the best one first."""
    machine, enabled = _machine(), _names(features)
    return [
        name
        for name, v in VARIANTS.items()
        if v.machine in ("", machine) and any(enabled >= needs for needs in v.needs)
    ]


def _host_features() -> str:
    """What this machine has, in LLVM's words."""
    features = str(get_host_cpu_features())  # type: ignore[no-untyped-call]
    if _machine() == "aarch64" and _has_dotprod():
        features = f"{features},+dotprod".lstrip(",")
    return features


def runnable() -> list[str]:
    """The variants that this machine can run, the best one first."""
    return _possible(_host_features())


def _set_target(forced: str) -> None:
    """Tell Numba what to compile for, where it would not do the right thing by itself.

    Takes effect only if nobody compiled with Numba before us in this process; else the kernels
    still use the forced variant's own instructions, which is what matters.
    """
    if numba_config.CPU_NAME is not None or numba_config.CPU_FEATURES is not None:
        return  # the user's own choice
    host = _host_features()
    if forced and forced != runnable()[0]:
        cpu_name, features = VARIANTS[forced].target
        if _names(features) <= _names(host):
            numba_config.CPU_NAME, numba_config.CPU_FEATURES = cpu_name, features
    elif _machine() == "aarch64":
        numba_config.CPU_FEATURES = host


def _choose_variant() -> tuple[str, str, str]:
    """(variant, CPU name, CPU features) of the code that this process compiles."""
    forced = os.environ.get("KIMI_CPU_ISA", "").strip().lower()
    if forced and forced not in VARIANTS:
        raise UsageError(
            f"KIMI_CPU_ISA={forced!r} is not a kernel variant",
            f"Use one of {', '.join(runnable())}, or unset it.",
        )
    _set_target(forced)
    _, cpu_name, features = cpu_target.target_context.codegen().magic_tuple()
    possible = _possible(features)
    if forced and forced not in possible:
        raise UsageError(
            f"KIMI_CPU_ISA={forced}: this machine cannot run these kernels",
            f"Use one of {', '.join(possible)}, or unset it.",
        )
    return forced or possible[0], cpu_name, features


VARIANT, CPU_NAME, _CPU_FEATURES = _choose_variant()
IS_X86 = _machine() == "x86_64"
#: See `Variant.registers`.
REGISTERS = VARIANTS[VARIANT].registers


def write_code_for(variant: str) -> None:
    """Let the kernels that are imported from now on emit code of a variant that need not run here.

    For reading what LLVM makes of it (`tools/kernel_asm.py`): nothing may be called any more.
    """
    global VARIANT, IS_X86, REGISTERS
    VARIANT, REGISTERS = variant, VARIANTS[variant].registers
    IS_X86 = VARIANTS[variant].machine == "x86_64"


#: A file in the cache: compiling came to its end. Single kernels say nothing, it may be broken off.
_COMPLETE = "complete"

#: More than the compiled code of one variant takes.
_CACHE_BYTES = 16 << 20


def _writable(folder: Path) -> bool:
    """Create `folder` for this user alone and try to write in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
            return False  # compiled code is executed: never take it from somebody else
        if shutil.disk_usage(folder).free < _CACHE_BYTES:
            return False
        with tempfile.TemporaryFile(dir=folder):
            return True
    except (OSError, RuntimeError):
        return False


def _forget_old(folder: Path) -> None:
    """Mark `folder` as in use and remove its siblings that nobody used for a month."""
    with contextlib.suppress(OSError):
        os.utime(folder)
        for other in folder.parent.iterdir():
            if time.time() - other.stat().st_mtime > _KEEP_SECONDS:
                shutil.rmtree(other, ignore_errors=True)


def _cache_folder() -> Path:
    """The folder of this exact compiler, CPU and kernel source; created, writable."""
    digest = hashlib.sha256()
    for part in (numba.__version__, llvmlite.__version__, VARIANT, CPU_NAME, _CPU_FEATURES):
        digest.update(part.encode() + b"\0")
    # Editing an intrinsic does not invalidate the kernels of other files by itself.
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + source.read_bytes())
    name = f"{VARIANT}-{digest.hexdigest()[:16]}"
    if numba_config.BOUNDSCHECK:
        name += "-boundscheck"
    user = os.getuid() if hasattr(os, "getuid") else "user"
    candidates: list[Callable[[], Path]] = [
        lambda: hardware.user_cache_folder() / "kernels" / name,
        lambda: Path(tempfile.gettempdir()) / f"kimi-cpu-{user}" / "kernels" / name,
    ]
    for candidate in candidates:
        try:
            folder = candidate()
        except RuntimeError:  # no home directory
            continue
        if _writable(folder):
            _forget_old(folder)
            return folder
    return Path(tempfile.mkdtemp(prefix="kimi-cpu-"))


CACHE_FOLDER = _cache_folder()


@contextlib.contextmanager
def _our_cache() -> Iterator[None]:
    before = numba_config.CACHE_DIR
    numba_config.CACHE_DIR = str(CACHE_FOLDER)  # read while decorating
    try:
        yield
    finally:
        numba_config.CACHE_DIR = before


def jit(function: Callable[..., Any]) -> Any:
    """`numba.njit` as all kernels use it: without the GIL, cached in CACHE_FOLDER."""
    with _our_cache():
        return numba.njit(cache=True, nogil=True, error_model="numpy")(function)


def c_callback(signature: Any, function: Callable[..., Any]) -> Any:
    """Compile a function for calls through its machine `address`, cached in CACHE_FOLDER."""
    with _our_cache():
        return numba.cfunc(signature, cache=True, error_model="numpy")(function)


_link_lock = threading.Lock()
#: Standalone functions that wait for `link`, in the order of their definition, so that what one
#: calls comes before it; and those that `link` has compiled.
_unlinked: list[tuple[str, Any, Callable[..., None]]] = []
_linked: list[Any] = []


def standalone(function: Callable[..., None]) -> Any:
    """A function of int64 that is compiled once: its callers know its name and not its body.

    What a `jit` function calls is optimised again as a part of it, and of what calls that. For the
    large kernels this would be most of the time that a first start takes.
    """
    symbol = f"{function.__module__}.{function.__qualname__}"
    signature = types.void(*[types.int64] * len(inspect.signature(function).parameters))
    _unlinked.append((symbol, signature, function))
    return types.ExternalFunction(symbol, signature)


def link() -> Iterator[int]:
    """Compile, or load, the standalone functions, before any code that calls one is loaded.

    Yields before each of them how many are left.
    """
    with _link_lock:
        while _unlinked:
            yield len(_unlinked)
            symbol, signature, function = _unlinked[0]
            callback = c_callback(signature, function)
            llvmlite.binding.add_symbol(symbol, callback.address)
            _linked.append(callback)
            _unlinked.pop(0)


def mark_cached() -> None:
    """Note that all kernels have been compiled, see `threads.compile_all`."""
    with contextlib.suppress(OSError):
        (CACHE_FOLDER / _COMPLETE).touch()


def is_cached() -> bool:
    """Whether an earlier process compiled all kernels: if not, the first use takes a while."""
    return (CACHE_FOLDER / _COMPLETE).exists()
