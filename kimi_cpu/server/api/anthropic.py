"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kimi_cpu.errors import UserError
from kimi_cpu.server.api.anthropic_schema import (
    NAMES,
    ConversationFields,
    MessagesRequest,
    chat_request,
)
from kimi_cpu.server.api.blocks import Blocks, Closed, More, Opened
from kimi_cpu.server.api.body import read_body
from kimi_cpu.server.api.exchange import Exchange, in_own_words, prompt_of
from kimi_cpu.server.api.usage import new_id
from kimi_cpu.server.errors import ANTHROPIC_PATHS, ApiError
from kimi_cpu.server.jobs import Finished, Item, Step
from kimi_cpu.server.service import service_of
from kimi_cpu.server.sse import EventStream, named

#: The field of a block that a delta adds to.
_DELTAS = {"reasoning": "thinking", "text": "text", "call": "partial_json"}


async def messages(request: Request) -> Response:
    """Reply to a conversation, as one message or as a stream of events."""
    service = service_of(request)
    model = service.model
    body = await read_body(request, MessagesRequest)
    chat, origins = chat_request(body)
    try:
        exchange = await Exchange.begin(service, chat, "messages")
    except (ApiError, UserError) as error:
        raise in_own_words(error, origins, NAMES) from None
    omitted = (body.thinking or {}).get("display") == "omitted"
    events = MessageEvents(exchange, show_thinking=not omitted)
    if body.stream:
        return PingStream(exchange, events)
    items, _ = await exchange.whole(request)
    message = put_together(event for item in items for event in events.item(item))
    return JSONResponse({**events.head(), **message}, headers={"X-Model": model.name})


async def count_tokens(request: Request) -> Response:
    """The tokens of the prompt, also of one that is too long."""
    service = service_of(request)
    _ = service.model
    chat, origins = chat_request(await read_body(request, ConversationFields))
    try:
        prompt = await service.in_thread(prompt_of, service, chat, check=False)
    except UserError as error:
        raise in_own_words(error, origins, NAMES) from None
    return JSONResponse({"input_tokens": len(prompt.ids)})


class MessageEvents:
    """A reply as Anthropic's events: blocks of thinking, text and tool_use, one after the other."""

    def __init__(self, exchange: Exchange, *, show_thinking: bool = True) -> None:
        self._exchange = exchange
        self._show_thinking = show_thinking
        self._id = new_id("msg").replace("-", "_")
        self._blocks = Blocks()
        self._index = -1  # of the block under way, and what it is:
        self._kind = ""

    def head(self) -> dict[str, Any]:
        """The message before anything is said. How much of the prompt is there already shows when
        its turn comes: the last event has the right numbers."""
        n_prompt = len(self._exchange.job.reply.prompt)
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._exchange.service.model.name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(n_prompt, 0, 0, 0),
        }

    def item(self, item: Item) -> list[dict[str, Any]]:
        """The events of what has happened."""
        if isinstance(item, Step):
            changes = [change for event in item.events for change in self._blocks.push(event)]
            return self._events(changes)
        if isinstance(item, Finished):
            return self._finish(item)
        return []

    def _events(self, changes: list[Opened | More | Closed]) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        for change in changes:
            if isinstance(change, Opened):
                self._index += 1
                self._kind = change.kind
                events.append(self._of_block("start", content_block=_empty(change)))
            elif isinstance(change, More):
                if self._kind != "reasoning" or self._show_thinking:
                    events.append(self._delta(_DELTAS[self._kind], change.text))
            else:
                if self._kind == "reasoning":
                    events.append(self._delta("signature", _signature(change.text)))
                events.append(self._of_block("stop"))
        return events

    def _of_block(self, what: str, **fields: Any) -> dict[str, Any]:
        return {"type": f"content_block_{what}", "index": self._index, **fields}

    def _delta(self, field: str, text: str) -> dict[str, Any]:
        kind = "input_json" if field == "partial_json" else field
        return self._of_block("delta", delta={"type": f"{kind}_delta", field: text})

    def _finish(self, finished: Finished) -> list[dict[str, Any]]:
        self._exchange.remember(finished)
        counts = finished.result.usage
        usage = _usage(
            counts.prompt_tokens,
            counts.cached_tokens,
            counts.completion_tokens,
            counts.reasoning_tokens,
        )
        delta = {"stop_reason": self._stop_reason(finished), "stop_sequence": finished.result.stop}
        last = {"type": "message_delta", "delta": delta, "usage": usage}
        return [*self._events(self._blocks.close()), last, {"type": "message_stop"}]

    def _stop_reason(self, finished: Finished) -> str:
        result = finished.result
        if result.stop is not None:
            return "stop_sequence"
        if result.finish_reason == "tool_calls":
            return "tool_use"
        if result.finish_reason == "stop":
            return "end_turn"
        used = result.usage.prompt_tokens + result.usage.completion_tokens
        full = used >= self._exchange.service.model.context
        return "model_context_window_exceeded" if full else "max_tokens"


class PingStream(EventStream):
    """Anthropic's stream: events with names, and a ping in times of silence."""

    def __init__(self, exchange: Exchange, events: MessageEvents) -> None:
        heartbeat_s = exchange.service.settings.heartbeat_s
        super().__init__(exchange.job, exchange.outbox, _Frames(events), heartbeat_s)

    def heartbeat(self) -> bytes:
        return super().heartbeat() + named("ping", {"type": "ping"})


class _Frames:
    def __init__(self, events: MessageEvents) -> None:
        self._events = events

    def begin(self) -> bytes:
        return _frame({"type": "message_start", "message": self._events.head()})

    def item(self, item: Item) -> bytes:
        return b"".join(map(_frame, self._events.item(item)))

    def error(self, error: ApiError) -> bytes:
        return _frame(error.body(ANTHROPIC_PATHS))


def _frame(event: dict[str, Any]) -> bytes:
    return named(event["type"], event)


def put_together(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The fields of a message that its events make.

    A call that was cut off is left out: its input is no object yet.
    """
    blocks: list[dict[str, Any]] = []
    message: dict[str, Any] = {}
    arguments: dict[int, str] = {}
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append(dict(event["content_block"]))
        elif event["type"] == "content_block_delta":
            delta, index = event["delta"], event["index"]
            if delta["type"] == "input_json_delta":
                arguments[index] = arguments.get(index, "") + delta["partial_json"]
            else:
                field = delta["type"].removesuffix("_delta")
                blocks[index][field] += delta[field]
        elif event["type"] == "message_delta":
            message = {**event["delta"], "usage": event["usage"]}
    content = []
    for index, block in enumerate(blocks):
        if block["type"] == "tool_use":
            value = _object(arguments.get(index, ""))
            if value is None:
                continue
            block["input"] = value
        content.append(block)
    return {**message, "content": content}


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _empty(opened: Opened) -> dict[str, Any]:
    """A block as it begins."""
    if opened.call is not None:
        # Ids of this API have no dots and colons.
        own_id = re.sub(r"[^a-zA-Z0-9_-]", "_", opened.call.id)
        return {"type": "tool_use", "id": own_id, "name": opened.call.name, "input": {}}
    if opened.kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _signature(thought: str) -> str:
    """Nobody checks it: clients want to see one."""
    return base64.b64encode(hashlib.sha256(thought.encode("utf-8", "replace")).digest()).decode()


def _usage(prompt: int, cached: int, completion: int, reasoning: int) -> dict[str, Any]:
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": completion,
        "output_tokens_details": {"thinking_tokens": reasoning},
    }
