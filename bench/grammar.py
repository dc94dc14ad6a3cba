"""What structured output and strict tool calls cost: masks, steps, and the sampler's use of them.

A random model writes JSON under each schema; of every token the CPU time is taken: `mask` (which
tokens may come), `accept` (going on by one), and how much longer the sampler takes with the mask
than without.

    python -m bench.grammar --tokenizer FOLDER [--requests tool_call_requests.jsonl]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kimi_cpu.chat.grammar import DeadEndError, constrain
from kimi_cpu.chat.grammar.compiler import vocabulary
from kimi_cpu.sampling import Sampler, SamplingParams
from kimi_cpu.tokenizer import Tokenizer

_EDIT = {
    "type": "object",
    "properties": {
        "path": {"type": "string"},
        "line": {"type": "integer", "minimum": 1, "maximum": 100_000},
        "text": {"type": "string"},
        "mode": {"enum": ["insert", "replace", "delete"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 40}, "maxItems": 9},
    },
    "required": ["path", "text"],
    "additionalProperties": False,
}


def _properties(n: int) -> dict[str, Any]:
    names = {f"property_{i}": {"type": "string"} for i in range(n)}
    return {"type": "object", "properties": names, "additionalProperties": False}


SCHEMAS: dict[str, Any] = {
    "any JSON object": {"type": "object"},
    "a tool that edits files": _EDIT,
    "patterns and lengths": {
        "type": "array",
        "items": {
            "anyOf": [
                {"type": "string", "pattern": "^[\\w .,-]*$", "minLength": 5, "maxLength": 2000},
                {"type": "string", "pattern": "^(\\d{1,3}\\.){3}\\d{1,3}$"},
                {"type": "string", "format": "date-time"},
                {"type": "string", "format": "uri"},
            ]
        },
    },
    "lengths beside patterns": {
        "type": "array",
        "items": {
            "anyOf": [
                {"type": "string", "pattern": "^https?://", "maxLength": 2083},
                {"type": "string", "pattern": "^[^<>]*$", "maxLength": 500},
                {"type": "string", "pattern": "^[a-z][a-z0-9-]*$", "maxLength": 63},
            ]
        },
    },
    "not blank, up to 500": {"type": "string", "pattern": "\\S", "maxLength": 500},
    "200 properties": _properties(200),
    "1000 properties": _properties(1000),
    "enum of 5000": {"type": "array", "items": {"enum": [f"value {i}" for i in range(5000)]}},
    "recursive, 30 types": {
        "$defs": {
            f"t{i}": {
                "type": "object",
                "properties": {"kind": {"const": f"t{i}"}}
                | {f"f{j}": {"$ref": f"#/$defs/t{(i * 7 + j) % 30}"} for j in range(10)},
                "required": ["kind"],
            }
            for i in range(30)
        },
        "anyOf": [{"$ref": f"#/$defs/t{i}"} for i in range(30)],
    },
}
#: Written instead of random tokens, which hardly ever spell a declared name.
TEXTS = dict.fromkeys(
    ("200 properties", "1000 properties"),
    '{"property_17": "abc def, ghi", "property_19": "x y z", "property_149": ""}',
)


class Timer:
    """Milliseconds of each part of each token."""

    def __init__(self) -> None:
        self.parts: dict[str, list[float]] = {}
        self._at = 0.0

    def start(self) -> None:
        self._at = time.thread_time()

    def lap(self, part: str) -> None:
        now = time.thread_time()
        self.parts.setdefault(part, []).append((now - self._at) * 1e3)
        self._at = time.thread_time()


class Model:
    """Random logits, leaning to control tokens and to what closes strings, lists and objects."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bias = np.zeros(tokenizer.n_vocab, np.float32)
        self._bias[tokenizer.n_ranks :] = 4
        for i in range(tokenizer.n_ranks):
            if set(tokenizer.token_bytes(i)) <= set(b'"]},:'):
                self._bias[i] = 3

    def logits(self, rng: np.random.Generator) -> np.ndarray:
        return rng.standard_normal(self._bias.size, np.float32) + self._bias


def run(
    tokenizer: Tokenizer, model: Model, seeds: int, limit: int, text: str = "", **request: Any
) -> Timer:
    """Times of the tokens of a few replies, which are `text` if that is given."""
    timer = Timer()
    for seed in range(seeds):
        timer.start()
        constraint = constrain(tokenizer, in_reasoning=False, **request)
        timer.lap("first" if seed == 0 else "again")
        assert constraint is not None
        sampler = Sampler(SamplingParams(seed=seed))
        rng = np.random.default_rng(seed)
        given = tokenizer.encode_text(text)
        for i in range(len(given) or limit):
            logits = model.logits(rng)
            timer.start()
            try:
                mask = constraint.mask()
            except DeadEndError:
                break
            timer.lap("mask")
            sampler.sample(logits)
            timer.lap("plain")
            token = sampler.sample(logits, mask)
            timer.lap("masked")
            token = given[i] if given else token
            if constraint.may_stop and tokenizer.is_control(token):
                break
            timer.start()
            constraint.accept(token)
            timer.lap("accept")
    return timer


def row(name: str, timer: Timer) -> str:
    parts = {part: np.array(times) for part, times in timer.parts.items()}
    mask, accept = parts["mask"], parts["accept"]
    applied = np.median(parts["masked"]) - np.median(parts["plain"])
    cells = [name, f"{parts['first'][0]:.1f}", str(mask.size)]
    cells += [f"{np.quantile(mask, q):.3f}" for q in (0.5, 0.99)] + [f"{mask.max():.2f}"]
    cells += [f"{np.quantile(accept, q):.3f}" for q in (0.5, 0.99)] + [f"{applied:+.3f}"]
    return "| " + " | ".join(cells) + " |"


def requests(path: Path) -> Iterator[list[dict[str, Any]]]:
    for line in path.read_text("utf-8").splitlines():
        if tools := json.loads(line).get("tools"):
            yield tools


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tiktoken.model")
    parser.add_argument("--requests", type=Path, help="JSON lines of requests with tools")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    tokenizer = Tokenizer.load(args.tokenizer)
    start = time.perf_counter()
    vocabulary(tokenizer)
    print(f"vocabulary of {tokenizer.n_vocab:,}: {time.perf_counter() - start:.2f} s, once")
    print("\nmilliseconds of CPU; `applied`: sampler with mask minus without, medians\n")
    print("| schema | compile | tokens | mask p50 | p99 | max | accept p50 | p99 | applied |")
    print("|---|---|---|---|---|---|---|---|---|")
    model = Model(tokenizer)
    for name, schema in SCHEMAS.items():
        form = {"type": "json_schema", "json_schema": {"schema": schema}}
        text = TEXTS.get(name, "")
        timer = run(tokenizer, model, args.seeds, args.tokens, text, response_format=form)
        print(row(name, timer))
    if args.requests:
        everything = Timer()
        for tools in requests(args.requests):
            timer = run(tokenizer, model, 1, args.tokens, tools=tools, tool_choice="required")
            for part, times in timer.parts.items():
                everything.parts.setdefault(part, []).extend(times)
        print(row("tool calls of the requests", everything))


if __name__ == "__main__":
    main()
