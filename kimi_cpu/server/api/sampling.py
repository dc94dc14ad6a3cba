"""The sampling fields that all endpoints share, and what they mean here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec

from kimi_cpu.sampling import SamplingParams
from kimi_cpu.server.errors import ApiError
from kimi_cpu.server.settings import ServedModel

MAX_STOPS = 16
MAX_STOP_CHARS = 1000
MAX_BIASES = 1024


class SamplingFields(msgspec.Struct, kw_only=True):
    """OpenAI's fields, and top_k, min_p and repetition_penalty as vLLM and llama.cpp have them."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None


def sampling_params(
    fields: SamplingFields,
    model: ServedModel,
    *,
    max_tokens: int | None,
    thinking_budget: int | None = None,
) -> SamplingParams:
    """The fields given, over the checkpoint's recommendations.

    max_tokens: None or -1 means until the context is full.
    Raises UsageError or ApiError naming the field.
    """
    if fields.n is not None and fields.n != 1:
        raise ApiError(400, f"n is {fields.n}: only 1 reply at a time", param="n")
    names = ["temperature", "top_p", "top_k", "min_p"]
    names += ["repetition_penalty", "presence_penalty", "frequency_penalty"]
    given: dict[str, Any] = {
        name: value for name in names if (value := getattr(fields, name)) is not None
    }
    if given.get("top_k") == -1:  # vLLM's "no cut"
        given["top_k"] = 0
    if fields.seed is not None:
        given["seed"] = fields.seed % (1 << 64)
    if fields.logit_bias:
        given["logit_bias"] = _biases(fields.logit_bias, model)
    if fields.stop:
        given["stop"] = _stops(fields.stop)
    if max_tokens is not None and max_tokens != -1:
        given["max_tokens"] = max_tokens
    if thinking_budget is not None:
        given["thinking_budget"] = thinking_budget
    base = model.defaults
    if base.temperature == 0 and given.get("temperature", 0) > 0:
        base = SamplingParams()  # the recommendation was greedy: its other numbers meant nothing
    return replace(base, **given)


def _biases(given: dict[str, float], model: ServedModel) -> dict[int, float]:
    if len(given) > MAX_BIASES:
        raise ApiError(
            400, f"logit_bias: more than {MAX_BIASES} tokens are named", param="logit_bias"
        )
    biases: dict[int, float] = {}
    n_vocab = model.tokenizer.n_vocab
    for key, bias in given.items():
        if not (key.isascii() and key.isdigit() and int(key[:9]) < n_vocab and len(key) < 9):
            raise ApiError(
                400,
                f"logit_bias: {key[:40]!r} is not a token id from 0 to {n_vocab - 1}",
                param="logit_bias",
            )
        biases[int(key)] = bias
    return biases


def _stops(given: str | list[str]) -> tuple[str, ...]:
    stops = (given,) if isinstance(given, str) else tuple(given)
    if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_CHARS for stop in stops):
        raise ApiError(
            400,
            f"stop: at most {MAX_STOPS} strings of at most {MAX_STOP_CHARS} characters",
            param="stop",
        )
    return stops
