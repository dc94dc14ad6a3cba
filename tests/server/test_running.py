"""Many clients at once: turns, the queue, clients that leave, crashes, start and stop."""

from __future__ import annotations

import gc
import http.client
import itertools
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kimi_cpu.errors import CheckpointError, ContextError, UserError
from kimi_cpu.server.jobs import Job
from tests.server.live import Live, joined, until
from tests.server.scripted import scripted_model

LONG = "<think></think>" + "word " * 400


def user(content):
    return [{"role": "user", "content": content}]


def scheduler_of(live):
    return live.worker._scheduler


def idle(live):
    return scheduler_of(live).active == 0 and scheduler_of(live).waiting == 0


def open_chat(live, content="hi", **fields):
    """A request whose answer is not read: (socket, what was received so far)."""
    body = json.dumps({"messages": user(content), **fields}).encode()
    connection = socket.create_connection(("127.0.0.1", live.port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + body)
    return connection


def test_replies_in_turns_equal_replies_alone(nano):
    questions = [f"What is {n} + {3 * n}?" for n in range(3, 15)]
    fields = {"temperature": 1.0, "max_tokens": 60}

    def ask(n):
        body = nano.chat(questions[n], seed=n, **fields)["choices"][0]
        return body["message"], body["finish_reason"]

    alone = [ask(n) for n in range(len(questions))]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(ask, range(len(questions))))
    assert together == alone


def test_a_short_prompt_does_not_wait_for_a_long_one(serve):
    live = serve(layer_s=0.02)  # 80 ms a slice of 512
    with open_chat(live, "x" * 20_000):
        until(lambda: scheduler_of(live).active == 1)
        start = time.perf_counter()
        live.chat("hi")
        assert time.perf_counter() - start < 1.5, "40 slices take 3.2 s"
        until(lambda: scheduler_of(live).active == 1)


def test_replies_go_on_while_a_prompt_is_read(serve):
    live = serve(layer_s=0.02)
    with open_chat(live, "y" * 20_000):
        until(lambda: scheduler_of(live).active == 1)
        times = []
        for _ in live.stream("/v1/chat/completions", {"messages": user("hello")}):
            times.append(time.perf_counter())
        gaps = [b - a for a, b in itertools.pairwise(times)]
        until(lambda: scheduler_of(live).active == 1)
        assert not idle(live)
        assert max(gaps) < 0.5, "one slice at most between two tokens"


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_during_the_prompt_stops_within_a_layer(serve, stream):
    live = serve()
    engine = live.worker.model.engine
    engine.gate.clear()
    before = engine.layers
    connection = open_chat(live, "z" * 5000, stream=stream)
    until(lambda: engine.layers == before + 1)
    connection.close()
    until(lambda: any(job.cancelled for job in all_jobs(live)))
    engine.gate.set()
    until(lambda: idle(live))
    assert engine.layers <= before + 2
    assert live.chat("hi")["choices"][0]["finish_reason"] == "stop"


def all_jobs(live):
    """Every job that is under way, or was forgotten by nobody."""
    return [o for o in gc.get_objects() if type(o) is Job and o.session is not None]


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_during_the_reply_stops_it(serve, stream):
    live = serve(lambda _: LONG, step_s=0.005)
    engine = live.worker.model.engine
    connection = open_chat(live, stream=stream)
    until(lambda: engine.computed > 60)
    connection.close()
    until(lambda: idle(live))
    assert engine.computed < 1000
    assert 'finish_reason="cancelled"} 1.0' in live.client.get("/metrics").text


def test_leaving_the_queue(serve):
    live = serve(lambda _: LONG, settings={"max_active": 1, "max_waiting": 2}, step_s=0.002)
    first = open_chat(live)
    until(lambda: scheduler_of(live).active == 1)
    second, third = open_chat(live), open_chat(live)
    until(lambda: scheduler_of(live).waiting == 2)
    refused = live.post("/v1/chat/completions", {"messages": user("hi")})
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
    error = refused.json()["error"]
    assert error["type"] == "rate_limit_error" and error["code"] == "queue_full"
    second.close()
    time.sleep(0.2)
    fourth = open_chat(live)  # takes the place of the one who left
    time.sleep(0.2)
    assert scheduler_of(live).waiting == 2
    for connection in (first, third, fourth):
        connection.close()
    until(lambda: idle(live))


def test_comments_come_while_nothing_else_does(serve):
    live = serve(settings={"heartbeat_s": 0.05})
    engine = live.worker.model.engine
    engine.gate.clear()
    body = {"messages": user("x" * 3000), "stream": True}
    with live.client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        assert '"role":"assistant"' in next(lines), "the role comes at once"
        seen = []
        while len(seen) < 3:
            if (line := next(lines)).startswith(":"):
                seen.append(line)
        assert seen[-1].startswith(": reading ") and " of 30" in seen[-1]
        engine.gate.set()
        assert any("[DONE]" in line for line in lines)


def test_a_crash_ends_one_request_only(serve, caplog):
    live = serve(lambda p: "<think></think>" + ("fine" if "hi" in p else "x" * 300), step_s=0.002)
    engine = live.worker.model.engine
    for error, status, code in (
        (RuntimeError("secret detail"), 500, "internal_error"),
        (MemoryError(), 503, "out_of_memory"),
        (UserError("the disk is gone", "Plug it in."), 500, "internal_error"),
    ):
        engine.broken = error
        response = live.post("/v1/chat/completions", {"messages": user("hi")})
        assert response.status_code == status and response.json()["error"]["code"] == code
        assert "secret" not in response.text
    engine.broken = ContextError("no memory for a longer cache")
    body = live.chat("hi")
    assert body["choices"][0]["finish_reason"] == "length"
    chunks = live.stream("/v1/chat/completions", {"messages": user("go on")})
    next(chunks)
    live.chat("hi")
    assert joined(list(chunks))["finish_reason"] == "stop"
    engine.broken = RuntimeError("secret detail")
    with live.client.stream(
        "POST", "/v1/chat/completions", json={"messages": user("hi"), "stream": True}
    ) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    error = json.loads(lines[-1][6:])["error"]
    assert error["type"] == "server_error" and "secret" not in lines[-1]
    assert live.chat("hi")["choices"][0]["message"]["content"] == "fine"
    assert "secret detail" in caplog.text, "the log has it"


def test_the_log_holds_no_text(serve, caplog):
    caplog.set_level("DEBUG")
    live = serve(lambda p: "<think></think>answered_privately")
    live.chat("asked_privately")
    live.worker.model.engine.broken = RuntimeError("crash")
    live.post("/v1/chat/completions", {"messages": user("asked_privately")})
    live.post("/v1/chat/completions", {"messages": [{"role": "asked_privately"}]})
    ours = [r.getMessage() for r in caplog.records if not r.name.startswith("http")]
    assert any("chat #" in line for line in ours)
    assert "privately" not in "".join(ours) + "".join(
        str(r.exc_info) for r in caplog.records if not r.name.startswith("http")
    )


def test_stopping_lets_replies_end(serve):
    live = serve(lambda _: "<think></think>" + "x" * 100, step_s=0.005)
    chunks = live.stream("/v1/chat/completions", {"messages": user("hi")})
    next(chunks)
    live.running.should_exit = True
    message = joined(list(chunks))
    assert message["content"] == "x" * 100 and message["finish_reason"] == "stop"
    live.thread.join(10)
    assert live.worker.state == "stopped" and live.worker.model.engine.closed


@pytest.mark.parametrize("during", ["reply", "prompt"])
def test_stopping_ends_what_takes_too_long(serve, during):
    slow = {"step_s": 0.02} if during == "reply" else {"layer_s": 0.05}
    live = serve(lambda _: LONG, settings={"shutdown_s": 0.3}, **slow)
    body = {"messages": user("x" * (20_000 if during == "prompt" else 10)), "stream": True}
    with live.client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        start = time.perf_counter()
        live.running.should_exit = True
        last = [line for line in lines if line.startswith("data: ")][-1]
    assert json.loads(last[6:])["error"]["code"] == "shutting_down"
    live.thread.join(10)
    assert time.perf_counter() - start < 3 and live.worker.state == "stopped"


def test_requests_while_the_model_loads(tmp_path):
    model, go = scripted_model(tmp_path), threading.Event()

    def load(phase):
        phase("weights")
        go.wait(20)
        return model

    live = Live(load)
    until(lambda: live.running.started)
    health = live.client.get("/health")
    assert health.status_code == 503
    assert health.json()["status"] == "loading" and health.json()["phase"] == "weights"
    response = live.post("/v1/chat/completions", {"messages": user("hi")})
    assert response.status_code == 503 and response.headers["retry-after"]
    assert response.json()["error"]["code"] == "model_loading"
    go.set()
    live.ready()
    assert live.client.get("/health").status_code == 200
    live.stop()


def test_a_model_that_cannot_be_loaded():
    def load(phase):
        raise CheckpointError("config.json is missing")

    live = Live(load)
    until(lambda: live.running.started and live.worker.state == "failed")
    assert live.client.get("/health").json()["status"] == "failed"
    assert live.post("/tokenize", {"prompt": "x"}).json()["error"]["code"] == "model_failed"
    live.stop()
    assert isinstance(live.worker.error, CheckpointError)


def test_stopping_while_the_model_loads(tmp_path):
    model, go = scripted_model(tmp_path), threading.Event()
    live = Live(lambda phase: (go.wait(20), model)[1])
    until(lambda: live.running.started)
    threading.Timer(0.3, go.set).start()
    live.stop()
    assert model.engine.closed  # type: ignore[attr-defined]


def test_nothing_is_left_behind(serve):
    """200 requests, half of which leave, and neither threads, files nor tasks stay."""
    live = serve(lambda _: "<think></think>" + "x" * 60, step_s=0.0005)
    live.chat("warm")

    def one(n):
        connection = open_chat(live, f"{n}", stream=n % 3 == 0)
        if n % 2:
            time.sleep(0.003 * (n % 7))
            connection.close()
            return
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status in (200, 429), response.read()
        text = response.read()
        assert response.status == 429 or b'"finish_reason":"stop"' in text
        connection.close()

    def counts():
        folder = Path("/proc/self/fd")
        files = len(list(folder.iterdir())) if folder.is_dir() else 0
        return threading.active_count(), files

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(40)))
    until(lambda: idle(live))
    time.sleep(0.3)
    before = counts()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(200)))
    until(lambda: idle(live))
    time.sleep(0.3)
    threads, files = counts()
    assert threads <= before[0] + 2 and files <= before[1] + 2
    live.client.close()
    until(lambda: not live.running.server_state.tasks)
    assert scheduler_of(live).cache_bytes <= live.worker.model.session_bytes
    gc.collect()
    assert not all_jobs(live)
