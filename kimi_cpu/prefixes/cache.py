"""Sessions that begin with what is known, and what becomes of what they computed."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np

from kimi_cpu.engine import Engine, Session, SessionSnapshot
from kimi_cpu.kernels.common import BLOCK_TOKENS, I32
from kimi_cpu.kv_cache import Block, BlockPool
from kimi_cpu.prefixes.blockfile import BlockName
from kimi_cpu.prefixes.disk import BlockStore
from kimi_cpu.prefixes.identity import model_key
from kimi_cpu.prefixes.tree import Node, Tree, common_length
from kimi_cpu.quant import F32

#: Fewer tokens than this are computed faster than their block is read.
WORTH_READING = 16
#: Prompts whose last logits are kept, 0.65 MB each for Kimi K2.
KEPT_LOGITS = 16


class PrefixCache:
    """Latents of earlier sessions, in memory and on disk.

    Args:
        engine: whose sessions they are.
        budget_bytes: of memory. Running sessions are beyond it: what they share with the cache
            stays while they do.
        folder: what memory has no room for, and all at the end, is kept here, and found again by
            another process with the same model; None for nowhere.
        folder_bytes: what may lie there, of all models.

    Raises:
        UsageError: the folder cannot be used.
    """

    def __init__(
        self, engine: Engine, budget_bytes: int, *, folder: Path | None = None,
        folder_bytes: int = 0,
    ) -> None:  # fmt: skip
        key = model_key(engine)
        self._engine = engine
        self._budget_bytes = budget_bytes
        self._tree = Tree(key)
        self._disk = None if folder is None else BlockStore(folder, key, folder_bytes)
        self._block_bytes = BlockPool(engine.config).block_bytes
        self._taken: WeakKeyDictionary[Session, Node] = WeakKeyDictionary()
        self._logits: OrderedDict[bytes, F32] = OrderedDict()  # by the digest of a prompt's keys
        self._request = 0
        self._lock = threading.RLock()

    @property
    def nbytes(self) -> int:
        """Bytes of memory that are kept."""
        with self._lock:
            logits = sum(row.nbytes for row in self._logits.values())
        return self._tree.n_blocks * self._block_bytes + logits

    @property
    def disk_nbytes(self) -> int:
        """Bytes of files."""
        return 0 if self._disk is None else self._disk.nbytes

    def common_prefix(self, ids: Sequence[int]) -> int:
        """How many of `ids` memory has computed; the disk may have more."""
        with self._lock:
            keys = self._engine.keys(ids)
            node = self._tree.descend(keys)
            return node.end + self._tree.best_child(node, keys)[1]

    def take(self, ids: Sequence[int]) -> Session:
        """A new session that begins with the longest known prefix of `ids`.

        It shares the latents; nothing is taken away from anybody. Ids outside the vocabulary are
        known to nobody. Of a prompt that `keep_logits` has seen nothing is left to compute.
        """
        tokens = np.array(ids, dtype=np.int64)
        out_of_range = np.flatnonzero((tokens < 0) | (tokens >= self._engine.config.vocab_size))
        if len(out_of_range):
            tokens = tokens[: out_of_range[0]]
        keys = self._engine.keys(tokens)
        with self._lock:
            self._request += 1
            session = self._engine.session()
            snapshot = session.snapshot()
            node, more = self._longest(keys, snapshot.cache.pool)
            length = node.end - node.name.n_tokens + more if more else node.end
            if not length:
                return session
            blocks = [each.block for each in node.path() if each.block is not None]
            snapshot.cache.consist_of(blocks, length)
            known = tuple(keys[:length].tolist())
            logits = self._logits.get(_digest(keys)) if length == len(ids) else None
            session.restore(SessionSnapshot(known, snapshot.cache, logits))
            self._tree.touch(node, self._request)
            self._taken[session] = node
            self._make_room(node)
            return session

    def share(self, session: Session) -> None:
        """Let others begin with the whole blocks that a session has computed; it may go on."""
        with self._lock:
            snapshot = session.snapshot()
            n_blocks = len(snapshot.keys) // BLOCK_TOKENS
            if not n_blocks:
                return
            keys = np.array(snapshot.keys[: n_blocks * BLOCK_TOKENS], dtype=np.int32)
            node = self._tree.insert(keys, snapshot.cache.blocks[:n_blocks], self._request)
            self._taken[session] = node
            del snapshot
            self._make_room(node)

    def keep_logits(self, session: Session) -> None:
        """Whoever comes with a session's timeline as a prompt shall not compute its last token.

        That is more than the time of a token where attention is expanded (`attention_form`).
        """
        snapshot = session.snapshot()
        if snapshot.logits is None:
            return
        with self._lock:
            digest = _digest(np.array(snapshot.keys, dtype=np.int32))
            self._logits[digest] = snapshot.logits
            self._logits.move_to_end(digest)
            while len(self._logits) > KEPT_LOGITS:
                self._logits.popitem(last=False)

    def give_back(self, session: Session) -> None:
        """Keep what a session has computed; it should not be used afterwards."""
        with self._lock:
            self._request += 1
            self._taken.pop(session, None)
            snapshot = session.snapshot()
            if not snapshot.keys:
                return
            keys = np.array(snapshot.keys, dtype=np.int32)
            node = self._tree.insert(keys, snapshot.cache.blocks, self._request)
            del snapshot
            self._make_room(node)

    def clear(self) -> None:
        """Forget what is in memory."""
        with self._lock:
            self._logits.clear()
            for node in reversed(list(self._tree.nodes())):
                self._tree.remove(node)

    def save(self, deadline_s: float) -> bool:
        """Write all that is not on disk, for so long; whether that was enough."""
        deadline = time.monotonic() + deadline_s
        disk = self._disk
        if disk is None:
            return True
        with self._lock:
            nodes = sorted(self._tree.nodes(), key=lambda node: (-node.used, node.end))
            for node in nodes:
                if disk.has(node.name):
                    continue
                if not disk.room(deadline):
                    return False
                assert node.block is not None
                disk.save(node.name, node.tokens, node.block)
        return disk.wait(deadline)

    def save_some(self) -> bool:
        """Offer the disk a few blocks without waiting for it; False when there are no more.

        For idle moments: each block is offered once, so that a folder that has no room for all of
        them is not written over and over.
        """
        if self._disk is None:
            return False
        with self._lock:
            nodes = sorted(self._tree.nodes(), key=lambda node: (-node.used, node.end))
            for node in nodes:
                if node.offered or self._disk.has(node.name):
                    continue
                if not self._disk.room(time.monotonic()):
                    return True
                assert node.block is not None
                self._disk.save(node.name, node.tokens, node.block)
                node.offered = True
        return False

    def close(self, deadline_s: float = 10.0) -> None:
        """Keep what can be written within the deadline, and forget what is in memory."""
        self.save(deadline_s)
        if self._disk is not None:
            self._disk.close()
        self.clear()

    def _longest(self, ids: I32, pool: BlockPool) -> tuple[Node, int]:
        """The last node of the longest prefix, and how many of its tokens, 0 for all.

        Blocks that only the disk has are read into the tree.
        """
        node = self._tree.descend(ids)
        read: list[BlockName] = []
        while self._disk is not None and len(ids) - node.end >= BLOCK_TOKENS:
            tokens = ids[node.end : node.end + BLOCK_TOKENS].tobytes()
            name = BlockName.of(node.name.own, tokens)
            if not self._disk.exists(name):
                break
            child = self._read(node, name, tokens, pool)
            if child is None:
                break
            read.append(name)
            node = child
        child, most = self._tree.best_child(node, ids)
        on_disk = self._best_on_disk(node, ids, max(most, WORTH_READING - 1))
        if on_disk is not None:
            name, tokens, common = on_disk
            found = self._read(node, name, tokens, pool)
            if found is not None:
                read.append(name)
                child, most = found, common
        if self._disk is not None and read:
            self._disk.touch([*read[-1:], *(each.name for each in node.path()[::-1])])
        if child is None:
            return node, 0
        return child, most if most < child.name.n_tokens else 0

    def _best_on_disk(self, node: Node, ids: I32, most: int) -> tuple[BlockName, bytes, int] | None:
        """A block on disk that has more than `most` of the tokens after `node` in common."""
        best, rest = None, ids[node.end : node.end + BLOCK_TOKENS]
        if self._disk is None or len(rest) <= most:
            return None
        there = {child.name.own for child in node.children.values()}
        for name in self._disk.children(node.name.own):
            if name.own in there or name.n_tokens <= most:
                continue
            tokens = self._disk.tokens(name)
            if tokens is None:
                continue
            common = common_length(np.frombuffer(tokens, np.int32), rest)
            if common > most:
                best, most = (name, tokens, common), common
        return best

    def _read(self, node: Node, name: BlockName, tokens: bytes, pool: BlockPool) -> Node | None:
        assert self._disk is not None
        block: Block | None = self._disk.load(name, pool)
        if block is None:
            return None
        child = self._tree.add(node, tokens, block)
        pool.drop([block])
        return child

    def _make_room(self, newcomer: Node) -> None:
        pinned = set(self._taken.values())
        limit = self._budget_bytes // self._block_bytes
        for node in self._tree.surplus(limit, newcomer, self._request, pinned):
            if self._disk is not None:
                assert node.block is not None
                if self._disk.has(node.name):
                    self._disk.touch([node.name])
                else:
                    self._disk.save(node.name, node.tokens, node.block)
            self._tree.remove(node)


def _digest(keys: I32) -> bytes:
    return hashlib.blake2b(keys.tobytes(), digest_size=16).digest()
