"""What a monitoring system is told, in Prometheus' text format."""

from __future__ import annotations

from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kimi_cpu.chat.generate import Result

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)


class Watched(Protocol):
    """What is asked for its numbers when they are wanted: the scheduler."""

    @property
    def waiting(self) -> int: ...
    @property
    def active(self) -> int: ...
    @property
    def cache_bytes(self) -> int: ...
    @property
    def cache_disk_bytes(self) -> int: ...


class Metrics:
    """Counters of one server; every method may be called from any thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"kimi_cpu_{name}", text, labels, registry=self._registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"kimi_cpu_{name}", text, registry=self._registry, buckets=_SECONDS)

        self._requests = counter("http_requests", "Requests answered.", "path", "status")
        self._replies = counter("replies", "Replies by how they ended.", "finish_reason")
        self._prompt = counter("prompt_tokens", "Tokens of prompts.")
        self._cached = counter("cached_tokens", "Tokens of prompts that were computed before.")
        self._lookups = counter("cache_lookups", "Prompts by what of them was known.", "result")
        self._completion = counter("completion_tokens", "Tokens of replies.")
        self._queue = histogram("queue_seconds", "From a request to the begin of its prompt.")
        self._first = histogram("first_token_seconds", "From a request to its first token.")
        self._total = histogram("reply_seconds", "From a request to the end of its reply.")

    def watch(self, scheduler: Watched) -> None:
        """Report the scheduler's numbers from now on."""
        for name, text, read in (
            ("waiting", "Requests that wait.", lambda: scheduler.waiting),
            ("active", "Prompts and replies under way.", lambda: scheduler.active),
            ("cache_bytes", "Latents kept in memory.", lambda: scheduler.cache_bytes),
            ("cache_disk_bytes", "Latents kept on disk.", lambda: scheduler.cache_disk_bytes),
        ):
            gauge = Gauge(f"kimi_cpu_{name}", text, registry=self._registry)
            gauge.set_function(read)

    def answered(self, path: str, status: int) -> None:
        """A request of a known path was answered."""
        self._requests.labels(path, str(status)).inc()

    def replied(self, result: Result, queued_s: float) -> None:
        """A reply is complete."""
        self._replies.labels(result.finish_reason).inc()
        self._prompt.inc(result.usage.prompt_tokens)
        self._cached.inc(result.usage.cached_tokens)
        self._completion.inc(result.usage.completion_tokens)
        self._queue.observe(queued_s)
        self._first.observe(queued_s + result.timings.first_token_s)
        self._total.observe(queued_s + result.timings.total_s)

    def looked_up(self, *, found: bool) -> None:
        """A prompt begins, and whether some of it was computed before."""
        self._lookups.labels("hit" if found else "miss").inc()

    def cancelled(self) -> None:
        """A client left before its reply was complete."""
        self._replies.labels("cancelled").inc()

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)
