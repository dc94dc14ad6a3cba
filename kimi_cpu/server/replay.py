"""Finds the model's own tokens again when a client sends its replies back.

Clients rewrite what they were given: other ids for tool calls, arguments spaced anew, reasoning
left out. And even the same text, encoded again, can give other tokens than the model sampled. Any
difference ends the prefix that is computed already. So each finished reply is remembered under the
conversation before it. Where that comes back, its message is the one that the model wrote, and its
turn is made of the tokens that were sampled, as far as the template shows them.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from kimi_cpu.chat.messages import Conversation
from kimi_cpu.chat.template import Segment, encode_segments
from kimi_cpu.tokenizer import Tokenizer

#: Bounds the memory, to some tens of megabytes.
MAX_REPLIES = 4096
MAX_TOKENS = 2_000_000

_ASSISTANT, _MIDDLE, _END = "<|im_assistant|>", "<|im_middle|>", "<|im_end|>"
_CALL = "<|tool_call_begin|>"


@dataclass(frozen=True)
class _Remembered:
    """A reply: its message, and the ids of its turn between `<|im_middle|>` and `<|im_end|>`."""

    message: Mapping[str, Any]
    turn: array[int]


@dataclass(frozen=True)
class Recalled:
    """A conversation with the model's own words.

    turns: the ids of recalled turns, by their number among the assistant's messages, of which
        there are n_assistant.
    key: names the conversation up to here, for `Replies.remember`.
    """

    conversation: Conversation
    turns: dict[int, Sequence[int]]
    n_assistant: int
    key: bytes


class Files(Protocol):
    """Keeps replies longer than memory does."""

    def save(self, key: bytes, message: Mapping[str, Any], turn: array[int]) -> None: ...
    def load(self, key: bytes) -> tuple[dict[str, Any], array[int]] | None: ...


class Replies:
    """The replies of the last conversations. Any thread may call any method."""

    def __init__(self, tokenizer: Tokenizer, files: Files | None = None) -> None:
        """files: where replies are that memory does not have."""
        self._tokenizer = tokenizer
        self._files = files
        self._replies: OrderedDict[bytes, _Remembered] = OrderedDict()
        self._n_tokens = 0
        self._lock = threading.Lock()

    def remember(self, key: bytes, message: Mapping[str, Any], timeline: Sequence[int]) -> None:
        """Keep a reply.

        key: of the conversation that it answers, as `recall` told it.
        timeline: the ids of its prompt and of itself.
        """
        middle = self._tokenizer.special_tokens.get(_MIDDLE)
        begin = next((i for i in range(len(timeline), 0, -1) if timeline[i - 1] == middle), None)
        if begin is None:
            return
        key = _key(key, message)
        reply = _Remembered(message, array("I", timeline[begin:]))
        self._keep(key, reply)
        if self._files is not None:
            self._files.save(key, message, reply.turn)

    def _keep(self, key: bytes, reply: _Remembered) -> None:
        with self._lock:
            if (old := self._replies.pop(key, None)) is not None:
                self._n_tokens -= len(old.turn)
            self._replies[key] = reply
            self._n_tokens += len(reply.turn)
            while len(self._replies) > MAX_REPLIES or self._n_tokens > MAX_TOKENS:
                _, old = self._replies.popitem(last=False)
                self._n_tokens -= len(old.turn)

    def recall(self, conversation: Conversation) -> Recalled:
        """The conversation with the messages that the model wrote as it wrote them."""
        messages: list[dict[str, Any]] = []
        turns: dict[int, Sequence[int]] = {}
        renamed: dict[str, str] = {}  # canonical ids -> those that the model wrote
        key, n_assistant = b"", 0
        for message in conversation.messages:
            key = _key(key, message)
            if message["role"] == "assistant":
                if (found := self._find(key, message)) is not None:
                    turns[n_assistant] = found.turn
                    made = found.message.get("tool_calls", [])
                    for ours, theirs in zip(made, message.get("tool_calls", []), strict=True):
                        renamed[theirs["id"]] = ours["id"]
                    message = {**message, **found.message}
                n_assistant += 1
            elif message.get("tool_call_id") in renamed:
                message = {**message, "tool_call_id": renamed[message["tool_call_id"]]}
            messages.append(message)
        next_call_index = max(conversation.next_call_index, _next_index(renamed.values()))
        conversation = replace(conversation, messages=messages, next_call_index=next_call_index)
        return Recalled(conversation, turns, n_assistant, key)

    def encode(self, segments: Sequence[Segment], recalled: Recalled) -> list[int]:
        """The ids of a rendered conversation, its recalled turns in the tokens that were sampled.

        When the template does not show one turn for each of the assistant's messages, none is
        replaced.
        """
        starts = [i for i, s in enumerate(segments) if s == Segment(_ASSISTANT, True)]
        ids: list[int] = []
        done = 0
        # One more for the generation prompt.
        usable = len(starts) in (recalled.n_assistant, recalled.n_assistant + 1)
        for number, turn in sorted(recalled.turns.items()) if usable else ():
            begin = _find_control(segments, _MIDDLE, starts[number]) + 1
            end = _find_control(segments, _END, begin)
            ids += encode_segments(self._tokenizer, segments[done:begin])
            ids += self._turn(segments[begin:end], turn)
            done = end
        return ids + encode_segments(self._tokenizer, segments[done:])

    def _find(self, key: bytes, message: Mapping[str, Any]) -> _Remembered | None:
        with self._lock:
            found = self._replies.get(key)
            if found is not None:
                self._replies.move_to_end(key)
        if found is None:
            kept = None if self._files is None else self._files.load(key)
            if kept is None:
                return None
            found = _Remembered(*kept)
            self._keep(key, found)
        given = (message.get("reasoning_content") or "").strip()
        if given and given != (found.message.get("reasoning_content") or "").strip():
            return None  # not what the model thought
        return found

    def _turn(self, rendered: Sequence[Segment], sampled: Sequence[int]) -> list[int]:
        """A turn's ids: the sampled ones where the template shows the same, its own elsewhere."""
        gaps = self._gaps(sampled)
        call = self._tokenizer.special_tokens.get(_CALL)
        # The id of a call may be one that the parser made, of a header that had none.
        texts = [text.strip() for before, text, _ in gaps if before != call]
        shown = [
            segment.text.strip()
            for i, segment in enumerate(rendered)
            if not segment.is_control and not (i and rendered[i - 1] == Segment(_CALL, True))
        ]
        if [text for text in texts if text] == [text for text in shown if text]:
            return list(sampled)
        # Something is left out (the reasoning): match the other texts in their order.
        ids: list[int] = []
        at = 0
        for segment in rendered:
            match = None
            if not segment.is_control:
                following = range(at, len(gaps))
                match = next((i for i in following if gaps[i][1] == segment.text), None)
            if match is None:
                ids += encode_segments(self._tokenizer, [segment])
            else:
                ids += gaps[match][2]
                at = match + 1
        return ids

    def _gaps(self, ids: Sequence[int]) -> list[tuple[int | None, str, list[int]]]:
        """The texts between control tokens: (the control token before, text, ids)."""
        gaps: list[tuple[int | None, str, list[int]]] = []
        before: int | None = None
        run: list[int] = []
        for token in (*ids, None):
            if token is not None and not self._tokenizer.is_control(token):
                run.append(token)
                continue
            if run:
                gaps.append((before, self._tokenizer.decode(run), run))
            before, run = token, []
        return gaps


def _find_control(segments: Sequence[Segment], name: str, start: int) -> int:
    for i in range(start, len(segments)):
        if segments[i] == Segment(name, True):
            return i
    return len(segments)


def _key(before: bytes, message: Mapping[str, Any]) -> bytes:
    """A hash of a message and of all before it, without what clients rewrite."""
    calls = [
        (call["function"]["name"], _same_json(call["function"]["arguments"]))
        for call in message.get("tool_calls") or ()
    ]
    text = json.dumps([message["role"], _text(message.get("content")), calls])
    return hashlib.sha256(before + text.encode()).digest()


def _text(content: Any) -> str:
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    return (content or "").strip()


def _same_json(arguments: Any) -> str:
    """A call's arguments, the same for every spelling of the same JSON value."""
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
        return json.dumps(value, sort_keys=True)
    except (ValueError, RecursionError):
        return str(arguments)


def _next_index(call_ids: Any) -> int:
    numbers = [re.search(r":([0-9]{1,9})$", call_id) for call_id in call_ids]
    return max((int(number[1]) + 1 for number in numbers if number), default=0)
