"""What all requests in flight hold together: many, each within its limit, could fill the memory."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from kimi_cpu.server.errors import unavailable

_KEY = "kimi_cpu.body"


class Bodies:
    """Counts the bytes of bodies from their arrival to the end of the answer. For the event loop.

    What a body becomes, messages and prompt, lives as long, and is some times as large.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.n_bytes = 0

    def take(self, scope: Scope, n_bytes: int) -> None:
        """More of a request's body has arrived. ApiError (503) if that is too much for now."""
        held: Held = scope[_KEY]
        if self.n_bytes + n_bytes > self._max_bytes:
            raise unavailable(
                f"the requests under way hold {self.n_bytes:,} bytes; try again later",
                "overloaded",
                5,
            )
        held.n_bytes += n_bytes
        self.n_bytes += n_bytes


class Held:
    """The bytes of one request."""

    n_bytes = 0


class HoldBodies:
    """ASGI middleware: what a request has taken is given back when its answer is complete."""

    def __init__(self, app: ASGIApp, bodies: Bodies) -> None:
        self._app = app
        self._bodies = bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        held = scope[_KEY] = Held()
        try:
            await self._app(scope, receive, send)
        finally:
            self._bodies.n_bytes -= held.n_bytes
