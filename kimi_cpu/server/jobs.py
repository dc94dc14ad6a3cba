"""One unit of work for the inference thread, and the way of its results into the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from kimi_cpu.chat.generate import Reply, Result, Sampled
from kimi_cpu.chat.parser import Event
from kimi_cpu.quant import F32
from kimi_cpu.sampling import logprobs

if TYPE_CHECKING:
    from kimi_cpu.engine import Session


@dataclass(frozen=True)
class Step:
    """One more token: the events that it completed, and its log probabilities if asked for."""

    events: list[Event]
    sampled: Sampled | None = None


@dataclass(frozen=True)
class Scored:
    """Log probabilities of all prompt tokens but the first, which has none."""

    tokens: list[Sampled]


@dataclass(frozen=True)
class Finished:
    """The end of a reply.

    queued_s: how long it waited before its prompt was begun.
    """

    result: Result
    queued_s: float


#: What a job gives, in this order: Scored if asked for, Steps, Finished.
Item = Step | Scored | Finished


class Sink(Protocol):
    """Takes what a job gives; called in the inference thread."""

    def put(self, item: Item | BaseException, /) -> None: ...


class Outbox:
    """A queue from the inference thread into the event loop that made it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Item | BaseException] = asyncio.Queue()

    def put(self, item: Item | BaseException) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is gone, and with it who would listen
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def get(self, timeout_s: float | None = None) -> Item | None:
        """The next item; None after `timeout_s` without one. Raises what ended the job instead."""
        try:
            async with asyncio.timeout(timeout_s):
                item = await self._queue.get()
        except TimeoutError:
            return None
        if isinstance(item, BaseException):
            raise item
        return item

    async def finished(self) -> tuple[list[Item], Finished]:
        """All items, and the last of them. Raises what ended the job instead."""
        items: list[Item] = []
        while True:
            item = await self.get()
            assert item is not None  # there is no timeout
            items.append(item)
            if isinstance(item, Finished):
                return items, item


class Job:
    """A reply to be made; or, with `score`, also the log probabilities of its prompt.

    The event loop makes it, may `cancel` it at any time, and gets its items from `outbox`; the
    scheduler does the rest.

    Attributes:
        done_tokens, todo_tokens: how far the prompt is, for whoever waits.
        watcher: is told each item, in the inference thread, before whoever asked.
    """

    _numbers = itertools.count(1)

    def __init__(
        self,
        reply: Reply,
        sink: Sink,
        *,
        label: str = "",
        score_top: int | None = None,
    ) -> None:
        """
        label: what the log calls it.
        score_top: give log probabilities of the prompt's tokens, each with so many of the
            likeliest.
        """
        self.number = next(self._numbers)
        self.reply = reply
        self.label = label
        self.score_top = score_top
        self.session: Session | None = None
        self.position = 0  # tokens of the prompt on the session's timeline
        self.found_tokens = 0  # of these, computed by others
        self.done_tokens = 0
        self.todo_tokens = len(reply.prompt)
        self.submitted = time.perf_counter()
        self.queued_s = 0.0
        self.scores: list[Sampled] = []
        self.watcher: Callable[[Item | BaseException], None] | None = None
        self._sink = sink
        self._cancelled = False

    def cancel(self) -> None:
        """Nobody wants it any more: it ends within a layer of its prompt or a token."""
        self._cancelled = True

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def give(self, item: Item | BaseException) -> None:
        """Hand an item to whoever asked."""
        if self.watcher is not None:
            self.watcher(item)
        self._sink.put(item)

    def score(self, logits: F32) -> None:
        """Note log probabilities of the prompt tokens that these logits predict.

        logits: [T, V], those after the tokens from `position` on.
        """
        assert self.score_top is not None
        following = self.reply.prompt[self.position + 1 : self.position + 1 + len(logits)]
        for row, token in zip(logits, following, strict=False):
            self.scores.append(Sampled(token, "content", *logprobs(row, token, self.score_top)))
