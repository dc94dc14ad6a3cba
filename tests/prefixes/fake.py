"""An engine whose latents tell the tokens before them, so that a wrong one shows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kimi_cpu.config import ModelConfig
from kimi_cpu.engine import SessionSnapshot
from kimi_cpu.kernels import reference
from kimi_cpu.kernels.common import I32
from kimi_cpu.kv_cache import BlockPool, LatentCache
from kimi_cpu.quant import F32


def marks(tokens: Sequence[int]) -> F32:
    """A number for each token that depends on all up to it, [T]."""
    digest, found = hashlib.blake2b(digest_size=4), []
    for token in tokens:
        digest.update(token.to_bytes(4, "little"))
        found.append(int.from_bytes(digest.copy().digest()[:3], "little"))  # exact as float32
    return np.array(found, np.float32)


class FakeSession:
    """As `engine.Session`, as far as the cache of prefixes goes."""

    def __init__(self, engine: FakeEngine) -> None:
        self._config = engine.config
        self._cache = LatentCache(engine.config, engine.pool)
        self.tokens: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    def snapshot(self) -> SessionSnapshot:
        return SessionSnapshot(self.tokens, self._cache.branch(len(self)), None)

    def restore(self, snapshot: SessionSnapshot) -> None:
        self._cache.take_over(snapshot.cache)
        self.tokens = snapshot.keys

    def sync(self, ids: Sequence[int]) -> None:
        """Compute what is missing."""
        keep = 0
        while keep < min(len(self), len(ids)) and self.tokens[keep] == ids[keep]:
            keep += 1
        self._cache.truncate(keep)
        if keep < len(ids):
            self._store(marks(ids)[keep:])
        self.tokens = tuple(ids)

    def _store(self, new: F32) -> None:
        cache = self._cache
        cache.reserve(len(new))
        tables, starts = np.array([cache.table_address]), np.array([cache.length])
        for layer in range(cache.pool.layers):
            latents = cache.pool.latents(layer, tables, starts, cache.length + len(new))
            c_kv = np.repeat(new[:, None], cache.pool.rank, axis=1) + layer
            k_pe = np.repeat(new[:, None], cache.pool.rope_dim, axis=1) - layer
            reference.store_latents(c_kv, k_pe, latents)
        cache.advance(len(new))

    def check(self) -> None:
        """All latents are those of the tokens."""
        cache, want = self._cache, marks(self.tokens)
        assert cache.length == len(self)
        tables, starts = np.array([cache.table_address]), np.array([cache.length])
        for layer in range(cache.pool.layers):
            latents = cache.pool.latents(layer, tables, starts, cache.length)
            c_kv, k_pe = latents.gather(0, cache.length)
            assert (c_kv == want[:, None] + layer).all() and (k_pe == want[:, None] - layer).all()


class FakeEngine:
    """Small blocks (2 layers of 6 numbers), a large vocabulary."""

    precision = "exact"
    kernels_name = "fake"

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.folder = folder
        self.config = config
        self.pool = BlockPool(config)

    def session(self) -> FakeSession:
        return FakeSession(self)

    @staticmethod
    def keys(ids: Sequence[int]) -> I32:
        """Its tokens are computed in one form only."""
        return np.array(ids, np.int32)
