"""What the expert store counts."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from operator import add, sub


@dataclass(frozen=True)
class ExpertStats:
    """Counts since the store was made; subtract two to have those between them.

    Attributes:
        tokens: computed.
        uses, hits: experts that passes needed (each once a layer and pass), and those of them that
            were there when the router had spoken.
        read_bytes: for experts, from the disk or its cache.
        wait_s: seconds in which nothing could be computed for want of an expert.
        disk_s: seconds in which at least one reader was at work.
        ahead: experts loaded before the router of their layer had spoken ...
        ahead_used: ... that it then chose ...
        ahead_hits: ... and that were there by then (they count as hits).
    """

    tokens: int = 0
    uses: int = 0
    hits: int = 0
    read_bytes: int = 0
    wait_s: float = 0.0
    disk_s: float = 0.0
    ahead: int = 0
    ahead_used: int = 0
    ahead_hits: int = 0

    def __sub__(self, before: ExpertStats) -> ExpertStats:
        return ExpertStats(*map(sub, astuple(self), astuple(before)))

    def __add__(self, other: ExpertStats) -> ExpertStats:
        return ExpertStats(*map(add, astuple(self), astuple(other)))

    @property
    def hit_rate(self) -> float:
        """1.0 without uses."""
        return self.hits / self.uses if self.uses else 1.0

    @property
    def recall(self) -> float:
        """Of the experts that would have been missing, the part that was loaded ahead."""
        missing = self.uses - self.hits + self.ahead_hits
        return self.ahead_used / missing if missing else 0.0
