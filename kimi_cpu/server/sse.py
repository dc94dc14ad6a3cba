"""Answers that take long: streams of server-sent events, and waiting for a result.

Both notice at once that the client has left, and cancel what it asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kimi_cpu.errors import UserError
from kimi_cpu.server.errors import ApiError, from_user_error, internal
from kimi_cpu.server.jobs import Finished, Item, Job, Outbox

log = logging.getLogger(__name__)
T = TypeVar("T")

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Frames(Protocol):
    """How an endpoint writes a reply as a stream: bytes for each thing that happens."""

    def begin(self) -> bytes: ...
    def item(self, item: Item, /) -> bytes: ...
    def error(self, error: ApiError, /) -> bytes: ...


def data(value: Any) -> bytes:
    """An event without a name."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def named(event: str, value: Any) -> bytes:
    """An event with a name."""
    return b"event: " + event.encode() + b"\ndata: " + msgspec.json.encode(value) + b"\n\n"


def as_api_error(error: BaseException) -> ApiError:
    """What the client is told; what it must not know goes into the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return from_user_error(error)
    log.error("a request failed", exc_info=error)
    return internal()


class EventStream(Response):
    """A job's items as server-sent events, with a comment after every `heartbeat_s` of silence."""

    media_type = "text/event-stream"

    def __init__(self, job: Job, outbox: Outbox, frames: Frames, heartbeat_s: float) -> None:
        self._job = job
        self._outbox = outbox
        self._frames = frames
        self._heartbeat_s = heartbeat_s
        self.status_code = 200
        self.background = None
        self.init_headers(HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        sending = asyncio.ensure_future(self._send_all(send))
        leaving = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        except OSError:
            pass  # the client left while we were writing
        finally:
            self._job.cancel()  # nothing if it has ended
            await _cancelled(sending, leaving)

    async def _send_all(self, send: Send) -> None:
        async def write(body: bytes) -> None:
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})

        await write(self._frames.begin())
        try:
            item: Item | None = None
            while not isinstance(item, Finished):
                item = await self._outbox.get(self._heartbeat_s)
                await write(self.heartbeat() if item is None else self._frames.item(item))
        except Exception as error:
            if isinstance(error, OSError):
                raise
            await write(self._frames.error(as_api_error(error)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def heartbeat(self) -> bytes:
        """What is sent after a time of silence."""
        job = self._job
        if job.done_tokens < job.todo_tokens:
            return b": reading %d of %d tokens\n\n" % (job.done_tokens, job.todo_tokens)
        return b": working\n\n"


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`; ClientLeft, with `work` cancelled, when the client disconnects."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(disconnected(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        return working.result()
    finally:
        await _cancelled(working, leaving)


async def disconnected(receive: Receive) -> None:
    """Wait until the client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: asyncio.Future[Any]) -> None:
    """End tasks, whatever they were doing."""
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task
