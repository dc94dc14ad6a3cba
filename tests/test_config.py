"""config.json is read strictly: what changes the computation is used or refused by name."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_cpu.config import ModelConfig
from kimi_cpu.config.reader import load_json_object
from kimi_cpu.errors import CheckpointError, ConfigError
from kimi_cpu.store.writer import QUANTIZATION
from tests.tiny import tiny_config

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")


def read(**overrides: Any) -> ModelConfig:
    return ModelConfig.from_dict(tiny_config(**overrides))


def wrap(text: dict[str, Any], **outer: Any) -> dict[str, Any]:
    """A K2.5 config around `text`."""
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "ignore_index": -100,
        "media_placeholder_token_id": 163605,
        "model_type": "kimi_k25",
        "pad_token_id": 0,
        "text_config": text,
        "tie_word_embeddings": False,
        "use_unified_vision_chunk": True,
        "video_placeholder": "<|kimi_k25_video_placeholder|>",
        "vision_config": {"hidden_size": 1152, "model_type": "kimi_k25_vision"},
    } | outer


def test_reads_every_number() -> None:
    config = read(eos_token_id=[2, 3], tie_word_embeddings=True)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (64, 3, 256)
    assert (config.qk_nope_head_dim, config.qk_rope_head_dim, config.qk_head_dim) == (16, 8, 24)
    assert (config.q_lora_rank, config.kv_lora_rank, config.v_head_dim) == (48, 32, 16)
    assert config.routed_scaling_factor == 2.827 and config.rms_norm_eps == 1e-5
    assert config.rope_scaling is not None and config.rope_scaling.factor == 64.0
    assert config.eos_token_ids == (2, 3) and config.bos_token_id == 1
    assert config.quantized and config.tie_word_embeddings and config.tensor_prefix == ""
    assert not read(int4=False).quantized


def test_dense_layers() -> None:
    config = read(num_hidden_layers=8, first_k_dense_replace=3, moe_layer_freq=2)
    assert [config.is_dense_layer(i) for i in range(8)] == [True] * 4 + [False, True, False, True]


@needs_shared
def test_kimi_k2_thinking() -> None:
    values = json.loads((SHARED / "kimi-k2-thinking-config.json").read_text("utf-8"))
    config = ModelConfig.from_dict(values, {"eos_token_id": [163585, 163586]})
    assert math.isclose(config.softmax_scale, 0.1446796258, rel_tol=1e-9)
    assert config.rope_attention_scale == 1.0
    assert config.eos_token_ids == (163585, 163586)
    freq = config.inv_freq()
    plain = 50000.0 ** (-np.arange(32) / 32)
    assert np.allclose(freq[:20], plain[:20]) and np.allclose(freq[20:], plain[20:] / 64)


@needs_shared
def test_kimi_k2_instruct_needs_another_format_than_fp8() -> None:
    values = json.loads((SHARED / "kimi-k2-instruct" / "config.json").read_text("utf-8"))
    with pytest.raises(ConfigError, match="quantization_config: quant_method = 'fp8'") as caught:
        ModelConfig.from_dict(values)
    assert "INT4" in caught.value.hint
    del values["quantization_config"]
    config = ModelConfig.from_dict(values, {"eos_token_id": 163586, "max_length": 131072})
    assert config.rms_norm_eps == 1e-6 and config.eos_token_ids == (163586, 163585)


def test_k25_wrapper() -> None:
    text = tiny_config(eos_token_id=None)
    config = ModelConfig.from_dict(wrap(text, eos_token_id=7))
    assert config.tensor_prefix == "language_model."
    assert config.hidden_size == 64 and config.eos_token_ids == (7,) and config.quantized
    quantization = text.pop("quantization_config")
    assert ModelConfig.from_dict(wrap(text, quantization_config=quantization)).quantized
    for values, problem in (
        ({"model_type": "kimi_k25"}, "text_config is missing"),
        (wrap(wrap(text)), r"\(text_config\): model_type is a wrapper again"),
        (wrap(text, tie_word_embeddings=True), "tie_word_embeddings differs"),
        (wrap(text, new_feature=3), "new_feature = 3 is not understood"),
        (wrap(text | {"hidden_act": "gelu"}), r"\(text_config\): hidden_act = 'gelu'"),
    ):
        with pytest.raises(ConfigError, match=problem):
            ModelConfig.from_dict(values)


def test_rope_without_yarn_and_both_spellings() -> None:
    plain = read(rope_scaling=None)
    assert plain.rope_scaling is None and plain.rope_attention_scale == 1.0
    assert math.isclose(plain.softmax_scale, 24**-0.5)
    assert np.allclose(plain.inv_freq(), 50000.0 ** (-np.arange(4) / 4))

    values = tiny_config()
    yarn = ModelConfig.from_dict(values)
    rope = values.pop("rope_scaling")
    rope["rope_type"] = rope.pop("type")
    values["rope_parameters"] = rope | {"rope_theta": values.pop("rope_theta")}
    assert ModelConfig.from_dict(values) == yarn
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": 50000.0}
    assert ModelConfig.from_dict(values) == plain


def test_yarn_scales_like_transformers() -> None:
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    ropes: list[dict[str, Any]] = [
        {"factor": 40.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
        {"factor": 32.0, "beta_fast": 1, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.5},
        {"factor": 8.0},
    ]
    for rope in ropes:
        rope |= {"type": "yarn", "original_max_position_embeddings": 4096}
        ours = read(rope_scaling=rope, qk_rope_head_dim=64)
        parameters = rope | {"rope_type": "yarn", "rope_theta": 50000.0}
        theirs = transformers.DeepseekV3Config(qk_rope_head_dim=64, rope_parameters=parameters)
        freq, scale = rope_utils._compute_yarn_parameters(theirs)
        assert np.allclose(ours.inv_freq(), freq.numpy(), rtol=1e-5)
        assert math.isclose(ours.rope_attention_scale, scale, rel_tol=1e-12)


def test_config_saved_by_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    values = tiny_config(int4=False, model_type="deepseek_v3")
    transformers.DeepseekV3Config(**values).save_pretrained(tmp_path)
    ours, expected = ModelConfig.load(tmp_path), ModelConfig.from_dict(values)
    assert ours == expected


def changed_weights(**changes: Any) -> dict[str, Any]:
    quantization = copy.deepcopy(QUANTIZATION)
    quantization["config_groups"]["group_0"]["weights"] |= changes
    return {"quantization_config": quantization}


def changed_group(**changes: Any) -> dict[str, Any]:
    quantization = copy.deepcopy(QUANTIZATION)
    quantization["config_groups"]["group_0"] |= changes
    return {"quantization_config": quantization}


def changed_rope(**changes: Any) -> dict[str, Any]:
    return {"rope_scaling": tiny_config()["rope_scaling"] | changes}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": None}, "model_type is missing"),
    ({"model_type": "llama"}, "model_type 'llama' is not supported: an unknown architecture"),
    ({"model_type": ["kimi_k2"]}, "model_type"),
    ({"model_type": "kimi_k3"}, "Kimi K3 is another architecture"),
    ({"model_type": "kimi_linear"}, "Kimi Linear is another architecture"),
    ({"model_type": "deepseek_v32"}, "sparse attention"),
    ({"architectures": ["KimiK3ForCausalLM"]}, "Kimi K3 is another architecture"),
    ({"architectures": ["LlamaForCausalLM"]}, "architectures: 'LlamaForCausalLM'"),
    ({"attention_bias": True}, "attention_bias = True is not supported"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
    ({"scoring_func": "softmax"}, "scoring_func = 'softmax' is not supported"),
    ({"topk_method": "greedy"}, "topk_method = 'greedy' is not supported"),
    ({"rope_interleave": False}, "rope_interleave = False is not supported"),
    ({"num_key_value_heads": 2}, "num_key_value_heads = 2 differs"),
    ({"head_dim": 16}, "head_dim = 16"),
    ({"num_local_experts": 8}, "num_local_experts = 8 contradicts"),
    ({"n_group": 3}, "n_group = 3 does not divide"),
    ({"n_group": 16, "topk_group": 8}, "n_group = 16 leaves groups of one expert"),
    ({"n_group": 8, "topk_group": 1}, "num_experts_per_tok = 4 is more than topk_group"),
    ({"topk_group": 2}, "topk_group = 2 is no integer from 1 to 1"),
    ({"num_experts_per_tok": 17}, "num_experts_per_tok = 17 is no integer from 1 to 16"),
    ({"moe_layer_freq": [0, 1, 1]}, "moe_layer_freq"),
    ({"moe_layer_freq": 0}, "moe_layer_freq = 0"),
    ({"qk_rope_head_dim": 7}, "qk_rope_head_dim = 7 is odd"),
    ({"hidden_size": 0}, "hidden_size = 0"),
    ({"hidden_size": -64}, "hidden_size = -64"),
    ({"hidden_size": 10**30}, "hidden_size = 10+ is no integer"),
    ({"hidden_size": 64.0}, "hidden_size = 64.0 is no integer"),
    ({"hidden_size": True}, "hidden_size = True is no integer"),
    ({"hidden_size": "64"}, "hidden_size = '64' is no integer"),
    ({"num_hidden_layers": 1 << 40}, "num_hidden_layers"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5' is no number"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps = -1.0 lies outside"),
    ({"routed_scaling_factor": 0}, "routed_scaling_factor = 0 lies outside"),
    ({"norm_topk_prob": 1}, "norm_topk_prob = 1 is neither true nor false"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no'"),
    ({"rope_theta": None}, "rope_theta is missing"),
    ({"rope_theta": 0}, "rope_theta = 0 lies outside"),
    ({"rope_scaling": [1]}, "rope_scaling = .1. is no object"),
    ({"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": None}, "rope_theta contradicts"),
    ({"rope_parameters": {"rope_theta": 5e4}}, "rope_scaling contradicts rope_parameters"),
    (changed_rope(type="linear"), "rope_scaling: type = 'linear' is not supported"),
    (changed_rope(rope_type="linear"), "contradicts rope_type"),
    (changed_rope(partial_rotary_factor=0.5), "partial_rotary_factor is not 1"),
    (changed_rope(truncate=False), "truncate = False is not supported"),
    (changed_rope(attention_factor=1.5), "attention_factor = 1.5 is not understood"),
    (changed_rope(mscale=0.7, mscale_all_dim=0), "mscale = 0.7 with mscale_all_dim = 0"),
    (changed_rope(mscale=None), "mscale = None with mscale_all_dim = 1"),
    (changed_rope(mscale=0, mscale_all_dim=0), "mscale = 0 with mscale_all_dim = 0"),
    (changed_rope(factor=0.5), "factor = 0.5 lies outside"),
    (changed_rope(original_max_position_embeddings=0), "original_max_position_embeddings = 0"),
    (changed_rope(beta_fast=-1), "beta_fast = -1 lies outside"),
    ({"eos_token_id": 256}, "eos_token_id = 256 is no token id below vocab_size = 256"),
    ({"eos_token_id": [2, "x"]}, "eos_token_id"),
    ({"bos_token_id": [1, 2]}, "bos_token_id"),
    ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers = -1"),
    ({"sliding_window": 4096}, "sliding_window = 4096 is not understood"),
    ({"new\nkey": 1}, r"'new\\nkey' = 1 is not understood"),
    ({"quantization_config": "int4"}, "quantization_config = 'int4' is no object"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quant_method = 'gptq'"),
    ({"quantization_config": {"bits": 4}}, "quant_method is missing"),
    ({"quantization_config": QUANTIZATION | {"format": "int-quantized"}}, "format = 'int-quant"),
    ({"quantization_config": QUANTIZATION | {"config_groups": {}}}, "config_groups is empty"),
    ({"quantization_config": QUANTIZATION | {"config_groups": {"g": {}}}}, "has no weights"),
    ({"quantization_config": QUANTIZATION | {"kv_cache_scheme": {"a": 1}}}, "kv_cache_scheme"),
    ({"quantization_config": QUANTIZATION | {"transform_config": {"a": 1}}}, "transform_config"),
    (changed_weights(num_bits=8), r"group_0.weights: num_bits = 8 is not supported"),
    (changed_weights(group_size=128), "group_size = 128 is not supported"),
    (changed_weights(symmetric=False), "symmetric = False is not supported"),
    (changed_weights(type="float"), "type = 'float' is not supported"),
    (changed_weights(strategy="channel"), "strategy = 'channel' is not supported"),
    (changed_weights(dynamic=True), "dynamic = True is not supported"),
    (changed_weights(actorder="group"), "actorder is set"),
    (changed_weights(new=1), "new = 1 is not understood"),
    (changed_group(input_activations={"num_bits": 8}), "input_activations is set"),
]


@pytest.mark.parametrize(("overrides", "problem"), REFUSED, ids=[p for _, p in REFUSED])
def test_refused_by_name(overrides: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        ModelConfig.from_dict(tiny_config() | overrides, where="FOLDER/config.json")
    assert caught.value.message.startswith("FOLDER/config.json")
    assert "\n" not in caught.value.message


REQUIRED = [
    "hidden_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts",
    "num_experts_per_tok", "n_shared_experts", "moe_intermediate_size", "intermediate_size",
    "first_k_dense_replace", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor",
    "vocab_size", "rms_norm_eps", "rope_theta", "max_position_embeddings",
]  # fmt: skip


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_key_is_named(key: str) -> None:
    values = tiny_config()
    del values[key]
    with pytest.raises(ConfigError, match=f"{key} is missing"):
        ModelConfig.from_dict(values)


def test_keys_that_are_off_or_harmless_pass() -> None:
    read(sliding_window=None, mlp_bias=False, pruned_heads={}, use_cache=True, pad_token_id=3)


def test_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: no such file") as caught:
        ModelConfig.load(tmp_path)
    assert "folder" in caught.value.hint
    path = tmp_path / "config.json"
    for text, problem in (
        ("", "not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
        ('{"a": 1, "a": 2}', "key 'a' appears twice"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ("[" * 100_000, "nested too deeply"),
        ('{"model_type": "kimi_k2", "hidden_size": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"hidden_size": 1e999, "model_type": "kimi_k2"}', "hidden_size = inf is no integer"),
    ):
        path.write_text(text, "utf-8")
        with pytest.raises(ConfigError, match=rf"config\.json: .*{problem}"):
            ModelConfig.load(tmp_path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="not valid JSON"):
        ModelConfig.load(tmp_path)
    path.write_text(json.dumps(tiny_config()), "utf-8")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}', "utf-8")
    assert ModelConfig.load(tmp_path).eos_token_ids == (9, 2)
    (tmp_path / "generation_config.json").write_text("{", "utf-8")
    with pytest.raises(ConfigError, match=r"generation_config\.json: not valid JSON"):
        ModelConfig.load(tmp_path)
    with pytest.raises(CheckpointError, match="larger than 3 bytes"):
        load_json_object(path, CheckpointError, max_bytes=3)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([*sorted(tiny_config()), "rope_parameters", "text_config"]), JSON)
def test_any_value_is_read_or_refused(key: str, value: Any) -> None:
    try:
        config = ModelConfig.from_dict(tiny_config() | {key: value})
    except ConfigError as exc:
        assert "\n" not in exc.message
    else:
        assert np.isfinite(config.inv_freq()).all() and config.softmax_scale > 0


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(tiny_config()["rope_scaling"])), JSON)
def test_any_rope_value_is_read_or_refused(key: str, value: Any) -> None:
    try:
        config = ModelConfig.from_dict(tiny_config() | changed_rope(**{key: value}))
    except ConfigError:
        return
    assert np.isfinite(config.inv_freq()).all() and math.isfinite(config.rope_attention_scale)
