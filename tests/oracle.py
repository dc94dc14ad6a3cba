"""The oracle: transformers' DeepseekV3ForCausalLM on random tiny checkpoints.

`CASES` are the configurations; `live_oracle` needs torch and transformers. The recorded outputs in
`tests/vectors/` are written by `tools/dump_reference.py`, so that most tests need no torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kimi_cpu.quant import F32, as_f32, dequantize
from kimi_cpu.store.checkpoint import Checkpoint
from tests.tiny import tiny_checkpoint

VECTORS = Path(__file__).parent / "vectors"
PROMPT_TOKENS = 44  # more than the 32 or so from which expanded attention pays in these shapes
NEW_TOKENS = 12

YARN = {
    "type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


@dataclass(frozen=True)
class Case:
    """A random tiny model: a seed and what differs from the tiny default."""

    name: str
    seed: int
    overrides: dict[str, Any]
    int4: bool = True
    rest: str = "bf16"

    def write(self, folder: Path) -> Path:
        tiny_checkpoint(folder, self.seed, int4=self.int4, rest=self.rest, **self.overrides)
        return folder

    def prompt(self, vocab_size: int) -> list[int]:
        rng = np.random.default_rng(self.seed + 1000)
        return [int(i) for i in rng.integers(0, vocab_size, PROMPT_TOKENS)]


CASES = [
    # A large eps: that of the latents' norms is another one, and must show.
    Case("k2_like", 1, {"rope_scaling": YARN, "rms_norm_eps": 1e-2}),
    Case("no_yarn", 2, {"rope_scaling": None, "rms_norm_eps": 1e-6}),
    Case("no_q_lora", 3, {"q_lora_rank": None, "rope_scaling": YARN}),
    Case("bf16_experts", 4, {"rope_scaling": YARN, "n_shared_experts": 2}, int4=False),
    Case("f32_rest", 5, {"rope_scaling": YARN}, rest="f32"),
    Case("f32_all", 6, {"rope_scaling": None, "q_lora_rank": None}, int4=False, rest="f32"),
    Case(
        "groups",
        7,
        {
            "rope_scaling": YARN,
            "n_routed_experts": 16,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
        },
    ),
    Case(
        "two_dense_layers",
        8,
        {"first_k_dense_replace": 2, "num_hidden_layers": 4, "rope_scaling": YARN},
    ),
    Case(
        "one_head_odd_ranks",
        9,
        {
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "kv_lora_rank": 20,
            "q_lora_rank": 28,
            "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 6,
            "v_head_dim": 10,
            "rope_scaling": None,
        },
    ),
    Case(
        "plain_weights",
        10,
        {
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "n_shared_experts": 1,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9, "beta_fast": 1.0},
        },
    ),
]


def weights_digest(folder: Path) -> str:
    """SHA-256 of the shards: proves that a recorded vector belongs to these weights."""
    digest = hashlib.sha256()
    for shard in sorted(folder.glob("*.safetensors")):
        digest.update(shard.read_bytes())
    return digest.hexdigest()


def live_oracle(folder: Path) -> Any:
    """transformers' model in float32 with the dequantised weights of `folder`."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    raw = json.loads((folder / "config.json").read_text())
    checkpoint = Checkpoint.open(folder)
    c = checkpoint.config
    scaling = raw.get("rope_scaling")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": raw["rope_theta"]}
    if scaling:
        rope |= {k: v for k, v in scaling.items() if k != "type"} | {"rope_type": "yarn"}
    drop = ("model_type", "architectures", "quantization_config", "rope_scaling", "rope_theta")
    drop += ("auto_map", "dtype", "torch_dtype", "num_nextn_predict_layers")
    config = DeepseekV3Config(
        **{k: v for k, v in raw.items() if k not in drop},
        rope_parameters=rope,
        num_nextn_predict_layers=0,
    )
    config._attn_implementation = "eager"
    model = DeepseekV3ForCausalLM(config).eval().float()

    def tensor(array: F32) -> Any:
        return torch.from_numpy(np.array(array, dtype=np.float32))

    state: dict[str, Any] = {}
    for name in model.state_dict():
        if ".mlp.experts." in name:
            layer = int(name.split(".")[2])
            experts = [
                [dequantize(w) for w in checkpoint.expert(layer, e)]
                for e in range(c.n_routed_experts)
            ]
            if name.endswith("gate_up_proj"):
                state[name] = tensor(np.stack([np.concatenate(e[:2]) for e in experts]))
            else:
                state[name] = tensor(np.stack([e[2] for e in experts]))
        else:
            state[name] = tensor(as_f32(checkpoint.tensor(name)))
    model.load_state_dict(state, strict=True)
    return model


def oracle_logits(model: Any, ids: list[int]) -> F32:
    """float32 [T, V]."""
    import torch

    with torch.no_grad():
        return np.asarray(model(torch.tensor([ids]), use_cache=False).logits[0].numpy())


def oracle_greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """The ids that greedy decoding adds to `ids`, computed without a cache."""
    out = list(ids)
    for _ in range(count):
        out.append(int(oracle_logits(model, out)[-1].argmax()))
    return out[len(ids) :]
