"""Which instructions the kernels use, and where their compiled code is kept.

Importing this module imports numba. The variant follows what Numba will really emit for this
process, and the environment variable KIMI_CPU_ISA forces a lower one, so that the AVX2 code is
tested on an AVX-512 machine:

    avx512vnni   512-bit vectors, `vpdpbusd`
    avx2         256-bit vectors, `vpmaddubsw` + `vpmaddwd`, FMA
    portable     the baseline of the architecture; also what ARM runs for now
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llvmlite
import numba
from llvmlite.binding import llvm_version_info
from numba.core import config
from numba.core.registry import cpu_target

from kimi_cpu.errors import UsageError

_KEEP_SECONDS = 30 * 24 * 3600

VARIANTS = ("avx512vnni", "avx2", "portable")
_NEEDS = {
    "avx512vnni": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "avx2", "fma"},
    "avx2": {"avx2", "fma"},
    "portable": set[str](),
}
_FORCED_TARGET = {
    "avx2": (
        "haswell",
        "+64bit,+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16,+avx,+avx2,+fma,+f16c,"
        "+bmi,+bmi2,+lzcnt,+movbe",
    ),
    "portable": ("x86-64", "+64bit,+sse,+sse2,+cx8,+fxsr,+mmx"),
}

#: Numba's settings, which it makes up at import time.
numba_config: Any = config

#: The shape of `vpdpbusd`'s operands changed with LLVM 22.
LLVM_MAJOR: int = llvm_version_info[0]


IS_X86 = numba_config.MACHINE_BITS == 64 and platform.machine().lower() in ("x86_64", "amd64")


def _choose_variant() -> tuple[str, str, str]:
    """(variant, CPU name, CPU features) of the code that this process compiles."""
    forced = os.environ.get("KIMI_CPU_ISA", "").strip().lower()
    if forced and forced not in VARIANTS:
        raise UsageError(
            f"KIMI_CPU_ISA={forced!r} is not a kernel variant", f"use one of {', '.join(VARIANTS)}"
        )
    if forced in _FORCED_TARGET and IS_X86 and numba_config.CPU_NAME is None:
        # Takes effect only if nobody compiled with numba before us in this process; else the
        # kernels still use the forced variant's own instructions, which is what matters.
        numba_config.CPU_NAME, numba_config.CPU_FEATURES = _FORCED_TARGET[forced]
    _, cpu_name, features = cpu_target.target_context.codegen().magic_tuple()
    enabled = {f[1:] for f in features.split(",") if f.startswith("+")}
    possible = [v for v in VARIANTS if enabled >= _NEEDS[v] and (IS_X86 or v == "portable")]
    if forced and forced not in possible:
        raise UsageError(
            f"this machine cannot run the {forced} kernels",
            f"unset KIMI_CPU_ISA or use one of {', '.join(possible)}",
        )
    return forced or possible[0], cpu_name, features


VARIANT, CPU_NAME, _CPU_FEATURES = _choose_variant()


def _user_cache_dir() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


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
        lambda: _user_cache_dir() / "kimi-cpu" / "kernels" / name,
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


def c_callback(signature: str, function: Callable[..., Any]) -> Any:
    """Compile a function for calls through its machine `address`, cached in CACHE_FOLDER."""
    with _our_cache():
        return numba.cfunc(signature, cache=True, error_model="numpy")(function)


def is_cached() -> bool:
    """Whether an earlier process left compiled kernels: if not, the first use takes a while."""
    return any(CACHE_FOLDER.rglob("*.nbc"))
