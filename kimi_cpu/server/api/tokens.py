"""POST /tokenize and /detokenize, GET /tokenizer_info."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kimi_cpu.chat.messages import normalise
from kimi_cpu.chat.template import encode_segments
from kimi_cpu.server.api.body import read_body
from kimi_cpu.server.errors import ApiError
from kimi_cpu.server.service import service_of
from kimi_cpu.server.settings import ServedModel


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """Either text (`prompt` as vLLM calls it, or `content` as llama.cpp does) or a conversation."""

    prompt: str | None = None
    content: str | None = None
    messages: Any = None
    tools: Any = None
    add_generation_prompt: bool = True


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    tokens: list[int]


async def tokenize(request: Request) -> Response:
    """The ids of a text, in which nothing is a control token, or of a rendered conversation."""
    service = service_of(request)
    model = service.model
    body = await read_body(request, TokenizeRequest)
    ids = await service.in_thread(_ids, model, body)
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": model.context})


async def detokenize(request: Request) -> Response:
    """The text of ids, control tokens spelled out."""
    service = service_of(request)
    tokenizer = service.model.tokenizer
    body = await read_body(request, DetokenizeRequest)
    for i, token in enumerate(body.tokens):
        if not 0 <= token < tokenizer.n_vocab:
            raise ApiError(
                400,
                f"tokens[{i}]: {token} is not an id from 0 to {tokenizer.n_vocab - 1}",
                param=f"tokens[{i}]",
            )
    text = await service.in_thread(tokenizer.decode, body.tokens)
    return JSONResponse({"prompt": text, "content": text})


async def tokenizer_info(request: Request) -> Response:
    """The names of some control tokens: with the two above, all that lm-eval needs to know."""
    known = service_of(request).model.tokenizer.special_tokens
    names = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]"}
    return JSONResponse({field: name if name in known else None for field, name in names.items()})


def _ids(model: ServedModel, body: TokenizeRequest) -> list[int]:
    if body.messages is not None:
        conversation = normalise(body.messages, body.tools)
        segments = model.template.render_segments(
            conversation.messages, conversation.tools, body.add_generation_prompt
        )
        return encode_segments(model.tokenizer, segments)
    text = body.prompt if body.prompt is not None else body.content
    if text is None:
        raise ApiError(400, "prompt: missing (or messages)", param="prompt")
    return model.tokenizer.encode_text(text)
