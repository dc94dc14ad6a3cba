"""The published layout at full size, 594 GB of holes: opening it must take no time."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kimi_cpu.config import ModelConfig
from kimi_cpu.store.checkpoint import INDEX_NAME, Checkpoint
from kimi_cpu.store.layout import expert_linears, trunk_linears, vectors
from tests.tiny import tiny_config

K2_THINKING: dict[str, Any] = {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 64,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 384,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "intermediate_size": 18432,
    "vocab_size": 163840,
}
N_SHARDS = 62
ITEM_BYTES = {"BF16": 2, "F32": 4, "I32": 4}


def published_tensors(config: ModelConfig) -> Iterator[tuple[str, str, list[int]]]:
    for name, shape in vectors(config):
        yield name, "F32" if name.endswith("bias") else "BF16", list(shape)
    for name, out_features, in_features in trunk_linears(config):
        yield f"{name}.weight", "BF16", [out_features, in_features]
    for name, out_features, in_features in expert_linears(config):
        yield f"{name}.weight_packed", "I32", [out_features, in_features // 8]
        yield f"{name}.weight_scale", "BF16", [out_features, in_features // 32]
        yield f"{name}.weight_shape", "I32", [2]


def write_sparse(folder: Path, values: dict[str, Any]) -> int:
    """Headers and holes instead of data; returns the number of tensors."""
    tensors = list(published_tensors(ModelConfig.from_dict(values)))
    per_shard = math.ceil(len(tensors) / N_SHARDS)
    weight_map = {}
    for i in range(N_SHARDS):
        shard = f"model-{i + 1:05d}-of-{N_SHARDS:06d}.safetensors"
        header, position = {}, 0
        for name, dtype, shape in tensors[i * per_shard : (i + 1) * per_shard]:
            end = position + math.prod(shape) * ITEM_BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
            weight_map[name], position = shard, end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        with (folder / shard).open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            file.truncate(8 + len(encoded) + position)
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    (folder / "config.json").write_text(json.dumps(values), "utf-8")
    return len(tensors)


@pytest.mark.slow
def test_opening_takes_no_time(tmp_path: Path) -> None:
    n_tensors = write_sparse(tmp_path, tiny_config(**K2_THINKING))
    started = time.process_time()
    checkpoint = Checkpoint.open(tmp_path)
    took_s = time.process_time() - started
    assert n_tensors > 200_000 and round(checkpoint.total_bytes / 1e9) == 594
    assert took_s < 5.0, f"{took_s:.2f} s"  # 1.2 s where this was written
    checkpoint.close()
