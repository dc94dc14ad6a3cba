"""Random inputs and the comparison used by all kernel tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from kimi_cpu.kernels.common import BLOCK_TOKENS, Latents, address
from kimi_cpu.quant import F32, U16, Weight, f32_to_bf16, pack, quantize_int4, quantize_int8
from tests.kernels.runs import Runs

MAKE_WEIGHT: dict[str, Callable[[F32], Weight]] = {
    "f32": lambda w: w,
    "bf16": f32_to_bf16,
    "int4": quantize_int4,
    "packed4": lambda w: pack(quantize_int4(w)),
    "packed8": lambda w: pack(quantize_int8(w)),
}


class Inputs:
    """Seeded float32 arrays, and weights of every kind made from them."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)

    def f32(self, *shape: int) -> F32:
        return self.rng.standard_normal(shape).astype(np.float32)

    def weight(self, kind: str, *shape: int) -> Weight:
        return MAKE_WEIGHT[kind](self.f32(*shape))


def assert_close(got: F32, want: F32, tolerance: float = 1e-5) -> None:
    """Equal within tolerance times the largest value wanted; no NaN anywhere."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype == np.float32
    assert np.isfinite(got).all()
    assert np.abs(got - want).max(initial=0) <= tolerance * max(np.abs(want).max(initial=0), 1e-30)


def paged_timelines(
    rows: Sequence[tuple[F32 | U16, F32 | U16]], starts: Sequence[int], limit: int
) -> Latents:
    """Timelines' rows c_kv [S, R] and k_pe [S, P] in blocks that lie in any order, and apart.

    The rows of a block beyond S are NaN: who reads them shows it. The memory lives as long as the
    result, as its attribute `memory`.
    """
    c_kv, k_pe = rows[0]
    (rank, p_dim), size, gap = (c_kv.shape[1], k_pe.shape[1]), c_kv.itemsize, 64
    k_pe_at = gap + BLOCK_TOKENS * rank * size
    block_bytes = k_pe_at + BLOCK_TOKENS * p_dim * size
    counts = [-(-len(own) // BLOCK_TOKENS) for own, _ in rows]
    memory = np.full((sum(counts), block_bytes), 0xFF, np.uint8)
    order = np.random.default_rng(1).permutation(sum(counts)).tolist()
    tables = [np.array([address(memory[order.pop()]) for _ in range(n)], np.int64) for n in counts]
    latents = Latents(
        tables=np.array([address(table) for table in tables], np.int64),
        starts=np.array(starts, np.int64), rows=limit, c_kv=gap, k_pe=k_pe_at, rank=rank,
        rope_dim=p_dim, dtype=c_kv.dtype.type,
    )  # fmt: skip
    object.__setattr__(latents, "memory", memory)
    object.__setattr__(latents, "own_tables", tables)
    for timeline, parts in enumerate(rows):
        for i in range(counts[timeline]):
            for view, part in zip(latents.block(timeline, i), parts, strict=True):
                here = part[i * BLOCK_TOKENS : (i + 1) * BLOCK_TOKENS]
                view[: len(here)] = here
    return latents


def paged(c_kv: F32 | U16, k_pe: F32 | U16, start: int) -> Latents:
    """One timeline."""
    return paged_timelines([(c_kv, k_pe)], [start], len(c_kv))


@pytest.fixture(scope="session", autouse=True)
def runs(request: pytest.FixtureRequest) -> Iterator[Runs]:
    """What the selected tests of `test_variants.py` wait for, begun before the first test."""
    asked = [getattr(item, "callspec", None) for item in request.session.items]
    runs = Runs([spec.params["run"] for spec in asked if spec and "run" in spec.params])
    yield runs
    runs.stop()


@pytest.fixture
def inputs() -> Inputs:
    return Inputs()


@pytest.fixture
def close() -> Callable[..., None]:
    return assert_close
