"""Whose turn it is.

A turn of the inference thread is a slice of one prompt, then tokens for all replies under way: one
each, or as many as fit into the time that the slice took. So prompts take turns, a short one does
not wait for a long one, and replies go on at half their speed while prompts are read. Nothing here
waits or sleeps, and nothing but `submit` and `close` may be called by another thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from kimi_cpu.chat.grammar import DeadEndError
from kimi_cpu.errors import ContextError, LowMemoryError, UsageError, UserError
from kimi_cpu.quant import F32
from kimi_cpu.server.errors import ApiError, busy, internal, unavailable
from kimi_cpu.server.jobs import Finished, Job, Scored, Step

if TYPE_CHECKING:
    from kimi_cpu.engine import Engine, Session
    from kimi_cpu.prefixes import PrefixCache
    from kimi_cpu.server.metrics import Metrics
    from kimi_cpu.server.settings import Settings

log = logging.getLogger(__name__)

#: Prompt tokens whose logits are wanted are computed so many at a time: 0.65 MB each for Kimi K2.
SCORE_SLICE = 128


class _Cancelled(Exception):
    pass


class Scheduler:
    """All jobs of a server, waiting or under way."""

    def __init__(
        self, engine: Engine, prefixes: PrefixCache, settings: Settings, metrics: Metrics
    ) -> None:
        self._engine = engine
        self._prefixes = prefixes
        self._settings = settings
        self._metrics = metrics
        self._waiting: deque[Job] = deque()
        self._prompts: deque[Job] = deque()  # the next one to get a slice comes first
        self._replies: list[tuple[Job, F32]] = []  # with the logits of their last token
        self._wake = threading.Condition()
        self._closed = False
        self._abort_at: float | None = None  # perf_counter

    @property
    def waiting(self) -> int:
        """Jobs that have not begun."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Jobs under way."""
        return len(self._prompts) + len(self._replies)

    @property
    def cache_bytes(self) -> int:
        """Latents kept for later requests."""
        return self._prefixes.nbytes

    @property
    def cache_disk_bytes(self) -> int:
        """Files of latents, those of other models included."""
        return self._prefixes.disk_nbytes

    def submit(self, job: Job) -> None:
        """Queue a job; from any thread. Raises ApiError when there are too many, or at the end."""
        with self._wake:
            if self._closed:
                raise _shutting_down()
            if len(self._waiting) >= self._settings.max_waiting:
                # Those who left would be dropped only when it is their turn.
                self._waiting = deque(job for job in self._waiting if not job.cancelled)
                if len(self._waiting) >= self._settings.max_waiting:
                    raise busy(len(self._waiting), 5)
            self._waiting.append(job)
            self._wake.notify()

    def close(self, abort_at: float) -> None:
        """Take no more jobs, and give up the prompt under way at `abort_at` (perf_counter);
        from any thread."""
        with self._wake:
            self._closed = True
            self._abort_at = abort_at
            self._wake.notify()

    @property
    def overdue(self) -> bool:
        """Whether the time of `close` has come."""
        return self._abort_at is not None and time.perf_counter() >= self._abort_at

    def wait(self, timeout_s: float) -> bool:
        """Sleep until there is something to do, at most so long; whether there is."""
        with self._wake:
            return self._wake.wait_for(
                lambda: bool(self._waiting or self.active or self._closed), timeout_s
            )

    def turn(self) -> bool:
        """Do the next piece of work; False when there was none."""
        self._admit()
        had_work = self.active > 0
        begun = time.perf_counter()
        if self._prompts:
            if self._read_slice(self._prompts[0]):
                self._prompts.popleft()
            else:
                self._prompts.rotate(-1)
        # Replies get as much time as the slice took, and one token at least.
        until = 2 * time.perf_counter() - begun if self._prompts else 0.0
        while self._replies:
            self._decode()
            if time.perf_counter() >= until or self.overdue:
                break
        return had_work

    def abort(self) -> None:
        """End all jobs at once, telling those who wait for them."""
        with self._wake:
            jobs = [*self._waiting, *self._prompts, *(job for job, _ in self._replies)]
            self._waiting.clear()
        self._prompts.clear()
        self._replies.clear()
        for job in jobs:
            self._release(job)
            job.give(_shutting_down())

    def _admit(self) -> None:
        while self.active < self._settings.max_active:
            with self._wake:
                if not self._waiting:
                    return
                job = self._waiting.popleft()
            if not job.cancelled:
                self._begin(job)

    def _begin(self, job: Job) -> None:
        job.queued_s = time.perf_counter() - job.submitted
        try:
            if job.score_top is not None:
                job.session = self._engine.session()  # all its logits are wanted: none are kept
            else:
                job.session = self._prefixes.take(job.reply.prompt)
                self._metrics.looked_up(found=len(job.session) > 0)
            job.position = job.session.common_prefix(job.reply.prompt)
        except Exception as error:
            self._fail(job, error)
            return
        job.todo_tokens = len(job.reply.prompt) - job.position
        job.found_tokens = job.position
        job.reply.start(job.found_tokens)
        self._prompts.append(job)

    def _read_slice(self, job: Job) -> bool:
        """Compute the next tokens of a prompt, up to a multiple of the slice's size.

        However it is sliced, its logits are the same in every bit.

        Returns whether the job is through with its prompt, or has failed.
        """
        if job.score_top is None:
            self._catch_up(job)
        session, prompt = job.session, job.reply.prompt
        assert session is not None
        begin, size = job.position, self._settings.prefill_slice
        if job.score_top is not None:
            size = min(size, SCORE_SLICE)
        end = min(begin + size - begin % size, len(prompt))
        done_before = job.done_tokens

        def after_layer(done: int, _: int) -> None:
            job.done_tokens = done_before + done
            if job.cancelled:
                raise _Cancelled
            if self.overdue:
                raise _shutting_down()

        try:
            if job.cancelled:
                raise _Cancelled
            if job.score_top is None:
                logits = self._with_room(lambda: session.sync(prompt[:end], after_layer))
                self._prefixes.share(session)
            else:
                every = self._with_room(lambda: session.extend(prompt[begin:end], after_layer))
                job.score(every)
                logits = every[-1]
            job.position = end
            job.done_tokens = done_before + end - begin
            if end < len(prompt):
                return False
            if job.score_top is None:
                self._prefixes.keep_logits(session)
            else:
                job.give(Scored(job.scores))
                logits = logits.copy()  # not all of the slice's
        except Exception as error:
            self._fail(job, error)
        else:
            self._replies.append((job, logits))
        return True

    def _catch_up(self, job: Job) -> None:
        """Go on from what another prompt with the same beginning has computed meanwhile.

        So of several that came together, each computes every so many slices.
        """
        prompt, session = job.reply.prompt, job.session
        assert session is not None
        if self.active == 1 or len(prompt) - job.position < self._settings.prefill_slice:
            return
        known = self._prefixes.common_prefix(prompt)
        if known < job.position + self._settings.prefill_slice:
            return
        self._prefixes.give_back(session)
        job.session = session = self._prefixes.take(prompt[:known])
        position = session.common_prefix(prompt)
        job.todo_tokens -= position - job.position
        job.found_tokens += position - job.position
        job.position = position
        job.reply.start(job.found_tokens)

    def _decode(self) -> None:
        """One token for each reply, and what the model says after it."""
        going_on: list[Job] = []
        for job, logits in self._replies:
            try:
                if job.cancelled:
                    raise _Cancelled
                events = job.reply.feed(logits)
                job.give(Step(events, job.reply.sampled))
                if not job.reply.going_on:
                    self._finish(job)
                elif job.session is not None and job.session.remaining <= 0:
                    self._cut(job)
                else:
                    going_on.append(job)
            except DeadEndError:  # the grammar knows no way on
                self._cut(job)
            except Exception as error:
                self._fail(job, error)
        replies: list[tuple[Job, F32]] = []
        stepped = self._step([(job.session, job.reply.token) for job in going_on if job.session])
        for job, outcome in zip(going_on, stepped, strict=True):
            if isinstance(outcome, ContextError | LowMemoryError):  # none for a longer cache
                self._cut(job)
            elif isinstance(outcome, Exception):
                self._fail(job, outcome)
            else:
                replies.append((job, outcome))
        self._replies = replies

    def _step(self, work: list[tuple[Session, int]]) -> list[F32 | Exception]:
        """Append a token to each session: the logits after it, float32 [V], or what went wrong."""
        if not work:
            return []
        try:
            sessions, tokens = [s for s, _ in work], [token for _, token in work]
            return list(self._with_room(lambda: self._engine.step(sessions, tokens)))
        except Exception as error:
            if isinstance(error, LowMemoryError) and self._prompts:
                # Replies come first: the last prompt that came may be sent again.
                last = max(self._prompts, key=lambda job: job.number)
                self._fail(last, error)
                self._prompts.remove(last)
                return self._step(work)
            if len(work) == 1:
                return [error]
        # All are as before: one by one it shows whose error it is.
        return [outcome for one in work for outcome in self._step([one])]

    def _with_room(self, compute: Callable[[], F32]) -> F32:
        """Compute; if memory is short, without what is kept for later."""
        try:
            return compute()
        except LowMemoryError:
            self._prefixes.clear()
            return compute()

    def _cut(self, job: Job) -> None:
        """It can go on no further: the context is full."""
        job.give(Step(job.reply.finish("length")))
        self._finish(job)

    def _finish(self, job: Job) -> None:
        result = job.reply.result()
        self._release(job)
        self._metrics.replied(result, job.queued_s)
        log.info("%s", summary(job))
        job.give(Finished(result, job.queued_s))

    def _fail(self, job: Job, error: Exception) -> None:
        """End a job by an error, or because it was cancelled; others go on."""
        if isinstance(error, _Cancelled):
            self._metrics.cancelled()
            log.info("%s #%d: the client left", job.label, job.number)
            self._release(job)
            return
        if isinstance(error, LowMemoryError):
            self._release(job)
            log.error("%s #%d: %s", job.label, job.number, error.message)
            if self.active > 1:
                job.give(unavailable("not enough memory for this request", "out_of_memory", 30))
            else:  # it will not get better by waiting
                job.give(
                    ContextError(
                        f"the prompt has {len(job.reply.prompt):,} tokens, for which there is no "
                        "memory",
                        "Shorten it or start a new conversation.",
                    )
                )
            return
        if isinstance(error, UserError | ApiError) and not isinstance(error, UsageError):
            self._release(job)
            job.give(error)
            return
        # Whatever it was, its session may be in any state. The traceback holds no prompt text.
        job.session = None
        if isinstance(error, MemoryError):
            self._prefixes.clear()
            job.give(unavailable("not enough memory for this request", "out_of_memory", 30))
            log.error("%s #%d: out of memory", job.label, job.number)
            return
        log.error("%s #%d failed", job.label, job.number, exc_info=error)
        job.give(internal())

    def _release(self, job: Job) -> None:
        if job.session is not None and job.score_top is None:
            self._prefixes.give_back(job.session)
        job.session = None


def _shutting_down() -> ApiError:
    return unavailable("the server is shutting down", "shutting_down")


def summary(job: Job) -> str:
    """One line about a finished reply: counts and times, no text."""
    result = job.reply.result()
    usage, timings = result.usage, result.timings
    return (
        f"{job.label} #{job.number}: prompt {usage.prompt_tokens:,} ({usage.cached_tokens:,} "
        f"cached), reply {usage.completion_tokens:,}, first token "
        f"{job.queued_s + timings.first_token_s:.2f} s, {timings.decode_tps:.1f} tok/s, "
        f"{result.finish_reason}"
    )
