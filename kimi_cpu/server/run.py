"""uvicorn around the application, and the names that whoever starts a server needs."""

from __future__ import annotations

import asyncio
import socket
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from kimi_cpu.server.app import make_app
from kimi_cpu.server.metrics import Metrics
from kimi_cpu.server.security import is_loopback
from kimi_cpu.server.settings import Settings
from kimi_cpu.server.worker import Worker

__all__ = ["Metrics", "Running", "Settings", "Worker", "is_loopback", "make_app"]

#: Connections at once; further ones get 503. Each request in the queue holds one.
MAX_CONNECTIONS = 1024
#: How long the head of a request may take, from the connection or from its first byte.
HEAD_TIMEOUT_S = 20.0
#: How long a connection may stay unused: agents run their tools between two requests.
KEEP_ALIVE_S = 75
#: After the last reply, how long clients may take to read the end of it.
GRACE_S = 2.0


class Connection(H11Protocol):
    """HTTP/1.1, and closed if a request's head does not arrive in time: uvicorn waits for ever."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()  # a request has begun: who answers it waits for its body
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Running(uvicorn.Server):
    """The HTTP server. Told to stop, it lets replies go on until the deadline; told again, it ends
    them. `run` returns in any case: what has been computed is not saved yet."""

    def __init__(self, worker: Worker, app: Starlette, settings: Settings) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                limit_concurrency=MAX_CONNECTIONS,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(settings.shutdown_s + GRACE_S),
            )
        )
        self._worker = worker
        self._told_again = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not uvicorn's own, which sends the process the same signal once more at the end.
        if not self.should_exit:
            self.should_exit = True
        elif not self._told_again:
            self._told_again = True
            self._worker.abort()
        else:
            self.force_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._worker.begin_stop()
        await super().shutdown(sockets)
