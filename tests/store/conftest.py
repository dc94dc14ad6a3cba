"""A checkpoint to repack, and what becomes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kimi_cpu.store.repack import plan_repack, repack
from tests.store.repacking import OPTIONS, contents
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("source"), seed=1)
    (folder / "tokenizer_config.json").write_text("{}", "utf-8")
    (folder / "chat_template.jinja").write_text("hello", "utf-8")
    (folder / "LICENSE").write_text("free", "utf-8")
    (folder / ".hidden.json").write_text("{}", "utf-8")
    (folder / "pytorch_model.bin").write_bytes(b"\0" * 100)
    return folder


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What repacking gives when nothing goes wrong."""
    target = tmp_path_factory.mktemp("expected") / "packed"
    repack(plan_repack(source, target, OPTIONS), threads=1)
    return contents(target)
