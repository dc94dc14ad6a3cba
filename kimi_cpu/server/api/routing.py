"""GET /routing: which experts the tokens choose, as it happens.

The expert store counts each expert's choices anyway, for its cache. A few times a second the
event loop copies these counts while the inference thread goes on, and sends what has been added.
The thread is neither asked nor stopped. A copy may show a token half counted; its rest is in the
next one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kimi_cpu.server.errors import ApiError
from kimi_cpu.server.service import service_of
from kimi_cpu.server.sse import HEADERS, data, disconnected, named
from kimi_cpu.server.worker import Worker
from kimi_cpu.store.experts.residency import ExpertStore

#: Between two looks at the counts.
INTERVAL_S = 0.1
#: Without news for so long, a comment shows that the connection lives.
HEARTBEAT_S = 5.0
#: Streams at once.
MAX_STREAMS = 16


async def routing(request: Request) -> Response:
    """Events: `shape` first, then the choices of each interval that had some."""
    service = service_of(request)
    engine = service.model.engine
    streams = request.app.state.routing_streams
    assert isinstance(streams, Streams)
    if streams.open >= MAX_STREAMS:
        raise ApiError(
            429,
            f"{MAX_STREAMS} pages watch the routing already",
            code="too_many_streams",
            headers={"Retry-After": "10"},
        )
    choices = Choices(engine.experts, engine.config.moe_layers)
    return RoutingStream(choices, service.worker, streams)


@dataclass
class Streams:
    """How many routing streams of a server are open."""

    open: int = 0


class Choices:
    """The choices since the last look.

    An expert's frequency grows by the weight of a use with each token that chooses it (see
    `store.experts.policy.Frequency`); the weight itself grows slowly and is scaled back at times.
    """

    def __init__(self, store: ExpertStore, layers: Sequence[int]) -> None:
        """layers: the numbers of those with experts."""
        self._store = store
        self._layers = list(layers)
        self._last = self._copy()
        self._weight = self._weight_now()

    def _copy(self) -> npt.NDArray[np.float64]:
        return self._store.policy.frequencies.copy()

    def _weight_now(self) -> float:
        return float(self._store.policy.state[0])

    def shape(self) -> dict[str, Any]:
        """layers: their numbers in the model; experts: of each; top_k: chosen by a token."""
        return {
            "layers": self._layers,
            "experts": self._store.n_experts,
            "top_k": self._store.top_k,
        }

    def look(self) -> dict[str, Any] | None:
        """What was chosen since; None if nothing was.

        tokens, uses, hits: the store's counts since it was made.
        chosen: for each layer [expert, times, expert, times, ...].
        """
        now, weight = self._copy(), self._weight_now()
        added, rescaled = (now - self._last) / weight, weight < self._weight
        self._last, self._weight = now, weight
        if rescaled:  # happens every 170,000 tokens
            return None
        times = np.rint(added).astype(np.int64).reshape(-1, self._store.n_experts)
        # With many tokens in one pass the weight has grown since the uses were counted.
        times[(times == 0) & (added.reshape(times.shape) > 1e-9)] = 1
        if not times.any():
            return None
        stats = self._store.stats()
        chosen = []
        for row in times:
            (experts,) = np.nonzero(row)
            chosen.append(np.stack([experts, row[experts]], axis=1).ravel().tolist())
        return {"tokens": stats.tokens, "uses": stats.uses, "hits": stats.hits, "chosen": chosen}


class RoutingStream(Response):
    """Server-sent events until the client leaves or the server stops."""

    media_type = "text/event-stream"

    def __init__(self, choices: Choices, worker: Worker, streams: Streams) -> None:
        self._choices = choices
        self._worker = worker
        self._streams = streams
        self.status_code = 200
        self.background = None
        self.init_headers(HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._streams.open += 1
        leaving = asyncio.ensure_future(disconnected(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._send_all(send, leaving)
        except OSError:
            pass  # the client left while we were writing
        finally:
            self._streams.open -= 1
            leaving.cancel()

    async def _send_all(self, send: Send, leaving: asyncio.Future[None]) -> None:
        async def write(body: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more})

        choices = self._choices
        await write(named("shape", choices.shape()))
        spoken = time.monotonic()
        while self._worker.state in ("loading", "ready"):  # a moment of loading is left at first
            await asyncio.wait({leaving}, timeout=INTERVAL_S)
            if leaving.done():
                return
            seen = choices.look()
            if seen is not None:
                await write(data(seen))
            elif time.monotonic() - spoken > HEARTBEAT_S:
                await write(b": nothing new\n\n")
            else:
                continue
            spoken = time.monotonic()
        await write(b"", more=False)
