"""Prompts are not computed twice: by a server started again, beside others, in little memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kimi_cpu.errors import UsageError
from kimi_cpu.kernels.common import BLOCK_TOKENS
from kimi_cpu.server import worker
from tests.server.conftest import load_nano
from tests.server.live import Live, until

TEXT = " ".join(f"Line {n}: {n} times 3 is {3 * n}." for n in range(90))


def ask(live, messages=None, **fields):
    messages = messages or [{"role": "user", "content": TEXT}]
    body = live.chat(messages=messages, **{"max_tokens": 40, "temperature": 0, **fields})
    usage = body["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return body["choices"][0]["message"], cached, usage["prompt_tokens"]


def value(live, name, **labels):
    families = text_string_to_metric_families(live.client.get("/metrics").text)
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == f"kimi_cpu_{name}" and labels.items() <= sample.labels.items()
    )


@pytest.fixture
def start_nano() -> Iterator[Callable[..., Live]]:
    """start_nano(**settings) starts a server; those still running are stopped at the end."""
    started: list[Live] = []

    def start(**settings) -> Live:
        started.append(Live(load_nano, **settings))
        return started[-1].ready()

    yield start
    for live in started:
        if live.thread.is_alive():
            live.stop()


def test_a_restart_forgets_nothing(start_nano, tmp_path):
    live = start_nano(cache_dir=tmp_path)
    first, cached, n_prompt = ask(live)
    assert cached < 50 and n_prompt > 3 * BLOCK_TOKENS
    again, cached, _ = ask(live)
    assert again == first and cached == n_prompt
    live.stop()
    assert list(tmp_path.rglob("*.latents")) and not list(tmp_path.rglob("*.part"))

    live = start_nano(cache_dir=tmp_path)
    again, cached, _ = ask(live)
    assert again == first and cached == n_prompt
    assert value(live, "cache_lookups_total", result="hit") == 1
    assert value(live, "cache_disk_bytes") > 0 and value(live, "cache_bytes") > 0
    live.stop()

    whole = max(tmp_path.rglob("*.latents"), key=lambda path: path.stat().st_size)
    data = whole.read_bytes()
    whole.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    live = start_nano(cache_dir=tmp_path)
    again, cached, _ = ask(live)
    assert again["content"] == first["content"] and cached < n_prompt
    live.stop()


def test_what_settled_survives_being_killed(serve, tmp_path, monkeypatch):
    """Nobody waits for the end to write: a crash loses the last minute only."""
    monkeypatch.setattr(worker, "_SETTLED_S", 0.1)
    live = serve(settings={"cache_dir": tmp_path / "cache"})
    _, _, n_prompt = ask(live)
    until(lambda: value(live, "cache_disk_bytes") > 0)
    until(lambda: not live.worker._scheduler._prefixes.save_some())
    other = serve(settings={"cache_dir": tmp_path / "cache"})  # beside the first, which still runs
    assert ask(other)[1] == n_prompt


def test_a_folder_too_small_is_not_written_over_and_over(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "_SETTLED_S", 0.05)
    live = serve(settings={"cache_dir": tmp_path / "cache", "cache_bytes": 10_000})
    ask(live)
    time.sleep(1)
    assert not live.worker._scheduler._prefixes.save_some()
    assert value(live, "cache_disk_bytes") <= 10_000


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    live = Live(load_nano, cache_dir=tmp_path / "file")
    until(lambda: live.worker.state == "failed", 60)
    live.stop()
    assert isinstance(live.worker.error, UsageError) and "file" in str(live.worker.error)


def test_side_requests_leave_the_conversation(serve):
    """Memory for little more than the conversation; titles, each another short prompt."""
    live = serve()
    block = live.worker.model.engine.pool.block_bytes
    live = serve(session_bytes=12 * block)
    messages = [{"role": "user", "content": TEXT}]
    known = 0
    for turn in range(4):
        message, cached, n_prompt = ask(live, messages)
        assert cached >= known - 1
        known = n_prompt
        messages += [message, {"role": "user", "content": f"Go on, {turn}."}]
        for title in range(5):
            ask(live, [{"role": "user", "content": f"{turn}.{title} is a title for " + "x" * 400}])
        assert value(live, "cache_bytes") <= 12 * block
    assert known > 8 * BLOCK_TOKENS


def test_what_is_kept_goes_when_memory_is_short(serve):
    """First what is kept for later; a request that does not fit even then is told so."""
    live = serve()
    engine = live.worker.model.engine
    block = engine.pool.block_bytes
    for n in range(4):
        live.chat(f"{n}" + TEXT)
    assert value(live, "cache_bytes") > 60 * block
    engine.memory = 30 * block
    assert live.chat("another " + TEXT)["choices"][0]["finish_reason"] == "stop"
    assert 0 < value(live, "cache_bytes") <= 30 * block
    large = {"messages": [{"role": "user", "content": TEXT * 8}]}
    answer = live.post("/v1/chat/completions", large)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert "no memory" in answer.text and "--memory" not in answer.text
    # Beside others it may fit later.
    engine.step_s = 0.05
    long = {"messages": [{"role": "user", "content": "long " + TEXT}]}
    slow = live.stream("/v1/chat/completions", long)
    next(slow)
    next(slow)
    answer = live.post("/v1/chat/completions", large)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "out_of_memory"
    assert "Retry-After" in answer.headers
    engine.step_s = 0
    assert [chunk["choices"][0]["finish_reason"] for chunk in slow][-1] == "stop"
    # A reply that does not fit any more is cut off.
    engine.memory = 12 * block
    body = live.chat("another " + TEXT)
    assert body["choices"][0]["finish_reason"] == "length"
    assert 0 < body["usage"]["completion_tokens"] <= 3 * BLOCK_TOKENS
    engine.memory = 30 * block
    assert live.chat("another " + TEXT)["choices"][0]["finish_reason"] == "stop"


def test_prompts_that_come_together_are_computed_once(serve):
    live = serve(layer_s=0.005)
    engine = live.worker.model.engine
    before = engine.computed
    n, shared = 8, TEXT * 3
    tasks = [
        [{"role": "system", "content": shared}, {"role": "user", "content": f"{k}"}]
        for k in range(n)
    ]
    with ThreadPoolExecutor(n) as pool:
        answers = list(pool.map(lambda messages: ask(live, messages, max_tokens=5), tasks))
    assert len(shared) > 20 * BLOCK_TOKENS
    # Each computes what follows the last whole block that they share, the reply, and little else.
    assert engine.computed - before < len(shared) + n * (4 * BLOCK_TOKENS)
    assert all(cached <= n_prompt for _, cached, n_prompt in answers)
    used = engine.pool.used_bytes / engine.pool.block_bytes
    assert used < len(shared) / BLOCK_TOKENS + 4 * n, "branches share the blocks"
