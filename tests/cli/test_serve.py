"""`kimi-cpu serve` as a process: starting, what goes wrong, stopping."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from kimi_cpu.cli.main import main
from kimi_cpu.store.experts.simulation import read_trace

MODULE = ("-m", "kimi_cpu", "serve", "--port", "0")
ROOT = Path(__file__).resolve().parents[2]


class Server:
    """A process; `lines` is what it has written to stderr."""

    def __init__(self, *args: str, program: Sequence[str] = MODULE, **env: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *program, *args],
            stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env=os.environ | env,
        )  # fmt: skip
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    def text(self) -> str:
        return "".join(self.lines)

    def url(self) -> str:
        """Wait until it is ready."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := re.search(r"(http://\S+)/v1", "".join(self.lines)):
                return found[1]
            time.sleep(0.02)
        raise AssertionError("".join(self.lines))

    def end(self, signal_number: int = signal.SIGINT) -> tuple[int, str]:
        """The exit code and stderr."""
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        code = self.process.wait(120)
        self._reader.join()
        self.process.stdout.close()  # type: ignore[union-attr]
        self.process.stderr.close()  # type: ignore[union-attr]
        return code, "".join(self.lines)


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*args: str, **more: Any) -> Server:
        servers.append(Server(*args, **more))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
            server.end()


def post(url: str, body: dict, key: str = "") -> dict:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


@pytest.mark.skipif(sys.platform == "win32", reason="no signals to send")
def test_serving_and_stopping(start):
    server = start()
    url = server.url()
    messages = [{"role": "user", "content": "What is 17 + 25?"}]
    answer = post(f"{url}/v1/chat/completions", {"messages": messages})
    assert answer["choices"][0]["message"]["content"] == "17 + 25 = 42."
    code, err = server.end()
    assert code == 0
    assert "Traceback" not in err
    assert re.search(r"chat #1: prompt 33 \(0 cached\), reply 41, .*, stop", err)
    assert "17 + 25" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="no signals to send")
def test_what_was_computed_is_there_after_a_restart(start, tmp_path):
    text = " ".join(f"Line {n}." for n in range(200))
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 5}
    args = ["--cache-dir", str(tmp_path / "made"), "--cache-bytes", "1G", "--cache-memory", "64M"]
    replies = []
    for end_by in (signal.SIGINT, signal.SIGTERM):
        server = start(*args)
        answer = post(f"{server.url()}/v1/chat/completions", body)
        usage, replies = answer["usage"], [*replies, answer["choices"][0]["message"]]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert cached == (0 if end_by == signal.SIGINT else usage["prompt_tokens"])
        assert usage["prompt_tokens"] > 256 and "Traceback" not in server.end(end_by)[1]
    assert replies[0] == replies[1]


@pytest.mark.skipif(sys.platform == "win32", reason="no signals to send")
def test_memory_reading_and_what_is_written_down(start, tmp_path):
    trace, prompts = tmp_path / "trace", tmp_path / "prompts"
    server = start(
        "--memory", "2G", "--io", "direct", "--trace", str(trace), "--log-prompts", str(prompts)
    )  # fmt: skip
    body = {"messages": [{"role": "user", "content": "What is 17 + 25?"}]}
    answer = post(f"{server.url()}/v1/chat/completions", body)
    assert answer["choices"][0]["message"]["content"] == "17 + 25 = 42."
    code, err = server.end()
    assert code == 0 and "17 + 25" not in err and "Traceback" not in err
    routed, _ = read_trace(trace)
    assert len(routed) >= answer["usage"]["prompt_tokens"]
    assert "17" not in trace.read_text().partition("\n")[0]
    asked, replied = map(json.loads, prompts.read_text().splitlines())
    assert asked["event"] == "prompt" and "<|im_user|>" in asked["text"]
    assert "What is 17 + 25?" in asked["text"] and asked["tokens"] == 33
    assert replied["event"] == "reply" and replied["text"].endswith("</think>17 + 25 = 42.")
    assert replied["job"] == asked["job"] and replied["finish_reason"] == "stop"
    assert prompts.stat().st_mode & 0o777 == 0o600


def test_more_latents_than_memory(start):
    server = start("--memory", "1G", "--cache-memory", "1G")
    server.process.wait(60)
    code, err = server.end()
    assert code == 2 and err.count("error: ") == 1 and "Traceback" not in err
    assert "--memory is 1.0G, at least " in err and "1.0G for what is kept (--cache-memory)" in err


@pytest.mark.skipif(sys.platform == "win32", reason="no signals to send")
@pytest.mark.parametrize("end_by", ["SIGINT", "SIGKILL"])
def test_what_was_sampled_is_there_after_a_restart(start, tmp_path, end_by):
    """At a high temperature tokens come that encoding their text would not give."""
    conversations, differed = [], 0
    server = start("--cache-dir", str(tmp_path / "made"))
    url = server.url()
    for seed in range(6):
        messages = [{"role": "user", "content": "Tell me about words."}]
        body = {"messages": messages, "max_tokens": 60, "reasoning_effort": "none"}
        answer = post(f"{url}/v1/chat/completions", body | {"seed": seed, "temperature": 3.0})
        message, usage = answer["choices"][0]["message"], answer["usage"]
        tokens = post(f"{url}/tokenize", {"prompt": message["content"] or ""})["tokens"]
        differed += len(tokens) != usage["completion_tokens"]
        again = [*messages, message, {"role": "user", "content": "More."}]
        conversations.append({**body, "messages": again, "max_tokens": 1})
    assert differed, "the test shows nothing"
    asked = [post(f"{url}/v1/chat/completions", body)["usage"] for body in conversations]
    found = list((tmp_path / "made").rglob("*.reply"))
    deadline = time.monotonic() + 20
    while len(found) < 12 and time.monotonic() < deadline:
        time.sleep(0.05)
        found = list((tmp_path / "made").rglob("*.reply"))
    assert len(found) == 12 and all(path.stat().st_mode & 0o777 == 0o600 for path in found)
    assert "Traceback" not in server.end(getattr(signal, end_by))[1]

    url = start("--cache-dir", str(tmp_path / "made")).url()
    for body, before in zip(conversations, asked, strict=True):
        usage = post(f"{url}/v1/chat/completions", body)["usage"]
        assert usage["prompt_tokens"] == before["prompt_tokens"]
        if end_by == "SIGINT":  # then the latents are there, too
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            assert cached >= before["prompt_tokens_details"]["cached_tokens"] > 20


def test_cache_bytes_alone(capsys):
    assert main(["serve", "--cache-bytes", "1G"]) == 2
    assert "--cache-dir" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no signals to send")
@pytest.mark.parametrize("numbers", [["SIGINT"], ["SIGTERM"], ["SIGINT", "SIGINT"]])
def test_stopping_a_reply_that_is_under_way(start, numbers):
    server = start("--api-key", "k")
    url = server.url()
    ended = []

    def ask() -> None:
        body = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 4.0,
                "logit_bias": {str(i): -100 for i in range(1024, 1040)}}  # fmt: skip
        try:
            ended.append(post(f"{url}/v1/chat/completions", body, "k"))
        except (OSError, urllib.error.HTTPError) as error:
            ended.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.3)
    began = time.monotonic()
    for number in numbers[:-1]:
        server.process.send_signal(getattr(signal, number))
        time.sleep(0.3)
    code, err = server.end(getattr(signal, numbers[-1]))
    thread.join(30)
    assert len(ended) == 1 and time.monotonic() - began < 60
    assert code == 0 and "Traceback" not in err


#: Text without end: whatever could end it is forbidden.
ENDLESS = {
    "messages": [{"role": "user", "content": "Hi"}],
    "temperature": 4.0,
    "logit_bias": {str(i): -100 for i in range(1024, 1040)},
}


def asking(server: Server, url: str) -> threading.Thread:
    """A client that waits for a reply without end."""

    def ask() -> None:
        with contextlib.suppress(OSError, urllib.error.HTTPError):
            post(f"{url}/v1/chat/completions", ENDLESS)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.5)
    return thread


@pytest.mark.skipif(sys.platform == "win32", reason="no signals to send")
def test_what_runs_when_it_is_stopped_is_saved(start, tmp_path):
    args = ["--cache-dir", str(tmp_path / "cache")]
    server = start(*args)
    thread = asking(server, server.url())
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    began = time.monotonic()
    code, err = server.end(signal.SIGTERM)
    thread.join(30)
    assert code == 0 and time.monotonic() - began < 8 and "Traceback" not in err
    assert "Stopping: replies may go on for 10 s; Ctrl-C again ends them now." in err
    assert "Saving" not in err, "it takes no time"
    body = {**ENDLESS, "max_tokens": 1}
    usage = post(f"{start(*args).url()}/v1/chat/completions", body)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"] - 1


SLOW_DISK = """
import sys, time
from kimi_cpu.prefixes import disk
write = disk.write_block
disk.write_block = lambda *args: time.sleep(3) or write(*args)
from kimi_cpu.cli.main import main
sys.exit(main(["serve", "--port", "0", *sys.argv[1:]]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no signals to send")
def test_who_cannot_wait_for_what_is_being_saved(start, tmp_path):
    """A second Ctrl-C ends the replies, a third one the saving."""
    server = start("--cache-dir", str(tmp_path / "cache"), program=["-c", SLOW_DISK])
    thread = asking(server, server.url())
    for _ in range(2):
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    deadline = time.monotonic() + 20
    while "Saving what was computed, 10 s at most; Ctrl-C leaves at once." not in server.text():
        assert time.monotonic() < deadline and server.process.poll() is None, server.text()
        time.sleep(0.05)
    began = time.monotonic()
    code, err = server.end(signal.SIGINT)
    thread.join(30)
    assert code == 0 and time.monotonic() - began < 6 and "Traceback" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="no signals to send")
def test_stopping_while_it_loads(start):
    code = SLOW_DISK + "# not reached"
    code = code.replace("from kimi_cpu.prefixes", "from kimi_cpu.engine import Engine\n"
                        "Engine.load = lambda *a, **k: print('loading', file=sys.stderr) or "
                        "time.sleep(30)\nfrom kimi_cpu.prefixes")  # fmt: skip
    server = start(program=["-c", code])
    deadline = time.monotonic() + 60
    while "loading\n" not in server.text():
        assert time.monotonic() < deadline, server.text()
        time.sleep(0.05)
    began = time.monotonic()
    code, err = server.end()
    assert code == 0 and time.monotonic() - began < 5 and "Traceback" not in err


def test_a_busy_port(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    err = capsys.readouterr().err
    assert f"error: port {port} of 127.0.0.1 is in use" in err and "--port" in err


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["--host", "0.0.0.0"], 2, "no API key"),
        (["--host", "::"], 2, "no API key"),
        (["--host", "no.such.host.invalid", "--api-key", "k"], 2, "--host no.such.host.invalid"),
        (["--host", "192.0.2.1", "--api-key", "k", "--port", "0"], 2, "cannot listen"),
        (["--api-key", "pässword"], 2, "ASCII"),
        (["--model", "/no/such/folder"], 2, "names no folder"),
        (["--port", "70000"], 2, "70000"),
        (["--queue", "0"], 2, "0"),
        (["--log-prompts", "/no/such/folder/file"], 2, "cannot be written"),
        (["--memory", "much"], 2, "no amount of memory"),
        (["--io", "fast"], 2, "fast"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(capsys, args, code, text):
    assert main(["serve", *args]) == code
    err = capsys.readouterr().err
    assert text in err and "error: " in err and "Traceback" not in err


def test_a_damaged_model_ends_the_server(start, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    server = start("--model", str(tmp_path))
    server.process.wait(60)
    code, err = server.end()
    assert code == 1 and err.count("error: ") == 1 and "Traceback" not in err


def test_the_missing_extra():
    code = (
        "import sys; sys.modules['starlette'] = None\n"
        "from kimi_cpu.cli.main import main; sys.exit(main(['serve']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "starlette" in done.stderr and "pip install 'kimi-cpu[server]'" in done.stderr
