"""What stays computed between requests: sessions, found by their longest common prefix.

The scheduler takes a session for a prompt and gives it back when the reply has ended; both happen
in the inference thread.
"""

from __future__ import annotations

from collections.abc import Sequence

from kimi_cpu.engine import Engine, Session

#: A loss of so few tokens is always worth a match.
SMALL_LOSS = 512


class Prefixes:
    """The sessions of the last conversations, within a budget of bytes."""

    def __init__(self, engine: Engine, budget_bytes: int) -> None:
        self._engine = engine
        self._budget_bytes = budget_bytes
        self._idle: list[Session] = []  # the one used last comes last

    @property
    def nbytes(self) -> int:
        """Latents of the sessions that nobody is using."""
        return sum(session.cache_bytes for session in self._idle)

    def take(self, ids: Sequence[int]) -> Session:
        """The session that has most of `ids` computed, or a new one; the caller owns it.

        A session that would lose more than it saves is left alone: a short request that shares
        only the system prompt does not destroy a conversation.
        """
        best, most = None, 0
        for session in self._idle:
            common = session.common_prefix(ids)
            lost = len(session) - common
            if common and common >= most and lost <= max(common, SMALL_LOSS):
                best, most = session, common
        if best is None:
            return self._engine.session()
        self._idle.remove(best)
        return best

    def give_back(self, session: Session) -> None:
        """Keep it for the next request, forgetting the longest unused ones if need be."""
        if not len(session):
            return
        self._idle.append(session)
        while self._idle and self.nbytes > self._budget_bytes:
            self._idle.pop(0)

    def clear(self) -> None:
        """Forget all."""
        self._idle.clear()
