"""The latent cache of MLA: kv_lora_rank + qk_rope_head_dim numbers a token and layer.

Never per-head keys and values: for Kimi K2 that is 576 numbers instead of 20,480. `c_kv` is
stored after its norm and `k_pe` after its rotation, so a cached row is never touched again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kimi_cpu.config import ModelConfig
from kimi_cpu.errors import ContextError
from kimi_cpu.quant import F32

_FIRST_CAPACITY = 256


@dataclass(frozen=True)
class CacheSnapshot:
    """A copy of the first `length` rows: c_kv [L, length, R] and k_pe [L, length, P]."""

    length: int
    c_kv: F32
    k_pe: F32

    @property
    def nbytes(self) -> int:
        return self.c_kv.nbytes + self.k_pe.nbytes


class LatentCache:
    """Latents of one timeline, float32, for all layers; grows by doubling up to the context.

    bf16 would halve it, but rounding the rotated keys alone takes fast precision from 0.9e-3 to
    2.9e-3 nats of KL on the nano model (bench/LOG.md); the kernels read either.

    Args:
        config: the model's shape.

    Rows up to `length` are valid. A forward pass writes the rows of its tokens layer by layer
    and calls `advance` once all layers are done, so an interrupted pass leaves no trace.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.length = 0
        self.generation = 0  # counts how often the memory moved
        self._max_length = config.max_position_embeddings
        layers, rank, rope = (
            config.num_hidden_layers,
            config.kv_lora_rank,
            config.qk_rope_head_dim,
        )
        self._c_kv: F32 = np.empty((layers, 0, rank), dtype=np.float32)
        self._k_pe: F32 = np.empty((layers, 0, rope), dtype=np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes allocated now."""
        return self._c_kv.nbytes + self._k_pe.nbytes

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more rows.

        Raises:
            ContextError: the model's context or this machine's memory is too small for them.
        """
        needed = self.length + tokens
        if needed > self._max_length:
            raise ContextError(
                f"{needed:,} tokens do not fit the model's context of {self._max_length:,}",
                "start a new conversation, shorten the prompt or lower --max-tokens",
            )
        capacity = self._c_kv.shape[1]
        if needed <= capacity:
            return
        capacity = min(max(2 * capacity, needed, _FIRST_CAPACITY), self._max_length)
        self.generation += 1
        try:
            self._c_kv = self._grown(self._c_kv, capacity)
            self._k_pe = self._grown(self._k_pe, capacity)
        except MemoryError as error:
            raise ContextError(
                f"no memory for a latent cache of {capacity:,} tokens",
                "start a new conversation or close other programs",
            ) from error

    def _grown(self, old: F32, capacity: int) -> F32:
        new = np.empty((old.shape[0], capacity, old.shape[2]), dtype=old.dtype)
        new[:, : self.length] = old[:, : self.length]
        return new

    def rows(self, layer: int) -> tuple[F32, F32]:
        """A layer's memory: c_kv [capacity, R] and k_pe [capacity, P].

        Rows from `length` on are where a pass stores its tokens; `reserve` may move the memory,
        which `generation` then tells.
        """
        return self._c_kv[layer], self._k_pe[layer]

    def advance(self, tokens: int) -> None:
        """The rows of `tokens` more tokens are now complete in every layer."""
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget all rows from `length` on."""
        assert 0 <= length <= self.length
        self.length = length

    def snapshot(self) -> CacheSnapshot:
        """Copy the valid rows."""
        return CacheSnapshot(
            self.length,
            self._c_kv[:, : self.length].copy(),
            self._k_pe[:, : self.length].copy(),
        )

    def restore(self, snapshot: CacheSnapshot) -> None:
        """Become what `snapshot` was, whatever happened since."""
        self.length = 0
        self.reserve(snapshot.length)
        self._c_kv[:, : snapshot.length] = snapshot.c_kv
        self._k_pe[:, : snapshot.length] = snapshot.k_pe
        self.length = snapshot.length
