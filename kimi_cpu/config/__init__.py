"""`config.json` of a Kimi K2 checkpoint, read strictly.

Every key that changes the computation is read, or refused by name with the reason; keys known
to be harmless are ignored; a key nobody knows is refused unless its value says "off" (null,
false, 0, empty). A wrong guess here would give fluent nonsense later, so nothing is guessed.

Field names are Hugging Face's. K2.5 and later wrap the text model's keys in `text_config` and
prefix its tensors with `language_model.`; both are understood.

One constant is not in the file: the published code normalises `q_a_layernorm` and
`kv_a_layernorm` with eps 1e-6 whatever `rms_norm_eps` says. See `LATENT_NORM_EPS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kimi_cpu.config.reader import Reader, load_json_object, short
from kimi_cpu.errors import ConfigError

#: eps of `q_a_layernorm` and `kv_a_layernorm` in the published code, whatever the config says.
LATENT_NORM_EPS = 1e-6

_TEXT_MODEL_TYPES = ("kimi_k2", "deepseek_v3")
_WRAPPER_MODEL_TYPES = ("kimi_k25",)
_ARCHITECTURES = (
    "DeepseekV3ForCausalLM",
    "KimiK2ForCausalLM",
    "KimiK25ForConditionalGeneration",
)

_OTHER_ARCHITECTURES = {
    "kimi_k3": "Kimi K3 is another architecture",
    "kimi_linear": "Kimi Linear is another architecture (linear attention)",
    "kimi_vl": "Kimi-VL is another architecture",
    "deepseek_v2": "DeepSeek V2 routes with softmax, this engine with sigmoid",
    "deepseek_v32": "DeepSeek V3.2 uses sparse attention",
    "deepseek_v4": "DeepSeek V4 is another architecture",
}


@dataclass(frozen=True)
class YarnScaling:
    """YaRN: how rotary frequencies are stretched beyond the trained context."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True)
class ModelConfig:
    """The numbers that define the computation. Fields are named as in Hugging Face's file."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    moe_intermediate_size: int
    intermediate_size: int
    first_k_dense_replace: int
    moe_layer_freq: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    scoring_func: str
    topk_method: str
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: YarnScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    num_nextn_predict_layers: int
    model_type: str
    tensor_prefix: str
    quantized: bool

    @property
    def qk_head_dim(self) -> int:
        """Numbers a head's query and key have: qk_nope_head_dim + qk_rope_head_dim."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Factor on attention scores: qk_head_dim^-0.5, times YaRN's mscale squared."""
        scale = float(self.qk_head_dim**-0.5)
        if self.rope_scaling is not None and self.rope_scaling.mscale_all_dim:
            scale *= _mscale(self.rope_scaling.factor, self.rope_scaling.mscale_all_dim) ** 2
        return scale

    @property
    def rope_attention_scale(self) -> float:
        """Factor on cos and sin (1.0 without YaRN, and in every published K2 model)."""
        yarn = self.rope_scaling
        if yarn is None:
            return 1.0
        return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)

    def is_dense_layer(self, layer: int) -> bool:
        """True if layer `layer` (from 0) has one dense MLP instead of experts."""
        return layer < self.first_k_dense_replace or layer % self.moe_layer_freq != 0

    @property
    def moe_layers(self) -> list[int]:
        """The layers that have routed experts, in order."""
        return [i for i in range(self.num_hidden_layers) if not self.is_dense_layer(i)]

    def inv_freq(self) -> npt.NDArray[np.float64]:
        """Rotary frequencies in radians per position, float64 [qk_rope_head_dim / 2]."""
        dim = self.qk_rope_head_dim
        freq = self.rope_theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        yarn = self.rope_scaling
        if yarn is None:
            return freq

        def correction_dim(rotations: float) -> float:
            turns = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
            return dim * math.log(turns) / (2 * math.log(self.rope_theta))

        low = max(math.floor(correction_dim(yarn.beta_fast)), 0)
        high: float = min(math.ceil(correction_dim(yarn.beta_slow)), dim - 1)
        if low == high:
            high += 0.001
        ramp = np.clip((np.arange(dim // 2, dtype=np.float64) - low) / (high - low), 0.0, 1.0)
        return freq / yarn.factor * ramp + freq * (1.0 - ramp)

    @classmethod
    def load(cls, folder: str | Path) -> ModelConfig:
        """Read `config.json` (and `generation_config.json`, if there) of a checkpoint folder.

        Raises ConfigError naming the file and the key.
        """
        folder = Path(folder)
        path = folder / "config.json"
        hint = "Give the folder of a Hugging Face checkpoint: config.json and *.safetensors."
        values = load_json_object(path, ConfigError, hint)
        generation_path = folder / "generation_config.json"
        generation: dict[str, Any] = {}
        if generation_path.exists():
            generation = load_json_object(generation_path, ConfigError)
        return cls.from_dict(
            values, generation, where=str(path), generation_where=str(generation_path)
        )

    @classmethod
    def from_dict(
        cls,
        values: Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
        where: str = "config.json",
        generation_where: str = "generation_config.json",
    ) -> ModelConfig:
        """Check and read the parsed `config.json`; `where` names the file in errors.

        `generation` is the parsed `generation_config.json`; only its `eos_token_id` is used.
        Raises ConfigError.
        """
        try:
            return _unwrap_and_read(values, generation or {}, where, generation_where)
        except RecursionError:
            raise ConfigError(f"{where}: a value is nested too deeply") from None


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _check_model_type(values: Mapping[str, Any], where: str) -> None:
    model_type, architectures = values.get("model_type"), values.get("architectures") or []
    known = _TEXT_MODEL_TYPES + _WRAPPER_MODEL_TYPES
    hint = "This engine runs Kimi K2 models: model_type " + ", ".join(known) + "."
    if model_type is None:
        raise ConfigError(f"{where}: model_type is missing", hint)
    if not isinstance(model_type, str) or model_type not in known:
        reason = "an unknown architecture"
        if isinstance(model_type, str):
            reason = _OTHER_ARCHITECTURES.get(model_type, reason)
        raise ConfigError(
            f"{where}: model_type {short(model_type)} is not supported: {reason}", hint
        )
    for name in architectures if isinstance(architectures, list) else [architectures]:
        if name not in _ARCHITECTURES:
            reason = _OTHER_ARCHITECTURES["kimi_k3"] if "K3" in str(name) else "unknown"
            raise ConfigError(
                f"{where}: architectures: {short(name)} is not supported: {reason}", hint
            )


#: Keys of the `kimi_k25` wrapper that count; the text model's own numbers stand in text_config.
_OUTER_KEYS = {
    "bos_token_id",
    "eos_token_id",
    "model_type",
    "quantization_config",
    "text_config",
    "tie_word_embeddings",
}


def _unwrap_and_read(
    values: Mapping[str, Any], generation: Mapping[str, Any], where: str, generation_where: str
) -> ModelConfig:
    _check_model_type(values, where)
    if values["model_type"] not in _WRAPPER_MODEL_TYPES:
        return _read(Reader(values, where), {}, "", generation, generation_where)
    text = values.get("text_config")
    if not isinstance(text, dict):
        raise ConfigError(
            f"{where}: text_config is missing or no object",
            "A kimi_k25 checkpoint keeps the language model's keys there.",
        )
    outer = Reader(values, where)
    outer.taken |= _OUTER_KEYS
    outer.finish()
    text_where = f"{where} (text_config)"
    _check_model_type(text, text_where)
    if text["model_type"] in _WRAPPER_MODEL_TYPES:
        raise ConfigError(f"{text_where}: model_type is a wrapper again", "Fix config.json.")
    reader = Reader(text, text_where)
    return _read(reader, values, "language_model.", generation, generation_where)


def _read(
    reader: Reader,
    outer: Mapping[str, Any],
    prefix: str,
    generation: Mapping[str, Any],
    generation_where: str,
) -> ModelConfig:
    hidden_size = reader.integer("hidden_size", 1, 1 << 17)
    heads = reader.integer("num_attention_heads", 1, 4096)
    kv_heads = reader.get("num_key_value_heads")
    if kv_heads is not None and kv_heads != heads:
        raise reader.fail(
            "num_key_value_heads",
            f"= {short(kv_heads)} differs from num_attention_heads = {heads}",
            "Latent attention has as many key heads as query heads; fix config.json.",
        )
    q_lora_rank = None
    if reader.need("q_lora_rank") is not None:
        q_lora_rank = reader.integer("q_lora_rank", 1, 1 << 17)
    rope_dim = reader.integer("qk_rope_head_dim", 2, 4096)
    if rope_dim % 2:
        raise reader.fail("qk_rope_head_dim", f"= {rope_dim} is odd; rotary pairs need an even one")
    nope_dim = reader.integer("qk_nope_head_dim", 1, 4096)
    for key, derived in (("head_dim", rope_dim), ("qk_head_dim", nope_dim + rope_dim)):
        value = reader.get(key)
        if value is not None and value != derived:
            raise reader.fail(key, f"= {short(value)} contradicts the other head sizes ({derived})")

    experts = reader.integer("n_routed_experts", 1, 1 << 16)
    alias = reader.get("num_local_experts")
    if alias is not None and alias != experts:
        raise reader.fail(
            "num_local_experts", f"= {short(alias)} contradicts n_routed_experts = {experts}"
        )
    shared = 0
    if reader.need("n_shared_experts") is not None:
        shared = reader.integer("n_shared_experts", 0, 1024)
    per_token = reader.integer("num_experts_per_tok", 1, experts)
    n_group = reader.integer("n_group", 1, experts)
    topk_group = reader.integer("topk_group", 1, n_group)
    if experts % n_group:
        raise reader.fail("n_group", f"= {n_group} does not divide n_routed_experts = {experts}")
    if n_group > 1 and experts // n_group < 2:
        raise reader.fail("n_group", f"= {n_group} leaves groups of one expert; two are needed")
    if per_token > topk_group * (experts // n_group):
        raise reader.fail(
            "num_experts_per_tok",
            f"= {per_token} is more than topk_group = {topk_group} groups hold",
        )
    moe_layer_freq = 1
    if reader.get("moe_layer_freq") is not None:
        moe_layer_freq = reader.integer("moe_layer_freq", 1, 4096)

    reader.only("scoring_func", "sigmoid", "the router is another one")
    reader.only("topk_method", "noaux_tc", "the router is another one")
    reader.only("hidden_act", "silu", "the experts' activation is another one")
    reader.only("attention_bias", False, "biases of the attention projections are not read")
    reader.only("rope_interleave", True, "rotary pairs must be interleaved, as published")

    vocab_size = reader.integer("vocab_size", 1, 1 << 24)
    bos = None
    if reader.get("bos_token_id") is not None:
        bos = reader.integer("bos_token_id", 0, vocab_size - 1)
    eos: list[int] = []
    for source, where in ((generation, generation_where), (reader.values, reader.where)):
        eos += _token_ids(source.get("eos_token_id"), vocab_size, "eos_token_id", where)
    eos += _token_ids(outer.get("eos_token_id"), vocab_size, "eos_token_id", reader.where)
    reader.taken.add("eos_token_id")

    nextn = 0
    for key in ("num_nextn_predict_layers", "num_mtp_layers"):
        if reader.get(key) is not None:
            nextn = reader.integer(key, 0, 64)

    rope_theta, rope_scaling = _read_rope(reader)
    quantized = _read_quantization(reader, outer)
    config = ModelConfig(
        hidden_size=hidden_size,
        num_hidden_layers=reader.integer("num_hidden_layers", 1, 4096),
        num_attention_heads=heads,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=reader.integer("kv_lora_rank", 1, 1 << 17),
        qk_nope_head_dim=nope_dim,
        qk_rope_head_dim=rope_dim,
        v_head_dim=reader.integer("v_head_dim", 1, 4096),
        n_routed_experts=experts,
        num_experts_per_tok=per_token,
        n_shared_experts=shared,
        moe_intermediate_size=reader.integer("moe_intermediate_size", 1, 1 << 20),
        intermediate_size=reader.integer("intermediate_size", 1, 1 << 20),
        first_k_dense_replace=reader.integer("first_k_dense_replace", 0, 4096),
        moe_layer_freq=moe_layer_freq,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=reader.flag("norm_topk_prob"),
        routed_scaling_factor=reader.number("routed_scaling_factor", 1e-6, 1e6),
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        vocab_size=vocab_size,
        rms_norm_eps=reader.number("rms_norm_eps", 0.0, 1.0),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=reader.integer("max_position_embeddings", 1, (1 << 31) - 1),
        tie_word_embeddings=_read_tie(reader, outer),
        bos_token_id=bos,
        eos_token_ids=tuple(dict.fromkeys(eos)),
        num_nextn_predict_layers=nextn,
        model_type=reader.get("model_type"),
        tensor_prefix=prefix,
        quantized=quantized,
    )
    reader.finish()
    return config


def _token_ids(value: Any, vocab_size: int, key: str, where: str) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ConfigError(
                f"{where}: {key} = {short(value)} is no token id below vocab_size = {vocab_size}"
            )
    return list(ids)


def _read_tie(reader: Reader, outer: Mapping[str, Any]) -> bool:
    values = [source.get("tie_word_embeddings") for source in (reader, outer)]
    for value in values:
        if value is not None and not isinstance(value, bool):
            raise reader.fail("tie_word_embeddings", f"= {short(value)} is neither true nor false")
    given = {v for v in values if v is not None}
    if len(given) > 1:
        raise reader.fail("tie_word_embeddings", "differs between text_config and the outer config")
    return True in given


def _read_rope(reader: Reader) -> tuple[float, YarnScaling | None]:
    """Both spellings: `rope_theta` + `rope_scaling`, and transformers 5's `rope_parameters`."""
    old, new = reader.get("rope_scaling"), reader.get("rope_parameters")
    key = "rope_scaling" if new is None else "rope_parameters"
    for name, value in (("rope_scaling", old), ("rope_parameters", new)):
        if value is not None and not isinstance(value, dict):
            raise reader.fail(name, f"= {short(value)} is no object")
    if new is not None and old and {**new, **old} != new:
        raise reader.fail("rope_scaling", "contradicts rope_parameters", "Keep one of the two.")
    rope = Reader((old if new is None else new) or {}, f"{reader.where}: {key}")
    thetas = [
        source.number("rope_theta", 1.001, 1e12)
        for source in (reader, rope)
        if source.values.get("rope_theta") is not None
    ]
    if not thetas:
        raise reader.fail("rope_theta", "is missing")
    if len(set(thetas)) > 1:
        raise reader.fail("rope_theta", f"contradicts {key}.rope_theta", "Keep one of the two.")
    reader.get("rope_theta")
    kinds = [rope.get(name) for name in ("type", "rope_type") if rope.values.get(name) is not None]
    kind = kinds[0] if kinds else "default"
    if kinds and kinds[-1] != kind:
        raise rope.fail("type", f"= {short(kind)} contradicts rope_type = {short(kinds[-1])}")
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise rope.fail("partial_rotary_factor", "is not 1: all rotary dimensions are rotated")
    if kind == "default":
        rope.finish()
        return thetas[0], None
    if kind != "yarn":
        raise rope.fail("type", f"= {short(kind)} is not supported", "Only yarn is implemented.")
    return thetas[0], _read_yarn(rope)


def _read_yarn(rope: Reader) -> YarnScaling:
    def optional(name: str, default: float, low: float, high: float) -> float:
        return default if rope.get(name) is None else rope.number(name, low, high)

    mscale = optional("mscale", 1.0, 0.0, 100.0)
    mscale_all_dim = optional("mscale_all_dim", 0.0, 0.0, 100.0)
    given = rope.values.get("mscale")
    if (mscale_all_dim and not given) or (not mscale_all_dim and mscale != 1):
        # The published code and transformers compute different scales from such a pair.
        raise rope.fail(
            "mscale",
            f"= {short(given)} with mscale_all_dim = {mscale_all_dim:g} is ambiguous",
            "Published K2 models set both to 1.",
        )
    rope.only("truncate", True, "correction dimensions are rounded, as published")
    yarn = YarnScaling(
        factor=rope.number("factor", 1.0, 1e6),
        original_max_position_embeddings=rope.integer(
            "original_max_position_embeddings", 1, (1 << 31) - 1
        ),
        beta_fast=optional("beta_fast", 32.0, 1e-3, 1e6),
        beta_slow=optional("beta_slow", 1.0, 1e-3, 1e6),
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
    )
    rope.finish()
    return yarn


def _read_quantization(reader: Reader, outer: Mapping[str, Any]) -> bool:
    """True for compressed-tensors INT4 groups of 32; every other scheme is refused by name."""
    found = (reader.get("quantization_config"), outer.get("quantization_config"))
    configs = [value for value in found if value]
    for value in configs:
        if not isinstance(value, dict):
            raise reader.fail("quantization_config", f"= {short(value)} is no object")
        _check_quantization(Reader(value, f"{reader.where}: quantization_config"))
    return bool(configs)


def _check_quantization(reader: Reader) -> None:
    method = reader.need("quant_method")
    if method == "fp8":
        raise reader.fail(
            "quant_method",
            "= 'fp8' is not supported: this engine reads INT4 or bf16 experts",
            "Use Kimi K2 Thinking or K2.5 (INT4), or a bf16 conversion of this checkpoint.",
        )
    reader.only("quant_method", "compressed-tensors", "only compressed-tensors is read")
    reader.need("format")
    reader.only("format", "pack-quantized", "only packed INT4 is read")
    reader.only("quantization_status", "compressed", "the weights must be packed")
    for key in ("ignore", "version", "global_compression_ratio"):
        reader.get(key)  # which projections are INT4 is decided by their tensors
    groups = reader.need("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise reader.fail("config_groups", "is empty or no object")
    for name, group in groups.items():
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise reader.fail("config_groups", f".{name} has no weights object")
        inner = Reader(group, f"{reader.where}.config_groups.{name}")
        inner.taken |= {"weights", "targets"}
        if inner.get("format") is not None:
            inner.only("format", "pack-quantized", "only packed INT4 is read")
        for key in ("input_activations", "output_activations"):
            if group.get(key) is not None:
                raise inner.fail(key, "is set: quantised activations are not supported")
        inner.finish()
        weights = Reader(group["weights"], f"{inner.where}.weights")
        for key in ("num_bits", "group_size", "symmetric"):
            weights.need(key)
        weights.only("num_bits", 4, "only INT4 groups are read")
        weights.only("group_size", 32, "only groups of 32 are read")
        weights.only("symmetric", True, "zero points are not read")
        weights.only("type", "int", "only integers are read")
        weights.only("strategy", "group", "only one scale a group is read")
        weights.only("dynamic", False, "weights cannot be quantised dynamically")
        if weights.get("actorder"):
            raise weights.fail("actorder", "is set: reordered columns are not supported")
        weights.taken |= {"observer", "observer_kwargs", "scale_dtype", "zp_dtype"}
        weights.finish()
    reader.finish()
