"""The figures of `kimi-cpu inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kimi_cpu.config import ModelConfig
from kimi_cpu.store.checkpoint import Checkpoint
from kimi_cpu.store.summary import summarise
from tests.tiny import tiny_checkpoint, tiny_config

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.parametrize("int4", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_config_alone_gives_the_sizes_of_its_checkpoint(
    tmp_path: Path, int4: bool, tied: bool
) -> None:
    folder = tiny_checkpoint(tmp_path, int4=int4, tie_word_embeddings=tied)
    stored = summarise(Checkpoint.open(folder)).as_dict()
    announced = summarise(ModelConfig.load(folder)).as_dict()
    assert stored.pop("n_files") == len(list(folder.glob("*.safetensors")))
    assert announced.pop("n_files") == 0
    assert stored.pop("disk_bytes") > announced.pop("disk_bytes") == announced["total_bytes"]
    assert stored == announced
    json.dumps(stored)


def test_figures_of_a_tiny_model(tmp_path: Path) -> None:
    figures = summarise(Checkpoint.open(tiny_checkpoint(tmp_path)))
    assert (figures.n_layers, figures.n_dense_layers) == (3, 1)
    one_expert = 3 * 64 * 32 // 2 + 3 * 64 * 32 // 32 * 2 + 3 * 8
    assert figures.one_expert_bytes == one_expert
    assert figures.expert_bytes == 2 * 16 * one_expert
    assert figures.token_expert_bytes == 2 * 4 * one_expert
    assert figures.trunk_parts["lm_head"] == figures.trunk_parts["embedding"] == 256 * 64 * 2
    assert figures.token_trunk_bytes == figures.trunk_bytes - 255 * 64 * 2
    assert figures.kv_token_bytes == (32 + 8) * 3 * 4
    assert sum(figures.trunk_parts.values()) == figures.trunk_bytes
    assert sum(figures.dtype_bytes.values()) == figures.total_bytes


def test_a_model_without_experts_in_its_layers() -> None:
    figures = summarise(ModelConfig.from_dict(tiny_config(first_k_dense_replace=3)))
    assert figures.expert_bytes == figures.one_expert_bytes == figures.token_expert_bytes == 0


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
def test_kimi_k2_thinking_before_downloading_it() -> None:
    values = json.loads((SHARED / "kimi-k2-thinking-config.json").read_text("utf-8"))
    figures = summarise(ModelConfig.from_dict(values))
    assert round(figures.total_bytes / 1e9) == 594
    assert round(figures.expert_bytes / 1e9) == 571
    assert round(figures.one_expert_bytes / 1e6, 2) == 24.77
    assert round(figures.token_expert_bytes / 1e9, 2) == 11.89
    assert round(figures.token_trunk_bytes / 1e9, 1) == 21.1
    assert figures.kv_token_bytes == 2 * 70_272
    assert round(figures.kv_full_context_bytes / 1e9, 1) == 36.8
    assert round(figures.n_parameters / 1e12, 2) == 1.03
    assert round(figures.n_active_parameters / 1e9) == 32
    assert round(figures.ram_minimum_bytes / 1e9, 1) == 21.9
