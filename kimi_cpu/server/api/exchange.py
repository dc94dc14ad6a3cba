"""A reply to a conversation: what all endpoints for conversations have in common.

Each brings its request into the form of chat completions (`ChatRequest`) and writes the items that
come back in its own form. Everything between is here, once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request

from kimi_cpu.chat.generate import Reply
from kimi_cpu.errors import UserError
from kimi_cpu.server.api.logprobs import check_top
from kimi_cpu.server.api.sampling import SamplingFields, sampling_params
from kimi_cpu.server.api.thinking import (
    budget_of_effort,
    budget_of_thinking,
    split_template_kwargs,
)
from kimi_cpu.server.errors import ApiError
from kimi_cpu.server.jobs import Finished, Item, Job, Outbox
from kimi_cpu.server.prompts import ChatPrompt, chat_prompt, chat_reply
from kimi_cpu.server.service import Service
from kimi_cpu.server.sse import EventStream, Frames, as_api_error, while_connected


class ChatRequest(SamplingFields, kw_only=True):
    """What this server understands of OpenAI's request; `messages` and `tools` are checked by
    `chat.messages`, `tool_choice` and `response_format` by `chat.grammar`."""

    messages: Any
    model: str | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: Any = None
    reasoning_effort: str | None = None
    thinking: bool | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Exchange:
    """One reply under way."""

    def __init__(self, service: Service, prompt: ChatPrompt, job: Job, outbox: Outbox) -> None:
        self.service = service
        self.prompt = prompt
        self.job = job
        self.outbox = outbox

    @classmethod
    async def begin(cls, service: Service, body: ChatRequest, label: str) -> Exchange:
        """Check a request, and hand it to the scheduler.

        label: what the log calls it. Raises UserError or ApiError naming the field.
        """
        prompt, reply = await service.in_thread(_prepare, service, body)
        outbox = Outbox()
        job = Job(reply, outbox, label=label)
        service.submit(job)
        return cls(service, prompt, job, outbox)

    async def whole(self, request: Request) -> tuple[list[Item], Finished]:
        """All items, and the last of them; ClientLeft when nobody waits any more."""
        try:
            return await while_connected(request, self.outbox.finished())
        finally:
            self.job.cancel()

    def stream(self, frames: Frames) -> EventStream:
        """The items as server-sent events."""
        heartbeat_s = self.service.settings.heartbeat_s
        return EventStream(self.job, self.outbox, frames, heartbeat_s)

    def remember(self, finished: Finished) -> None:
        """Keep the reply, for when the client sends it back."""
        reply, message, begun = self.job.reply, finished.result.message, self.prompt.begun
        if begun:  # clients put the two together
            message = {**message, "content": begun + (message["content"] or "")}
        self.service.replies.remember(self.prompt.key, message, [*reply.prompt, *reply.ids])


def prompt_of(service: Service, body: ChatRequest, *, check: bool = True) -> ChatPrompt:
    """The prompt of a request. It takes time: call it in a thread.

    check: refuse one that leaves no room for a reply.
    """
    budget, template_kwargs = _thinking(body)
    messages, begun = _begun(body.messages)
    return chat_prompt(
        service.model,
        service.replies,
        messages,
        body.tools,
        thinking=False if budget == 0 or begun else None,
        template_kwargs=template_kwargs,
        begun=begun,
        check=check,
    )


def _prepare(service: Service, body: ChatRequest) -> tuple[ChatPrompt, Reply]:
    """Everything about a request that can be wrong, and takes time."""
    model = service.model
    wanted = body.max_completion_tokens
    params = sampling_params(
        body,
        model,
        max_tokens=wanted if wanted is not None else body.max_tokens,
        thinking_budget=_thinking(body)[0],
    )
    if _begun(body.messages)[1]:
        if body.response_format is not None:
            raise ApiError(
                400,
                "response_format: not together with a message that is partial",
                param="response_format",
            )
        params = replace(params, thinking_budget=0)
    top = None
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if body.logprobs:
        top = check_top(body.top_logprobs or 0, "top_logprobs")
    prompt = prompt_of(service, body)
    reply = chat_reply(
        model,
        prompt,
        params,
        tool_choice=body.tool_choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        response_format=body.response_format,
        top_logprobs=top,
    )
    return prompt, reply


def _begun(messages: Any) -> tuple[Any, str]:
    """The messages before one of the assistant's that is `partial`, and its text."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, Mapping) or last.get("partial") is not True:
        return messages, ""
    where = f"messages[{len(messages) - 1}]"
    if last.get("role") != "assistant":
        raise ApiError(
            400, f"{where}.partial: only the assistant's message", param=f"{where}.partial"
        )
    if last.get("tool_calls"):
        raise ApiError(
            400,
            f"{where}.tool_calls: not in a message that is partial",
            param=f"{where}.tool_calls",
        )
    content, here = last.get("content"), f"{where}.content"
    if isinstance(content, list):
        parts = [text_part(part, f"{here}[{i}]", ["text"]) for i, part in enumerate(content)]
        content = "".join(part["text"] for part in parts)
    if content is not None and not isinstance(content, str):
        raise ApiError(400, f"{here}: neither a string nor a list of parts", param=here)
    return messages[:-1], content or ""


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


def in_own_words(
    error: ApiError | UserError, origins: Sequence[str], names: Mapping[str, str]
) -> ApiError:
    """An error about a `ChatRequest`, naming the field of the request that it was made from.

    origins: for each of `messages`, where it comes from.
    names: patterns of other fields -> what they are called there.
    """
    told = as_api_error(error)
    if told.param is None:
        return told
    own = told.param
    if (found := re.match(r"messages\[(\d+)\]", own)) and int(found[1]) < len(origins):
        own = origins[int(found[1])] + own[found.end() :]
    for pattern, name in names.items():
        own = re.sub(pattern, name, own, count=1)
    message = told.message.replace(told.param, own, 1)
    return ApiError(told.status, message, param=own, code=told.code, headers=told.headers)


def text_part(part: Any, where: str, kinds: Sequence[str]) -> dict[str, Any]:
    """A part of a message as OpenAI's text part; ApiError for all that is not text.

    kinds: the types that are. Nothing that a part points to is opened.
    """
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not isinstance(kind, str):
        raise ApiError(400, f"{where}: not an object with a type", param=where)
    if kind not in kinds:
        what = f"{where}: {kind[:60]!r} is not supported here, only {', '.join(kinds)}"
        raise ApiError(400, what, param=where)
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise ApiError(400, f"{where}.text: not a string", param=f"{where}.text")
    return {"type": "text", "text": text}
