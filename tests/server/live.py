"""A server of this process on a loopback port, over real HTTP."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from kimi_cpu.server.run import Metrics, Running, Settings, Worker, make_app
from kimi_cpu.server.settings import ServedModel


class Live:
    """Started on construction; `stop` ends it and waits."""

    def __init__(self, load: Callable[[Callable[[str], None]], ServedModel], **settings: Any):
        self.settings = Settings(**settings)
        self.metrics = Metrics()
        self.worker = Worker(load, self.settings, self.metrics)
        self.app = make_app(self.worker, self.settings, self.metrics)
        self.running = Running(self.worker, self.app, self.settings)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        key = self.settings.api_key
        self.client = httpx.Client(
            base_url=self.url,
            timeout=60,
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        self.thread = threading.Thread(
            target=self.running.run, kwargs={"sockets": [self.socket]}, name="live"
        )
        self.thread.start()

    def ready(self) -> Live:
        """Wait for the model."""
        until(lambda: self.worker.state == "ready", 900)
        return self

    def stop(self) -> None:
        self.client.close()
        self.running.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive() and self.worker.join(10)
        self.socket.close()

    def post(self, path: str, body: Any = None, **kw: Any) -> httpx.Response:
        return self.client.post(path, json=body, **kw)

    def chat(self, content: str = "hi", **fields: Any) -> dict[str, Any]:
        """The answer to one user message, which must succeed."""
        messages = fields.pop("messages", [{"role": "user", "content": content}])
        response = self.post("/v1/chat/completions", {"messages": messages, **fields})
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of a stream, which must end in [DONE]."""
        done = False
        with self.client.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            for line in response.iter_lines():
                if line.startswith("data: "):
                    assert not done
                    done = line == "data: [DONE]"
                    if not done:
                        yield json.loads(line[6:])
        assert done

    def events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a stream, each of which has its type as its name."""
        with self.client.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            name = None
            for line in response.iter_lines():
                if line.startswith("event: "):
                    name = line[7:]
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    assert event["type"] == name
                    yield event


def until(true: Callable[[], bool], timeout_s: float = 10) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(0.005)


def joined(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream's chunks make together, and how it ended."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    reasons = []
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            for name in ("content", "reasoning_content"):
                message[name] += delta.get(name) or ""
            for part in delta.get("tool_calls", []):
                if part["index"] == len(message["tool_calls"]):
                    message["tool_calls"].append({**part, "function": dict(part["function"])})
                    del message["tool_calls"][-1]["index"]
                else:
                    call = message["tool_calls"][part["index"]]
                    call["function"]["arguments"] += part["function"]["arguments"]
            if choice["finish_reason"]:
                reasons.append(choice["finish_reason"])
    (message["finish_reason"],) = reasons
    return message
