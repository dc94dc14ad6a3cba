"""Limits of cores and memory, also those of cgroups v1 and v2."""

from __future__ import annotations

import pytest

from kimi_cpu import hardware


@pytest.fixture
def system(tmp_path, monkeypatch):
    """An empty /proc and /sys/fs/cgroup; returns write(path, text)."""
    monkeypatch.setattr(hardware, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path / "cgroup")

    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    return write


def test_this_machine():
    found = hardware.detect()
    assert 1 <= found.threads <= found.cores <= found.logical_cpus
    assert 0 < found.available_ram_bytes <= found.ram_bytes
    assert found.cpu


def test_nothing_is_known(system):
    assert hardware._cpu_quota() is None
    assert hardware.ram_bytes() > 0
    assert hardware.available_ram_bytes() == hardware.ram_bytes()
    assert isinstance(hardware.cpu_name(), str)


def test_cgroup_v2(system):
    system("proc/self/cgroup", "0::/a/b\n")
    system("cgroup/cpu.max", "max 100000\n")
    system("cgroup/a/cpu.max", "150000 100000\n")
    system("cgroup/a/b/cpu.max", "max 100000\n")
    system("cgroup/a/b/memory.max", "max\n")
    system("cgroup/a/memory.max", "1000000\n")
    assert hardware._cpu_quota() == 1.5
    assert hardware.ram_bytes() == hardware.available_ram_bytes() == 1_000_000
    system("cgroup/a/memory.current", "700000\n")
    system("cgroup/a/memory.stat", "anon 100000\ninactive_file 400000\nactive_file 100000\n")
    assert hardware.available_ram_bytes() == 800_000
    found = hardware.detect()
    assert (found.ram_limit_bytes, found.cpu_quota) == (1_000_000, 1.5)


def test_cgroup_v1(system):
    system("proc/self/cgroup", "3:cpu,cpuacct:/x\n2:memory:/x\n")
    system("cgroup/cpu,cpuacct/x/cpu.cfs_quota_us", "50000")
    system("cgroup/cpu,cpuacct/x/cpu.cfs_period_us", "100000")
    system("cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1")
    system("cgroup/memory/memory.limit_in_bytes", "9223372036854771712")
    system("cgroup/memory/x/memory.limit_in_bytes", "2000000")
    assert hardware._cpu_quota() == 0.5
    assert hardware.ram_bytes() == 2_000_000
    system("cgroup/memory/x/memory.usage_in_bytes", "2500000")
    system("cgroup/memory/x/memory.stat", "inactive_file 1\ntotal_inactive_file nonsense\n")
    assert hardware.available_ram_bytes() == 0


def test_half_a_core_is_one_thread(monkeypatch):
    hardware.default_threads.cache_clear()
    monkeypatch.setattr(hardware, "_cpu_quota", lambda: 0.4)
    assert hardware.default_threads() == 1
    hardware.default_threads.cache_clear()
