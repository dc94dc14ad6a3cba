"""What comes out of a comparison: statistics over turns, ratios, and the tables of them. Pure."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kimi_cpu.benchmark.runner import Test

#: This engine, among those of `bench.peers.PEERS`.
OURS = "kimi-cpu"

#: What the weights beside the routed experts are: in GGUF's words, and in ours.
TRUNKS = {"bf16": "bf16", "q8_0": "int8 groups"}


@dataclass(frozen=True)
class Contestant:
    """One engine on one model: a row of a table. `path`: our folder, or a GGUF file."""

    engine: str
    trunk: str
    path: Path

    @property
    def label(self) -> str:
        name = TRUNKS[self.trunk] if self.engine == OURS else self.trunk.upper()
        return f"{self.engine}, {name.replace('BF16', 'bf16')}"


@dataclass(frozen=True)
class Turn:
    """What a contestant measured in one round, and who it was.

    Attributes:
        label: the contestant's.
        engine, version, system, settings: who it was; `system` are the instructions it uses.
        seconds: by test, one for each repetition.
        logits: by test, of the last token.
        ceiling_fraction: by test, the share of `limit`; this engine only.
        ceiling_gbps: by test, what the best plain reader got from memory meanwhile, GB/s.
        round: which, from 0.
    """

    engine: str
    version: str
    system: str
    settings: str
    seconds: dict[str, list[float]]
    logits: dict[str, list[float]]
    ceiling_fraction: dict[str, float] = field(default_factory=dict)
    ceiling_gbps: dict[str, float] = field(default_factory=dict)
    label: str = ""
    round: int = 0


@dataclass(frozen=True)
class Cell:
    """Tokens a second of one contestant in one test, over all rounds."""

    median_ts: float
    min_ts: float
    max_ts: float
    avg_ts: float
    stddev_ts: float
    samples_ts: list[float]

    def __str__(self) -> str:
        return f"{self.median_ts:.2f} ({self.min_ts:.2f}-{self.max_ts:.2f})"


@dataclass(frozen=True)
class Ratio:
    """How many times as fast this engine is: of the medians, and from round to round."""

    median: float
    min: float
    max: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.min:.2f}-{self.max:.2f})"


def relative_error(logits: list[float], reference: list[float]) -> float:
    """Root mean square of the difference, as a share of the reference's spread."""
    ours, theirs = np.array(logits), np.array(reference)
    return float(np.sqrt(np.mean((ours - theirs) ** 2)) / np.std(theirs))


def _rates(turns: Sequence[Turn], test: Test) -> list[float]:
    return [test.n_tokens / seconds for turn in turns for seconds in turn.seconds[test.name]]


def cell(turns: Sequence[Turn], test: Test) -> Cell:
    """Statistics over one contestant's turns."""
    rates = _rates(turns, test)
    return Cell(
        median_ts=statistics.median(rates),
        min_ts=min(rates),
        max_ts=max(rates),
        avg_ts=statistics.fmean(rates),
        stddev_ts=statistics.stdev(rates) if len(rates) > 1 else 0.0,
        samples_ts=rates,
    )


def ratio(ours: Sequence[Turn], theirs: Sequence[Turn], test: Test) -> Ratio:
    """Of our speed to theirs; the spread is that between rounds, whose turns are close in time."""
    in_round = [
        statistics.median(_rates([a], test)) / statistics.median(_rates([b], test))
        for a in ours
        for b in theirs
        if a.round == b.round
    ]
    median = cell(ours, test).median_ts / cell(theirs, test).median_ts
    return Ratio(median, min(in_round), max(in_round))


def limit(ours: Sequence[Turn], test: Test) -> float:
    """Tokens a second if the weights were read as fast as plain readers read memory.

    No limit of prefill in fact: there the processor's arithmetic is one long before.
    """
    return statistics.median(
        statistics.fmean(_rates([turn], test)) / turn.ceiling_fraction[test.name] for turn in ours
    )


@dataclass(frozen=True)
class Table:
    """What is compared with each other: the peers with one kind of trunk, and this engine.

    Attributes:
        trunk: the peers' (a key of TRUNKS).
        cells: contestant's label -> test -> its statistics; ours, if it runs, is the first.
        limits: test -> `limit` with our weights, which are as long as theirs; empty if our model
            has another kind of trunk.
        ratios: peer's label -> test -> how many times as fast ours is.
        errors: peer's label -> test -> `relative_error` of its logits.
    """

    trunk: str
    cells: dict[str, dict[str, Cell]]
    limits: dict[str, float]
    ratios: dict[str, dict[str, Ratio]]
    errors: dict[str, dict[str, float]]


def tabulate(contestants: list[Contestant], turns: list[Turn], tests: list[Test]) -> list[Table]:
    """A table for each kind of trunk of the peers (of ours, if there are none)."""
    by_label: dict[str, list[Turn]] = {}
    for turn in turns:
        by_label.setdefault(turn.label, []).append(turn)
    there = [c for c in contestants if c.label in by_label]
    ours = [c for c in there if c.engine == OURS]
    peers = [c for c in there if c.engine != OURS]
    tables = []
    for trunk in dict.fromkeys(c.trunk for c in peers or ours):
        # With no model of ours that matches, the first one shows what a user of it gets.
        mine = sorted(ours, key=lambda c: c.trunk != trunk)[:1]
        rows = mine + [c for c in peers if c.trunk == trunk]
        cells = {c.label: {t.name: cell(by_label[c.label], t) for t in tests} for c in rows}
        limits, ratios, errors = {}, {}, {}
        if mine:
            reference = by_label[mine[0].label]
            if mine[0].trunk == trunk:
                limits = {t.name: limit(reference, t) for t in tests}
            for peer in rows[1:]:
                theirs = by_label[peer.label]
                ratios[peer.label] = {t.name: ratio(reference, theirs, t) for t in tests}
                errors[peer.label] = {
                    t.name: relative_error(reference[0].logits[t.name], theirs[0].logits[t.name])
                    for t in tests
                }
        tables.append(Table(trunk, cells, limits, ratios, errors))
    return tables


def _grid(head: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    tests = list(next(iter(rows.values())))
    lines = [f"| {' | '.join([head, *tests])} |", f"|{'---|' * (len(tests) + 1)}"]
    lines += [f"| {' | '.join([name, *map(str, row.values())])} |" for name, row in rows.items()]
    return lines


def markdown(tables: list[Table], turns: list[Turn]) -> str:
    """The tables, who ran, and what to doubt."""
    rounds, samples = len({t.round for t in turns}), len(next(iter(turns[0].seconds.values())))
    lines = [
        f"Tokens a second: median (smallest-largest) of {rounds} rounds x {samples}; "
        f"routed experts INT4 (GGUF: Q4_0), the other weights as named.",
    ]
    for table in tables:
        rows: dict[str, dict[str, Any]] = {**table.cells}
        if table.limits:
            rows["limit of memory"] = {name: f"{ts:.1f}" for name, ts in table.limits.items()}
        lines += ["", *_grid("t/s", rows)]
        if table.ratios:
            lines += ["", *_grid(f"{next(iter(table.cells))} is n times as fast as", table.ratios)]
    errors = {label: found for table in tables for label, found in table.errors.items()}
    lines.append("")
    for label in dict.fromkeys(turn.label for turn in turns):
        mine = [turn for turn in turns if turn.label == label]
        who = mine[0]
        instructions = re.findall(r"(\w+) = 1", who.system) or [who.system]
        line = f"- {label}: {who.version}; {who.settings}; {' '.join(instructions)}"
        if who.ceiling_gbps:
            readers = [gbps for turn in mine for gbps in turn.ceiling_gbps.values()]
            line += f"; best plain reader of memory {min(readers):.1f}-{max(readers):.1f} GB/s"
        if label in errors:
            low, high = min(errors[label].values()), max(errors[label].values())
            line += f"; its logits are {low:.1%}-{high:.1%} of their spread from ours"
        lines.append(line)
    if errors:
        lines.append("- Logits: some 10 % where rounding tips the router over to another expert.")
    return "\n".join(lines + [f"- NOT FAIR: {text}" for text in unfair(turns)])


def unfair(turns: list[Turn]) -> list[str]:
    """What makes a peer slower than it need be here."""
    wide = any(turn.engine == OURS and turn.system.startswith("avx512") for turn in turns)
    peers = {turn.engine: turn.system for turn in turns if turn.engine != OURS}
    return [
        f"{engine} was built without AVX-512; how to build it: see bench/compare.py."
        for engine, system in peers.items()
        if wide and "AVX512 = 1" not in system
    ]
