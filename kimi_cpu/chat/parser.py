"""Splits a reply, token by token, into reasoning, content and tool calls.

The parser looks at token ids, never at spellings: text that reads `</think>` is text. What the
control tokens do, wherever the reply stands:

| token                           | effect                                                         |
|---------------------------------|----------------------------------------------------------------|
| `<think>` / `</think>`          | reasoning / content from here on (nothing within a call)       |
| `<|tool_calls_section_begin|>`  | ends reasoning or content; nothing if a section is open        |
| `<|tool_call_begin|>`           | a call's id follows; ends an open call, opens a missing section|
| `<|tool_call_argument_begin|>`  | the id is complete, arguments follow                           |
| `<|tool_call_end|>`             | ends the call                                                  |
| `<|tool_calls_section_end|>`    | ends an open call and the section; content from here on        |
| any other                       | nothing                                                        |

Where a reply starts is the prompt's doing: after a generation prompt Kimi opens `<think>` itself
and sometimes forgets to, so with `in_reasoning=True` text is reasoning until a token ends it, with
or without the opening token; a reply with neither `</think>` nor a call section is reasoning
altogether and its content is None. After a prompt that ends in `<think></think>` (thinking is
off), or with a model without think tokens, the reply starts as content (`in_reasoning=False`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from kimi_cpu.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Reasoning:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True)
class Content:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """Call number `index` of this reply begins; its arguments follow."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """More of a call's arguments, JSON text as the model writes it."""

    index: int
    text: str


@dataclass(frozen=True)
class ToolCallEnd:
    """A call is over.

    complete: the model ended it. valid: it has a name, and its arguments are a JSON object.
    """

    index: int
    complete: bool = True
    valid: bool = True


Event = Reasoning | Content | ToolCallStart | ToolCallArguments | ToolCallEnd


@dataclass
class ToolCall:
    """A call as far as it came; `arguments` is the model's text, kept even if it is not JSON."""

    id: str
    name: str
    arguments: str = ""
    complete: bool = False
    valid: bool = False


class _State(Enum):
    REASONING = auto()
    CONTENT = auto()
    SECTION = auto()  # between calls
    HEADER = auto()  # a call's id
    ARGUMENTS = auto()


_NAMES = (
    "<think>",
    "</think>",
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
)


class StreamParser:
    """Feed ids with `push`, call `finish` once at the end, then ask for `message()`.

    calls: the tool calls so far. incomplete: after `finish`, what the reply stopped within:
    "reasoning", "tool call" or None.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, in_reasoning: bool = True, next_call_index: int = 0
    ) -> None:
        """`next_call_index` is the conversation's (see `Conversation`): it numbers calls whose id
        the model wrote in another form than `functions.NAME:IDX`.
        """
        self.calls: list[ToolCall] = []
        self.incomplete: str | None = None
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer)
        # A model without think tokens has neither: its text is never reasoning.
        self._special = {
            tokenizer.special_tokens[name]: name
            for name in _NAMES
            if name in tokenizer.special_tokens
        }
        thinks = "</think>" in tokenizer.special_tokens
        self._state = _State.REASONING if in_reasoning and thinks else _State.CONTENT
        self._next_call_index = next_call_index
        self._header = ""
        self._stray = False  # text other than blanks was met between calls
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._arguments: list[str] = []
        self._events: list[Event] = []

    @property
    def in_reasoning(self) -> bool:
        """Whether the next text token would be reasoning."""
        return self._state is _State.REASONING

    @property
    def in_text(self) -> bool:
        """Whether the next text token would be reasoning or content, not part of a call."""
        return self._state in (_State.REASONING, _State.CONTENT)

    def push(self, token_id: int) -> list[Event]:
        """The events that this token completes, often one, sometimes none."""
        if not self._tokenizer.is_control(token_id):
            self._text(self._decoder.push(token_id))
        else:
            self._text(self._decoder.flush())
            name = self._special.get(token_id)
            if name is not None:
                self._control(name)
        return self._take_events()

    def finish(self) -> list[Event]:
        """The reply is over: close what is open, and note in `incomplete` what was cut short."""
        self._text(self._decoder.flush())
        if self._state is _State.REASONING:
            self.incomplete = "reasoning"
        elif self._state in (_State.HEADER, _State.ARGUMENTS):
            self.incomplete = "tool call"
        if self._state is _State.ARGUMENTS:
            self._end_call(complete=False)
        self._state = _State.CONTENT
        return self._take_events()

    def message(self) -> dict[str, Any]:
        """The reply as an assistant message in OpenAI's form.

        All of `role`, `content`, `reasoning_content` and `tool_calls` are there; what the reply
        did not have is None.
        """
        calls = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in self.calls
        ]
        return {
            "role": "assistant",
            "content": "".join(self._content) or None,
            "reasoning_content": "".join(self._reasoning) or None,
            "tool_calls": calls or None,
        }

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _text(self, text: str) -> None:
        if not text:
            return
        match self._state:
            case _State.REASONING:
                self._reasoning.append(text)
                self._events.append(Reasoning(text))
            case _State.CONTENT:
                self._say(text)
            case _State.HEADER:
                self._header += text
            case _State.ARGUMENTS:
                self._arguments.append(text)
                self._events.append(ToolCallArguments(len(self.calls) - 1, text))
            case _State.SECTION:
                # Blanks between calls are layout; anything else would be lost if not shown.
                text = text if self._stray else text.lstrip()
                if text:
                    self._stray = True
                    self._say(text)

    def _say(self, text: str) -> None:
        self._content.append(text)
        self._events.append(Content(text))

    def _control(self, name: str) -> None:
        state = self._state
        in_section = state in (_State.SECTION, _State.HEADER, _State.ARGUMENTS)
        if name in ("<think>", "</think>"):
            if not in_section:
                self._state = _State.REASONING if name == "<think>" else _State.CONTENT
        elif name == "<|tool_calls_section_begin|>":
            if not in_section:
                self._open_section()
        elif name == "<|tool_call_argument_begin|>":
            if state is _State.HEADER:
                self._start_call()
        else:  # the end of a call, of the section, or the begin of the next call
            if state is _State.HEADER and self._header.strip():
                self._start_call()
            if self._state is _State.ARGUMENTS:
                self._end_call(complete=True)
            if in_section or name == "<|tool_call_begin|>":
                self._open_section()
            if name == "<|tool_call_begin|>":
                self._state = _State.HEADER
                self._header = ""
            elif name == "<|tool_calls_section_end|>" and in_section:
                self._state = _State.CONTENT

    def _open_section(self) -> None:
        self._state = _State.SECTION
        self._stray = False

    def _start_call(self) -> None:
        name, call_id = self._read_header(self._header.strip())
        self.calls.append(ToolCall(call_id, name))
        self._next_call_index += 1
        self._arguments = []
        self._state = _State.ARGUMENTS
        self._events.append(ToolCallStart(len(self.calls) - 1, call_id, name))

    def _end_call(self, complete: bool) -> None:
        call = self.calls[-1]
        call.arguments = "".join(self._arguments)
        call.complete = complete
        call.valid = bool(call.name) and _is_json_object(call.arguments)
        self._events.append(ToolCallEnd(len(self.calls) - 1, complete, call.valid))

    def _read_header(self, header: str) -> tuple[str, str]:
        """(name, id): the name lies between `functions.` and the last `:` with a number."""
        match = re.fullmatch(r"(functions\.)?(.*?)(?::([0-9]{1,9}))?", header, re.DOTALL)
        assert match is not None  # every part is optional
        prefix, name, number = match.groups()
        ids = {call.id for call in self.calls}
        if prefix and name and number and header not in ids:
            return name, header
        index = int(number) if number else self._next_call_index
        while f"functions.{name}:{index}" in ids:
            index += 1
        return name, f"functions.{name}:{index}"


def starts_in_reasoning(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> bool:
    """Whether a reply to this prompt starts as reasoning.

    It does with every model that has think tokens, unless the prompt itself ends the reasoning:
    its last control token is `</think>`.
    """
    end = tokenizer.special_tokens.get("</think>")
    if end is None:
        return False
    last = next((i for i in reversed(prompt_ids) if tokenizer.is_control(i)), None)
    return last != end


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
