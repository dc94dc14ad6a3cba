"""What the tests of grammars share: requests, random models, and what is demanded of a reply."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np

from kimi_cpu.chat.grammar import Constraint, DeadEndError
from kimi_cpu.chat.parser import StreamParser
from kimi_cpu.sampling import Sampler, SamplingParams
from kimi_cpu.tokenizer import Tokenizer
from tests.text.conftest import SHARED

ENDS = ("<|im_end|>", "[EOS]")


def tool(name: str, parameters: Any = None, **fields: Any) -> dict[str, Any]:
    function = {"name": name, **({} if parameters is None else {"parameters": parameters})}
    return {"type": "function", "function": {**function, **fields}}


def json_schema(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **fields}}


def allowed(tokenizer: Tokenizer, constraint: Constraint) -> set[int]:
    bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")
    assert not bits[tokenizer.n_vocab :].any()
    return set(np.flatnonzero(bits).tolist())


def controls(tokenizer: Tokenizer, constraint: Constraint) -> set[str]:
    """The control tokens that may come next."""
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    return {names[i] for i in allowed(tokenizer, constraint) if i in names}


def accept(tokenizer: Tokenizer, constraint: Constraint, *parts: str) -> None:
    """Control tokens, and texts in the longest tokens that are allowed."""
    for part in parts:
        if part in tokenizer.special_tokens:
            assert tokenizer.control(part) in allowed(tokenizer, constraint), part
            constraint.accept(tokenizer.control(part))
            continue
        rest = part.encode()
        while rest:
            texts = {i: tokenizer.token_bytes(i) for i in allowed(tokenizer, constraint)
                     if i < tokenizer.n_ranks}  # fmt: skip
            fitting = [i for i, text in texts.items() if rest.startswith(text)]
            assert fitting, f"{part!r} stops at {rest!r}"
            best = max(fitting, key=lambda i: len(texts[i]))
            constraint.accept(best)
            rest = rest[len(texts[best]) :]


def requests() -> list[dict[str, Any]]:
    """The published tool-call cases; none when they are not at hand."""
    path = SHARED / "tool_call_requests.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


class RandomModel:
    """Logits by chance. It likes what closes things, so that texts end."""

    def __init__(self, tokenizer: Tokenizer, seed: int, eager: float = 4.0) -> None:
        self._rng = np.random.default_rng(seed)
        self._bias = np.zeros(tokenizer.n_vocab, np.float32)
        self._bias[tokenizer.n_ranks :] = eager
        for i in range(tokenizer.n_ranks):
            data = tokenizer.token_bytes(i)
            if len(data) <= 3 and set(data) <= set(b'"]},:'):
                self._bias[i] = eager

    def __call__(self) -> np.ndarray:
        return self._rng.standard_normal(self._bias.size, np.float32) + self._bias


def run(
    tokenizer: Tokenizer, constraint: Constraint, seed: int, limit: int = 300, eager: float = 4.0
) -> tuple[list[int], bool]:
    """The ids a random model writes under the constraint, and whether it ended the reply."""
    model, sampler = RandomModel(tokenizer, seed, eager), Sampler(SamplingParams(seed=seed))
    ends = {tokenizer.control(name) for name in ENDS}
    ids: list[int] = []
    while len(ids) < limit:
        try:
            token = sampler.sample(model(), constraint.mask())
        except DeadEndError:
            return ids, False
        constraint.accept(token)
        if token in ends:
            assert constraint.may_stop
            return ids, True
        ids.append(token)
    return ids, False


def parsed(tokenizer: Tokenizer, ids: list[int], in_reasoning: bool = False, first: int = 0):
    parser = StreamParser(tokenizer, in_reasoning=in_reasoning, next_call_index=first)
    for i in ids:
        parser.push(i)
    parser.finish()
    return parser


def check_json(schema: Any, text: str) -> None:
    def no_constant(name: str) -> None:
        raise AssertionError(name)

    value = json.loads(text, parse_constant=no_constant)
    json.dumps(value, allow_nan=False).encode()  # no infinity, no half surrogates
    jsonschema.Draft202012Validator(schema).validate(value)


TOOLS = [
    tool("get_weather", {"type": "object", "properties": {"city": {"type": "string"}},
                         "required": ["city"], "additionalProperties": False}),
    tool("fs.read-file", {"properties": {"path": {"type": "string", "minLength": 1}}}),
    tool("clock"),
    tool("天气:1", {"type": "object"}),
]  # fmt: skip
