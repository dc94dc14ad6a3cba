"""Errors as clients expect them: OpenAI's `{"error": {"message", "type", "param", "code"}}`, or
Anthropic's `{"type": "error", "error": {"type", "message"}}`."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from kimi_cpu.chat.grammar import GrammarError
from kimi_cpu.errors import (
    ContextError,
    MessageError,
    TemplateError,
    TokenizerError,
    UsageError,
    UserError,
)

_CLIENT_ERRORS = (
    ContextError,
    GrammarError,
    MessageError,
    TemplateError,
    TokenizerError,
    UsageError,
)
#: Paths of Anthropic's API begin so.
ANTHROPIC_PATHS = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
#: A field's name at the start of a message: `temperature is -1`, `messages[0].role: missing`.
_FIELD = re.compile(r"([a-z_][a-z_0-9]*(?:\[[^\]]*\]|\.[a-z_0-9]+)*)(?=: | is )", re.IGNORECASE)


class ApiError(Exception):
    """An answer other than 200.

    param: the field of the request that is wrong.
    code: a word for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or ("invalid_value" if status == 400 else None)
        self.headers = headers or {}

    @property
    def type(self) -> str:
        """OpenAI's family of the error."""
        if self.status >= 500:
            return "server_error"
        return {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error"
        )

    def body(self, path: str = "") -> dict[str, Any]:
        """The error object, as the API that the request's path belongs to has it."""
        if path.startswith(ANTHROPIC_PATHS):
            kind = _ANTHROPIC_TYPES.get(self.status)
            kind = kind or ("api_error" if self.status >= 500 else "invalid_request_error")
            error: dict[str, Any] = {"type": kind, "message": self.message}
            if self.code is not None:
                error["details"] = {"error_code": self.code}
            return {"type": "error", "error": error}
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


def from_user_error(error: UserError) -> ApiError:
    """400 for what the request caused, 500 for what is wrong with the model or the machine."""
    text = f"{error.message}. {error.hint}" if error.hint else error.message
    if not isinstance(error, _CLIENT_ERRORS):
        return ApiError(500, text, code="internal_error")
    code = "context_length_exceeded" if isinstance(error, ContextError) else "invalid_value"
    if isinstance(error, GrammarError):
        return ApiError(400, text, param=error.param)
    field = _FIELD.match(error.message)
    return ApiError(400, text, param=field[1] if field else None, code=code)


def from_validation(error: msgspec.ValidationError) -> ApiError:
    """400 naming the field, from msgspec's "Expected `int`, got `str` - at `$.max_tokens`"."""
    what, _, path = str(error).partition(" - at `$")
    missing = re.search(r"missing required field `(\w+)`", what)
    param = ".".join(filter(None, [path.rstrip("`").lstrip("."), missing and missing[1]])) or None
    return ApiError(400, f"{param}: {what}" if param else what, param=param, code="invalid_type")


def busy(waiting: int, retry_after_s: int) -> ApiError:
    """429: the queue is full."""
    return ApiError(
        429,
        f"{waiting} requests are waiting already; try again later",
        code="queue_full",
        headers={"Retry-After": str(retry_after_s)},
    )


def unavailable(message: str, code: str, retry_after_s: int = 2) -> ApiError:
    """503: not yet, or not any more."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(retry_after_s)})


def internal() -> ApiError:
    """500 for a bug; its details are in the log, not in the answer."""
    return ApiError(
        500, "an internal error ended this request; the log says more", code="internal_error"
    )
