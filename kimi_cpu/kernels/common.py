"""What both kernel implementations share: quantised activations, experts' and latents' places."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kimi_cpu.quant import F32, U8, U16, Int4Weight, PackedWeight, Weight

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
#: Rows of latents: float32, or uint16 for bf16 bits.
Rows = npt.NDArray[Any]

#: "exact": float32 activations. "fast": int8 activations in groups of 32 for INT4 weights.
Precision = Literal["exact", "fast"]

#: gate, up and down projection of one expert: [I, D], [I, D], [D, I].
Expert = tuple[Weight, Weight, Weight]


#: int64 [], a number that recorded operations find in the same place when they are played again.
Position = npt.NDArray[np.int64]

#: Rows of latents that lie together: a block holds those of as many tokens, in all layers.
BLOCK_TOKENS = 256


class CannotReplay(Exception):
    """A recorded pass met something that only the plain way can compute."""


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


class ExpertTable:
    """The routed experts of one layer, each loaded (and validated) when first chosen.

    Keeps what compiled code needs, the addresses and kinds of every loaded projection, and the
    Python references that keep the memory behind them alive.
    """

    def __init__(self, load: Callable[[int], Expert], n_experts: int, width: int) -> None:
        """`load(e)` returns the validated gate, up and down weights of expert e.

        width: rows of every gate and up projection (moe_intermediate_size).
        """
        self._load = load
        self.width = width
        self._experts: list[Expert | None] = [None] * n_experts
        #: int64 [E, 6]: value and scale addresses of gate, up and down; 0 before the first use,
        #: and for an expert whose projections are stored in different ways.
        self.addresses: I64 = np.zeros((n_experts, 6), dtype=np.int64)
        #: KIND_* shared by the expert's three projections, -1 if they differ, -2 if not loaded.
        self.kinds: I32 = np.full(n_experts, -2, dtype=np.int32)

    def __len__(self) -> int:
        return len(self._experts)

    def __getitem__(self, e: int) -> Expert:
        expert = self._experts[e]
        return expert if expert is not None else self._first_use(e)

    def _first_use(self, e: int) -> Expert:
        gate, up, down = self._load(e)
        if gate.shape != up.shape or gate.shape != down.shape[::-1]:
            raise ValueError(f"expert {e}: shapes {gate.shape}, {up.shape}, {down.shape}")
        if gate.shape[0] != self.width:
            raise ValueError(f"expert {e} has {gate.shape[0]} rows instead of {self.width}")
        row = [*weight_addresses(gate), *weight_addresses(up), *weight_addresses(down)]
        kinds = {weight_kind(gate), weight_kind(up), weight_kind(down)}
        if len(kinds) == 1:
            self.kinds[e] = kinds.pop()
            self.addresses[e] = row
        else:  # compiled code cannot compute it as one
            self.kinds[e] = -1
        self._experts[e] = (gate, up, down)
        return gate, up, down
