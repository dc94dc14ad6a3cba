"""The text of prompts and replies in a file: nothing else that the server writes holds any."""

from __future__ import annotations

import functools
import json
import logging
import os
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

from kimi_cpu.errors import UsageError
from kimi_cpu.server.jobs import Finished, Item, Job
from kimi_cpu.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class PromptLog:
    """Appends JSON lines to a file that its owner alone may read. Any thread may call any method.

    Two lines a job, both with `time`, `event`, `job` (its number in the log on stderr), `kind` and
    `text`: "prompt" when it is queued, with its `tokens`, and at the end "reply" with `tokens` and
    `finish_reason`, or "error"; none for a client that leaves. Control tokens are written by
    name; text that only looks like one cannot be told from it here.
    """

    def __init__(self, path: Path) -> None:
        """Raises UsageError if the file cannot be written."""
        self._path = path
        self._lock = threading.Lock()
        self._complained = False
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise UsageError(
                f"{path}: cannot be written ({error.strerror})",
                "Name another file for the prompts.",
            ) from None
        self._file = os.fdopen(descriptor, "w", encoding="utf-8", errors="replace")

    def begin(self, job: Job, tokenizer: Tokenizer) -> None:
        """A job is about to be submitted: write its prompt, and later what becomes of it."""
        prompt = job.reply.prompt
        job.watcher = functools.partial(self._end, job, tokenizer)
        self._write(job, "prompt", tokenizer.decode(prompt), tokens=len(prompt))

    def close(self) -> None:
        """Write nothing more."""
        with self._lock:
            self._file.close()

    def _end(self, job: Job, tokenizer: Tokenizer, item: Item | BaseException) -> None:
        if isinstance(item, Finished):
            reason, ids = item.result.finish_reason, job.reply.ids
            self._write(job, "reply", tokenizer.decode(ids), tokens=len(ids), finish_reason=reason)
        elif isinstance(item, BaseException):
            self._write(job, "error", str(item))

    def _write(self, job: Job, event: str, text: str, **fields: Any) -> None:
        time = datetime.now().astimezone().isoformat(timespec="milliseconds")
        head = {"time": time, "event": event, "job": job.number, "kind": job.label}
        line = json.dumps({**head, **fields, "text": text}, ensure_ascii=False) + "\n"
        with self._lock:
            if self._file.closed:
                return
            try:
                self._file.write(line)
                self._file.flush()
                self._complained = False
            except OSError as error:  # a full disk: replies go on
                if not self._complained:
                    log.warning("%s: prompts are not logged (%s)", self._path, error.strerror)
                self._complained = True
