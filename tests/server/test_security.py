"""Who may ask, and how much."""

from __future__ import annotations

import contextlib
import socket
import time

import pytest

from kimi_cpu.server import run
from kimi_cpu.server.api import body as body_module
from kimi_cpu.server.security import is_loopback
from tests.server.live import until


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    from tests.server.live import Live
    from tests.server.scripted import scripted_model

    model = scripted_model(tmp_path_factory.mktemp("guarded"))
    live = Live(
        lambda phase: model,
        api_key="right",
        max_body_bytes=20_000,
        cors_origins=("https://app.example",),
    ).ready()
    yield live
    live.stop()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer right"}, 200),
        ({"Authorization": "bearer  right"}, 200),
        ({"Authorization": "", "x-api-key": "right"}, 200),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Bearer right2"}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Authorization": "Basic right"}, 401),
        ({"Authorization": b"Bearer \xff\xfe"}, 401),
        ({"Authorization": "right"}, 401),
        ({"Authorization": ""}, 401),
    ],
)
def test_the_key(guarded, headers, status):
    response = guarded.client.get("/v1/models", headers=headers)
    assert response.status_code == status
    if status == 401:
        assert response.json()["error"]["type"] == "authentication_error"
        assert "right" not in response.text


def test_what_needs_no_key(guarded):
    empty = {"Authorization": ""}
    assert guarded.client.get("/health", headers=empty).status_code == 200
    for path in ("/metrics", "/v1/models", "/nothing", "/health/", "/static"):
        assert guarded.client.get(path, headers=empty).status_code == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("localhost:8080", 200), ("LOCALHOST", 200), ("127.0.0.1:1", 200),
        ("127.9.9.9", 200), ("[::1]:8080", 200),
        ("evil.example", 403), ("localhost.evil.example", 403), ("127.0.0.1.evil.example", 403),
        ("192.168.0.1", 403), ("", 403), ("[", 403), ("user@evil.example", 403),
        ("localhost@evil.example", 403),
    ],
)  # fmt: skip
def test_hosts_without_a_key(scripted, host, status):
    response = scripted.client.get("/v1/models", headers={"Host": host})
    assert response.status_code == status
    if status == 403:
        assert response.json()["error"]["code"] == "wrong_host"


def test_any_host_with_a_key(guarded):
    assert guarded.client.get("/v1/models", headers={"Host": "my.example"}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:1", "file://"]
)
def test_origins_of_other_pages(scripted, guarded, origin):
    for live in (scripted, guarded):
        for path in ("/health", "/v1/models"):
            response = live.client.get(path, headers={"Origin": origin})
            assert response.status_code == 403
            assert "access-control-allow-origin" not in response.headers


def test_the_servers_own_page(scripted):
    headers = {"Origin": scripted.url}
    assert scripted.client.get("/v1/models", headers=headers).status_code == 200


def test_origins_that_the_operator_named(guarded):
    origin = {"Origin": "https://app.example"}
    response = guarded.client.get("/v1/models", headers=origin)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://app.example"
    preflight = guarded.client.options(
        "/v1/chat/completions",
        headers={
            **origin,
            "Authorization": "",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type",
        },
    )
    assert preflight.status_code == 200
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()


def test_large_bodies(guarded):
    big = b'{"prompt": "' + b"x" * 30_000 + b'"}'
    declared = guarded.client.post("/tokenize", content=big)
    streamed = guarded.client.post(
        "/tokenize", content=(big[i : i + 999] for i in range(0, 30_012, 999))
    )
    for response in (declared, streamed):
        assert response.status_code == 413 and response.json()["error"]["code"] == "too_large"
    assert guarded.client.get("/health").status_code == 200


def test_bodies_that_end_early(scripted):
    for _ in range(5):
        connection = socket.create_connection(("127.0.0.1", scripted.port))
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{"
        )
        time.sleep(0.01)
        connection.close()
    assert scripted.chat("hi")["choices"][0]["finish_reason"] == "stop"


def begun(live, n_bytes, path="/v1/chat/completions"):
    """A connection whose request has so many bytes more to come than it has sent."""
    connection = socket.create_connection(("127.0.0.1", live.port))
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {n_bytes + 100}\r\n\r\n"
    connection.sendall(head.encode() + b"[" * n_bytes)
    return connection


def test_bodies_are_bounded_in_sum(serve):
    live = serve(settings={"max_body_bytes": 20_000, "max_bodies_bytes": 50_000})
    bodies = live.app.state.service.bodies
    body = {"messages": [{"role": "user", "content": "x" * 15_000}], "max_tokens": 1}
    slow = [begun(live, 19_000) for _ in range(2)]
    until(lambda: bodies.n_bytes == 38_000)
    answer = live.post("/v1/chat/completions", body)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "overloaded"
    assert int(answer.headers["Retry-After"]) > 0
    assert live.chat("short")["choices"] and live.client.get("/health").status_code == 200
    slow.pop().close()
    until(lambda: bodies.n_bytes == 19_000)
    assert live.post("/v1/chat/completions", body).status_code == 200
    # What is being answered holds its body until the answer is complete.
    live.worker.model.engine.gate.clear()
    chunks = live.stream("/v1/chat/completions", body)
    next(chunks)
    slow.append(begun(live, 10_000))
    until(lambda: bodies.n_bytes > 44_000)
    assert live.post("/v1/chat/completions", body).status_code == 503
    live.worker.model.engine.gate.set()
    list(chunks)
    for connection in slow:
        connection.close()
    until(lambda: bodies.n_bytes == 0)


def test_a_body_that_trickles_in(serve, monkeypatch):
    monkeypatch.setattr(body_module, "READ_TIMEOUT_S", 0.3)
    live = serve()
    connection = begun(live, 10)
    connection.settimeout(10)
    began = time.monotonic()
    answer = b""
    while b"\r\n\r\n" not in answer and time.monotonic() - began < 5:
        connection.sendall(b"[")
        time.sleep(0.05)
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            answer += connection.recv(1000)
        connection.setblocking(True)
    connection.close()
    assert answer.startswith(b"HTTP/1.1 408 ")
    until(lambda: live.app.state.service.bodies.n_bytes == 0)


@pytest.mark.parametrize(
    "begin", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /"]
)
def test_a_head_that_does_not_arrive(serve, monkeypatch, begin):
    monkeypatch.setattr(run, "HEAD_TIMEOUT_S", 0.4)
    live = serve()
    with socket.create_connection(("127.0.0.1", live.port), timeout=10) as connection:
        connection.sendall(begin)
        for _ in range(4):
            time.sleep(0.05)
            connection.sendall(begin[-1:])
        until(lambda: not live.running.server_state.connections)
        received = b""
        while part := connection.recv(1000):
            received += part
    assert received.startswith(b"HTTP/1.1 200") == (b"Host" in begin)


def test_who_is_served_is_not_hurried(serve, monkeypatch):
    """The time for a request's head does not run while it is answered, nor between two."""
    monkeypatch.setattr(run, "HEAD_TIMEOUT_S", 0.2)
    live = serve(step_s=0.02)
    assert live.chat("a longer message")["choices"][0]["finish_reason"] == "stop"
    (connection,) = live.running.server_state.connections
    time.sleep(0.4)
    assert live.chat("again")["choices"][0]["finish_reason"] == "stop"
    assert live.running.server_state.connections == {connection}


def test_no_file_of_a_client_is_opened(scripted, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("the secret text")
    for content in (
        [{"type": "image_url", "image_url": {"url": secret.as_uri()}}],
        [{"type": "file", "file": {"file_data": str(secret)}}],
        [{"type": "input_audio", "input_audio": {"data": secret.as_uri()}}],
    ):
        body = {"messages": [{"role": "user", "content": content}]}
        response = scripted.post("/v1/chat/completions", body)
        assert response.status_code == 400 and "secret text" not in response.text
    for schema in ({"$ref": secret.as_uri()}, {"$ref": "http://127.0.0.1:9/x"}):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        body = {"messages": [{"role": "user", "content": "hi"}], "response_format": form}
        assert scripted.post("/v1/chat/completions", body).status_code == 400


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("localhost", True),
        ("0.0.0.0", False), ("::", False), ("192.168.1.2", False), ("example.org", False),
        ("", False), ("localhost.evil.example", False),
    ],
)  # fmt: skip
def test_loopback(host, expected):
    assert is_loopback(host) is expected
