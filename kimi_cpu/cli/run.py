"""`kimi-cpu run PROMPT`: one answer on stdout."""

from __future__ import annotations

import json
import os
import stat
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kimi_cpu.cli import common
from kimi_cpu.cli.terminal import is_terminal, note, printable
from kimi_cpu.errors import UsageError

if TYPE_CHECKING:
    from kimi_cpu.chat.generate import Result


@click.command(
    epilog="The answer goes to stdout; reasoning (to a terminal only), notices and the footer go "
    "to stderr. Piped input is put before PROMPT."
)
@click.argument("prompt", nargs=-1)
@common.model_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def command(
    prompt: tuple[str, ...],
    model: str | None,
    system: str | None,
    tools: str | None,
    threads: int | None,
    precision: str,
    memory: int | None,
    io: str,
    trace: Path | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Answer one prompt and exit."""
    declared = common.declared_tools(tools)
    text = _prompt_text(prompt)
    folder = common.model_folder(model)
    params = common.sampling_params(folder, **sampling)
    loaded = common.load_model(folder, threads, precision, memory=memory, io=io, trace=trace)
    messages = common.with_system(system, [{"role": "user", "content": text}])
    from kimi_cpu.chat.generate import Result
    from kimi_cpu.cli.reply import ReplyView

    view = None if as_json else ReplyView()
    result: Result | None = None
    try:
        for event in common.reply_events(loaded, messages, declared, params):
            if view is not None:
                view.show(event)
            if isinstance(event, Result):
                result = event
    finally:
        if view is not None:
            view.close()
    assert result is not None  # `generate` always ends with one
    if as_json:
        click.echo(json.dumps(_as_json(result, loaded), ensure_ascii=False, indent=2))
        return
    for call in result.message.get("tool_calls", ()):
        click.echo(printable(common.call_line(call)))
    if not (result.message.get("content") or result.message.get("tool_calls")):
        note("The reply is all reasoning; --thinking-budget N makes the model come to an answer.")
    note(common.footer(result, loaded.expert_stats()))


def _prompt_text(words: tuple[str, ...]) -> str:
    parts = []
    if _stdin_is_piped() or (words == ("-",) and not is_terminal(sys.stdin)):
        parts.append(common.read_stdin().strip("\n"))
    if words != ("-",):
        parts.append(" ".join(words))
    text = "\n\n".join(part for part in parts if part.strip())
    if not text:
        raise UsageError("there is no prompt", "kimi-cpu run 'YOUR PROMPT', or pipe text into it.")
    return text


def _stdin_is_piped() -> bool:
    """Whether stdin brings text: a pipe, file or socket, but not a terminal or /dev/null."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def _as_json(result: Result, loaded: common.Loaded) -> dict[str, Any]:
    message, experts = result.message, loaded.engine.experts.stats()
    return {
        "model": loaded.name,
        "text": message.get("content") or "",
        "reasoning": message.get("reasoning_content") or "",
        "tool_calls": message.get("tool_calls", []),
        "finish_reason": result.finish_reason,
        "usage": asdict(result.usage),
        "timings": {name: round(value, 4) for name, value in asdict(result.timings).items()},
        "experts": {
            "hit_rate": round(experts.hit_rate, 4),
            "read_bytes": experts.read_bytes,
            "wait_s": round(experts.wait_s, 4),
            "lookahead_recall": round(experts.recall, 4),
        },
    }
