"""Blocks of latents in memory: a tree over tokens' keys, and which of them to let go.

A node is the tokens of one block, after those of its parents. Nodes of BLOCK_TOKENS tokens may
have children; shorter ones are the ends of timelines. Timelines that begin alike share nodes, and
with them memory.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from kimi_cpu.kernels.common import BLOCK_TOKENS, I32
from kimi_cpu.kv_cache import Block
from kimi_cpu.prefixes.blockfile import BlockName

#: Whatever was used within so many requests yields only to timelines at least half as long.
PROTECTED_REQUESTS = 32


def common_length(a: I32, b: I32) -> int:
    """How many of the first numbers are equal."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


class Node:
    """Some tokens and their latents.

    Attributes:
        tokens: bytes of int32 [1 .. BLOCK_TOKENS].
        end: number of tokens of the timelines up to here.
        used: the request that needed it last.
        offered: whether it was given to the disk while there was time.
    """

    __slots__ = ("block", "children", "end", "name", "offered", "parent", "tokens", "used")

    def __init__(self, parent: Node | None, tokens: bytes, name: BlockName, block: Block | None):
        self.parent = parent
        self.tokens = tokens
        self.name = name
        self.block = block
        self.children: dict[bytes, Node] = {}
        self.end: int = (parent.end if parent else 0) + name.n_tokens
        self.used = 0
        self.offered = False

    def common(self, ids: I32) -> int:
        """How many of `ids` this node begins with."""
        return common_length(np.frombuffer(self.tokens, np.int32), ids)

    def path(self) -> list[Node]:
        """From the first block to this one."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class Tree:
    """All nodes in memory. `root` is the digest of no tokens."""

    def __init__(self, root: bytes) -> None:
        self.root = Node(None, b"", BlockName(b"", root, 0), None)
        self.n_blocks = 0

    def descend(self, ids: I32) -> Node:
        """The last node whose tokens are all a prefix of `ids`; the root if there is none."""
        node = self.root
        while (child := node.children.get(ids[node.end :][:BLOCK_TOKENS].tobytes())) is not None:
            node = child
            if node.name.n_tokens < BLOCK_TOKENS:
                break
        return node

    def best_child(self, node: Node, ids: I32) -> tuple[Node | None, int]:
        """The child that has most of the next `ids` in common, and how many."""
        best, most = None, 0
        for child in node.children.values():
            common = child.common(ids[node.end :])
            if common > most or (best and common == most and child.used > best.used):
                best, most = child, common
        return best, most

    def add(self, node: Node, tokens: bytes, block: Block) -> Node:
        """A child of `node`, or the one there is that holds these tokens; its block is shared.

        Children that are its beginning, and no more, are removed.
        """
        child = node.children.get(tokens)
        if child is not None:
            return child
        n_tokens = len(tokens) // 4
        for other, there in list(node.children.items()):
            if n_tokens < BLOCK_TOKENS and other.startswith(tokens):
                return there
            if len(other) < len(tokens) and tokens.startswith(other):
                self.remove(there)
        child = Node(node, tokens, BlockName.of(node.name.own, tokens), block)
        block.pool.share([block])
        node.children[tokens] = child
        self.n_blocks += 1
        return child

    def remove(self, node: Node) -> None:
        """Forget a node without children, and what it holds."""
        assert node.parent is not None and node.block is not None and not node.children
        del node.parent.children[node.tokens]
        self.n_blocks -= 1
        node.block.pool.drop([node.block])

    def nodes(self) -> Iterator[Node]:
        """All, parents before their children."""
        stack = [self.root]
        while stack:
            node = stack.pop()
            if node.parent is not None:
                yield node
            stack.extend(node.children.values())

    def surplus(
        self, limit: int, newcomer: Node, request: int, pinned: Collection[Node]
    ) -> Iterator[Node]:
        """Nodes without children to be removed until `limit` are left, one by one.

        The least recently used one comes first. A timeline that was used within the last
        PROTECTED_REQUESTS does not yield to a newcomer less than half as long: the newcomer's own
        end goes instead. Pinned nodes stay.
        """
        if self.n_blocks <= limit:
            return
        own = set(newcomer.path())
        heap = [self._order(node, own) for node in self.nodes() if not node.children]
        heapq.heapify(heap)
        while self.n_blocks > limit and heap:
            *_, node = heapq.heappop(heap)
            recent = request - node.used < PROTECTED_REQUESTS
            if node in pinned:
                continue
            if node not in own and recent and newcomer.end < node.end // 2:
                continue
            parent = node.parent
            yield node
            assert parent is not None
            if parent.parent is not None and not parent.children:
                heapq.heappush(heap, self._order(parent, own))

    @staticmethod
    def _order(node: Node, own: Collection[Node]) -> tuple[bool, int, int, int, Node]:
        return node in own, node.used, -node.end, id(node), node

    def insert(self, ids: I32, blocks: Sequence[Block], request: int) -> Node:
        """Add a timeline's tokens and blocks; its last node."""
        node = self.root
        for i, block in enumerate(blocks):
            tokens = ids[i * BLOCK_TOKENS : (i + 1) * BLOCK_TOKENS].tobytes()
            node = self.add(node, tokens, block)
        self.touch(node, request)
        return node

    def touch(self, node: Node, request: int) -> None:
        """Note that a request needs these tokens."""
        for each in node.path():
            each.used = request
