"""Looking into a model at work: which experts it touches, and where its time goes.

A `Model` calls every operation as `self.kernels.NAME(...)`. `ObservedKernels` stands in for the
kernels and reports each call, so a second `Model` on the same checkpoint can be watched while the
measured one runs undisturbed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from types import FunctionType, ModuleType
from typing import Any

import numpy as np

from kimi_cpu.model import MLPWeights, Model

#: Called after each kernel with (name, positional arguments, result, seconds).
Observer = Callable[[str, tuple[Any, ...], Any, float], None]

#: Parts of a token's time, in the order of a layer.
PARTS = ("attention", "router", "experts", "shared experts", "dense MLP", "head", "other")

#: Kernels that serve one part; of the others the weight tells.
_PART_OF_KERNEL = {
    "moe": "experts", "request": "experts", "anticipate": "experts", "route": "router",
    "split": "attention", "rope": "attention",
    "store_latents": "attention", "absorb_q": "attention", "absorb_v": "attention",
    "mla_decode": "attention", "mla_prefill": "attention",
}  # fmt: skip


class ObservedKernels(ModuleType):
    """The functions of a kernels module, each call reported to an observer."""

    #: A recorded pass would not be seen: a model on these kernels calls each of them every time.
    recording = None

    def __init__(self, kernels: ModuleType, observer: Observer) -> None:
        super().__init__(kernels.__name__)
        self._kernels = kernels
        self._observer = observer

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._kernels, name)
        if not isinstance(value, FunctionType):
            return value
        observer = self._observer

        def observed(*args: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            result = value(*args, **named)
            observer(name, args, result, time.perf_counter() - begin)
            return result

        setattr(self, name, observed)
        return observed


class ExpertCounter:
    """Observer that counts experts touched: each once a layer and forward pass.

    Attributes:
        touched: how many since the last `reset`.
    """

    def __init__(self) -> None:
        self.touched = 0

    def reset(self) -> None:
        self.touched = 0

    def __call__(self, name: str, args: tuple[Any, ...], result: Any, seconds: float) -> None:
        if name == "request":
            self.touched += len(np.unique(args[1]))


def trunk_weights(model: Model) -> Iterator[tuple[str, Any]]:
    """(part, weight) of everything that each token passes: all but embedding and experts."""

    def of(part: str, weights: Any) -> Iterator[tuple[str, Any]]:
        for field in fields(weights):
            weight = getattr(weights, field.name)
            if weight is not None:  # which projections of queries there are depends on the config
                yield part, weight

    for layer in model.layers:
        yield "other", layer.input_layernorm
        yield from of("attention", layer.self_attn)
        yield "other", layer.post_attention_layernorm
        if isinstance(layer.mlp, MLPWeights):
            yield from of("dense MLP", layer.mlp)
            continue
        yield "router", layer.mlp.gate
        yield "router", layer.mlp.e_score_correction_bias
        if layer.mlp.shared_experts is not None:
            yield from of("shared experts", layer.mlp.shared_experts)
    yield "head", model.norm
    yield "head", model.lm_head


class PartTimer:
    """Observer that adds up seconds by part of the model; what no kernel spends is "other".

    Attributes:
        seconds: part -> seconds since the last `reset`; "other" is left at 0.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._part_of_weight: dict[int, str] = {}
        self._part = "other"

    def reset(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def watch(self, model: Model) -> None:
        """Learn which part each of the model's weights belongs to; the model must stay alive."""
        self._part_of_weight = {id(weight): part for part, weight in trunk_weights(model)}

    def __call__(self, name: str, args: tuple[Any, ...], result: Any, seconds: float) -> None:
        if name in _PART_OF_KERNEL:
            part = _PART_OF_KERNEL[name]
        elif name == "silu_mul":  # between two projections of the same MLP
            part = self._part
        else:  # linear(x, w, ...), rmsnorm(x, w, ...) and what belongs to no part
            weight = args[1] if len(args) > 1 else None
            part = self._part_of_weight.get(id(weight), "other")
        self._part = part
        self.seconds[part] += seconds


@dataclass(frozen=True)
class Traffic:
    """Bytes that a benchmark's tokens read from memory, on average over its tokens.

    A forward pass reads the trunk once, each expert that any of its tokens chose once, and the
    latents of all tokens so far once. Decoding passes have one token; a prompt's passes have as
    many as the engine computes at once. Activations are not counted: they stay in the caches
    when decoding, and a prompt is bound by arithmetic.

    Attributes:
        trunk_bytes, expert_bytes, cache_bytes: a token's share.
        part_bytes: the same by part (see PARTS); latents belong to the attention.
        experts_per_pass: distinct experts of one pass and layer with experts; 0 without any.
    """

    trunk_bytes: float
    expert_bytes: float
    cache_bytes: float
    part_bytes: dict[str, float]
    experts_per_pass: float

    @property
    def total_bytes(self) -> float:
        return self.trunk_bytes + self.expert_bytes + self.cache_bytes


def traffic(model: Model, passes: list[tuple[int, int]], experts_touched: int) -> Traffic:
    """The average of some forward passes, with the weights as the model holds them.

    Args:
        model: what computed them.
        passes: (tokens before, tokens computed) of each.
        experts_touched: distinct experts, added up over passes and layers.
    """
    config = model.config
    tokens = sum(n for _, n in passes)
    part_bytes = dict.fromkeys(PARTS, 0.0)
    for part, weight in trunk_weights(model):
        part_bytes[part] += len(passes) * weight.nbytes / tokens
    part_bytes["other"] += model.embed_tokens.nbytes / config.vocab_size  # a row a token
    trunk_bytes = sum(part_bytes.values())

    row_bytes = (config.kv_lora_rank + config.qk_rope_head_dim) * 4  # float32
    cache_rows = sum(before + n for before, n in passes)
    cache_bytes = cache_rows * row_bytes * config.num_hidden_layers / tokens
    part_bytes["attention"] += cache_bytes

    part_bytes["experts"] = experts_touched * model.experts.expert_bytes / tokens
    n_layers = len(config.moe_layers)
    return Traffic(
        trunk_bytes=trunk_bytes,
        expert_bytes=part_bytes["experts"],
        cache_bytes=cache_bytes,
        part_bytes=part_bytes,
        experts_per_pass=experts_touched / (len(passes) * n_layers) if n_layers else 0.0,
    )
