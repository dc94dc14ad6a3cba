"""What every endpoint works with."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import anyio
import anyio.to_thread
from starlette.requests import Request

from kimi_cpu.prefixes.identity import model_key
from kimi_cpu.server.bodies import Bodies
from kimi_cpu.server.errors import ApiError
from kimi_cpu.server.jobs import Job
from kimi_cpu.server.metrics import Metrics
from kimi_cpu.server.promptlog import PromptLog
from kimi_cpu.server.replay import Replies
from kimi_cpu.server.replyfiles import ReplyFiles
from kimi_cpu.server.settings import ServedModel, Settings
from kimi_cpu.server.stored import StoredResponses
from kimi_cpu.server.worker import Worker

P = ParamSpec("P")
T = TypeVar("T")

#: Requests whose prompts are rendered and encoded at the same time.
RENDERING_THREADS = 2


class Service:
    """One server: its settings, its worker, and what it remembers."""

    def __init__(self, worker: Worker, settings: Settings, metrics: Metrics) -> None:
        self.worker = worker
        self.settings = settings
        self.metrics = metrics
        self.stored = StoredResponses()
        self.bodies = Bodies(settings.max_bodies_bytes)
        self._replies: Replies | None = None
        self._reply_files: ReplyFiles | None = None
        self._making_replies = threading.Lock()
        path = settings.log_prompts
        self._prompt_log = None if path is None else PromptLog(path)
        self._limiter = anyio.CapacityLimiter(RENDERING_THREADS)

    @property
    def model(self) -> ServedModel:
        """The model; ApiError (503) before it is loaded."""
        return self.worker.model

    @property
    def replies(self) -> Replies:
        """The replies that clients may send back."""
        with self._making_replies:
            if self._replies is None:
                model, folder = self.model, self.settings.cache_dir
                if folder is not None:
                    n_vocab = model.tokenizer.n_vocab
                    self._reply_files = ReplyFiles(folder, model_key(model.engine), n_vocab)
                self._replies = Replies(model.tokenizer, self._reply_files)
            return self._replies

    def submit(self, job: Job) -> None:
        """Queue a job. ApiError when the model is not there, the queue is full, or at the end."""
        if self._prompt_log is not None:
            self._prompt_log.begin(job, self.model.tokenizer)
        try:
            self.worker.submit(job)
        except ApiError as error:
            if job.watcher is not None:
                job.watcher(error)
            raise

    def close(self) -> None:
        """No job is under way any more."""
        if self._reply_files is not None:
            self._reply_files.close()
        if self._prompt_log is not None:
            self._prompt_log.close()

    async def in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function that takes a while, without stopping the event loop."""
        call = functools.partial(function, *args, **kwargs)
        return await anyio.to_thread.run_sync(call, limiter=self._limiter)


def service_of(request: Request) -> Service:
    """The service that a request is for."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service
