"""Sampling against plain definitions."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_cpu.errors import UsageError, UserError
from kimi_cpu.sampling import Sampler, SamplingParams, logprobs


def logits_of(seed: int, n: int = 50, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(n) * scale).astype(np.float32)


def draws(params: SamplingParams, logits: np.ndarray, n: int = 4000, **kw) -> np.ndarray:
    sampler = Sampler(params, **kw)
    return np.bincount([sampler.sample(logits) for _ in range(n)], minlength=logits.size) / n


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


def allowed_by_definition(logits, temperature, top_k, top_p, min_p) -> set[int]:
    order = sorted(range(logits.size), key=lambda i: (-logits[i], i))
    if top_k:
        order = order[:top_k]
    p = softmax(logits[order] / temperature)
    kept, mass = [], 0.0
    for i, share in zip(order, p, strict=True):
        if mass >= top_p:
            break
        kept.append((i, share))
        mass += share
    return {i for i, share in kept if share >= min_p * p[0]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", "hot"),
        ("temperature", True), ("top_p", 0), ("top_p", 1.01), ("top_k", -1), ("top_k", 2.5),
        ("min_p", -1), ("min_p", 1.5), ("repetition_penalty", 0), ("presence_penalty", 1e9),
        ("frequency_penalty", None), ("logit_bias", {-1: 1}), ("logit_bias", {1: 101}),
        ("logit_bias", [1]), ("seed", -1), ("seed", 1.0), ("stop", ("",)), ("stop", (3,)),
        ("max_tokens", 0), ("thinking_budget", -1),
    ],
)  # fmt: skip
def test_bad_values_name_the_parameter(name, value):
    with pytest.raises(UsageError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.hint


def test_stop_takes_a_string_or_a_list():
    assert SamplingParams(stop="x").stop == ("x",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["x", "y"]).stop == ("x", "y")  # type: ignore[arg-type]


def test_greedy_takes_the_best_and_the_lowest_of_equals():
    sampler = Sampler(SamplingParams(temperature=0))
    assert sampler.sample(np.array([0, 5, 5, 1], np.float32)) == 1


def test_temperature_gives_the_softmax():
    logits = logits_of(1, 8, 1.0)
    got = draws(SamplingParams(temperature=0.7, seed=5), logits, 20000)
    np.testing.assert_allclose(got, softmax(logits / 0.7), atol=0.015)


def test_tiny_temperature_is_greedy():
    logits = logits_of(2)
    assert draws(SamplingParams(temperature=1e-8, seed=1), logits, 20)[logits.argmax()] == 1


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 40), st.sampled_from([0, 1, 2, 5, 39, 100]),
    st.sampled_from([0.01, 0.3, 0.9, 1.0]), st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    st.sampled_from([0.5, 1.0, 2.0]),
)  # fmt: skip
def test_cuts_keep_the_tokens_of_the_definition(seed, n, top_k, top_p, min_p, temperature):
    logits = logits_of(seed, n)
    wanted = allowed_by_definition(logits, temperature, top_k, top_p, min_p)
    params = SamplingParams(temperature, top_p, top_k, min_p, seed=seed)
    sampler = Sampler(params)
    assert {sampler.sample(logits) for _ in range(60)} <= wanted


def test_every_token_of_the_cut_can_appear():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    got = draws(SamplingParams(top_p=0.75, seed=3), logits)
    np.testing.assert_allclose(got, [4 / 9, 3 / 9, 2 / 9, 0], atol=0.03)


def test_top_k_with_ties_keeps_exactly_k_lowest_ids():
    got = draws(SamplingParams(top_k=2, seed=1), np.zeros(6, np.float32), 300)
    assert set(np.flatnonzero(got)) == {0, 1}


def test_cuts_at_their_borders():
    # of tokens that tie at the border of top_k, the better ones stay before the lower ids
    got = draws(SamplingParams(top_k=2, seed=1), np.array([1, 1, 5], np.float32), 300)
    assert set(np.flatnonzero(got)) == {0, 2}
    # the set whose mass is exactly top_p is large enough
    got = draws(SamplingParams(top_p=0.5, seed=1), np.zeros(4, np.float32), 300)
    assert set(np.flatnonzero(got)) == {0, 1}


def test_same_seed_same_tokens_other_seed_other_tokens():
    logits = logits_of(4, 1000, 1.0)

    def run(seed):
        sampler = Sampler(SamplingParams(seed=seed, top_p=0.99))
        return [sampler.sample(logits) for _ in range(30)]

    assert run(7) == run(7) != run(8)


def test_penalties_as_defined():
    logits = np.array([2.0, -2.0, 1.0, 1.0], np.float32)
    params = SamplingParams(
        temperature=0, repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5
    )
    sampler = Sampler(params, prompt_ids=[0, 1])
    sampler.accept(2)
    sampler.accept(2)
    got = sampler._adjusted(logits)
    np.testing.assert_allclose(got, [1.0, -4.0, 0.5 - 2 * 0.5 - 0.25, 1.0])
    assert logits[0] == 2.0, "the caller's logits stay as they are"


def test_bias_and_bans():
    logits = np.array([0, 1, 2], np.float32)
    assert Sampler(SamplingParams(temperature=0, logit_bias={0: 5})).sample(logits) == 0
    sampler = Sampler(SamplingParams(temperature=0), banned=[2])
    assert sampler.sample(logits) == 1
    sampler.ban(1, 99)
    assert sampler.sample(logits) == 0
    assert draws(SamplingParams(seed=1), logits, 50, banned=[2, 1])[0] == 1
    with pytest.raises(UsageError, match="logit_bias"):
        Sampler(SamplingParams(logit_bias={3: 1})).sample(logits)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(temperature, bad):
    logits = np.array([0, bad, 1], np.float32)
    with pytest.raises(UserError, match="not finite"):
        Sampler(SamplingParams(temperature)).sample(logits)


@pytest.mark.parametrize("temperature", [0, 1])
def test_nothing_left_is_an_error(temperature):
    with pytest.raises(UsageError, match="no token"):
        Sampler(SamplingParams(temperature), banned=[0, 1]).sample(np.zeros(2, np.float32))


def test_masked_logits_are_never_drawn():
    logits = np.full(100, -np.inf, np.float32)
    logits[[3, 50]] = 0
    got = draws(SamplingParams(seed=2), logits, 500)
    assert set(np.flatnonzero(got)) == {3, 50}


def test_cost_at_the_real_vocabulary():
    logits = logits_of(9, 163840, 4.0)
    sampler = Sampler(SamplingParams(top_p=0.95, top_k=50, seed=1), banned=range(163584, 163840))
    sampler.sample(logits)
    best = 1.0
    for _ in range(5):
        start = time.perf_counter()
        sampler.sample(logits)
        best = min(best, time.perf_counter() - start)
    assert best < 0.02, f"{best * 1e3:.1f} ms a token"  # about 1 ms; slack for a busy machine


@pytest.mark.parametrize("n", [1, 31, 32, 33, 1000])
def test_only_allowed_ids_are_chosen(n):
    logits = logits_of(5, n)
    allowed = np.random.default_rng(n).random(n) < 0.3
    allowed[n // 2] = True
    words = np.zeros(-(-n // 32) * 4 + 4, np.uint8)  # one word more than needed
    words[: -(-n // 8)] = np.packbits(allowed, bitorder="little")
    sampler = Sampler(SamplingParams(temperature=2, seed=1))
    seen = {sampler.sample(logits, words.view(np.uint32)) for _ in range(300)}
    assert seen <= set(np.flatnonzero(allowed).tolist())
    greedy = Sampler(SamplingParams(temperature=0)).sample(logits, words.view(np.uint32))
    assert greedy == np.argmax(np.where(allowed, logits, -np.inf))
    with pytest.raises(UsageError, match="no token is left"):
        sampler.sample(logits, np.zeros_like(words).view(np.uint32))


def test_logprobs_by_definition():
    logits = logits_of(6)
    logits[[3, 7]] = logits.max() + 1  # a tie
    expected = np.log(softmax(logits))
    for top in (0, 1, 5, 50, 60):
        logprob, likeliest = logprobs(logits, 9, top)
        assert logprob == pytest.approx(expected[9], abs=1e-6)
        order = sorted(range(50), key=lambda i: (-logits[i], i))[:top]
        assert [i for i, _ in likeliest] == order
        assert [p for _, p in likeliest] == pytest.approx(expected[order].tolist(), abs=1e-6)
    assert logprobs(np.array([0, -np.inf], np.float32), 1, 2)[0] == -np.inf


def test_ids_beyond_the_mask_are_not_allowed():
    logits = np.arange(100, dtype=np.float32)
    mask = np.full(2, 0xFFFFFFFF, np.uint32)  # 64 ids
    assert Sampler(SamplingParams(temperature=0)).sample(logits, mask) == 63
    seen = {Sampler(SamplingParams(seed=i, temperature=50)).sample(logits, mask) for i in range(99)}
    assert max(seen) < 64


def test_cost_of_a_mask_at_the_real_vocabulary():
    n = 163840
    logits = logits_of(9, n, 4.0)
    mask = np.random.default_rng(0).integers(0, 2**32, n // 32, dtype=np.uint32)
    sampler = Sampler(SamplingParams(seed=1))

    def best(*extra) -> float:
        times = []
        for _ in range(15):
            start = time.perf_counter()
            sampler.sample(logits, *extra)
            times.append(time.perf_counter() - start)
        return min(times)

    added = best(mask) - best()
    assert added < 0.001, f"{added * 1e3:.2f} ms a token"  # about 0.05 ms
