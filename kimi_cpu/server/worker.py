"""The inference thread: it loads the model, runs the scheduler and ends within a deadline."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Literal

from kimi_cpu.chat.grammar.compiler import vocabulary
from kimi_cpu.errors import UserError
from kimi_cpu.prefixes import PrefixCache
from kimi_cpu.server.errors import unavailable
from kimi_cpu.server.jobs import Job
from kimi_cpu.server.metrics import Metrics
from kimi_cpu.server.scheduler import Scheduler
from kimi_cpu.server.settings import ServedModel, Settings

log = logging.getLogger(__name__)

State = Literal["loading", "ready", "failed", "stopping", "saving", "stopped"]
#: Loads the model; called in the inference thread. It reports what it is doing in a word or two.
Load = Callable[[Callable[[str], None]], ServedModel]

_IDLE_S = 60.0
#: After so long without work what was computed goes to disk, piece by piece.
_SETTLED_S = 5.0
_BETWEEN_SAVES_S = 0.2


class Worker:
    """One thread that owns the engine.

    Attributes:
        phase: what loading is at.
        error: why loading failed.
    """

    def __init__(
        self,
        load: Load,
        settings: Settings,
        metrics: Metrics,
        on_change: Callable[[State], None] = lambda state: None,
    ) -> None:
        """on_change: told each new state, in the inference thread (but for "stopping")."""
        self.phase = ""
        self.error: Exception | None = None
        self._load = load
        self._settings = settings
        self._metrics = metrics
        self._on_change = on_change
        self._state: State = "loading"
        self._model: ServedModel | None = None
        self._scheduler: Scheduler | None = None
        self._stopping = threading.RLock()
        self._stop_by: float | None = None  # perf_counter
        self._started = time.perf_counter()
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    @property
    def state(self) -> State:
        return self._state

    @property
    def loading_s(self) -> float:
        """Seconds since loading began."""
        return time.perf_counter() - self._started

    @property
    def model(self) -> ServedModel:
        """The model; ApiError (503) before it is loaded."""
        if self._model is None:
            if self._state == "failed":
                raise unavailable("the model could not be loaded", "model_failed", 60)
            raise unavailable(
                f"the model is loading ({self.phase or 'starting'}, {self.loading_s:.0f} s)",
                "model_loading",
            )
        return self._model

    def start(self) -> None:
        """Begin to load."""
        self._started = time.perf_counter()
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job. ApiError when the model is not there, the queue is full, or at the end."""
        _ = self.model
        assert self._scheduler is not None
        self._scheduler.submit(job)

    def begin_stop(self) -> None:
        """Take no more jobs; those under way may go on for `shutdown_s`.

        `on_change` is told "stopping" (in this thread) if there are any.
        """
        self._stop(self._settings.shutdown_s)
        if self._state == "ready" and self._scheduler is not None and self._scheduler.active:
            self._on_change("stopping")

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread; False when it is still in native code."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def abort(self) -> None:
        """Take no more jobs and end those under way at the next token or layer."""
        self._stop(0.0)

    def _stop(self, within_s: float) -> None:
        by = time.perf_counter() + within_s
        with self._stopping:
            self._stop_by = by if self._stop_by is None else min(by, self._stop_by)
            if self._scheduler is not None:
                self._scheduler.close(self._stop_by)

    def _become(self, state: State) -> None:
        self._state = state
        self._on_change(state)

    def _run(self) -> None:
        try:
            model = self._load(self._set_phase)
            self._set_phase("kernels")
            warm_up(model)
            prefixes = PrefixCache(
                model.engine,
                model.session_bytes,
                folder=self._settings.cache_dir,
                folder_bytes=self._settings.cache_bytes,
            )
        except Exception as error:
            if not isinstance(error, UserError):
                log.error("loading the model failed", exc_info=error)
            self.error = error
            self._become("failed")
            return
        scheduler = Scheduler(model.engine, prefixes, self._settings, self._metrics)
        self._metrics.watch(scheduler)
        with self._stopping:
            self._scheduler, self._model = scheduler, model
            if self._stop_by is not None:
                scheduler.close(self._stop_by)
        self._become("ready")
        try:
            self._serve(scheduler, prefixes)
        finally:
            self._become("saving")
            prefixes.close(self._settings.save_s)
            model.engine.close()
            self._become("stopped")

    def _serve(self, scheduler: Scheduler, prefixes: PrefixCache) -> None:
        pause_s = _SETTLED_S
        while True:
            try:
                worked = scheduler.turn()
            except Exception as error:  # a bug of the scheduler: no job may hang for it
                log.error("the scheduler failed; all its jobs end", exc_info=error)
                scheduler.abort()
                continue
            if scheduler.overdue:
                scheduler.abort()
                return
            if worked:
                pause_s = _SETTLED_S
                continue
            if self._stop_by is not None and not scheduler.waiting:
                return
            if not scheduler.wait(pause_s):
                pause_s = _BETWEEN_SAVES_S if prefixes.save_some() else _IDLE_S

    def _set_phase(self, phase: str) -> None:
        self.phase = phase


def warm_up(model: ServedModel) -> None:
    """Do once what the first request would wait for: kernels are loaded and weights mapped by
    computing a few tokens, and grammars get their tables of the vocabulary."""
    vocabulary(model.tokenizer)
    session = model.engine.session()
    session.sync([0, 1])  # few tokens: each reads experts from disk
    session.step(2)
    session.step(3)
