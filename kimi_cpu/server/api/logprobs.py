"""Log probabilities in OpenAI's two forms."""

from __future__ import annotations

from typing import Any

from kimi_cpu.chat.generate import Sampled
from kimi_cpu.server.errors import ApiError
from kimi_cpu.tokenizer import Tokenizer

MAX_TOP = 20
#: JSON has no infinity.
LOWEST = -9999.0


def check_top(value: int, param: str) -> int:
    """How many of the likeliest tokens are wanted; ApiError when out of range."""
    if not 0 <= value <= MAX_TOP:
        raise ApiError(400, f"{param} is {value}: use 0 to {MAX_TOP}", param=param)
    return value


def spelling(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; bytes that are none as OpenAI writes them, `bytes:\\xe2\\x82`."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_entry(tokenizer: Tokenizer, sampled: Sampled) -> dict[str, Any]:
    """An entry of `logprobs.content`."""
    return {
        **_entry(tokenizer, sampled.token, sampled.logprob),
        "top_logprobs": [_entry(tokenizer, token, value) for token, value in sampled.top],
    }


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    return {
        "token": spelling(tokenizer, token),
        "logprob": max(logprob, LOWEST),
        "bytes": list(tokenizer.token_bytes(token)),
    }


class TextLogprobs:
    """The `logprobs` object of /v1/completions, grown token by token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._tops: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def add(self, token: int, sampled: Sampled | None) -> None:
        """One more token; `sampled` is None for the first of a prompt."""
        text = spelling(self._tokenizer, token)
        self._tokens.append(text)
        self._offsets.append(self._offset)
        self._offset += len(text)
        if sampled is None:
            self._logprobs.append(None)
            self._tops.append(None)
            return
        self._logprobs.append(max(sampled.logprob, LOWEST))
        # Best first, and of two tokens with one spelling the likelier.
        tops: dict[str, float] = {}
        for other, logprob in sampled.top:
            tops.setdefault(spelling(self._tokenizer, other), max(logprob, LOWEST))
        tops.setdefault(text, max(sampled.logprob, LOWEST))  # OpenAI: the chosen one is among them
        self._tops.append(tops)

    def take(self) -> dict[str, Any]:
        """What was added since the last call."""
        taken = {
            "tokens": self._tokens,
            "token_logprobs": self._logprobs,
            "top_logprobs": self._tops,
            "text_offset": self._offsets,
        }
        self._tokens, self._logprobs, self._tops, self._offsets = [], [], [], []
        return taken
