from __future__ import annotations

from pathlib import Path

import pytest

from kimi_cpu.config import ModelConfig
from tests.prefixes.fake import FakeEngine
from tests.tiny import tiny_checkpoint

CONTEXT = 8192


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_checkpoint(
        folder, 3, max_position_embeddings=CONTEXT, num_hidden_layers=2, kv_lora_rank=4,
        qk_rope_head_dim=2,
    )  # fmt: skip
    return folder


@pytest.fixture
def engine(folder: Path) -> FakeEngine:
    return FakeEngine(folder, ModelConfig.load(folder))
