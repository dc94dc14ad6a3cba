"""Token counts and times as endpoints show them."""

from __future__ import annotations

import time
import uuid
from typing import Any

from kimi_cpu.server.jobs import Finished


def new_id(prefix: str) -> str:
    """A name for an answer."""
    return f"{prefix}-{uuid.uuid4().hex}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


def usage(finished: Finished) -> dict[str, Any]:
    """OpenAI's usage object."""
    counts = finished.result.usage
    return {
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.completion_tokens,
        "total_tokens": counts.prompt_tokens + counts.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": counts.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": counts.reasoning_tokens},
    }


def timings(finished: Finished) -> dict[str, float]:
    """Milliseconds and rates, in the names that llama.cpp's server uses, and `queue_ms`."""
    counts, times = finished.result.usage, finished.result.timings
    computed = counts.prompt_tokens - counts.cached_tokens
    decode_s = times.total_s - times.first_token_s
    return {
        "queue_ms": round(finished.queued_s * 1e3, 1),
        "cache_n": counts.cached_tokens,
        "prompt_n": computed,
        "prompt_ms": round(times.prompt_s * 1e3, 1),
        "prompt_per_second": round(computed / times.prompt_s, 2) if times.prompt_s > 0 else 0.0,
        "predicted_n": counts.completion_tokens,
        "predicted_ms": round(decode_s * 1e3, 1),
        "predicted_per_second": round(times.decode_tps, 2),
    }
