"""One reply: sample, step, parse, until something ends it.

`generate` yields the parser's events (Reasoning, Content, ToolCallStart, ToolCallArguments,
ToolCallEnd) as soon as they are certain and a `Result` last. It decides what may be sampled:

- Control tokens that belong to the other side of a conversation (user and system turns, padding,
  `[BOS]`, media, reserved ids) are never sampled, so the model cannot forge a turn. What remains
  is what a reply is made of: `<think>`, `</think>`, the tool-call tokens (only when tools are
  declared) and the two that end it, `<|im_end|>` and `[EOS]`.
- With thinking off (budget 0) the prompt ends in `<think></think>`, as the template writes an
  answer without reasoning (appended here if it is missing), and neither token may come again.
- A reasoning that reaches its budget is closed by a forced `</think>`, and may not reopen.

The token that ends a reply is neither stepped nor counted: the next prompt brings it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from kimi_cpu.chat.parser import (
    Content,
    Event,
    StreamParser,
    ToolCallStart,
    starts_in_reasoning,
)
from kimi_cpu.config import ModelConfig
from kimi_cpu.errors import ContextError, TokenizerError
from kimi_cpu.sampling import Sampler, SamplingParams
from kimi_cpu.tokenizer import Tokenizer

THINK, END_THINK = "<think>", "</think>"
TOOL_TOKENS = (
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
)
END_TOKENS = ("<|im_end|>", "[EOS]")
TURN_TOKENS = ("<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<|im_end|>")

#: A vocabulary may have rows without a token, up to a multiple of 256.
MAX_PADDING = 255

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


class SessionLike(Protocol):
    """What `generate` needs of an `engine.Session`."""

    @property
    def remaining(self) -> int: ...
    def common_prefix(self, ids: Sequence[int], /) -> int: ...
    def sync(
        self, ids: Sequence[int], progress: Callable[[int, int], None] | None = None
    ) -> NDArray[np.float32]: ...
    def step(self, token: int, /) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class Usage:
    """Token counts. `cached_tokens` of the prompt were on the timeline already."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Timings:
    """Seconds from the call of `generate`; `decode_tps` is of the tokens after the first."""

    prompt_s: float
    first_token_s: float
    total_s: float
    decode_tps: float


@dataclass(frozen=True)
class Result:
    """How the reply ended, and all of it.

    message: an assistant message: role, content, and if present reasoning_content, tool_calls
        (complete calls only).
    """

    finish_reason: FinishReason
    message: dict[str, Any]
    usage: Usage
    timings: Timings
    token_ids: tuple[int, ...] = field(repr=False)


class _Cancelled(Exception):
    pass


class StopMatcher:
    """Finds stop strings in streamed text; holds back only what may still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is now certain, and whether a stop string follows it."""
        if not self._stops:
            return text, False
        text = self._held + text
        # The one that is complete first counts, so that it does not matter how text is cut up.
        hits = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            self._held = ""
            return text[: min(hits)[1]], True
        keep = max(_overlap(text, stop) for stop in self._stops)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """What was held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that begins stop."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raise TokenizerError unless the tokenizer may be the one that the model was trained with.

    With another one the model would read and write nonsense, without any other error.
    """
    hint = "The tokenizer files and the weights must be of the same checkpoint."
    spare = config.vocab_size - tokenizer.n_vocab
    if not 0 <= spare <= MAX_PADDING:
        raise TokenizerError(
            f"the tokenizer has {tokenizer.n_vocab:,} ids, config.json says vocab_size = "
            f"{config.vocab_size:,}",
            hint,
        )
    for name in TURN_TOKENS:
        if name not in tokenizer.special_tokens:
            raise TokenizerError(f"the tokenizer has no control token {name!r}", hint)
    for token in config.eos_token_ids:
        if not tokenizer.is_control(token):
            text = tokenizer.decode([token])
            raise TokenizerError(
                f"eos_token_id {token} is the text {text!r} in the tokenizer, no control token",
                hint,
            )


def supports_thinking(tokenizer: Tokenizer) -> bool:
    """Whether the checkpoint's tokenizer has the two thinking tokens."""
    return THINK in tokenizer.special_tokens and END_THINK in tokenizer.special_tokens


def generate(
    session: SessionLike,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    *,
    allow_tools: bool = False,
    next_call_index: int = 0,
    eos_token_ids: Sequence[int] = (),
    cancelled: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Event | Result]:
    """Reply to `prompt_ids` (ending in the generation prompt) on `session`.

    allow_tools: tools are declared in the prompt, so calls may be made.
    next_call_index: the conversation's, see `messages.Conversation`.
    eos_token_ids: the config's, which end a reply beside `<|im_end|>` and `[EOS]`.
    cancelled: asked before each token and between chunks of the prompt; when true the reply ends
        at once with finish_reason "cancelled". The session is left at a token border, whether
        cancelled, abandoned or interrupted: the next `sync` works.
    progress: told (done, all) of the prompt tokens that have to be computed.

    Raises ContextError when the prompt does not fit; a reply that fills the context ends with
    finish_reason "length".
    """
    prompt = _continued(tokenizer, prompt_ids, params)
    parser = StreamParser(
        tokenizer,
        in_reasoning=starts_in_reasoning(tokenizer, prompt),
        next_call_index=next_call_index,
    )
    reply = _Reply(session, tokenizer, params, parser, allow_tools, eos_token_ids, cancelled)
    return reply.run(prompt, progress)


def _continued(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], params: SamplingParams
) -> list[int]:
    """The prompt, with the reasoning closed beforehand when thinking is off."""
    prompt, ids = list(prompt_ids), tokenizer.special_tokens
    off = params.thinking_budget == 0 and supports_thinking(tokenizer)
    if off and prompt[-1:] != [ids[END_THINK]]:
        if prompt[-1:] != [ids[THINK]]:  # K2.5's template opens it itself
            prompt.append(ids[THINK])
        prompt.append(ids[END_THINK])
    return prompt


class _Reply:
    def __init__(
        self,
        session: SessionLike,
        tokenizer: Tokenizer,
        params: SamplingParams,
        parser: StreamParser,
        allow_tools: bool,
        eos_token_ids: Sequence[int],
        cancelled: Callable[[], bool],
    ) -> None:
        self._session = session
        self._tokenizer = tokenizer
        self._params = params
        self._cancelled = cancelled
        ids = tokenizer.special_tokens
        self._ends = {ids[name] for name in END_TOKENS if name in ids} | {*eos_token_ids}
        allowed = {*END_TOKENS}
        if supports_thinking(tokenizer) and params.thinking_budget != 0:
            allowed |= {THINK, END_THINK}
        if allow_tools:
            allowed |= {*TOOL_TOKENS}
        self._banned = [i for name, i in ids.items() if name not in allowed and i not in self._ends]
        self._parser = parser
        self._stop = StopMatcher(params.stop)
        self._content = ""
        self._started = time.perf_counter()

    def run(
        self, prompt: list[int], progress: Callable[[int, int], None] | None
    ) -> Iterator[Event | Result]:
        cached = self._session.common_prefix(prompt)
        sampler = Sampler(self._params, prompt, self._banned)
        parser = self._parser
        ids: list[int] = []
        n_reasoning = 0
        prompt_s = first_s = 0.0
        reason: FinishReason | None = None

        def between_layers(done: int, total: int) -> None:
            if progress is not None:
                progress(done, total)
            if self._cancelled() and done < total:
                raise _Cancelled

        try:
            logits = self._session.sync(prompt, between_layers)
            sampler.ban(*range(self._tokenizer.n_vocab, logits.size))
        except _Cancelled:
            reason = "cancelled"
        prompt_s = self._elapsed()
        limit = self._params.max_tokens
        while reason is None:
            if self._cancelled():
                reason = "cancelled"
                break
            token = self._next(sampler, logits, n_reasoning)
            if not ids:
                first_s = self._elapsed()
            if token in self._ends:
                reason = "stop"
                break
            ids.append(token)
            sampler.accept(token)
            n_reasoning += parser.in_reasoning and not self._tokenizer.is_control(token)
            stopped = yield from self._emit(parser.push(token))
            if stopped:
                reason = "stop"
            elif (limit is not None and len(ids) >= limit) or self._session.remaining <= 0:
                reason = "length"
            else:
                try:
                    logits = self._session.step(token)
                except ContextError:  # no memory for a longer cache
                    reason = "length"
        stopped_inside = reason == "stop" and token not in self._ends
        if not stopped_inside:
            stopped_inside = yield from self._emit(parser.finish())
        if not stopped_inside:
            yield from self._certain(self._stop.flush())
        message = self._message(cut=reason in ("length", "cancelled"))
        if reason == "stop" and message.get("tool_calls") and not stopped_inside:
            reason = "tool_calls"
        total_s = self._elapsed()
        decode_s = total_s - first_s
        yield Result(
            finish_reason=reason,
            message=message,
            usage=Usage(len(prompt), len(ids), n_reasoning, cached),
            timings=Timings(
                prompt_s=prompt_s,
                first_token_s=first_s if ids else total_s,
                total_s=total_s,
                decode_tps=(len(ids) - 1) / decode_s if len(ids) > 1 and decode_s > 0 else 0.0,
            ),
            token_ids=tuple(ids),
        )

    def _next(self, sampler: Sampler, logits: NDArray[np.float32], n_reasoning: int) -> int:
        budget = self._params.thinking_budget
        if self._parser.in_reasoning and budget is not None and n_reasoning >= budget:
            ids = self._tokenizer.special_tokens
            sampler.ban(ids[THINK], ids[END_THINK])
            return ids[END_THINK]
        return sampler.sample(logits)

    def _emit(self, events: list[Event]) -> Generator[Event, None, bool]:
        """Yield events, watching the content for stop strings; returns whether one was found."""
        for event in events:
            if isinstance(event, Content):
                text, found = self._stop.push(event.text)
                yield from self._certain(text)
                if found:
                    return True
            else:
                if isinstance(event, ToolCallStart):
                    yield from self._certain(self._stop.flush())
                yield event
        return False

    def _certain(self, text: str) -> Iterator[Event]:
        if text:
            self._content += text
            yield Content(text)

    def _message(self, cut: bool) -> dict[str, Any]:
        """The assistant message; when the reply was cut, without the call that this broke."""
        parsed = self._parser.message()
        message: dict[str, Any] = {"role": "assistant", "content": self._content or None}
        if parsed.get("reasoning_content"):
            message["reasoning_content"] = parsed["reasoning_content"]
        made = zip(parsed.get("tool_calls") or [], self._parser.calls, strict=True)
        if calls := [shown for shown, call in made if call.complete or not cut]:
            message["tool_calls"] = calls
        return message

    def _elapsed(self) -> float:
        return time.perf_counter() - self._started
