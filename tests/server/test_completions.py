"""POST /v1/completions, /tokenize, /detokenize, /v1/models, /health, /metrics."""

from __future__ import annotations

import numpy as np
import pytest

from tests.server.live import until


def scored(live, ids):
    """Log softmax of the engine's own logits at every position."""
    logits = live.worker.model.engine.score(ids).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_text_is_continued(nano):
    body = nano.post("/v1/completions", {"prompt": "The capital of France is"}).json()
    (choice,) = body["choices"]
    assert body["object"] == "text_completion" and choice["text"] and choice["logprobs"] is None
    assert 1 <= body["usage"]["completion_tokens"] <= 16
    chunks = list(nano.stream("/v1/completions", {"prompt": "The capital of France is"}))
    assert "".join(c["choices"][0]["text"] for c in chunks) == choice["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]


def test_echo_with_logprobs_as_evaluation_programs_need_it(nano):
    tokenizer = nano.worker.model.tokenizer
    text = "The capital of France is Paris. The capital of Italy is Rome." * 20
    ids = tokenizer.encode_text(text)
    assert len(ids) > 256  # more than one slice
    for prompt in (text, ids, [ids]):
        fields = {"max_tokens": 1, "echo": True, "logprobs": 3, "temperature": 0}
        body = nano.post("/v1/completions", {"prompt": prompt, **fields}).json()
        (choice,) = body["choices"]
        found = choice["logprobs"]
        assert choice["text"].startswith(text)
        assert len(found["tokens"]) == len(ids) + 1 == len(found["token_logprobs"])
        assert "".join(found["tokens"]).removesuffix("<|im_end|>") == choice["text"]
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        expected = scored(nano, ids)
        own = [expected[i, token] for i, token in enumerate(ids[1:])]
        assert found["token_logprobs"][1:-1] == pytest.approx(own, abs=1e-6, rel=1e-6)
        for at, tops in enumerate(found["top_logprobs"][1:-1]):
            assert max(tops.values()) == pytest.approx(expected[at].max(), abs=1e-6, rel=1e-6)
            assert 3 <= len(tops) <= 4 and found["tokens"][at + 1] in tops
        shown = zip(found["text_offset"][:-1], found["tokens"][:-1], strict=True)
        assert all(choice["text"][at:].startswith(token) for at, token in shown)


def test_echo_alone(nano):
    body = nano.post("/v1/completions", {"prompt": "Hello", "echo": True, "max_tokens": 0}).json()
    assert body["choices"][0]["text"] == "Hello"
    fields = {"prompt": "Hello", "echo": True, "max_tokens": 0, "logprobs": 0}
    found = nano.post("/v1/completions", fields).json()["choices"][0]["logprobs"]
    assert found["tokens"] == ["Hello"] and found["token_logprobs"] == [None]


def test_many_prompts(nano):
    prompts = [f"{n} + 1 =" for n in range(11)]
    fields = {"max_tokens": 4, "temperature": 0}
    body = nano.post("/v1/completions", {"prompt": prompts, **fields}).json()
    assert [choice["index"] for choice in body["choices"]] == list(range(11))
    single = [nano.post("/v1/completions", {"prompt": p, **fields}).json() for p in prompts]
    assert [c["text"] for c in body["choices"]] == [s["choices"][0]["text"] for s in single]
    assert body["usage"]["total_tokens"] == sum(s["usage"]["total_tokens"] for s in single)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [1, 10**6]}, "prompt"),
        ({"prompt": [[1], [10**25]]}, "prompt"),
        ({"prompt": ["x"] * 2049}, "prompt"),
        ({"prompt": "x " * 9000}, "prompt"),
        ({"prompt": {"text": "x"}}, "prompt"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "best_of": 3}, "best_of"),
        ({"prompt": "x", "n": 3}, "n"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": ["x", "y"], "stream": True}, "stream"),
        ({"prompt": "x", "stream": True, "echo": True, "logprobs": 1}, "stream"),
    ],
)
def test_wrong_fields_are_named(nano, fields, param):
    response = nano.post("/v1/completions", fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(param)


def test_one_bad_prompt_of_many_leaves_nothing_running(nano):
    response = nano.post("/v1/completions", {"prompt": ["a"] * 20 + [[]]})
    assert response.status_code == 400
    until(lambda: nano.worker._scheduler.active == 0)


def test_tokens_and_back(nano):
    text = "Hello, café 日本 \U0001f600!"
    body = nano.post("/tokenize", {"prompt": text}).json()
    assert body["count"] == len(body["tokens"]) and body["max_model_len"] == 4096
    assert nano.post("/tokenize", {"content": text}).json() == body
    assert nano.post("/detokenize", {"tokens": body["tokens"]}).json()["prompt"] == text
    messages = [{"role": "user", "content": "hi"}]
    chat = nano.post("/tokenize", {"messages": messages}).json()["tokens"]
    shown = nano.post("/detokenize", {"tokens": chat}).json()["prompt"]
    assert shown.endswith(
        "<|im_user|>user<|im_middle|>hi<|im_end|><|im_assistant|>assistant<|im_middle|>"
    )
    assert nano.chat("hi", max_tokens=1)["usage"]["prompt_tokens"] == len(chat)
    for path, fields in (
        ("/tokenize", {}), ("/tokenize", {"prompt": 5}), ("/detokenize", {}),
        ("/detokenize", {"tokens": [-1]}), ("/detokenize", {"tokens": [10**6]}),
        ("/detokenize", {"tokens": "x"}),
    ):  # fmt: skip
        assert nano.post(path, fields).status_code == 400


def test_models(nano):
    (only,) = nano.client.get("/v1/models").json()["data"]
    assert only["id"] == "nano" and only["object"] == "model"
    assert nano.client.get("/v1/models/nano").json() == only
    missing = nano.client.get("/v1/models/org/other")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"


def test_health(nano):
    response = nano.client.get("/health")
    assert response.status_code == 200 and response.json()["status"] == "ready"


def test_unknown_paths_and_methods(nano):
    for method, path, status in (
        ("GET", "/nothing", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/health", 405),
        ("DELETE", "/v1/models", 405), ("GET", "/../../etc/passwd", 404),
    ):  # fmt: skip
        response = nano.client.request(method, path)
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_metrics_are_what_prometheus_reads(nano):
    from prometheus_client.parser import text_string_to_metric_families

    def read():
        response = nano.client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(response.text)
            for sample in family.samples
        }

    before = read()
    usage = nano.chat("Hello", max_tokens=7)["usage"]
    nano.client.get("/some/unknown/path")
    nano.client.get("/another/unknown/path")
    after = read()

    def grown(*key):
        return after[key] - before.get(key, 0)

    assert grown("kimi_cpu_prompt_tokens_total") == usage["prompt_tokens"]
    assert grown("kimi_cpu_completion_tokens_total") == usage["completion_tokens"]
    assert grown("kimi_cpu_http_requests_total", "/v1/chat/completions", "200") == 1
    assert grown("kimi_cpu_http_requests_total", "other", "404") == 2
    assert grown("kimi_cpu_first_token_seconds_count") == 1
    assert after["kimi_cpu_active",] == after["kimi_cpu_waiting",] == 0
