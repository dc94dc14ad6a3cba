"""Requests of OpenAI's Responses API, as requests for chat completions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from kimi_cpu.server.api.exchange import ChatRequest, text_part
from kimi_cpu.server.api.logprobs import check_top
from kimi_cpu.server.errors import ApiError

#: Fields of `ChatRequest` -> what they are called here; for errors.
NAMES = {
    r"^max_tokens": "max_output_tokens",
    r"^tools\[(\d+)\]\.function": r"tools[\1]",
    r"^tool_choice\.function": "tool_choice",
    r"^response_format(\.json_schema)?": "text.format",
    r"^reasoning_effort": "reasoning.effort",
    r"\.tool_call_id$": ".call_id",
}
#: Of `include`.
LOGPROBS = "message.output_text.logprobs"
_INPUT_TEXT = ["input_text", "output_text", "text", "refusal"]


class ResponsesRequest(msgspec.Struct, kw_only=True):
    """What this server understands; `truncation`, `user` and more are not looked at."""

    input: str | list[Any]
    instructions: str | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    metadata: dict[str, Any] | None = None
    stream: bool | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether log probabilities are to be shown. Others that may be included are not there."""
        return LOGPROBS in (self.include or ())


def chat_request(
    body: ResponsesRequest,
    earlier: Sequence[dict[str, Any]],
    find_item: Callable[[str], Mapping[str, Any] | None],
) -> tuple[ChatRequest, list[str]]:
    """The same request in OpenAI's older form, and the field here of each of its messages.

    earlier: the messages of the response that it goes on from.
    find_item: an item of a response that was kept, by its id.
    Raises ApiError naming the field of what cannot be said in it.
    """
    for name in ("background", "conversation", "prompt"):
        if getattr(body, name):
            raise _wrong(name, "is not supported here")
    messages = _Messages()
    if body.instructions:
        messages.add("instructions", {"role": "system", "content": body.instructions})
    for message in earlier:
        messages.add("previous_response_id", message)
    if isinstance(body.input, str):
        messages.add("input", {"role": "user", "content": body.input})
    else:
        for i, item in enumerate(body.input):
            where = f"input[{i}]"
            _item(_referenced(item, where, find_item), where, messages)
    reasoning = body.reasoning or {}
    top = check_top(body.top_logprobs or 0, "top_logprobs")
    request = ChatRequest(
        messages=messages.done,
        tool_choice=_tool_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        max_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        logprobs=body.wants_logprobs,
        top_logprobs=top if body.wants_logprobs else None,
        reasoning_effort=reasoning.get("effort"),
        response_format=_format((body.text or {}).get("format")),
    )
    if request.reasoning_effort is not None and not isinstance(request.reasoning_effort, str):
        raise _wrong("reasoning.effort", "not a string")
    if body.tools:
        request.tools = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools)]
    return request, messages.origins


class _Messages:
    """Messages in the older form. Reasoning, an answer and calls that follow are one of them.

    turn: the assistant's message under way.
    """

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []
        self.origins: list[str] = []
        self._turn: dict[str, Any] | None = None

    def add(self, origin: str, message: dict[str, Any]) -> None:
        self.done.append(message)
        self.origins.append(origin)
        self._turn = None

    def turn(self, origin: str, *, without: Sequence[str]) -> dict[str, Any]:
        """The assistant's message under way; a new one if it has any of these fields already."""
        if self._turn is None or any(self._turn.get(field) for field in without):
            turn: dict[str, Any] = {"role": "assistant", "content": None}
            self.add(origin, turn)
            self._turn = turn
        return self._turn


def _item(item: Any, where: str, messages: _Messages) -> None:
    if not isinstance(item, Mapping):
        raise _wrong(where, "not an object")
    kind = item.get("type") or ("message" if "role" in item else None)
    if kind == "message":
        _message(item, where, messages)
    elif kind == "reasoning":
        turn = messages.turn(where, without=("content", "tool_calls"))
        turn["reasoning_content"] = turn.get("reasoning_content", "") + _reasoning(item, where)
    elif kind == "function_call":
        for field in ("call_id", "name", "arguments"):
            if not isinstance(item.get(field), str):
                raise _wrong(f"{where}.{field}", "missing or not a string")
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        messages.turn(where, without=()).setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        call_id = item.get("call_id")
        if not isinstance(call_id, str) or not call_id:
            raise _wrong(f"{where}.call_id", "missing or not a string")
        output = _content(item.get("output"), f"{where}.output")
        messages.add(where, {"role": "tool", "tool_call_id": call_id, "content": output})
    else:
        raise _wrong(
            f"{where}.type" if kind else where,
            f"{str(kind)[:60]!r} is not supported here; use message, function_call, "
            "function_call_output or reasoning",
        )


def _referenced(item: Any, where: str, find_item: Callable[[str], Mapping[str, Any] | None]) -> Any:
    """The item, or the one that it refers to."""
    if not isinstance(item, Mapping):
        return item
    if item.get("type") != "item_reference" and not ("type" not in item and set(item) == {"id"}):
        return item
    item_id = item.get("id")
    if not isinstance(item_id, str):
        raise _wrong(f"{where}.id", "missing or not a string")
    found = find_item(item_id)
    if found is None:
        raise ApiError(
            404,
            f"{where}: there is no item {item_id[:80]!r}: those of the last responses are kept, in "
            "memory, and not with store: false. Send the item itself.",
            param=where,
            code="not_found",
        )
    return found


def _message(item: Mapping[str, Any], where: str, messages: _Messages) -> None:
    role = item.get("role")
    if role not in ("user", "system", "developer", "assistant"):
        raise _wrong(f"{where}.role", "use user, assistant, system or developer")
    content = _content(item.get("content"), f"{where}.content")
    if role == "assistant":
        messages.turn(where, without=("content", "tool_calls"))["content"] = content
    else:
        messages.add(where, {"role": role, "content": content})


def _content(content: Any, where: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _wrong(where, "neither a string nor a list of parts")
    return [text_part(part, f"{where}[{i}]", _INPUT_TEXT) for i, part in enumerate(content)]


def _reasoning(item: Mapping[str, Any], where: str) -> str:
    """The text of a reasoning item, or of its summary; "" for one that is encrypted."""
    for field, kind in (("content", "reasoning_text"), ("summary", "summary_text")):
        parts = item.get(field)
        if not parts:
            continue
        if not isinstance(parts, list):
            raise _wrong(f"{where}.{field}", "not a list")
        here = f"{where}.{field}"
        texts = [text_part(part, f"{here}[{i}]", [kind, "text"]) for i, part in enumerate(parts)]
        return "".join(part["text"] for part in texts)
    return ""


def _format(form: Any) -> Any:
    if not isinstance(form, Mapping) or form.get("type") != "json_schema":
        return form
    return {
        "type": "json_schema",
        "json_schema": {name: form[name] for name in ("name", "schema", "strict") if name in form},
    }


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise _wrong(where, "not an object")
    kind = tool.get("type")
    if kind != "function":
        what = "missing" if kind is None else f"{str(kind)[:60]!r} is not supported here"
        raise _wrong(f"{where}.type", f"{what}; this server runs no tools itself: use function")
    fields = ("name", "description", "parameters", "strict")
    function = {name: tool[name] for name in fields if tool.get(name) is not None}
    return {"type": "function", "function": function}


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if choice is None or isinstance(choice, str):
        return choice
    raise _wrong("tool_choice", "neither auto, none, required nor a function")


def _wrong(field: str, what: str) -> ApiError:
    joint = "" if what.startswith("is ") else ":"
    return ApiError(400, f"{field}{joint} {what}", param=field)
