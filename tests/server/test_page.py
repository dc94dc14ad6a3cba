"""The page's files and the stream of the routing, over HTTP."""

from __future__ import annotations

import dataclasses
import json
import re
import socket
import threading
import time
from html.parser import HTMLParser

import numpy as np
import pytest

from kimi_cpu.errors import UserError
from kimi_cpu.server import ceiling
from kimi_cpu.server.api import page, routing
from kimi_cpu.store.experts.policy import Frequency
from kimi_cpu.store.experts.stats import ExpertStats
from tests.server.live import Live, until


class Parts(HTMLParser):
    """What the page refers to, and what would break its own policy."""

    def __init__(self) -> None:
        super().__init__()
        self.paths: list[str] = []
        self.ids: list[str] = []
        self.labelled: list[str] = []
        self.fields: list[str] = []
        self.forbidden: list[str] = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.forbidden += [f"{tag} {name}" for name in given if name == "style" or name[:2] == "on"]
        if tag == "style" or (tag == "script" and "src" not in given):
            self.forbidden.append(tag)
        if "id" in given:
            self.ids.append(given["id"])
        if tag == "label" and "for" in given:
            self.labelled.append(given["for"])
        if tag in ("input", "textarea", "select") and given.get("type") != "checkbox":
            self.fields.append(given["id"])
        for name in ("src", "href"):
            if name in given and not given[name].startswith("#"):
                self.paths.append(given[name])


@pytest.fixture(scope="module")
def index(scripted) -> tuple[str, Parts]:
    text = scripted.client.get("/").text
    parts = Parts()
    parts.feed(text)
    return text, parts


def test_everything_it_needs_is_its_own(scripted, index):
    _, parts = index
    assert not parts.forbidden
    seen, todo = set(), [*parts.paths, "/favicon.ico"]
    assert "/static/page.js" in todo and "/static/page.css" in todo
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        response = scripted.client.get(path)
        assert response.status_code == 200, path
        kind = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
        suffix = "svg" if path.endswith(".ico") else path.rpartition(".")[2]
        assert response.headers["content-type"].startswith(kind[suffix])
        todo += re.findall(r'from "([^"]+)"', response.text)
    served = {f"/static/{name}" for name in page._files()}
    assert served - seen == {"/static/index.html"}  # nothing is left over


def test_ids_and_labels(index):
    text, parts = index
    assert len(parts.ids) == len(set(parts.ids))
    assert set(parts.fields) <= set(parts.labelled)
    assert set(parts.labelled) <= set(parts.ids)
    referred = re.findall(r'aria-(?:controls|labelledby|describedby)="([^"]+)"', text)
    assert {one for many in referred for one in many.split()} <= set(parts.ids)
    scripts = b"".join(f.content for n, f in page._files().items() if n.endswith(".js")).decode()
    assert set(re.findall(r'\$\("([\w-]+)"\)', scripts)) <= set(parts.ids)
    assert "innerHTML" not in scripts and "eval(" not in scripts


@pytest.mark.parametrize("path", ["/", "/static/page.js", "/static/page.css", "/favicon.ico"])
def test_headers(scripted, path):
    response = scripted.client.get(path)
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src")
    assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-cache"
    tag = response.headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}'):
        again = scripted.client.get(path, headers={"If-None-Match": known})
        assert again.status_code == 304 and not again.content and again.headers["etag"] == tag
    assert scripted.client.get(path, headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "name",
    [
        "nothing.js",
        "../app.py",
        "..%2fapp.py",
        "%2e%2e/app.py",
        "../../__init__.py",
        "",
    ],
)
def test_no_other_files(scripted, name):
    with socket.create_connection(("127.0.0.1", scripted.port)) as connection:
        request = f"GET /static/{name} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        connection.sendall(request.encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert b" 404 " in answer.splitlines()[0] and b"def " not in answer


def test_the_page_needs_no_key_and_the_routing_does(serve):
    live = serve(settings={"api_key": "right"})
    no_key = {"Authorization": ""}
    for path in ("/", "/static/page.js", "/favicon.ico"):
        assert live.client.get(path, headers=no_key).status_code == 200
    assert live.client.get("/routing", headers=no_key).status_code == 401
    wrong = {"Origin": "https://evil.example"}
    assert live.client.get("/routing", headers=wrong).status_code == 403
    assert live.client.get("/", headers=wrong).status_code == 403


def test_before_the_model_is_there():
    loaded = threading.Event()

    def load(phase):
        loaded.wait(20)
        raise UserError("there is no such model")

    live = Live(load)
    try:
        assert live.client.get("/").status_code == 200
        response = live.client.get("/routing")
        assert response.status_code == 503 and "retry-after" in response.headers
    finally:
        loaded.set()
        live.stop()


def test_the_ceiling(nano, monkeypatch):
    folder, threads = nano.worker.model.engine.folder, 2
    assert ceiling.ceiling_tps(folder, threads) is None  # it lies in the caches
    monkeypatch.setattr(ceiling, "LEAST_BYTES", 0)
    found = ceiling.ceiling_tps(folder, threads)
    # A token reads between all routed experts' share and the whole file, at 1 to 1000 GB/s.
    whole = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert found is not None and 1e9 / whole < found < 1e12 / (whole / 10)
    assert "ceiling_tps" not in nano.client.get("/health").json()
    model = dataclasses.replace(nano.worker.model, ceiling_tps=1234.56789)
    monkeypatch.setattr(nano.worker, "_model", model)
    assert nano.client.get("/health").json()["ceiling_tps"] == 1234.568


def read_events(response):
    """(name, value) of each event of a stream; None for comments."""
    name = "message"
    for line in response.iter_lines():
        if line.startswith(":"):
            yield None
        elif line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield name, json.loads(line[6:])
            name = "message"


def test_routing_of_the_nano_model(nano):
    experts, top_k, layers = 48, 8, 4
    with nano.client.stream("GET", "/routing") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        found = read_events(response)
        name, shape = next(found)
        assert name == "shape"
        assert shape == {"layers": [1, 2, 3, 4], "experts": experts, "top_k": top_k}
        before = nano.worker.model.engine.experts.stats().tokens
        # No other test asks this: all of the prompt is computed here.
        usage = nano.chat("What is 38 + 47?", seed=1)["usage"]
        computed = usage["total_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
        totals = np.zeros((layers, experts), dtype=int)
        # The last token is sampled and never computed.
        while totals[:-1].sum(axis=1).min() < top_k * (computed - 1):
            event = next(found)
            if event is None:
                continue
            _, seen = event
            assert len(seen["chosen"]) == layers
            for layer, row in enumerate(seen["chosen"]):
                # Empty, if the look came between two layers of a token.
                ids, times = np.array(row, dtype=int).reshape(-1, 2).T
                assert len(ids) == len(set(ids)) and all(0 <= e < experts for e in ids)
                assert (times >= 1).all()
                totals[layer, ids] += times
        assert 0 <= seen["hits"] <= seen["uses"]
        assert 0 < seen["tokens"] - before <= computed + 1
    seen_by = totals.sum(axis=1)  # every layer saw every token, but for one under way
    assert seen_by[:-1].max() - seen_by[:-1].min() <= top_k
    # The last one needs only a prompt's last token.
    assert seen_by[-1] >= top_k * (usage["completion_tokens"] - 1)
    assert seen_by[-1] < seen_by[0]


def test_streams_are_few_and_end_with_their_clients(nano):
    streams = nano.app.state.routing_streams
    opened = [nano.client.stream("GET", "/routing") for _ in range(routing.MAX_STREAMS)]
    bodies = [one.__enter__().iter_raw() for one in opened]
    assert all(next(body) for body in bodies)
    refused = nano.client.get("/routing")
    assert refused.status_code == 429 and "retry-after" in refused.headers
    for one in opened:
        one.__exit__(None, None, None)
    until(lambda: streams.open == 0)
    with nano.client.stream("GET", "/routing") as response:
        assert response.status_code == 200


def test_the_server_stops_under_an_open_stream(serve):
    live = serve()
    with live.client.stream("GET", "/routing") as response:
        found = read_events(response)
        next(found)
        begun = time.monotonic()
        live.running.should_exit = True
        assert all(event is None for event in found)  # it ends properly
        assert time.monotonic() - begun < 5


class FakeStore:
    n_experts, top_k = 6, 2

    def __init__(self) -> None:
        self.policy = Frequency(12, half_life=4)

    def stats(self) -> ExpertStats:
        return ExpertStats(tokens=7, uses=4, hits=3)


def test_choices_are_counted_whatever_a_use_weighs():
    store = FakeStore()
    choices = routing.Choices(store, (1, 2))
    assert choices.look() is None
    for _ in range(30):  # one token weighs 2^(1/4) times what the last did
        store.policy.use(3)
        store.policy.use(6 + 5, times=2)
        seen = choices.look()
        assert seen == {"tokens": 7, "uses": 4, "hits": 3, "chosen": [[3, 1], [5, 2]]}
        store.policy.tick()
        assert choices.look() is None


def test_choices_of_a_long_pass_are_not_lost():
    store = FakeStore()
    choices = routing.Choices(store, (1, 2))
    store.policy.use(0)
    store.policy.use(1, times=64)
    store.policy.tick(16)  # the weight is 16 times what it was at the uses
    assert choices.look()["chosen"] == [[0, 1, 1, 4], []]


def test_choices_survive_the_rescaling_of_weights():
    store = FakeStore()
    store.policy.use(2)
    store.policy.tick(4 * 200)
    store.policy.tick(4 * 131)
    choices = routing.Choices(store, (1, 2))
    store.policy.use(2)
    store.policy.tick(8)  # beyond the largest weight: all frequencies are scaled
    assert store.policy.state[0] == 1.0
    assert choices.look() is None
    store.policy.use(4)
    assert choices.look()["chosen"] == [[4, 1], []]
