"""How often a token's experts will be in memory: the store's policy, replayed over choices.

The choices are a recorded trace, or made up with a stated skew and locality, or the hit rate itself
is given. Every answer goes with a text that names the assumption.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from kimi_cpu.errors import UsageError
from kimi_cpu.planning.shape import Shape
from kimi_cpu.store.experts.policy import Frequency
from kimi_cpu.store.experts.simulation import Trace, read_trace, simulate, zipf_trace

#: A made-up trace: its tokens, of which the first half fills the cache, and the layers that are
#: simulated. Layers are alike, so a few of them with their share of the slots stand for all.
_TOKENS, _LAYERS = 1024, 12
#: Of a recorded trace, the last so many tokens: the policy forgets, and replaying takes time.
_MOST_TOKENS = 2048
#: What made-up choices are like unless said otherwise.
SKEW, LOCALITY, WINDOW = 0.6, 0.3, 16


class Routing(Protocol):
    """Where hit rates come from.

    Attributes:
        text: the assumption in words.
        kind: "trace", "made up" or "given".
    """

    text: str
    kind: str

    def hit_rate(self, slots: int) -> float:
        """Of a token's experts those in memory, when so many of all may be; 0 to 1."""


@dataclass
class Given:
    """The same hit rate at every size that does not hold everything."""

    rate: float
    all_experts: int
    text: str = ""
    kind: str = "given"

    def __post_init__(self) -> None:
        self.text = f"a hit rate of {self.rate:.0%} wherever not all experts fit, as given"

    def hit_rate(self, slots: int) -> float:
        return 1.0 if slots >= self.all_experts else self.rate


@dataclass
class Even:
    """No expert is liked better than another: the worst that can be expected."""

    all_experts: int
    text: str = "even routing"
    kind: str = "made up"

    def hit_rate(self, slots: int) -> float:
        return min(slots / self.all_experts, 1.0) if self.all_experts else 1.0


@dataclass
class Replay:
    """The policy over a trace.

    Attributes:
        trace: int32 [T, L, K].
        n_experts: of a layer.
        layers: how many layers the model has, L or more.
        warm: tokens that only fill the cache.
    """

    trace: Trace
    n_experts: int
    layers: int
    warm: int
    text: str
    kind: str
    _known: dict[int, float] = field(default_factory=dict)

    def hit_rate(self, slots: int) -> float:
        _, layers, top_k = self.trace.shape
        if slots >= self.layers * self.n_experts:
            return 1.0
        capacity = max(round(slots * layers / self.layers), top_k)
        if capacity not in self._known:
            policy = Frequency(layers * self.n_experts)
            done = simulate(self.trace, self.n_experts, capacity, policy)
            self._known[capacity] = done.hit_rate_after(self.warm)
        return self._known[capacity]


def made_up(shape: Shape, skew: float = SKEW, locality: float = LOCALITY) -> Replay:
    """Zipf-like popularity with temporal locality (see `zipf_trace`)."""
    layers = min(shape.n_moe_layers, _LAYERS)
    trace = zipf_trace(
        _TOKENS, layers, shape.n_experts, shape.top_k, skew=skew, locality=locality, window=WINDOW
    )
    text = (
        f"popularity of an expert ~ rank^-{skew:g}, and {locality:.0%} of choices repeat one of "
        f"the last {WINDOW} tokens (assumed, not measured)"
    )
    return Replay(trace, shape.n_experts, shape.n_moe_layers, _TOKENS // 2, text, "made up")


def recorded(path: Path, shape: Shape) -> Replay:
    """A trace that `--trace` wrote. Raises UsageError: damaged, empty, or of another model."""
    trace, n_experts = read_trace(path)
    here = (shape.n_moe_layers, shape.n_experts, shape.top_k)
    if (trace.shape[1], n_experts, trace.shape[2]) != here:
        raise UsageError(
            f"{path}: is of a model with {trace.shape[1]} layers of {n_experts} experts, "
            f"{trace.shape[2]} for a token; here it is {here[0]} of {here[1]}, {here[2]}",
            "Record one with this model.",
        )
    if len(trace) < 2:
        raise UsageError(f"{path}: has {len(trace)} tokens, too few", "Record a longer reply.")
    n_all = len(trace)
    trace = trace[-_MOST_TOKENS:]
    warm = len(trace) // 2
    part = f" (the last {len(trace):,})" if n_all > len(trace) else ""
    text = f"the trace {path.name}, {n_all:,} tokens{part}, of which the first half fills the cache"
    return Replay(trace, n_experts, shape.n_moe_layers, warm, text, "trace")
