"""Requests of Anthropic's Messages API, as requests for chat completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from kimi_cpu.server.api.exchange import ChatRequest, text_part
from kimi_cpu.server.errors import ApiError

#: Fields of `ChatRequest` -> what they are called here; for errors.
NAMES = {
    r"^stop(?=$|\[)": "stop_sequences",
    r"^tools\[(\d+)\]\.function\.parameters": r"tools[\1].input_schema",
    r"^tools\[(\d+)\]\.function": r"tools[\1]",
    r"^tool_choice\.function": "tool_choice",
    r"^response_format(\.json_schema)?": "output_config.format",
    r"^reasoning_effort": "output_config.effort",
    r"\.tool_call_id$": ".tool_use_id",
}
#: Claude Code puts this into a block of its own before the system prompt, with a number that is
#: another one each time: nothing for the model, and no prefix would survive it.
_BILLING = "x-anthropic-billing-header:"


class ConversationFields(msgspec.Struct, kw_only=True):
    """What makes up a prompt. `model` and `metadata` are not looked at."""

    messages: list[Any]
    system: str | list[Any] | None = None
    tools: list[Any] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    mcp_servers: list[Any] | None = None
    container: Any = None
    thread: Any = None


class MessagesRequest(ConversationFields, kw_only=True):
    max_tokens: int
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool | None = None


def chat_request(body: ConversationFields) -> tuple[ChatRequest, list[str]]:
    """The same request in OpenAI's form, and which of the fields here each message comes from.

    Raises ApiError naming the field of what cannot be said in it.
    """
    for name in ("mcp_servers", "container"):
        if getattr(body, name):
            raise _wrong(name, "this server runs no tools itself")
    if body.thread:
        # Anthropic's client knows this code, and sends whole conversations from here on.
        raise ApiError(
            400,
            "thread: this server keeps no threads; send the whole conversation",
            param="thread",
            code="thread_unsupported_request",
        )
    messages = _Messages()
    if body.system:
        messages.add("system", {"role": "system", "content": _system(body.system)})
    for i, message in enumerate(body.messages):
        _message(message, f"messages[{i}]", messages)
    if body.messages and messages.done[-1]["role"] == "assistant":
        _begun(body, messages)
    request = ChatRequest(messages=messages.done)
    if body.tools:
        request.tools = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools)]
    if body.tool_choice is not None:
        request.tool_choice = _tool_choice(body.tool_choice)
        request.parallel_tool_calls = not body.tool_choice.get("disable_parallel_tool_use")
    _thinking(body, request)
    if isinstance(body, MessagesRequest):
        request.max_tokens = body.max_tokens
        request.temperature = body.temperature
        request.top_p = body.top_p
        request.top_k = body.top_k
        request.stop = body.stop_sequences
    return request, messages.origins


def _begun(body: ConversationFields, messages: _Messages) -> None:
    """The last message is the beginning of the answer."""
    turn, where = messages.done[-1], messages.origins[-1]
    if turn.get("tool_calls"):
        raise _wrong(where, "ends in tool_use; a tool_result must follow")
    if (body.thinking or {}).get("type", "disabled") not in ("disabled", "between_tools"):
        raise _wrong("thinking", "not with a last message that begins the answer")
    if (body.output_config or {}).get("format") is not None:
        raise _wrong("output_config.format", "not with a last message that begins the answer")
    text = "".join(part["text"] for part in turn["content"] or ())
    if text != text.rstrip():
        raise _wrong(where, "the beginning of the answer must not end in blanks")
    turn.pop("reasoning_content", None)
    turn["partial"] = True


def _thinking(body: ConversationFields, request: ChatRequest) -> None:
    """Reasoning is off unless asked for, as clients of this API expect."""
    config = body.output_config or {}
    effort = config.get("effort")
    if effort is not None and not isinstance(effort, str):
        raise _wrong("output_config.effort", "not a string")
    request.thinking = {"type": "disabled"} if body.thinking is None else dict(body.thinking)
    kind = request.thinking.get("type")
    if kind == "between_tools":  # no reasoning, but notes on the way
        request.thinking = {"type": "disabled"}
    elif kind == "adaptive" and effort is not None:
        request.thinking, request.reasoning_effort = None, effort
    form = config.get("format")
    if form is not None:
        if not isinstance(form, Mapping) or form.get("type") != "json_schema":
            raise _wrong("output_config.format.type", "not json_schema")
        schema = {"schema": form["schema"]} if "schema" in form else {}
        request.response_format = {"type": "json_schema", "json_schema": schema}


class _Messages:
    """Messages in OpenAI's form, and where each comes from."""

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []
        self.origins: list[str] = []

    def add(self, origin: str, message: dict[str, Any]) -> None:
        self.done.append(message)
        self.origins.append(origin)


def _system(system: str | list[Any]) -> str | list[dict[str, Any]]:
    if isinstance(system, str):
        return system
    parts = [text_part(part, f"system[{i}]", ["text"]) for i, part in enumerate(system)]
    return [part for part in parts if not part["text"].startswith(_BILLING)]


def _message(message: Any, where: str, messages: _Messages) -> None:
    if not isinstance(message, Mapping):
        raise _wrong(where, "not an object")
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise _wrong(f"{where}.role", "use user or assistant")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    elif not isinstance(content, list):
        raise _wrong(f"{where}.content", "neither a string nor a list of blocks")
    if role == "assistant":
        _assistant(content, where, messages)
        return
    texts: list[dict[str, Any]] = []
    for i, block in enumerate(content):
        here = f"{where}.content[{i}]"
        if role == "user" and isinstance(block, Mapping) and block.get("type") == "tool_result":
            if texts:
                messages.add(where, {"role": role, "content": texts})
                texts = []
            messages.add(here, _tool_result(block, here))
        else:
            kinds = ["text", "tool_result"] if role == "user" else ["text"]
            texts.append(text_part(block, here, kinds))
    if texts or not content:
        messages.add(where, {"role": role, "content": texts})


def _tool_result(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    content = block.get("content")
    if content is None or isinstance(content, str):
        content = [{"type": "text", "text": content or ""}]
    elif not isinstance(content, list):
        raise _wrong(f"{where}.content", "neither a string nor a list of blocks")
    parts = [text_part(part, f"{where}.content[{i}]", ["text"]) for i, part in enumerate(content)]
    if block.get("is_error") is True:
        said = "".join(part["text"] for part in parts).lstrip()[:5].casefold()
        if said != "error":  # Kimi has no other way to say it
            parts.insert(0, {"type": "text", "text": "Error: "})
    call_id = block.get("tool_use_id")
    if not isinstance(call_id, str) or not call_id:
        raise _wrong(f"{where}.tool_use_id", "missing or not a string")
    return {"role": "tool", "tool_call_id": call_id, "content": parts}


def _assistant(content: list[Any], where: str, messages: _Messages) -> None:
    """A turn of the model; with others before it, it is one."""
    if not messages.done or messages.done[-1]["role"] != "assistant":
        messages.add(where, {"role": "assistant", "content": None})
    turn = messages.done[-1]
    for i, block in enumerate(content):
        here = f"{where}.content[{i}]"
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "thinking":
            thought = block.get("thinking")
            if not isinstance(thought, str):
                raise _wrong(f"{here}.thinking", "not a string")
            turn["reasoning_content"] = turn.get("reasoning_content", "") + thought
        elif kind == "tool_use":
            turn.setdefault("tool_calls", []).append(_tool_use(block, here))
        elif kind != "redacted_thinking":  # which nobody can read
            kinds = ["text", "thinking", "redacted_thinking", "tool_use"]
            turn["content"] = [*(turn["content"] or ()), text_part(block, here, kinds)]


def _tool_use(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    for field in ("id", "name"):
        if not isinstance(block.get(field), str):
            raise _wrong(f"{where}.{field}", "missing or not a string")
    if not isinstance(block.get("input"), Mapping):
        raise _wrong(f"{where}.input", "missing or not an object")
    function = {"name": block["name"], "arguments": block["input"]}
    return {"id": block["id"], "type": "function", "function": function}


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise _wrong(where, "not an object")
    kind = tool.get("type")
    if kind not in (None, "custom"):
        raise _wrong(
            f"{where}.type",
            f"{str(kind)[:60]!r} is not a tool that this server knows; declare one with a name "
            "and an input_schema",
        )
    if "input_schema" not in tool:
        raise _wrong(f"{where}.input_schema", "missing")
    function = {"parameters": tool["input_schema"]}
    function |= {
        name: tool[name] for name in ("name", "description", "strict") if tool.get(name) is not None
    }
    return {"type": "function", "function": function}


def _tool_choice(choice: Mapping[str, Any]) -> Any:
    kind = choice.get("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    names = {"auto": "auto", "any": "required", "none": "none"}
    if not isinstance(kind, str) or kind not in names:
        raise _wrong("tool_choice.type", "use auto, any, tool or none")
    return names[kind]


def _wrong(field: str, what: str) -> ApiError:
    return ApiError(400, f"{field}: {what}", param=field)
