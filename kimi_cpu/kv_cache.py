"""The latent cache of MLA: kv_lora_rank + qk_rope_head_dim numbers a token and layer.

Never per-head keys and values: for Kimi K2 that is 576 numbers instead of 20,480. `c_kv` is
stored after its norm and `k_pe` after its rotation, so a cached row is never touched again. Hence
timelines that begin alike can share it: rows lie in blocks of BLOCK_TOKENS tokens, all layers of a
block in one piece of memory, and a timeline is a list of blocks. A block that several timelines
list is not written to; whoever wants to gets a copy first.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

import numpy as np

from kimi_cpu.config import ModelConfig
from kimi_cpu.errors import ContextError
from kimi_cpu.kernels.common import BLOCK_TOKENS, I64, Latents, address
from kimi_cpu.quant import F32, U8

#: Blocks without a user that a pool keeps for the next one; others go back to the system.
_SPARE_BLOCKS = 4


class Block:
    """Latents of BLOCK_TOKENS tokens in all layers, float32.

    Attributes:
        memory: uint8, for each layer c_kv [BLOCK_TOKENS, R] and then k_pe [BLOCK_TOKENS, P].
        address: of the memory, a multiple of 64.
        users: how many timelines list this block; only the pool changes it.
    """

    __slots__ = ("_owner", "address", "memory", "pool", "users")

    def __init__(self, pool: BlockPool) -> None:
        self._owner = np.empty(pool.block_bytes + 64, dtype=np.uint8)
        skip = -address(self._owner) % 64
        self.memory: U8 = self._owner[skip : skip + pool.block_bytes]
        self.address = address(self.memory)
        self.pool = pool
        self.users = 1

    def parts(self, n_rows: int) -> tuple[F32, F32]:
        """The first rows of all layers: views c_kv [L, n_rows, R] and k_pe [L, n_rows, P]."""
        pool = self.pool
        layers = self.memory.view(np.float32).reshape(pool.layers, -1)
        border = BLOCK_TOKENS * pool.rank
        c_kv = layers[:, :border].reshape(pool.layers, BLOCK_TOKENS, pool.rank)
        k_pe = layers[:, border:].reshape(pool.layers, BLOCK_TOKENS, pool.rope_dim)
        return c_kv[:, :n_rows], k_pe[:, :n_rows]

    def dump(self, n_rows: int) -> U8:
        """Bytes of the first rows: for each layer c_kv [n_rows, R] and then k_pe [n_rows, P].

        A view of the memory, as it is, if they are all.
        """
        if n_rows == BLOCK_TOKENS:
            return self.memory
        rows = [part.reshape(self.pool.layers, -1) for part in self.parts(n_rows)]
        return np.concatenate(rows, axis=1).view(np.uint8).ravel()

    def fill(self, data: U8, n_rows: int) -> None:
        """Take over what `dump` gave."""
        layers = data.view(np.float32).reshape(self.pool.layers, -1)
        border = n_rows * self.pool.rank
        c_kv, k_pe = self.parts(n_rows)
        c_kv[:] = layers[:, :border].reshape(c_kv.shape)
        k_pe[:] = layers[:, border:].reshape(k_pe.shape)


class BlockPool:
    """The blocks of one model: hands them out and counts who uses them.

    Any thread may call any method. A timeline that is garbage leaves its blocks in `_returned`,
    which takes no lock, as a collection may begin anywhere; the next caller puts them away.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.layers = config.num_hidden_layers
        self.rank, self.rope_dim = config.kv_lora_rank, config.qk_rope_head_dim
        self.row_bytes = 4 * (self.rank + self.rope_dim)
        self.block_bytes = self.layers * BLOCK_TOKENS * self.row_bytes
        self._spare: list[Block] = []
        self._used_blocks = 0
        self._returned: deque[list[Block]] = deque()
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        """Bytes of all blocks that timelines use; shared ones count once."""
        with self._lock:
            self._collect()
            return self._used_blocks * self.block_bytes

    def take(self) -> Block:
        """A block with one user, its contents undefined; MemoryError if there is no memory."""
        with self._lock:
            self._collect()
            block = self._spare.pop() if self._spare else Block(self)
            block.users = 1
            self._used_blocks += 1
            return block

    def share(self, blocks: Sequence[Block]) -> None:
        """One more timeline lists these blocks."""
        with self._lock:
            self._collect()
            for block in blocks:
                block.users += 1

    def drop(self, blocks: Sequence[Block]) -> None:
        """One timeline less lists these blocks."""
        with self._lock:
            self._collect()
            self._release(blocks)

    def leave(self, blocks: list[Block]) -> None:
        """As `drop`, some time; may be called while this thread holds the lock."""
        self._returned.append(blocks)

    def latents(self, layer: int, tables: I64, starts: I64, rows: int) -> Latents:
        """Where a layer's latents of the timelines with these tables lie, for the kernels."""
        c_kv = layer * BLOCK_TOKENS * self.row_bytes
        k_pe = c_kv + BLOCK_TOKENS * self.rank * 4
        return Latents(tables, starts, rows, c_kv, k_pe, self.rank, self.rope_dim)

    def _collect(self) -> None:
        while self._returned:
            self._release(self._returned.popleft())

    def _release(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            block.users -= 1
            if block.users == 0:
                self._used_blocks -= 1
                if len(self._spare) < _SPARE_BLOCKS:
                    self._spare.append(block)


class LatentCache:
    """Latents of one timeline, float32, for all layers: a list of blocks.

    bf16 would halve it, but rounding the rotated keys alone takes fast precision from 0.9e-3 to
    2.9e-3 nats of KL on the nano model (bench/LOG.md); the kernels read either.

    Args:
        config: the model's shape.
        pool: where blocks come from; timelines with the same pool can share them.

    Rows up to `length` are valid. A forward pass writes the rows of its tokens layer by layer
    and calls `advance` once all layers are done, so an interrupted pass leaves no trace.

    Attributes:
        length: rows that are valid in every layer.
        table_address: of int64 addresses of the blocks, room for the whole context; it stays.
    """

    def __init__(self, config: ModelConfig, pool: BlockPool | None = None) -> None:
        self.length = 0
        self.pool = pool or BlockPool(config)
        self._config = config
        self._blocks: list[Block] = []
        self._table: I64 = np.zeros(
            -(-config.max_position_embeddings // BLOCK_TOKENS), dtype=np.int64
        )
        self.table_address = address(self._table)

    def __del__(self) -> None:
        self.pool.leave(self._blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks that this timeline lists, those it shares included."""
        return len(self._blocks) * self.pool.block_bytes

    @property
    def shared_nbytes(self) -> int:
        """Those of `nbytes` that other timelines list as well."""
        return sum(block.users > 1 for block in self._blocks) * self.pool.block_bytes

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Where the rows lie."""
        return tuple(self._blocks)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more rows, in blocks that nobody else reads.

        Raises:
            ContextError: the model's context or this machine's memory is too small for them; the
                valid rows are as before.
        """
        needed, limit = self.length + tokens, self._config.max_position_embeddings
        if needed > limit:
            raise ContextError(
                f"{needed:,} tokens do not fit the model's context of {limit:,}",
                "start a new conversation, shorten the prompt or lower --max-tokens",
            )
        try:
            last = self.length // BLOCK_TOKENS
            if last < len(self._blocks):
                if self._blocks[last].users > 1:
                    self._own(last)
                self._table[last] = self._blocks[last].address  # `_own` may have been interrupted
            while len(self._blocks) * BLOCK_TOKENS < needed:
                self._list(self.pool.take())
        except MemoryError as error:
            self.truncate(self.length)
            raise ContextError(
                f"no memory for the latents of {needed:,} tokens",
                "start a new conversation or close other programs",
            ) from error

    def _list(self, block: Block) -> None:
        self._table[len(self._blocks)] = block.address
        self._blocks.append(block)

    def _own(self, i: int) -> None:
        """Replace block i, the last with valid rows, by a copy of them."""
        old = self._blocks[i]
        self._blocks[i] = self._copy(old, self.length - i * BLOCK_TOKENS)
        self.pool.drop([old])

    def _copy(self, block: Block, n_rows: int) -> Block:
        copy = self.pool.take()
        for ours, theirs in zip(copy.parts(n_rows), block.parts(n_rows), strict=True):
            ours[:] = theirs
        return copy

    def advance(self, tokens: int) -> None:
        """The rows of `tokens` more tokens are now complete in every layer."""
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget all rows from `length` on, and the blocks that hold nothing else."""
        assert 0 <= length <= self.length
        self.length = length
        keep = -(-length // BLOCK_TOKENS)
        if keep < len(self._blocks):
            dropped = self._blocks[keep:]
            del self._blocks[keep:]
            self.pool.drop(dropped)

    def branch(self, length: int | None = None) -> LatentCache:
        """Another timeline that begins with the first `length` rows (all), without copying them.

        Only where both go on inside the same block, the first to do so copies its rows.
        """
        length = self.length if length is None else length
        assert 0 <= length <= self.length
        other = LatentCache(self._config, self.pool)
        other.take_over(self, length)
        return other

    def take_over(self, other: LatentCache, length: int | None = None) -> None:
        """Become a branch of `other`; if that has another pool (of the same shape), by copying."""
        length = other.length if length is None else length
        blocks = other._blocks[: -(-length // BLOCK_TOKENS)]
        if other.pool is not self.pool:
            copies = [
                self._copy(block, min(length - i * BLOCK_TOKENS, BLOCK_TOKENS))
                for i, block in enumerate(blocks)
            ]
            self.consist_of(copies, length)
            self.pool.drop(copies)
        else:
            self.consist_of(blocks, length)

    def consist_of(self, blocks: Sequence[Block], length: int) -> None:
        """Become the first `length` rows in these blocks of the own pool, sharing them."""
        assert -(-length // BLOCK_TOKENS) == len(blocks)
        self.pool.share(blocks)
        self.truncate(0)
        for block in blocks:
            self._list(block)
        self.length = length
