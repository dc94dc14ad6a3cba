"""Many clients at once get, number for number, what one client gets from a fresh server."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from kimi_cpu.server.settings import ServedModel
from tests.server.conftest import load_nano
from tests.server.live import Live

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
#: Numbers show a difference in the last bits that no token would.
SAMPLED = {"temperature": 1.0, "logprobs": True, "top_logprobs": 3, "max_tokens": 12}
TABLE = " ".join(f"Line {n}: {n} times 3 is {3 * n}." for n in range(60))

Ask = Callable[[str, dict[str, Any]], Any]


def load_small(phase: Callable[[str], None]) -> ServedModel:
    """Memory for a few prompts only: the others come from the disk or are computed again."""
    model = load_nano(phase)
    block_bytes = 5 * 256 * 4 * (96 + 32)
    return replace(model, session_bytes=20 * block_bytes)


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Live]]:
    started: list[Live] = []

    def start(load: Callable[..., ServedModel], **settings: Any) -> Live:
        started.append(Live(load, **settings))
        return started[-1].ready()

    yield start
    for live in started:
        live.stop()


def converse(ask: Ask, number: int) -> list[Any]:
    """Two turns; several conversations share their system message, or a part of it."""
    system = TABLE[: 300 + 400 * (number % 4)]
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": f"Question {number // 4}: " + "why? " * (20 * (number % 3))},
    ]
    answers = []
    for turn in range(2):
        choice = ask(CHAT, {"messages": messages, "seed": number, **SAMPLED})
        answers.append(choice)
        messages += [choice["message"], {"role": "user", "content": f"And then? {turn}"}]
    return answers


def complete(ask: Ask, number: int) -> list[Any]:
    """Plain text, and the same with its continuation."""
    ids = [random.Random(number % 3).randrange(1000) for _ in range(100 + 230 * (number % 5))]
    ids += [random.Random(number).randrange(1000) for _ in range(number * 7 % 50)]
    fields = {"seed": number, **SAMPLED, "logprobs": 3}
    del fields["top_logprobs"]
    first = ask(TEXT, {"prompt": ids, **fields})
    more = [ord(c) % 1000 for c in first["text"]]
    return [first, ask(TEXT, {"prompt": ids + more, **fields})]


TASKS = [(converse, n) for n in range(9)] + [(complete, n) for n in range(8)]


def asking(live: Live) -> Ask:
    def ask(path: str, body: dict[str, Any]) -> Any:
        response = live.post(path, body)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]

    return ask


class _Left(Exception):
    pass


def leaving(live: Live, after: int) -> Ask:
    """Reads so many lines of a stream, and is gone."""

    def ask(path: str, body: dict[str, Any]) -> Any:
        with live.client.stream("POST", path, json={**body, "stream": True}) as response:
            for _, _line in zip(range(after), response.iter_lines(), strict=False):
                pass
        raise _Left

    return ask


def test_everybody_gets_what_one_client_gets(start, tmp_path):
    fresh = start(load_nano)
    alone = []
    for task, number in TASKS:
        fresh.worker._scheduler._prefixes.clear()
        alone.append(task(asking(fresh), number))
    live = start(load_small, cache_dir=tmp_path, prefill_slice=128)

    def client(seed: int) -> int:
        rng, done = random.Random(seed), 0
        for i in rng.sample(range(len(TASKS)), 10):
            task, number = TASKS[i]
            if rng.random() < 0.3:
                with pytest.raises(_Left):
                    task(leaving(live, rng.randrange(8)), number)
            else:
                assert task(asking(live), number) == alone[i], (task, number)
                done += 1
        return done

    with ThreadPoolExecutor(5) as pool:
        assert sum(pool.map(client, range(5))) > 20
    found = live.client.get("/metrics").text
    assert 'kimi_cpu_cache_lookups_total{result="hit"}' in found
