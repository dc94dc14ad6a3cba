"""Reading and checking what a client sends."""

from __future__ import annotations

import asyncio
import re
from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from kimi_cpu.server.errors import ApiError, from_validation
from kimi_cpu.server.service import service_of

T = TypeVar("T")

#: A client that takes longer to send its request is given up.
READ_TIMEOUT_S = 60.0


async def read_body(request: Request, form: type[T]) -> T:
    """The request's JSON body as a msgspec Struct; unknown fields are ignored.

    Raises ApiError: 413 too large, 503 too large beside those of other requests, 408 too slow, 400
    not JSON or a field of the wrong type.
    """
    service = service_of(request)
    limit = service.settings.max_body_bytes
    too_large = ApiError(413, f"the body is larger than {limit:,} bytes", code="too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            async for part in request.stream():
                if len(body) + len(part) > limit:
                    raise too_large
                service.bodies.take(request.scope, len(part))
                body += part
    except TimeoutError:
        raise ApiError(408, "the body did not arrive in time", code="timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "the client left while sending", code="incomplete") from None
    try:
        return _decoded(body, form)
    except msgspec.ValidationError as error:
        raise from_validation(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None


#: An escape of JSON: a pair of surrogates, a lone one (group 1), or anything else.
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb"|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)


def _decoded(body: bytes | bytearray, form: type[T]) -> T:
    """msgspec's decoding, but for lone surrogates: clients that cut texts in UTF-16 send them."""
    try:
        return msgspec.json.decode(body, type=form)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        whole = _ESCAPE.sub(lambda found: rb"\ufffd" if found[1] else found[0], body)
        if whole == body:
            raise
    return msgspec.json.decode(whole, type=form)
