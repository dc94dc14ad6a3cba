"""From logits to a token: pure NumPy, no model and no text.

Order of operations, each skipped when its parameter is neutral:

1. `logit_bias` is added and banned ids become -inf;
2. `repetition_penalty` over the distinct tokens of prompt and reply (logit / p when positive,
   logit * p when negative: CTRL, as Hugging Face and vLLM define it), then `frequency_penalty`
   times the count and `presence_penalty` once for every token of the reply (OpenAI, vLLM);
3. temperature 0 takes the arg max (ties: the lowest id) and ends here;
4. logits / temperature, softmax;
5. `top_k` keeps the k best, renormalised; `top_p` keeps the smallest set whose mass reaches p
   (the token that crosses p is kept); `min_p` drops what is below min_p times the best;
6. one uniform number of a PCG64 stream picks the token by inverse CDF.

One number is drawn a sampled token, and nothing depends on threads or time: the same seed,
parameters and logits give the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from kimi_cpu.errors import UsageError, UserError

#: A set of token ids: id i is in it when bit i % 32 of word i // 32 is set; uint32 [>= V / 32].
AllowedBits = NDArray[np.uint32]

_NO_BIAS: Mapping[int, float] = MappingProxyType({})


def _number(name: str, value: object, low: float, high: float, wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        value_ok = False
    else:
        value_ok = math.isfinite(value) and low <= float(value) <= high
    if not value_ok:
        raise UsageError(f"{name} is {value!r}", f"{name} must be {wanted}.")


def _integer(name: str, value: object, low: int, wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
        raise UsageError(f"{name} is {value!r}", f"{name} must be {wanted}.")


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop; every field is checked on construction.

    Raises `UsageError` naming the parameter for a value out of range.

    temperature: 0 is greedy; 1 samples the model's own distribution.
    top_p, top_k, min_p: cuts, see the module docstring; top_k 0 means no cut.
    repetition_penalty, presence_penalty, frequency_penalty: 1, 0, 0 are neutral.
    logit_bias: token id -> number added to its logit, -100 to 100 (-100 in effect bans).
    seed: None draws one from the operating system.
    stop: strings that end the reply's content (they are not part of it).
    max_tokens: limit on all new tokens, reasoning included; None: until the context is full.
    thinking_budget: limit on reasoning tokens, then the reasoning is closed; 0 turns it off.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: _NO_BIAS)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    thinking_budget: int | None = None

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0, 100, "a number from 0 (greedy) to 100")
        _number("top_p", self.top_p, 1e-9, 1, "a number above 0 and at most 1 (1: no cut)")
        _integer("top_k", self.top_k, 0, "a whole number, 0 (no cut) or more")
        _number("min_p", self.min_p, 0, 1, "a number from 0 (no cut) to 1")
        _number(
            "repetition_penalty", self.repetition_penalty, 0.01, 100, "from 0.01 to 100 (1: none)"
        )
        for name in ("presence_penalty", "frequency_penalty"):
            _number(name, getattr(self, name), -100, 100, "a number from -100 to 100 (0: none)")
        if not isinstance(self.logit_bias, Mapping):
            raise UsageError(
                f"logit_bias is {self.logit_bias!r}", "logit_bias must map token ids to numbers."
            )
        for token, bias in self.logit_bias.items():
            _integer("a token id in logit_bias", token, 0, "a whole number, 0 or more")
            _number(f"logit_bias[{token}]", bias, -100, 100, "a number from -100 to 100")
        if self.seed is not None:
            _integer("seed", self.seed, 0, "a whole number, 0 or more")
        stop: object = self.stop
        if isinstance(stop, str):
            stop = (stop,)
        if not isinstance(stop, tuple | list) or not all(isinstance(s, str) and s for s in stop):
            raise UsageError(f"stop is {stop!r}", "stop must be a list of non-empty strings.")
        object.__setattr__(self, "stop", tuple(stop))
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, "a whole number, 1 or more")
        if self.thinking_budget is not None:
            _integer("thinking_budget", self.thinking_budget, 0, "0 (no thinking) or more tokens")


class Sampler:
    """Chooses the next token of one reply; holds the random stream and the token counts.

    `sample` never changes the counts: call `accept` for each token that joins the reply, sampled
    or forced, so that the penalties see it.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Iterable[int] = (),
        banned: Iterable[int] = (),
    ) -> None:
        """prompt_ids: for repetition_penalty; banned: ids that must never be chosen."""
        self.params = params
        self._rng = np.random.Generator(np.random.PCG64(params.seed))
        self._banned = np.array(sorted(set(banned)), dtype=np.int64)
        self._counts: dict[int, int] = {}  # tokens of the reply
        self._seen: set[int] = set(prompt_ids) if params.repetition_penalty != 1 else set()
        self._bias_ids = np.array(list(params.logit_bias), dtype=np.int64)
        self._bias = np.array(list(params.logit_bias.values()), dtype=np.float32)

    def ban(self, *ids: int) -> None:
        """From now on never choose these ids."""
        self._banned = np.union1d(self._banned, np.array(ids, dtype=np.int64))

    def accept(self, token: int) -> None:
        """Count a token that joined the reply."""
        self._counts[token] = self._counts.get(token, 0) + 1
        if self.params.repetition_penalty != 1:
            self._seen.add(token)

    def sample(self, logits: NDArray[np.float32], allowed: AllowedBits | None = None) -> int:
        """The next token id for logits float32 [V], which are not changed.

        allowed: the only ids to choose from.

        Raises `UserError` for NaN or infinite logits, `UsageError` when a logit_bias id is
        outside the vocabulary or nothing is left to choose from.
        """
        logits = self._adjusted(logits)
        if allowed is not None:
            logits = logits + _penalties(allowed, logits.size)
        best = int(np.argmax(logits))  # the first NaN if there is one
        top = logits[best]
        if not math.isfinite(top):
            raise _unusable(logits)
        if self.params.temperature == 0:
            return best
        return self._draw(logits, top)

    def _adjusted(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        params = self.params
        penalise = params.presence_penalty != 0 or params.frequency_penalty != 0
        counts = self._counts if penalise else {}
        if not (self._bias_ids.size or self._banned.size or self._seen or counts):
            return logits
        logits = logits.astype(np.float32, copy=True)
        if self._bias_ids.size:
            if int(self._bias_ids.max()) >= logits.size:
                raise UsageError(
                    f"logit_bias names token {int(self._bias_ids.max())}",
                    f"The vocabulary has the ids 0 to {logits.size - 1}.",
                )
            logits[self._bias_ids] += self._bias
        if self._banned.size:
            logits[self._banned[self._banned < logits.size]] = -np.inf
        if self._seen:
            ids = np.fromiter(self._seen, np.int64, len(self._seen))
            old = logits[ids]
            p = np.float32(params.repetition_penalty)
            logits[ids] = np.where(old > 0, old / p, old * p)
        if counts:
            ids = np.fromiter(counts, np.int64, len(counts))
            times = np.fromiter(counts.values(), np.float32, len(counts))
            logits[ids] -= np.float32(params.frequency_penalty) * times
            logits[ids] -= np.float32(params.presence_penalty)
        return logits

    def _draw(self, logits: NDArray[np.float32], top: np.float32) -> int:
        params = self.params
        ids: NDArray[np.int64] | None = None  # None: all ids in order
        k = params.top_k
        if 0 < k < logits.size:
            kth = np.partition(logits, logits.size - k)[logits.size - k]
            ids = np.flatnonzero(logits >= kth)
            if ids.size > k:  # ties at the border: the lower ids stay
                ids = ids[np.argsort(-logits[ids], kind="stable")[:k]]
                ids.sort()
            logits = logits[ids]
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            # float32 keeps 163,840 exponentials cheap; a tiny temperature underflows to greedy
            p = np.exp((logits - top) / np.float32(max(params.temperature, 1e-6)))
        if params.top_p < 1:
            ids, p = _nucleus(ids, p, params.top_p)
        if params.min_p > 0:
            keep = np.flatnonzero(p >= np.float32(params.min_p) * p.max())
            ids, p = (keep if ids is None else ids[keep]), p[keep]
        at = _inverse_cdf(p, self._rng.random())
        return at if ids is None else int(ids[at])


def logprobs(
    logits: NDArray[np.float32], token: int, top: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The natural log probability of `token`, and the `top` likeliest ids with theirs.

    logits: float32 [V]. Best first; of equal ones the lower id.
    """
    best = logits.max()
    with np.errstate(under="ignore", invalid="ignore"):
        log_sum = float(best) + math.log(np.exp(logits - best).sum(dtype=np.float64))
    top = min(top, logits.size)
    if top == 0:
        return float(logits[token]) - log_sum, ()
    ids = np.flatnonzero(logits >= np.partition(logits, logits.size - top)[-top])
    ids = ids[np.argsort(-logits[ids], kind="stable")[:top]]
    likeliest = tuple((int(i), float(logits[i]) - log_sum) for i in ids)
    return float(logits[token]) - log_sum, likeliest


def _penalties(allowed: AllowedBits, n: int) -> NDArray[np.float32]:
    """0 for each of n ids that is allowed, -inf for the others.

    Eight ids at a time from a table: 0.05 ms for 163,840 ids whatever the bits; choosing with
    `np.where` takes up to 0.6 ms, when the bits are mixed.
    """
    found = np.take(_PENALTIES, allowed.view(np.uint8), axis=0).reshape(-1)[:n]
    if found.size < n:
        found = np.concatenate([found, np.full(n - found.size, -np.inf, np.float32)])
    return found


_BYTES = np.arange(256, dtype=np.uint8)[:, None]
_PENALTIES = np.where(np.unpackbits(_BYTES, axis=1, bitorder="little"), 0, -np.inf).astype(
    np.float32
)


def _inverse_cdf(p: NDArray[np.float32], uniform: float) -> int:
    """The index where the running share of p's mass exceeds uniform (in [0, 1)).

    First over blocks, then inside one: a running sum of the whole vocabulary costs 1 ms more.
    """
    starts = np.arange(0, p.size, 1024)
    blocks = np.cumsum(np.add.reduceat(p, starts, dtype=np.float64))
    target = uniform * blocks[-1]
    b = min(int(np.searchsorted(blocks, target, side="right")), blocks.size - 1)
    inside = np.cumsum(p[b * 1024 : (b + 1) * 1024], dtype=np.float64)
    at = int(np.searchsorted(inside, target - (blocks[b - 1] if b else 0.0), side="right"))
    # rounding may step past the end: the last id with any mass is meant
    last = int(np.searchsorted(inside, inside[-1], side="left"))
    return b * 1024 + min(at, last)


def _nucleus(
    ids: NDArray[np.int64] | None, p: NDArray[np.float32], top_p: float
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The smallest set of best tokens whose share of p's mass reaches top_p, in id order.

    Tokens below (1 - top_p) / n of the mass weigh less than 1 - top_p together, so the set lies
    among the others: only those few are sorted.
    """
    total = float(p.sum(dtype=np.float64))
    few = np.flatnonzero(p >= np.float32(total * (1 - top_p) / p.size * 0.999))
    order = few[np.argsort(-p[few], kind="stable")]
    before = np.cumsum(p[order], dtype=np.float64) - p[order]
    kept = np.sort(order[before < top_p * total])
    return (kept if ids is None else ids[kept]), p[kept]


def _unusable(logits: NDArray[np.float32]) -> UserError:
    if np.isnan(logits).any() or np.isposinf(logits).any():
        return UserError(
            "the model returned logits that are not finite",
            "The checkpoint may be damaged, or a kernel is wrong: try --precision exact.",
        )
    return UsageError("no token is left to choose from", "logit_bias bans every token.")
