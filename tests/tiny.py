"""Tiny random checkpoints in the published format, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kimi_cpu.config import ModelConfig
from kimi_cpu.quant import f32_to_bf16, quantize_int4
from kimi_cpu.store.layout import expert_linears, trunk_linears, vectors
from kimi_cpu.store.writer import QUANTIZATION, NamedTensor, int4_tensors, write_checkpoint


def tiny_config(int4: bool = True, **overrides: Any) -> dict[str, Any]:
    """A complete config.json as published, scaled down; `overrides` replace keys."""
    config: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "aux_loss_alpha": 0.001,
        "bos_token_id": 1,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "ep_size": 1,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "kv_lora_rank": 32,
        "max_position_embeddings": 4096,
        "model_type": "kimi_k2",
        "moe_intermediate_size": 32,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 3,
        "num_nextn_predict_layers": 0,
        "pretraining_tp": 1,
        "q_lora_rank": 48,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 1.0,
            "beta_slow": 1.0,
            "factor": 64.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 64,
            "type": "yarn",
        },
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "transformers_version": "4.56.2",
        "use_cache": True,
        "v_head_dim": 16,
        "vocab_size": 256,
    }
    if int4:
        config["quantization_config"] = QUANTIZATION
    config |= overrides
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    return config


def tiny_tensors(
    config: ModelConfig, seed: int, int4: bool = True, rest: str = "bf16"
) -> Iterator[NamedTensor]:
    """Random tensors for `config`: weights of variance 1 / in_features, norms around 1.

    Routed experts are INT4 or, without `int4`, of the dtype `rest` ("bf16" or "f32").
    """
    rng = np.random.default_rng(seed)
    prefix = config.tensor_prefix

    def dense(name: str, values: np.ndarray) -> NamedTensor:
        x = values.astype(np.float32)
        # the published files keep the router's bias in float32
        if rest == "f32" or name.endswith("e_score_correction_bias"):
            return prefix + name, x, "F32"
        return prefix + name, f32_to_bf16(x), "BF16"

    for name, shape in vectors(config):
        noise = rng.standard_normal(shape)
        if name.endswith("norm.weight"):
            yield dense(name, 1.0 + 0.1 * noise)
        elif name.endswith("e_score_correction_bias"):
            yield dense(name, 0.1 * noise)
        elif name.endswith("mlp.gate.weight"):
            yield dense(name, noise / np.sqrt(shape[1]))
        else:
            yield dense(name, noise)
    for name, out_features, in_features in trunk_linears(config):
        w = rng.standard_normal((out_features, in_features)) / np.sqrt(in_features)
        yield dense(f"{name}.weight", w)
    for name, out_features, in_features in expert_linears(config):
        w = rng.standard_normal((out_features, in_features)) / np.sqrt(in_features)
        if int4:
            yield from int4_tensors(prefix + name, quantize_int4(w.astype(np.float32)))
        else:
            yield dense(f"{name}.weight", w)


def tiny_checkpoint(
    folder: str | Path,
    seed: int = 0,
    int4: bool = True,
    rest: str = "bf16",
    shard_bytes: int = 60_000,
    **overrides: Any,
) -> Path:
    """Write a random tiny model in the published format (several shards); returns the folder.

    Args:
        int4: routed experts as INT4 groups of 32 (hidden_size and moe_intermediate_size must
            be multiples of 32), else as `rest`.
        rest: "bf16" or "f32", the dtype of everything else.
        overrides: keys of config.json to replace.
    """
    values = tiny_config(int4, **overrides)
    config = ModelConfig.from_dict(values)
    return write_checkpoint(folder, values, tiny_tensors(config, seed, int4, rest), shard_bytes)
