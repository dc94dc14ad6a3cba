"""What this process may use: cores and memory, within affinity and cgroup limits."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")
#: A cgroup v1 without a limit reports a number near 2^63.
_NO_LIMIT = 1 << 60
#: More threads than any machine has use for: a slip of the finger.
MAX_THREADS = 1024


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _cgroup_folders(controller: str) -> list[Path]:
    """The folders, own group first and its parents after it, whose limits of v1 or v2 apply."""
    folders = []
    for line in _read(_PROC / "self" / "cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            root = _CGROUP
        elif controller in controllers.split(","):
            root = _CGROUP / controllers
            if not root.is_dir():
                root = _CGROUP / controller
        else:
            continue
        own = root / path.lstrip("/")
        folders += [own, *[p for p in own.parents if p == root or root in p.parents]]
    return list(dict.fromkeys(folders))


def _cpu_quota() -> float | None:
    """Cores' worth of time that the tightest cgroup grants, or None without a limit."""
    quotas = []
    for folder in _cgroup_folders("cpu"):
        quota, _, period = _read(folder / "cpu.max").partition(" ")  # v2: "max 100000"
        if not quota:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _affinity() -> set[int]:
    """The logical CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _physical_cores(cpus: set[int]) -> int:
    """How many distinct cores these logical CPUs are; each its own where nothing is known."""
    cores = set()
    for cpu in cpus:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        siblings = _read(topology / "thread_siblings_list")
        cores.add(siblings or str(cpu))
    return len(cores)


@lru_cache(maxsize=1)
def default_threads() -> int:
    """Physical cores that this process may use, within affinity and cgroup quota; at least 1."""
    cores = _physical_cores(_affinity())
    quota = _cpu_quota()
    if quota is not None:
        cores = min(cores, int(quota + 0.5))
    return max(cores, 1)


def _memory_limits() -> list[tuple[Path, int]]:
    """(folder, bytes) of the cgroups that limit this process's memory."""
    limits = []
    for folder in _cgroup_folders("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name)
            if text.isdigit() and int(text) < _NO_LIMIT:
                limits.append((folder, int(text)))
    return limits


def ram_bytes() -> int:
    """Memory that this process may use: the machine's, or its cgroup's limit if that is less."""
    limits = [limit for _, limit in _memory_limits()]
    if hasattr(os, "sysconf"):
        with contextlib.suppress(ValueError, OSError):
            limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(limits, default=8 << 30)


def available_ram_bytes() -> int:
    """Memory that could be used now without swapping, within the cgroup's limit."""
    left = [ram_bytes()]
    left += [max(limit - _used_bytes(folder), 0) for folder, limit in _memory_limits()]
    for line in _read(_PROC / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            left.append(int(line.split()[1]) * 1024)
    return min(left)


def _used_bytes(folder: Path) -> int:
    """What a cgroup's processes use, without files' pages that can be let go."""
    for name in ("memory.current", "memory.usage_in_bytes"):
        text = _read(folder / name)
        if text.isdigit():
            break
    else:
        return 0
    fields = dict(line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines())
    pages = 0
    for name in ("inactive_file", "active_file"):
        count = fields.get(f"total_{name}", fields.get(name, "0"))  # v1 has both, v2 the latter
        pages += int(count) if count.isdigit() else 0
    return max(int(text) - pages, 0)


def user_cache_folder() -> Path:
    """Where things go that can be made again; it may not exist. RuntimeError without a home."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "kimi-cpu"


def cpu_name() -> str:
    """The processor's name as the system reports it."""
    for line in _read(_PROC / "cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Hardware:
    """A snapshot for `kimi-cpu inspect` and the benchmarks.

    Attributes:
        cpu: name of the processor.
        threads: see `default_threads`.
        logical_cpus, cores: logical CPUs in the process's affinity, and cores that they are.
        cpu_quota: cores' worth of time that the cgroup grants; None without a limit.
        ram_bytes, available_ram_bytes: within the cgroup's limit.
        ram_limit_bytes: that limit; None without one.
    """

    cpu: str
    threads: int
    logical_cpus: int
    cores: int
    cpu_quota: float | None
    ram_bytes: int
    available_ram_bytes: int
    ram_limit_bytes: int | None


def detect() -> Hardware:
    """Everything above at once. The instruction set is `kernels.fast.VARIANT`."""
    return Hardware(
        cpu=cpu_name(),
        threads=default_threads(),
        logical_cpus=len(_affinity()),
        cores=_physical_cores(_affinity()),
        cpu_quota=_cpu_quota(),
        ram_bytes=ram_bytes(),
        available_ram_bytes=available_ram_bytes(),
        ram_limit_bytes=min((limit for _, limit in _memory_limits()), default=None),
    )
