"""Greedy exact-match accuracy of a nano checkpoint on held-out problems, through the public API.

    python tools/eval_nano.py [FOLDER] [--count 100] [--float FOLDER] [--json FILE]

"answer" is the final message (or call) without the reasoning, "reply" all of it. A problem with a
tool call counts only when both the call and the answer read from the result are exact. The second
column of answers asks the problem as the second question of a chat, the third without reasoning.
"""

# ruff: noqa: E402, I001 - the paths come first
from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from kimi_cpu.chat.generate import Result, generate
from kimi_cpu.chat.messages import normalise
from kimi_cpu.chat.template import ChatTemplate, encode_segments
from kimi_cpu.engine import Engine
from kimi_cpu.sampling import SamplingParams
from kimi_cpu.tokenizer import Tokenizer
from nano.dialogues import Step, Turn, aloud
from nano.problems import FAMILIES, Problem, problems

MODES = {"answer": (False, True), "second": (True, True), "no_think": (False, False)}


def assistant_message(step: Step, first_call: int) -> dict[str, Any]:
    """``step`` as an OpenAI message."""
    message: dict[str, Any] = {"role": "assistant", "content": step.content or None}
    if step.calls:
        message["tool_calls"] = [
            {
                "id": f"functions.{name}:{first_call + i}",
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
            for i, (name, arguments) in enumerate(step.calls)
        ]
    return message


def tool_messages(step: Step, first_call: int) -> list[dict[str, Any]]:
    """The tool messages that answer the calls of ``step``."""
    return [
        {"role": "tool", "tool_call_id": f"functions.{name}:{first_call + i}", "content": result}
        for i, ((name, _), result) in enumerate(zip(step.calls, step.results, strict=True))
    ]


def history(turn: Turn) -> list[dict[str, Any]]:
    """A finished turn as messages; calls are counted from 0."""
    out: list[dict[str, Any]] = [{"role": "user", "content": turn.user}]
    first = 0
    for step in turn.steps:
        out += [assistant_message(step, first), *tool_messages(step, first)]
        first += len(step.calls)
    return out


class Model:
    """A checkpoint that answers messages greedily."""

    def __init__(self, folder: Path, template: Path, precision: Any, threads: int | None) -> None:
        self.engine = Engine.load(folder, precision=precision, threads=threads)
        self.session = self.engine.session()
        self.tokenizer = Tokenizer.load(folder)
        self.template = ChatTemplate.load(template)

    def reply(self, messages: list[dict[str, Any]], tools: Any, thinking: bool) -> Result:
        checked = normalise(messages, tools or None)
        ids = encode_segments(
            self.tokenizer, self.template.render_segments(checked.messages, checked.tools)
        )
        params = SamplingParams(
            temperature=0.0, max_tokens=200, thinking_budget=None if thinking else 0
        )
        for event in generate(
            self.session, self.tokenizer, ids, params, allow_tools=bool(tools),
            next_call_index=checked.next_call_index,
            eos_token_ids=self.engine.config.eos_token_ids,
        ):  # fmt: skip
            last = event
        assert isinstance(last, Result)
        return last


def calls_made(message: dict[str, Any]) -> list[tuple[str, str]]:
    calls = message.get("tool_calls") or []
    return [(c["function"]["name"], c["function"]["arguments"]) for c in calls]


def solve(model: Model, problem: Problem, thinking: bool) -> tuple[bool, bool, str]:
    """Exact answer, exact reply, and what was said."""
    scene, turn = problem.scene, problem.turn if thinking else aloud(problem.turn)
    messages: list[dict[str, Any]] = []
    if scene.system:
        messages.append({"role": "system", "content": scene.system})
    if problem.warm_up is not None:
        messages += history(problem.warm_up)
    messages.append({"role": "user", "content": turn.user})
    first = sum(len(m.get("tool_calls") or []) for m in messages)
    whole, said = True, []
    for step in turn.steps:
        result = model.reply(messages, list(scene.tools), thinking)
        made = result.message
        reasoning, content = made.get("reasoning_content") or "", made.get("content") or ""
        calls = calls_made(made)
        said.append(f"<{reasoning}> {content} {calls or ''}")
        ok = content == step.content and calls == list(step.calls)
        whole &= ok and (not thinking or reasoning == step.think)
        if not ok:
            return False, False, " | ".join(said)
        message = assistant_message(step, first)
        if thinking:
            message["reasoning_content"] = reasoning
        messages += [message, *tool_messages(step, first)]
        first += len(step.calls)
    return True, whole, " | ".join(said)


def measure(model: Model, count: int, seed: int, only: str, misses: int) -> dict[str, Any]:
    """Per cent by family and mode."""
    table: dict[str, Any] = {}
    for name in FAMILIES:
        if only not in name:
            continue
        line: dict[str, float] = {}
        for mode, (second, thinking) in MODES.items():
            todo = problems(name, count, seed, second)
            done = [solve(model, p, thinking) for p in todo]
            line[mode] = round(100 * sum(ok for ok, _, _ in done) / count, 1)
            if mode == "answer":
                line["reply"] = round(100 * sum(whole for _, whole, _ in done) / count, 1)
            wrong = [(p, said) for p, (ok, _, said) in zip(todo, done, strict=True) if not ok]
            for p, said in wrong[:misses]:
                print(f"  {name}, {mode}: {p.turn.user!r} -> {said}", file=sys.stderr)
        table[name] = line
    return table


def markdown(table: dict[str, Any], floats: dict[str, Any] | None) -> str:
    """The result as a Markdown table."""
    heads = ["family", "answer", "whole reply", "as second question", "without reasoning"]
    heads += ["float weights"] * (floats is not None)
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, line in table.items():
        cells = [name, *(f"{line[k]:.0f} %" for k in ("answer", "reply", "second", "no_think"))]
        if floats is not None:
            cells.append(f"{floats[name]['answer']:.0f} %")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    nano = ROOT / "weights" / "nano"
    parser.add_argument("folder", type=Path, nargs="?", default=nano)
    parser.add_argument("--count", type=int, default=100, help="problems a family")
    parser.add_argument("--seed", type=int, default=1, help="of the problems")
    parser.add_argument("--only", default="", help="families whose name has this text")
    parser.add_argument("--float", type=Path, help="folder of the unrounded weights, to compare")
    parser.add_argument("--precision", default="fast", choices=("fast", "exact"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--misses", type=int, default=0, help="wrong replies to show a family")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    options = parser.parse_args()
    started = time.monotonic()
    tables = []
    for folder in (options.folder, options.float):
        if folder is not None:
            model = Model(folder, nano, options.precision, options.threads)
            tables.append(measure(model, options.count, options.seed, options.only, options.misses))
    floats = tables[1] if options.float else None
    print(markdown(tables[0], floats))
    seconds = time.monotonic() - started
    print(f"\n{options.count} problems a family and column, {seconds:.0f} s", file=sys.stderr)
    if options.json:
        record = {"count": options.count, "seed": options.seed, "precision": options.precision}
        record |= {"int4": tables[0], "float": floats}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
