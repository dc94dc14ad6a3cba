"""The application: routes, errors, start and stop."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kimi_cpu.errors import UserError
from kimi_cpu.server.api import (
    anthropic,
    chat,
    completions,
    page,
    responses,
    routing,
    status,
    tokens,
)
from kimi_cpu.server.bodies import HoldBodies
from kimi_cpu.server.errors import ApiError
from kimi_cpu.server.metrics import Metrics
from kimi_cpu.server.security import Guard
from kimi_cpu.server.service import Service
from kimi_cpu.server.settings import Settings
from kimi_cpu.server.sse import ClientLeft, as_api_error
from kimi_cpu.server.worker import Worker

ROUTES = [
    Route("/v1/chat/completions", chat.chat_completions, methods=["POST"]),
    Route("/v1/messages", anthropic.messages, methods=["POST"]),
    Route("/v1/messages/count_tokens", anthropic.count_tokens, methods=["POST"]),
    Route("/v1/responses", responses.create, methods=["POST"]),
    Route("/v1/responses/{response_id}", responses.retrieve, methods=["GET"]),
    Route("/v1/responses/{response_id}", responses.delete, methods=["DELETE"]),
    Route("/v1/completions", completions.completions, methods=["POST"]),
    Route("/v1/models", status.models, methods=["GET"]),
    Route("/v1/models/{name:path}", status.model, methods=["GET"]),
    Route("/tokenize", tokens.tokenize, methods=["POST"]),
    Route("/detokenize", tokens.detokenize, methods=["POST"]),
    Route("/tokenizer_info", tokens.tokenizer_info, methods=["GET"]),
    Route("/health", status.health, methods=["GET"]),
    Route("/metrics", status.metrics, methods=["GET"]),
    Route("/routing", routing.routing, methods=["GET"]),
    Route("/", page.index, methods=["GET"]),
    Route("/favicon.ico", page.favicon, methods=["GET"]),
    Route("/static/{name}", page.static, methods=["GET"]),
]
_PATHS = frozenset(route.path for route in ROUTES)


def make_app(worker: Worker, settings: Settings, metrics: Metrics) -> Starlette:
    """The ASGI application. It starts the worker, and tells it to end when the server stops.

    To wait for that (`Worker.join`) is left to whoever runs it.

    Raises UsageError if `settings.log_prompts` cannot be written.
    """

    service = Service(worker, settings, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            worker.abort()
            service.close()

    def count(path: str, code: int) -> None:
        # Unknown paths are one: they must not fill the memory.
        metrics.answered(path if path in _PATHS else "other", code)

    middleware = [
        Middleware(Guard, settings=settings, on_answer=count),
        Middleware(HoldBodies, bodies=service.bodies),
    ]
    if settings.cors_origins:  # outside, so that pages can read what the guard says
        middleware.insert(
            0,
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors_origins),
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=["Retry-After"],
            ),
        )
    app = Starlette(
        routes=ROUTES,
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={
            ApiError: _answer_error,
            UserError: _answer_error,
            HTTPException: _answer_http_exception,
            ClientLeft: _answer_nobody,
            Exception: _answer_error,
        },
    )
    app.state.service = service
    app.state.routing_streams = routing.Streams()
    return app


async def _answer_error(request: Request, error: Exception) -> Response:
    answer = as_api_error(error)
    return JSONResponse(answer.body(request.url.path), answer.status, headers=answer.headers)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    method, path = request.method[:20], request.url.path[:200]
    text = {404: f"there is no {path}", 405: f"{method} is not for {path}"}
    answer = ApiError(error.status_code, text.get(error.status_code, error.detail))
    return JSONResponse(answer.body(request.url.path), answer.status, headers=error.headers)


async def _answer_nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nginx's "client closed request"; nobody reads it
