"""What both kernel implementations share: quantised activations, experts' and latents' places."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt

from kimi_cpu.quant import F32, U8, U16, Int4Weight, PackedWeight, Weight

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
#: Rows of latents: float32, or uint16 for bf16 bits.
Rows = npt.NDArray[Any]

#: "exact": float32 activations. "fast": int8 activations in groups of 32 for INT4 weights.
Precision = Literal["exact", "fast"]

#: gate, up and down projection of one expert: [I, D], [I, D], [D, I].
Expert = tuple[Weight, Weight, Weight]


#: int64 [], a number that recorded operations find in the same place when they are played again.
Position = npt.NDArray[np.int64]

#: Passes of up to so many tokens can be recorded, whatever experts they choose.
FEW_TOKENS = 16
#: Rows of latents that lie together: a block holds those of as many tokens, in all layers.
BLOCK_TOKENS = 256


@dataclass(frozen=True)
class Q8:
    """Activations quantised to int8 in groups of 32 along the last axis.

    Attributes:
        q: int8 [T, D], values in [-127, 127].
        scale: float32 [T, D / 32]; x is about q * scale.
    """

    q: npt.NDArray[np.int8]
    scale: F32


#: How a weight is stored, as the compiled kernels see it.
KIND_F32, KIND_BF16, KIND_INT4, KIND_PACKED4, KIND_PACKED8 = 0, 1, 2, 3, 4
#: Added to a kind of quantised weights: they are multiplied with int8 activations.
WITH_Q8 = 8


_BYTE: Any = ctypes.c_char


def weight_kind(w: Weight) -> int:
    """The KIND_* of a weight; TypeError for anything that the kernels do not take."""
    if isinstance(w, Int4Weight):
        return KIND_INT4
    if isinstance(w, PackedWeight):
        return KIND_PACKED4 if w.bits == 4 else KIND_PACKED8
    if w.dtype == np.uint16:
        return KIND_BF16
    if w.dtype == np.float32:
        return KIND_F32
    raise TypeError(f"a weight must be INT4, packed, bf16 bits (uint16) or float32, not {w.dtype}")


def address(array: npt.NDArray[np.generic]) -> int:
    """Address of the first element; the caller keeps the array alive and C-contiguous."""
    try:
        return ctypes.addressof(_BYTE.from_buffer(array))  # 4 times faster, if writable
    except (TypeError, ValueError, BufferError):
        return int(array.__array_interface__["data"][0])


def weight_addresses(w: Weight) -> tuple[int, int]:
    """(address of the values, address of the scales or 0); ValueError unless C-contiguous."""
    if isinstance(w, Int4Weight):
        if not (w.packed.flags.c_contiguous and w.scale.flags.c_contiguous):
            raise ValueError("an INT4 weight must be C-contiguous")
        return address(w.packed), address(w.scale)
    values: U8 | U16 | F32 = w.blocks if isinstance(w, PackedWeight) else w
    if not values.flags.c_contiguous:
        raise ValueError("a weight must be C-contiguous")
    return address(values), 0


@dataclass(frozen=True)
class Latents:
    """Where one layer's latents of B timelines lie, in blocks of BLOCK_TOKENS rows.

    Row r of a timeline is row r % BLOCK_TOKENS of its block r // BLOCK_TOKENS, whose address its
    table tells. Compiled code reads `tables` and `starts` when it runs, so a recorded pass serves
    any timeline. The caller keeps the memory alive and has blocks for all rows.

    Attributes:
        tables: int64 [B], address of each timeline's table: int64 addresses of its blocks.
        starts: int64 [B], rows of each timeline before the tokens at hand.
        rows: no timeline has more rows than this, the tokens at hand included.
        c_kv, k_pe: bytes from a block's address to this layer's c_kv [BLOCK_TOKENS, R] and
            k_pe [BLOCK_TOKENS, P].
        rank, rope_dim: R and P.
        dtype: of `Rows`.
    """

    tables: I64
    starts: I64
    rows: int
    c_kv: int
    k_pe: int
    rank: int
    rope_dim: int
    dtype: type[np.float32] | type[np.uint16] = np.float32

    def tokens_of(self, n: int) -> int:
        """How many of n tokens at hand each timeline has; ValueError if they do not fit."""
        n_timelines = len(self.starts)
        if n % n_timelines or int(self.starts.max()) + n // n_timelines > self.rows:
            raise ValueError(
                f"{n} tokens after rows {self.starts.tolist()} do not fit latents of "
                f"{self.rows} rows"
            )
        return n // n_timelines

    def later(self, tokens: int) -> Self:
        """The same, where so many of the tokens at hand are there already."""
        return replace(self, starts=self.starts + tokens)

    def block(self, timeline: int, i: int) -> tuple[Rows, Rows]:
        """Views of block i of a timeline: c_kv [BLOCK_TOKENS, R] and k_pe [BLOCK_TOKENS, P]."""
        at = ctypes.c_int64.from_address(int(self.tables[timeline]) + 8 * i).value
        places = ((at + self.c_kv, self.rank), (at + self.k_pe, self.rope_dim))
        c_kv, k_pe = (self._view(place, width) for place, width in places)
        return c_kv, k_pe

    def _view(self, at: int, width: int) -> Rows:
        n_bytes = BLOCK_TOKENS * width * np.dtype(self.dtype).itemsize
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(at))
        return memory.view(self.dtype).reshape(BLOCK_TOKENS, width)

    def gather(self, timeline: int, end: int) -> tuple[Rows, Rows]:
        """Copies of a timeline's first `end` rows: c_kv [end, R] and k_pe [end, P]."""
        c_kv = np.empty((end, self.rank), self.dtype)
        k_pe = np.empty((end, self.rope_dim), self.dtype)
        for first in range(0, end, BLOCK_TOKENS):
            part = slice(first, min(first + BLOCK_TOKENS, end))
            here, here_pe = self.block(timeline, first // BLOCK_TOKENS)
            c_kv[part], k_pe[part] = here[: end - first], here_pe[: end - first]
        return c_kv, k_pe


class ExpertSource(Protocol):
    """Where a layer's experts come from; what the engine's store offers of one layer.

    Attributes:
        scores, frequencies: float64 [E], numbers of its eviction policy.
        state: float64 [2], the weight of a use now, and the policy's age.
        counters: int64 [2], uses and hits so far.
        chosen: int32 [K], the last token's choice.
    """

    scores: F64
    frequencies: F64
    state: F64
    counters: I64
    chosen: I32

    def count(self, ids: I32) -> None:
        """A router chose these, int32 [T, K]."""

    def request(self, ids: Collection[int]) -> None:
        """They are needed next: begin to read what is missing; returns at once."""

    def arrived(self, ids: Sequence[int]) -> list[int]:
        """Those of `ids` that lie in the table by now; waits until it is at least one."""

    def sweep(self, ids: Collection[int]) -> Iterator[list[int]]:
        """All of `ids` by rising number in groups, each in the table while it is handed out."""

    def anticipate(self, ids: Sequence[int]) -> None:
        """The next layer may want these, best first."""


class AlwaysThere:
    """An `ExpertSource` for experts that lie in memory and stay there."""

    def __init__(self, n_experts: int, top_k: int) -> None:
        self.scores: F64 = np.zeros(n_experts)
        self.frequencies: F64 = np.zeros(n_experts)
        self.state: F64 = np.array([1.0, 0.0])
        self.counters: I64 = np.zeros(2, dtype=np.int64)
        self.chosen: I32 = np.zeros(top_k, dtype=np.int32)

    def count(self, ids: I32) -> None:
        pass

    def request(self, ids: Collection[int]) -> None:
        pass

    def arrived(self, ids: Sequence[int]) -> list[int]:
        return list(ids)

    def sweep(self, ids: Collection[int]) -> Iterator[list[int]]:
        yield sorted(ids)

    def anticipate(self, ids: Sequence[int]) -> None:
        pass


#: `ExpertTable.kinds` of an expert that is not there, and of one whose projections are stored in
#: different ways.
ABSENT, MIXED = -2, -1


class ExpertTable:
    """The routed experts of one layer that are in memory now.

    Keeps what compiled code needs, the addresses and kinds of every projection, and the Python
    references that keep the memory behind them alive.

    Attributes:
        source: brings experts here, and takes them away.
        width, hidden: gate and up projections are [width, hidden], down [hidden, width].
        addresses: int64 [E, 6], value and scale addresses of gate, up and down; meaningless
            where kinds is negative.
        kinds: int32 [E], the KIND_* that the three projections have in common, MIXED or ABSENT.
    """

    def __init__(self, source: ExpertSource, n_experts: int, width: int, hidden: int) -> None:
        self.source = source
        self.width = width
        self.hidden = hidden
        self._experts: list[Expert | None] = [None] * n_experts
        self.addresses: I64 = np.zeros((n_experts, 6), dtype=np.int64)
        self.kinds: I32 = np.full(n_experts, ABSENT, dtype=np.int32)

    @classmethod
    def of(cls, experts: Sequence[Expert], top_k: int = 1) -> Self:
        """A table of experts that stay in memory."""
        (width, hidden), n_experts = experts[0][0].shape, len(experts)
        table = cls(AlwaysThere(n_experts, top_k), n_experts, width, hidden)
        for e, weights in enumerate(experts):
            table.put(e, weights)
        return table

    def __len__(self) -> int:
        return len(self._experts)

    def __getitem__(self, e: int) -> Expert:
        """gate, up and down of an expert that is there; LookupError otherwise."""
        expert = self._experts[e]
        if expert is None:
            raise LookupError(f"expert {e} is not in memory")
        return expert

    def put(self, expert: int, weights: Expert) -> None:
        """This expert may be used from now on."""
        gate, up, down = weights
        wanted = (self.width, self.hidden)
        if gate.shape != wanted or up.shape != wanted or down.shape != wanted[::-1]:
            raise ValueError(
                f"expert {expert} has shapes {gate.shape}, {up.shape}, {down.shape} instead of "
                f"[{self.width}, {self.hidden}] and its transpose"
            )
        row = [*weight_addresses(gate), *weight_addresses(up), *weight_addresses(down)]
        kinds = {weight_kind(w) for w in weights}
        self._experts[expert] = weights
        self.addresses[expert] = row
        self.kinds[expert] = kinds.pop() if len(kinds) == 1 else MIXED

    def take(self, expert: int) -> None:
        """This expert may not be used any more."""
        self.kinds[expert] = ABSENT
        self._experts[expert] = None
