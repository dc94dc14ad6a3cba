"""The probe of the disk: measured once, kept, and never in the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from kimi_cpu import hardware
from kimi_cpu.store.checkpoint import Checkpoint
from kimi_cpu.store.experts import probe
from kimi_cpu.store.experts.probe import DiskSpeed, disk_speed
from tests.tiny import tiny_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path):
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path / "model", 3))
    yield checkpoint
    checkpoint.close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(hardware, "user_cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "disks.json"


def test_reads_are_timed_in_both_ways(checkpoint: Checkpoint) -> None:
    speed = probe.measure(checkpoint, seconds=0.2)
    assert speed.mmap > 0 and (speed.direct is None or speed.direct > 0)
    assert speed.ceiling >= speed.mmap
    assert speed.expert_bytes == sum(e.length for e in checkpoint.expert_extents(1, 0))


def test_measured_once_and_the_better_is_kept(
    checkpoint: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_bytes = sum(e.length for e in checkpoint.expert_extents(1, 0))
    answers = [DiskSpeed(1e9, 5e8, n_bytes), DiskSpeed(8e8, 2e9, n_bytes)]
    monkeypatch.setattr(probe, "measure", lambda _: answers.pop(0))
    assert disk_speed(checkpoint).best == "mmap" and cache.exists()
    assert disk_speed(checkpoint).mmap == 1e9 and len(answers) == 1  # not measured again
    assert disk_speed(checkpoint, again=True) == DiskSpeed(8e8, 2e9, n_bytes)  # what it is now
    assert disk_speed(checkpoint) == DiskSpeed(1e9, 2e9, n_bytes) and not answers


@pytest.mark.parametrize("text", ["", "[]", "{", '{"x": 1}', '{"%s": {"mmap": "fast"}}'])
def test_a_damaged_file_costs_another_measurement(
    checkpoint: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    key = probe._file_system(checkpoint.expert_extents(1, 0)[0].path)
    cache.parent.mkdir()
    cache.write_text(text % key if "%s" in text else text)
    n_bytes = sum(e.length for e in checkpoint.expert_extents(1, 0))
    monkeypatch.setattr(probe, "measure", lambda _: DiskSpeed(1.0, None, n_bytes))
    assert disk_speed(checkpoint).best == "mmap"
    assert disk_speed(checkpoint).ceiling == 1.0


def test_no_place_to_keep_it(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(hardware, "user_cache_folder", lambda: tmp_path / "file" / "below")
    assert disk_speed(checkpoint).mmap > 0
    assert not list(tmp_path.glob("**/disks.json*"))


def test_which_way() -> None:
    assert DiskSpeed(1.0, 0.8, 1).best == "direct"  # no worse for sure, and it spares the CPU
    assert DiskSpeed(1.0, 0.7, 1).best == "mmap"
    assert DiskSpeed(1.0, None, 1).best == "mmap" and DiskSpeed(1.0, None, 1).ceiling == 1.0
