"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kimi_cpu.chat.generate import Sampled
from kimi_cpu.chat.parser import Content, Event, Reasoning, ToolCallArguments, ToolCallStart
from kimi_cpu.server.api.body import read_body
from kimi_cpu.server.api.exchange import ChatRequest, Exchange
from kimi_cpu.server.api.logprobs import chat_entry
from kimi_cpu.server.api.usage import new_id, now, timings, usage
from kimi_cpu.server.errors import ApiError
from kimi_cpu.server.jobs import Finished, Item, Scored, Step
from kimi_cpu.server.service import service_of
from kimi_cpu.server.sse import data

DONE = b"data: [DONE]\n\n"


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class CompletionRequest(ChatRequest, kw_only=True):
    """A conversation, and how its answer is sent."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None


async def chat_completions(request: Request) -> Response:
    """Reply to a conversation, as one answer or as a stream."""
    service = service_of(request)
    model = service.model
    body = await read_body(request, CompletionRequest)
    exchange = await Exchange.begin(service, body, "chat")
    answer = ChatAnswer(exchange, bool(body.logprobs))
    if body.stream:
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        return exchange.stream(ChatFrames(answer, include_usage))
    items, finished = await exchange.whole(request)
    return JSONResponse(answer.whole(items, finished), headers={"X-Model": model.name})


class ChatAnswer:
    """One answer: what is the same whether it is streamed or not."""

    def __init__(self, exchange: Exchange, with_logprobs: bool) -> None:
        self.id = new_id("chatcmpl")
        self.created = now()
        self.with_logprobs = with_logprobs
        self._exchange = exchange
        self._pending: list[dict[str, Any]] = []  # of tokens whose text is not certain yet

    @property
    def model(self) -> str:
        return self._exchange.service.model.name

    def note(self, sampled: Sampled | None) -> None:
        """Log probabilities of a token; those of the content are shown."""
        if sampled is not None and sampled.part == "content":
            self._pending.append(chat_entry(self._exchange.service.model.tokenizer, sampled))

    def take_logprobs(self) -> dict[str, Any] | None:
        """Those of the tokens up to here."""
        if not self.with_logprobs:
            return None
        taken, self._pending = self._pending, []
        return {"content": taken, "refusal": None}

    def finish(self, finished: Finished) -> None:
        """The reply has ended."""
        self._exchange.remember(finished)

    def whole(self, items: list[Item], finished: Finished) -> dict[str, Any]:
        """The answer of a request that is not streamed."""
        self.finish(finished)
        for item in items:
            if isinstance(item, Step):
                self.note(item.sampled)
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": [
                {
                    "index": 0,
                    "message": finished.result.message,
                    "logprobs": self.take_logprobs(),
                    "finish_reason": finished.result.finish_reason,
                }
            ],
            "usage": usage(finished),
            "timings": timings(finished),
        }


class ChatFrames:
    """A chat answer as chunks."""

    def __init__(self, answer: ChatAnswer, include_usage: bool) -> None:
        self._answer = answer
        self._include_usage = include_usage

    def begin(self) -> bytes:
        return self._chunk({"role": "assistant", "content": ""})

    def item(self, item: Item) -> bytes:
        if isinstance(item, Step):
            self._answer.note(item.sampled)
            return b"".join(self._event(event) for event in item.events)
        if isinstance(item, Scored):
            return b""
        self._answer.finish(item)
        last = self._chunk({}, item.result.finish_reason, timings=timings(item))
        if self._include_usage:
            last += data({**self._head(), "choices": [], "usage": usage(item)})
        return last + DONE

    def error(self, error: ApiError) -> bytes:
        return data(error.body())

    def _event(self, event: Event) -> bytes:
        if isinstance(event, Content):
            return self._chunk({"content": event.text}, logprobs=self._answer.take_logprobs())
        if isinstance(event, Reasoning):
            return self._chunk({"reasoning_content": event.text})
        if isinstance(event, ToolCallStart):
            function = {"name": event.name, "arguments": ""}
            call = {"index": event.index, "id": event.id, "type": "function", "function": function}
            return self._chunk({"tool_calls": [call]})
        if isinstance(event, ToolCallArguments):
            call = {"index": event.index, "function": {"arguments": event.text}}
            return self._chunk({"tool_calls": [call]})
        return b""

    def _head(self) -> dict[str, Any]:
        answer = self._answer
        return {
            "id": answer.id,
            "object": "chat.completion.chunk",
            "created": answer.created,
            "model": answer.model,
        }

    def _chunk(
        self,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        *,
        logprobs: dict[str, Any] | None = None,
        **more: Any,
    ) -> bytes:
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return data({**self._head(), "choices": [choice], **more})
