"""The command line on the scripted model, in this process and in others."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kimi_cpu.cli import common
from kimi_cpu.cli.main import main
from tests.cli import fake

ROOT = Path(__file__).resolve().parents[2]
FAKE = [sys.executable, "-m", "tests.cli.fake"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return fake.write_folder(tmp_path_factory.mktemp("models") / "fake")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """A data folder of this test, and an environment without the user's settings."""
    for name in ("KIMI_CPU_MODEL", "KIMI_CPU_DEBUG", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    monkeypatch.setenv("KIMI_CPU_HOME", str(home))
    monkeypatch.setenv("TERM", "xterm-256color")
    return home


@pytest.fixture
def kimi(folder, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """kimi(*args) runs the command line here on the scripted model: (exit code, out, err)."""
    monkeypatch.setattr(common, "load_model", fake.load_model)
    monkeypatch.setenv("KIMI_CPU_MODEL", str(folder))

    def run(*args: str) -> tuple[int, str, str]:
        code = main(list(args))
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def process(folder) -> Callable[..., subprocess.CompletedProcess[str]]:
    """process(*args, input=..., env=...) runs it in a process of its own."""

    def run(*args: str, input: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*FAKE, *args],
            input=input,
            text=True,
            capture_output=True,
            cwd=ROOT,
            env=os.environ | {"KIMI_CPU_MODEL": str(folder), "PYTHONIOENCODING": "utf-8"} | env,
            timeout=60,
        )

    return run
