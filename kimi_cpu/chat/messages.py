"""OpenAI-form messages and tools: checked, and brought into the one form the template expects.

Kimi knows a tool call as `functions.NAME:IDX`, IDX counting all calls of the conversation from 0.
Clients have their own ids (`call_x7f`), or rewrite ours (`functions_Glob_0`): towards the model
every call gets the canonical id, towards the client its own stays (`Conversation.client_ids`).
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kimi_cpu.errors import MessageError

# `developer` is OpenAI's newer name of `system`; `_input` is Moonshot's for attached material.
_ROLES = ("system", "developer", "user", "assistant", "tool", "_input")
_REASONING_FIELDS = ("reasoning_content", "reasoning")

MAX_NAME_CHARS = 256


@dataclass(frozen=True)
class Conversation:
    """A checked conversation, ready for `ChatTemplate.render_segments`.

    messages: the roles system, user, assistant, tool and _input; fields without a value are
        absent (but every message has `content`, None only for an assistant's).
    tools: declared tools, or None.
    client_ids: the client's id of each call whose canonical id differs, by canonical id.
    next_call_index: the IDX that the next tool call of this conversation gets.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    client_ids: dict[str, str]
    next_call_index: int


def normalise(messages: Any, tools: Any = None) -> Conversation:
    """Check messages and tools in OpenAI's form and normalise them; the input is not changed.

    Content may be a string, None (assistant) or a list of text parts. A call's arguments may be
    a string, kept verbatim even if it is not JSON, or an object. Unknown fields are dropped.
    Raises MessageError naming the message's index and the field.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise MessageError("messages: not a list", 'Like [{"role": "user", "content": "Hi"}].')
    calls = _Calls()
    result = [_message(message, f"messages[{i}]", calls) for i, message in enumerate(messages)]
    declared = validate_tools(tools) if tools is not None else []
    return Conversation(result, declared or None, calls.client_ids, calls.next_index)


def validate_tools(tools: Any) -> list[dict[str, Any]]:
    """Check tool declarations in OpenAI's form; returns copies. Raises MessageError.

    Each is `{"type": "function", "function": {"name": ..., "description": ...,
    "parameters": {JSON schema}}}`; names are unique and fields not named here are kept.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes)):
        raise MessageError("tools: not a list", "Declare tools in OpenAI's form.")
    result: list[dict[str, Any]] = []
    names: set[str] = set()
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        if not isinstance(tool, Mapping):
            raise MessageError(f"{where}: not an object")
        _string(tool, "type", where)
        function = tool.get("function")
        if not isinstance(function, Mapping):
            raise MessageError(
                f"{where}.function: missing or not an object",
                'Like {"type": "function", "function": {"name": ..., "parameters": {...}}}.',
            )
        name = _name(function, f"{where}.function")
        if name in names:
            raise MessageError(f"{where}.function.name: {name!r} is declared already")
        names.add(name)
        if not isinstance(function.get("description", ""), (str, type(None))):
            raise MessageError(f"{where}.function.description: not a string")
        if not isinstance(function.get("parameters"), (Mapping, type(None))):
            raise MessageError(f"{where}.function.parameters: not an object (a JSON schema)")
        result.append({**tool, "function": dict(function)})
    return result


class _Calls:
    """The tool calls met so far: their canonical ids, and which one a result belongs to."""

    def __init__(self) -> None:
        self.client_ids: dict[str, str] = {}
        self.next_index = 0
        self._used: set[str] = set()
        self._answered: set[str] = set()
        self._turn = 0
        # The calls known by an id, in the last assistant message that used it: clients may use
        # ids again, in another turn or for two calls at once.
        self._known: dict[str, tuple[int, deque[str]]] = {}

    def start_turn(self) -> None:
        """An assistant message with calls begins."""
        self._turn += 1

    def add(self, name: str, client_id: str | None) -> str:
        """The canonical id of a call."""
        index = _canonical_index(name, client_id) if client_id else None
        if index is None or f"functions.{name}:{index}" in self._used:
            index = self.next_index
        canonical = f"functions.{name}:{index}"
        while canonical in self._used:
            index += 1
            canonical = f"functions.{name}:{index}"
        self._used.add(canonical)
        self.next_index = max(self.next_index, index) + 1
        if client_id is not None and client_id != canonical:
            self.client_ids[canonical] = client_id
        own = client_id or canonical
        for alias in {own, canonical, _loose(own), _loose(canonical)}:
            turn, queue = self._known.get(alias, (0, deque()))
            if turn != self._turn:
                queue = deque()
            queue.append(canonical)
            self._known[alias] = self._turn, queue
        return canonical

    def answer(self, client_id: str) -> str | None:
        """The canonical id of the call that a result with this id belongs to.

        Ids are compared as given first, then by letters and digits only. Of several calls with
        one id, the earliest without a result is meant; a second result to a call is accepted.
        """
        for alias in (client_id, _loose(client_id)):
            if alias in self._known:
                queue = self._known[alias][1]
                while len(queue) > 1 and queue[0] in self._answered:
                    queue.popleft()
                self._answered.add(queue[0])
                return queue[0]
        return None


def _loose(call_id: str) -> str:
    # The blank keeps these apart from ids as given.
    return " " + re.sub(r"[\W_]", "", call_id).casefold()


def _canonical_index(name: str, call_id: str) -> int | None:
    """IDX of `functions.NAME:IDX` or of a client's spelling of it, such as `functions_NAME_IDX`."""
    match = re.fullmatch(r"functions[\W_](.+)[\W_]([0-9]{1,6})", call_id, re.DOTALL)
    return int(match[2]) if match and _loose(match[1]) == _loose(name) else None


def _message(message: Any, where: str, calls: _Calls) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise MessageError(f"{where}: not an object", 'Like {"role": "user", "content": "Hi"}.')
    role = message.get("role")
    if role not in _ROLES:
        raise MessageError(
            f"{where}.role: {'missing' if role is None else repr(role)[:60]}",
            "Roles are system, user, assistant and tool.",
        )
    role = "system" if role == "developer" else str(role)
    result: dict[str, Any] = {"role": role, "content": _content(message, role, where)}
    if name := _string(message, "name", where):
        result["name"] = name
    if role == "assistant":
        for field in _REASONING_FIELDS:
            if reasoning := _string(message, field, where):
                result["reasoning_content"] = reasoning
                break
        if tool_calls := _tool_calls(message, where, calls):
            result["tool_calls"] = tool_calls
    elif message.get("tool_calls"):
        raise MessageError(f"{where}.tool_calls: only an assistant's message has calls")
    if role == "tool":
        client_id = _string(message, "tool_call_id", where)
        if not client_id:
            raise MessageError(
                f"{where}.tool_call_id: missing", "A tool's result names the call it answers."
            )
        canonical = calls.answer(client_id)
        if canonical is None:
            raise MessageError(
                f"{where}.tool_call_id: no call before has the id {client_id[:80]!r}",
                "Send the assistant message with the tool_calls before their results.",
            )
        result["tool_call_id"] = canonical
    return result


def _content(message: Mapping[str, Any], role: str, where: str) -> Any:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None:
        if role == "assistant":
            return None
        if role == "tool":  # a tool that has nothing to say
            return ""
        raise MessageError(f"{where}.content: missing")
    if not isinstance(content, (list, tuple)):
        raise MessageError(f"{where}.content: neither a string nor a list of parts")
    parts = []
    for i, part in enumerate(content):
        here = f"{where}.content[{i}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in ("image", "image_url", "input_image", "input_audio", "video_url", "file"):
            raise MessageError(f"{here}: {kind} parts are not supported", "This engine reads text.")
        if kind != "text" or not isinstance(part.get("text"), str):
            raise MessageError(f"{here}: not a text part", 'Like {"type": "text", "text": "Hi"}.')
        parts.append({"type": "text", "text": part["text"]})
    return parts


def _tool_calls(message: Mapping[str, Any], where: str, calls: _Calls) -> list[dict[str, Any]]:
    value = message.get("tool_calls")
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        raise MessageError(f"{where}.tool_calls: not a list")
    calls.start_turn()
    result = []
    for i, call in enumerate(value):
        here = f"{where}.tool_calls[{i}]"
        if not isinstance(call, Mapping):
            raise MessageError(f"{here}: not an object")
        function = call.get("function")
        if not isinstance(function, Mapping):
            raise MessageError(f"{here}.function: missing or not an object")
        name = _string(function, "name", f"{here}.function")
        if name is None:  # empty is what a model may have written
            raise MessageError(f"{here}.function.name: missing")
        arguments = function.get("arguments")
        if arguments is None:
            arguments = "{}"
        elif isinstance(arguments, Mapping):
            arguments = dict(arguments)
        elif not isinstance(arguments, str):
            raise MessageError(f"{here}.function.arguments: neither a string nor an object")
        canonical = calls.add(name, _string(call, "id", here) or None)
        result.append(
            {
                "id": canonical,
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
        )
    return result


def _name(function: Mapping[str, Any], where: str) -> str:
    name = _string(function, "name", where)
    if not name or not name.strip():
        raise MessageError(f"{where}.name: missing")
    if len(name) > MAX_NAME_CHARS:
        raise MessageError(f"{where}.name: longer than {MAX_NAME_CHARS} characters")
    return name


def _string(owner: Mapping[str, Any], field: str, where: str) -> str | None:
    value = owner.get(field)
    if value is not None and not isinstance(value, str):
        raise MessageError(f"{where}.{field}: not a string")
    return value
