"""Which tokens may come next in one reply: Kimi's wire format, and the schemas within it.

Where a reply stands, and what may come there besides text:

| state     | text                            | control tokens                                   |
|-----------|---------------------------------|--------------------------------------------------|
| START     | any                             | `<think>`, and those of REASONING                |
| REASONING | any                             | `</think>`, a section; an end if nothing is owed |
| CONTENT   | any, or JSON by response_format | a section, an end; only a section if one is owed |
| SECTION   | none                            | `<|tool_call_begin|>`                            |
| HEADER    | `functions.NAME:IDX`            | then `<|tool_call_argument_begin|>`              |
| ARGUMENTS | JSON by the tool's schema       | then `<|tool_call_end|>`                         |
| BETWEEN   | none                            | another call, or `<|tool_calls_section_end|>`    |
| DONE      | none                            | the tokens that end a reply                      |

Only JSON and headers need llguidance; in the other states the mask is a table made once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from kimi_cpu.chat.grammar.compiler import Vocabulary, vocabulary
from kimi_cpu.chat.grammar.scan import MAX_DEPTH, JsonScan
from kimi_cpu.chat.grammar.schema import GrammarError, prepare
from kimi_cpu.errors import UserError
from kimi_cpu.sampling import AllowedBits
from kimi_cpu.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_TOOLS = 512
MAX_TOOLS_CHARS = 1 << 20

_THINK, _END_THINK = "<think>", "</think>"
_SECTION, _END_SECTION = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_CALL, _ARGUMENTS, _END_CALL = (
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
)
_ENDS = ("<|im_end|>", "[EOS]")

_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


class DeadEndError(UserError):
    """The reply cannot go on: no token is allowed, or llguidance's limits are reached.

    End the reply as if it had reached max_tokens: what was written so far is not complete.
    """


class _State(Enum):
    START = auto()
    REASONING = auto()
    CONTENT = auto()
    SECTION = auto()
    HEADER = auto()
    ARGUMENTS = auto()
    BETWEEN = auto()
    DONE = auto()


class Constraint:
    """The allowed tokens of one reply; made by `constrain`. For one thread at a time."""

    def __init__(
        self,
        words: Vocabulary,
        *,
        calls: Mapping[str, LLMatcher],
        owes_call: bool,
        max_calls: int | None,
        content: LLMatcher | None,
        in_reasoning: bool,
        next_call_index: int,
        eos_token_ids: Sequence[int],
    ) -> None:
        """calls: fresh matchers of arguments by tool; content: one of JSON content, or None."""
        self._words = words
        self._calls = calls
        self._owes_call = owes_call
        self._owes_content = content is not None
        self._max_calls = max_calls
        self._n_calls = 0
        self._next_index = next_call_index
        special = words.tokenizer.special_tokens
        self._names = {i: name for name, i in special.items()}
        self._ends = sorted({special[n] for n in _ENDS if n in special} | {*eos_token_ids})
        self._scan = JsonScan()
        self._header = b""
        self._written = False  # some of the content's JSON is there
        self._json = content
        self._matcher: LLMatcher | None = None
        self._tables: dict[tuple[str, ...], AllowedBits] = {}
        thinks = _END_THINK in special
        self._state = _State.START if in_reasoning and thinks else _State.CONTENT
        if self._state is _State.CONTENT:
            self._matcher = self._json

    @property
    def may_stop(self) -> bool:
        """Whether the reply may end here."""
        match self._state:
            case _State.START | _State.REASONING:
                return not (self._owes_call or self._owes_content)
            case _State.CONTENT:
                return not self._owes_call and (
                    self._matcher is None or self._matcher.is_accepting()
                )
            case _State.DONE:
                return True
        return False

    def mask(self) -> AllowedBits:
        """The tokens that may come next, at least one. Not to be changed. Raises DeadEndError."""
        controls = self._controls()
        if self._matcher is None:
            return self._table(controls)
        text = self._words.allowed_text(self._matcher)
        if self._matcher.is_error():
            raise DeadEndError("the reply's JSON became too costly to follow its schema")
        if (room := self._scan.room) is not None:
            text = self._shortened(text, room, bool(controls))
        if not controls and not text.any():
            raise DeadEndError("the reply's JSON cannot be finished by its schema")
        return text | self._table(controls, text=False) if controls else text

    def accept(self, token: int) -> None:
        """Go on by a token that `mask` allowed.

        A `</think>` that is forced because the reasoning is long enough is always allowed there.
        Raises ValueError for any other token, DeadEndError when JSON is nested too deeply.
        """
        name = self._names.get(token)
        if name is None and token not in self._ends:
            self._accept_text(token)
        elif token in self._ends:
            if not self.may_stop:
                raise self._wrong(token)
            self._state = _State.DONE
        elif name in self._controls():
            self._accept_control(str(name))
        else:
            raise self._wrong(token)

    def _accept_text(self, token: int) -> None:
        if self._matcher is not None:
            if not self._matcher.validate_tokens([token]):
                raise self._wrong(token)
            if not self._matcher.consume_token(token):
                raise DeadEndError("the reply's JSON became too costly to follow its schema")
            data = self._words.tokenizer.token_bytes(token)
            if self._state is _State.HEADER:
                self._header += data
                return
            self._written = True
            self._scan.push(data)
            if self._scan.depth > MAX_DEPTH:
                raise DeadEndError(f"the reply's JSON is nested deeper than {MAX_DEPTH} levels")
        elif self._state is _State.START:
            self._state = _State.REASONING
        elif self._state not in (_State.REASONING, _State.CONTENT) or self._owes_in_content:
            raise self._wrong(token)

    def _accept_control(self, name: str) -> None:
        match name:
            case "<think>":
                self._state = _State.REASONING
            case "</think>":
                self._state, self._matcher = _State.CONTENT, self._json
            case "<|tool_calls_section_begin|>":
                self._state, self._matcher = _State.SECTION, None
                self._scan = JsonScan()  # not that of the content any more
            case "<|tool_call_begin|>":
                self._state, self._header = _State.HEADER, b""
                headers = [f"functions.{tool}:{self._next_index}" for tool in self._calls]
                self._matcher = self._words.choice(headers, "tools")
            case "<|tool_call_argument_begin|>":
                tool = self._header.decode("utf-8").removeprefix("functions.").rpartition(":")[0]
                self._matcher = self._calls[tool].deep_copy()
                self._state = _State.ARGUMENTS
            case "<|tool_call_end|>":
                self._n_calls += 1
                self._next_index += 1
                self._state, self._matcher = _State.BETWEEN, None
            case "<|tool_calls_section_end|>":
                self._state = _State.DONE

    @property
    def _owes_in_content(self) -> bool:
        return self._state is _State.CONTENT and self._owes_call

    def _controls(self) -> tuple[str, ...]:
        """The control tokens that may come next, by name; "" stands for those that end a reply."""
        section = (_SECTION,) if self._calls else ()
        end = ("",) if self.may_stop else ()
        match self._state:
            case _State.START:
                return (_THINK, _END_THINK, *section, *end)
            case _State.REASONING:
                return (_END_THINK, *section, *end)
            case _State.CONTENT:
                # calls follow the content: whole JSON, or none
                return (*(section if not self._written or end else ()), *end)
            case _State.SECTION:
                return (_CALL,)
            case _State.HEADER:
                return (_ARGUMENTS,) if self._accepting else ()
            case _State.ARGUMENTS:
                return (_END_CALL,) if self._accepting else ()
            case _State.BETWEEN:
                more = self._max_calls is None or self._n_calls < self._max_calls
                return (_CALL, _END_SECTION) if more else (_END_SECTION,)
            case _State.DONE:
                return ("",)

    @property
    def _accepting(self) -> bool:
        return self._matcher is not None and self._matcher.is_accepting()

    def _table(self, controls: tuple[str, ...], text: bool | None = None) -> AllowedBits:
        """The mask of control tokens, with any text where the state has it (or as told)."""
        if text is None:
            free = self._state in (_State.START, _State.REASONING, _State.CONTENT)
            text = free and not self._owes_in_content
        key = (*controls, "text" if text else "")
        if key not in self._tables:
            special = self._words.tokenizer.special_tokens
            ids = [special[name] for name in controls if name]
            bits = self._words.bits(ids + (self._ends if "" in controls else []))
            self._tables[key] = bits | self._words.text if text else bits
        return self._tables[key]

    def _shortened(self, text: AllowedBits, room: int, may_end: bool) -> AllowedBits:
        """Without tokens that would make a number too long, unless nothing else is allowed."""
        beyond = self._words.digits_beyond(room)
        if beyond is None:
            return text
        shorter = text & ~beyond
        return shorter if may_end or shorter.any() else text

    def _wrong(self, token: int) -> ValueError:
        return ValueError(f"token {token} is not allowed in {self._state.name} of this reply")


def constrain(
    tokenizer: Tokenizer,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: Any = None,
    parallel_tool_calls: bool = True,
    response_format: Any = None,
    in_reasoning: bool = True,
    next_call_index: int = 0,
    eos_token_ids: Sequence[int] = (),
) -> Constraint | None:
    """The constraint of a reply, or None when nothing is constrained (no tools, free text).

    tools: checked (`messages.validate_tools`) declarations. `"strict": false` in a function
        leaves out what cannot be enforced of its schema (all of it, if there is no other way:
        then arguments are any JSON object); otherwise that is an error.
    tool_choice: None or "auto", "none", "required", or an object that names a function: one call
        of it. A call follows the reasoning, and may interrupt it, as Kimi does.
    response_format: None, or OpenAI's object of type "text", "json_object" or "json_schema".
    in_reasoning: where the reply starts, `parser.starts_in_reasoning` of the prompt.
    next_call_index: the conversation's, as for the parser.
    eos_token_ids: the config's; they end a reply beside `<|im_end|>` and `[EOS]`.

    Compiles every schema that is not in the cache, a millisecond for an ordinary one and up to a
    second for one at the limits: call it off the event loop. Raises GrammarError (a UserError)
    whose `param` names the field; UsageError when llguidance is not installed.
    """
    names = [str(tool["function"]["name"]) for tool in tools or ()]
    wanted = _wanted(tool_choice, names)
    schema, field = _content_schema(response_format)
    if not names and schema is None:
        return None
    words = vocabulary(tokenizer)
    calls = _call_matchers(words, tools or (), wanted)
    content = None if schema is None else words.json(schema, field)
    single = not parallel_tool_calls or isinstance(tool_choice, Mapping)
    return Constraint(
        words,
        calls=calls,
        owes_call=tool_choice == "required" or isinstance(tool_choice, Mapping),
        max_calls=1 if single else None,
        content=content,
        in_reasoning=in_reasoning,
        next_call_index=next_call_index,
        eos_token_ids=eos_token_ids,
    )


def _wanted(choice: Any, names: list[str]) -> set[str]:
    """The tools that may be called."""
    if choice is None or choice == "auto":
        return set(names)
    if choice == "none":
        return set()
    if choice == "required":
        if not names:
            raise GrammarError("tool_choice", "'required' without tools", "Declare tools.")
        return set(names)
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or choice.get("type", "function") != "function":
        raise GrammarError(
            "tool_choice",
            "neither auto, none, required nor a function",
            'Name one like {"type": "function", "function": {"name": ...}}.',
        )
    if name not in names:
        raise GrammarError("tool_choice.function.name", f"{name[:80]!r} is not among the tools")
    return {name}


def _call_matchers(
    words: Vocabulary, tools: Sequence[Mapping[str, Any]], wanted: set[str]
) -> dict[str, LLMatcher]:
    if wanted and _SECTION not in words.tokenizer.special_tokens:
        raise GrammarError("tools", "the model's tokenizer has no tokens for calls")
    if len(tools) > MAX_TOOLS:
        raise GrammarError("tools", f"are more than {MAX_TOOLS}")
    calls: dict[str, LLMatcher] = {}
    chars = 0
    for i, tool in enumerate(tools):
        function = tool["function"]
        name = function["name"]
        if name not in wanted:
            continue
        where = f"tools[{i}].function.parameters"
        parameters = function.get("parameters")
        parameters = _NO_PARAMETERS if parameters is None else parameters
        strict = function.get("strict") is not False
        # If it is not strict: what cannot be said is left out, then what compiling may fail for,
        # then all of it.
        attempts = [(parameters, False)]
        if not strict:
            attempts += [(parameters, True), ({"type": "object"}, True)]
        for n, (declared, plain) in enumerate(attempts):
            try:
                schema = prepare(declared, where, root_object=True, strict=strict, plain=plain)
                if chars + len(schema) > MAX_TOOLS_CHARS and declared is parameters:
                    what = f"have schemas of over {MAX_TOOLS_CHARS:,} characters"
                    raise GrammarError("tools", what)
                calls[name] = words.json(schema, where)
            except GrammarError:
                if n + 1 == len(attempts):
                    raise
            else:
                chars += len(schema)
                break
    return calls


def _content_schema(response_format: Any) -> tuple[str | None, str]:
    """The prepared schema of the content, None when it is free text; and the field it is from."""
    where = "response_format"
    if response_format is None:
        return None, where
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "text":
        return None, where
    if kind == "json_object":
        return prepare({"type": "object"}, where), where
    if kind != "json_schema":
        raise GrammarError("response_format.type", "neither text, json_object nor json_schema")
    where = "response_format.json_schema.schema"
    entry = response_format.get("json_schema")
    if not isinstance(entry, Mapping) or "schema" not in entry:
        raise GrammarError(where, "missing", 'Like {"name": ..., "schema": {...}}.')
    return prepare(entry["schema"], where, strict=entry.get("strict") is not False), where
