"""A reply in blocks, one after the other: reasoning, text, calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kimi_cpu.chat.parser import Content, Event, Reasoning, ToolCallArguments, ToolCallStart


@dataclass(frozen=True)
class Opened:
    """A block begins; call: if it is one."""

    kind: Literal["reasoning", "text", "call"]
    call: ToolCallStart | None = None


@dataclass(frozen=True)
class More:
    """More of the block; of a call, of its arguments."""

    text: str


@dataclass(frozen=True)
class Closed:
    """The block is over; text: all of it. complete: it is a call that was cut off, if not."""

    text: str
    complete: bool = True


class Blocks:
    """Makes blocks of a reply's events. Text of blanks only, as before a call, is no block."""

    def __init__(self) -> None:
        self._kind: Literal["reasoning", "text", "call"] | None = None  # of the block under way
        self._text = ""  # of it, or blanks that none has begun with yet

    def push(self, event: Event) -> list[Opened | More | Closed]:
        """What an event does."""
        if isinstance(event, Reasoning):
            return self._more("reasoning", event.text)
        if isinstance(event, Content):
            return self._more("text", event.text)
        if isinstance(event, ToolCallStart):
            closed = self.close()
            self._kind = "call"
            return [*closed, Opened("call", event)]
        if isinstance(event, ToolCallArguments):
            return self._more("call", event.text)
        return self.close(event.complete)

    def close(self, complete: bool = True) -> list[Opened | More | Closed]:
        """End the block under way, if there is one."""
        closed: list[Opened | More | Closed] = []
        if self._kind is not None:
            closed.append(Closed(self._text, complete))
        self._kind, self._text = None, ""
        return closed

    def _more(
        self, kind: Literal["reasoning", "text", "call"], text: str
    ) -> list[Opened | More | Closed]:
        if self._kind == kind:
            self._text += text
            return [More(text)]
        before = self.close() if self._kind is not None else []
        self._text += text
        if not self._text.strip():
            return before
        self._kind = kind
        return [*before, Opened(kind), More(self._text)]
