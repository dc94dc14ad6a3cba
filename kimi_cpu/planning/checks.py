"""What `kimi-cpu doctor` looks at: each check reads the machine and says what to change.

A check that fails to find out is a line, too, never a traceback. Nothing here imports numba: what
needs the kernels is asked of another process (`selftest`), which may crash.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from kimi_cpu import hardware
from kimi_cpu.errors import UserError

#: "problem": something cannot run. "warning": it runs, worse than it could.
State = Literal["ok", "warning", "problem"]
#: Told what is being looked at.
Progress = Callable[[str], None]

_DISTRIBUTION = "kimi-cpu"
#: Extras that a user may want: name -> what for.
_EXTRAS = {"hub": "kimi-cpu pull", "server": "kimi-cpu serve", "plot": "drawings"}
_MEMINFO = Path("/proc/meminfo")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
#: Weights of Kimi K2 that every token needs, repacked: what is to be locked without a PATH.
_K2_TRUNK_BYTES = 12 << 30
_SELFTEST_SECONDS = 600
#: Logits may differ by this much from NumPy's (relative L2) in exact precision.
_LARGEST_ERROR = 1e-3
_LEAST_FREE_BYTES = 2 << 30
_REQUIREMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s*([^;]*)(?:;\s*(.*))?")


@dataclass(frozen=True)
class Check:
    """One line of the doctor.

    Attributes:
        name: of what was looked at.
        state: how it is.
        text: what was found.
        change: what to do about it; empty if all is well.
        values: the same for programs.
    """

    name: str
    state: State
    text: str
    change: str = ""
    values: dict[str, Any] = field(default_factory=dict)


def guarded(name: str, look: Callable[[], Check | Iterator[Check]]) -> list[Check]:
    """The check's lines; whatever it raises becomes one."""
    try:
        found = look()
        return [found] if isinstance(found, Check) else list(found)
    except UserError as error:
        return [Check(name, "problem", error.message, error.hint)]
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return [Check(name, "warning", f"could not be found out ({what})")]


def installation(model: Path | None, progress: Progress = lambda text: None) -> list[Check]:
    """Everything that needs no model of the user's.

    Args:
        model: a small model to compute with (the embedded one); None if it is missing.
    """
    checks = []
    for name, look in (
        ("python", python), ("packages", packages), ("extras", extras), ("processor", processor),
        ("threads", threads), ("memory", memory),
        ("locking", lambda: locking(_K2_TRUNK_BYTES, "Kimi K2")), ("huge pages", huge_pages),
    ):  # fmt: skip
        checks += guarded(name, look)
    progress("computing with the kernels ...")
    checks += guarded("kernels", lambda: kernels(model))
    checks += guarded("terminal", lambda: terminal(sys.stdout))
    return checks


def python() -> Check:
    """The interpreter, against what the package asks for."""
    version = platform.python_version()
    text = f"{version} ({platform.python_implementation()}) on {platform.system()}"
    text += f" {platform.machine()}, {_bits()} bits"
    values = {"version": version, "executable": sys.executable}
    try:
        wanted = importlib.metadata.metadata(_DISTRIBUTION)["Requires-Python"] or ""
    except importlib.metadata.PackageNotFoundError:
        wanted = ""
    if not _satisfies(version, wanted):
        return Check("python", "problem", text, f"Use a Python {wanted}.", values)
    if _bits() < 64:
        return Check("python", "problem", text, "Use a 64-bit Python.", values)
    return Check("python", "ok", text, values=values)


def _bits() -> int:
    """32 or 64: the interpreter's addresses."""
    return sys.maxsize.bit_length() + 1


def packages() -> Check:
    """The packages that are needed, against the least versions."""
    try:
        requirements = _requirements("")
    except importlib.metadata.PackageNotFoundError:
        return Check(
            "packages", "warning", "kimi-cpu runs without being installed; versions are unknown",
            "pip install . in the clone",
        )  # fmt: skip
    found, wrong = {}, []
    for name, wanted in requirements:
        version = _installed(name)
        found[name] = version
        if version is None:
            wrong.append(f"{name} is missing")
        elif not _satisfies(version, wanted):
            wrong.append(f"{name} {version} is not {wanted}")
    if wrong:
        text = "; ".join(wrong)
        return Check("packages", "problem", text, "pip install --upgrade kimi-cpu", found)
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    return Check("packages", "ok", text, values=found)


def extras() -> Check:
    """What may be installed besides. Nothing of it is necessary."""
    here, missing = [], []
    for extra, purpose in _EXTRAS.items():
        required = _requirements(extra)
        if required and all(_installed(name) is not None for name, _ in required):
            here.append(extra)
        else:
            missing.append(f"{extra} ({purpose})")
    text = f"installed: {', '.join(here) or 'none'}"
    if missing:
        names = ",".join(part.split()[0] for part in missing)
        text += f"; not: {', '.join(missing)}: pip install 'kimi-cpu[{names}]'"
    return Check("extras", "ok", text, values={"installed": here})


def _requirements(extra: str) -> list[tuple[str, str]]:
    """(name, versions) of what the package needs, or its extra does."""
    found = []
    for line in importlib.metadata.requires(_DISTRIBUTION) or []:
        match = _REQUIREMENT.fullmatch(line.strip())
        if match is None:
            continue
        name, wanted, marker = match[1], match[2].strip(" ()"), match[3] or ""
        of_extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", marker)
        if (of_extra[1] if of_extra else "") == extra and (extra or not marker):
            found.append((name, wanted))
    return found


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _satisfies(version: str, wanted: str) -> bool:
    """Whether a version is in a range like ">=3.11,<3.15"; what cannot be read is taken as so."""
    mine = _numbers(version)
    for clause in wanted.split(","):
        match = re.fullmatch(r"\s*(>=|<)\s*([\d.]+)\s*", clause)
        if match is None or not mine:
            continue
        other = _numbers(match[2])
        if (mine >= other) != (match[1] == ">="):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def processor() -> Check:
    """Its name, as the system tells it; what its kernels can do, `kernels` finds out."""
    return Check("processor", "ok", hardware.cpu_name() or "unknown")


def threads() -> Check:
    """Threads that will compute, against cores, quota, and what others do with them."""
    found = hardware.detect()
    n, cores, quota = found.threads, found.cores, found.cpu_quota
    text = f"{n} by default; {cores} core{'s' if cores != 1 else ''} as {found.logical_cpus} CPUs"
    text += ", no quota" if quota is None else f", the cgroup grants {quota:g}"
    values = {
        "threads": n, "cores": cores, "logical_cpus": found.logical_cpus, "cpu_quota": quota,
        "load": None,
    }  # fmt: skip
    if quota is not None and quota < cores:
        change = "Grant the container as many CPUs as it shall use."
        return Check("threads", "warning", text, change, values)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    values["load"] = load
    if load is not None and load > 0.5 * cores:
        text += f"; other programs load them with {load:.1f}"
        return Check("threads", "warning", text, "Stop them, or use fewer: --threads N.", values)
    return Check("threads", "ok", text, values=values)


def memory() -> Check:
    """What may be used, and what says so."""
    found = hardware.detect()
    text = f"{_size(found.ram_bytes)}, {_size(found.available_ram_bytes)} of it free"
    if found.ram_limit_bytes is not None and found.ram_limit_bytes <= found.ram_bytes:
        text += " (limit of the cgroup)"
    values = {
        "ram_bytes": found.ram_bytes, "available_bytes": found.available_ram_bytes,
        "limit_bytes": found.ram_limit_bytes,
    }  # fmt: skip
    if sys.platform == "linux" and not os.access(_MEMINFO, os.R_OK):
        text += "; /proc/meminfo cannot be read, so all of it is taken to be free"
        return Check("memory", "warning", text, "Say how much: --memory 8G.", values)
    if found.available_ram_bytes < _LEAST_FREE_BYTES:
        return Check("memory", "warning", text, "Close other programs.", values)
    return Check("memory", "ok", text, values=values)


def locking(trunk_bytes: int, name: str) -> Check:
    """Whether the weights that every token of a model needs can be kept from being dropped."""
    from kimi_cpu.store.experts import system

    limit = system.lock_limit()
    values = {"limit_bytes": limit, "trunk_bytes": trunk_bytes}
    if sys.platform == "win32":
        return Check("locking", "ok", "not used on Windows", values=values)
    if limit >= trunk_bytes:
        text = "no limit" if limit >= 1 << 60 else f"up to {_size(limit)}"
        return Check("locking", "ok", f"memory may be locked: {text}", values=values)
    return Check(
        "locking", "warning",
        f"only {_size(limit)} of memory may be locked; the {_size(trunk_bytes)} that every token "
        f"of {name} needs may be dropped when memory is short",
        "ulimit -l unlimited, or memlock in /etc/security/limits.conf", values,
    )  # fmt: skip


def huge_pages() -> Check:
    """Large pages, which direct reads need for their speed."""
    try:
        text = _HUGE_PAGES.read_text().strip()
    except (OSError, UnicodeDecodeError):
        reason = "the system does not say" if sys.platform == "linux" else "only Linux has them"
        return Check("huge pages", "ok", f"unknown: {reason}")
    match = re.search(r"\[(\w+)\]", text)
    chosen = match[1] if match else text[:40]
    if chosen == "never":
        return Check(
            "huge pages", "warning", "transparent huge pages are off: direct reads from the disk "
            "are half as fast", f"echo madvise | sudo tee {_HUGE_PAGES}", {"mode": chosen},
        )  # fmt: skip
    return Check("huge pages", "ok", f"transparent, {chosen}", values={"mode": chosen})


def kernels(model: Path | None) -> Iterator[Check]:
    """Compiled kernels: which, where they are kept, and whether they compute what NumPy does."""
    if model is None:
        yield Check(
            "kernels", "warning", "not tried: the embedded model is missing",
            "Install kimi-cpu again.",
        )  # fmt: skip
        return
    report = ask_selftest(model)
    variant, best = report["variant"], report["runnable"][0]
    text = f"{variant}; this machine can run {', '.join(report['runnable'])}"
    if report["forced"] and variant != best:
        change = f"KIMI_CPU_ISA={report['forced']} asks for it: unset it for {best}."
        yield Check("kernels", "warning", text, change, report)
    elif variant == "portable":
        change = "Use a CPU with AVX2 or ARM's dot product: several times as fast."
        yield Check("kernels", "warning", text, change, report)
    else:
        yield Check("kernels", "ok", text, values=report)
    yield _computing(report)
    yield _cache(report)


def ask_selftest(model: Path) -> dict[str, Any]:
    """What `selftest` reports. Raises UserError: it says so, crashes, or hangs."""
    command = [sys.executable, "-m", "kimi_cpu.planning.selftest", str(model)]
    again = f"{' '.join(command)} shows more."
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SELFTEST_SECONDS, check=False,
            encoding="utf-8", errors="replace", stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UserError(f"no answer within {_SELFTEST_SECONDS} s", again) from None
    except OSError as exc:
        raise UserError(f"Python cannot be started ({exc.strerror or exc})", again) from None
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        value: dict[str, Any] = json.loads(lines[-1])
        if "error" in value:
            raise UserError(value["error"], value["hint"])
        return value
    said = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")
    if done.returncode < 0:
        said = f"it was ended by signal {-done.returncode}" + (f": {said}" if said else "")
    raise UserError(f"they do not run: {said.strip()[:200] or 'no reason given'}", again)


def _computing(report: dict[str, Any]) -> Check:
    error = report["relative_error"]
    text = f"the nano model differs by {error:.0e} from NumPy, {report['decode_tps']:,.0f} tokens/s"
    if not error <= _LARGEST_ERROR:  # NaN is none
        change = "Wrong results: report it, with this output. KIMI_CPU_ISA=portable may help."
        return Check("computing", "problem", text, change, {"relative_error": error})
    return Check("computing", "ok", text, values={"relative_error": error})


def _cache(report: dict[str, Any]) -> Check:
    """Where compiled code is kept, and what it saves."""
    folder = Path(report["cache_folder"])
    values = {
        name: report[name]
        for name in ("cache_folder", "was_cached", "cache_bytes", "compile_s", "ready_s")
    }
    took = report["compile_s"]
    compiling = "" if took is None else f"; compiling took {took:.0f} s"
    if report["was_cached"]:
        text = (
            f"{_short(folder)}: {_size(report['cache_bytes'])}, ready in {report['ready_s']:.1f} s"
        )
        text += compiling
    else:
        text = f"{_short(folder)}: was empty{compiling}, from now on it takes a second"
    temporary = Path(tempfile.gettempdir())
    if temporary not in folder.parents:
        return Check("cache", "ok", text, values=values)
    try:
        wanted = str(hardware.user_cache_folder())
    except RuntimeError:
        wanted = "a home folder"
    if folder.parent.name == "kernels":
        text = f"{text}; in the folder for temporary files, which may be emptied"
    else:
        text = f"there is no place to keep compiled kernels{compiling}, at every start"
    change = f"Make {wanted} writable, or point XDG_CACHE_HOME at a folder that is."
    return Check("cache", "warning", text, change, values)


def terminal(stream: TextIO) -> Check:
    """Whether text can be shown as it is."""
    encoding = (getattr(stream, "encoding", "") or "").lower().replace("_", "-")
    name = os.environ.get("TERM", "")
    try:
        tty = stream.isatty()
    except ValueError:
        tty = False
    text = f"{encoding or 'unknown encoding'}, "
    text += f"{name or 'TERM is not set'}" if tty else "output is not a terminal"
    values = {"encoding": encoding, "is_terminal": tty, "term": name}
    if encoding not in ("utf-8", "utf8", "cp65001"):
        change = "export PYTHONUTF8=1, or a UTF-8 locale (LANG=C.UTF-8): else letters become ?."
        return Check("terminal", "warning", text, change, values)
    return Check("terminal", "ok", text, values=values)


def _short(path: Path) -> str:
    """With ~ for the home folder."""
    try:
        return str(Path("~") / path.relative_to(Path.home()))
    except (ValueError, RuntimeError):
        return str(path)


def _size(n_bytes: float) -> str:
    from kimi_cpu.store.experts.budget import format_size

    return format_size(n_bytes)
