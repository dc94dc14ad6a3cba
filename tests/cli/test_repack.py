"""`kimi-cpu repack` on tiny checkpoints: what it prints, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kimi_cpu.benchmark import divergence as divergence_module
from kimi_cpu.cli import repack as repack_module
from kimi_cpu.cli.main import main
from kimi_cpu.errors import UsageError
from kimi_cpu.store.checkpoint import MANIFEST_NAME, Checkpoint
from kimi_cpu.store.repack import run as run_module
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("source"), seed=1)


@pytest.fixture
def repack(capsys: pytest.CaptureFixture[str]) -> Any:
    """repack(*args) -> (exit code, stdout, stderr)."""

    def run(*args: object) -> tuple[int, str, str]:
        code = main(["repack", *map(str, args)])
        return code, *capsys.readouterr()

    return run


def test_dry_run_shows_sizes_and_writes_nothing(source: Path, tmp_path: Path, repack: Any) -> None:
    code, out, err = repack(source, tmp_path / "p", "--dry-run")
    assert code == 0 and err == "" and not list(tmp_path.iterdir())
    for text in (str(source), str(tmp_path / "p"), "experts", "int8", "written already      0 B"):
        assert text in out
    assert "needed" in out and "free: enough" in out


def test_repack_then_verify(source: Path, tmp_path: Path, repack: Any) -> None:
    target = tmp_path / "p"
    code, out, err = repack(source, target)
    assert code == 0 and "bit for bit as published" in out and "relative L2 error 0.5" in out
    for kind in ("q_a_proj", "o_proj", "shared down_proj", "lm_head"):
        assert f"  {kind}" in out
    assert f"kimi-cpu repack --verify {source} {target}" in err
    predictions = out.splitlines()[-1]
    assert predictions.startswith("predictions") and "64 random tokens" in predictions
    kl, at_most = (float(predictions.split(word)[1].split()[0]) for word in ("KL", "average,"))
    assert 0 < kl < at_most < 0.1
    code, out, _ = repack("--verify", source, target)
    assert code == 0 and f"32 equal to {source} bit for bit" in out
    assert out.splitlines()[-1] == predictions
    code, out, _ = repack("--verify", target)
    assert code == 0 and "not compared" in out


def test_options_reach_the_result(source: Path, tmp_path: Path, repack: Any) -> None:
    code, out, _ = repack(source, tmp_path / "p", "--trunk", "bf16", "--align", "64k", "-t", "1")
    assert code == 0 and "the rest             as published" in out
    manifest = json.loads((tmp_path / "p" / MANIFEST_NAME).read_text("utf-8"))
    assert manifest["trunk"]["form"] == "bf16" and manifest["experts"]["align"] == 65536
    assert "predictions" not in out  # nothing was rounded
    code, out, _ = repack("--verify", source, tmp_path / "p")
    assert code == 0 and "predictions" not in out


def test_too_large_to_compare(
    source: Path, tmp_path: Path, repack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence_module, "_MEMORY_SHARE", 0.0)
    for args in ((), ("--verify",)):
        code, out, err = repack(*args, source, tmp_path / "p")
        assert code == 0 and "predictions" not in out and "do not fit into the free memory" in err
        assert f"Where they do: kimi-cpu repack --verify {source}" in err


def test_a_comparison_that_fails_leaves_the_result(
    source: Path, tmp_path: Path, repack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise UsageError("the memory that may be used now is 0.1G")

    monkeypatch.setattr(divergence_module, "divergence", fail)
    code, out, err = repack(source, tmp_path / "p")
    assert code == 0 and "bit for bit as published" in out
    assert "Predictions are not compared: the memory that may be used now is 0.1G" in err
    Checkpoint.open(tmp_path / "p").close()


def test_delete_source_shards(tmp_path: Path, source: Path, repack: Any) -> None:
    own = tmp_path / "own"
    shutil.copytree(source, own)
    code, _, err = repack(own, tmp_path / "p", "--delete-source-shards")
    assert code == 0 and not list(own.glob("*.safetensors")) and "--verify" not in err
    assert "not compared: the source's shards are deleted" in err
    assert repack("--verify", source, tmp_path / "p")[0] == 0


def test_interrupted_and_continued(
    source: Path, tmp_path: Path, repack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = repack_module.progress_bar

    class Stopping:
        def __init__(self) -> None:
            self.left = 30

        def update(self, n_bytes: int) -> None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt

    class Bar:
        def __init__(self, what: str, n_bytes: int) -> None:
            self.inner = real(what, n_bytes)

        def __enter__(self) -> Stopping:
            self.inner.__enter__()
            return Stopping()

        def __exit__(self, *error: Any) -> Any:
            return self.inner.__exit__(*error)

    with monkeypatch.context() as patch:
        patch.setattr(repack_module, "progress_bar", Bar)
        code, out, err = repack(source, tmp_path / "p")
    assert code == 130 and out == "" and "the same command goes on" in err
    code, out, _ = repack(source, tmp_path / "p", "--dry-run")
    assert "written already      0 B" not in out
    code, _, err = repack(source, tmp_path / "p")
    assert code == 0 and "Going on:" in err
    Checkpoint.open(tmp_path / "p").close()


def test_usage_errors(source: Path, tmp_path: Path, repack: Any) -> None:
    for args, problem in (
        ([source], "DST is missing"),
        ([tmp_path / "none", tmp_path / "p"], "there is no folder"),
        (["--verify", tmp_path / "none"], "there is no folder"),
        (["--verify", "--dry-run", source], "--verify only reads"),
        ([source, tmp_path / "p", "--trunk", "int2"], "int2"),
        ([source, source], "is there already and not empty"),
    ):
        code, out, err = repack(*args)
        assert code == 2 and out == "" and problem in err and "hint:" in err, problem


def test_errors(source: Path, tmp_path: Path, repack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", int4=False)
    code, _, err = repack(dense, tmp_path / "p")
    assert code == 1 and "is BF16, not INT4" in err and "run in place" in err
    code, _, err = repack("--verify", source)
    assert code == 1 and "is no packed checkpoint" in err
    monkeypatch.setattr(run_module, "free_bytes", lambda path: 1 << 20)
    code, out, err = repack(source, tmp_path / "p")
    assert code == 1 and out == "" and "GB are free" in err and "--delete-source-shards" in err
    code, out, _ = repack(source, tmp_path / "p", "--dry-run")
    assert code == 0 and "too little" in out
