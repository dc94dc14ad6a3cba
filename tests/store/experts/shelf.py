"""Expert stores of a chosen size on the tiny model, and a shelf that checks what lies on it."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np

from kimi_cpu.quant import Int4Weight, PackedWeight
from kimi_cpu.store.checkpoint import Checkpoint
from kimi_cpu.store.experts.backends import (
    DirectBackend,
    Io,
    MappedBackend,
    Piece,
    slot_bytes_of,
)
from kimi_cpu.store.experts.budget import Budget, make_budget
from kimi_cpu.store.experts.residency import Expert, ExpertStore

EXPERTS, TOP_K, LAYERS = 16, 4, (1, 2)  # of the tiny model


def arrays(expert: Expert) -> list[np.ndarray]:
    """The bytes of an expert's projections."""
    found: list[np.ndarray] = []
    for w in expert:
        if isinstance(w, Int4Weight):
            found += [w.packed, w.scale]
        else:
            found.append(w.blocks if isinstance(w, PackedWeight) else w)
    return found


def budget_of(checkpoint: Checkpoint, slots: int) -> Budget:
    """A budget that holds so many experts beside trunk and reserve."""
    budget = make_budget(checkpoint, 1 << 50)
    config = checkpoint.config
    slot_bytes = max(
        slot_bytes_of(checkpoint.expert_extents(layer, e))
        for layer in range(config.num_hidden_layers)
        if not config.is_dense_layer(layer)
        for e in range(config.n_routed_experts)
    )
    total = budget.trunk_bytes + budget.reserve_bytes + slots * slot_bytes
    return replace(budget, slot_bytes=slot_bytes, total_bytes=total, given=True)


def open_store(checkpoint: Checkpoint, slots: int, io: Io, **options: object) -> ExpertStore:
    """A store with so many slots."""
    budget = budget_of(checkpoint, slots)
    backend = DirectBackend(slots, budget.slot_bytes) if io == "direct" else MappedBackend()
    return ExpertStore(checkpoint, backend, budget, **options)  # type: ignore[arg-type]


class Shelf:
    """Of one layer."""

    def __init__(self, checkpoint: Checkpoint, layer: int) -> None:
        self._checkpoint, self._layer = checkpoint, layer
        self.experts: dict[int, Expert] = {}

    def put(self, expert: int, weights: Expert) -> None:
        self.experts[expert] = weights

    def take(self, expert: int) -> None:
        self.experts.pop(expert, None)

    def check(self, ids: list[int]) -> None:
        """These are here, and everything that is here has the file's bytes."""
        assert set(ids) <= set(self.experts)
        for expert, weights in self.experts.items():
            expected = arrays(self._checkpoint.expert(self._layer, expert))
            for ours, theirs in zip(arrays(weights), expected, strict=True):
                np.testing.assert_array_equal(ours, theirs)


def shelves(checkpoint: Checkpoint, store: ExpertStore) -> dict[int, Shelf]:
    found = {layer: Shelf(checkpoint, layer) for layer in LAYERS}
    for layer, shelf in found.items():
        store.layer(layer).put_on(shelf)
    return found


def take(store: ExpertStore, layer: int, ids: list[int]) -> None:
    """What a layer does: ask, and wait until all are there."""
    experts = store.layer(layer)
    shape = (1, -1) if len(ids) == TOP_K else (-1, 1)
    experts.count(np.array(ids, dtype=np.int32).reshape(shape))
    experts.request(ids)
    left = list(ids)
    while left:
        left = [e for e in left if e not in experts.arrived(left)]


class Failing(DirectBackend):
    """Fails or delays reads on demand."""

    error: OSError | None = None
    gate: threading.Event | None = None

    def read(self, piece: Piece) -> None:
        if self.gate is not None:
            self.gate.wait()
        if self.error is not None:
            raise self.error
        super().read(piece)


def failing_store(checkpoint: Checkpoint, slots: int) -> tuple[ExpertStore, Failing]:
    budget = budget_of(checkpoint, slots)
    backend = Failing(slots, budget.slot_bytes)
    return ExpertStore(checkpoint, backend, budget), backend
