"""A checkpoint of ours as a GGUF file, for llama.cpp and its forks.

    python -m bench.to_gguf MODEL_FOLDER OUT.gguf [--trunk q8_0|bf16]

The routed experts become Q4_0, which is the published INT4 format but for the rounding of scales
from bf16 to float16; other matrices become Q8_0 or stay bf16, vectors and the router become
float32. The names and the split of kv_b are those of architecture `deepseek2`. There is no
tokenizer in it: evaluate token ids. Needs the package `gguf`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from kimi_cpu.config import ModelConfig
from kimi_cpu.quant import (
    GROUP_SIZE,
    U16,
    Int4Weight,
    PackedWeight,
    as_f32,
    dequantize,
    f32_to_bf16,
    unpack,
)
from kimi_cpu.store.checkpoint import Checkpoint

Bytes = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]
Type = gguf.GGMLQuantizationType

TRUNK_TYPES = {"q8_0": Type.Q8_0, "bf16": Type.BF16}

#: Ours -> deepseek2's, below `model.layers.N.` and `blk.N.`.
_ATTENTION = {
    "q_proj": "attn_q", "q_a_proj": "attn_q_a", "q_b_proj": "attn_q_b",
    "kv_a_proj_with_mqa": "attn_kv_a_mqa", "o_proj": "attn_output",
}  # fmt: skip
_NORMS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
}  # fmt: skip
_MLP = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


@dataclass(frozen=True)
class Tensor:
    """A tensor to write: its shape in elements, and its bytes, made when they are needed."""

    name: str
    shape: tuple[int, ...]
    type: Type
    data: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return int(np.prod(self.shape, dtype=np.int64)) // block * size


def q4_0(weight: Int4Weight) -> Bytes:
    """INT4 [out, in] -> Q4_0 [out, in / 32 * 18]: float16 scale, then elements i and i + 16."""
    out_features, in_features = weight.shape
    groups = in_features // GROUP_SIZE
    source = weight.packed.reshape(out_features, groups, 16)  # byte b: elements 2b, 2b + 1
    low, high = source[:, :, :8], source[:, :, 8:]
    blocks = np.empty((out_features, groups, 18), dtype=np.uint8)
    scale = as_f32(weight.scale).astype(np.float16)
    blocks[:, :, :2] = scale.view(np.uint8).reshape(out_features, groups, 2)
    blocks[:, :, 2::2] = (low & 15) | (high << 4)
    blocks[:, :, 3::2] = (low >> 4) | (high & 0xF0)
    return blocks.reshape(out_features, groups * 18)


def tensors(checkpoint: Checkpoint, trunk: str) -> Iterator[Tensor]:
    """All tensors of the GGUF file in the order of the layers.

    `trunk` is one of TRUNK_TYPES; a matrix whose rows are no whole groups of 32 stays bf16.
    """
    config = checkpoint.config

    def vector(name: str, ours: str) -> Tensor:
        array = as_f32(checkpoint.tensor(ours))
        return Tensor(name, array.shape, Type.F32, lambda: array)

    def matrix(name: str, shape: tuple[int, ...], load: Callable[[], Array]) -> Tensor:
        kind = TRUNK_TYPES[trunk] if shape[-1] % GROUP_SIZE == 0 else Type.BF16
        return Tensor(name, shape, kind, lambda: _encode(load(), kind))

    def linear(name: str, ours: str) -> Tensor:
        weight = checkpoint.linear(ours)
        return matrix(name, weight.shape, lambda: _bits(weight))

    embedding = checkpoint.tensor("model.embed_tokens.weight")
    yield matrix("token_embd.weight", embedding.shape, lambda: _bits(embedding))
    yield vector("output_norm.weight", "model.norm.weight")
    if not config.tie_word_embeddings:
        yield linear("output.weight", "lm_head")
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        for norm, name in _NORMS.items():
            if config.q_lora_rank is not None or "q_a" not in norm:
                yield vector(f"{theirs}.{name}.weight", f"{ours}.{norm}.weight")
        for projection, name in _ATTENTION.items():
            if (projection == "q_proj") == (config.q_lora_rank is None) or "q_" not in projection:
                yield linear(f"{theirs}.{name}.weight", f"{ours}.self_attn.{projection}")
        yield from _kv_b(checkpoint, layer, matrix)
        if config.is_dense_layer(layer):
            for projection, name in _MLP.items():
                yield linear(f"{theirs}.{name}.weight", f"{ours}.mlp.{projection}")
            continue
        yield vector(f"{theirs}.ffn_gate_inp.weight", f"{ours}.mlp.gate.weight")
        yield vector(f"{theirs}.exp_probs_b.bias", f"{ours}.mlp.gate.e_score_correction_bias")
        for which, (projection, name) in enumerate(_MLP.items()):
            if config.n_shared_experts:
                yield linear(
                    f"{theirs}.{name}_shexp.weight", f"{ours}.mlp.shared_experts.{projection}"
                )
            yield _experts(checkpoint, layer, which, f"{theirs}.{name}_exps.weight")


def _kv_b(checkpoint: Checkpoint, layer: int, matrix: Callable[..., Tensor]) -> Iterator[Tensor]:
    """kv_b [H (N + V), R] as llama.cpp absorbs it: k_b [H, R, N] and v_b [H, V, R]."""
    c = checkpoint.config
    weight = checkpoint.linear(f"model.layers.{layer}.self_attn.kv_b_proj")
    heads, n_dim, rank = c.num_attention_heads, c.qk_nope_head_dim, c.kv_lora_rank

    def split() -> U16:
        return _bits(weight).reshape(heads, n_dim + c.v_head_dim, rank)

    yield matrix(
        f"blk.{layer}.attn_k_b.weight", (heads, rank, n_dim),
        lambda: np.ascontiguousarray(split()[:, :n_dim].transpose(0, 2, 1)),
    )  # fmt: skip
    yield matrix(
        f"blk.{layer}.attn_v_b.weight", (heads, c.v_head_dim, rank),
        lambda: np.ascontiguousarray(split()[:, n_dim:]),
    )  # fmt: skip


def _experts(checkpoint: Checkpoint, layer: int, which: int, name: str) -> Tensor:
    """One projection of all experts of a layer, [E, out, in]."""
    count = checkpoint.config.n_routed_experts
    first = checkpoint.expert(layer, 0)[which]
    kind = Type.Q4_0 if isinstance(_natural(first), Int4Weight) else Type.BF16

    def stack() -> Array:
        out = None
        for e in range(count):
            weight = _natural(checkpoint.expert(layer, e)[which])
            encoded = q4_0(weight) if isinstance(weight, Int4Weight) else _bits(weight)
            if out is None:
                out = np.empty((count, *encoded.shape), dtype=encoded.dtype)
            out[e] = encoded
        assert out is not None
        return out

    return Tensor(name, (count, *first.shape), kind, stack)


def _natural(weight: Any) -> Any:
    """A packed weight in natural order, others as they are."""
    return unpack(weight) if isinstance(weight, PackedWeight) else weight


def _bits(weight: Any) -> U16:
    """Any weight as bf16 bits."""
    if isinstance(weight, np.ndarray) and weight.dtype == np.uint16:
        return weight
    return f32_to_bf16(dequantize(weight))


def _encode(bits: U16, kind: Type) -> Array:
    if kind == Type.BF16:
        return bits
    rows = bits.reshape(-1, bits.shape[-1])
    parts = [  # in pieces, because float32 takes four times the room
        gguf.quants.quantize(as_f32(rows[i : i + 1024]), kind) for i in range(0, len(rows), 1024)
    ]
    return np.concatenate(parts)


def add_metadata(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """The keys that `deepseek2` reads; MLA is described as attention with one key head."""
    c = config
    writer.add_name("kimi-cpu benchmark")
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_leading_dense_block_count(
        sum(c.is_dense_layer(i) for i in range(c.num_hidden_layers))
    )
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    if c.q_lora_rank is not None:
        writer.add_q_lora_rank(c.q_lora_rank)
    writer.add_kv_lora_rank(c.kv_lora_rank)
    writer.add_key_length(c.kv_lora_rank + c.qk_rope_head_dim)
    writer.add_value_length(c.kv_lora_rank)
    writer.add_key_length_mla(c.qk_nope_head_dim + c.qk_rope_head_dim)
    writer.add_value_length_mla(c.v_head_dim)
    writer.add_expert_count(c.n_routed_experts)
    writer.add_expert_used_count(c.num_experts_per_tok)
    writer.add_expert_shared_count(c.n_shared_experts)
    writer.add_expert_feed_forward_length(c.moe_intermediate_size)
    writer.add_expert_weights_scale(c.routed_scaling_factor)
    writer.add_expert_weights_norm(c.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if c.n_group > 1:
        writer.add_expert_group_count(c.n_group)
        writer.add_expert_group_used_count(c.topk_group)
    writer.add_rope_dimension_count(c.qk_rope_head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    if (yarn := c.rope_scaling) is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(yarn.factor)
        writer.add_rope_scaling_orig_ctx_len(yarn.original_max_position_embeddings)
        writer.add_rope_scaling_yarn_beta_fast(yarn.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(yarn.beta_slow)
        writer.add_rope_scaling_yarn_log_mul(0.1 * yarn.mscale_all_dim)


def write(folder: Path, path: Path, trunk: str) -> int:
    """Write the checkpoint in `folder` to `path`; returns the file's size in bytes.

    `trunk` is one of TRUNK_TYPES. One tensor at a time is in memory (3.2 GB with 384 experts).
    Raises ConfigError or CheckpointError.
    """
    checkpoint = Checkpoint.open(folder)
    writer = gguf.GGUFWriter(path, "deepseek2")
    add_metadata(writer, checkpoint.config)
    plan = list(tensors(checkpoint, trunk))
    for tensor in plan:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    total = sum(tensor.nbytes for tensor in plan)
    with tqdm(total=total, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
        for tensor in plan:
            writer.write_tensor_data(tensor.data())
            bar.update(tensor.nbytes)
    writer.close()
    return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="checkpoint, published or packed")
    parser.add_argument("out", type=Path, help="GGUF file to write")
    parser.add_argument("--trunk", choices=list(TRUNK_TYPES), default="q8_0")
    options = parser.parse_args()
    n_bytes = write(options.folder, options.out, options.trunk)
    print(f"{options.out}: {n_bytes / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
