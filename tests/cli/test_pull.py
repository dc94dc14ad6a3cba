"""`kimi-cpu pull` against a small hub on the loopback interface."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kimi_cpu.cli.main import main
from kimi_cpu.store.checkpoint import INDEX_NAME, MANIFEST_NAME, Checkpoint
from kimi_cpu.store.repack import Options, plan_repack, repack, verify
from tests.hub import COMMIT, REPO, SmallHub, small_hub
from tests.store.repacking import contents
from tests.tiny import tiny_checkpoint

pytest.importorskip("huggingface_hub")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("source"), seed=1)
    (folder / "chat_template.jinja").write_text("hello", "utf-8")
    (folder / "model.bin").write_bytes(b"\0" * 1000)
    return folder


@pytest.fixture
def hub(source: Path) -> Iterator[SmallHub]:
    with small_hub(source) as hub:
        yield hub


Pull = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(hub: SmallHub, tmp_path: Path) -> Iterator[Pull]:
    """start(*args) begins `kimi-cpu pull REPO ...` in a process of its own."""
    running = []

    def begin(*args: object, repo: str = REPO, **env: str) -> subprocess.Popen[str]:
        environment = os.environ | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
            "NO_PROXY": "127.0.0.1",
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "kimi_cpu", "pull", repo, *map(str, args)],
            cwd=ROOT,
            env=environment | env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def pull(start: Pull) -> Callable[..., tuple[int, str, str]]:
    """pull(*args) -> (exit code, stdout, stderr)."""

    def run(*args: object, **named: Any) -> tuple[int, str, str]:
        process = start(*args, **named)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    return run


def published(source: Path) -> dict[str, bytes]:
    return {n: c for n, c in contents(source).items() if n != "model.bin"}


def test_pull(source: Path, hub: SmallHub, tmp_path: Path, pull: Any) -> None:
    code, out, err = pull(tmp_path / "p")
    assert code == 0, err
    assert COMMIT in out and "file 1 of" in err and "model.bin" not in hub.sent
    assert contents(tmp_path / "p") == published(source)
    assert not list(tmp_path.glob("*.partial"))
    Checkpoint.open(tmp_path / "p").close()


def test_dry_run_fetches_only_small_files(hub: SmallHub, tmp_path: Path, pull: Any) -> None:
    for options in ([], ["--repack"]):
        code, out, err = pull(tmp_path / "p", "--dry-run", *options)
        assert code == 0 and "free: enough" in out, err
        assert not (tmp_path / "p").exists()
        shutil.rmtree(tmp_path / "p.partial")
    assert all(name.endswith((".json", ".jinja", "")) for name in hub.sent if name != "config.json")
    shards = [name for name in hub.sent if name.endswith(".safetensors")]
    files = {name: (hub.folder / name).stat().st_size for name in shards}
    assert files and all(hub.sent[name] <= files[name] for name in files)  # their headers, once


def test_repacked_on_the_way_is_the_same(
    source: Path, hub: SmallHub, tmp_path: Path, pull: Any
) -> None:
    repack(plan_repack(source, tmp_path / "local", Options(trunk="int4", align=65536)))
    code, out, err = pull(tmp_path / "p", "--repack", "--trunk", "int4", "--align", "64K")
    assert code == 0 and "bit for bit" in out, err
    assert contents(tmp_path / "p") == contents(tmp_path / "local")
    verify(tmp_path / "p", source)


def test_a_packed_repository(source: Path, tmp_path: Path, start: Pull) -> None:
    packed = repack(plan_repack(source, tmp_path / "local")).target
    with small_hub(packed) as hub:
        done = start(tmp_path / "p", HF_ENDPOINT=hub.endpoint)
        _, err = done.communicate(timeout=60)
        assert done.returncode == 0, err
        assert contents(tmp_path / "p") == contents(packed)
        done = start(tmp_path / "q", "--repack", HF_ENDPOINT=hub.endpoint)
        _, err = done.communicate(timeout=60)
        assert done.returncode == 1 and "is a packed checkpoint already" in err


def disk_bytes(folder: Path) -> int:
    """What lies in a folder while others write to it and delete in it."""
    total = 0
    for path in folder.rglob("*"):
        try:
            if path.suffix in (".kcpu", ".safetensors", ".incomplete"):
                total += path.stat().st_size
        except FileNotFoundError:
            pass
    return total


def test_the_disk_holds_a_few_shards_at_most(
    source: Path, hub: SmallHub, tmp_path: Path, pull: Any
) -> None:
    """Looked at whenever the hub sends something."""
    shards = sorted(path.stat().st_size for path in source.glob("*.safetensors"))
    assert len(shards) == 7
    peak, lock = 0, threading.Lock()

    def look(name: str, sent: int) -> None:
        nonlocal peak
        with lock:
            peak = max(peak, disk_bytes(tmp_path / "p.partial"))

    hub.before_send = look
    code, _, err = pull(tmp_path / "p", "--repack")
    assert code == 0, err
    packed_bytes = disk_bytes(tmp_path / "p")
    assert 0 < peak <= packed_bytes + 3 * shards[-1] < packed_bytes + sum(shards)
    downloaded = sum(n for name, n in hub.sent.items() if name.endswith(".safetensors"))
    assert downloaded <= 2 * sum(shards)  # once, and their headers


@pytest.mark.parametrize("options", [[], ["--repack"]], ids=["pull", "repack"])
def test_killed_again_and_again(
    source: Path, hub: SmallHub, tmp_path: Path, start: Pull, options: list[str]
) -> None:
    """Real kills while files arrive; each run goes on, and nothing is sent twice as a whole."""
    target, rng = tmp_path / "p", random.Random(len(options))
    blocks, limit = 0, 0
    reached = threading.Event()

    def count(name: str, sent: int) -> None:
        nonlocal blocks
        blocks += name.endswith(".safetensors")
        if blocks > limit:
            reached.set()
            time.sleep(0.02)  # so that the kill comes before the end

    hub.before_send = count
    kills = 0
    while not target.exists():
        limit = blocks + rng.randrange(1, 40) if kills < 6 else 1 << 30
        reached.clear()
        process = start(target, *options)
        while process.poll() is None and not reached.wait(0.02):
            pass
        if process.poll() is None and reached.is_set():
            process.kill()
            kills += 1
        _, err = process.communicate(timeout=60)
        assert process.returncode <= 0, err
    assert kills >= 3
    if options:
        repack(plan_repack(source, tmp_path / "local"))
        assert contents(target) == contents(tmp_path / "local")
    else:
        assert contents(target) == published(source)
    assert not list(tmp_path.glob("*.partial"))


def test_a_broken_connection_is_an_error_to_go_on_from(
    source: Path, hub: SmallHub, tmp_path: Path, pull: Any
) -> None:
    def breaks(name: str, sent: int) -> None:
        if name.startswith("model-00003"):
            raise ConnectionError

    hub.before_send = breaks
    code, out, err = pull(tmp_path / "p")
    assert code == 1 and out == "" and f"error: {REPO}: " in err and "goes on from there" in err
    assert "Traceback" not in err
    hub.before_send = lambda name, sent: None
    first = hub.sent["model-00001-of-000007.safetensors"]
    code, _, err = pull(tmp_path / "p")
    assert code == 0, err
    assert hub.sent["model-00001-of-000007.safetensors"] == first
    assert contents(tmp_path / "p") == published(source)


def test_other_commands_in_between(source: Path, tmp_path: Path, pull: Any, capsys: Any) -> None:
    assert pull(tmp_path / "p", "--dry-run")[0] == 0
    for args in (["--repack"], ["--revision", COMMIT]):
        code, _, err = pull(tmp_path / "p", *args)
        assert code == 2 and "was begun with another command" in err
    assert main(["repack", str(source), str(tmp_path / "p")]) == 2
    assert "was begun by `kimi-cpu pull`" in capsys.readouterr().err
    assert pull(tmp_path / "p")[0] == 0
    code, _, err = pull(tmp_path / "p")
    assert code == 2 and "is there already and not empty" in err


def test_what_the_hub_does_not_have(source: Path, hub: SmallHub, tmp_path: Path, pull: Any) -> None:
    code, _, err = pull(tmp_path / "p", repo="kimi/other")
    assert code == 1 and "there is no such repository" in err and "HF_TOKEN" in err
    code, _, err = pull(tmp_path / "p", repo="not a name")
    assert code == 1 and "there is no such repository" in err
    code, _, err = pull(tmp_path / "p", "--revision", "no-such")
    assert code == 1 and "has no such revision" in err
    code, _, err = pull(tmp_path / "p", HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 1 and f"error: {REPO}: " in err
    assert not list(tmp_path.glob("p*"))
    poor = tmp_path / "poor"
    poor.mkdir()
    shutil.copy(source / "config.json", poor)
    hub.folder = poor
    code, _, err = pull(tmp_path / "q")
    assert code == 1 and f"has neither {INDEX_NAME}" in err
    shutil.copy(source / INDEX_NAME, poor)
    code, _, err = pull(tmp_path / "r")
    assert code == 1 and "is missing there" in err and "model-00001" in err


def test_usage(tmp_path: Path, pull: Any) -> None:
    code, _, err = pull(tmp_path / "p", "--trunk", "int4")
    assert code == 2 and "are for --repack" in err


def test_without_the_client(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["pull", REPO, str(tmp_path / "p")]) == 2
    err = capsys.readouterr().err
    assert "needs huggingface_hub" in err and "pip install 'kimi-cpu[hub]'" in err
    assert not list(tmp_path.iterdir())


def test_too_little_space(
    hub: SmallHub, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import huggingface_hub.constants

    from kimi_cpu.store import hub as hub_module

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")  # fmt: skip
    monkeypatch.setattr(hub_module, "free_bytes", lambda path: 1000)
    assert main(["pull", REPO, str(tmp_path / "p")]) == 1
    assert "GB are free" in capsys.readouterr().err
    assert not [name for name in hub.sent if name.endswith(".safetensors")]
    assert not (tmp_path / "p" / MANIFEST_NAME).exists()
