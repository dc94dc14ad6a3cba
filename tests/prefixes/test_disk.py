"""Files of latents: damaged, cut off, foreign, half written, shared, too many."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kimi_cpu.kernels.common import BLOCK_TOKENS
from kimi_cpu.kv_cache import Block, BlockPool
from kimi_cpu.prefixes.blockfile import BlockName
from kimi_cpu.prefixes.disk import BlockStore
from tests.prefixes.fake import FakeEngine

MODEL, ROOT = bytes(16), bytes(range(16))


def make(folder: Path, budget_bytes: int = 1 << 30) -> BlockStore:
    return BlockStore(folder, MODEL, budget_bytes)


def content(pool: BlockPool, seed: int, n_tokens: int) -> tuple[BlockName, bytes, Block]:
    """A block that can be told from others, and the name of its tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 1000, n_tokens, dtype=np.int32).tobytes()
    block = pool.take()
    block.memory[:] = rng.integers(0, 256, len(block.memory), dtype=np.uint8)
    return BlockName.of(ROOT, tokens), tokens, block


def save(store: BlockStore, pool: BlockPool, seeds: range, n_tokens: int = BLOCK_TOKENS) -> None:
    for seed in seeds:
        name, tokens, block = content(pool, seed, n_tokens)
        assert store.save(name, tokens, block)
        pool.drop([block])
    assert store.wait(time.monotonic() + 60)


def loads(store: BlockStore, pool: BlockPool, seed: int, n_tokens: int = BLOCK_TOKENS) -> bool:
    """Whether a block is there; if so it is right."""
    name, tokens, want = content(pool, seed, n_tokens)
    block = store.load(name, pool)
    if block is not None:
        for ours, theirs in zip(block.parts(n_tokens), want.parts(n_tokens), strict=True):
            assert ours.tobytes() == theirs.tobytes()
        assert store.tokens(name) == tokens or not store.has(name)  # gone meanwhile
        pool.drop([block])
    pool.drop([want])
    return block is not None


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.latents"))


@pytest.mark.parametrize("n_tokens", [1, 100, BLOCK_TOKENS - 1, BLOCK_TOKENS])
def test_what_is_written_is_read(engine: FakeEngine, tmp_path: Path, n_tokens: int) -> None:
    pool, store = engine.pool, make(tmp_path)
    save(store, pool, range(3), n_tokens)
    assert len(store.children(ROOT)) == 3
    assert all(loads(store, pool, seed, n_tokens) for seed in range(3))
    store.close()
    again = make(tmp_path)
    assert sorted(again.children(ROOT)) == sorted(store.children(ROOT))
    assert again.nbytes == sum(path.stat().st_size for path in files(tmp_path))
    assert all(loads(again, pool, seed, n_tokens) for seed in range(3))
    assert not loads(again, pool, 3, n_tokens)
    again.close()
    assert pool.used_bytes == 0


def test_it_is_found_before_it_is_written(engine: FakeEngine, tmp_path: Path) -> None:
    pool, store = engine.pool, make(tmp_path)
    for seed in range(50):
        name, tokens, block = content(pool, seed, BLOCK_TOKENS)
        assert store.save(name, tokens, block) and store.has(name)
        pool.drop([block])
        assert loads(store, pool, seed)
    store.close()  # most were never written
    assert pool.used_bytes == 0
    again = make(tmp_path)
    assert all(loads(again, pool, seed) for seed in range(len(files(tmp_path))))
    again.close()


def flip(where: float) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(where * (len(data) - 1))] ^= 0x10
        path.write_bytes(data)

    return change


def cut(length: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:length])

    return change


def swapped(path: Path) -> None:
    """Another block's file under this name."""
    other = next(each for each in files(path.parent) if each != path)
    path.write_bytes(other.read_bytes())


DAMAGES: dict[str, Callable[[Path], None]] = {
    **{f"bit {where}": flip(where) for where in (0, 0.005, 0.02, 0.04, 0.1, 0.5, 0.9, 1)},
    **{f"{n} bytes": cut(n) for n in (0, 7, 63, 64, 500, -1)},
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x") and None,
    "text": lambda path: path.write_text("something else " * 1000) and None,
    "swapped": swapped,
}


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("n_tokens", [90, BLOCK_TOKENS])
def test_damage(
    engine: FakeEngine, tmp_path: Path, damage: str, restart: bool, n_tokens: int,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    pool, store = engine.pool, make(tmp_path)
    save(store, pool, range(2), n_tokens)
    name, _, block = content(pool, 0, n_tokens)
    pool.drop([block])
    path = tmp_path / MODEL.hex() / name.file_name
    DAMAGES[damage](path)
    if restart:
        store.close()
        store = make(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert not loads(store, pool, 0, n_tokens)
    assert path.name in caplog.text
    assert not path.exists() and not store.has(name)
    assert loads(store, pool, 1, n_tokens)
    save(store, pool, range(1), n_tokens)
    assert loads(store, pool, 0, n_tokens)
    store.close()
    assert pool.used_bytes == 0


def test_other_things_in_the_folder_are_left_alone(engine: FakeEngine, tmp_path: Path) -> None:
    pool = engine.pool
    own = tmp_path / MODEL.hex()
    keep = [tmp_path / "notes.txt", tmp_path / "else" / "a.latents", own / "readme.latents"]
    keep += [own / f"{'a' * 32}-{'b' * 32}-999.latents", own / "my.part"]
    for path in keep:
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
        os.utime(path, (1, 1))
    stale, fresh = own / f"{'c' * 32}.part", own / f"{'d' * 32}.part"
    for path in (stale, fresh):
        path.write_text("half")
    os.utime(stale, (1, 1))
    store = make(tmp_path, 3 * pool.block_bytes)
    save(store, pool, range(6))
    store.close()
    assert all(path.exists() for path in keep)
    assert fresh.exists() and not stale.exists()


def test_the_budget_holds_and_the_oldest_go_first(engine: FakeEngine, tmp_path: Path) -> None:
    pool = engine.pool
    budget = 10 * pool.block_bytes
    store = make(tmp_path, budget)
    for seed in range(9):
        save(store, pool, range(seed, seed + 1))
        time.sleep(0.01)
    name, _, block = content(pool, 0, BLOCK_TOKENS)
    pool.drop([block])
    store.touch([name])  # the first is of use
    for seed in range(9, 14):
        time.sleep(0.01)
        save(store, pool, range(seed, seed + 1))
        assert sum(path.stat().st_size for path in files(tmp_path)) <= budget
        assert store.nbytes <= budget
    there = [seed for seed in range(14) if loads(store, pool, seed)]
    assert there[0] == 0 and there[1:] == list(range(there[1], 14)) and len(there) >= 8
    store.close()
    other = BlockStore(tmp_path, b"another model...", budget)
    for seed in range(20, 24):
        save(other, pool, range(seed, seed + 1))
        assert sum(path.stat().st_size for path in files(tmp_path)) <= budget
    other.close()
    small = make(tmp_path, pool.block_bytes // 2)
    save(small, pool, range(30, 31))
    assert not loads(small, pool, 30)
    small.close()


def test_a_full_disk_is_said_once(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    pool, store = engine.pool, make(tmp_path)
    write = "kimi_cpu.prefixes.blockfile._write_all"

    def full(file: object, data: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(write, full)
        save(store, pool, range(4))
    assert caplog.text.count("No space left") == 1
    assert list((tmp_path / MODEL.hex()).iterdir()) == []
    assert not any(loads(store, pool, seed) for seed in range(4))
    save(store, pool, range(1))
    assert loads(store, pool, 0)
    store.close()
    assert pool.used_bytes == 0


def test_too_many_waiting_are_refused(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, store = engine.pool, make(tmp_path)
    monkeypatch.setattr("kimi_cpu.prefixes.disk.WAITING_BYTES", 0)
    monkeypatch.setattr(store, "_write", lambda waiting: time.sleep(0.3) or True)
    taken = 0
    for seed in range(10):
        name, tokens, block = content(pool, seed, BLOCK_TOKENS)
        taken += store.save(name, tokens, block)
        pool.drop([block])
    assert 2 <= taken <= 4
    assert pool.used_bytes <= 4 * pool.block_bytes
    store.close()
    assert pool.used_bytes == 0


#: Writes and reads blocks of the given numbers for ever, or for so many seconds.
WORKER = """
import logging, sys, time, random
from pathlib import Path
from kimi_cpu.config import ModelConfig
from tests.prefixes.fake import FakeEngine
from tests.prefixes.test_disk import content, loads, make
model, folder, budget_blocks, seconds, seed = sys.argv[1:]
logging.basicConfig(level=logging.WARNING)
engine = FakeEngine(Path(model), ModelConfig.load(Path(model)))
pool, rng = engine.pool, random.Random(int(seed))
store = make(Path(folder), int(budget_blocks) * pool.block_bytes)
print("ready", flush=True)
end = time.monotonic() + float(seconds)
found = 0
while time.monotonic() < end:
    name, tokens, block = content(pool, rng.randrange(40), 256)
    store.save(name, tokens, block)
    pool.drop([block])
    found += loads(store, pool, rng.randrange(40))
store.close()
print("found", found, flush=True)
"""


def worker(
    engine: FakeEngine, folder: Path, blocks: int, seconds: float, seed: int
) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(engine.folder), str(folder), str(blocks)]
    return subprocess.Popen(
        [*command, str(seconds), str(seed)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
def test_killed_while_writing(
    engine: FakeEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever a killed process leaves is whole, or not seen."""
    rng = random.Random(1)
    for attempt in range(4):
        process = worker(engine, tmp_path, 1000, 60, attempt)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        with caplog.at_level(logging.WARNING):
            store = make(tmp_path)
            found = sum(loads(store, engine.pool, seed) for seed in range(40))
            store.close()
        assert found == len(files(tmp_path)) and caplog.text == ""
    assert found > 0


def test_processes_share_a_folder(engine: FakeEngine, tmp_path: Path) -> None:
    """Each writes, reads, and makes room by removing what the other wrote."""
    processes = [worker(engine, tmp_path, 12, 3, seed) for seed in range(2)]
    for process in processes:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert errors == ""
        assert int(out.split()[-1]) > 0
    size = sum(path.stat().st_size for path in files(tmp_path))
    assert size <= 14 * engine.pool.block_bytes  # one file each may be on the way


def test_names() -> None:
    name = BlockName.of(ROOT, b"\1\0\0\0\2\0\0\0")
    assert BlockName.parse(name.file_name) == name and name.n_tokens == 2
    for bad in [
        "x", ".latents", f"{name.file_name}x", name.file_name.upper(), "a-b-3.latents",
        name.file_name.replace("-2.", "-02."), name.file_name.replace("-2.", "-0."),
        name.file_name.replace("-2.", "-257."), name.file_name.replace("-2.", "--2."),
    ]:  # fmt: skip
        assert BlockName.parse(bad) is None
