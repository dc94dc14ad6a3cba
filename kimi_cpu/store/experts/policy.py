"""Which expert to let go when a slot is needed.

Experts are numbers 0 .. n - 1, counted through all layers. A policy only hears of uses and of
the end of each token; it is deterministic and knows no clock but the tokens.

Both policies are one score for each expert that only its own uses change, and only upwards. So a
heap of the resident ones may hold scores of the past: they are lower bounds, and an entry that
turns out to be out of date goes back in with its score of now. A use is a few operations on arrays,
which compiled code can make on its own, and a victim O(log n).
"""

from __future__ import annotations

import heapq
from collections.abc import Collection
from typing import Protocol

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

#: Tokens after which a use counts half. Simulated hit rates hardly depend on it (see the tests):
#: it only keeps the past from outweighing a change of subject for ever.
HALF_LIFE_TOKENS = 512
#: At a larger weight of new uses all frequencies are scaled, long before float64 overflows.
_LARGEST_WEIGHT = 1e100
#: After so many nothing is left of a use.
_MOST_HALF_LIVES = 300


class Policy(Protocol):
    """What a cache needs to know."""

    def use(self, expert: int, times: int = 1) -> None:
        """An expert is used `times` times by the tokens at hand, resident or not."""

    def tick(self, tokens: int = 1) -> None:
        """So many tokens are over."""

    def admit(self, expert: int) -> None:
        """The expert is resident from now on."""

    def evict(self, protected: Collection[int] = ()) -> int | None:
        """Choose a resident expert that is not protected, and count it as gone; None: no such."""


class _Scored:
    """Resident experts, least score first; among equals the lower number."""

    def __init__(self, n_experts: int) -> None:
        self.scores: F64 = np.zeros(n_experts)
        self._heap: list[tuple[float, int]] = []

    def admit(self, expert: int) -> None:
        heapq.heappush(self._heap, (float(self.scores[expert]), expert))

    def evict(self, protected: Collection[int] = ()) -> int | None:
        victims = self.evict_some(1, protected)
        return victims[0] if victims else None

    def evict_some(self, n: int, protected: Collection[int] = ()) -> list[int]:
        """Up to n of them, as if by so many calls of `evict`."""
        heap, scores = self._heap, self.scores
        victims, kept = list[int](), list[tuple[float, int]]()
        while heap and len(victims) < n:
            then, expert = heap[0]
            now = float(scores[expert])
            if then < now:
                heapq.heapreplace(heap, (now, expert))
            elif expert in protected:
                kept.append(heapq.heappop(heap))
            else:
                victims.append(heapq.heappop(heap)[1])
        for entry in kept:
            heapq.heappush(heap, entry)
        return victims

    def reset(self, resident: Collection[int]) -> None:
        """Exactly these experts are resident; the scores stay."""
        self._heap = [(float(self.scores[expert]), expert) for expert in resident]
        heapq.heapify(self._heap)


class Frequency(_Scored):
    """Least frequently used goes first, with dynamic ageing.

    A use sets the expert's score to `age` + its frequency; `age` is the score of the last victim.
    So an expert that was used often stays for as long as it takes the others to be let go as often
    as it was used, however fast or slow that is: nothing has to be tuned to the size of the cache.
    The frequency is counted over residence and absence, and a use counts half after
    `half_life` tokens: instead of letting old uses fade, new ones weigh more.

    Attributes:
        scores, frequencies: float64 [n].
        state: float64 [2], the weight of a use now, and `age`.

    Compiled code may do what `use` does to these arrays; they stay where they are.
    """

    def __init__(self, n_experts: int, half_life: float = HALF_LIFE_TOKENS) -> None:
        super().__init__(n_experts)
        self.frequencies: F64 = np.zeros(n_experts)
        self.state: F64 = np.array([1.0, 0.0])
        self._half_life = half_life

    def use(self, expert: int, times: int = 1) -> None:
        weight, age = self.state
        self.frequencies[expert] += times * weight
        score = age + self.frequencies[expert] / weight
        self.scores[expert] = max(self.scores[expert], score)

    def tick(self, tokens: int = 1) -> None:
        self.state[0] *= 2.0 ** min(tokens / self._half_life, _MOST_HALF_LIVES)
        if self.state[0] > _LARGEST_WEIGHT:
            self.frequencies /= self.state[0]
            self.state[0] = 1.0

    def evict_some(self, n: int, protected: Collection[int] = ()) -> list[int]:
        victims = super().evict_some(n, protected)
        for victim in victims:
            self.state[1] = max(self.state[1], self.scores[victim])
        return victims


class LeastRecent(_Scored):
    """Plain LRU, to compare with. The score is the number of the last use."""

    def __init__(self, n_experts: int) -> None:
        super().__init__(n_experts)
        self._clock = 0

    def use(self, expert: int, times: int = 1) -> None:
        self._clock += 1
        self.scores[expert] = self._clock

    def tick(self, tokens: int = 1) -> None:
        pass
