"""What a checkpoint is and what it takes to run it, in numbers: the content of `inspect`.

Works for an open checkpoint (sizes as stored) and for a config alone (sizes as published: bf16,
and INT4 experts if the config says so), so that one can ask before downloading 594 GB.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from kimi_cpu.config import ModelConfig
from kimi_cpu.quant import GROUP_SIZE
from kimi_cpu.store.checkpoint import Checkpoint
from kimi_cpu.store.layout import PROJECTIONS, expert_linears, trunk_linears, vectors

#: Context that the RAM figures include, in tokens (less if the model's own is shorter).
SUMMARY_CONTEXT = 4096

_PARTS = (
    "embedding",
    "attention",
    "shared_experts",
    "dense_mlp",
    "routers",
    "norms",
    "lm_head",
    "experts",
)


@dataclass(frozen=True)
class Summary:
    """Figures of one checkpoint; all sizes in bytes.

    Attributes:
        model_type: as in config.json.
        n_files: weight files (0 for a config alone).
        n_tensors: tensors of the language model.
        n_layers, n_dense_layers: all layers, and those without experts.
        n_parameters: weights and biases.
        n_active_parameters: those that one token is multiplied with.
        dtype_bytes: bytes by stored dtype (I32 are packed INT4 weights and their shapes).
        total_bytes: expert_bytes + trunk_bytes.
        expert_bytes: the routed experts, of which a token touches few.
        one_expert_bytes: one of them.
        trunk_bytes: everything else.
        trunk_parts: trunk_bytes by part: embedding, attention, shared_experts, dense_mlp,
            routers, norms, lm_head.
        token_expert_bytes: read per decoded token from the routed experts, the disk's share.
        token_trunk_bytes: read per decoded token from the trunk (one row of the embedding).
        kv_token_bytes: latent cache per token of context, float32.
        kv_full_context_bytes: the same for max_position_embeddings tokens.
        max_context: max_position_embeddings.
        disk_bytes: the weight files as a whole (K2.5's vision tower and headers included).
        ram_minimum_bytes: what every token reads of the trunk, one layer's chosen experts and
            `SUMMARY_CONTEXT` tokens of cache. With less, the disk is read for the trunk as well.
        ram_all_bytes: with this much, nothing is read from the disk twice.
    """

    model_type: str
    n_files: int
    n_tensors: int
    n_layers: int
    n_dense_layers: int
    n_parameters: int
    n_active_parameters: int
    dtype_bytes: dict[str, int]
    total_bytes: int
    expert_bytes: int
    one_expert_bytes: int
    trunk_bytes: int
    trunk_parts: dict[str, int]
    token_expert_bytes: int
    token_trunk_bytes: int
    kv_token_bytes: int
    kv_full_context_bytes: int
    max_context: int
    disk_bytes: int
    ram_minimum_bytes: int
    ram_all_bytes: int
    config: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, `config` being the ModelConfig's fields."""
        return asdict(self)


def summarise(source: Checkpoint | ModelConfig) -> Summary:
    """The figures of an open checkpoint, or of the one that a config describes."""
    config = source.config if isinstance(source, Checkpoint) else source
    layers = range(config.num_hidden_layers)
    n_dense = sum(config.is_dense_layer(layer) for layer in layers)
    n_moe = len(layers) - n_dense

    parts = dict.fromkeys(_PARTS, 0)
    dtype_bytes: dict[str, int] = {}
    n_tensors = 0
    stored = _stored(source) if isinstance(source, Checkpoint) else _published(config, n_moe)
    for name, dtype, n_bytes, count in stored:
        parts[_part_of(name)] += n_bytes * count
        dtype_bytes[dtype] = dtype_bytes.get(dtype, 0) + n_bytes * count
        n_tensors += count
    expert_bytes = parts.pop("experts")
    trunk_bytes = sum(parts.values())
    total_bytes = expert_bytes + trunk_bytes
    embedding_bytes = parts["embedding"]

    one_expert_bytes = expert_bytes // (n_moe * config.n_routed_experts) if n_moe else 0
    per_layer_bytes = one_expert_bytes * config.num_experts_per_tok
    token_trunk_bytes = trunk_bytes
    if not config.tie_word_embeddings:
        token_trunk_bytes += embedding_bytes // config.vocab_size - embedding_bytes
    kv_token_bytes = (config.kv_lora_rank + config.qk_rope_head_dim) * len(layers) * 4  # float32
    context_bytes = kv_token_bytes * min(SUMMARY_CONTEXT, config.max_position_embeddings)
    n_parameters, n_active = _count_parameters(config, n_moe)
    return Summary(
        model_type=config.model_type,
        n_files=source.n_files if isinstance(source, Checkpoint) else 0,
        n_tensors=n_tensors,
        n_layers=len(layers),
        n_dense_layers=n_dense,
        n_parameters=n_parameters,
        n_active_parameters=n_active,
        dtype_bytes=dtype_bytes,
        total_bytes=total_bytes,
        expert_bytes=expert_bytes,
        one_expert_bytes=one_expert_bytes,
        trunk_bytes=trunk_bytes,
        trunk_parts=parts,
        token_expert_bytes=per_layer_bytes * n_moe,
        token_trunk_bytes=token_trunk_bytes,
        kv_token_bytes=kv_token_bytes,
        kv_full_context_bytes=kv_token_bytes * config.max_position_embeddings,
        max_context=config.max_position_embeddings,
        disk_bytes=source.file_bytes if isinstance(source, Checkpoint) else total_bytes,
        ram_minimum_bytes=token_trunk_bytes + per_layer_bytes + context_bytes,
        ram_all_bytes=total_bytes + context_bytes,
        config=asdict(config),
    )


def _stored(checkpoint: Checkpoint) -> Iterator[tuple[str, str, int, int]]:
    """(name, dtype, bytes, 1) of every tensor as it lies on the disk."""
    for name in checkpoint.names():
        entry = checkpoint.entry(name)
        yield name, entry.dtype, entry.nbytes, 1


def _published(config: ModelConfig, n_moe: int) -> Iterator[tuple[str, str, int, int]]:
    """(name, dtype, bytes, how many alike) of the tensors of a published checkpoint."""
    for name, shape in vectors(config):
        if name.endswith("e_score_correction_bias"):
            yield name, "F32", 4 * math.prod(shape), 1
        else:
            yield name, "BF16", 2 * math.prod(shape), 1
    for name, out_features, in_features in trunk_linears(config):
        yield f"{name}.weight", "BF16", 2 * out_features * in_features, 1
    count = n_moe * config.n_routed_experts
    for name, out_features, in_features in islice(expert_linears(config), len(PROJECTIONS)):
        n = out_features * in_features
        if config.quantized:
            yield f"{name}.weight_packed", "I32", n // 2, count
            yield f"{name}.weight_scale", "BF16", 2 * (n // GROUP_SIZE), count
            yield f"{name}.weight_shape", "I32", 8, count
        else:
            yield f"{name}.weight", "BF16", 2 * n, count


def _part_of(name: str) -> str:
    if ".mlp.experts." in name:
        return "experts"
    if name.startswith("model.embed_tokens."):
        return "embedding"
    if name.startswith("lm_head."):
        return "lm_head"
    if ".self_attn." in name:
        return "attention"
    if ".mlp.shared_experts." in name:
        return "shared_experts"
    if ".mlp.gate." in name:
        return "routers"
    if ".mlp." in name:
        return "dense_mlp"
    return "norms"


def _count_parameters(config: ModelConfig, n_moe: int) -> tuple[int, int]:
    """(all, active per token). Active counts the head but of the embedding only one row."""
    trunk = sum(math.prod(shape) for _, shape in vectors(config))
    trunk += sum(n * m for _, n, m in trunk_linears(config))
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    total = trunk + n_moe * config.n_routed_experts * expert
    active = trunk + n_moe * config.num_experts_per_tok * expert
    if not config.tie_word_embeddings:
        active -= (config.vocab_size - 1) * config.hidden_size
    return total, active
