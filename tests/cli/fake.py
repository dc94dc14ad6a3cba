"""A scripted model: real tokenizer, template, generation and command line; made-up logits.

`python -m tests.cli.fake ARGS...` is `kimi-cpu ARGS...` with it. What it says depends on the last
turn of the prompt, see `script`.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from kimi_cpu.errors import ContextError
from kimi_cpu.store.experts.stats import ExpertStats
from kimi_cpu.tokenizer import Tokenizer

_TOOL_CONTROL = [
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
]
_TURN_CONTROL = ["<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>"]
CONTROL = ["[BOS]", "[EOS]", "<|im_end|>", "<think>", "</think>", *_TURN_CONTROL, *_TOOL_CONTROL]

TEMPLATE = """
{%- macro begin(m) -%}
{%- if m.role == 'user' -%}<|im_user|>{%- elif m.role == 'assistant' -%}<|im_assistant|>
{%- else -%}<|im_system|>{%- endif -%}{{ m.role }}<|im_middle|>
{%- endmacro -%}
{%- if tools -%}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}
<|im_end|>{%- endif -%}
{%- for m in messages -%}
{{ begin(m) }}
{%- if m.role == 'assistant' -%}<think></think>{{ m.content }}
{%- if m.tool_calls -%}<|tool_calls_section_begin|>{%- for c in m.tool_calls -%}
<|tool_call_begin|>{{ c.id }}<|tool_call_argument_begin|>{{ c.function.arguments }}<|tool_call_end|>
{%- endfor -%}<|tool_calls_section_end|>{%- endif -%}
{%- elif m.role == 'tool' -%}{{ '## Return of ' ~ m.tool_call_id ~ '\n' ~ m.content }}
{%- else -%}{{ m.content }}{%- endif -%}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}
"""

CONTEXT = 4000


def call(name: str, arguments: str, index: int = 0) -> str:
    return (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions."
        f"{name}:{index}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"
        "<|tool_calls_section_end|>"
    )


def script(prompt: str) -> str:
    """What the fake model says, control tokens spelt out."""
    turns = re.findall(r"<\|im_(\w+)\|>(\w+)<\|im_middle\|>(.*?)<\|im_end\|>", prompt, re.S)
    role, text = turns[-1][1], turns[-1][2]
    think = "" if prompt.endswith("</think>") else "<think>Let me think.</think>"
    if role == "tool":
        if os.environ.get("FAKE_LOOP"):
            return think + call("calculator", '{"expression": "1"}', prompt.count("Return of"))
        return f"{think}The tool says {text.splitlines()[-1]}."
    index = prompt.count("## Return of")
    if found := re.match(r"calc (.*)", text):
        return think + call("calculator", json.dumps({"expression": found[1]}), index)
    if text.startswith("weather"):
        return think + "Looking." + call("get_weather", '{"city": "Paris"}', index)
    if text.startswith("system?"):
        return think + "System: " + next((t[2] for t in turns if t[1] == "system"), "none")
    if text.startswith("slow"):
        return think + "word " * 200
    if text.startswith("count"):
        return f"{think}There are {sum(t[1] == 'user' for t in turns)} user turns."
    if text.startswith("escape"):
        return think + "\x1b]0;title\x07"
    return f"{think}You said **{text}**."


def write_folder(folder: Path) -> Path:
    """Tokenizer (single bytes), template and a config for the fake model."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{base64.b64encode(bytes([b])).decode()} {b}" for b in range(256)]
    (folder / "tiktoken.model").write_text("\n".join(lines) + "\n")
    added = {str(256 + n): {"content": name} for n, name in enumerate(CONTROL)}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "config.json").write_text("{}")
    return folder


def spelt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of text in which control tokens are spelt out."""
    ids: list[int] = []
    for part in re.split("(" + "|".join(map(re.escape, CONTROL)) + ")", text):
        ids += [tokenizer.control(part)] if part in CONTROL else tokenizer.encode_text(part)
    return ids


class FakeSession:
    """One-hot logits of a scripted reply; the same bookkeeping as `engine.Session`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        script: Callable[[str], str] = script,
        context: int = CONTEXT,
        delay_s: float = 0.0,
    ) -> None:
        self.tokenizer, self.script, self.context = tokenizer, script, context
        self.delay_s = delay_s
        self.ids: list[int] = []
        self.reply: list[int] = []
        self.synced: list[list[int]] = []
        self.cache_bytes = 1000

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def remaining(self) -> int:
        return self.context - len(self.ids)

    def common_prefix(self, ids) -> int:
        n = 0
        while n < min(len(ids), len(self.ids)) and ids[n] == self.ids[n]:
            n += 1
        return n

    def sync(self, ids, progress=None) -> np.ndarray:
        if len(ids) > self.context:
            raise ContextError("the prompt does not fit", "shorten it")
        self.ids = list(ids)
        self.synced.append(list(ids))
        prompt = self.tokenizer.decode(ids)
        self.delay_s = 0.03 if ">slow" in prompt[-120:] else self.delay_s
        self.reply = [*spelt(self.tokenizer, self.script(prompt)), self.tokenizer.control("[EOS]")]
        if progress is not None:
            progress(len(ids), len(ids))
        return self._logits()

    def step(self, token: int) -> np.ndarray:
        if self.delay_s:
            time.sleep(self.delay_s)
        self.ids.append(token)
        if token == self.tokenizer.special_tokens.get("</think>") and token in self.reply:
            del self.reply[: self.reply.index(token) + 1]  # perhaps forced
        elif self.reply and token == self.reply[0]:
            self.reply.pop(0)
        return self._logits()

    def _logits(self) -> np.ndarray:
        logits = np.full(self.tokenizer.n_vocab, -50, np.float32)
        logits[self.reply[0] if self.reply else self.tokenizer.control("[EOS]")] = 50
        return logits


class FakeExperts:
    """A store that reads an expert whenever it is asked."""

    def __init__(self, bounded: bool) -> None:
        self.bounded = bounded
        self.capacity, self.io = 7, "direct"
        self.calls = 0

    def stats(self) -> ExpertStats:
        self.calls += 1
        return ExpertStats(uses=8 * self.calls, hits=6 * self.calls, read_bytes=1000 * self.calls)


def load_model(
    folder: Path, threads: int | None, precision: str, *, memory=None, io="auto", trace=None
):
    """Stands in for `kimi_cpu.cli.common.load_model`."""
    from kimi_cpu.chat.template import ChatTemplate
    from kimi_cpu.cli.common import Loaded

    tokenizer = Tokenizer.load(folder)
    config = SimpleNamespace(max_position_embeddings=CONTEXT, eos_token_ids=())
    engine = SimpleNamespace(
        config=config, precision=precision, threads=threads or 2,
        experts=FakeExperts(memory is not None),
    )  # fmt: skip
    session = FakeSession(tokenizer)
    return Loaded(folder, engine, session, tokenizer, ChatTemplate.load(folder))  # type: ignore[arg-type]


if __name__ == "__main__":
    from kimi_cpu.cli import common, main

    common.load_model = load_model  # type: ignore[assignment]
    sys.exit(main.main())
