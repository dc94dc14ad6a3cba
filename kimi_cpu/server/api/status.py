"""GET /health, /metrics, /v1/models."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kimi_cpu import __version__
from kimi_cpu.server.api.usage import now
from kimi_cpu.server.errors import ApiError
from kimi_cpu.server.service import Service, service_of

_STARTED = now()


async def health(request: Request) -> Response:
    """200 when requests are answered; 503 while the model loads, and at the end."""
    service = service_of(request)
    worker = service.worker
    body: dict[str, Any] = {"status": worker.state, "version": __version__}
    if worker.state == "ready":
        body |= {"model": service.model.name}
        if service.model.ceiling_tps is not None:
            body |= {"ceiling_tps": round(service.model.ceiling_tps, 3)}
        return JSONResponse(body)
    if worker.state == "loading":
        body |= {"phase": worker.phase, "loading_s": round(worker.loading_s, 1)}
    return JSONResponse(body, 503, headers={"Retry-After": "2"})


async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    text = service_of(request).metrics.text()
    return Response(text, media_type="text/plain; version=0.0.4")


async def models(request: Request) -> Response:
    """The one model, as a list."""
    return JSONResponse({"object": "list", "data": [_model(service_of(request))]})


async def model(request: Request) -> Response:
    """The one model, by its name."""
    service = service_of(request)
    name = request.path_params["name"]
    if name != service.model.name:
        raise ApiError(
            404,
            f"there is no model {name[:100]!r}, only {service.model.name!r}",
            param="model",
            code="model_not_found",
        )
    return JSONResponse(_model(service))


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model.name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "kimi-cpu",
        "max_model_len": service.model.context,
    }
