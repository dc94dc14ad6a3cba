"""Rates and times of a model on a machine, from bytes, operations and hit rates.

Decoding. The *limit* is what nothing can beat: the longer of reading a token's missing experts from
the disk and reading all its weights from memory. What is *expected* is their sum, less what happens
at the same time: a layer's experts can only be asked for when its router has spoken, but its shared
ones are computed meanwhile, and what is guessed and read before takes about as long as the layer's
attention, `GUESSED` of the reading at most (bench/LOG.md). More of the reading was not found to be
hidden behind computing on two cores.

Norms, softmax, rotations and handing work over come on top, `OTHER` of the time of the products.

A prompt is one sweep: the longer of reading the experts that are not in memory once, and computing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from kimi_cpu.planning.machine import Machine
from kimi_cpu.planning.routing import Routing
from kimi_cpu.planning.shape import Shape

#: What a token waits for.
Bound = Literal["disk", "memory"]

#: What is not multiplying weights, as a part of it: 7 % of a token, 10 % of a prompt in profiles of
#: true-width layers (`kimi-cpu bench --profile`, bench/LOG.md).
OTHER, PROMPT_OTHER = 0.07, 0.1

#: Of the experts that are missing, the part that can be guessed in time, at best: what the embedded
#: model's routers reach (`python -m bench.guesses`).
GUESSED = 0.6

#: Part of a prompt computed at once: the engine's `PREFILL_CHUNK`.
SWEEP_TOKENS = 8192


@dataclass(frozen=True)
class Prediction:
    """One form of a model in one amount of memory.

    Attributes:
        memory_bytes: what the process may use.
        runs: whether a token's experts fit; if not, all that follows is 0.
        floor_bytes: the least that works.
        trunk_bytes, reserve_bytes: what does not go to experts.
        slots, share: experts in memory, and their part of all.
        hit_rate: of a token's experts, those found in memory.
        disk_bytes, dram_bytes: read for a token.
        disk_s, dram_s: seconds for them, if nothing else took time.
        limit_tps: tokens a second at the slower of the two.
        expected_tps: tokens a second as the engine works.
        even_tps: the same if no expert were liked better than another.
        bound: the slower of the two.
        prompt_disk_s, prompt_compute_s: for the prompt asked about.
        prompt_s: the longer of the two.
    """

    memory_bytes: int
    runs: bool
    floor_bytes: int
    trunk_bytes: int
    reserve_bytes: int
    slots: int = 0
    share: float = 0.0
    hit_rate: float = 0.0
    disk_bytes: float = 0.0
    dram_bytes: float = 0.0
    disk_s: float = 0.0
    dram_s: float = 0.0
    limit_tps: float = 0.0
    expected_tps: float = 0.0
    even_tps: float = 0.0
    bound: Bound = "memory"
    prompt_disk_s: float = 0.0
    prompt_compute_s: float = 0.0
    prompt_s: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def predict(
    shape: Shape, machine: Machine, routing: Routing, memory: int, prompt_tokens: int,
    context_tokens: int = 0,
) -> Prediction:  # fmt: skip
    """Rates in `memory` bytes, with so many tokens of context in it.

    Raises ValueError if experts have to come from a disk whose speed is not known.
    """
    budget = shape.budget(memory)
    latent_bytes = context_tokens * shape.latent_bytes
    slots = budget.slots(latent_bytes)
    least = budget.floor_bytes + latent_bytes
    nothing = Prediction(
        memory_bytes=memory, runs=False, floor_bytes=least, trunk_bytes=budget.trunk_bytes,
        reserve_bytes=budget.reserve_bytes,
    )  # fmt: skip
    if slots < min(shape.top_k, shape.all_experts) or memory < least:
        return nothing
    share = slots / shape.all_experts if shape.all_experts else 1.0
    hit_rate = routing.hit_rate(slots)
    dram_bytes = shape.trunk_bytes + shape.token_expert_bytes + latent_bytes
    disk_bytes = (1 - hit_rate) * shape.token_expert_bytes
    dram_s = dram_bytes / machine.dram
    disk_s = disk_bytes / _disk(machine) if disk_bytes else 0.0
    prompt_disk_s, prompt_compute_s = _prompt(shape, machine, share, prompt_tokens)
    return replace(
        nothing, runs=True, slots=slots, share=share, hit_rate=hit_rate,
        disk_bytes=disk_bytes, dram_bytes=dram_bytes, disk_s=disk_s, dram_s=dram_s,
        limit_tps=1 / max(disk_s, dram_s),
        expected_tps=1 / _token_s(shape, machine, hit_rate, context_tokens),
        even_tps=1 / _token_s(shape, machine, share, context_tokens),
        bound="disk" if disk_s > dram_s else "memory",
        prompt_disk_s=prompt_disk_s, prompt_compute_s=prompt_compute_s,
        prompt_s=max(prompt_disk_s, prompt_compute_s),
    )  # fmt: skip


def _disk(machine: Machine) -> float:
    if machine.disk is None:
        raise ValueError("the disk's speed is not known")
    return machine.disk


def _token_s(shape: Shape, machine: Machine, hit_rate: float, context_tokens: int) -> float:
    """Seconds that a token takes as the engine works (see above)."""
    slower = 1 + OTHER
    trunk_s = slower * sum(n / machine.gemv[kind] for kind, n in shape.trunk_kinds.items())
    # Latents are read once for many heads: it is arithmetic that takes the time.
    trunk_s += context_tokens * max(
        shape.context_ops / machine.gemm_rate("float", 8), shape.latent_bytes / machine.dram
    )
    if not shape.n_moe_layers:
        return trunk_s
    expert_s = slower * shape.expert_bytes / machine.gemv[shape.expert_kind]
    n = shape.n_moe_layers * shape.top_k
    if hit_rate >= 1:
        return trunk_s + n * expert_s
    reading_s = shape.top_k * (1 - hit_rate) * shape.expert_bytes / _disk(machine)
    rate = machine.gemv[shape.trunk_kind]
    guessed_s = min(shape.attention_bytes / rate, GUESSED * reading_s)
    waiting_s = max(reading_s - guessed_s - shape.shared_bytes / rate, 0)
    return trunk_s + n * expert_s + shape.n_moe_layers * waiting_s


def _prompt(shape: Shape, machine: Machine, share: float, tokens: int) -> tuple[float, float]:
    """(seconds of the disk, of computing) for a prompt, what is in memory not read again."""
    disk_s = compute_s = 0.0
    for begin in range(0, tokens, SWEEP_TOKENS):
        n = min(SWEEP_TOKENS, tokens - begin)
        # All tokens pass the experts of all layers but the last, the last token those of all.
        for layers, passing in ((shape.n_moe_layers - 1, n), (1, 1)) if shape.n_moe_layers else ():
            # Even routing touches the most; from some 128 tokens on it is nearly all of them.
            touched = 1 - (1 - shape.top_k / shape.n_experts) ** passing
            missing = touched * layers * shape.n_experts * (1 - share)
            if missing >= 0.5:
                disk_s += missing * shape.expert_bytes / _disk(machine)
            each = passing * shape.top_k / (touched * shape.n_experts)
            operations = passing * shape.top_k * layers * shape.expert_ops
            compute_s += operations / machine.gemm_rate(shape.expert_kind, each)
        for kind, operations in shape.trunk_ops.items():
            compute_s += n * operations / machine.gemm_rate(kind, n)
        pairs = n * (begin + n / 2)
        compute_s += pairs * shape.attention_ops / machine.gemm_rate("float", n)
    return disk_s, (1 + PROMPT_OTHER) * compute_s
