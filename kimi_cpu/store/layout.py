"""Which tensors a model of a given config has, under their published names."""

from __future__ import annotations

from collections.abc import Iterator

from kimi_cpu.config import ModelConfig

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def vectors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of everything that is no linear layer: embedding, norms, router."""
    yield "model.embed_tokens.weight", (config.vocab_size, config.hidden_size)
    for layer in range(config.num_hidden_layers):
        base = f"model.layers.{layer}"
        yield f"{base}.input_layernorm.weight", (config.hidden_size,)
        if config.q_lora_rank is not None:
            yield f"{base}.self_attn.q_a_layernorm.weight", (config.q_lora_rank,)
        yield f"{base}.self_attn.kv_a_layernorm.weight", (config.kv_lora_rank,)
        yield f"{base}.post_attention_layernorm.weight", (config.hidden_size,)
        if not config.is_dense_layer(layer):
            yield f"{base}.mlp.gate.weight", (config.n_routed_experts, config.hidden_size)
            yield f"{base}.mlp.gate.e_score_correction_bias", (config.n_routed_experts,)
    yield "model.norm.weight", (config.hidden_size,)


def trunk_linears(config: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """(name, out_features, in_features) of the linear layers that every token passes.

    A tied `lm_head` is not listed: it is the embedding.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    q_out = heads * config.qk_head_dim
    for layer in range(config.num_hidden_layers):
        attention = f"model.layers.{layer}.self_attn"
        if config.q_lora_rank is None:
            yield f"{attention}.q_proj", q_out, hidden
        else:
            yield f"{attention}.q_a_proj", config.q_lora_rank, hidden
            yield f"{attention}.q_b_proj", q_out, config.q_lora_rank
        kv_a_out = config.kv_lora_rank + config.qk_rope_head_dim
        yield f"{attention}.kv_a_proj_with_mqa", kv_a_out, hidden
        kv_b_out = heads * (config.qk_nope_head_dim + config.v_head_dim)
        yield f"{attention}.kv_b_proj", kv_b_out, config.kv_lora_rank
        yield f"{attention}.o_proj", hidden, heads * config.v_head_dim
        mlp = f"model.layers.{layer}.mlp"
        if config.is_dense_layer(layer):
            yield from _mlp(mlp, hidden, config.intermediate_size)
        elif config.n_shared_experts:
            inner = config.moe_intermediate_size * config.n_shared_experts
            yield from _mlp(f"{mlp}.shared_experts", hidden, inner)
    if not config.tie_word_embeddings:
        yield "lm_head", config.vocab_size, hidden


def expert_linears(config: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """(name, out_features, in_features) of the routed experts' projections, layer by layer."""
    for layer in range(config.num_hidden_layers):
        if config.is_dense_layer(layer):
            continue
        for expert in range(config.n_routed_experts):
            base = f"model.layers.{layer}.mlp.experts.{expert}"
            yield from _mlp(base, config.hidden_size, config.moe_intermediate_size)


def _mlp(base: str, hidden: int, inner: int) -> Iterator[tuple[str, int, int]]:
    yield f"{base}.gate_proj", inner, hidden
    yield f"{base}.up_proj", inner, hidden
    yield f"{base}.down_proj", hidden, inner
