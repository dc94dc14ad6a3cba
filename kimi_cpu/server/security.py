"""Who may ask: the API key, and protection of local servers from web pages.

A page in a browser can reach a server on this machine, also under a name that its owner makes
resolve to 127.0.0.1 (DNS rebinding). So without an API key only names of this machine are accepted
as Host, and a request with an Origin must come from a page that this server itself delivered, or
from one that the operator named.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kimi_cpu.server.errors import ApiError
from kimi_cpu.server.settings import Settings

#: Answered without the key: the page has to load before one can type it in, and probes have none.
PUBLIC_PATHS = frozenset({"/", "/health", "/favicon.ico"})
PUBLIC_PREFIXES = ("/static/",)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware: refuses requests, and tells `on_answer` (path, status) of all."""

    def __init__(
        self, app: ASGIApp, settings: Settings, on_answer: Callable[[str, int], None]
    ) -> None:
        self._app = app
        self._settings = settings
        self._on_answer = on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = str(scope["path"])

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._on_answer(path, int(message["status"]))
            await send(message)

        try:
            self._check(path, Headers(scope=scope))
        except ApiError as error:
            response = JSONResponse(error.body(path), error.status, headers=error.headers)
            await response(scope, receive, watched)
            return
        await self._app(scope, receive, watched)

    def _check(self, path: str, headers: Headers) -> None:
        host = headers.get("host", "")
        if self._settings.api_key is None:
            name = _host_name(host)
            if not (is_loopback(name) or name == self._settings.host.lower()):
                raise ApiError(
                    403,
                    f"the Host {host[:100]!r} is not a name of this machine",
                    code="wrong_host",
                )
        origin = headers.get("origin")
        if origin is not None and not self._knows(origin, host):
            raise ApiError(
                403,
                f"pages of {origin[:100]!r} may not use this server; start it with --cors-origin "
                "to let them",
                code="wrong_origin",
            )
        if self._settings.api_key is None:
            return
        if path in PUBLIC_PATHS or path.startswith(PUBLIC_PREFIXES):
            return
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        expected = self._settings.api_key
        if not hmac.compare_digest(given.encode(), expected.encode()):
            raise ApiError(
                401,
                "the API key is wrong" if given else "an API key is needed",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _knows(self, origin: str, host: str) -> bool:
        allowed = self._settings.cors_origins
        if "*" in allowed or origin in allowed:
            return True
        return urlsplit(origin).netloc.lower() == host.lower() != ""


def _host_name(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
