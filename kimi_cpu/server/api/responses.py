"""POST /v1/responses, and GET and DELETE of what it kept: OpenAI's Responses API."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kimi_cpu.errors import UserError
from kimi_cpu.server.api.blocks import Blocks, Closed, More, Opened
from kimi_cpu.server.api.body import read_body
from kimi_cpu.server.api.exchange import Exchange, in_own_words
from kimi_cpu.server.api.logprobs import chat_entry
from kimi_cpu.server.api.responses_schema import NAMES, ResponsesRequest, chat_request
from kimi_cpu.server.api.usage import new_id, now, timings
from kimi_cpu.server.errors import ApiError
from kimi_cpu.server.jobs import Finished, Item, Step
from kimi_cpu.server.service import Service, service_of
from kimi_cpu.server.sse import named
from kimi_cpu.server.stored import Stored


async def create(request: Request) -> Response:
    """Reply to a conversation, as one response or as a stream of events."""
    service = service_of(request)
    model = service.model
    body = await read_body(request, ResponsesRequest)
    earlier: tuple[dict[str, Any], ...] = ()
    if body.previous_response_id:
        earlier = _stored(service, body.previous_response_id, "previous_response_id").messages
    chat, origins = chat_request(body, earlier, service.stored.find_item)
    try:
        exchange = await Exchange.begin(service, chat, "responses")
    except (ApiError, UserError) as error:
        raise in_own_words(error, origins, NAMES) from None
    conversation = chat.messages[1:] if body.instructions else chat.messages
    events = ResponseEvents(exchange, body, tuple(conversation))
    if body.stream:
        return exchange.stream(_Frames(events))
    items, _ = await exchange.whole(request)
    for item in items:
        events.item(item)
    return JSONResponse(events.response, headers={"X-Model": model.name})


async def retrieve(request: Request) -> Response:
    """A response that was kept."""
    service = service_of(request)
    return JSONResponse(_stored(service, request.path_params["response_id"]).body)


async def delete(request: Request) -> Response:
    """Forget a response."""
    service, response_id = service_of(request), request.path_params["response_id"]
    _stored(service, response_id)
    service.stored.drop(response_id)
    return JSONResponse({"id": response_id, "object": "response", "deleted": True})


def _stored(service: Service, response_id: str, param: str | None = None) -> Stored:
    found = service.stored.find(response_id)
    if found is None:
        where = f"{param}: " if param else ""
        raise ApiError(
            400 if param else 404,  # as OpenAI has it
            f"{where}there is no response {response_id[:80]!r}: they are kept in memory, the last "
            "ones only, and not with store: false. Send the whole conversation as input.",
            param=param,
            code="previous_response_not_found" if param else "not_found",
        )
    return found


class ResponseEvents:
    """A reply as events of the Responses API.

    Attributes:
        response: the response as far as it is known; all of it after `Finished`.
    """

    def __init__(
        self, exchange: Exchange, body: ResponsesRequest, conversation: tuple[dict[str, Any], ...]
    ) -> None:
        """conversation: what the response answers, to be kept with it."""
        self._exchange = exchange
        self._body = body
        self._conversation = conversation
        self._blocks = Blocks()
        self._number = 0  # of the next event
        self._output: list[dict[str, Any]] = []
        self._item: dict[str, Any] = {}  # under way, the next of the output
        self._logprobs: list[dict[str, Any]] = []  # of its tokens
        self._n_shown = 0  # of these
        self.response: dict[str, Any] = {
            "id": new_id("resp").replace("-", "_"),
            "object": "response",
            "created_at": now(),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": exchange.service.model.name,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None, **(body.reasoning or {})},
            "store": body.store is not False,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}, **(body.text or {})},
            "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
            "tools": body.tools or [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def begin(self) -> list[dict[str, Any]]:
        """The first events."""
        return [
            self._event(name, response=dict(self.response))
            for name in ("response.created", "response.in_progress")
        ]

    def item(self, item: Item) -> list[dict[str, Any]]:
        """The events of what has happened."""
        if isinstance(item, Step):
            self._note(item)
            changes = [change for event in item.events for change in self._blocks.push(event)]
            return self._changes(changes)
        if isinstance(item, Finished):
            return self._finish(item)
        return []

    def failed(self, error: ApiError) -> list[dict[str, Any]]:
        """The last event of a reply that was broken off."""
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        self.response["status"] = "failed"
        self.response["error"] = {"code": code, "message": error.message}
        self.response["output"] = self._output
        return [self._event("response.failed", response=self.response)]

    def _note(self, step: Step) -> None:
        """Log probabilities of a token of the text."""
        sampled = step.sampled
        if sampled is not None and sampled.part == "content":
            tokenizer = self._exchange.service.model.tokenizer
            self._logprobs.append(chat_entry(tokenizer, sampled))

    def _changes(self, changes: list[Opened | More | Closed]) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        for change in changes:
            if isinstance(change, Opened):
                events += self._open(change)
            elif isinstance(change, More):
                more = self._logprobs[self._n_shown :]
                self._n_shown = len(self._logprobs)
                events.append(self._of_text("delta", more, delta=change.text))
            else:
                events += self._close(change)
        return events

    def _open(self, opened: Opened) -> list[dict[str, Any]]:
        item: dict[str, Any] = {"status": "in_progress"}
        if opened.call is not None:
            item |= {"id": new_id("fc"), "type": "function_call", "call_id": opened.call.id}
            item |= {"name": opened.call.name, "arguments": ""}
        elif opened.kind == "reasoning":
            item |= {"id": new_id("rs"), "type": "reasoning", "summary": [], "content": []}
        else:
            item |= {"id": new_id("msg"), "type": "message", "role": "assistant", "content": []}
        item["id"] = item["id"].replace("-", "_")
        self._item = item
        if opened.kind != "text":
            self._logprobs, self._n_shown = [], 0  # of blanks that are not shown
        added = self._of_item("response.output_item.added", item=dict(item))
        return [added] if opened.call else [added, self._of_part("added", "", [])]

    def _close(self, closed: Closed) -> list[dict[str, Any]]:
        item, text = self._item, closed.text
        item["status"] = "completed" if closed.complete else "incomplete"
        if item["type"] == "function_call":
            item["arguments"] = text
            events = [self._of_text("done", [], arguments=text)]
        else:
            logprobs: list[dict[str, Any]] = []
            if item["type"] == "message":
                logprobs, self._logprobs, self._n_shown = self._logprobs, [], 0
            item["content"] = [_part(item, text, logprobs)]
            events = [self._of_text("done", logprobs, text=text)]
            events.append(self._of_part("done", text, logprobs))
        events.append(self._of_item("response.output_item.done", item=item))
        self._output.append(item)
        return events

    def _finish(self, finished: Finished) -> list[dict[str, Any]]:
        self._exchange.remember(finished)
        events = self._changes(self._blocks.close())
        result, response = finished.result, self.response
        counts = result.usage
        cut = result.finish_reason == "length"
        response["status"] = "incomplete" if cut else "completed"
        response["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        response["output"] = self._output
        response["usage"] = {
            "input_tokens": counts.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": counts.cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": counts.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": counts.reasoning_tokens},
            "total_tokens": counts.prompt_tokens + counts.completion_tokens,
        }
        response["timings"] = timings(finished)
        if self._body.store is not False:
            messages = (*self._conversation, dict(result.message))
            self._exchange.service.stored.keep(messages, response)
        return [*events, self._event(f"response.{response['status']}", response=response)]

    def _of_text(self, what: str, logprobs: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        """An event of the text of an item: delta or done."""
        kind = self._item["type"]
        if kind == "function_call":
            return self._of_item(f"response.function_call_arguments.{what}", **fields)
        if kind == "reasoning":
            return self._of_item(f"response.reasoning_text.{what}", content_index=0, **fields)
        fields |= {"content_index": 0, "logprobs": logprobs}
        return self._of_item(f"response.output_text.{what}", **fields)

    def _of_part(self, what: str, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        part = _part(self._item, text, logprobs)
        return self._of_item(f"response.content_part.{what}", content_index=0, part=part)

    def _of_item(self, name: str, **fields: Any) -> dict[str, Any]:
        if "item" not in fields:
            fields["item_id"] = self._item["id"]
        return self._event(name, output_index=len(self._output), **fields)

    def _event(self, name: str, **fields: Any) -> dict[str, Any]:
        number, self._number = self._number, self._number + 1
        return {"type": name, "sequence_number": number, **fields}


class _Frames:
    def __init__(self, events: ResponseEvents) -> None:
        self._events = events

    def begin(self) -> bytes:
        return _written(self._events.begin())

    def item(self, item: Item) -> bytes:
        return _written(self._events.item(item))

    def error(self, error: ApiError) -> bytes:
        return _written(self._events.failed(error))


def _written(events: list[dict[str, Any]]) -> bytes:
    return b"".join(named(event["type"], event) for event in events)


def _part(item: dict[str, Any], text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    if item["type"] == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
