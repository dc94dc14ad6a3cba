"""Looking into a model at work: which experts it touches, and where its time goes.

A `Model` calls every operation as `self.kernels.NAME(...)`. `ObservedKernels` stands in for the
kernels and reports each call, so a second `Model` on the same checkpoint can be watched while the
measured one runs undisturbed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import FunctionType, ModuleType
from typing import Any

import numpy as np

from kimi_cpu.model import MLPWeights, Model, MoEWeights
from kimi_cpu.store.summary import Summary

#: Called after each kernel with (name, positional arguments, result, seconds).
Observer = Callable[[str, tuple[Any, ...], Any, float], None]

#: Parts of a token's time, in the order of a layer.
PARTS = ("attention", "router", "experts", "shared experts", "dense MLP", "head", "other")

#: Kernels that serve one part; of the others the weight tells.
_PART_OF_KERNEL = {
    "moe": "experts", "route": "router", "split": "attention", "rope": "attention",
    "store_rows_at": "attention", "absorb_q": "attention", "absorb_v": "attention",
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
        if name == "route":
            self.touched += len(np.unique(result[0]))


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

        def learn(part: str, weights: Any) -> None:
            for field in fields(weights):
                self._part_of_weight[id(getattr(weights, field.name))] = part

        for layer in model.layers:
            learn("attention", layer.self_attn)
            if isinstance(layer.mlp, MLPWeights):
                learn("dense MLP", layer.mlp)
            elif isinstance(layer.mlp, MoEWeights):
                self._part_of_weight[id(layer.mlp.gate)] = "router"
                if layer.mlp.shared_experts is not None:
                    learn("shared experts", layer.mlp.shared_experts)
        self._part_of_weight[id(model.norm)] = "head"
        self._part_of_weight[id(model.lm_head)] = "head"
        # Absent weights (no q_lora_rank) share one id.
        self._part_of_weight.pop(id(None), None)

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
        experts_per_pass: distinct experts of one pass and layer with experts; 0 without any.
    """

    trunk_bytes: float
    expert_bytes: float
    cache_bytes: float
    experts_per_pass: float

    @property
    def total_bytes(self) -> float:
        return self.trunk_bytes + self.expert_bytes + self.cache_bytes


def traffic(
    summary: Summary, passes: list[tuple[int, int]], experts_touched: int, cache_element_bytes: int
) -> Traffic:
    """The average of some forward passes.

    Args:
        summary: the checkpoint's figures.
        passes: (tokens before, tokens computed) of each.
        experts_touched: distinct experts, added up over passes and layers.
        cache_element_bytes: 2 for bf16 latents, 4 for float32.
    """
    tokens = sum(n for _, n in passes)
    embedding_row = summary.trunk_parts["embedding"] // summary.config["vocab_size"]
    trunk = sum(summary.token_trunk_bytes + (n - 1) * embedding_row for _, n in passes)
    row_bytes = summary.kv_token_bytes * cache_element_bytes // 2
    cache = sum((before + n) * row_bytes for before, n in passes)
    moe_layers = summary.n_layers - summary.n_dense_layers
    per_pass = experts_touched / (len(passes) * moe_layers) if moe_layers else 0.0
    return Traffic(
        trunk_bytes=trunk / tokens,
        expert_bytes=experts_touched * summary.one_expert_bytes / tokens,
        cache_bytes=cache / tokens,
        experts_per_pass=per_pass,
    )
