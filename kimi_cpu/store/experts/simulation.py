"""Replaying routing through a policy: what a cache of some size would hit.

A trace is int32 [T, L, K]: the K experts that each of T tokens chose in each of L layers with
experts, ids within the layer. `Recorder` writes what an engine chose, `read_trace` reads it back,
`zipf_trace` makes one up.
"""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kimi_cpu.errors import UsageError
from kimi_cpu.store.experts.policy import Policy

log = logging.getLogger(__name__)

Trace = npt.NDArray[np.int32]

_VERSION = 1


@dataclass(frozen=True)
class Simulation:
    """What a cache did over a trace.

    Attributes:
        hits: int64 [T], of each token's L K choices those that were resident.
        choices: L K.
    """

    hits: npt.NDArray[np.int64]
    choices: int

    @property
    def hit_rate(self) -> float:
        """Over the whole trace, its cold start included; 0 for no tokens."""
        return self.hit_rate_after(0)

    def hit_rate_after(self, tokens: int) -> float:
        """Of the tokens after the first `tokens`."""
        rest = self.hits[tokens:]
        return float(rest.mean()) / self.choices if len(rest) else 0.0


def simulate(trace: Trace, n_experts: int, capacity: int, policy: Policy) -> Simulation:
    """Decode a trace token by token with `capacity` experts in memory, which starts empty.

    As `ExpertStore` does: the experts of a layer are all asked for at once, those that are missing
    come in one after another, and what the layer needs is not let go meanwhile.

    Args:
        trace: int32 [T, L, K].
        n_experts: experts of a layer.
        capacity: at least K.
        policy: a new one, for L n_experts experts.
    """
    n_tokens, n_layers, top_k = trace.shape
    if capacity < top_k:
        raise ValueError(f"{capacity} slots for {top_k} experts of a layer")
    numbers = (trace + np.arange(n_layers)[None, :, None] * n_experts).tolist()
    hits = np.zeros(n_tokens, dtype=np.int64)
    resident: set[int] = set()
    for t, token in enumerate(numbers):
        for chosen in token:
            for expert in chosen:
                policy.use(expert)
            missing = [expert for expert in chosen if expert not in resident]
            hits[t] += top_k - len(missing)
            for expert in missing:
                if len(resident) >= capacity:
                    victim = policy.evict(chosen)
                    assert victim is not None  # the layer's own are fewer than the slots
                    resident.remove(victim)
                resident.add(expert)
                policy.admit(expert)
        policy.tick()
    return Simulation(hits, n_layers * top_k)


def zipf_trace(
    n_tokens: int,
    n_layers: int,
    n_experts: int,
    top_k: int,
    *,
    skew: float = 0.6,
    locality: float = 0.3,
    window: int = 16,
    seed: int = 0,
) -> Trace:
    """A made-up trace: some experts are popular, and what was just used comes again.

    In each layer the probability of the expert of rank r is proportional to r ** -skew (ranks
    are shuffled, layer by layer). A choice is, with probability `locality`, one of the layer's
    choices of the last `window` tokens instead. A token's choices are distinct.
    """
    rng = np.random.default_rng(seed)
    popularity = np.arange(1, n_experts + 1, dtype=np.float64) ** -skew
    steps = np.cumsum(popularity / popularity.sum())
    steps[-1] = 1.0
    ranks = np.stack([rng.permutation(n_experts) for _ in range(n_layers)])
    trace = np.empty((n_tokens, n_layers, top_k), dtype=np.int32)
    for t in range(n_tokens):
        for layer in range(n_layers):
            recent = trace[max(0, t - window) : t, layer].ravel()
            chosen: list[int] = []
            while len(chosen) < top_k:
                if len(recent) and rng.random() < locality:
                    expert = int(rng.choice(recent))
                else:
                    expert = int(ranks[layer, np.searchsorted(steps, rng.random())])
                if expert not in chosen:
                    chosen.append(expert)
            trace[t, layer] = chosen
    return trace


class Recorder:
    """Writes the routing of each pass to a file of JSON lines.

    The first line has `version`, `layers` (the numbers of those with experts), `n_experts` and
    `top_k`; each other one is a token: a list of K ids for each layer, in the router's order.
    Of a prompt that is its last token: the others need no experts of the last layer.
    """

    def __init__(self, path: Path, layers: list[int], n_experts: int, top_k: int) -> None:
        """Create or overwrite the file; raises UsageError if it cannot be written."""
        self.path = path
        head = {
            "version": _VERSION, "layers": layers, "n_experts": n_experts, "top_k": top_k,
        }  # fmt: skip
        try:
            self._file = path.open("w", encoding="utf-8")
            self._write([head])
        except OSError as exc:
            raise UsageError(
                f"{path}: cannot be written ({exc.strerror})",
                "Name another file for the trace, or make room.",
            ) from None

    def tokens(self, chosen: Trace) -> None:
        """Append tokens: int32 [T, L, K].

        If the disk is full, what has been written stays, a warning is logged, and that is the end
        of the recording: what the model says is worth more.
        """
        if self._file.closed:
            return
        try:
            self._write(chosen.tolist())
        except OSError as exc:
            log.warning("%s: routing is recorded no further (%s)", self.path, exc.strerror)
            self.close()

    def close(self) -> None:
        """Finish the file."""
        with contextlib.suppress(OSError):  # of a full disk, which `tokens` has told
            self._file.close()

    def _write(self, values: list[Any]) -> None:
        self._file.writelines(json.dumps(v, separators=(",", ":")) + "\n" for v in values)
        self._file.flush()


def read_trace(path: Path) -> tuple[Trace, int]:
    """(int32 [T, L, K], experts a layer) of a file that `Recorder` wrote; UsageError if damaged.

    A last line that was cut off is left out: the writer may have been stopped.
    """
    hint = "Record it again with --trace FILE."
    try:
        lines = path.read_text("utf-8").split("\n")
        head = json.loads(lines[0])
        version, n_experts = head["version"], head["n_experts"]
        shape = (-1, len(head["layers"]), head["top_k"])
        tokens = [json.loads(line) for line in lines[1:-1]]
        trace = np.array(tokens, dtype=np.int32).reshape(shape if tokens else (0, *shape[1:]))
    except OSError as exc:
        raise UsageError(f"{path}: cannot be read ({exc.strerror})", hint) from None
    except (ValueError, KeyError, TypeError, IndexError):
        raise UsageError(f"{path}: no trace of routing", hint) from None
    if version != _VERSION or (trace.size and not 0 <= trace.min() <= trace.max() < n_experts):
        raise UsageError(f"{path}: no trace of routing that this version reads", hint)
    return trace, int(n_experts)
