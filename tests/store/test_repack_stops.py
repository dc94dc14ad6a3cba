"""Repacking that is stopped: killed, interrupted, out of space; and deleting its source."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kimi_cpu.errors import UsageError, UserError
from kimi_cpu.quant import U8
from kimi_cpu.store.repack import LocalShards, Options, plan_repack, repack, verify
from kimi_cpu.store.repack import files as files_module
from kimi_cpu.store.repack import progress as progress_module
from kimi_cpu.store.repack import run as run_module
from kimi_cpu.store.repack.source import Header
from tests.store.repacking import OPTIONS, contents, copy, fails
from tests.store.test_checkpoint import rewrite
from tests.tiny import tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]

# Interruptions.


class Killed(BaseException):
    pass


def test_interrupted_anywhere_it_goes_on(
    source: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after every few pieces, each run does only what is missing."""
    target = tmp_path / "packed"
    monkeypatch.setattr(run_module, "COMMIT_BYTES", 1)
    done, runs = 0, 0
    while not target.exists():
        plan = plan_repack(source, target, OPTIONS)
        assert plan.done_bytes >= done
        done = plan.done_bytes
        left = random.Random(runs).randrange(1, 30)

        def stop(n_bytes: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt

        try:
            repack(plan, threads=2, on_bytes=stop)
        except KeyboardInterrupt:
            runs += 1
    assert runs > 3 and contents(target) == expected


def test_other_options_or_source_are_refused(source: Path, tmp_path: Path) -> None:
    def begin(n_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repack(plan_repack(source, tmp_path / "a"), on_bytes=begin)
    partial = tmp_path / "a.partial"
    assert partial.is_dir()
    for options, problem in (
        (Options(trunk="int4"), "was begun with another trunk form"),
        (Options(align=65536), "was begun with another alignment"),
        (Options(file_bytes=10_000), "was begun with another file size"),
    ):
        error = fails(
            UsageError,
            problem,
            lambda options=options: plan_repack(source, tmp_path / "a", options),
        )
        assert str(partial) in error.message
    other = tiny_checkpoint(tmp_path / "other", seed=9, vocab_size=200)
    fails(UsageError, "another source", lambda: plan_repack(other, tmp_path / "a"))
    (partial / ".unfinished" / "state.json").write_text("{", "utf-8")
    fails(UserError, "not valid JSON", lambda: plan_repack(source, tmp_path / "a"))


def test_a_torn_journal_and_lost_files(
    source: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, calls = tmp_path / "packed", 0
    monkeypatch.setattr(run_module, "COMMIT_BYTES", 1)

    def stop(n_bytes: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repack(plan_repack(source, target, OPTIONS), on_bytes=stop)
    partial = tmp_path / "packed.partial"
    journal = partial / ".unfinished" / "journal"
    whole = len(plan_repack(source, target, OPTIONS).progress.done)
    journal.write_bytes(journal.read_bytes()[:-9])
    plan = plan_repack(source, target, OPTIONS)
    assert len(plan.progress.done) == whole - 1
    (partial / next(iter(plan.progress.done.values())).file).unlink()
    assert len(plan_repack(source, target, OPTIONS).progress.done) < whole - 1
    repack(plan_repack(source, target, OPTIONS))
    assert contents(target) == expected


KILLED = """
import sys
from pathlib import Path
from kimi_cpu.store.repack import LocalShards, Options, plan_repack, repack, run
run.COMMIT_BYTES = 20_000
source, target, delete = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "delete"
print("ready", flush=True)
sys.stdin.readline()
plan = plan_repack(source, target, Options(file_bytes=50_000), delete)
repack(plan, LocalShards(delete), threads=2)
"""


@pytest.mark.parametrize("delete", [False, True])
def test_kill_9_at_any_moment(
    source: Path, tmp_path: Path, expected: dict[str, bytes], delete: bool
) -> None:
    """Real kills at random moments; then the same command completes to the same bytes."""
    target = tmp_path / "packed"
    own = copy(source, tmp_path / "source")
    command = [sys.executable, "-c", KILLED, str(own), str(target), "delete" if delete else "keep"]
    rng, kills = random.Random(int(delete)), 0
    while True:
        with subprocess.Popen(
            command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            assert process.stdin and process.stdout and process.stderr
            process.stdout.readline()
            process.stdin.write("\n")
            process.stdin.flush()
            if kills < 12:
                time.sleep(rng.uniform(0.0, 0.08))
                process.kill()
            error = process.stderr.read()
        if process.returncode >= 0:
            break
        kills += 1
    # killed after everything but the last line of the program: it has its name already
    assert process.returncode == 0 or "is there already" in error, error
    assert contents(target) == expected
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("packed")] == ["packed"]
    left = {path.name for path in own.glob("*.safetensors")}
    assert not left if delete else left == {p.name for p in source.glob("*.safetensors")}
    verify(target, source)


@pytest.mark.parametrize("step", ["manifest", "rename", "state", "work"])
def test_killed_while_it_completes(
    source: Path, tmp_path: Path, expected: dict[str, bytes], step: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Stopped right before each of the last steps."""
    target = tmp_path / "packed"
    own = copy(source, tmp_path / "source")

    def die(*args: Any, **named: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if step == "manifest":
            patch.setattr(run_module, "write_atomically", die)
        elif step == "rename":
            patch.setattr(Path, "rename", die)
        elif step == "state":
            patch.setattr(Path, "unlink", die)
        else:
            patch.setattr(progress_module.shutil, "rmtree", die)
        shards = LocalShards(delete=step in ("manifest", "rename"))
        with pytest.raises(Killed):
            repack(plan_repack(own, target, OPTIONS, shards.frees), shards)
    assert target.exists() == (step in ("state", "work"))
    if step == "work":
        fails(UsageError, "is there already", lambda: plan_repack(own, target, OPTIONS))
    else:
        plan = plan_repack(own, target, OPTIONS)
        assert plan.done_bytes == sum(piece.length for piece in plan.layout.pieces)
        repack(plan)
    assert contents(target) == expected


# A full disk.


def test_limited_file_size(source: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    """The system itself refuses to write: a clear error, and everything can go on."""
    resource = pytest.importorskip("resource")
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n{KILLED}"
    target = tmp_path / "packed"
    command = [sys.executable, "-c", code, str(source), str(target), "keep"]
    done = subprocess.run(command, cwd=ROOT, text=True, input="\n", capture_output=True)
    assert "UserError" in done.stderr and "no space left to write" in done.stderr, resource
    assert not target.exists()
    repack(plan_repack(source, target, OPTIONS))
    assert contents(target) == expected


@pytest.mark.parametrize("after", [0, 5, 40])
def test_full_disk(
    source: Path, tmp_path: Path, expected: dict[str, bytes], after: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    target, left = tmp_path / "packed", after
    real = files_module.Files.write

    def write(self: files_module.Files, path: Path, offset: int, data: U8) -> None:
        nonlocal left
        left -= 1
        if left < 0:  # in the middle of a piece
            real(self, path, offset, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, path, offset, data)

    with monkeypatch.context() as patch:
        patch.setattr(files_module.Files, "write", write)
        patch.setattr(run_module, "COMMIT_BYTES", 10_000)
        plan = plan_repack(source, target, OPTIONS)
        error = fails(UserError, "no space left to write", lambda: repack(plan, threads=1))
        assert "goes on from there" in error.hint and error.exit_code == 1
    plan = plan_repack(source, target, OPTIONS)
    assert len(plan.progress.done) == after
    repack(plan)
    assert contents(target) == expected


# Deleting the source on the way.


class Recorder(LocalShards):
    """Deletes, and remembers how much lay on the disk at each moment."""

    def __init__(self, folders: list[Path]) -> None:
        super().__init__(delete=True)
        self.folders = folders
        self.released: list[str] = []
        self.peak = 0

    def release(self, shard: Path) -> None:
        self.peak = max(self.peak, sum(file_bytes(folder) for folder in self.folders))
        self.released.append(shard.name)
        super().release(shard)


def file_bytes(folder: Path) -> int:
    paths = [*folder.rglob("*.safetensors"), *folder.rglob("*.kcpu")]
    return sum(p.stat().st_size for p in paths if ".unfinished" not in p.parts)


def test_shards_are_deleted_one_by_one(
    source: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    own, target = copy(source, tmp_path / "source"), tmp_path / "packed"
    shards = Recorder([own, tmp_path / "packed.partial"])
    before = file_bytes(own)
    plan = plan_repack(own, target, OPTIONS, frees=True)
    both = plan_repack(own, target, OPTIONS, frees=False)
    assert plan.needed_bytes < both.needed_bytes
    seen: list[int] = []
    repack(plan, shards, on_bytes=seen.append)
    assert sorted(shards.released) == sorted(p.name for p in source.glob("*.safetensors"))
    assert contents(target) == expected and not list(own.glob("*.safetensors"))
    assert (own / "config.json").exists()
    assert shards.peak <= before + plan.needed_bytes < before + plan.n_bytes + (64 << 20)
    assert sum(seen) <= plan.work_bytes


class Remote:
    """Shards that are copied from elsewhere when they are needed."""

    frees = True

    def __init__(self, source: Path, folder: Path, target: Path) -> None:
        self.source, self.folder, self.target = source, folder, target
        self.events: list[tuple[str, str]] = []
        self.broken = ""
        self.peak = 0

    def fetch(self, shard: Path) -> None:
        if shard.name == self.broken:
            raise UserError("the network is gone", "Wait.")
        self.events.append(("fetch", shard.name))
        if not shard.exists():
            shutil.copy(self.source / shard.name, shard)

    def release(self, shard: Path) -> None:
        self.peak = max(self.peak, file_bytes(self.folder) + file_bytes(self.target))
        self.events.append(("release", shard.name))
        shard.unlink(missing_ok=True)


@pytest.fixture
def remote(source: Path, tmp_path: Path) -> tuple[Remote, dict[str, Header]]:
    """A folder without shards, what fetches them, and their headers."""
    own = copy(source, tmp_path / "source")
    headers = {path.name: Header.read(path) for path in own.glob("*.safetensors")}
    assert len(headers) > 2
    for name in headers:
        (own / name).unlink()
    return Remote(source, own, tmp_path / "packed.partial"), headers


def test_the_next_shard_is_fetched_while_one_is_packed(
    remote: tuple[Remote, dict[str, Header]], tmp_path: Path, expected: dict[str, bytes]
) -> None:
    shards, headers = remote
    names = sorted(headers)
    plan = plan_repack(shards.folder, tmp_path / "packed", OPTIONS, True, headers)
    deadline = time.monotonic() + 10

    def packing(n_bytes: int) -> None:
        """Of the first shard: goes on when the second one comes, which it does by itself."""
        while n_bytes and ("fetch", names[1]) not in shards.events:
            assert time.monotonic() < deadline

    repack(plan, shards, on_bytes=packing)
    assert contents(tmp_path / "packed") == expected
    for one, following in pairwise(names):
        assert shards.events.index(("fetch", following)) < shards.events.index(("release", one))
    there: set[str] = set()
    for what, name in shards.events:
        (there.add if what == "fetch" else there.discard)(name)
        assert len(there) <= 3, "one at work, one with a part of an expert in it, one ahead"
    assert shards.peak <= plan.needed_bytes


def test_a_shard_that_does_not_come_leaves_what_was_packed(
    remote: tuple[Remote, dict[str, Header]], tmp_path: Path, expected: dict[str, bytes]
) -> None:
    shards, headers = remote
    names = sorted(headers)
    shards.broken = names[1]
    plan = plan_repack(shards.folder, tmp_path / "packed", OPTIONS, True, headers)
    fails(UserError, "the network is gone", lambda: repack(plan, shards))
    assert shards.events == [("fetch", names[0]), ("release", names[0])]
    shards.broken = ""
    plan = plan_repack(shards.folder, tmp_path / "packed", OPTIONS, True, headers)
    assert plan.done_bytes > 0
    repack(plan, shards)
    assert contents(tmp_path / "packed") == expected
    assert shards.events.count(("fetch", names[0])) == 1


def test_nothing_is_deleted_that_is_not_right(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the disk gives back differs: no shard goes."""
    own, target = copy(source, tmp_path / "source"), tmp_path / "packed"
    real = run_module._commit

    def spoil(progress: Any, written: Any) -> None:
        real(progress, written)
        if written:
            path = progress.folder / written[0].file
            with path.open("r+b") as file:
                file.seek(written[0].offset + 50)
                file.write(b"\x55")

    monkeypatch.setattr(run_module, "_commit", spoil)
    plan = plan_repack(own, target, OPTIONS, frees=True)
    fails(UserError, "are not what was written", lambda: repack(plan, LocalShards(delete=True)))
    assert len(list(own.glob("*.safetensors"))) == len(list(source.glob("*.safetensors")))


def test_symlinks_are_followed_when_deleting(source: Path, tmp_path: Path) -> None:
    blobs = copy(source, tmp_path / "blobs")
    links = tmp_path / "snapshot"
    links.mkdir()
    for path in blobs.iterdir():
        (links / path.name).symlink_to(path)
    repack(plan_repack(links, tmp_path / "packed", OPTIONS, True), LocalShards(delete=True))
    assert not list(links.glob("*.safetensors")) and not list(blobs.glob("*.safetensors"))
    verify(tmp_path / "packed", source)


def test_shards_without_records_stay(tmp_path: Path) -> None:
    def vision(tensors: dict[str, Any]) -> None:
        name = "model.layers.3.vision.weight"  # of a layer that is skipped
        tensors[name] = (name, np.zeros(40_000, np.float32), "F32")

    own = rewrite(tmp_path / "a", vision, num_nextn_predict_layers=1)
    plan = plan_repack(own, tmp_path / "b", frees=True)
    assert plan.layout.source.skipped == ["model.layers.3.vision.weight"]
    repack(plan, LocalShards(delete=True))
    (left,) = own.glob("*.safetensors")
    assert left.stat().st_size > 160_000
