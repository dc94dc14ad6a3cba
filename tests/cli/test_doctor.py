"""`kimi-cpu doctor`: on this machine, and on ones that lack something."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_cpu import hardware
from kimi_cpu.cli import common
from kimi_cpu.cli.main import main
from kimi_cpu.errors import UserError
from kimi_cpu.planning import checks, model_checks
from kimi_cpu.planning.checks import Check
from kimi_cpu.store.experts import system
from tests.cli import fake
from tests.tiny import tiny_checkpoint

REPORT = {
    "variant": "avx2", "runnable": ["avx2", "portable"], "forced": "", "threads": 2,
    "cache_folder": "/home/u/.cache/kimi-cpu/kernels/avx2-0", "was_cached": True,
    "cache_bytes": 2 << 20, "compile_s": 21.0, "ready_s": 0.6, "relative_error": 4e-7,
    "decode_tps": 900.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_model_of_the_users(monkeypatch) -> None:
    monkeypatch.delenv("KIMI_CPU_MODEL", raising=False)


@pytest.fixture
def report(monkeypatch) -> dict:
    """What the process that computes is taken to say; change it."""
    value = dict(REPORT)
    monkeypatch.setattr(checks, "ask_selftest", lambda model: value)
    return value


@pytest.fixture
def doctor(report, capsys):
    """doctor(*args) -> (exit code, name -> check)."""

    def run(*args: str) -> tuple[int, dict[str, dict]]:
        code = main(["doctor", "--json", *args])
        value = json.loads(capsys.readouterr().out)
        assert value["usable"] == (code == 0)
        for check in value["checks"]:
            assert set(check) == {"name", "state", "text", "change", "values"}
            assert check["state"] in ("ok", "warning", "problem") and check["text"]
            assert check["state"] == "ok" or check["change"], check
        return code, {check["name"]: check for check in value["checks"]}

    return run


def test_the_real_thing(capsys) -> None:
    """Compiles, computes and compares with NumPy, in a process of its own."""
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) < 80 and lines[-1].startswith("Ready to run")
    assert "from NumPy" in out and hardware.cpu_name()[:20] in out
    names = [line[9:21].strip() for line in lines[:-1] if line[:8].strip()]
    assert names == [
        "python", "packages", "extras", "processor", "threads", "memory", "locking", "huge pages",
        "kernels", "computing", "cache", "terminal",
    ]  # fmt: skip


def test_values_are_this_machines(doctor) -> None:
    code, found = doctor()
    assert code == 0
    assert found["python"]["values"]["version"] == sys.version.split()[0]
    assert found["packages"]["values"]["numpy"] == importlib.metadata.version("numpy")
    assert found["memory"]["values"]["ram_bytes"] == hardware.ram_bytes()
    assert found["threads"]["values"]["threads"] == hardware.default_threads()
    assert found["locking"]["values"]["limit_bytes"] == system.lock_limit()


def test_limits_of_a_container(doctor, monkeypatch, tmp_path) -> None:
    for name, text in {
        "proc/self/cgroup": "0::/a\n", "proc/meminfo": "MemAvailable: 64000000 kB\n",
        "cgroup/a/memory.max": f"{1 << 30}\n", "cgroup/a/cpu.max": "50000 100000\n",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(hardware, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(checks, "_MEMINFO", tmp_path / "proc/meminfo")
    code, found = doctor()
    assert code == 0
    assert found["memory"]["state"] == "warning" and "1.0G" in found["memory"]["text"]
    assert "cgroup" in found["memory"]["text"]
    assert found["memory"]["values"]["limit_bytes"] == 1 << 30
    assert found["threads"]["state"] == "warning" and "grants 0.5" in found["threads"]["text"]


def test_no_proc_at_all(doctor, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(hardware, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(checks, "_MEMINFO", tmp_path / "proc/meminfo")
    monkeypatch.setattr(checks, "_HUGE_PAGES", tmp_path / "enabled")
    monkeypatch.setattr(sys, "platform", "linux")
    code, found = doctor()
    assert code == 0 and found["memory"]["state"] == "warning"
    assert "meminfo" in found["memory"]["text"] and "unknown" in found["huge pages"]["text"]


@pytest.mark.parametrize(("text", "state"), [
    ("always madvise [never]", "warning"), ("always [madvise] never", "ok"),
    ("[always] madvise never", "ok"), ("\x00nonsense", "ok"), ("", "ok"),
])  # fmt: skip
def test_huge_pages(monkeypatch, tmp_path, text, state) -> None:
    (tmp_path / "enabled").write_text(text)
    monkeypatch.setattr(checks, "_HUGE_PAGES", tmp_path / "enabled")
    found = checks.huge_pages()
    assert found.state == state and bool(found.change) == (state != "ok")


@pytest.mark.parametrize(("limit", "state"), [
    (8 << 20, "warning"), (12 << 30, "ok"), (1 << 62, "ok"), (0, "warning"),
])  # fmt: skip
def test_locking(monkeypatch, limit, state) -> None:
    monkeypatch.setattr(system, "lock_limit", lambda: limit)
    monkeypatch.setattr(sys, "platform", "linux")
    found = checks.locking(12 << 30, "Kimi K2")
    assert found.state == state and ("ulimit" in found.change) == (state == "warning")


def test_old_and_missing_packages(monkeypatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "tqdm":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.62.9rc1" if name == "numba" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = checks.packages()
    assert found.state == "problem" and "tqdm is missing" in found.text
    assert "numba 0.62.9rc1 is not >=0.63" in found.text and "numpy" not in found.text


def test_not_installed_at_all(monkeypatch) -> None:
    def gone(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    for name in ("requires", "metadata"):
        monkeypatch.setattr(importlib.metadata, name, gone)
    assert checks.packages().state == "warning"
    assert checks.python().state == "ok"
    (line,) = checks.guarded("extras", checks.extras)
    assert line.state == "warning" and "PackageNotFoundError" in line.text


@pytest.mark.parametrize(("version", "wanted", "fits"), [
    ("3.11.7", ">=3.11,<3.15", True), ("3.15.0", ">=3.11,<3.15", False),
    ("3.10.12", ">=3.11,<3.15", False), ("2.0.0rc1", ">=2.0", True), ("1.26", ">=2.0", False),
    ("4", "", True), ("local", ">=1", True), ("1.0", "~=2.0", True),
])  # fmt: skip
def test_versions(version, wanted, fits) -> None:
    assert checks._satisfies(version, wanted) == fits


def test_an_old_python(monkeypatch) -> None:
    monkeypatch.setattr(checks.platform, "python_version", lambda: "3.9.1")
    found = checks.python()
    assert found.state == "problem" and "3.11" in found.change


def test_variants(doctor, report) -> None:
    report.update(variant="portable", forced="portable")
    code, found = doctor()
    assert code == 0 and found["kernels"]["state"] == "warning"
    assert "unset it for avx2" in found["kernels"]["change"]
    report.update(runnable=["portable"], forced="")
    assert "AVX2" in doctor()[1]["kernels"]["change"]


@pytest.mark.parametrize("error", [0.02, float("nan"), float("inf")])
def test_wrong_results_are_a_problem(doctor, report, error) -> None:
    report["relative_error"] = error
    code, found = doctor()
    assert code == 1 and found["computing"]["state"] == "problem"


def test_where_compiled_code_goes(report, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(checks.tempfile, "gettempdir", lambda: "/tmp")
    assert "compiling took 21 s" in checks._cache(report).text
    report["was_cached"] = False
    assert "was empty" in checks._cache(report).text
    report["cache_folder"] = "/tmp/kimi-cpu-1000/kernels/avx2-0"
    shared = checks._cache(report)
    assert shared.state == "warning" and "XDG_CACHE_HOME" in shared.change
    report["cache_folder"] = "/tmp/kimi-cpu-ab12"
    assert "at every start" in checks._cache(report).text


def ask(tmp_path: Path, monkeypatch, **files: str) -> UserError:
    """What is said if these modules shadow the real ones."""
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError) as caught:
        checks.ask_selftest(common.embedded_model())
    assert caught.value.hint and "\n" not in caught.value.message
    return caught.value


def test_a_broken_numba(tmp_path, monkeypatch, capsys) -> None:
    error = ask(tmp_path, monkeypatch, numba="raise ImportError('Numba needs NumPy 2.3 or less')")
    assert "Numba needs NumPy 2.3 or less" in error.message
    assert main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert "PROBLEM  kernels" in out and "1 problem prevents running" in out
    assert "Traceback" not in out + err


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_crash(tmp_path, monkeypatch) -> None:
    error = ask(tmp_path, monkeypatch, numba="import os; os.kill(os.getpid(), 4)")
    assert "signal 4" in error.message


def test_an_impossible_variant(monkeypatch) -> None:
    monkeypatch.setenv("KIMI_CPU_ISA", "mmx")
    with pytest.raises(UserError, match="not a kernel variant"):
        checks.ask_selftest(common.embedded_model())


def test_it_hangs(monkeypatch) -> None:
    monkeypatch.setattr(checks, "_SELFTEST_SECONDS", 0.01)
    with pytest.raises(UserError, match="no answer"):
        checks.ask_selftest(common.embedded_model())


def test_without_the_embedded_model(monkeypatch, capsys) -> None:
    monkeypatch.setattr(common, "embedded_folders", lambda: (Path("/nowhere"), Path("/no")))
    assert main(["doctor"]) == 0
    assert "embedded model is missing" in capsys.readouterr().out


def test_whatever_a_check_raises_is_a_line() -> None:
    def broken() -> Check:
        raise ZeroDivisionError("so\nwhat")

    (line,) = checks.guarded("name", broken)
    assert (line.name, line.state) == ("name", "warning")
    assert "ZeroDivisionError: so what" in line.text


@pytest.mark.parametrize(("encoding", "state"), [("utf-8", "ok"), ("ascii", "warning")])
def test_terminal(encoding, state) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    assert checks.terminal(stream).state == state
    stream.close()
    assert checks.terminal(stream).state == state


def test_an_ascii_terminal_shows_it_all(monkeypatch) -> None:
    """Written for a terminal that knows ASCII only, in a process with such a stream."""
    code = (
        "import sys, json; from kimi_cpu.planning import checks; "
        f"checks.ask_selftest = lambda model: json.loads({json.dumps(REPORT)!r}); "
        "from kimi_cpu.cli.main import main; sys.exit(main(['doctor']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=60,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert done.returncode == 0 and b"PYTHONUTF8" in done.stdout and not done.stderr


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tiny_checkpoint(
        tmp_path_factory.mktemp("tiny"), vocab_size=512, bos_token_id=256, eos_token_id=257
    )
    config = (folder / "config.json").read_bytes()
    fake.write_folder(folder)
    (folder / "config.json").write_bytes(config)
    return folder


def test_a_good_model(doctor, tiny) -> None:
    code, found = doctor(str(tiny))
    assert code == 0
    assert found["checkpoint"]["values"]["form"] == "published"
    assert found["tokenizer"]["state"] == found["fits"]["state"] == "ok"
    assert found["fits"]["values"]["slots"] == found["checkpoint"]["values"]["experts"] == 32


def test_the_model_of_the_environment(doctor, tiny, monkeypatch) -> None:
    monkeypatch.setenv("KIMI_CPU_MODEL", str(tiny))
    assert "checkpoint" in doctor()[1]


def test_a_model_that_does_not_fit(doctor, tiny, monkeypatch) -> None:
    monkeypatch.setattr(hardware, "available_ram_bytes", lambda: 300 << 20)
    code, found = doctor(str(tiny))
    assert code == 1 and "at least" in found["fits"]["text"]


def test_a_model_that_fits_in_part(tiny, monkeypatch) -> None:
    """Most experts stay on the disk; then locking the trunk of this very model matters."""
    from kimi_cpu.store.checkpoint import Checkpoint
    from kimi_cpu.store.experts.budget import make_budget

    checkpoint = Checkpoint.open(tiny)
    floor = make_budget(checkpoint, 1).floor_bytes
    monkeypatch.setattr(model_checks, "make_budget", lambda c: make_budget(c, floor + 100_000))
    monkeypatch.setattr(system, "lock_limit", lambda: 0)
    fits, lock = model_checks._fits(checkpoint)
    checkpoint.close()
    assert fits.state == "ok" and "of 32 experts" in fits.text
    assert lock.state == "warning" and tiny.name in lock.text


def test_the_disk_is_measured(tiny, monkeypatch) -> None:
    monkeypatch.setattr(model_checks, "_SMALL_BYTES", 0)
    found = {check.name: check for check in model_checks.model(tiny)}
    assert found["disk"].values["mmap"] > 0
    monkeypatch.setattr(model_checks, "_SLOW_DISK", 1e15)
    assert "NVMe" in {c.name: c for c in model_checks.model(tiny)}["disk"].change

    def fails(checkpoint: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(model_checks, "disk_speed", fails)
    disk = {check.name: check for check in model_checks.model(tiny)}["disk"]
    assert disk.state == "problem" and "Input/output error" in disk.text


@pytest.mark.parametrize("how", ["missing", "empty", "cut off", "no tokenizer", "a file"])
def test_broken_models(doctor, tiny, tmp_path, how) -> None:
    import shutil

    folder = Path(shutil.copytree(tiny, tmp_path / "m"))
    if how == "missing":
        shutil.rmtree(folder)
    elif how == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif how == "cut off":
        shard = next(folder.glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-8])
    elif how == "no tokenizer":
        (folder / "tiktoken.model").unlink()
    else:
        folder = folder / "config.json"
    code, found = doctor(str(folder))
    bad = [check for check in found.values() if check["state"] == "problem"]
    assert code == 1 and len(bad) == 1
    assert bad[0]["name"] == ("tokenizer" if how == "no tokenizer" else "checkpoint")


def test_names_with_escapes_are_harmless(report, tmp_path, capsys) -> None:
    main(["doctor", str(tmp_path / "a\x1b]0;title\x07")])
    assert "\x1b]" not in capsys.readouterr().out
