"""The tiny model that the tests of this folder read experts of."""

from __future__ import annotations

from pathlib import Path

import pytest

from kimi_cpu.store.checkpoint import Checkpoint
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), 3)


@pytest.fixture
def checkpoint(folder: Path):
    checkpoint = Checkpoint.open(folder)
    yield checkpoint
    checkpoint.close()
