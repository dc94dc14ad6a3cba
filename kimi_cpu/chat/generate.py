"""One reply: sample, step, parse, until something ends it.

`Reply` is the reply as a state machine without a model: its owner computes `prompt`, then feeds it
logits, gets events and steps `token`, until `finish_reason` is set. A server drives many of them in
turn; `generate` drives one on one session.

Events are the parser's (Reasoning, Content, ToolCallStart, ToolCallArguments, ToolCallEnd), as soon
as they are certain. A reply decides what may be sampled:

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from kimi_cpu.chat.grammar import DeadEndError
from kimi_cpu.chat.parser import (
    Content,
    Event,
    StreamParser,
    ToolCallEnd,
    ToolCallStart,
    starts_in_reasoning,
)
from kimi_cpu.config import ModelConfig
from kimi_cpu.errors import ContextError, TokenizerError
from kimi_cpu.sampling import AllowedBits, Sampler, SamplingParams, logprobs
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


class Constraint(Protocol):
    """What narrows the choice of the next token: a grammar."""

    def mask(self) -> AllowedBits | None:
        """The ids that may come next (uint32 words, lowest bit first); None: any."""
        ...

    def accept(self, token: int, /) -> None:
        """This token joined the reply, sampled or forced."""
        ...


@dataclass(frozen=True)
class Sampled:
    """A token that was chosen, with log probabilities (natural, of the model's own
    distribution at temperature 1).

    part: "content", "reasoning", or "control" for control tokens and calls.
    top: the likeliest ids with theirs, best first.
    """

    token: int
    part: Literal["content", "reasoning", "control"]
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Usage:
    """Token counts. `cached_tokens` of the prompt were on the timeline already."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Timings:
    """Seconds from the start of the prompt; `decode_tps` is of the tokens after the first."""

    prompt_s: float
    first_token_s: float
    total_s: float
    decode_tps: float


@dataclass(frozen=True)
class Result:
    """How the reply ended, and all of it.

    message: an assistant message: role, content, and if present reasoning_content, tool_calls
        (complete calls only).
    stop: the stop string that ended it. It and what follows are among `token_ids`, not in message.
    """

    finish_reason: FinishReason
    message: dict[str, Any]
    usage: Usage
    timings: Timings
    token_ids: tuple[int, ...] = field(repr=False)
    stop: str | None = None


class _Cancelled(Exception):
    pass


class StopMatcher:
    """Finds stop strings in streamed text; holds back only what may still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.found: str | None = None
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is now certain, and whether a stop string follows it."""
        if not self._stops:
            return text, False
        text = self._held + text
        # The one that is complete first counts, so that it does not matter how text is cut up.
        hits = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            _, at, self.found = min(hits)
            self._held = ""
            return text[:at], True
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
    """Reply to `prompt_ids` (ending in the generation prompt) on `session`: events, then a Result.

    allow_tools, next_call_index, eos_token_ids: see `Reply`.
    cancelled: asked before each token and between chunks of the prompt; when true the reply ends
        at once with finish_reason "cancelled". The session is left at a token border, whether
        cancelled, abandoned or interrupted: the next `sync` works.
    progress: told (done, all) of the prompt tokens that have to be computed.

    Raises ContextError when the prompt does not fit; a reply that fills the context ends with
    finish_reason "length".
    """
    reply = Reply(
        tokenizer,
        prompt_ids,
        params,
        allow_tools=allow_tools,
        next_call_index=next_call_index,
        eos_token_ids=eos_token_ids,
    )
    yield from drive(session, reply, cancelled=cancelled, progress=progress)


def drive(
    session: SessionLike,
    reply: Reply,
    *,
    cancelled: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Event | Result]:
    """Make a reply on `session`, as `generate` does."""

    def between_layers(done: int, total: int) -> None:
        if progress is not None:
            progress(done, total)
        if cancelled() and done < total:
            raise _Cancelled

    reply.start(session.common_prefix(reply.prompt))
    try:
        logits = session.sync(reply.prompt, between_layers)
    except _Cancelled:
        reply.finish("cancelled")
    while reply.going_on:
        if cancelled():
            yield from reply.finish("cancelled")
            break
        try:
            yield from reply.feed(logits)
        except DeadEndError:  # the grammar knows no way on
            yield from reply.finish("length")
        if reply.finish_reason is not None:
            break
        if session.remaining <= 0:
            yield from reply.finish("length")
            break
        try:
            logits = session.step(reply.token)
        except ContextError:  # no memory for a longer cache
            yield from reply.finish("length")
    yield reply.result()


class Reply:
    """One reply to a prompt, fed with logits.

    Attributes:
        prompt: the token ids to compute before the first `feed`: the prompt that was given, with
            the reasoning closed when thinking is off.
        token: the last token that joined the reply; step it to get what the next `feed` needs.
        finish_reason: None while the reply goes on.
        ids: the reply's tokens so far.
        sampled: of the last `feed`, when `top_logprobs` was asked for; also of the token that
            ends the reply.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        plain: bool = False,
        allow_tools: bool = False,
        max_calls: int | None = None,
        next_call_index: int = 0,
        eos_token_ids: Sequence[int] = (),
        constraint: Constraint | None = None,
        top_logprobs: int | None = None,
    ) -> None:
        """
        plain: the prompt is text to continue, no conversation: all of the reply is content.
        allow_tools: tools are declared in the prompt, so calls may be made.
        max_calls: the reply ends after so many calls.
        next_call_index: the conversation's, see `messages.Conversation`.
        eos_token_ids: the config's, which end a reply beside `<|im_end|>` and `[EOS]`.
        constraint: narrows every choice; made for `continued(tokenizer, prompt_ids, params)`.
        top_logprobs: set `sampled` for each token, with so many of the likeliest.
        """
        self._tokenizer = tokenizer
        self._params = params
        self._max_calls = max_calls
        self._constraint = constraint
        self._top_logprobs = top_logprobs
        ids = tokenizer.special_tokens
        self._control = ids
        self._ends = {ids[name] for name in END_TOKENS if name in ids} | {*eos_token_ids}
        allowed = {*END_TOKENS}
        if not plain and supports_thinking(tokenizer) and params.thinking_budget != 0:
            allowed |= {THINK, END_THINK}
        if allow_tools:
            allowed |= {*TOOL_TOKENS}
        banned = [i for name, i in ids.items() if name not in allowed and i not in self._ends]
        self.prompt = list(prompt_ids) if plain else continued(tokenizer, prompt_ids, params)
        self._parser = StreamParser(
            tokenizer,
            in_reasoning=not plain and starts_in_reasoning(tokenizer, self.prompt),
            next_call_index=next_call_index,
        )
        self._sampler = Sampler(params, self.prompt, banned)
        self._stop = StopMatcher(params.stop)
        self._content = ""
        self._n_reasoning = 0
        self._n_calls = 0
        self._cached = 0
        self._started = time.perf_counter()
        self._prompt_s: float | None = None
        self._first_s: float | None = None
        self._total_s = 0.0
        self.ids: list[int] = []
        self.sampled: Sampled | None = None
        self.finish_reason: FinishReason | None = None

    @property
    def going_on(self) -> bool:
        """Whether it wants more logits."""
        return self.finish_reason is None

    @property
    def token(self) -> int:
        return self.ids[-1]

    def start(self, cached_tokens: int) -> None:
        """The prompt is about to be computed; `cached_tokens` of it are already."""
        self._cached = cached_tokens
        self._started = time.perf_counter()

    def feed(self, logits: NDArray[np.float32]) -> list[Event]:
        """Choose the next token by these logits (float32 [V], not changed); returns its events.

        Raises what `Sampler.sample` and the constraint raise; the reply then cannot go on.
        """
        assert self.finish_reason is None
        self.sampled = None
        if self._prompt_s is None:
            self._prompt_s = self._elapsed()
            self._sampler.ban(*range(self._tokenizer.n_vocab, logits.size))
        token = self._next(logits)
        if self._first_s is None:
            self._first_s = self._elapsed()
        if self._top_logprobs is not None:
            self.sampled = self._with_logprobs(token, logits, self._top_logprobs)
        if token in self._ends:
            return self.finish("stop")
        self.ids.append(token)
        self._sampler.accept(token)
        if self._constraint is not None:
            self._constraint.accept(token)
        is_control = self._tokenizer.is_control(token)
        self._n_reasoning += self._parser.in_reasoning and not is_control
        events, stopped = self._watched(self._parser.push(token))
        limit = self._params.max_tokens
        if stopped:
            events += self.finish("stop")
        elif limit is not None and len(self.ids) >= limit:
            events += self.finish("length")
        elif self._max_calls == self._n_calls and token == self._control.get(TOOL_TOKENS[1]):
            events += self.finish("stop")
        return events

    def finish(self, reason: FinishReason) -> list[Event]:
        """End the reply here; returns what was held back until now."""
        assert self.finish_reason is None
        events: list[Event] = []
        if self._stop.found is None:
            events, stopped = self._watched(self._parser.finish())
            if not stopped:
                events += self._certain(self._stop.flush())
        self.finish_reason = reason
        if reason == "stop" and self._stop.found is None and self._message().get("tool_calls"):
            self.finish_reason = "tool_calls"
        self._total_s = self._elapsed()
        return events

    def result(self) -> Result:
        """The reply that has ended."""
        assert self.finish_reason is not None
        first_s = self._total_s if self._first_s is None else self._first_s
        decode_s = self._total_s - first_s
        return Result(
            finish_reason=self.finish_reason,
            message=self._message(),
            usage=Usage(len(self.prompt), len(self.ids), self._n_reasoning, self._cached),
            timings=Timings(
                prompt_s=self._total_s if self._prompt_s is None else self._prompt_s,
                first_token_s=first_s if self.ids else self._total_s,
                total_s=self._total_s,
                decode_tps=(len(self.ids) - 1) / decode_s
                if len(self.ids) > 1 and decode_s > 0
                else 0.0,
            ),
            token_ids=tuple(self.ids),
            stop=self._stop.found,
        )

    def _next(self, logits: NDArray[np.float32]) -> int:
        budget, ids = self._params.thinking_budget, self._control
        if self._parser.in_reasoning and budget is not None and self._n_reasoning >= budget:
            self._sampler.ban(ids[THINK], ids[END_THINK])
            return ids[END_THINK]
        if self._max_calls == self._n_calls and self._n_calls and TOOL_TOKENS[1] in ids:
            return ids[TOOL_TOKENS[1]]
        allowed = None if self._constraint is None else self._constraint.mask()
        return self._sampler.sample(logits, allowed)

    def _with_logprobs(self, token: int, logits: NDArray[np.float32], top: int) -> Sampled:
        if self._tokenizer.is_control(token) or not self._parser.in_text:
            part: Literal["content", "reasoning", "control"] = "control"
        else:
            part = "reasoning" if self._parser.in_reasoning else "content"
        return Sampled(token, part, *logprobs(logits, token, top))

    def _watched(self, events: list[Event]) -> tuple[list[Event], bool]:
        """Events with stop strings watched for in the content; and whether one was found."""
        certain: list[Event] = []
        for event in events:
            if isinstance(event, Content):
                text, found = self._stop.push(event.text)
                certain += self._certain(text)
                if found:
                    return certain, True
            else:
                if isinstance(event, ToolCallStart):
                    certain += self._certain(self._stop.flush())
                self._n_calls += isinstance(event, ToolCallEnd)
                certain.append(event)
        return certain, False

    def _certain(self, text: str) -> list[Event]:
        self._content += text
        return [Content(text)] if text else []

    def _message(self) -> dict[str, Any]:
        """The assistant message; when the reply was cut, without the call that this broke."""
        cut = self.finish_reason in ("length", "cancelled")
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


def continued(tokenizer: Tokenizer, prompt_ids: Sequence[int], params: SamplingParams) -> list[int]:
    """The prompt that a reply continues: with the reasoning closed when thinking is off.

    A prompt may end in the beginning of the answer; then its reasoning is closed already.
    """
    prompt, ids = list(prompt_ids), tokenizer.special_tokens
    off = params.thinking_budget == 0 and supports_thinking(tokenizer)
    if off and starts_in_reasoning(tokenizer, prompt):
        if prompt[-1:] != [ids[THINK]]:  # K2.5's template opens it itself
            prompt.append(ids[THINK])
        prompt.append(ids[END_THINK])
    return prompt
