"""Renders a conversation by the checkpoint's own chat template, in segments.

A segment is either a control token or text, and text is only ever encoded as text. Control tokens
come from the template alone; `provenance.py` says how that is known. The template runs in Jinja's
sandbox with the settings that transformers use, so its texts, put together, are what
`apply_chat_template(..., tokenize=False)` gives.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError as JinjaTemplateError
from jinja2 import TemplateSyntaxError

from kimi_cpu.chat.provenance import MAX_SECONDS, Literal, Marks, TemplateEnvironment, deadline
from kimi_cpu.errors import TemplateError
from kimi_cpu.tokenizer import CONFIG_FILE, MAX_CONFIG_BYTES, Tokenizer, replace_surrogates

TEMPLATE_FILE = "chat_template.jinja"
MAX_TEMPLATE_BYTES = 1 << 20

_SPECIAL_KEYS = ("bos_token", "eos_token", "pad_token", "unk_token")
_HINT = "Take the chat template from the model's own repository again."


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered conversation: one control token's name, or ordinary text."""

    text: str
    is_control: bool


class ChatTemplate:
    """A compiled chat template."""

    def __init__(
        self,
        source: str,
        control_names: Iterable[str],
        special_tokens: Mapping[str, str] | None = None,
        name: str = TEMPLATE_FILE,
    ) -> None:
        """Compile `source`; raises TemplateError naming the line.

        `control_names` are the spellings that become control tokens where the template writes
        them; `special_tokens` (`bos_token` and such) are variables that the template may use.
        """
        self.name = name
        try:
            self._marks = Marks(control_names)
            self._plain = TemplateEnvironment(None)
            self._marked = TemplateEnvironment(self._marks)
            for environment in (self._plain, self._marked):
                environment.filters["tojson"] = _tojson
                environment.globals["raise_exception"] = _raise_exception
            self._plain_template = self._plain.compile_source(source, name)
            self._marked_template = self._marked.compile_source(source, name)
        except TemplateSyntaxError as error:
            raise TemplateError(f"{name}: line {error.lineno}: {error.message}", _HINT) from None
        except (ValueError, RecursionError, SyntaxError) as error:
            raise TemplateError(f"{name}: {error}", _HINT) from None
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def load(cls, folder: str | Path) -> ChatTemplate:
        """The template of a checkpoint folder.

        Reads `chat_template.jinja`, or without that file the `chat_template` entry of
        `tokenizer_config.json`; the control tokens' names are those of `added_tokens_decoder`.
        Raises TemplateError.
        """
        config_path = Path(folder) / CONFIG_FILE
        path = Path(folder) / TEMPLATE_FILE
        try:
            config = json.loads(_read(config_path, MAX_CONFIG_BYTES))
        except (ValueError, RecursionError) as error:
            raise TemplateError(f"{config_path}: is not valid JSON ({error})", _HINT) from None
        if not isinstance(config, dict):
            raise TemplateError(f"{config_path}: is not an object", _HINT)
        if path.exists():
            source = _read(path, MAX_TEMPLATE_BYTES)
        else:
            path = config_path
            entry = config.get("chat_template")
            if not isinstance(entry, str):
                raise TemplateError(
                    f"{folder}: no {TEMPLATE_FILE}, and no chat_template in {CONFIG_FILE}", _HINT
                )
            if len(entry) > MAX_TEMPLATE_BYTES:
                raise TemplateError(f"{path}: chat_template is too large", _HINT)
            source = entry
        entries = config.get("added_tokens_decoder")
        values = entries.values() if isinstance(entries, dict) else []
        names = [name for entry in values if (name := _content(entry))]
        special = {key: _content(config.get(key)) for key in _SPECIAL_KEYS}
        return cls(source, names, {k: v for k, v in special.items() if v}, str(path))

    def render_segments(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        *,
        thinking: bool | None = None,
        **kwargs: Any,
    ) -> list[Segment]:
        """The conversation in segments; no two texts adjoin and none is empty.

        `messages` and `tools` are plain JSON data in OpenAI's form (see `messages.py`). Tools are
        rendered with their keys sorted and keys of messages whose value is None are left out, as
        Kimi's tokenizer and transformers do. `kwargs` are further variables of the template.

        `thinking` is handed to the template, too. With `thinking=False` and a generation prompt,
        a template of a model with think tokens gets `<think></think>` appended unless it ends the
        reasoning itself: that is how Kimi's format says that a turn has none.

        Raises TemplateError if the template fails on these messages.
        """
        plain, marked = self._render(messages, tools, add_generation_prompt, thinking, kwargs)
        if self._marks.unmark(marked) != plain:
            raise TemplateError(
                f"{self.name}: the template depends on its own control tokens in a way that "
                "cannot be followed",
                "Use the chat template of the original model.",
            )
        return [Segment(text, is_control) for text, is_control in self._marks.split(marked)]

    def plain_render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        *,
        thinking: bool | None = None,
        **kwargs: Any,
    ) -> str:
        """The conversation as one text, control tokens spelled out. For reading, not encoding."""
        return self._render(messages, tools, add_generation_prompt, thinking, kwargs)[0]

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        thinking: bool | None,
        kwargs: Mapping[str, Any],
    ) -> tuple[str, str]:
        """The plain and the marked rendering."""
        now = datetime.now()
        try:
            variables = {
                **_data(kwargs),
                "messages": [
                    {key: value for key, value in _data(message).items() if value is not None}
                    for message in messages
                ],
                "tools": _sorted_keys(_data(tools)),
                "add_generation_prompt": bool(add_generation_prompt),
                "strftime_now": lambda form: now.strftime(str.__str__(form)),
            }
        except RecursionError:
            raise TemplateError("the messages or tools are nested too deeply") from None
        if thinking is not None:
            variables["thinking"] = thinking
        plain = self._run(self._plain_template, {**self._special_tokens, **variables})
        marks = self._marks
        special = {k: Literal.of(marks, marks.mark(v)) for k, v in self._special_tokens.items()}
        marked = self._run(self._marked_template, {**special, **variables})
        if thinking is False and add_generation_prompt and "</think>" in marks.names:
            end = "" if marked.endswith(marks.mark("</think>")) else "<think></think>"
            plain += end
            marked += marks.mark(end)
        return plain, marked

    def _run(self, template: Any, variables: dict[str, Any]) -> str:
        token = deadline.set(time.monotonic() + MAX_SECONDS)
        try:
            return str(template.render(variables))
        except Exception as error:
            # Whatever goes wrong in there is the template's doing, on these messages.
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == self.name]
            where = f"line {lines[-1]}: " if lines else ""
            what = self._marks.unmark(str(error)) or type(error).__name__
            if not isinstance(error, JinjaTemplateError):
                what = f"{type(error).__name__}: {what}"
            raise TemplateError(
                f"{self.name}: {where}{what}", "The template may not support these messages."
            ) from None
        finally:
            deadline.reset(token)


def encode_segments(tokenizer: Tokenizer, segments: Iterable[Segment]) -> list[int]:
    """The token ids of a rendered conversation; TokenizerError for an unknown control token.

    Each text is encoded on its own, so a control token is never cut. Kimi's published code cuts
    the whole prompt at every 400,000 characters; the ids can differ at those places only.
    """
    ids: list[int] = []
    for segment in segments:
        if segment.is_control:
            ids.append(tokenizer.control(segment.text))
        else:
            ids += tokenizer.encode_text(segment.text)
    return ids


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' filter: no HTML escapes, non-ASCII text kept, keys in their own order."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise JinjaTemplateError(str.__str__(message))


def _data(value: Any) -> Any:
    """Plain JSON data, copied, without surrogates: all that a template gets to see."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return replace_surrogates(str.__str__(value))
    if isinstance(value, Mapping):
        return {_data(key): _data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_data(item) for item in value]
    raise TemplateError(f"a {type(value).__name__} among the messages or tools is not JSON data")


def _sorted_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted_keys(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [_sorted_keys(item) for item in value]
    return value


def _content(entry: Any) -> str:
    """The spelling of a token in tokenizer_config.json: a string, or an object's `content`."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else ""


def _read(path: Path, max_bytes: int) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise TemplateError(f"{path}: cannot be read ({error.strerror or error})", _HINT) from None
    if len(data) > max_bytes:
        raise TemplateError(f"{path}: is larger than {max_bytes >> 10} KB", _HINT)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise TemplateError(f"{path}: is not UTF-8 text", _HINT) from None
