"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kimi_cpu.chat.generate import Reply, Sampled
from kimi_cpu.chat.parser import Content, Event, Reasoning, ToolCallArguments, ToolCallStart
from kimi_cpu.sampling import SamplingParams
from kimi_cpu.server.api.body import read_body
from kimi_cpu.server.api.logprobs import chat_entry, check_top
from kimi_cpu.server.api.sampling import SamplingFields, sampling_params
from kimi_cpu.server.api.thinking import (
    budget_of_effort,
    budget_of_thinking,
    split_template_kwargs,
)
from kimi_cpu.server.api.usage import new_id, now, timings, usage
from kimi_cpu.server.errors import ApiError
from kimi_cpu.server.jobs import Finished, Item, Job, Outbox, Scored, Step
from kimi_cpu.server.prompts import ChatPrompt, chat_prompt
from kimi_cpu.server.service import Service, service_of
from kimi_cpu.server.sse import EventStream, data, while_connected

DONE = b"data: [DONE]\n\n"


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class ChatRequest(SamplingFields, kw_only=True):
    """What this server understands of OpenAI's request; `messages` and `tools` are checked by
    `chat.messages`."""

    messages: Any
    model: str | None = None
    tools: Any = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    thinking: bool | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


async def chat_completions(request: Request) -> Response:
    """Reply to a conversation, as one answer or as a stream."""
    service = service_of(request)
    model = service.model
    body = await read_body(request, ChatRequest)
    prompt, reply = await service.in_thread(_prepare, service, body)
    outbox = Outbox()
    job = Job(reply, outbox, label="chat")
    answer = ChatAnswer(service, prompt, job, bool(body.logprobs))
    if body.stream:
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        service.worker.submit(job)
        return EventStream(
            job, outbox, ChatFrames(answer, include_usage), service.settings.heartbeat_s
        )
    service.worker.submit(job)
    try:
        items, finished = await while_connected(request, outbox.finished())
    finally:
        job.cancel()
    return JSONResponse(answer.whole(items, finished), headers={"X-Model": model.name})


def _prepare(service: Service, body: ChatRequest) -> tuple[ChatPrompt, Reply]:
    """Everything about a request that can be wrong, and takes time."""
    model = service.model
    budget, template_kwargs = _thinking(body)
    params = sampling_params(
        body,
        model,
        max_tokens=body.max_completion_tokens
        if body.max_completion_tokens is not None
        else body.max_tokens,
        thinking_budget=budget,
    )
    top = None
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if body.logprobs:
        top = check_top(body.top_logprobs or 0, "top_logprobs")
    prompt = chat_prompt(
        model,
        service.replies,
        body.messages,
        body.tools,
        thinking=False if budget == 0 else None,
        template_kwargs=template_kwargs,
    )
    reply = _reply(service, body, params, prompt, top)
    return prompt, reply


def _reply(
    service: Service,
    body: ChatRequest,
    params: SamplingParams,
    prompt: ChatPrompt,
    top_logprobs: int | None,
) -> Reply:
    model = service.model
    tools = prompt.conversation.tools
    return Reply(
        model.tokenizer,
        prompt.ids,
        params,
        allow_tools=bool(tools) and body.tool_choice != "none",
        max_calls=1 if body.parallel_tool_calls is False else None,
        next_call_index=prompt.conversation.next_call_index,
        eos_token_ids=model.engine.config.eos_token_ids,
        top_logprobs=top_logprobs,
    )


def _thinking(body: ChatRequest) -> tuple[int | None, dict[str, Any]]:
    """The bound of the reasoning, and what is left of the template's variables."""
    budget, says, template_kwargs = split_template_kwargs(body.chat_template_kwargs)
    if says:
        return budget, template_kwargs
    if body.thinking is not None:
        return budget_of_thinking(body.thinking), template_kwargs
    if body.reasoning_effort is not None:
        return budget_of_effort(body.reasoning_effort), template_kwargs
    return None, template_kwargs


class ChatAnswer:
    """One answer: what is the same whether it is streamed or not."""

    def __init__(self, service: Service, prompt: ChatPrompt, job: Job, with_logprobs: bool) -> None:
        self.id = new_id("chatcmpl")
        self.created = now()
        self.with_logprobs = with_logprobs
        self._service = service
        self._prompt = prompt
        self._job = job
        self._pending: list[dict[str, Any]] = []  # of tokens whose text is not certain yet

    @property
    def model(self) -> str:
        return self._service.model.name

    def note(self, sampled: Sampled | None) -> None:
        """Log probabilities of a token; those of the content are shown."""
        if sampled is not None and sampled.part == "content":
            self._pending.append(chat_entry(self._service.model.tokenizer, sampled))

    def take_logprobs(self) -> dict[str, Any] | None:
        """Those of the tokens up to here."""
        if not self.with_logprobs:
            return None
        taken, self._pending = self._pending, []
        return {"content": taken, "refusal": None}

    def finish(self, finished: Finished) -> None:
        """Remember the reply, for when the client sends it back."""
        reply = self._job.reply
        self._service.replies.remember(
            self._prompt.key, finished.result.message, [*reply.prompt, *reply.ids]
        )

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
