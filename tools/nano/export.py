"""Write a trained model in the published file format: shards, index, config, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .bpe import Codec, write_tokenizer_config
from .torch_model import Layer, Nano, NanoConfig, int4_quantize

MAX_POSITIONS = 4096
SHARDS = 2


def config_dict(c: NanoConfig, n_ranks: int, quantized: bool) -> dict[str, Any]:
    """``config.json`` with the keys of the published one that change the computation."""
    config: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2",
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": n_ranks,
        "dtype": "bfloat16", "eos_token_id": n_ranks + 2, "ep_size": 1,
        "first_k_dense_replace": c.first_k_dense_replace, "hidden_act": "silu",
        "hidden_size": c.hidden_size, "initializer_range": 0.02,
        "intermediate_size": c.intermediate_size, "kv_lora_rank": c.kv_lora_rank,
        "max_position_embeddings": MAX_POSITIONS,
        "moe_intermediate_size": c.moe_intermediate_size, "moe_layer_freq": 1, "n_group": 1,
        "n_routed_experts": c.n_routed_experts,
        "n_shared_experts": c.shared_intermediate_size // c.moe_intermediate_size,
        "norm_topk_prob": True, "num_attention_heads": c.num_attention_heads,
        "num_experts_per_tok": c.num_experts_per_tok, "num_hidden_layers": c.num_hidden_layers,
        "num_key_value_heads": c.num_attention_heads, "num_nextn_predict_layers": 0,
        "pad_token_id": n_ranks + 255, "pretraining_tp": 1, "q_lora_rank": c.q_lora_rank,
        "qk_nope_head_dim": c.qk_nope_head_dim, "qk_rope_head_dim": c.qk_rope_head_dim,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_scaling": {
            "beta_fast": 1.0, "beta_slow": 1.0, "factor": c.rope_factor, "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": c.original_max_position_embeddings,
            "type": "yarn",
        },
        "rope_theta": c.rope_theta, "routed_scaling_factor": c.routed_scaling_factor,
        "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 1,
        "topk_method": "noaux_tc", "use_cache": True, "v_head_dim": c.v_head_dim,
        "vocab_size": c.vocab_size,
    }  # fmt: skip
    if quantized:
        weights = {
            "actorder": None, "block_structure": None, "dynamic": False, "group_size": 32,
            "num_bits": 4, "observer": "minmax", "observer_kwargs": {}, "strategy": "group",
            "symmetric": True, "type": "int",
        }  # fmt: skip
        config["quantization_config"] = {
            "config_groups": {
                "group_0": {
                    "input_activations": None, "output_activations": None,
                    "targets": ["Linear"], "weights": weights,
                }
            },
            "format": "pack-quantized",
            "ignore": [
                "lm_head", "re:.*self_attn.*", "re:.*shared_experts.*",
                "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
            ],
            "kv_cache_scheme": None, "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        }  # fmt: skip
    return config


def _bf16(w: Tensor) -> Tensor:
    return w.detach().to(torch.bfloat16).contiguous()


def _linear(name: str, w: Tensor) -> dict[str, Tensor]:
    """An [in, out] matrix under its published name, [out, in]."""
    return {f"{name}.weight": _bf16(w.t())}


def pack_int4(w: Tensor) -> tuple[Tensor, Tensor]:
    """Packed int32 [E, out, in / 8] and bfloat16 scales [E, out, in / 32] of ``w`` [E, in, out]."""
    q, scale = int4_quantize(w)
    nibbles = (q.transpose(1, 2) + 8).to(torch.int64).unflatten(2, (-1, 8))
    packed = (nibbles << (4 * torch.arange(8))).sum(-1)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    return packed.contiguous(), _bf16(scale.transpose(1, 2))


def _experts(prefix: str, projection: str, w: Tensor, quantized: bool) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    if not quantized:
        for e in range(w.shape[0]):
            out |= _linear(f"{prefix}.{e}.{projection}", w[e])
        return out
    packed, scale = pack_int4(w.detach())
    shape = torch.tensor([w.shape[2], w.shape[1]], dtype=torch.int32)
    for e in range(w.shape[0]):
        name = f"{prefix}.{e}.{projection}"
        out[f"{name}.weight_packed"] = packed[e].contiguous()
        out[f"{name}.weight_scale"] = scale[e].contiguous()
        out[f"{name}.weight_shape"] = shape.clone()
    return out


def _layer(layer: Layer, index: int, quantized: bool) -> dict[str, Tensor]:
    p = f"model.layers.{index}"
    out = {
        f"{p}.input_layernorm.weight": _bf16(layer.input_norm),
        f"{p}.post_attention_layernorm.weight": _bf16(layer.post_norm),
        f"{p}.self_attn.q_a_layernorm.weight": _bf16(layer.q_norm),
        f"{p}.self_attn.kv_a_layernorm.weight": _bf16(layer.kv_norm),
    }
    for name, w in (
        ("q_a_proj", layer.q_a), ("q_b_proj", layer.q_b), ("kv_a_proj_with_mqa", layer.kv_a),
        ("kv_b_proj", layer.kv_b), ("o_proj", layer.o),
    ):  # fmt: skip
        out |= _linear(f"{p}.self_attn.{name}", w)
    plain = f"{p}.mlp" if layer.dense else f"{p}.mlp.shared_experts"
    gate, up = layer.gate_up.chunk(2, 1)
    for name, w in (("gate_proj", gate), ("up_proj", up), ("down_proj", layer.down)):
        out |= _linear(f"{plain}.{name}", w)
    if not layer.dense:
        out |= _linear(f"{p}.mlp.gate", layer.router)
        out[f"{p}.mlp.gate.e_score_correction_bias"] = layer.bias.float().clone()
        gate, up = layer.experts_gate_up.chunk(2, 2)
        for name, w in (("gate_proj", gate), ("up_proj", up), ("down_proj", layer.experts_down)):
            out |= _experts(f"{p}.mlp.experts", name, w, quantized)
    return out


def _shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors in ``SHARDS`` parts of about one size."""
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
    seen = 0
    for name, tensor in tensors.items():
        shards[min(SHARDS - 1, seen * SHARDS // total)][name] = tensor
        seen += tensor.numel() * tensor.element_size()
    return shards


def export(model: Nano, codec: Codec, ranks: Path, folder: Path, quantized: bool) -> int:
    """Write everything but template and README to ``folder``; returns the bytes of all shards."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"model.embed_tokens.weight": _bf16(model.embed)}
    for index, layer in enumerate(model.layers):
        tensors |= _layer(layer, index, quantized)
    tensors["model.norm.weight"] = _bf16(model.norm)
    tensors |= _linear("lm_head", model.head)
    weight_map, size, file_bytes = {}, 0, 0
    for number, shard in enumerate(_shards(tensors), 1):
        name = f"model-{number:05d}-of-{SHARDS:06d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)
        file_bytes += (folder / name).stat().st_size
        weight_map |= dict.fromkeys(shard, name)
        size += sum(t.numel() * t.element_size() for t in shard.values())
    index_json = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    config = config_dict(model.c, codec.n_ranks, quantized)
    # Greedy unless asked otherwise: so small a model has no margin for sampling.
    generation = {
        "do_sample": False, "eos_token_id": codec.n_ranks + 2, "max_length": MAX_POSITIONS,
    }  # fmt: skip
    for name, value in (
        ("model.safetensors.index.json", index_json), ("config.json", config),
        ("generation_config.json", generation),
    ):  # fmt: skip
        (folder / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    (folder / "tiktoken.model").write_bytes(ranks.read_bytes())
    write_tokenizer_config(folder / "tokenizer_config.json", codec.n_ranks, MAX_POSITIONS)
    return file_bytes


@torch.no_grad()
def as_exported(model: Nano, quantized: bool) -> None:
    """Round the parameters in place to what ``export`` writes."""
    for name, p in model.named_parameters():
        if quantized and "experts_" in name:
            q, scale = int4_quantize(p)
            p.copy_(q * scale.repeat_interleave(32, dim=1))
        else:
            p.copy_(p.bfloat16().float())
