"""POST /v1/completions: text to be continued, as evaluation programs ask for it."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kimi_cpu.chat.generate import Reply
from kimi_cpu.chat.parser import Content
from kimi_cpu.sampling import SamplingParams
from kimi_cpu.server.api.body import read_body
from kimi_cpu.server.api.chat import DONE, StreamOptions
from kimi_cpu.server.api.logprobs import TextLogprobs, check_top
from kimi_cpu.server.api.sampling import SamplingFields, sampling_params
from kimi_cpu.server.api.usage import new_id, now, timings, usage
from kimi_cpu.server.errors import ApiError
from kimi_cpu.server.jobs import Finished, Item, Job, Outbox, Scored, Step
from kimi_cpu.server.prompts import check_length
from kimi_cpu.server.service import Service, service_of
from kimi_cpu.server.settings import ServedModel
from kimi_cpu.server.sse import EventStream, data, while_connected

DEFAULT_TOKENS = 16  # OpenAI's
MAX_PROMPTS = 2048
#: Prompts of one request that are under way at once.
AT_ONCE = 4


class CompletionRequest(SamplingFields, kw_only=True):
    prompt: str | list[str | int | list[int]]
    model: str | None = None
    max_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None


async def completions(request: Request) -> Response:
    """Continue each prompt."""
    service = service_of(request)
    model = service.model
    body = await read_body(request, CompletionRequest)
    prompts = await service.in_thread(_prompts, model, body)
    params, top = _checked(model, body, prompts)
    if body.stream:
        answer = TextAnswer(service, body, params, top, prompts[0])
        service.submit(answer.job)
        return EventStream(
            answer.job, answer.outbox, TextFrames(answer), service.settings.heartbeat_s
        )
    return JSONResponse(await while_connected(request, _all(service, body, params, top, prompts)))


async def _all(
    service: Service,
    body: CompletionRequest,
    params: SamplingParams,
    top: int | None,
    prompts: list[list[int]],
) -> dict[str, Any]:
    """The answers to all prompts, few at a time."""
    places = asyncio.Semaphore(AT_ONCE)
    answers: list[TextAnswer] = []

    async def one(index: int, prompt: list[int]) -> tuple[dict[str, Any], Finished]:
        async with places:
            answer = TextAnswer(service, body, params, top, prompt, index)
            answers.append(answer)
            service.submit(answer.job)
            items, finished = await answer.outbox.finished()
            return answer.choice(items), finished

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(i, prompt)) for i, prompt in enumerate(prompts)]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        for answer in answers:
            answer.job.cancel()
    done = [task.result() for task in tasks]
    counts = [usage(finished) for _, finished in done]
    total = dict(counts[0])
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        total[name] = sum(count[name] for count in counts)
    cached = sum(count["prompt_tokens_details"]["cached_tokens"] for count in counts)
    total["prompt_tokens_details"] = {"cached_tokens": cached}
    whole = {
        "id": new_id("cmpl"),
        "object": "text_completion",
        "created": now(),
        "model": service.model.name,
        "choices": [choice for choice, _ in done],
        "usage": total,
    }
    return whole | ({"timings": timings(done[0][1])} if len(done) == 1 else {})


def _prompts(model: ServedModel, body: CompletionRequest) -> list[list[int]]:
    """The prompts as ids. Text never becomes a control token; ids are taken as they are."""
    given = body.prompt
    if isinstance(given, str):
        given = [given]
    if len(given) > 1 and all(isinstance(one, int) for one in given):
        given = [[one for one in given if isinstance(one, int)]]
    elif len(given) > MAX_PROMPTS:
        raise ApiError(400, f"prompt: more than {MAX_PROMPTS} prompts", param="prompt")
    prompts: list[list[int]] = []
    for i, one in enumerate(given):
        if isinstance(one, str):
            prompts.append(model.tokenizer.encode_text(one))
        elif isinstance(one, int):
            if len(given) > 1:
                raise ApiError(400, f"prompt[{i}]: ids and texts are mixed", param="prompt")
            prompts.append([one])
        else:
            prompts.append(one)
    if not prompts:
        raise ApiError(400, "prompt: the list is empty", param="prompt")
    n_vocab = model.tokenizer.n_vocab
    for i, ids in enumerate(prompts):
        where = "prompt" if len(prompts) == 1 else f"prompt[{i}]"
        if not ids:
            raise ApiError(400, f"{where}: there is nothing to continue", param="prompt")
        for token in ids:
            if not 0 <= token < n_vocab:
                raise ApiError(
                    400, f"{where}: {token} is not an id from 0 to {n_vocab - 1}", param="prompt"
                )
        check_length(model, ids, where)
    return prompts


def _checked(
    model: ServedModel, body: CompletionRequest, prompts: list[list[int]]
) -> tuple[SamplingParams, int | None]:
    """The sampling parameters, and how many log probabilities a token are wanted."""
    if body.best_of not in (None, 1):
        raise ApiError(400, f"best_of is {body.best_of}: only 1", param="best_of")
    if body.suffix:
        raise ApiError(400, "suffix: text cannot be filled in", param="suffix")
    if body.stream and len(prompts) > 1:
        raise ApiError(400, "stream: only one prompt can be streamed", param="stream")
    if body.stream and body.echo and body.logprobs is not None:
        raise ApiError(400, "stream: not with echo and logprobs", param="stream")
    max_tokens = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens is 0: that needs echo", param="max_tokens")
    # A reply has one token at least; with 0 wanted it is not shown.
    params = sampling_params(body, model, max_tokens=max_tokens or 1)
    top = None if body.logprobs is None else check_top(body.logprobs, "logprobs")
    return params, top


class TextAnswer:
    """The continuation of one prompt."""

    def __init__(
        self,
        service: Service,
        body: CompletionRequest,
        params: SamplingParams,
        top: int | None,
        prompt: list[int],
        index: int = 0,
    ) -> None:
        model = service.model
        self.id = new_id("cmpl")
        self.created = now()
        self.model = model.name
        self.index = index
        self.include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self.echo = bool(body.echo)
        self.logprobs = None if top is None else TextLogprobs(model.tokenizer)
        self._shows_reply = body.max_tokens != 0
        self._tokenizer = model.tokenizer
        self._prompt = prompt
        self.outbox = Outbox()
        self.job = Job(
            Reply(
                model.tokenizer,
                prompt,
                params,
                plain=True,
                eos_token_ids=model.engine.config.eos_token_ids,
                top_logprobs=top,
            ),
            self.outbox,
            label="completion",
            score_top=top if self.echo else None,
        )

    @property
    def prompt_text(self) -> str:
        return self._tokenizer.decode(self._prompt)

    def note(self, item: Item) -> str:
        """Take in an item; returns the text that it adds."""
        if isinstance(item, Scored) and self.logprobs is not None:
            self.logprobs.add(self._prompt[0], None)
            for sampled in item.tokens:
                self.logprobs.add(sampled.token, sampled)
        if not isinstance(item, Step) or not self._shows_reply:
            return ""
        if item.sampled is not None and self.logprobs is not None:
            self.logprobs.add(item.sampled.token, item.sampled)
        return "".join(event.text for event in item.events if isinstance(event, Content))

    def choice(self, items: list[Item]) -> dict[str, Any]:
        """The choice of a request that is not streamed."""
        text = self.prompt_text if self.echo else ""
        reason = "stop"
        for item in items:
            text += self.note(item)
            if isinstance(item, Finished):
                reason = item.result.finish_reason
        return {
            "index": self.index,
            "text": text,
            "logprobs": None if self.logprobs is None else self.logprobs.take(),
            "finish_reason": reason,
        }


class TextFrames:
    """A continuation as chunks."""

    def __init__(self, answer: TextAnswer) -> None:
        self._answer = answer

    def begin(self) -> bytes:
        return self._chunk(self._answer.prompt_text) if self._answer.echo else b""

    def item(self, item: Item) -> bytes:
        answer = self._answer
        text = answer.note(item)
        if not isinstance(item, Finished):
            logprobs = answer.logprobs.take() if answer.logprobs and text else None
            return self._chunk(text, logprobs) if text else b""
        last = self._chunk("", None, item.result.finish_reason, timings=timings(item))
        if answer.include_usage:
            last += data({**self._head(), "choices": [], "usage": usage(item)})
        return last + DONE

    def error(self, error: ApiError) -> bytes:
        return data(error.body())

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._answer.id,
            "object": "text_completion",
            "created": self._answer.created,
            "model": self._answer.model,
        }

    def _chunk(
        self,
        text: str,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        **more: Any,
    ) -> bytes:
        choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        return data({**self._head(), "choices": [choice], **more})
