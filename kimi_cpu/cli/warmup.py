"""Computes what is known of the next prompt while the user types it.

After a reply the template leaves its reasoning out, so the answer has to be read again, and a new
conversation begins with the system message and the tools. Both are known before the next message
is; computed meanwhile, they cost the user no wait. It also loads or compiles the kernels.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kimi_cpu.engine import Session


class _Stopped(Exception):
    pass


class Warmup:
    """At most one background `sync` of a session; nobody else may use the session meanwhile."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._ids: list[int] = []

    def start(self, ids: Sequence[int]) -> None:
        """Begin to compute `ids`, unless a computation that was left is still going on."""
        if not ids or (self._thread is not None and self._thread.is_alive()):
            return
        self._ids = list(ids)
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, daemon=True, name="warmup")
        self._thread.start()

    def finish(self, prompt: Sequence[int], cancelled: Callable[[], bool]) -> bool:
        """Give the session back: done if it is a beginning of `prompt`, else broken off soon.

        False when `cancelled` became true before that: the session is still in use.
        """
        if self._thread is None:
            return True
        if list(prompt[: len(self._ids)]) != self._ids:
            self._stop.set()
        while self._thread.is_alive():
            self._thread.join(0.1)
            if cancelled():
                self._stop.set()
                return False
        self._thread = None
        return True

    def abandon(self) -> bool:
        """Break off without waiting for long; False when native code is still running."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(0.2)
            return not self._thread.is_alive()
        return True

    def _run(self) -> None:
        # Whatever is wrong, the reply will meet it too, where it can be shown.
        with contextlib.suppress(Exception):
            self._session.sync(self._ids, self._between_chunks)

    def _between_chunks(self, done: int, total: int) -> None:
        if self._stop.is_set() and done < total:
            raise _Stopped
